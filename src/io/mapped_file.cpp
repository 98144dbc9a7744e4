// Files by mmap.
#include "core/check.h"
#include "io/checkpoint.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace mla {

MappedFile::MappedFile(const std::filesystem::path& path) {
  // Not blocking: a pipe in a model's folder must not hang the program.
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) fail_input("cannot open {}: {}", path.string(), std::strerror(errno));
  struct stat status;
  const bool regular = fstat(file, &status) == 0 && S_ISREG(status.st_mode);
  void* mapped = nullptr;
  if (regular && status.st_size > 0) mapped = mmap(nullptr, size_t(status.st_size), PROT_READ, MAP_SHARED, file, 0);
  const int error = errno;
  close(file);
  if (!regular) fail_input("{} is not a regular file", path.string());
  if (mapped == MAP_FAILED) fail("cannot map {}: {}", path.string(), std::strerror(error));
  data_ = static_cast<const std::byte*>(mapped);
  size_ = size_t(status.st_size);
}

MappedFile::~MappedFile() {
  if (data_) munmap(const_cast<std::byte*>(data_), size_);
}

void MappedFile::release(const void* from, size_t bytes) const {
  const auto* first = static_cast<const std::byte*>(from);
  if (!data_ || first < data_ || first >= data_ + size_) return;
  // Whole pages only: the ends may belong to neighbours that are still needed.
  const auto page = uintptr_t(sysconf(_SC_PAGESIZE));
  const auto low = reinterpret_cast<uintptr_t>(data_), high = low + size_, want = reinterpret_cast<uintptr_t>(first);
  const uintptr_t begin = (want + page - 1) / page * page;
  const uintptr_t end = bytes >= high - want ? (high + page - 1) / page * page : (want + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

}  // namespace mla
