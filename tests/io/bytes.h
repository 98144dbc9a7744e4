// Builds model files in memory, well-formed or broken in one place, and puts them into a folder of the test's own.
#pragma once

#include "core/check.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace mla::test {

inline std::span<const std::byte> as_bytes(const std::string& text) { return std::as_bytes(std::span(text)); }

template <class T>
std::string raw(T value) {
  std::string bytes(sizeof value, '\0');
  std::memcpy(bytes.data(), &value, sizeof value);
  return bytes;
}

// A folder that is gone when the test ends.
class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "mla-test-XXXXXX").string();
    if (!mkdtemp(name.data())) throw std::runtime_error("no temporary folder");
    path_ = name;
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path write(const std::string& name, const std::string& content) const {
    std::ofstream(path_ / name, std::ios::binary) << content;
    return path_ / name;
  }

 private:
  std::filesystem::path path_;
};

// The work must refuse its input with a sentence that holds `part`.
inline void expect_refused(const std::function<void()>& work, std::string_view part) {
  try {
    work();
    ADD_FAILURE() << "accepted; wanted an error about: " << part;
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::input) << error.what();
    EXPECT_NE(std::string_view(error.what()).find(part), std::string_view::npos) << error.what();
  }
}

inline std::string safetensors(const std::string& header, const std::string& data) { return raw(uint64_t(header.size())) + header + data; }

// A GGUF file written piece by piece; the counts can be made to lie.
struct GgufBytes {
  std::string pairs, tensors, data;
  uint64_t n_pairs = 0, n_tensors = 0;
  uint32_t version = 3;
  uint64_t alignment = 32;

  static std::string text(std::string_view s) { return raw(uint64_t(s.size())) + std::string(s); }
  GgufBytes& pair(std::string_view key, uint32_t type, const std::string& value) {
    pairs += text(key) + raw(type) + value;
    ++n_pairs;
    return *this;
  }
  // dims: innermost first, as in the file
  GgufBytes& tensor(std::string_view name, const std::vector<uint64_t>& dims, uint32_t type, uint64_t offset) {
    tensors += text(name) + raw(uint32_t(dims.size()));
    for (uint64_t n : dims) tensors += raw(n);
    tensors += raw(type) + raw(offset);
    ++n_tensors;
    return *this;
  }
  std::string bytes() const {
    std::string out = "GGUF" + raw(version) + raw(n_tensors) + raw(n_pairs) + pairs + tensors;
    if (!data.empty()) out.resize((out.size() + alignment - 1) / alignment * alignment, '\0');
    return out + data;
  }
};

}  // namespace mla::test
