// What quantize and init share: the options of a model file to write, and the work around writing it.
#pragma once

#include "model/make.h"

#include <functional>
#include <string>

namespace CLI {
class App;
}

namespace mla {

struct WritingOptions {
  std::string out, type;
  int threads = 0;

  bool gguf() const;  // or a folder
  void check() const;
};

void add_writing_options(CLI::App& command, WritingOptions& options);

// Runs `make` with threads and a progress bar, and says on stderr what was written.
void write_model(const WritingOptions& options, const std::function<Made(DType type, Threads& threads, const Progress& progress)>& make);

}  // namespace mla
