// mla quantize: a model as a GGUF file of another type, or as a Hugging Face folder.
#include "cli/command.h"
#include "cli/help.h"
#include "cli/options.h"
#include "cli/writing.h"
#include "core/check.h"
#include "io/checkpoint.h"

#include <CLI/CLI.hpp>

namespace mla {
namespace {

struct QuantizeOptions {
  std::string path;
  WritingOptions writing{"", "q8_0", 0};
};

void quantize(const QuantizeOptions& o) {
  o.writing.check();
  const std::filesystem::path out = o.writing.out;
  std::error_code ignored;
  if (std::filesystem::equivalent(o.path, out, ignored)) fail_input("-o is the model itself, {}; give another name", o.writing.out);
  const Checkpoint checkpoint = Checkpoint::open(o.path);
  write_model(o.writing, [&](DType type, Threads& threads, const Progress& progress) {
    return o.writing.gguf() ? quantize_model(checkpoint, out, type, threads, progress)
                            : export_hf(checkpoint, out, type, threads, progress);
  });
}

}  // namespace

void add_quantize(CLI::App& program, Work& work) {
  auto o = std::make_shared<QuantizeOptions>();
  CLI::App& c = add_command(program, "quantize", "write a model as GGUF of another type, or as a Hugging Face folder",
                            "  mla quantize folder -o model.gguf --type q4_0\n"
                            "  mla quantize model.gguf -o folder --type bf16");
  add_model_path(c, o->path);
  add_writing_options(c, o->writing);
  c.final_callback([o, &work] { work = [o] { quantize(*o); }; });
}

}  // namespace mla
