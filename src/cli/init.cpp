// mla init: a random checkpoint of any shape, for tests and for measuring speed.
#include "cli/command.h"
#include "cli/help.h"
#include "cli/writing.h"

#include <CLI/CLI.hpp>

namespace mla {
namespace {

struct InitOptions {
  std::string config;
  uint64_t seed = 0;
  WritingOptions writing{"", "bf16", 0};
};

void init(const InitOptions& o) {
  o.writing.check();
  const Config config = read_config_file(o.config);
  write_model(o.writing, [&](DType type, Threads& threads, const Progress& progress) {
    return make_random(config, o.writing.out, type, o.seed, threads, progress);
  });
}

}  // namespace

void add_init(CLI::App& program, Work& work) {
  auto o = std::make_shared<InitOptions>();
  CLI::App& c = add_command(program, "init", "write a random checkpoint of any shape",
                            "  mla init config.json -o random.gguf --type q4_0\n"
                            "  mla init config.json -o folder --type f32 --seed 7");
  c.add_option("CONFIG", o->config, "a config.json, or a folder that has one")->required()->group("arguments");
  add_writing_options(c, o->writing);
  c.add_option("--seed", o->seed, "the same seed gives the same file (default: 0)")->option_text("S")->group("output");
  c.final_callback([o, &work] { work = [o] { init(*o); }; });
}

}  // namespace mla
