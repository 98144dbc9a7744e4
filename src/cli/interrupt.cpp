// A signal handler that sets a flag.
#include "cli/interrupt.h"

#include "core/check.h"

#include <unistd.h>
#include <atomic>
#include <csignal>

namespace mla {
namespace {

std::atomic<bool> flag = false;
static_assert(std::atomic<bool>::is_always_lock_free);

extern "C" void on_interrupt(int) {
  if (flag.exchange(true)) _exit(130);
}

}  // namespace

void catch_interrupts() {
  struct sigaction action = {};
  action.sa_handler = on_interrupt;  // without SA_RESTART: a read from the terminal ends too
  sigemptyset(&action.sa_mask);
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

bool interrupted() { return flag; }
void forget_interrupt() { flag = false; }

void throw_if_interrupted() {
  if (flag) give_up();
}

void give_up() { throw Error(ErrorKind::interrupted, "interrupted"); }

void until_interrupted(const std::function<void()>& work) {
  try {
    work();
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::interrupted) throw;
  }
}

}  // namespace mla
