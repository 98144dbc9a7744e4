// Row by row from a source (a checkpoint's tensors, or random numbers) through an encoder to a writer, with all threads.
#include "model/make.h"

#include "core/check.h"
#include "core/quant.h"
#include "core/random.h"
#include "core/threads.h"
#include "io/checkpoint.h"
#include "io/json.h"
#include "io/names.h"
#include "io/writer.h"
#include "model/make_plan.h"
#include "model/make_source.h"
#include "model/make_tokenizer.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>

namespace mla {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

int64_t rows_of(const TensorPlan& plan) {
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < plan.shape.size(); ++i) rows *= plan.shape[i];
  return rows;
}

// Encodes one row in the plan's type; scratch holds a row of f32.
using EncodeRow = std::function<void(int64_t row, float* scratch, std::byte* to)>;
// Called when the tensor's turn comes; what it needs lives in what it returns.
using OpenTensor = std::function<EncodeRow(const TensorPlan& plan)>;

// Writes the tensors in order, some megabytes at a time: the threads encode a batch, then it goes to the file.
void write_tensors(ModelWriter& writer, const std::vector<TensorPlan>& plans, const OpenTensor& open, Threads& threads,
                   const Progress& progress) {
  constexpr int64_t batch_bytes = 32 << 20, task_elements = 1 << 16;
  double total = 0, done = 0;
  for (const TensorPlan& plan : plans) total += double(rows_of(plan)) * double(plan.shape.back());
  std::vector<std::byte> batch;
  std::vector<std::vector<float>> scratch(size_t(threads.count()));
  for (const TensorPlan& plan : plans) {
    const EncodeRow encode = open(plan);
    const int64_t rows = rows_of(plan), cols = plan.shape.back(), bytes = row_bytes(plan.dtype, cols);
    const int64_t batch_rows = std::clamp<int64_t>(batch_bytes / bytes, 1, rows), task_rows = std::max<int64_t>(task_elements / cols, 1);
    batch.resize(size_t(batch_rows * bytes));
    for (auto& s : scratch) s.resize(size_t(cols));
    for (int64_t first = 0; first < rows; first += batch_rows) {
      const int64_t n = std::min(batch_rows, rows - first);
      threads.parallel((n + task_rows - 1) / task_rows, [&](int64_t task, int thread) {
        for (int64_t r = task * task_rows; r < std::min(n, (task + 1) * task_rows); ++r)
          encode(first + r, scratch[size_t(thread)].data(), batch.data() + r * bytes);
      });
      writer.append(std::span(batch).first(size_t(n * bytes)));
      done += double(n) * double(cols);
      if (progress) progress(done / total);
    }
  }
  writer.finish();
}

Made summary(const std::vector<TensorPlan>& plans, std::vector<std::string> notes) {
  Made made{int64_t(plans.size()), 0, std::move(notes)};
  for (const TensorPlan& plan : plans) made.bytes += rows_of(plan) * row_bytes(plan.dtype, plan.shape.back());
  return made;
}

void check_hf_type(DType type) {
  if (type != DType::f32 && type != DType::f16 && type != DType::bf16 && type != DType::f8)
    fail_input("an HF folder holds f32, f16, bf16 or fp8, not {}; name a .gguf file for quantised types", info(type).name);
}

json hf_config_of(const Config& config, DType type) {
  json hf = to_hf_config(config);
  hf["torch_dtype"] = type == DType::f32 ? "float32" : type == DType::f16 ? "float16" : "bfloat16";
  if (type == DType::f8)
    hf["quantization_config"] = {{"activation_scheme", "dynamic"},
                                 {"fmt", "e4m3"},
                                 {"quant_method", "fp8"},
                                 {"weight_block_size", json::array({f8_block, f8_block})}};
  return hf;
}

// Makes fp8 of a tensor's rows where the plan wants it. A block's scale is known when its last row is, so rows are made twice; a weight's
// scales are written after it.
OpenTensor with_scales(OpenTensor open, Threads& threads) {
  return [open = std::move(open), &threads, last = std::make_shared<std::vector<float>>()](const TensorPlan& plan) -> EncodeRow {
    const int64_t cols = plan.shape.back(), rows = rows_of(plan), blocks = f8_blocks(cols);
    if (plan.name.ends_with(scales_suffix))
      return [last, cols](int64_t row, float*, std::byte* to) { std::memcpy(to, last->data() + row * cols, size_t(cols) * 4); };
    if (plan.dtype != DType::f8) return open(plan);
    const EncodeRow values = open({plan.name, DType::f32, plan.shape});
    auto read = [values, cols](int64_t row, float* scratch) {
      std::vector<float> x(static_cast<size_t>(cols));
      values(row, scratch, reinterpret_cast<std::byte*>(x.data()));
      return x;
    };
    last->assign(size_t(f8_blocks(rows) * blocks), 0);
    threads.parallel(f8_blocks(rows), [&](int64_t band, int) {
      std::vector<float> scratch(static_cast<size_t>(cols));
      float* scales = last->data() + band * blocks;
      for (int64_t r = band * f8_block; r < std::min(rows, (band + 1) * f8_block); ++r) {
        const std::vector<float> x = read(r, scratch.data());
        for (int64_t i = 0; i < cols; ++i) scales[i / f8_block] = std::max(scales[i / f8_block], std::fabs(x[size_t(i)]));
      }
      std::transform(scales, scales + blocks, scales, f8_weight_scale);
    });
    return [read, last, cols, blocks](int64_t row, float* scratch, std::byte* to) {
      const std::vector<float> x = read(row, scratch);
      const float* scales = last->data() + row / f8_block * blocks;
      for (int64_t i = 0; i < cols; ++i) to[i] = std::byte(f32_to_f8(x[size_t(i)] / scales[i / f8_block]));
    };
  };
}

// 65536 normal quantiles: two random bytes pick one, which is far cheaper than a logarithm and a cosine for each element.
class NormalTable {
 public:
  NormalTable() : quantile_(65536) {
    double x = 0;
    for (size_t i = 0; i < 32768; ++i) {  // from the median up, by Newton's method on the distribution function
      const double p = 0.5 + (double(i) + 0.5) / 65536;
      for (int step = 0; step < 3; ++step) x += (p - 0.5 * std::erfc(-x * std::sqrt(0.5))) / (0.3989422804014327 * std::exp(-x * x / 2));
      quantile_[32768 + i] = float(x);
      quantile_[32767 - i] = float(-x);
    }
  }

  void fill(uint64_t seed, uint64_t first, float scale, float* to, int64_t n) const {
    for (int64_t i = 0; i < n; i += 4) {
      uint64_t bits = random_bits(seed, first + uint64_t(i / 4));
      for (int64_t j = i; j < std::min(n, i + 4); ++j, bits >>= 16) to[j] = scale * quantile_[bits & 0xffff];
    }
  }

 private:
  std::vector<float> quantile_;
};

uint64_t hash(std::string_view text) {  // FNV-1a
  uint64_t h = 0xcbf29ce484222325ull;
  for (char c : text) h = (h ^ uint8_t(c)) * 0x100000001b3ull;
  return h;
}

EncodeRow random_row(const TensorPlan& plan, uint64_t seed, const NormalTable& normal) {
  const int64_t cols = plan.shape.back();
  const DType type = plan.dtype;
  if (plan.name.ends_with("norm")) {
    return [=](int64_t, float* scratch, std::byte* to) {
      std::fill_n(scratch, cols, 1.0f);
      quantise(type, scratch, to, cols);
    };
  }
  const uint64_t own = random_bits(seed, hash(plan.name));
  const float scale = plan.shape.size() == 1 ? 0.1f : float(1 / std::sqrt(double(cols)));  // biases: small
  return [=, &normal](int64_t row, float* scratch, std::byte* to) {
    normal.fill(own, uint64_t(row) * uint64_t((cols + 3) / 4), scale, scratch, cols);
    quantise(type, scratch, to, cols);
  };
}

EncodeRow fixed_row(std::vector<float> values, DType type) {
  return [values = std::move(values), type](int64_t, float*, std::byte* to) { quantise(type, values.data(), to, int64_t(values.size())); };
}

EncodeRow checkpoint_row(TensorSource source, DType type, int64_t cols) {
  return [source = std::move(source), type, cols](int64_t row, float* scratch, std::byte* to) {
    if (const Tensor stored = source.row(row); stored.dtype == type) {
      std::copy_n(stored.as<std::byte>(), row_bytes(type, cols), to);
    } else {
      dequantise(stored, scratch);
      quantise(type, scratch, to, cols);
    }
  };
}

std::vector<std::string> biases_of(const Checkpoint& checkpoint) {
  std::vector<std::string> names;
  for (const StoredTensor& t : checkpoint.tensors())
    if (t.name.ends_with(".bias")) names.push_back(t.name);
  std::sort(names.begin(), names.end());
  return names;
}

// Where llama.cpp will run the file, but compute something else than the model asks for.
void note_what_llama_cpp_ignores(const Config& c, const std::vector<std::string>& biases, std::vector<std::string>& notes) {
  const RopeScaling& s = c.rope_scaling;
  if (s.type == RopeScaling::Type::yarn && (s.mscale != s.mscale_all_dim || s.attention_factor > 0))
    notes.push_back(fmt::format("llama.cpp takes YaRN's mscale {} as equal to mscale_all_dim {}", s.mscale, s.mscale_all_dim));
  if (c.is_mla() && c.latent_norm_eps != c.rms_norm_eps)
    notes.push_back(fmt::format("llama.cpp normalises latents with eps {} where this model has {}", c.rms_norm_eps, c.latent_norm_eps));
  if (c.is_mla() && c.n_group > 1 && c.topk_method == Gating::group_limited_greedy)
    notes.emplace_back("llama.cpp ranks groups of experts by the sum of their two best, DeepSeek-V2 by the best");
  if (c.is_mla() && !biases.empty()) notes.emplace_back("llama.cpp knows no biases in latent attention and will not load this file");
  if (!c.is_mla() && c.family != Family::qwen2 && c.sliding_window > 0)
    notes.push_back(fmt::format("llama.cpp ignores the sliding window of {} tokens", c.sliding_window));
}

}  // namespace

Made make_random(const Config& config, const fs::path& out, DType type, uint64_t seed, Threads& threads, const Progress& progress) {
  const bool gguf = out.extension() == ".gguf";
  if (!gguf) check_hf_type(type);
  std::vector<std::string> notes;
  const std::vector<std::string> biases = implied_biases(config);
  const std::vector<TensorPlan> plans = plan_tensors(config, gguf ? Format::gguf : Format::hf, type, biases, notes);
  std::unique_ptr<ModelWriter> writer;
  if (gguf) {
    json metadata = to_gguf_metadata(config);
    describe_file(metadata, type);
    metadata["general.name"] = fmt::format("random, seed {}", seed);
    stand_in_tokenizer(config, metadata);
    note_what_llama_cpp_ignores(config, biases, notes);
    writer = write_gguf(out, metadata, plans);
  } else {
    writer = write_hf(out, hf_config_of(config, type), plans, {});
  }
  const NormalTable normal;
  auto open = [&](const TensorPlan& plan) {
    if (plan.name == "rope_freqs") return fixed_row(rope_divisors(config), plan.dtype);
    return random_row(plan, seed, normal);
  };
  write_tensors(*writer, plans, with_scales(open, threads), threads, progress);
  return summary(plans, std::move(notes));
}

namespace {

// A checkpoint's tensors, in the order of rows that a format wants.
OpenTensor from_checkpoint(const Checkpoint& checkpoint, const Config& config, bool pairs) {
  return [&checkpoint, &config, pairs](const TensorPlan& plan) {
    if (plan.name == "rope_freqs" && !checkpoint.find(plan.name)) return fixed_row(rope_divisors(config), plan.dtype);
    return checkpoint_row(open_source(checkpoint, config, plan, pairs), plan.dtype, plan.shape.back());
  };
}

}  // namespace

Made quantize_model(const Checkpoint& checkpoint, const fs::path& out, DType type, Threads& threads, const Progress& progress) {
  if (!can_quantise(type))
    fail_input("files of type {} cannot be written; choose q8_0, q4_0, q4_1, q6_k, bf16, f16 or f32", info(type).name);
  if (fs::exists(out) && fs::equivalent(out, checkpoint.path())) fail_input("{} is the model itself; name another file", out.string());
  const Config config = read_config(checkpoint);
  std::vector<std::string> notes;
  const std::vector<std::string> biases = biases_of(checkpoint);
  std::vector<TensorPlan> plans = plan_tensors(config, Format::gguf, type, biases, notes);
  if (checkpoint.find("rope_freqs") && config.rope_scaling.type != RopeScaling::Type::llama3)
    plans.push_back({"rope_freqs", DType::f32, {config.rope_dim() / 2}});
  json metadata = to_gguf_metadata(config);
  describe_file(metadata, type);
  if (!carry_tokenizer(checkpoint, config, metadata, notes)) stand_in_tokenizer(config, metadata);
  note_what_llama_cpp_ignores(config, biases, notes);
  const auto writer = write_gguf(out, metadata, plans);
  const bool pairs = config.is_mla() || config.family != Family::qwen2;
  write_tensors(*writer, plans, from_checkpoint(checkpoint, config, pairs), threads, progress);
  return summary(plans, std::move(notes));
}

std::vector<SideFile> text_files(const Checkpoint& checkpoint) {
  std::vector<SideFile> files;
  if (checkpoint.format() != Format::hf) return files;
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"})
    if (auto text = checkpoint.text(name)) files.push_back({name, std::move(*text)});
  return files;
}

Made export_hf(const Checkpoint& checkpoint, const fs::path& folder, DType type, Threads& threads, const Progress& progress) {
  check_hf_type(type);
  Config config = read_config(checkpoint);
  if (const StoredTensor* divisors = checkpoint.find("rope_freqs")) recover_llama3(config, *divisors);
  std::vector<std::string> notes;
  const std::vector<TensorPlan> plans = plan_tensors(config, Format::hf, type, biases_of(checkpoint), notes);
  const std::vector<SideFile> files = text_files(checkpoint);
  if (checkpoint.format() == Format::gguf) notes.emplace_back("the GGUF's vocabulary is not exported; the folder runs on token ids");
  const auto writer = write_hf(folder, hf_config_of(config, type), plans, files);
  write_tensors(*writer, plans, with_scales(from_checkpoint(checkpoint, config, config.is_mla()), threads), threads, progress);
  return summary(plans, std::move(notes));
}

Made export_hf(const Checkpoint& checkpoint, const Replacement& instead, const fs::path& folder, DType type, Threads& threads,
               const Progress& progress) {
  check_hf_type(type);
  std::vector<std::string> notes, biases;
  for (const auto& [name, values] : instead.tensors)
    if (name.ends_with(".bias")) biases.push_back(name);
  const std::vector<TensorPlan> plans = plan_tensors(instead.config, Format::hf, type, biases, notes);
  const OpenTensor theirs = from_checkpoint(checkpoint, instead.config, instead.config.is_mla());
  const OpenTensor open = [&](const TensorPlan& plan) -> EncodeRow {
    const auto found = instead.tensors.find(plan.name);
    if (found == instead.tensors.end()) return theirs(plan);
    const int64_t cols = plan.shape.back();
    const DType own = plan.dtype;
    CHECK(int64_t(found->second.size()) == rows_of(plan) * cols, "{} has {} values", plan.name, found->second.size());
    return
        [&values = found->second, cols, own](int64_t row, float*, std::byte* to) { quantise(own, values.data() + row * cols, to, cols); };
  };
  const auto writer = write_hf(folder, hf_config_of(instead.config, type), plans, instead.files);
  write_tensors(*writer, plans, with_scales(open, threads), threads, progress);
  return summary(plans, std::move(notes));
}

Config read_config_file(const fs::path& path) {
  const fs::path file = fs::is_directory(path) ? path / "config.json" : path;
  std::error_code error;
  if (fs::file_size(file, error) > (1 << 20) && !error) fail_input("{} is too large for a config.json", file.string());
  std::ifstream in(file, std::ios::binary);
  if (!in) fail_input("cannot read {}", file.string());
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  return parse_hf_config(parse_json(text, file.string()));
}

}  // namespace mla
