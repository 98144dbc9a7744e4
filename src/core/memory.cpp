// Large blocks come straight from the system, so that untouched pages cost nothing and huge pages can be asked for.
#include "core/memory.h"

#include "core/check.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

namespace mla {
namespace {
constexpr size_t page = 4096, huge_page = size_t(2) << 20, map_from = size_t(4) << 20;

// With sanitizers scratch is handed out full of NaN, so that tests see what is read but was not written.
#ifdef MLA_SANITIZED
constexpr bool poisons = true;
#else
constexpr bool poisons = false;
#endif

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

class HostMemory final : public Memory {
 public:
  Place place() const override { return Place::host; }

  std::byte* take(size_t bytes) override {
    if (bytes > SIZE_MAX / 2) fail("cannot reserve {} bytes", bytes);
    if (bytes >= map_from) return map(bytes);
    void* data = std::aligned_alloc(64, round_up(bytes, 64));
    if (!data) fail("out of memory: {} bytes asked for", bytes);
    std::memset(data, 0, bytes);
    return static_cast<std::byte*>(data);
  }

  void give_back(std::byte* data, size_t bytes) noexcept override {
    if (bytes >= map_from)
      munmap(data, round_up(bytes, page));
    else
      std::free(data);
  }

  void upload(const void* from, void* to, size_t bytes) override { copy(from, to, bytes); }
  void download(const void* from, void* to, size_t bytes) override { copy(from, to, bytes); }
  void copy(const void* from, void* to, size_t bytes) override {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }
  void wait() override {}

  double free_bytes() const override {
    std::ifstream in("/proc/meminfo");
    for (std::string word; in >> word;)
      if (word == "MemAvailable:") {
        double kilobytes = 0;
        in >> kilobytes;
        return 1024 * kilobytes;
      }
    return 0;
  }

 private:
  // One huge page more than asked for, so that the block can start on a boundary of one; the ends are given back, the last part of a huge
  // page too: over hundreds of weights it would come to hundreds of megabytes.
  static std::byte* map(size_t bytes) {
    const size_t wanted = round_up(bytes, page), reserved = wanted + huge_page;
    void* raw = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) fail("out of memory: {:.1f} MiB asked for", double(bytes) / (1 << 20));
    auto start = reinterpret_cast<uintptr_t>(raw), aligned = round_up(start, huge_page);
    if (aligned > start) munmap(raw, aligned - start);
    if (start + reserved > aligned + wanted) munmap(reinterpret_cast<void*>(aligned + wanted), start + reserved - aligned - wanted);
    auto* data = reinterpret_cast<std::byte*>(aligned);
    madvise(data, wanted, MADV_HUGEPAGE);
    return data;
  }
};

}  // namespace

Memory& host_memory() {
  static auto* const memory = new HostMemory;  // never destroyed: buffers in static objects give back to it at the program's end
  return *memory;
}

Buffer::Buffer(size_t bytes, Memory& from) : bytes_(bytes), memory_(&from) {
  if (bytes > 0) data_ = from.take(bytes);
}

Buffer::~Buffer() {
  if (data_) memory_->give_back(data_, bytes_);
}

void* Arena::bytes(size_t n) {
  n = round_up(std::max<size_t>(n, 1), 64);
  while (block_ < blocks_.size() && blocks_[block_].bytes() - used_ < n) ++block_, used_ = 0;
  if (block_ == blocks_.size()) blocks_.emplace_back(std::max(n, map_from), *memory_);
  std::byte* const p = blocks_[block_].data() + used_;
  used_ += n;
  if (poisons && memory_->place() == Place::host) std::memset(p, 0xff, n);
  return p;
}

Tensor Arena::tensor(DType dtype, std::initializer_list<int64_t> shape) {
  CHECK(!is_quantised(dtype), "the arena holds plain types, not {}", info(dtype).name);
  Tensor t = view(nullptr, dtype, shape);
  t.data = bytes(size_t(row_bytes(dtype, t.count())));
  t.place = memory_->place();
  return t;
}

void Arena::reset() {
  // One block as large as all of them serves the next pass without gaps.
  if (blocks_.size() > 1) {
    size_t total = held_bytes();
    blocks_.clear();
    blocks_.emplace_back(total, *memory_);
  }
  block_ = used_ = 0;
}

size_t Arena::held_bytes() const {
  size_t total = 0;
  for (const Buffer& b : blocks_) total += b.bytes();
  return total;
}

Tensor on_host(const Tensor& t, Memory& memory, std::vector<float>& storage) {
  if (t.place == Place::host) return t;
  CHECK(t.dtype == DType::f32 && t.contiguous(), "{} does not come to the host", describe(t));
  storage.resize(size_t(t.count()));
  memory.download(t.data, storage.data(), storage.size() * 4);
  Tensor copy = t;
  copy.data = storage.data(), copy.place = Place::host;
  return copy;
}

}  // namespace mla
