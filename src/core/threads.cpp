// Each loop is an epoch: the caller publishes it, everybody takes indices from one counter, and the caller waits until all have ended.
#include "core/threads.h"

#include "core/check.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace mla {
namespace {

// A thread that waits longer than the serial code between two loops of a decode step takes lets others have its processor; much later a
// worker sleeps, since on a virtual machine it takes part of a millisecond to come back.
constexpr std::chrono::microseconds yield_after{50}, sleep_after{3000};

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Waits until done(), at most for so long, and returns whether it is.
template <class Done>
bool wait_awake(Done done, std::chrono::steady_clock::duration most) {
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  for (auto now = begin; now - begin < most; now = Clock::now()) {
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
      relax();
    }
    if (now - begin > yield_after) std::this_thread::yield();
  }
  return done();
}

}  // namespace

int available_processors() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, int(std::thread::hardware_concurrency()));
}

struct Threads::State {
  int count = 1;
  std::vector<std::thread> workers;

  alignas(64) std::atomic<uint64_t> epoch{0};  // even: idle or running; a new value starts a loop
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int> busy{0};
  Call call = nullptr;
  void* context = nullptr;
  int64_t n = 0, step = 1;  // indices taken at a time
  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::condition_variable wake;
  std::atomic<int> sleeping{0};
  std::mutex error_mutex;
  std::exception_ptr error;

  void work(int thread) {
    for (;;) {
      const int64_t first = next.fetch_add(step, std::memory_order_relaxed);
      if (first >= n) return;
      try {
        for (int64_t i = first; i < std::min(n, first + step); ++i) call(context, i, thread);
      } catch (...) {
        std::lock_guard lock(error_mutex);
        if (!error) error = std::current_exception();
        next.store(n, std::memory_order_relaxed);
      }
    }
  }

  void loop(int thread) {
    uint64_t seen = 0;
    for (;;) {
      if (!wait_awake([&] { return epoch.load(std::memory_order_acquire) != seen; }, sleep_after)) {
        std::unique_lock lock(mutex);
        sleeping.fetch_add(1);
        wake.wait(lock, [&] { return epoch.load() != seen; });
        sleeping.fetch_sub(1);
      }
      seen = epoch.load(std::memory_order_acquire);
      if (stop.load(std::memory_order_relaxed)) return;
      work(thread);
      busy.fetch_sub(1, std::memory_order_release);
    }
  }
};

Threads::Threads(int count) : state_(std::make_unique<State>()) {
  CHECK(count >= 0 && count <= 4096, "{} threads asked for", count);
  state_->count = count == 0 ? available_processors() : count;
  for (int i = 1; i < state_->count; ++i) state_->workers.emplace_back([s = state_.get(), i] { s->loop(i); });
}

Threads::~Threads() {
  State& s = *state_;
  s.stop = true;
  {
    std::lock_guard lock(s.mutex);
    s.epoch.fetch_add(1);
  }
  s.wake.notify_all();
  for (auto& worker : s.workers) worker.join();
}

int Threads::count() const { return state_->count; }

void Threads::run(int64_t n, Call call, void* context) {
  State& s = *state_;
  if (n <= 0) return;
  if (s.workers.empty() || n == 1) {
    for (int64_t i = 0; i < n; ++i) call(context, i, 0);
    return;
  }
  s.call = call;
  s.context = context;
  s.n = n;
  s.step = std::max<int64_t>(1, n / (32 * s.count));  // short tasks would queue up for the counter
  s.next.store(0, std::memory_order_relaxed);
  s.busy.store(int(s.workers.size()), std::memory_order_relaxed);
  s.epoch.fetch_add(1);
  if (s.sleeping.load() > 0) {
    { std::lock_guard lock(s.mutex); }
    s.wake.notify_all();
  }
  s.work(0);
  wait_awake([&] { return s.busy.load(std::memory_order_acquire) == 0; }, std::chrono::steady_clock::duration::max());
  if (s.error) std::rethrow_exception(std::exchange(s.error, nullptr));
}

}  // namespace mla
