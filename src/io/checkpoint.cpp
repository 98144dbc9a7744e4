// Opening a model: containers are parsed, names are put into our words, and types and shapes are checked.
#include "io/checkpoint.h"

#include "core/check.h"
#include "core/memory.h"
#include "io/gguf.h"
#include "io/json.h"
#include "io/listing.h"
#include "io/names.h"
#include "io/safetensors.h"

#include <cstring>
#include <map>
#include <unordered_map>

namespace mla {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

constexpr size_t max_rank = 3, max_shards = 4096;
constexpr int64_t max_experts = 65536;
constexpr size_t max_text_bytes = size_t(256) << 20;

std::string_view text_of(const MappedFile& file) { return {reinterpret_cast<const char*>(file.data()), file.size()}; }

// A file of the folder itself: nothing that a model file names may lead out of it.
bool is_plain_name(std::string_view name) {
  return !name.empty() && name != "." && name != ".." && name.find('/') == name.npos && name.find('\\') == name.npos &&
         name.find('\0') == name.npos;
}

json read_json(const fs::path& path) {
  const MappedFile file(path);
  if (file.size() > max_text_bytes) fail_input("{} has {} bytes; at most {} are read", path.string(), file.size(), max_text_bytes);
  return parse_json(text_of(file), path.string());
}

// Of the ways to store quantised weights in a folder, DeepSeek's is read: fp8 (e4m3) with a scale for each 128 × 128.
void check_quantisation(const json& config, const std::string& what) {
  const auto found = config.find("quantization_config");
  if (found == config.end() || found->is_null()) return;
  if (!found->is_object()) fail_input("{}: quantization_config is no object", what);
  auto check = [&](const char* key, const json& wanted, bool required) {
    const auto value = found->find(key);
    if (value == found->end() ? required : *value != wanted)
      fail_input("{}: quantization_config has {} {}; of quantised folders only those with {} are read", what, key,
                 value == found->end() ? "nothing" : value->dump(-1, ' ', true).substr(0, 60), wanted.dump());
  };
  check("quant_method", "fp8", true);
  check("weight_block_size", {f8_block, f8_block}, true);
  check("fmt", "e4m3", false);
}

}  // namespace

struct Checkpoint::State {
  fs::path path;
  Format format = Format::hf;
  std::vector<std::unique_ptr<MappedFile>> files;
  std::vector<Buffer> copies;  // of tensors that a file holds at odd addresses
  std::vector<StoredTensor> tensors;
  std::unordered_map<std::string_view, size_t> by_name;
  json config;
  Gguf gguf;

  void open_gguf();
  void open_folder();
  void open_shards(const fs::path& index);
  void adopt(const std::vector<ListedTensor>& listed, const MappedFile& file, const std::string& what);
  void take_apart(const std::vector<std::string>& parts, const Tensor& all, const std::string& stored, const MappedFile& file,
                  const std::string& what);
  void join_scales();
  Tensor value_of(const ListedTensor& listed, const MappedFile& file, const std::string& what);
  void index_names();
  const MappedFile& map(const fs::path& file) { return *files.emplace_back(std::make_unique<MappedFile>(file)); }
};

void Checkpoint::State::open_gguf() {
  format = Format::gguf;
  const MappedFile& file = map(path);
  gguf = parse_gguf({file.data(), file.size()}, path.string());
  adopt(gguf.tensors, file, path.string());
}

void Checkpoint::State::open_folder() {
  format = Format::hf;
  if (!fs::exists(path / "config.json"))
    fail_input("{} has no config.json; give the folder of a Hugging Face model or a .gguf file", path.string());
  config = read_json(path / "config.json");
  if (!config.is_object()) fail_input("{} holds no JSON object", (path / "config.json").string());
  check_quantisation(config, (path / "config.json").string());
  const fs::path single = path / "model.safetensors", index = path / "model.safetensors.index.json";
  if (fs::exists(single)) {
    const MappedFile& file = map(single);
    adopt(parse_safetensors({file.data(), file.size()}, single.string()), file, single.string());
  } else if (fs::exists(index)) {
    open_shards(index);
  }
}

void Checkpoint::State::open_shards(const fs::path& index) {
  const json root = read_json(index);
  if (!root.is_object() || !root.contains("weight_map") || !root["weight_map"].is_object())
    fail_input("{} has no object weight_map", index.string());
  std::map<std::string, size_t> shards;  // and how many tensors the index puts there
  const json& weight_map = root["weight_map"];
  for (const auto& [tensor, shard] : weight_map.items()) {
    if (!is_printable(tensor)) fail_input("{}: the name of a tensor has control characters", index.string());
    if (!shard.is_string()) fail_input("{} gives no file name for the tensor {}", index.string(), tensor);
    const auto& name = shard.get_ref<const std::string&>();
    if (!is_plain_name(name))
      fail_input("{} puts the tensor {} into {}, which is no file of this folder", index.string(), tensor, shard.dump());
    ++shards[name];
  }
  if (shards.size() > max_shards) fail_input("{} names {} files; at most {} are read", index.string(), shards.size(), max_shards);
  for (const auto& [name, wanted] : shards) {
    const std::string what = (path / name).string();
    const MappedFile& file = map(path / name);
    std::vector<ListedTensor> listed = parse_safetensors({file.data(), file.size()}, what);
    std::erase_if(listed, [&, &name = name](const ListedTensor& t) {  // what the index puts elsewhere
      const auto found = weight_map.find(t.name);
      return found == weight_map.end() || found->get_ref<const std::string&>() != name;
    });
    if (listed.size() != wanted)
      fail_input("{} holds {} of the {} tensors that {} puts there", what, listed.size(), wanted, index.string());
    adopt(listed, file, what);
  }
}

// Tensors outside the table (rotary tables, other heads) are left alone; those of the table must be weights.
void Checkpoint::State::adopt(const std::vector<ListedTensor>& listed, const MappedFile& file, const std::string& what) {
  for (const ListedTensor& t : listed) {
    if (auto name = our_name(format, t.name))
      tensors.push_back({std::move(*name), value_of(t, file, what), &file});
    else if (const auto parts = fused_experts(format, t.name); !parts.empty())
      take_apart(parts, value_of(t, file, what), t.name, file, what);
  }
}

// [E, parts · rows, cols], as transformers holds experts in memory: one tensor [rows, cols] for each expert and part.
void Checkpoint::State::take_apart(const std::vector<std::string>& parts, const Tensor& all, const std::string& stored,
                                   const MappedFile& file, const std::string& what) {
  const auto n_parts = int64_t(parts.size());
  if (all.rank != 3 || all.shape[0] > max_experts || all.shape[1] % n_parts != 0)
    fail_input("{}: the tensor {} is {}; experts' weights are [experts, rows, columns]", what, stored, describe(all));
  const int64_t rows = all.shape[1] / n_parts, cols = all.shape[2];
  if (all.dtype == DType::f8 && n_parts > 1 && rows % f8_block != 0)
    fail_input("{}: the parts of {} have {} rows, which blocks of {} rows with one scale do not divide", what, stored, rows, f8_block);
  const std::string_view suffix = names_scales(format, stored) ? scales_suffix : "";
  auto* at = all.as<std::byte>();
  for (int64_t e = 0; e < all.shape[0]; ++e)
    for (const std::string& part : parts) {
      tensors.push_back({fmt::format("{}.{}{}", part, e, suffix), view(at, all.dtype, {rows, cols}), &file});
      at += row_bytes(all.dtype, rows * cols);
    }
}

Tensor Checkpoint::State::value_of(const ListedTensor& listed, const MappedFile& file, const std::string& what) {
  if (!listed.dtype) fail_input("{}: the tensor {} has the type {}, which weights may not have here", what, listed.name, listed.type);
  if (listed.shape.empty() || listed.shape.size() > max_rank || listed.bytes == 0)
    fail_input("{}: the tensor {} has the shape {}; weights have 1 to {} dimensions, none of them 0", what, listed.name,
               describe(listed.shape), max_rank);
  Tensor t;
  t.dtype = *listed.dtype;
  t.rank = int(listed.shape.size());
  int64_t step = 1;
  for (int i = t.rank - 1; i >= 0; --i) {
    t.shape[i] = listed.shape[size_t(i)];
    t.stride[i] = step;
    step *= t.shape[i];
  }
  t.data = const_cast<std::byte*>(file.data()) + listed.begin;
  // Old safetensors files hold tensors at odd addresses; kernels read whole elements.
  if (!is_quantised(t.dtype) && listed.begin % uint64_t(info(t.dtype).block_bytes) != 0) {
    copies.emplace_back(listed.bytes);
    std::memcpy(copies.back().data(), t.data, listed.bytes);
    t.data = copies.back().data();
  }
  return t;
}

void Checkpoint::State::join_scales() {
  std::map<std::string, Tensor> scales;  // by the name of what they scale
  std::erase_if(tensors, [&](const StoredTensor& t) {
    if (!t.name.ends_with(scales_suffix)) return false;
    const std::string of = t.name.substr(0, t.name.size() - scales_suffix.size());
    if (!scales.emplace(of, t.value).second) fail_input("{} holds the scales of {} twice", path.string(), of);
    return true;
  });
  for (StoredTensor& t : tensors) {
    const auto found = scales.find(t.name);
    if (t.value.dtype != DType::f8) {
      if (found != scales.end()) fail_input("{}: the tensor {} has scales, but is {}", path.string(), t.name, describe(t.value));
      continue;
    }
    if (t.value.rank != 2) fail_input("{}: the tensor {} is {}; only matrices may be fp8", path.string(), t.name, describe(t.value));
    if (found == scales.end())
      fail_input("{}: the tensor {} is fp8, but has no scales ({})", path.string(), t.name,
                 stored_name(format, t.name + std::string(scales_suffix)).value_or("weight_scale_inv"));
    const Tensor wanted = view(nullptr, DType::f32, {f8_blocks(t.value.shape[0]), f8_blocks(t.value.shape[1])});
    if (describe(found->second) != describe(wanted))
      fail_input("{}: the scales of {}, {}, are {}; with one for each block of {} × {} they would be {}", path.string(), t.name,
                 describe(t.value), describe(found->second), f8_block, f8_block, describe(wanted));
    t.value.scales = found->second.f32();
    scales.erase(found);
  }
  if (!scales.empty()) fail_input("{} holds scales of {}, but not the tensor", path.string(), scales.begin()->first);
}

void Checkpoint::State::index_names() {
  for (size_t i = 0; i < tensors.size(); ++i)
    if (!by_name.emplace(tensors[i].name, i).second) fail_input("{} holds the tensor {} twice", path.string(), tensors[i].name);
}

Checkpoint Checkpoint::open(const fs::path& path) {
  auto state = std::make_unique<State>();
  state->path = path;
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (!fs::exists(status)) fail_input("{} does not exist; give the folder of a Hugging Face model or a .gguf file", path.string());
  fs::is_directory(status) ? state->open_folder() : state->open_gguf();
  state->join_scales();
  state->index_names();
  return Checkpoint(std::move(state));
}

Checkpoint::Checkpoint(std::unique_ptr<State> state) : state_(std::move(state)) {}
Checkpoint::Checkpoint(Checkpoint&&) noexcept = default;
Checkpoint::~Checkpoint() = default;

Format Checkpoint::format() const { return state_->format; }
const fs::path& Checkpoint::path() const { return state_->path; }
const json& Checkpoint::metadata() const { return state_->format == Format::hf ? state_->config : state_->gguf.values; }
const std::vector<StoredTensor>& Checkpoint::tensors() const { return state_->tensors; }

const StoredTensor* Checkpoint::find(std::string_view our_name) const {
  const auto found = state_->by_name.find(our_name);
  return found == state_->by_name.end() ? nullptr : &state_->tensors[found->second];
}

const StoredTensor& Checkpoint::get(std::string_view our_name) const {
  if (const StoredTensor* t = find(our_name)) return *t;
  if (state_->tensors.empty()) fail_input("{} holds no weights", state_->path.string());
  fail_input("{} lacks the tensor {}", state_->path.string(), stored_name(state_->format, our_name).value_or(std::string(our_name)));
}

std::optional<std::string> Checkpoint::text(std::string_view file_name) const {
  CHECK(is_plain_name(file_name), "\"{}\" is no file of a model's folder", file_name);
  if (state_->format != Format::hf || !fs::exists(state_->path / file_name)) return std::nullopt;
  const MappedFile file(state_->path / file_name);
  if (file.size() > max_text_bytes)
    fail_input("{} has {} bytes; at most {} are read", (state_->path / file_name).string(), file.size(), max_text_bytes);
  return std::string(text_of(file));
}

std::string Checkpoint::tokenizer_config() const {
  std::string config = text("tokenizer_config.json").value_or("{}");
  const auto chat_template = text("chat_template.jinja");
  if (!chat_template) return config;
  nlohmann::json merged = parse_json(config, "tokenizer_config.json");
  if (!merged.is_object()) fail_input("tokenizer_config.json is not an object");
  merged["chat_template"] = *chat_template;
  return merged.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::vector<std::string> Checkpoint::strings(std::string_view key) const { return state_->gguf.strings(key); }
std::vector<float> Checkpoint::floats(std::string_view key) const { return state_->gguf.floats(key); }
std::vector<int32_t> Checkpoint::ints(std::string_view key) const { return state_->gguf.ints(key); }

int64_t Checkpoint::file_bytes() const {
  int64_t total = 0;
  for (const auto& file : state_->files) total += int64_t(file->size());
  return total;
}

}  // namespace mla
