// GGUF version 3: metadata, the list of tensors, then their bytes, each tensor at a multiple of 32.
#include "core/check.h"
#include "io/names.h"
#include "io/writer.h"
#include "io/writer_file.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <bit>

namespace mla {
namespace {

using nlohmann::json;
static_assert(std::endian::native == std::endian::little, "the formats written here are little endian");

constexpr int64_t alignment = 32;

enum class Value : uint32_t { u32 = 4, i32 = 5, f32 = 6, boolean = 7, string = 8, array = 9, u64 = 10, i64 = 11 };

uint32_t tensor_type(DType type) {
  switch (type) {
    case DType::f32: return 0;
    case DType::f16: return 1;
    case DType::q4_0: return 2;
    case DType::q4_1: return 3;
    case DType::q8_0: return 8;
    case DType::q4_k: return 12;
    case DType::q5_k: return 13;
    case DType::q6_k: return 14;
    case DType::bf16: return 30;
    default: fail("GGUF has no tensors of type {} here", info(type).name);
  }
}

class Header {
 public:
  std::string bytes;

  template <class T>
  void put(T value) {
    bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void put(std::string_view text) {
    put(uint64_t(text.size()));
    bytes += text;
  }
  void put(const json& value, const std::string& key) {
    const Value type = type_of(value, key);
    put(uint32_t(type));
    if (type != Value::array) return put_scalar(value, type);
    const Value element = type_of_elements(value, key);
    put(uint32_t(element));
    put(uint64_t(value.size()));
    for (const json& e : value) put_scalar(e, element);
  }

 private:
  // llama.cpp asks for u32 where a count is meant and for f32 where a number is; only what does not fit takes more.
  static Value type_of(const json& value, const std::string& key) {
    if (value.is_array()) return Value::array;
    if (value.is_boolean()) return Value::boolean;
    if (value.is_string()) return Value::string;
    if (value.is_number_float()) return Value::f32;
    if (!value.is_number_integer()) fail("GGUF metadata {} holds {}, which has no type there", key, value.type_name());
    if (!value.is_number_unsigned() && value.get<int64_t>() < 0) return value.get<int64_t>() >= INT32_MIN ? Value::i32 : Value::i64;
    return value.get<uint64_t>() <= UINT32_MAX ? Value::u32 : Value::u64;
  }

  static Value type_of_elements(const json& array, const std::string& key) {
    if (array.empty()) return Value::string;
    const json& first = array[0];
    for (const json& e : array) {
      if (e.is_string() != first.is_string() || e.is_boolean() != first.is_boolean() || e.is_number_float() != first.is_number_float())
        fail("GGUF metadata {} mixes types", key);
      if (first.is_number_integer() && (e.get<int64_t>() < INT32_MIN || e.get<int64_t>() > INT32_MAX)) return Value::i64;
    }
    return first.is_number_integer() ? Value::i32 : type_of(first, key);
  }

  void put_scalar(const json& value, Value type) {
    switch (type) {
      case Value::u32: return put(value.get<uint32_t>());
      case Value::i32: return put(value.get<int32_t>());
      case Value::f32: return put(value.get<float>());
      case Value::boolean: return put(uint8_t(value.get<bool>()));
      case Value::string: return put(std::string_view(value.get_ref<const std::string&>()));
      case Value::u64: return put(value.get<uint64_t>());
      case Value::i64: return put(value.get<int64_t>());
      case Value::array: fail("GGUF has no arrays of arrays here");
    }
  }
};

int64_t padded(int64_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }

class GgufWriter : public ModelWriter {
 public:
  GgufWriter(const std::filesystem::path& path, const json& metadata, const std::vector<TensorPlan>& tensors) : file_(path) {
    // The architecture first: readers may look for it before they know the other keys.
    std::vector<std::string> keys{"general.architecture"};
    for (const auto& [key, value] : metadata.items())
      if (key != keys[0] && key != "general.alignment") keys.push_back(key);
    CHECK(metadata.contains(keys[0]) && keys.size() == metadata.size() - metadata.contains("general.alignment"), "metadata without {}",
          keys[0]);
    Header h;
    h.bytes = "GGUF";
    h.put(uint32_t(3));
    h.put(uint64_t(tensors.size()));
    h.put(uint64_t(keys.size() + 1));
    for (const std::string& key : keys) {
      h.put(std::string_view(key));
      h.put(metadata[key], key);
    }
    h.put(std::string_view("general.alignment"));
    h.put(json(alignment), "general.alignment");

    int64_t offset = 0;
    for (const TensorPlan& t : tensors) {
      const auto name = stored_name(Format::gguf, t.name);
      CHECK(name, "GGUF has no name for {}", t.name);
      h.put(std::string_view(*name));
      h.put(uint32_t(t.shape.size()));
      for (auto n = t.shape.rbegin(); n != t.shape.rend(); ++n) h.put(uint64_t(*n));
      h.put(tensor_type(t.dtype));
      h.put(uint64_t(offset));
      sizes_.push_back(bytes_of(t));
      offset += padded(sizes_.back());
    }
    h.bytes.resize(size_t(padded(int64_t(h.bytes.size()))));
    check_disk_space(std::filesystem::absolute(path).parent_path(), int64_t(h.bytes.size()) + offset);
    file_.write(h.bytes);
  }

  void append(std::span<const std::byte> bytes) override {
    while (!bytes.empty()) {
      CHECK(current_ < sizes_.size(), "{} bytes more than were declared", bytes.size());
      const int64_t missing = sizes_[current_] - filled_;
      const auto part = bytes.first(size_t(std::min<int64_t>(missing, int64_t(bytes.size()))));
      file_.write(part);
      bytes = bytes.subspan(part.size());
      filled_ += int64_t(part.size());
      if (filled_ < sizes_[current_]) continue;
      file_.pad(padded(filled_) - filled_);
      filled_ = 0;
      ++current_;
    }
  }

  void finish() override {
    CHECK(current_ == sizes_.size(), "tensor {} of {} has {} bytes of {}", current_, sizes_.size(), filled_, sizes_[current_]);
    file_.finish();
  }

 private:
  OutputFile file_;
  std::vector<int64_t> sizes_;
  size_t current_ = 0;
  int64_t filled_ = 0;
};

}  // namespace

std::unique_ptr<ModelWriter> write_gguf(const std::filesystem::path& path, const json& metadata, const std::vector<TensorPlan>& tensors) {
  return std::make_unique<GgufWriter>(path, metadata, tensors);
}

}  // namespace mla
