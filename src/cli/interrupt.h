// Ctrl-C: the first asks the work to stop and print what was done, the second ends the program at once.
#pragma once

#include <functional>

namespace mla {

void catch_interrupts();
bool interrupted();
void forget_interrupt();      // a chat goes on after one
void throw_if_interrupted();  // raises Error of kind interrupted
[[noreturn]] void give_up();  // raises it in any case

// Runs work, to where it raises that.
void until_interrupted(const std::function<void()>& work);

}  // namespace mla
