// Where each row of a written tensor comes from.
#include "model/make_source.h"

#include "core/check.h"
#include "core/quant.h"
#include "io/listing.h"
#include "model/rope.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>

namespace mla {
namespace {

const StoredTensor& get(const Checkpoint& checkpoint, const std::string& name, const std::vector<int64_t>& shape) {
  const StoredTensor& t = checkpoint.get(name);
  bool same = t.value.rank == int(shape.size());
  for (int i = 0; same && i < t.value.rank; ++i) same = t.value.shape[i] == shape[size_t(i)];
  if (!same) fail_input("tensor {} is {}, but the configuration asks for {}", name, describe(t.value), describe(shape));
  return t;
}

Tensor row_of(const StoredTensor& t, int64_t row) { return mla::row_of(t.value, row); }

// Rows that had to be computed, shared by the copies of the source.
TensorSource computed(std::vector<float> values, int64_t cols) {
  auto shared = std::make_shared<const std::vector<float>>(std::move(values));
  return {[shared, cols](int64_t row) { return view(const_cast<float*>(shared->data() + row * cols), DType::f32, {cols}); }};
}

std::vector<float> decoded(const StoredTensor& t) {
  std::vector<float> values(size_t(t.value.count()));
  dequantise(t.value, values.data());
  return values;
}

// "layers.3.ffn.experts.gate.17" → {"layers.3.ffn.experts.gate", 17}
std::pair<std::string, int64_t> split_index(const std::string& name) {
  const size_t dot = name.rfind('.');
  return {name.substr(0, dot), std::stoll(name.substr(dot + 1))};
}

TensorSource expert_out_of_stack(const Checkpoint& checkpoint, const Config& config, const TensorPlan& plan) {
  const auto [name, expert] = split_index(plan.name);
  const StoredTensor& stack = get(checkpoint, name, {config.n_routed_experts, plan.shape[0], plan.shape[1]});
  return {[&stack, first = expert * plan.shape[0]](int64_t row) { return row_of(stack, first + row); }};
}

TensorSource stack_of_experts(const Checkpoint& checkpoint, const TensorPlan& plan) {
  std::vector<const StoredTensor*> experts;
  for (int64_t e = 0; e < plan.shape[0]; ++e)
    experts.push_back(&get(checkpoint, fmt::format("{}.{}", plan.name, e), {plan.shape[1], plan.shape[2]}));
  return {[experts = std::move(experts), rows = plan.shape[1]](int64_t row) { return row_of(*experts[size_t(row / rows)], row % rows); }};
}

struct Heads {
  int64_t n_h, d_h, d_v, d_c;
  explicit Heads(const Config& c) : n_h(c.num_attention_heads), d_h(c.qk_nope_head_dim), d_v(c.v_head_dim), d_c(c.kv_lora_rank) {}
};

// kv_b [n_h (d_h + d_v), d_c], whose heads are [W_UK; W_UV] → k_b [n_h, d_c, d_h], W_UKᵀ
TensorSource k_b_from_kv_b(const StoredTensor& kv_b, const Heads& s) {
  const std::vector<float> from = decoded(kv_b);
  std::vector<float> to(size_t(s.n_h * s.d_c * s.d_h));
  for (int64_t h = 0; h < s.n_h; ++h)
    for (int64_t i = 0; i < s.d_h; ++i)
      for (int64_t j = 0; j < s.d_c; ++j) to[size_t((h * s.d_c + j) * s.d_h + i)] = from[size_t((h * (s.d_h + s.d_v) + i) * s.d_c + j)];
  return computed(std::move(to), s.d_h);
}

TensorSource v_b_from_kv_b(const StoredTensor& kv_b, const Heads& s) {
  return {[&kv_b, s](int64_t row) { return row_of(kv_b, row / s.d_v * (s.d_h + s.d_v) + s.d_h + row % s.d_v); }};
}

// k_b and v_b → kv_b
TensorSource kv_b_from_halves(const StoredTensor& k_b, const StoredTensor& v_b, const Heads& s) {
  const std::vector<float> k = decoded(k_b), v = decoded(v_b);
  std::vector<float> to(size_t(s.n_h * (s.d_h + s.d_v) * s.d_c));
  for (int64_t h = 0; h < s.n_h; ++h) {
    float* head = to.data() + h * (s.d_h + s.d_v) * s.d_c;
    for (int64_t i = 0; i < s.d_h; ++i)
      for (int64_t j = 0; j < s.d_c; ++j) head[i * s.d_c + j] = k[size_t((h * s.d_c + j) * s.d_h + i)];
    std::copy_n(v.data() + h * s.d_v * s.d_c, s.d_v * s.d_c, head + s.d_h * s.d_c);
  }
  return computed(std::move(to), s.d_c);
}

bool is_rotary(const std::string& name) {
  return name.ends_with(".attn.q") || name.ends_with(".attn.k") || name.ends_with(".attn.q.bias") || name.ends_with(".attn.k.bias");
}

// Row r of a file that holds a head's rotary rows as pairs (2i, 2i+1) is row i or i + d/2 of one that holds halves; and the other way.
int64_t reordered(int64_t row, int64_t d, bool to_pairs) {
  const int64_t head = row / d * d, r = row % d;
  return head + (to_pairs ? r / 2 + r % 2 * (d / 2) : r % (d / 2) * 2 + r / (d / 2));
}

TensorSource reordered_rows(const StoredTensor& t, int64_t d, bool to_pairs) {
  if (t.value.rank == 2) return {[&t, d, to_pairs](int64_t row) { return row_of(t, reordered(row, d, to_pairs)); }};
  const std::vector<float> bias = decoded(t);
  std::vector<float> to(bias.size());
  for (size_t i = 0; i < to.size(); ++i) to[i] = bias[size_t(reordered(int64_t(i), d, to_pairs))];
  const auto n = int64_t(to.size());
  return computed(std::move(to), n);
}

}  // namespace

TensorSource open_source(const Checkpoint& checkpoint, const Config& config, const TensorPlan& plan, bool pairs) {
  if (!checkpoint.find(plan.name)) {
    const std::string layer = plan.name.substr(0, plan.name.rfind("attn."));
    const Heads s(config);
    const std::vector<int64_t> fused{s.n_h * (s.d_h + s.d_v), s.d_c};
    if (plan.name.ends_with("attn.k_b")) return k_b_from_kv_b(get(checkpoint, layer + "attn.kv_b", fused), s);
    if (plan.name.ends_with("attn.v_b")) return v_b_from_kv_b(get(checkpoint, layer + "attn.kv_b", fused), s);
    if (plan.name.ends_with("attn.kv_b"))
      return kv_b_from_halves(get(checkpoint, layer + "attn.k_b", {s.n_h, s.d_c, s.d_h}),
                              get(checkpoint, layer + "attn.v_b", {s.n_h, s.d_v, s.d_c}), s);
    if (plan.name.find(".experts.") != std::string::npos)
      return plan.shape.size() == 3 ? stack_of_experts(checkpoint, plan) : expert_out_of_stack(checkpoint, config, plan);
  }
  const StoredTensor& t = get(checkpoint, plan.name, plan.shape);
  if (!config.is_mla() && pairs != config.rope_interleaved && is_rotary(plan.name)) return reordered_rows(t, config.head_dim, pairs);
  return {[&t](int64_t row) { return row_of(t, row); }};
}

std::vector<float> rope_divisors(const Config& config) {
  Config plain = config;
  plain.rope_scaling = {};
  const std::vector<double> stretched = rope_frequencies(config), original = rope_frequencies(plain);
  std::vector<float> divisors;
  for (size_t i = 0; i < original.size(); ++i) divisors.push_back(float(original[i] / stretched[i]));
  return divisors;
}

void recover_llama3(Config& config, const StoredTensor& divisors) {
  const std::vector<float> wanted = decoded(divisors);
  for (const double factor : {8.0, 32.0, 16.0, 4.0, 2.0}) {
    Config candidate = config;
    candidate.rope_scaling = {};
    candidate.rope_scaling.type = RopeScaling::Type::llama3;
    candidate.rope_scaling.factor = factor;
    candidate.rope_scaling.original_max_position_embeddings = 8192;
    const std::vector<float> got = rope_divisors(candidate);
    bool same = got.size() == wanted.size();
    for (size_t i = 0; same && i < got.size(); ++i) same = std::fabs(got[i] - wanted[i]) <= 1e-4f * std::fabs(got[i]);
    if (same) return void(config = candidate);
  }
  fail_input("the file's own rotary factors (rope_freqs) are none of Llama 3's, and a config.json cannot hold others");
}

}  // namespace mla
