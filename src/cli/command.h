// What main and the commands agree on: each command adds itself to the command line and says what to do if it was chosen.
#pragma once

#include <functional>
#include <string>

namespace CLI {
class App;
}

namespace mla {

// Set by the command that was chosen; main runs it once the whole command line has been understood.
using Work = std::function<void()>;

void add_run(CLI::App& program, Work& work);
void add_chat(CLI::App& program, Work& work);
void add_eval(CLI::App& program, Work& work);
void add_inspect(CLI::App& program, Work& work);
void add_compare(CLI::App& program, Work& work);
void add_bench(CLI::App& program, Work& work);
void add_quantize(CLI::App& program, Work& work);
void add_init(CLI::App& program, Work& work);
void add_lowrank(CLI::App& program, Work& work);
void add_convert(CLI::App& program, Work& work);
void add_tokenize(CLI::App& program, Work& work);
void add_logits(CLI::App& program, Work& work);
void add_doctor(CLI::App& program, Work& work);

}  // namespace mla
