// Reads layers of the original.
#include "lowrank/original.h"

#include "core/check.h"
#include "core/quant.h"
#include "io/checkpoint.h"
#include "model/make_plan.h"
#include "model/make_source.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

namespace mla {
namespace {

Matrix as_matrix(const StoredTensor& t, int64_t spare_columns) {
  const std::vector<float> values = decoded(t);
  const int64_t rows = t.value.shape[0], cols = t.value.shape[1];
  Matrix m(rows, cols + spare_columns);
  for (int64_t i = 0; i < rows; ++i) std::copy_n(values.begin() + i * cols, cols, m.row(i));
  check_finite(m, t.name);
  return m;
}

}  // namespace

std::vector<float> decoded(const StoredTensor& t) {
  std::vector<float> values(size_t(t.value.count()));
  dequantise(t.value, values.data());
  return values;
}

bool has_biases(const Checkpoint& checkpoint) {
  return std::ranges::any_of(checkpoint.tensors(), [](const StoredTensor& t) {
    return t.name.ends_with("attn.q.bias") || t.name.ends_with("attn.k.bias") || t.name.ends_with("attn.v.bias");
  });
}

GqaShape shape_of(const Checkpoint& checkpoint, const Config& c) {
  return {c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.hidden_size + (has_biases(checkpoint) ? 1 : 0), c.rope_interleaved};
}

Config original_config(const Checkpoint& checkpoint) {
  Config config = read_config(checkpoint);
  if (const StoredTensor* divisors = checkpoint.find("rope_freqs")) recover_llama3(config, *divisors);
  return config;
}

void check_tensors(const Checkpoint& checkpoint, const Config& config) {
  std::vector<std::string> biases, notes;
  for (const StoredTensor& t : checkpoint.tensors()) {
    if (t.name.ends_with(".bias")) biases.push_back(t.name);
    for (float x : decoded(t))
      if (!std::isfinite(x)) fail_input("tensor {} holds {}; only finite weights can be converted", t.name, x);
  }
  std::ranges::sort(biases);
  for (const TensorPlan& plan : plan_tensors(config, Format::hf, DType::f32, biases, notes)) {
    const Tensor& t = checkpoint.get(plan.name).value;
    if (!std::ranges::equal(plan.shape, std::span(t.shape, size_t(t.rank))))
      fail_input("tensor {} is {}; the configuration asks for [{}]", plan.name, describe(t), fmt::join(plan.shape, ", "));
  }
}

Original::Original(const Checkpoint& checkpoint, const Config& config, Device& device)
    : checkpoint_(checkpoint), config_(config), device_(device), biased_(has_biases(checkpoint)) {}

void Original::load(int layer) {
  prefix_ = fmt::format("layers.{}.", layer);
  vectors_.clear();
  vectors_.reserve(6);  // tensors below point at them
  GqaWeights gqa;
  gqa.attn_norm = vector("attn_norm");
  gqa.q = pack("attn.q"), gqa.k = pack("attn.k"), gqa.v = pack("attn.v"), gqa.o = pack("attn.o");
  gqa.q_bias = vector("attn.q.bias"), gqa.k_bias = vector("attn.k.bias");
  gqa.v_bias = vector("attn.v.bias"), gqa.o_bias = vector("attn.o.bias");
  DenseFfn ffn;
  ffn.norm = vector("ffn_norm");
  ffn.ffn = {pack("ffn.gate"), pack("ffn.up"), pack("ffn.down")};
  layer_ = {std::move(gqa), std::move(ffn)};
}

Matrix Original::matrix(const char* name) const { return as_matrix(checkpoint_.get(prefix_ + name), 0); }

GqaMatrices Original::matrices() const {
  const auto with_bias = [&](const std::string& name) {
    Matrix m = as_matrix(checkpoint_.get(prefix_ + name), biased_ ? 1 : 0);
    if (const StoredTensor* bias = checkpoint_.find(prefix_ + name + ".bias")) {
      const std::vector<float> values = decoded(*bias);
      for (int64_t i = 0; i < m.rows; ++i) m(i, m.cols - 1) = double(values[size_t(i)]);
    }
    return m;
  };
  return {with_bias("attn.q"), with_bias("attn.k"), with_bias("attn.v"), matrix("attn.o")};
}

std::vector<float> Original::embed(std::span<const int32_t> ids) const {
  const StoredTensor& t = checkpoint_.get("embed");
  const int64_t D = config_.hidden_size;
  std::vector<float> out(ids.size() * size_t(D));
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= config_.vocab_size) fail_input("token id {} is outside the vocabulary of {}", ids[i], config_.vocab_size);
    dequantise(row_of(t.value, ids[i]), out.data() + int64_t(i) * D);
  }
  return out;
}

void Original::attention_inputs(const Tensor& x, std::vector<float>& out) const {
  const int64_t n = x.shape[0], D = config_.hidden_size, cols = D + (biased_ ? 1 : 0);
  out.assign(size_t(n * cols), 1);
  Tensor normed = view(out.data(), DType::f32, {n, D});
  device_.rms_norm(x, gqa().attn_norm, float(config_.rms_norm_eps), normed);
  for (int64_t i = n - 1; biased_ && i >= 0; --i) {
    std::copy_backward(out.begin() + i * D, out.begin() + (i + 1) * D, out.begin() + i * cols + D);
    out[size_t(i * cols + D)] = 1;
  }
}

Tensor Original::vector(const char* name) {
  const StoredTensor* t = checkpoint_.find(prefix_ + name);
  if (!t) return {};
  vectors_.push_back(decoded(*t));
  return view(vectors_.back().data(), DType::f32, {int64_t(vectors_.back().size())});
}

Weight Original::pack(const char* name) {
  const StoredTensor& t = checkpoint_.get(prefix_ + name);
  if (!is_quantised(t.value.dtype)) return device_.pack(t.value);
  std::vector<float> values = decoded(t);
  return device_.pack(view(values.data(), DType::f32, {t.value.shape[0], t.value.shape[1]}));
}

}  // namespace mla
