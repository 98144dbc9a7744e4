// Writes a safetensors file whose header is known only when its data are.
#include "cli/dump.h"

#include "core/check.h"

#include <unistd.h>
#include <nlohmann/json.hpp>

#include <cerrno>
#include <cstring>

namespace mla {

DumpFile::DumpFile(std::filesystem::path path) : path_(std::move(path)), data_path_(path_.string() + fmt::format(".{}.tmp", getpid())) {
  data_.open(data_path_, std::ios::binary);
  if (!data_) fail_input("--dump cannot write {}: {}", path_.string(), std::strerror(errno));
}

DumpFile::~DumpFile() {
  std::error_code ignored;
  std::filesystem::remove(data_path_, ignored);
}

void DumpFile::add(const std::string& name, const Tensor& t) {
  CHECK(t.dtype == DType::f32 && t.place == Place::host && t.rank > 0, "{} is {}", name, describe(t));
  const int occurrence = ++seen_[name];
  Entry entry{occurrence == 1 ? name : fmt::format("{}.{}", name, occurrence), {t.shape, t.shape + t.rank}, bytes_, 0};
  // Row by row: only the first dimension may be strided.
  const int64_t rows = t.shape[0], row = rows > 0 ? t.count() / rows : 0;
  for (int64_t i = 0; i < rows; ++i)
    data_.write(reinterpret_cast<const char*>(t.f32() + i * t.stride[0]), std::streamsize(row * int64_t(sizeof(float))));
  entry.end = bytes_ += uint64_t(t.count()) * sizeof(float);
  entries_.push_back(std::move(entry));
}

void DumpFile::finish() {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  for (const Entry& e : entries_) header[e.name] = {{"dtype", "F32"}, {"shape", e.shape}, {"data_offsets", {e.begin, e.end}}};
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const uint64_t length = text.size();
  data_.close();
  const std::filesystem::path whole = data_path_.string() + ".2";
  std::ofstream out(whole, std::ios::binary);
  out.write(reinterpret_cast<const char*>(&length), 8).write(text.data(), std::streamsize(text.size()));
  if (bytes_ > 0) out << std::ifstream(data_path_, std::ios::binary).rdbuf();
  out.close();
  std::error_code error;
  if (data_ && out) std::filesystem::rename(whole, path_, error);
  if (data_ && out && !error) return;
  const std::string reason = error ? error.message() : std::strerror(errno);
  std::filesystem::remove(whole, error);
  fail("cannot write {}: {}", path_.string(), reason);
}

}  // namespace mla
