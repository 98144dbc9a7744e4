// Ctrl-C: the first asks the work to stop and print what was done, the second ends the program at once.
#pragma once

namespace mla {

void catch_interrupts();
bool interrupted();
void forget_interrupt();      // a chat goes on after one
void throw_if_interrupted();  // raises Error of kind interrupted
[[noreturn]] void give_up();  // raises it in any case

}  // namespace mla
