// A model on disk, whatever its format: an HF folder (config.json and safetensors) or a GGUF file, mapped and not copied.
#pragma once

#include "core/tensor.h"

#include <nlohmann/json_fwd.hpp>

#include <cstddef>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace mla {

// A file in memory, read only. Empty files are fine. Raises Error with the path and the reason.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  const std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  // The pages of this range are not needed any more; the kernel may drop them (they can be read again).
  void release(const void* from, size_t bytes) const;

 private:
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// A tensor in the file: shape as we use it, [rows, cols] or [n, rows, cols], outermost first; data points into the mapping, and so do the
// scales of fp8 weights, which are no tensors of their own.
struct StoredTensor {
  std::string name;  // ours: "layers.3.attn.kv_a", with ".bias" for biases and no suffix for weights
  Tensor value;
  const MappedFile* file;

  int64_t bytes() const { return row_bytes(value.dtype, value.count()); }
};

enum class Format : uint8_t { hf, gguf };

class Checkpoint {
 public:
  // A folder with config.json, or a .gguf file. Everything is checked here: sizes, overlaps, types, names.
  static Checkpoint open(const std::filesystem::path& path);
  Checkpoint(Checkpoint&&) noexcept;
  ~Checkpoint();

  Format format() const;
  const std::filesystem::path& path() const;
  // hf: config.json. gguf: the metadata as one flat object, arrays of more than 1024 elements left out.
  const nlohmann::json& metadata() const;
  const StoredTensor* find(std::string_view our_name) const;  // null when absent
  const StoredTensor& get(std::string_view our_name) const;   // raises Error that names it
  const std::vector<StoredTensor>& tensors() const;
  // Tokenizer sources. hf: the text of tokenizer.json, tokenizer_config.json, generation_config.json, or nothing.
  std::optional<std::string> text(std::string_view file_name) const;
  // tokenizer_config.json, with the chat template that newer folders keep in chat_template.jinja; {} where there is neither.
  std::string tokenizer_config() const;
  // gguf: the long arrays, as typed vectors; empty when absent, Error when the type is another.
  std::vector<std::string> strings(std::string_view key) const;
  std::vector<float> floats(std::string_view key) const;
  std::vector<int32_t> ints(std::string_view key) const;
  int64_t file_bytes() const;

  struct State;

 private:
  explicit Checkpoint(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace mla
