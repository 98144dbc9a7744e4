// --dump: every named intermediate of a run in one .safetensors file.
#pragma once

#include "core/tensor.h"

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <unordered_map>
#include <vector>

namespace mla {

// Tensors go to a temporary file as they come, and under the final name, behind their header, in the end. A name that comes again, as
// in every step of a run, gets the number of its occurrence: "layers.3.attn.latent", "layers.3.attn.latent.2", ...
class DumpFile {
 public:
  explicit DumpFile(std::filesystem::path path);
  ~DumpFile();
  DumpFile(const DumpFile&) = delete;
  DumpFile& operator=(const DumpFile&) = delete;

  void add(const std::string& name, const Tensor& tensor);  // host f32, rows may be strided
  void finish();

 private:
  struct Entry {
    std::string name;
    std::vector<int64_t> shape;
    uint64_t begin, end;
  };
  std::filesystem::path path_, data_path_;
  std::ofstream data_;
  std::vector<Entry> entries_;
  std::unordered_map<std::string, int> seen_;
  uint64_t bytes_ = 0;
};

}  // namespace mla
