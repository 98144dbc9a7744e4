// A file under a temporary name that takes its own name only when it is complete.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string_view>

namespace mla {

// Refuses, before anything is written, what does not fit on the disk of `folder`.
void check_disk_space(const std::filesystem::path& folder, int64_t bytes);

class OutputFile {
 public:
  explicit OutputFile(const std::filesystem::path& path);  // writes to PATH.part
  ~OutputFile();                                           // removes it, unless finished
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void write(std::span<const std::byte> bytes);
  void write(std::string_view text) { write(std::as_bytes(std::span(text))); }
  void pad(int64_t zeros);
  int64_t written() const { return written_; }
  void finish();

 private:
  [[noreturn]] void fail_write();

  std::filesystem::path path_, part_;
  int file_ = -1;
  int64_t written_ = 0;
};

}  // namespace mla
