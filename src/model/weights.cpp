// From a checkpoint's tensors to weights in the device's order, layer by layer, so that no second copy of the model ever exists.
#include "core/check.h"
#include "core/quant.h"
#include "core/threads.h"
#include "io/checkpoint.h"
#include "model/model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

namespace mla {
namespace {

class Loader {
 public:
  Loader(const Checkpoint& checkpoint, const Config& config, Device& device, const Progress& progress)
      : checkpoint_(checkpoint), config_(config), device_(device), progress_(progress) {}

  Weights load() {
    const Config& c = config_;
    out_.embed = matrix("embed", c.vocab_size, c.hidden_size);
    out_.lm_head = checkpoint_.find("lm_head") ? matrix("lm_head", c.vocab_size, c.hidden_size) : out_.embed;
    out_.norm = vector("norm", c.hidden_size);
    for (int l = 0; l < c.num_hidden_layers; ++l) {
      prefix_ = fmt::format("layers.{}.", l);
      Layer layer;
      if (c.is_mla())
        layer.attention = mla();
      else
        layer.attention = gqa();
      if (c.is_moe_layer(l))
        layer.ffn = moe();
      else
        layer.ffn = DenseFfn{vector("ffn_norm", c.hidden_size), ffn("ffn.", c.intermediate_size)};
      out_.layers.push_back(std::move(layer));
      if (progress_) progress_(double(l + 1) / c.num_hidden_layers);
    }
    return std::move(out_);
  }

 private:
  const StoredTensor* find(const std::string& name) const { return checkpoint_.find(prefix_ + name); }

  const StoredTensor& get(const std::string& name, std::initializer_list<int64_t> shape) const {
    const StoredTensor& t = checkpoint_.get(prefix_ + name);
    bool same = t.value.rank == int(shape.size());
    for (int i = 0; same && i < t.value.rank; ++i) same = t.value.shape[i] == shape.begin()[i];
    if (!same) {
      const Tensor expected = view(nullptr, t.value.dtype, shape);
      fail_input("tensor {} is {}, but the configuration asks for {}", t.name, describe(t.value), describe(expected));
    }
    return t;
  }

  static void release(const StoredTensor& t) { t.file->release(t.value.data, size_t(t.bytes())); }

  Weight matrix(const std::string& name, int64_t rows, int64_t cols) { return pack(get(name, {rows, cols})); }

  // Kernels multiply codes as they are: what is no number must not get to them.
  void check_f8(const StoredTensor& t) {
    if (t.value.dtype != DType::f8) return;
    const int64_t n = f8_blocks(t.value.shape[0]) * f8_blocks(t.value.shape[1]), cols = t.value.shape[1];
    if (!std::all_of(t.value.scales, t.value.scales + n, [](float x) { return std::isfinite(x); }))
      fail_input("the scales of tensor {} hold what is no number; the file is damaged", t.name);
    device_.threads().parallel(t.value.shape[0], [&](int64_t row, int) {
      const uint8_t* codes = t.value.as<uint8_t>() + row * cols;
      int none = 0;
      for (int64_t i = 0; i < cols; ++i) none |= (codes[i] & 0x7f) == 0x7f;
      if (none) fail_input("row {} of tensor {} holds fp8 codes that are no numbers; the file is damaged", row, t.name);
    });
  }

  Weight pack(const StoredTensor& t) {
    check_f8(t);
    Weight w = device_.pack(t.value);
    release(t);
    return w;
  }

  // Norms, biases: f32, kept beside the weights.
  Tensor vector(const std::string& name, int64_t n) {
    const StoredTensor& t = get(name, {n});
    const std::vector<float> values = decoded(t);
    out_.small.emplace_back(size_t(n) * 4, device_.memory());
    device_.memory().upload(values.data(), out_.small.back().data(), size_t(n) * 4);
    return view(out_.small.back().data(), DType::f32, {n}, device_.memory().place());
  }
  Tensor optional_vector(const std::string& name, int64_t n) { return find(name) ? vector(name, n) : Tensor{}; }

  // Experts are one stack in GGUF and one tensor each in HF folders.
  Weight experts(const std::string& name, int64_t rows, int64_t cols) {
    if (find(name)) return pack(get(name, {config_.n_routed_experts, rows, cols}));
    std::vector<Tensor> pieces;
    std::vector<const StoredTensor*> stored;
    for (int e = 0; e < config_.n_routed_experts; ++e) {
      stored.push_back(&get(fmt::format("{}.{}", name, e), {rows, cols}));
      check_f8(*stored.back());
      pieces.push_back(stored.back()->value);
      if (pieces.back().dtype != pieces.front().dtype)
        fail_input("expert {} of {} is {}, the first one {}; all must have one type", e, prefix_ + name, info(pieces.back().dtype).name,
                   info(pieces.front().dtype).name);
    }
    Weight w = device_.pack(pieces);
    for (const StoredTensor* t : stored) release(*t);
    return w;
  }

  FfnWeights ffn(const std::string& name, int64_t width) {
    const int64_t D = config_.hidden_size;
    return {matrix(name + "gate", width, D), matrix(name + "up", width, D), matrix(name + "down", D, width)};
  }

  MoeFfn moe() {
    const Config& c = config_;
    const int64_t D = c.hidden_size, width = c.moe_intermediate_size;
    MoeFfn out;
    out.norm = vector("ffn_norm", D);
    out.router = matrix("ffn.router", c.n_routed_experts, D);
    out.experts = {experts("ffn.experts.gate", width, D), experts("ffn.experts.up", width, D), experts("ffn.experts.down", D, width)};
    if (c.n_shared_experts > 0) out.shared = ffn("ffn.shared.", c.n_shared_experts * width);
    return out;
  }

  GqaWeights gqa() {
    const Config& c = config_;
    const int64_t D = c.hidden_size, d = c.head_dim, q = c.num_attention_heads * d, kv = c.num_key_value_heads * d;
    GqaWeights w;
    w.attn_norm = vector("attn_norm", D);
    w.q = matrix("attn.q", q, D);
    w.k = matrix("attn.k", kv, D);
    w.v = matrix("attn.v", kv, D);
    w.o = matrix("attn.o", D, q);
    w.q_bias = optional_vector("attn.q.bias", q);
    w.k_bias = optional_vector("attn.k.bias", kv);
    w.v_bias = optional_vector("attn.v.bias", kv);
    w.o_bias = optional_vector("attn.o.bias", D);
    return w;
  }

  MlaWeights mla() {
    const Config& c = config_;
    const int64_t D = c.hidden_size, n_h = c.num_attention_heads, d_q = c.query_dim(), row = c.kv_lora_rank + c.qk_rope_head_dim;
    MlaWeights w;
    w.attn_norm = vector("attn_norm", D);
    if (c.q_lora_rank > 0) {
      w.q_a = matrix("attn.q_a", c.q_lora_rank, D);
      w.q_a_bias = optional_vector("attn.q_a.bias", c.q_lora_rank);
      w.q_a_norm = vector("attn.q_a_norm", c.q_lora_rank);
      w.q_b = matrix("attn.q_b", n_h * d_q, c.q_lora_rank);
    } else {
      w.q = matrix("attn.q", n_h * d_q, D);
    }
    w.kv_a = matrix("attn.kv_a", row, D);
    w.kv_a_bias = optional_vector("attn.kv_a.bias", row);
    w.kv_a_norm = vector("attn.kv_a_norm", c.kv_lora_rank);
    w.o = matrix("attn.o", D, n_h * c.v_head_dim);
    w.o_bias = optional_vector("attn.o.bias", D);
    if (find("attn.kv_b"))
      split_kv_b(w);
    else
      join_kv_b(w);
    return w;
  }

  // A file brings W_UK and W_UV either fused, as the expanded form reads them, or split, as the absorbed form does. The other form is
  // derived: exactly from plain types; from quantised blocks, which a transposition tears apart, as q8_0; from fp8 as bf16.
  static DType derived_type(DType stored, int64_t cols) {
    if (stored == DType::f8) return DType::bf16;
    if (!is_quantised(stored)) return stored;
    return cols % info(DType::q8_0).block == 0 ? DType::q8_0 : DType::bf16;
  }

  Weight pack_derived(const std::vector<float>& values, DType type, int64_t count, int64_t rows, int64_t cols) {
    std::vector<std::byte> encoded(size_t(row_bytes(type, count * rows * cols)));
    quantise(type, values.data(), encoded.data(), count * rows * cols);
    return device_.pack(view(encoded.data(), type, {count, rows, cols}));
  }

  static std::vector<float> decoded(const StoredTensor& t) {
    std::vector<float> values(size_t(t.value.count()));
    dequantise(t.value, values.data());
    return values;
  }

  // kv_b [n_h (d_h + d_v), d_c] → k_b_absorbed [n_h, d_c, d_h] and v_b [n_h, d_v, d_c]
  void split_kv_b(MlaWeights& w) {
    const int64_t n_h = config_.num_attention_heads, d_h = config_.qk_nope_head_dim, d_v = config_.v_head_dim, d_c = config_.kv_lora_rank;
    const StoredTensor& t = get("attn.kv_b", {n_h * (d_h + d_v), d_c});
    const std::vector<float> kv_b = decoded(t);
    std::vector<float> k_b(size_t(n_h * d_c * d_h)), v_b;
    std::vector<Tensor> v_heads;
    for (int64_t h = 0; h < n_h; ++h) {
      const float* k = kv_b.data() + h * (d_h + d_v) * d_c;
      for (int64_t i = 0; i < d_h; ++i)
        for (int64_t j = 0; j < d_c; ++j) k_b[size_t((h * d_c + j) * d_h + i)] = k[i * d_c + j];
      if (t.value.dtype == DType::f8)  // a head's values need not begin with a block
        v_b.insert(v_b.end(), k + d_h * d_c, k + (d_h + d_v) * d_c);
      else
        v_heads.push_back(view(row_of(t.value, h * (d_h + d_v) + d_h).data, t.value.dtype, {d_v, d_c}));
    }
    w.k_b_absorbed = pack_derived(k_b, derived_type(t.value.dtype, d_h), n_h, d_c, d_h);
    w.v_b = v_heads.empty() ? pack_derived(v_b, derived_type(t.value.dtype, d_c), n_h, d_v, d_c) : device_.pack(v_heads);
    w.kv_b = pack(t);
  }

  // k_b [n_h, d_c, d_h] and v_b [n_h, d_v, d_c] → kv_b
  void join_kv_b(MlaWeights& w) {
    const int64_t n_h = config_.num_attention_heads, d_h = config_.qk_nope_head_dim, d_v = config_.v_head_dim, d_c = config_.kv_lora_rank;
    const StoredTensor &k = get("attn.k_b", {n_h, d_c, d_h}), &v = get("attn.v_b", {n_h, d_v, d_c});
    const std::vector<float> k_b = decoded(k), v_b = decoded(v);
    std::vector<float> kv_b(size_t(n_h * (d_h + d_v) * d_c));
    for (int64_t h = 0; h < n_h; ++h) {
      float* to = kv_b.data() + h * (d_h + d_v) * d_c;
      for (int64_t i = 0; i < d_h; ++i)
        for (int64_t j = 0; j < d_c; ++j) to[i * d_c + j] = k_b[size_t((h * d_c + j) * d_h + i)];
      std::memcpy(to + d_h * d_c, v_b.data() + h * d_v * d_c, size_t(d_v * d_c) * 4);
    }
    w.kv_b = pack_derived(kv_b, derived_type(k.value.dtype, d_c), 1, n_h * (d_h + d_v), d_c);
    w.k_b_absorbed = pack(k);
    w.v_b = pack(v);
  }

  const Checkpoint& checkpoint_;
  const Config& config_;
  Device& device_;
  const Progress& progress_;
  std::string prefix_;
  Weights out_;
};

// Says before anything is read that a device has no room; a type that takes more there than in the file is found out on the way.
void check_room(const Checkpoint& checkpoint, Device& device) {
  if (device.memory().place() == Place::host) return;
  double bytes = 0, elements = 0;
  for (const StoredTensor& t : checkpoint.tensors()) bytes += double(t.bytes()), elements += double(t.value.count());
  const double free = device.memory().free_bytes();
  if (bytes <= free) return;
  auto as = [&](DType type) { return elements * info(type).block_bytes / info(type).block; };
  std::string fits = "not even q4_0 would fit";
  for (const DType type : {DType::q4_0, DType::q8_0})
    if (as(type) <= free) fits = fmt::format("as {} they would take {:.1f} GB", info(type).name, 1e-9 * as(type));
  fail_input("the weights of {} take {:.1f} GB, and {:.1f} GB are free on {}; {}", checkpoint.path().string(), 1e-9 * bytes, 1e-9 * free,
             device.describe(), fits);
}

}  // namespace

Weights load_weights(const Checkpoint& checkpoint, const Config& config, Device& device, const Progress& progress) {
  check_room(checkpoint, device);
  return Loader(checkpoint, config, device, progress).load();
}

}  // namespace mla
