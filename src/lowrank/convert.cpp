// Layer by layer: two streams of the calibration text, the original's and the converted model's, held whole and moved on together.
#include "lowrank/convert.h"

#include "core/check.h"
#include "core/quant.h"
#include "core/threads.h"
#include "io/checkpoint.h"
#include "lowrank/layer_run.h"
#include "model/rope.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <tuple>

namespace mla {
namespace {

constexpr int64_t batch_windows = 8;

std::vector<float> decoded(const StoredTensor& t) {
  std::vector<float> values(size_t(t.value.count()));
  dequantise(t.value.dtype, t.value.data, values.data(), t.value.count());
  return values;
}

Matrix as_matrix(const StoredTensor& t) {
  const std::vector<float> values = decoded(t);
  Matrix m(t.value.shape[0], t.value.shape[1]);
  std::copy(values.begin(), values.end(), m.data.begin());
  check_finite(m, t.name);
  return m;
}

std::vector<float> rounded(const std::vector<double>& values, DType type) {
  std::vector<float> out(values.begin(), values.end());
  std::vector<std::byte> encoded(size_t(row_bytes(type, int64_t(out.size()))));
  quantise(type, out.data(), encoded.data(), int64_t(out.size()));
  dequantise(type, encoded.data(), out.data(), int64_t(out.size()));
  return out;
}

Tensor vector_view(std::vector<float>& v) { return view(v.data(), DType::f32, {int64_t(v.size())}); }

GqaShape shape_of(const Config& c) { return {c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.hidden_size, c.rope_interleaved}; }

std::vector<double> frequencies_of(const Config& config, const Checkpoint& checkpoint) {
  std::vector<float> factors;
  if (const StoredTensor* stored = checkpoint.find("rope_freqs")) factors = decoded(*stored);
  return rope_frequencies(config, factors);
}

// A layer of the original on the device, its quantised weights as f32, so that what is calibrated is the model and not its rounding.
class Original {
 public:
  Original(const Checkpoint& checkpoint, const Config& config, Device& device)
      : checkpoint_(checkpoint), config_(config), device_(device) {}

  void load(int layer) {
    prefix_ = fmt::format("layers.{}.", layer);
    norms_.clear();
    norms_.reserve(2);
    GqaWeights gqa;
    gqa.attn_norm = norm("attn_norm");
    gqa.q = pack("attn.q"), gqa.k = pack("attn.k"), gqa.v = pack("attn.v"), gqa.o = pack("attn.o");
    DenseFfn ffn;
    ffn.norm = norm("ffn_norm");
    ffn.ffn = {pack("ffn.gate"), pack("ffn.up"), pack("ffn.down")};
    layer_ = {std::move(gqa), std::move(ffn)};
    matrices_ = {matrix("attn.q"), matrix("attn.k"), matrix("attn.v"), matrix("attn.o")};
  }
  Matrix matrix(const char* name) const { return as_matrix(checkpoint_.get(prefix_ + name)); }
  const Layer& layer() const { return layer_; }
  const GqaWeights& gqa() const { return std::get<GqaWeights>(layer_.attention); }
  const DenseFfn& ffn() const { return std::get<DenseFfn>(layer_.ffn); }
  const GqaMatrices& matrices() const { return matrices_; }

  std::vector<float> embed(std::span<const int32_t> ids) const {
    const StoredTensor& t = checkpoint_.get("embed");
    const int64_t D = config_.hidden_size, bytes = row_bytes(t.value.dtype, D);
    std::vector<float> out(ids.size() * size_t(D));
    for (size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] < 0 || ids[i] >= config_.vocab_size) fail_input("token id {} is outside the vocabulary of {}", ids[i], config_.vocab_size);
      dequantise(t.value.dtype, t.value.as<std::byte>() + ids[i] * bytes, out.data() + int64_t(i) * D, D);
    }
    return out;
  }

 private:
  Tensor norm(const char* name) {
    norms_.push_back(decoded(checkpoint_.get(prefix_ + name)));
    return vector_view(norms_.back());
  }
  Weight pack(const char* name) {
    const StoredTensor& t = checkpoint_.get(prefix_ + name);
    if (!is_quantised(t.value.dtype)) return device_.pack(t.value);
    std::vector<float> values = decoded(t);
    return device_.pack(view(values.data(), DType::f32, {t.value.shape[0], t.value.shape[1]}));
  }

  const Checkpoint& checkpoint_;
  const Config& config_;
  Device& device_;
  std::string prefix_;
  std::vector<std::vector<float>> norms_;
  Layer layer_;
  GqaMatrices matrices_;
};

class Converter {
 public:
  Converter(const Checkpoint& checkpoint, const Config& config, std::span<const int32_t> tokens, const ConvertOptions& o, Device& device,
            const Progress& progress)
      : config_(config),
        o_(o),
        device_(device),
        progress_(progress),
        shape_(shape_of(config)),
        frequencies_(frequencies_of(config, checkpoint)),
        windows_(int64_t(tokens.size()) / o.window),
        original_(checkpoint, config, device) {
    out_.config = converted_config(config, o);
    const int64_t batch = std::min(batch_windows, windows_);
    gqa_run_ = std::make_unique<LayerRun>(config_, frequencies_, device, o.window, batch);
    mla_run_ = std::make_unique<LayerRun>(out_.config, rope_frequencies(out_.config), device, o.window, batch);
    theirs_ = original_.embed(tokens.first(size_t(windows_ * o.window)));
    ours_ = theirs_;
    const size_t rows = size_t(windows_ * o.window);
    attended_.resize(rows * size_t(shape_.heads * shape_.head_dim));
    if (o.refit_down) hidden_.resize(rows * size_t(config.intermediate_size));
  }

  Converted run() {
    for (int l = 0; l < config_.num_hidden_layers; ++l) {
      layer_ = l;
      phase_ = 0;
      original_.load(l);
      if (!o_.sequential) ours_ = theirs_;
      const MlaMatrices m = convert_layer(shape_, original_.matrices(), moments(), o_.layer, out_.config.latent_norm_eps);
      set("attn.q", m.q.data), set("attn.kv_a", m.kv_a.data), set("attn.kv_b", m.kv_b.data);
      set("attn.kv_a.bias", m.kv_a_bias), set("attn.kv_a_norm", m.kv_a_norm);
      set("attn.o.bias", std::vector<double>(size_t(shape_.hidden), 0.0));
      set("attn.o", attention(m.o).data);
      feed_forward();
    }
    if (!out_.config.attention_bias) std::erase_if(out_.tensors, [](const auto& t) { return t.first.ends_with(".bias"); });
    return std::move(out_);
  }

 private:
  struct Batch {
    int64_t first, rows;  // of the streams
    Tensor stream(std::vector<float>& s, int64_t cols) const { return view(s.data() + first * cols, DType::f32, {rows, cols}); }
  };

  // Calls what(batch) for the text in order.
  template <class What>
  void each_batch(const What& what) {
    const int64_t batches = (windows_ + batch_windows - 1) / batch_windows;
    for (int64_t b = 0; b < batches; ++b) {
      const double within = (phase_ + double(b) / double(batches)) / 3;
      if (progress_) progress_((layer_ + within) / config_.num_hidden_layers);
      const int64_t first = b * batch_windows, n = std::min(batch_windows, windows_ - first);
      what(Batch{first * o_.window, n * o_.window});
    }
    ++phase_;
  }

  std::string named(const char* name) const { return fmt::format("layers.{}.{}", layer_, name); }
  void set(const char* name, const std::vector<double>& values) { out_.tensors[named(name)] = rounded(values, o_.type); }
  Weight pack(std::vector<float>& values, int64_t rows, int64_t cols) {
    return device_.pack(view(values.data(), DType::f32, {rows, cols}));
  }
  Weight pack(const char* name, int64_t rows, int64_t cols) { return pack(out_.tensors.at(named(name)), rows, cols); }

  // Second moments of the inputs that the converted layer will meet, and the constants under the original's attention to them.
  LayerMoments moments() {
    const int64_t D = shape_.hidden;
    Sums sums(D, 0);
    LayerMoments out;
    out.mean.assign(size_t(D), 0);
    ConstantSums constants(shape_, frequencies_, o_.window, o_.layer.constant);
    std::vector<float> normed, copy;
    int64_t seen = 0;
    each_batch([&](const Batch& b) {
      normed.resize(size_t(b.rows * D));
      const Tensor x = b.stream(ours_, D);
      device_.rms_norm(x, original_.gqa().attn_norm, float(config_.rms_norm_eps), view(normed.data(), DType::f32, {b.rows, D}));
      sums.add(normed.data(), b.rows);
      for (int64_t i = 0; i < b.rows * D; ++i) out.mean[size_t(i % D)] += double(normed[size_t(i)]);
      if (o_.layer.constant == Constant::one || seen >= o_.constant_windows) return;
      copy.assign(x.f32(), x.f32() + b.rows * D);
      add_constants(constants, view(copy.data(), DType::f32, {b.rows, D}), seen);
    });
    const auto rows = double(windows_ * o_.window);
    out.inputs = sums.gram();
    for (double& x : out.inputs.data) x /= rows;
    for (double& x : out.mean) x /= rows;
    if (o_.layer.constant != Constant::one) out.constants = constants.constants();
    return out;
  }

  void add_constants(ConstantSums& constants, Tensor x, int64_t& seen) {
    Tensor q;
    std::vector<float> queries;
    gqa_run_->attend(original_.gqa(), x, [&](const std::string& name, const Tensor& t) {
      if (name == "attn.query") queries.assign(t.f32(), t.f32() + t.count()), q = t;
      if (name != "attn.rows") return;
      q.data = queries.data();
      const Tensor k = view(t.data, DType::f32, {t.shape[0], 2 * shape_.groups, shape_.head_dim});
      for (int64_t first = 0; first < t.shape[0] && seen < o_.constant_windows; first += o_.window, ++seen)
        constants.add(slice(q, 0, first, o_.window), slice(k, 0, first, o_.window), float(config_.softmax_scale()));
    });
  }

  MlaWeights mla_weights() {
    const Config& c = out_.config;
    const int64_t D = c.hidden_size, n_h = c.num_attention_heads, d_h = c.qk_nope_head_dim, row = c.kv_lora_rank + c.qk_rope_head_dim;
    MlaWeights w;
    w.attn_norm = original_.gqa().attn_norm;
    w.q = pack("attn.q", n_h * c.query_dim(), D);
    w.kv_a = pack("attn.kv_a", row, D);
    w.kv_a_bias = vector_view(out_.tensors.at(named("attn.kv_a.bias")));
    w.kv_a_norm = vector_view(out_.tensors.at(named("attn.kv_a_norm")));
    w.kv_b = pack("attn.kv_b", n_h * (d_h + c.v_head_dim), c.kv_lora_rank);
    w.o = original_.gqa().o;
    return w;
  }

  // Moves both streams behind the attention and returns W_O, refitted to what the stream should be there.
  Matrix attention(const Matrix& o) {
    const int64_t D = shape_.hidden, cols = shape_.heads * shape_.head_dim;
    const MlaWeights w = mla_weights();
    Sums sums(cols, D);
    std::vector<float> copy;
    each_batch([&](const Batch& b) {
      const Tensor ours = b.stream(ours_, D), theirs = b.stream(theirs_, D);
      const auto copied = [&](const Tensor& x) {
        copy.assign(x.f32(), x.f32() + x.count());
        return view(copy.data(), DType::f32, {b.rows, D});
      };
      float* attended = attended_.data() + b.first * cols;
      mla_run_->attend(w, copied(ours), [&](const std::string& name, const Tensor& t) {
        if (name == "attn.output") std::memcpy(attended, t.data, size_t(t.count()) * sizeof(float));
      });
      gqa_run_->attend(original_.gqa(), theirs);
      if (o_.refit == Refit::none) return;
      const Tensor target = copied(o_.refit == Refit::drift ? theirs : ours);
      if (o_.refit == Refit::layer) gqa_run_->attend(original_.gqa(), target);
      add_targets(sums, attended, target, ours);
    });
    Matrix fitted = o_.refit == Refit::none ? o : refitted(o, sums, o_.output_ridge);
    std::vector<float> weights = rounded(fitted.data, o_.type);
    const Weight packed = pack(weights, D, cols);
    for (int64_t first = 0; first < windows_; first += batch_windows) {
      const Batch b{first * o_.window, std::min(batch_windows, windows_ - first) * o_.window};
      device_.linear(b.stream(attended_, cols), packed, {}, b.stream(ours_, D), true);
    }
    return fitted;
  }

  // Moves both streams behind the feed-forward network, whose W_down is refitted if that is asked for.
  void feed_forward() {
    const int64_t D = shape_.hidden, width = config_.intermediate_size;
    if (!o_.refit_down) {
      each_batch([&](const Batch& b) {
        gqa_run_->feed_forward(original_.layer(), b.stream(theirs_, D));
        if (o_.sequential) gqa_run_->feed_forward(original_.layer(), b.stream(ours_, D));
      });
      return;
    }
    Sums sums(width, D);
    std::vector<float> normed, gate, target;
    each_batch([&](const Batch& b) {
      const Tensor ours = b.stream(ours_, D), theirs = b.stream(theirs_, D), hidden = b.stream(hidden_, width);
      normed.resize(size_t(b.rows * D)), gate.resize(size_t(b.rows * width));
      const Tensor h = view(normed.data(), DType::f32, {b.rows, D}), g = view(gate.data(), DType::f32, {b.rows, width});
      device_.rms_norm(ours, original_.ffn().norm, float(config_.rms_norm_eps), h);
      device_.linear(h, {{original_.ffn().ffn.gate, {}, g}, {original_.ffn().ffn.up, {}, hidden}});
      device_.threads().parallel(b.rows, [&](int64_t i, int) {
        for (int64_t j = i * width; j < (i + 1) * width; ++j) hidden.f32()[j] *= g.f32()[j] / (1 + std::exp(-g.f32()[j]));
      });
      gqa_run_->feed_forward(original_.layer(), theirs);
      target.assign(theirs.f32(), theirs.f32() + theirs.count());
      add_targets(sums, hidden.f32(), view(target.data(), DType::f32, {b.rows, D}), ours);
    });
    const Matrix fitted = refitted(original_.matrix("ffn.down"), sums, o_.down_ridge);
    set("ffn.down", fitted.data);
    const Weight packed = pack("ffn.down", D, width);
    for (int64_t first = 0; first < windows_; first += batch_windows) {
      const Batch b{first * o_.window, std::min(batch_windows, windows_ - first) * o_.window};
      device_.linear(b.stream(hidden_, width), packed, {}, b.stream(ours_, D), true);
    }
  }

  // What W x should be: the target stream less ours, which is left in `target`.
  static void add_targets(Sums& sums, const float* x, const Tensor& target, const Tensor& ours) {
    for (int64_t i = 0; i < target.count(); ++i) target.f32()[i] -= ours.f32()[i];
    sums.add(x, target.shape[0]);
    sums.add_cross(x, target.f32(), target.shape[0]);
  }

  // W + argmin_Δ Σ ‖y − (W + Δ) x‖² + λ ‖Δ‖²; sums hold Σ x xᵀ and Σ x yᵀ.
  static Matrix refitted(const Matrix& w, const Sums& sums, double ridge) {
    const Matrix gram = sums.gram();
    double diagonal = 0;
    for (int64_t i = 0; i < gram.rows; ++i) diagonal += gram(i, i);
    const Matrix missing = difference(sums.cross(), multiply(gram, w, Transposed::right));
    const Matrix delta = solve_ridge(gram, ridge * diagonal / double(gram.rows), missing);
    Matrix out = w;
    for (int64_t i = 0; i < w.rows; ++i)
      for (int64_t j = 0; j < w.cols; ++j) out(i, j) += delta(j, i);
    return out;
  }

  const Config& config_;
  const ConvertOptions& o_;
  Device& device_;
  const Progress& progress_;
  GqaShape shape_;
  std::vector<double> frequencies_;
  int64_t windows_;
  Original original_;
  Converted out_;
  std::unique_ptr<LayerRun> gqa_run_, mla_run_;
  std::vector<float> theirs_, ours_;      // the streams [N, D]
  std::vector<float> attended_, hidden_;  // ours: heads' outputs [N, h d], and the feed-forward network's inner activations
  int layer_ = 0;
  double phase_ = 0;
};

void check_tensors(const Checkpoint& checkpoint, const Config& config) {
  for (const StoredTensor& t : checkpoint.tensors()) {
    if (t.name.ends_with(".bias"))
      fail_input(
          "the model has a bias, {}, which a DeepSeek-V2 checkpoint without a query latent cannot hold; such models are not converted",
          t.name);
    for (float x : decoded(t))
      if (!std::isfinite(x)) fail_input("tensor {} holds {}; only finite weights can be converted", t.name, x);
  }
  const int64_t d = config.head_dim, D = config.hidden_size, h = config.num_attention_heads, g = config.num_key_value_heads;
  for (int l = 0; l < config.num_hidden_layers; ++l)
    for (const auto& [name, rows, cols] : {std::tuple("q", h * d, D), {"k", g * d, D}, {"v", g * d, D}, {"o", D, h * d}}) {
      const Tensor& t = checkpoint.get(fmt::format("layers.{}.attn.{}", l, name)).value;
      if (t.rank != 2 || t.shape[0] != rows || t.shape[1] != cols)
        fail_input("tensor layers.{}.attn.{} is {}; the configuration asks for [{}, {}]", l, name, describe(t), rows, cols);
    }
}

}  // namespace

Config converted_config(const Config& config, const ConvertOptions& o) {
  Config c = config;
  c.family = Family::deepseek_v2;
  c.kv_lora_rank = int(o.layer.kv_lora_rank);
  c.qk_rope_head_dim = int(o.layer.qk_rope_head_dim);
  c.qk_nope_head_dim = c.v_head_dim = config.head_dim;
  c.num_key_value_heads = config.num_attention_heads;
  c.rope_interleaved = true;
  c.attention_bias = o.layer.latent_norm == LatentNorm::constant;
  c.first_k_dense_replace = config.num_hidden_layers;
  c.torch_dtype = o.type == DType::f32 ? "float32" : "bfloat16";
  return c;
}

void check_convertible(const Checkpoint& checkpoint, const Config& config, const ConvertOptions& o) {
  if (config.is_mla()) fail_input("{} has latent attention already", checkpoint.path().string());
  if (config.sliding_window > 0)
    fail_input("the model attends within a sliding window of {}, which DeepSeek-V2 cannot express", config.sliding_window);
  if (config.rope_scaling.type == RopeScaling::Type::yarn)
    fail_input(
        "the model's rotary frequencies are stretched by YaRN, whose softmax scale DeepSeek-V2 reads differently; it is not converted");
  if (o.type != DType::bf16 && o.type != DType::f32) fail_input("a converted model is written as bf16 or f32, not {}", info(o.type).name);
  check_layer_options(shape_of(config), o.layer);
  const std::vector<double> theirs = frequencies_of(config, checkpoint), ours = rope_frequencies(converted_config(config, o));
  const size_t step = theirs.size() / ours.size();
  for (size_t i = 0; i < ours.size(); ++i)
    if (std::fabs(ours[i] - theirs[i * step]) > 1e-5 * theirs[i * step])
      fail_input("rotary frequency {} of the model is {}, and a DeepSeek-V2 checkpoint of rotary width {} would turn by {}", i * step,
                 theirs[i * step], o.layer.qk_rope_head_dim, ours[i]);
  check_tensors(checkpoint, config);
}

Converted convert(const Checkpoint& checkpoint, std::span<const int32_t> tokens, const ConvertOptions& options, Device& device,
                  const Progress& progress) {
  const Config config = read_config(checkpoint);
  check_convertible(checkpoint, config, options);
  if (options.window < 2) fail_input("a calibration window of {} tokens is too short; give at least 2", options.window);
  if (int64_t(tokens.size()) < options.window)
    fail_input("the calibration text has {} tokens, less than a window of {}; give a longer text", tokens.size(), options.window);
  set_math_threads(device.threads().count());
  return Converter(checkpoint, config, tokens, options, device, progress).run();
}

}  // namespace mla
