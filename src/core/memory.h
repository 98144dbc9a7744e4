// Memory of the host or a device: Buffer owns an aligned block of it, Arena hands out scratch that one reset takes back.
#pragma once

#include "core/tensor.h"

#include <cstddef>
#include <memory>
#include <vector>

namespace mla {

// Where memory comes from, and how bytes get there and back.
class Memory {
 public:
  virtual ~Memory() = default;
  virtual Place place() const = 0;
  virtual std::byte* take(size_t bytes) = 0;  // zeroed, aligned to 64 bytes; raises Error when there is none left
  virtual void give_back(std::byte* data, size_t bytes) noexcept = 0;
  // Copies that keep the order of the operations around them. After upload `from` may change; after download `to` is complete.
  virtual void upload(const void* from, void* to, size_t bytes) = 0;    // from the host
  virtual void download(const void* from, void* to, size_t bytes) = 0;  // to the host
  virtual void copy(const void* from, void* to, size_t bytes) = 0;      // within it
  virtual void wait() = 0;                                              // for all operations so far
  virtual double free_bytes() const = 0;                                // what may still be taken
};

// The host's. Blocks of 4 MiB and more ask for transparent huge pages.
Memory& host_memory();

// Owns zeroed memory. Raises Error when there is none. The source outlives it.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes, Memory& from = host_memory());
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
    std::swap(memory_, other.memory_);
  }
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
  Memory* memory_ = nullptr;
};

// Scratch for one forward pass. Memory is handed out in order and taken back by reset or by going back to a mark; it is never zeroed.
class Arena {
 public:
  explicit Arena(Memory& from = host_memory()) : memory_(&from) {}
  Tensor tensor(DType dtype, std::initializer_list<int64_t> shape);  // contiguous, uninitialised, unquantised types
  void* bytes(size_t n);
  void reset();

  struct Mark {
    size_t block, used;
  };
  Mark mark() const { return {block_, used_}; }
  void release(Mark m) { block_ = m.block, used_ = m.used; }
  size_t held_bytes() const;  // memory the arena holds from its source

 private:
  Memory* memory_;
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

// A contiguous f32 tensor as the host reads it: itself, or a copy in `storage` if it lies elsewhere, in `memory`.
Tensor on_host(const Tensor& t, Memory& memory, std::vector<float>& storage);

}  // namespace mla
