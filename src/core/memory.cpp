// Large blocks come straight from the system, so that untouched pages cost nothing and huge pages can be asked for.
#include "core/memory.h"

#include "core/check.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace mla {
namespace {
constexpr size_t page = 4096, huge_page = size_t(2) << 20, map_from = size_t(4) << 20;

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }
}  // namespace

Buffer::Buffer(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  if (bytes > SIZE_MAX / 2) fail("cannot reserve {} bytes", bytes);
  mapped_ = bytes >= map_from;
  if (!mapped_) {
    data_ = static_cast<std::byte*>(std::aligned_alloc(64, round_up(bytes, 64)));
    if (!data_) fail("out of memory: {} bytes asked for", bytes);
    std::memset(data_, 0, bytes);
    return;
  }
  // One huge page more than asked for, so that the block can start on a boundary of one; the ends are given back, the last part of a huge
  // page too: over hundreds of weights it would come to hundreds of megabytes.
  const size_t wanted = round_up(bytes, page), reserved = wanted + huge_page;
  void* raw = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) fail("out of memory: {:.1f} MiB asked for", double(bytes) / (1 << 20));
  auto start = reinterpret_cast<uintptr_t>(raw), aligned = round_up(start, huge_page);
  if (aligned > start) munmap(raw, aligned - start);
  if (start + reserved > aligned + wanted) munmap(reinterpret_cast<void*>(aligned + wanted), start + reserved - aligned - wanted);
  data_ = reinterpret_cast<std::byte*>(aligned);
  madvise(data_, wanted, MADV_HUGEPAGE);
}

Buffer::~Buffer() {
  if (!data_) return;
  if (mapped_)
    munmap(data_, round_up(bytes_, page));
  else
    std::free(data_);
}

void* Arena::bytes(size_t n) {
  n = round_up(std::max<size_t>(n, 1), 64);
  while (block_ < blocks_.size()) {
    if (blocks_[block_].bytes() - used_ >= n) {
      void* p = blocks_[block_].data() + used_;
      used_ += n;
      return p;
    }
    ++block_;
    used_ = 0;
  }
  blocks_.emplace_back(std::max(n, map_from));
  block_ = blocks_.size() - 1;
  used_ = n;
  return blocks_.back().data();
}

Tensor Arena::tensor(DType dtype, std::initializer_list<int64_t> shape) {
  CHECK(!is_quantised(dtype), "the arena holds plain types, not {}", info(dtype).name);
  Tensor t = view(nullptr, dtype, shape);
  t.data = bytes(size_t(row_bytes(dtype, t.count())));
  return t;
}

void Arena::reset() {
  // One block as large as all of them serves the next pass without gaps.
  if (blocks_.size() > 1) {
    size_t total = held_bytes();
    blocks_.clear();
    blocks_.emplace_back(total);
  }
  block_ = used_ = 0;
}

size_t Arena::held_bytes() const {
  size_t total = 0;
  for (const Buffer& b : blocks_) total += b.bytes();
  return total;
}

}  // namespace mla
