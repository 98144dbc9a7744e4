// Checks the type and the name of a file to write before any work is done.
#include "cli/writing.h"

#include "cli/format.h"
#include "cli/interrupt.h"
#include "cli/options.h"
#include "cli/progress.h"
#include "core/check.h"
#include "core/threads.h"

#include <CLI/CLI.hpp>

#include <chrono>

namespace mla {

bool WritingOptions::gguf() const { return std::filesystem::path(out).extension() == ".gguf"; }

void WritingOptions::check() const {
  const auto dtype = parse_dtype(type);
  const bool plain = dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16;
  const bool blocks = dtype == DType::q8_0 || dtype == DType::q4_0;
  if (!plain && !(gguf() ? blocks : dtype == DType::f8))
    fail_input("--type is \"{}\"; {}", type,
               gguf() ? "a .gguf is written as q8_0, q4_0, bf16, f16 or f32"
                      : "a folder is written as bf16, f16, f32 or fp8; for q8_0 and q4_0 let -o end in .gguf");
  if (gguf()) check_output(out, "-o");
  if (threads < 0 || threads > 1024) fail_input("--threads is {}; give 1 to 1024, or 0 for all processors", threads);
}

void add_writing_options(CLI::App& command, WritingOptions& o) {
  command.add_option("-o,--output", o.out, "a file that ends in .gguf, or a folder")->required()->option_text("PATH")->group("output");
  command
      .add_option("--type", o.type, fmt::format("q8_0, q4_0, bf16, f16 or f32; folders take the last three or fp8 (default: {})", o.type))
      ->option_text("TYPE")
      ->group("output");
  command.add_option("-t,--threads", o.threads, "threads to work with (default: all processors)")->option_text("N")->group("machine");
}

void write_model(const WritingOptions& o, const std::function<Made(DType, Threads&, const Progress&)>& make) {
  Threads threads(o.threads);
  ProgressBar bar("writing");
  const auto begin = std::chrono::steady_clock::now();
  const Made made = make(*parse_dtype(o.type), threads, [&](double fraction) {
    throw_if_interrupted();
    bar.update(fraction);
  });
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  bar.clear();
  for (const std::string& note : made.notes) fmt::print(stderr, "mla: note: {}\n", note);
  fmt::print(stderr, "mla: wrote {} tensors, {}, to {} in {}\n", made.tensors, bytes_text(double(made.bytes)), o.out,
             duration_text(seconds));
}

}  // namespace mla
