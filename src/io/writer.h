// Writing model files in bounded memory: tensors are declared first, then their bytes are appended in the declared order.
// Everything goes to a temporary name beside the target and is renamed by finish(); without finish() nothing is left behind.
#pragma once

#include "core/dtype.h"

#include <nlohmann/json_fwd.hpp>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace mla {

struct TensorPlan {
  std::string name;  // ours
  DType dtype;
  std::vector<int64_t> shape;  // outermost first
};
int64_t bytes_of(const TensorPlan& plan);

class ModelWriter {
 public:
  virtual ~ModelWriter() = default;
  // The bytes of the next part of the current tensor; parts may be of any size and the writer moves on when a tensor is full.
  virtual void append(std::span<const std::byte> bytes) = 0;
  virtual void finish() = 0;  // raises Error if a tensor is missing bytes or the disk is full
};

// GGUF v3 that llama.cpp loads. metadata: a flat object of scalars and arrays; a key's GGUF type follows llama.cpp's table.
std::unique_ptr<ModelWriter> write_gguf(const std::filesystem::path& path, const nlohmann::json& metadata,
                                        const std::vector<TensorPlan>& tensors);

// An HF folder: config.json, model.safetensors (shards of at most `shard_bytes` with an index), and `files` copied in beside them.
struct SideFile {
  std::string name, text;
};
std::unique_ptr<ModelWriter> write_hf(const std::filesystem::path& folder, const nlohmann::json& config,
                                      const std::vector<TensorPlan>& tensors, const std::vector<SideFile>& files,
                                      int64_t shard_bytes = int64_t(5) << 30);

}  // namespace mla
