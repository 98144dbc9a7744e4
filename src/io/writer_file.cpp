// Writing through to the kernel, and the way from the temporary name to the real one.
#include "io/writer_file.h"

#include "core/check.h"
#include "io/writer.h"

#include <fcntl.h>
#include <sys/statvfs.h>
#include <unistd.h>
#include <cerrno>
#include <cstring>

#include <algorithm>
#include <array>

namespace mla {

int64_t bytes_of(const TensorPlan& plan) {
  int64_t count = 1;
  for (int64_t n : plan.shape) count *= n;
  CHECK(plan.shape.back() % info(plan.dtype).block == 0, "{}: rows of {} as {}", plan.name, plan.shape.back(), info(plan.dtype).name);
  return row_bytes(plan.dtype, count);
}

void check_disk_space(const std::filesystem::path& folder, int64_t bytes) {
  struct statvfs disk {};
  if (statvfs(folder.c_str(), &disk) != 0) fail_input("cannot write into {}: {}", folder.string(), std::strerror(errno));
  const auto free = int64_t(std::min<uint64_t>(uint64_t(disk.f_bavail) * disk.f_frsize, INT64_MAX));
  if (free < bytes) fail("{} needs {:.2f} GB, but the disk has {:.2f} GB free", folder.string(), double(bytes) / 1e9, double(free) / 1e9);
}

OutputFile::OutputFile(const std::filesystem::path& path) : path_(path), part_(path) {
  part_ += ".part";
  if (std::filesystem::is_directory(path)) fail_input("{} is a folder; name a file", path.string());
  file_ = open(part_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (file_ < 0) fail_input("cannot write {}: {}", path.string(), std::strerror(errno));
}

OutputFile::~OutputFile() {
  if (file_ < 0) return;
  close(file_);
  unlink(part_.c_str());
}

void OutputFile::fail_write() { fail("writing {} failed after {} bytes: {}", path_.string(), written_, std::strerror(errno)); }

void OutputFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(file_, bytes.data(), std::min<size_t>(bytes.size(), size_t(1) << 30));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_write();
    written_ += n;
    bytes = bytes.subspan(size_t(n));
  }
}

void OutputFile::pad(int64_t zeros) {
  constexpr std::array<std::byte, 64> none{};
  for (; zeros > 0; zeros -= int64_t(none.size())) write(std::span(none).first(size_t(std::min<int64_t>(zeros, none.size()))));
}

void OutputFile::finish() {
  // Some file systems notice a full disk only here.
  if (fsync(file_) != 0 && errno != EINVAL && errno != EROFS) fail_write();
  if (close(file_) != 0) {
    file_ = -1;
    unlink(part_.c_str());
    fail_write();
  }
  file_ = -1;
  if (std::rename(part_.c_str(), path_.c_str()) == 0) return;
  const int reason = errno;
  unlink(part_.c_str());
  fail("cannot give {} its name: {}", path_.string(), std::strerror(reason));
}

}  // namespace mla
