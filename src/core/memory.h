// Memory: Buffer owns an aligned block (huge pages where large), Arena hands out scratch that one reset takes back.
#pragma once

#include "core/tensor.h"

#include <cstddef>
#include <memory>
#include <vector>

namespace mla {

// Owns zeroed memory aligned to 64 bytes; blocks of 4 MiB and more ask for transparent huge pages. Raises Error when there is none.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer();

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(mapped_, other.mapped_);
  }
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
  bool mapped_ = false;
};

// Scratch for one forward pass. Memory is handed out in order and taken back by reset or by going back to a mark; it is never zeroed.
class Arena {
 public:
  Tensor tensor(DType dtype, std::initializer_list<int64_t> shape);  // contiguous, uninitialised, unquantised types
  void* bytes(size_t n);
  void reset();

  struct Mark {
    size_t block, used;
  };
  Mark mark() const { return {block_, used_}; }
  void release(Mark m) { block_ = m.block, used_ = m.used; }
  size_t held_bytes() const;  // memory the arena holds from the system

 private:
  std::vector<Buffer> blocks_;
  size_t block_ = 0, used_ = 0;
};

// Returns what was taken from the arena in a scope when the scope ends.
class ArenaScope {
 public:
  explicit ArenaScope(Arena& arena) : arena_(arena), mark_(arena.mark()) {}
  ~ArenaScope() { arena_.release(mark_); }
  ArenaScope(const ArenaScope&) = delete;
  ArenaScope& operator=(const ArenaScope&) = delete;

 private:
  Arena& arena_;
  Arena::Mark mark_;
};

}  // namespace mla
