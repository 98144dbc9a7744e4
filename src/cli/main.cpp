// The program `mla`: reads the command line, runs one command, and turns what went wrong into one line and an exit code.
#include "cli/command.h"
#include "cli/help.h"
#include "cli/interrupt.h"
#include "cli/machine.h"
#include "core/check.h"
#include "lowrank/matrix.h"

#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstdio>
#include <new>

namespace mla {
namespace {

constexpr int done = 0, work_failed = 1, wrong_input = 2, interrupted_code = 130;

int exit_code(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::input: return wrong_input;
    case ErrorKind::interrupted: return interrupted_code;
    case ErrorKind::failed: break;
  }
  return work_failed;
}

int complain(int code, const std::string& message) {
  std::fflush(stdout);
  fmt::print(stderr, "mla: error: {}\n", message);
  return code;
}

// The command that the words on the command line got to, for "see mla run --help".
std::string help_of(const CLI::App& program) {
  const auto chosen = program.get_subcommands();
  return chosen.empty() ? "mla --help" : "mla " + chosen.front()->get_name() + " --help";
}

int run(int argc, char** argv) {
  CLI::App program("Runs DeepSeek-V2 and LLaMA-like language models, keeping only latents in the cache.");
  Work work;
  prepare_help(program);
  for (auto add : {add_run, add_chat, add_eval, add_inspect, add_compare, add_bench, add_quantize, add_init, add_convert, add_lowrank,
                   add_tokenize, add_logits, add_doctor})
    add(program, work);
  try {
    program.parse(argc, argv);
  } catch (const CLI::CallForVersion& version) {
    fmt::print("{}\n", version.what());
    return done;
  } catch (const CLI::Success&) {
    fmt::print("{}", help_text(program));
    return done;
  } catch (const CLI::ParseError& error) {
    if (argc == 1) {
      fmt::print(stderr, "{}", help_text(program));
      return wrong_input;
    }
    if (argv[1][0] != '-' && program.get_subcommands().empty())
      return complain(wrong_input, fmt::format("there is no command {}; see mla --help", argv[1]));
    return complain(wrong_input, fmt::format("{}; see {}", usage_problem(error.what()), help_of(program)));
  }
  catch_interrupts();
  work();
  if (std::fflush(stdout) != 0 || std::ferror(stdout)) fail("the output could not be written; is the disk full?");
  return done;
}

}  // namespace
}  // namespace mla

int main(int argc, char** argv) {
  using namespace mla;
  const auto sets = instruction_sets();
  const auto has = [&](const char* set) { return std::ranges::find(sets, set) != sets.end(); };
  restart_on_better_core(argv, has("avx2") && has("fma"), has("avx512f") && has("avx512bw") && has("avx512vl"));
  try {
    return run(argc, argv);
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::interrupted) return complain(exit_code(error.kind()), error.what());
    std::fflush(stdout);
    fmt::print(stderr, "mla: {}\n", error.what());
    return interrupted_code;
  } catch (const std::bad_alloc&) {
    return complain(work_failed, "there is not enough memory; a smaller --context or --kv-type needs less");
  } catch (const std::exception& error) { return complain(work_failed, error.what()); }
}
