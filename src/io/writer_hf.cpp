// An HF folder: config.json, safetensors in one file or in shards with an index, and the files that go with them.
#include "core/check.h"
#include "io/names.h"
#include "io/writer.h"
#include "io/writer_file.h"

#include <nlohmann/json.hpp>

#include <algorithm>

namespace mla {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

std::string_view safetensors_type(DType type) {
  switch (type) {
    case DType::f32: return "F32";
    case DType::f16: return "F16";
    case DType::bf16: return "BF16";
    case DType::f8: return "F8_E4M3";
    default: fail_input("HF folders hold f32, f16, bf16 or fp8, not {}", info(type).name);
  }
}

struct Shard {
  std::string name, header;
  int64_t bytes = 0;
  std::vector<const TensorPlan*> tensors;
};

std::string hf_name(const TensorPlan& plan) {
  const auto name = stored_name(Format::hf, plan.name);
  CHECK(name, "HF has no name for {}", plan.name);
  return *name;
}

// The length of the JSON, then the JSON, filled up with spaces so that the bytes behind it are aligned.
std::string safetensors_header(const std::vector<const TensorPlan*>& tensors) {
  json header = {{"__metadata__", {{"format", "pt"}}}};
  int64_t offset = 0;
  for (const TensorPlan* t : tensors) {
    const int64_t end = offset + bytes_of(*t);
    header[hf_name(*t)] = {{"dtype", safetensors_type(t->dtype)}, {"shape", t->shape}, {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const auto length = uint64_t(text.size());
  return std::string(reinterpret_cast<const char*>(&length), 8) + text;
}

std::vector<Shard> cut(const std::vector<TensorPlan>& tensors, int64_t shard_bytes) {
  std::vector<Shard> shards(1);
  for (const TensorPlan& t : tensors) {
    const int64_t bytes = bytes_of(t);
    if (!shards.back().tensors.empty() && shards.back().bytes + bytes > shard_bytes) shards.emplace_back();
    shards.back().tensors.push_back(&t);
    shards.back().bytes += bytes;
  }
  for (size_t i = 0; i < shards.size(); ++i) {
    shards[i].name = shards.size() == 1 ? "model.safetensors" : fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size());
    shards[i].header = safetensors_header(shards[i].tensors);
  }
  return shards;
}

// A folder under a temporary name; removed with all that is in it unless finished.
class OutputFolder {
 public:
  explicit OutputFolder(fs::path path) : path_(std::move(path)), part_(path_) {
    if (!path_.has_filename()) path_ = part_ = path_.parent_path();
    part_ += ".part";
    std::error_code error;
    if (fs::exists(path_) && !(fs::is_directory(path_) && fs::is_empty(path_, error)))
      fail_input("{} exists and is not empty; name a new folder", path_.string());
    fs::remove_all(part_, error);
    if (!fs::create_directory(part_, error)) fail_input("cannot make the folder {}: {}", path_.string(), error.message());
  }
  ~OutputFolder() {
    std::error_code ignored;
    if (!finished_) fs::remove_all(part_, ignored);
  }
  OutputFolder(const OutputFolder&) = delete;
  OutputFolder& operator=(const OutputFolder&) = delete;

  fs::path operator/(const std::string& name) const { return part_ / name; }
  const fs::path& part() const { return part_; }
  void finish() {
    std::error_code error;
    fs::rename(part_, path_, error);
    if (error) fail("cannot give {} its name: {}", path_.string(), error.message());
    finished_ = true;
  }

 private:
  fs::path path_, part_;
  bool finished_ = false;
};

class HfWriter : public ModelWriter {
 public:
  HfWriter(const fs::path& folder, const json& config, const std::vector<TensorPlan>& tensors, const std::vector<SideFile>& files,
           int64_t shard_bytes)
      : shards_(cut(tensors, shard_bytes)), folder_(folder) {
    int64_t total = 0;
    for (const Shard& shard : shards_) total += shard.bytes;
    check_disk_space(folder_.part(), total);
    write("config.json", config.dump(2) + "\n");
    for (const SideFile& file : files) {
      CHECK(fs::path(file.name).filename() == file.name, "{} is not a plain file name", file.name);
      write(file.name, file.text);
    }
    if (shards_.size() > 1) write("model.safetensors.index.json", index(total).dump(2) + "\n");
    open_shard();
  }

  void append(std::span<const std::byte> bytes) override {
    while (!bytes.empty()) {
      CHECK(file_, "{} bytes more than were declared", bytes.size());
      const auto part = bytes.first(size_t(std::min<int64_t>(missing(), int64_t(bytes.size()))));
      file_->write(part);
      bytes = bytes.subspan(part.size());
      if (missing() == 0) close_shard();
    }
  }

  void finish() override {
    CHECK(!file_, "shard {} of {} lacks {} bytes", current_ + 1, shards_.size(), missing());
    folder_.finish();
  }

 private:
  int64_t missing() const { return int64_t(shards_[current_].header.size()) + shards_[current_].bytes - file_->written(); }

  void open_shard() {
    file_ = std::make_unique<OutputFile>(folder_ / shards_[current_].name);
    file_->write(shards_[current_].header);
    if (missing() == 0) close_shard();
  }

  void close_shard() {
    file_->finish();
    file_.reset();
    if (++current_ < shards_.size()) open_shard();
  }

  void write(const std::string& name, const std::string& text) const {
    OutputFile file(folder_ / name);
    file.write(text);
    file.finish();
  }

  json index(int64_t total) const {
    json map = json::object();
    for (const Shard& shard : shards_)
      for (const TensorPlan* t : shard.tensors) map[hf_name(*t)] = shard.name;
    return {{"metadata", {{"total_size", total}}}, {"weight_map", map}};
  }

  std::vector<Shard> shards_;
  OutputFolder folder_;
  std::unique_ptr<OutputFile> file_;
  size_t current_ = 0;
};

}  // namespace

std::unique_ptr<ModelWriter> write_hf(const fs::path& folder, const json& config, const std::vector<TensorPlan>& tensors,
                                      const std::vector<SideFile>& files, int64_t shard_bytes) {
  return std::make_unique<HfWriter>(folder, config, tensors, files, shard_bytes);
}

}  // namespace mla
