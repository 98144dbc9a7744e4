// Layer by layer: two streams of the calibration text, the original's and the converted model's, held whole and moved on together.
#include "lowrank/convert.h"

#include "core/check.h"
#include "core/quant.h"
#include "core/random.h"
#include "core/threads.h"
#include "io/checkpoint.h"
#include "lowrank/attention_fit.h"
#include "lowrank/layer_run.h"
#include "lowrank/original.h"
#include "model/rope.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <numbers>
#include <numeric>

namespace mla {
namespace {

// Windows that go through a layer at once: 8, fewer where they are long.
int64_t batch_windows(int64_t window) { return std::clamp<int64_t>(4096 / window, 1, 8); }

std::vector<float> rounded(const std::vector<double>& values, DType type) {
  std::vector<float> out(values.begin(), values.end());
  std::vector<std::byte> encoded(size_t(row_bytes(type, int64_t(out.size()))));
  quantise(type, out.data(), encoded.data(), int64_t(out.size()));
  dequantise(type, encoded.data(), out.data(), int64_t(out.size()));
  return out;
}

Tensor vector_view(std::vector<float>& v) { return view(v.data(), DType::f32, {int64_t(v.size())}); }

// Each of the original's pairs goes to the rotary pair whose frequency is nearest; without folding each rotary pair has one.
std::vector<std::vector<int64_t>> slots_of(const std::vector<double>& theirs, const std::vector<double>& ours, bool fold) {
  const auto apart = [&](int64_t pair, size_t slot) { return std::fabs(std::log(theirs[size_t(pair)] / ours[slot])); };
  std::vector<std::vector<int64_t>> slots(ours.size());
  for (int64_t pair = 0; pair < int64_t(theirs.size()); ++pair) {
    size_t nearest = 0;
    for (size_t i = 1; i < ours.size(); ++i)
      if (apart(pair, i) < apart(pair, nearest)) nearest = i;
    slots[nearest].push_back(pair);
  }
  for (size_t i = 0; i < slots.size() && !fold; ++i)
    if (!slots[i].empty()) slots[i] = {*std::ranges::min_element(slots[i], {}, [&](int64_t pair) { return apart(pair, i); })};
  return slots;
}

std::vector<std::vector<int64_t>> slots_of(const Config& config, const ConvertOptions& o) {
  return slots_of(rope_frequencies(config), rope_frequencies(converted_config(config, o)), o.layer.fold);
}

// LAPACK with all threads, where ours are idle; BLAS inside our threads has one.
class MathThreads {
 public:
  explicit MathThreads(int count) { set_math_threads(count); }
  ~MathThreads() { set_math_threads(1); }
  MathThreads(const MathThreads&) = delete;
  MathThreads& operator=(const MathThreads&) = delete;
};

// The algebra of each layer and the tensors that come of it.
class LayerMaker {
 public:
  LayerMaker(const Checkpoint& checkpoint, const Config& config, const ConvertOptions& o)
      : shape_(shape_of(checkpoint, config)),
        o_(o),
        config_(converted_config(config, o)),
        theirs_(rope_frequencies(config)),
        layer_(o.layer),
        ours_(theirs_) {
    layer_.slots = slots_of(config, o);
    const std::vector<double> slot_frequencies = rope_frequencies(config_);
    for (size_t slot = 0; slot < layer_.slots.size(); ++slot)
      for (int64_t pair : layer_.slots[slot]) ours_[size_t(pair)] -= slot_frequencies[slot];
  }

  const Config& config() const { return config_; }
  const GqaShape& shape() const { return shape_; }

  LayerMoments moments(const LayerCalibration& c) const {
    LayerMoments m{c.inputs, c.mean, {}, {}};
    if (o_.layer.constant != Constant::one) m.constants = c.distances.constants(theirs_), m.folded = c.distances.constants(ours_);
    return m;
  }
  MlaMatrices make(const GqaMatrices& w, const LayerMoments& moments) const { return factor_layer(shape_, w, moments, layer_); }
  void finish(MlaMatrices& m, const LayerMoments& moments) const {
    neutralise_norm(m, layer_.kv_lora_rank, layer_.latent_norm, moments, config_.latent_norm_eps);
  }

  // Under names without the layer's.
  std::map<std::string, std::vector<double>> tensors(const MlaMatrices& m, const LayerMoments& moments) const {
    std::map<std::string, std::vector<double>> out;
    std::vector<double> kv_a_bias = m.kv_a_bias;
    out["attn.kv_a"] = without_bias(m.kv_a, kv_a_bias);
    out["attn.kv_a.bias"] = kv_a_bias;
    out["attn.kv_a_norm"] = m.kv_a_norm;
    out["attn.kv_b"] = m.kv_b.data;
    if (o_.q_lora_rank == 0) {
      out["attn.q"] = m.q.data;
      return out;
    }
    // W_Q ≈ W_UQ W_DQ over the inputs' second moments, with a norm in between that is made harmless as the other is.
    const int64_t spare = o_.layer.latent_norm == LatentNorm::scale ? 0 : 1;
    const LowRank f = factor(Method::svd, m.q, o_.q_lora_rank - spare, o_.layer.activations ? &moments.inputs : nullptr);
    Matrix down(o_.q_lora_rank, m.q.cols), up(m.q.rows, o_.q_lora_rank);
    std::copy(f.down.data.begin(), f.down.data.end(), down.data.begin());
    NeutralNorm norm = neutral_norm(o_.layer.latent_norm, down, moments, config_.latent_norm_eps);
    for (int64_t i = 0; i < up.rows; ++i)
      for (int64_t j = 0; j < f.up.cols; ++j) up(i, j) = f.up(i, j) * norm.factor;
    out["attn.q_a"] = without_bias(down, norm.bias);
    out["attn.q_a.bias"] = norm.bias, out["attn.q_a_norm"] = norm.weight, out["attn.q_b"] = up.data;
    return out;
  }

 private:
  // The columns that meet the stream; what is behind them is added to `bias`.
  std::vector<double> without_bias(const Matrix& w, std::vector<double>& bias) const {
    if (w.cols == config_.hidden_size) return w.data;
    std::vector<double> out;
    for (int64_t i = 0; i < w.rows; ++i) {
      out.insert(out.end(), w.row(i), w.row(i) + w.cols - 1);
      bias[size_t(i)] += w(i, w.cols - 1);
    }
    return out;
  }

  GqaShape shape_;
  const ConvertOptions& o_;
  Config config_;
  std::vector<double> theirs_;
  LayerOptions layer_;
  std::vector<double> ours_;  // of each of the original's pairs: its frequency less its slot's
};

// What a conversion has to know of a layer, summed window by window.
class CalibrationSums {
 public:
  CalibrationSums(const Config& config, const GqaShape& shape, const ConvertOptions& o, Device& device)
      : config_(config),
        shape_(shape),
        o_(o),
        device_(device),
        sums_(shape.hidden, 0, device.threads()),
        mean_(size_t(shape.hidden)),
        distances_(shape, o.window, o.layer.constant) {}

  // x [n, D]: the stream before the layer.
  void add(const Original& original, LayerRun& run, const Tensor& x) {
    original.attention_inputs(x, inputs_);
    const int64_t n = x.shape[0], D = shape_.hidden;
    sums_.add(inputs_.data(), n);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < D; ++j) mean_[size_t(j)] += double(inputs_[size_t(i * D + j)]);
    rows_ += n;
    if (o_.layer.constant != Constant::one && windows_ < o_.constant_windows) add_distances(original, run, n);
  }
  LayerCalibration result() && {
    LayerCalibration out{sums_.gram(), std::move(mean_), std::move(distances_)};
    for (double& v : out.inputs.data) v /= double(rows_);
    for (double& v : out.mean) v /= double(rows_);
    return out;
  }

 private:
  void add_distances(const Original& original, LayerRun& run, int64_t rows) {
    const int64_t T = o_.window, n = std::min(rows / T, o_.constant_windows - windows_) * T, h = shape_.heads, g = shape_.groups;
    std::vector<float> queries(size_t(n * h * shape_.head_dim)), keys(size_t(n * g * shape_.head_dim));
    const Tensor q = view(queries.data(), DType::f32, {n, h, shape_.head_dim}), k = view(keys.data(), DType::f32, {n, g, shape_.head_dim});
    const Tensor inputs = view(inputs_.data(), DType::f32, {n, shape_.hidden});
    run.project(original.gqa(), slice(inputs, 1, 0, config_.hidden_size), q, k);
    for (int64_t first = 0; first < n; first += T, ++windows_)
      distances_.add(slice(q, 0, first, T), slice(k, 0, first, T), float(config_.softmax_scale()), device_.threads());
  }

  const Config& config_;
  const GqaShape& shape_;
  const ConvertOptions& o_;
  Device& device_;
  Sums sums_;
  std::vector<double> mean_;
  DistanceSums distances_;
  std::vector<float> inputs_;
  int64_t rows_ = 0, windows_ = 0;
};

void drop_biases(Converted& c) {
  if (!c.config.attention_bias) std::erase_if(c.tensors, [](const auto& t) { return t.first.ends_with(".bias"); });
}

class Converter {
 public:
  Converter(const Checkpoint& checkpoint, const Config& config, std::span<const int32_t> tokens, const ConvertOptions& o, Device& device,
            const Progress& progress)
      : config_(config),
        o_(o),
        device_(device),
        progress_(progress),
        maker_(checkpoint, config, o),
        shape_(maker_.shape()),
        windows_(int64_t(tokens.size()) / o.window),
        batch_(std::min(batch_windows(o.window), windows_)),
        original_(checkpoint, config, device) {
    out_.config = maker_.config();
    gqa_run_ = std::make_unique<LayerRun>(config_, rope_frequencies(config), device, o.window, batch_);
    mla_run_ = std::make_unique<LayerRun>(out_.config, rope_frequencies(out_.config), device, o.window, batch_);
    theirs_ = original_.embed(tokens.first(size_t(windows_ * o.window)));
    ours_ = theirs_;
    const size_t rows = size_t(windows_ * o.window);
    attended_.resize(rows * size_t(shape_.heads * shape_.head_dim));
    if (o.refit_down) hidden_.resize(rows * size_t(config.intermediate_size));
  }

  Converted run() {
    set_math_threads(1);
    for (int l = 0; l < config_.num_hidden_layers; ++l) {
      layer_ = l;
      phase_ = 0;
      original_.load(l);
      if (!o_.sequential) ours_ = theirs_;
      const GqaMatrices weights = original_.matrices();
      const LayerMoments moments = maker_.moments(calibrated());
      MlaMatrices m = [&] {
        const MathThreads all(device_.threads().count());
        return maker_.make(weights, moments);
      }();
      move_theirs();
      if (o_.fit_passes > 0) fit(m);
      maker_.finish(m, moments);
      for (const auto& [name, values] : maker_.tensors(m, moments)) set(name.c_str(), values);
      set("attn.o.bias", output_bias());
      set("attn.o", attention(m.o).data);
      feed_forward();
    }
    drop_biases(out_);
    return std::move(out_);
  }

 private:
  struct Batch {
    int64_t first, rows;  // of the streams
    Tensor stream(std::vector<float>& s, int64_t cols) const { return view(s.data() + first * cols, DType::f32, {rows, cols}); }
  };

  // A layer is seven passes over the text, the fit counted for one.
  double passes() const { return o_.fit_passes > 0 ? 7 : 6; }
  void tick(double within) const {
    if (progress_) progress_((layer_ + (phase_ + within) / passes()) / config_.num_hidden_layers);
  }

  // Calls what(batch) for the text in order.
  template <class What>
  void each_batch(const What& what) {
    const int64_t batches = (windows_ + batch_ - 1) / batch_;
    for (int64_t b = 0; b < batches; ++b) {
      tick(double(b) / double(batches));
      const int64_t first = b * batch_, n = std::min(batch_, windows_ - first);
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

  std::vector<double> output_bias() const {
    std::vector<double> out(size_t(config_.hidden_size), 0);
    if (const Tensor& bias = original_.gqa().o_bias; bias.data) std::copy_n(bias.f32(), bias.count(), out.begin());
    return out;
  }

  // Of the inputs that the converted layer will meet, under the original's attention to them.
  LayerCalibration calibrated() {
    CalibrationSums sums(config_, shape_, o_, device_);
    each_batch([&](const Batch& b) { sums.add(original_, *gqa_run_, b.stream(ours_, config_.hidden_size)); });
    return std::move(sums).result();
  }

  // The original's stream behind its attention.
  void move_theirs() {
    each_batch([&](const Batch& b) { gqa_run_->attend(original_.gqa(), b.stream(theirs_, config_.hidden_size)); });
  }

  // Moves the converted attention to what the original's stream has behind it, as a share of that stream, token by token. Steps are as long
  // for a small error as for a large one: a layer that a look at some windows finds no nearer keeps what it had.
  void fit(MlaMatrices& m) {
    const Config& c = out_.config;
    const double gone = 1 - double(c.kv_layout().row()) / double(config_.kv_layout().row());
    const int64_t steps = o_.fit_passes * windows_, looks = std::min<int64_t>(windows_, 4);
    if (gone <= 0) return;
    AttentionFit fit(
        {shape_, o_.window, c.kv_lora_rank, c.qk_rope_head_dim, config_.hidden_size, float(c.softmax_scale()), rope_frequencies(c)}, m,
        device_.threads());
    FitTarget target;
    const auto look = [&] {
      double sum = 0;
      for (int64_t i = 0; i < looks; ++i) sum += fit.error(fit_target(i * windows_ / looks, target));
      return sum;
    };
    const double before = look();
    std::vector<int64_t> order(static_cast<size_t>(windows_));
    for (int64_t step = 0; step < steps; ++step) {
      tick(double(step) / double(steps));
      if (step % windows_ == 0) shuffle(order, uint64_t(step / windows_));
      fit.differentiate(fit_target(order[size_t(step % windows_)], target));
      const double warm = std::min(1.0, double(step + 1) / 5), fade = 0.5 + 0.5 * std::cos(std::numbers::pi * double(step) / double(steps));
      fit.move(o_.fit_rate * gone * warm * fade);
    }
    ++phase_;
    if (look() < before) fit.put(m);
  }

  struct FitTarget {
    std::vector<float> inputs, lacks, weight;
  };
  FitWindow fit_target(int64_t window, FitTarget& out) {
    const int64_t T = o_.window, D = config_.hidden_size;
    const Batch batch{window * T, T};
    const float *ours = batch.stream(ours_, D).f32(), *theirs = batch.stream(theirs_, D).f32();
    const Tensor& bias = original_.gqa().o_bias;
    original_.attention_inputs(batch.stream(ours_, D), out.inputs);
    out.lacks.resize(size_t(T * D)), out.weight.resize(size_t(T));
    for (int64_t t = 0; t < T; ++t) {
      double energy = 1e-30;
      for (int64_t i = t * D; i < (t + 1) * D; ++i) {
        out.lacks[size_t(i)] = theirs[i] - ours[i] - (bias.data ? bias.f32()[i % D] : 0);
        energy += double(theirs[i]) * double(theirs[i]);
      }
      out.weight[size_t(t)] = float(1 / energy);
    }
    return {out.inputs.data(), out.lacks.data(), out.weight.data()};
  }

  void shuffle(std::vector<int64_t>& order, uint64_t pass) const {
    std::iota(order.begin(), order.end(), 0);
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_bits(o_.layer.seed + pass, i) % i]);
  }

  MlaWeights mla_weights() {
    const Config& c = out_.config;
    const int64_t D = c.hidden_size, n_h = c.num_attention_heads, d_h = c.qk_nope_head_dim, row = c.kv_lora_rank + c.qk_rope_head_dim;
    MlaWeights w;
    w.attn_norm = original_.gqa().attn_norm;
    if (c.q_lora_rank > 0) {
      w.q_a = pack("attn.q_a", c.q_lora_rank, D), w.q_b = pack("attn.q_b", n_h * c.query_dim(), c.q_lora_rank);
      w.q_a_bias = vector_view(out_.tensors.at(named("attn.q_a.bias")));
      w.q_a_norm = vector_view(out_.tensors.at(named("attn.q_a_norm")));
    } else {
      w.q = pack("attn.q", n_h * c.query_dim(), D);
    }
    w.kv_a = pack("attn.kv_a", row, D);
    w.kv_a_bias = vector_view(out_.tensors.at(named("attn.kv_a.bias")));
    w.kv_a_norm = vector_view(out_.tensors.at(named("attn.kv_a_norm")));
    w.kv_b = pack("attn.kv_b", n_h * (d_h + c.v_head_dim), c.kv_lora_rank);
    return w;
  }

  // Moves our stream behind the attention and returns W_O, refitted to what the stream should be there.
  Matrix attention(const Matrix& o) {
    const int64_t D = config_.hidden_size, cols = shape_.heads * shape_.head_dim;
    const MlaWeights w = mla_weights();
    Sums sums(cols, D, device_.threads());
    std::vector<float> wanted;
    each_batch([&](const Batch& b) {
      const Tensor ours = b.stream(ours_, D), theirs = b.stream(theirs_, D);
      float* attended = attended_.data() + b.first * cols;
      mla_run_->attend_heads(w, ours, view(attended, DType::f32, {b.rows, shape_.heads, shape_.head_dim}));
      if (o_.refit == Refit::none) return;
      const Tensor& from = o_.refit == Refit::drift ? theirs : ours;
      wanted.assign(from.f32(), from.f32() + from.count());
      const Tensor target = view(wanted.data(), DType::f32, {b.rows, D});
      if (o_.refit == Refit::layer) gqa_run_->attend(original_.gqa(), target);
      add_targets(sums, attended, target, ours, original_.gqa().o_bias);
    });
    Matrix fitted = o_.refit == Refit::none ? o : refitted(o, sums, o_.output_ridge);
    std::vector<float> weights = rounded(fitted.data, o_.type);
    const Weight packed = pack(weights, D, cols);
    each_batch(
        [&](const Batch& b) { device_.linear(b.stream(attended_, cols), packed, original_.gqa().o_bias, b.stream(ours_, D), true); });
    return fitted;
  }

  // Moves both streams behind the feed-forward network, whose W_down is refitted if that is asked for.
  void feed_forward() {
    const int64_t D = config_.hidden_size, width = config_.intermediate_size;
    if (!o_.refit_down) {
      each_batch([&](const Batch& b) {
        gqa_run_->feed_forward(original_.layer(), b.stream(theirs_, D));
        if (o_.sequential) gqa_run_->feed_forward(original_.layer(), b.stream(ours_, D));
      });
      return;
    }
    Sums sums(width, D, device_.threads());
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
      add_targets(sums, hidden.f32(), view(target.data(), DType::f32, {b.rows, D}), ours, {});
    });
    const Matrix fitted = refitted(original_.matrix("ffn.down"), sums, o_.down_ridge);
    set("ffn.down", fitted.data);
    const Weight packed = pack("ffn.down", D, width);
    each_batch([&](const Batch& b) { device_.linear(b.stream(hidden_, width), packed, {}, b.stream(ours_, D), true); });
  }

  // What W x should be: the target stream less ours and the bias, which is left in `target`.
  static void add_targets(Sums& sums, const float* x, const Tensor& target, const Tensor& ours, const Tensor& bias) {
    const int64_t D = target.shape[1];
    for (int64_t i = 0; i < target.count(); ++i) target.f32()[i] -= ours.f32()[i];
    for (int64_t i = 0; bias.data && i < target.count(); ++i) target.f32()[i] -= bias.f32()[i % D];
    sums.add(x, target.shape[0]);
    sums.add_cross(x, target.f32(), target.shape[0]);
  }

  // W + argmin_Δ Σ ‖y − (W + Δ) x‖² + λ ‖Δ‖²; sums hold Σ x xᵀ and Σ x yᵀ.
  Matrix refitted(const Matrix& w, const Sums& sums, double ridge) const {
    const MathThreads all(device_.threads().count());
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
  LayerMaker maker_;
  const GqaShape& shape_;
  int64_t windows_, batch_;  // of the text, and of those that go through a layer at once
  Original original_;
  Converted out_;
  std::unique_ptr<LayerRun> gqa_run_, mla_run_;
  std::vector<float> theirs_, ours_;      // the streams [N, D]
  std::vector<float> attended_, hidden_;  // ours: heads' outputs [N, h d], and the feed-forward network's inner activations
  int layer_ = 0;
  double phase_ = 0;
};

}  // namespace

namespace {

void check_text(std::span<const int32_t> tokens, const ConvertOptions& o) {
  if (o.window < 2) fail_input("a calibration window of {} tokens is too short; give at least 2", o.window);
  if (int64_t(tokens.size()) < o.window)
    fail_input("the calibration text has {} tokens, less than a window of {}; give a longer text", tokens.size(), o.window);
}

}  // namespace

Config converted_config(const Config& config, const ConvertOptions& o) {
  Config c = config;
  c.family = Family::deepseek_v2;
  c.kv_lora_rank = int(o.layer.kv_lora_rank);
  c.q_lora_rank = int(o.q_lora_rank);
  c.qk_rope_head_dim = int(o.layer.qk_rope_head_dim);
  if (o.rope_theta > 0) c.rope_theta = o.rope_theta;
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
  const GqaShape shape = shape_of(checkpoint, config);
  LayerOptions layer = o.layer;
  layer.slots.resize(1);  // are chosen below, once the width is known to fit
  check_layer_options(shape, layer);
  if (o.rope_theta < 0 || !std::isfinite(o.rope_theta)) fail_input("the rotary base is {}; it must be above 0", o.rope_theta);
  for (const auto& slot : slots_of(config, o))
    if (slot.empty())
      fail_input(
          "a rotary width of {} over a base of {} has pairs that none of the model's is nearest to; take a narrower one or a larger base",
          o.layer.qk_rope_head_dim, converted_config(config, o).rope_theta);
  if (has_biases(checkpoint) && (o.q_lora_rank == 0 || o.layer.latent_norm != LatentNorm::constant))
    fail_input("the model has biases, which need a query latent and the latents' norms held by a constant");
  const int64_t queries = std::min(shape.heads * (shape.head_dim + o.layer.qk_rope_head_dim), shape.hidden);
  const int64_t spare = o.layer.latent_norm == LatentNorm::scale ? 0 : 1;
  if (o.q_lora_rank != 0 && (o.q_lora_rank < 1 + spare || o.q_lora_rank > queries + spare))
    fail_input("a query latent of {} elements does not fit; give {} to {}", o.q_lora_rank, 1 + spare, queries + spare);
  if (checkpoint.find("layers.0.attn.o.bias") && o.layer.latent_norm != LatentNorm::constant)
    fail_input("the model has a bias behind W_O, which needs the latent's norm held by a constant");
}

std::vector<LayerCalibration> calibrate(const Checkpoint& checkpoint, std::span<const int32_t> tokens, const ConvertOptions& o,
                                        Device& device, const Progress& progress) {
  const Config config = original_config(checkpoint);
  check_text(tokens, o);
  set_math_threads(1);
  const GqaShape shape = shape_of(checkpoint, config);
  const int64_t D = config.hidden_size, windows = int64_t(tokens.size()) / o.window;
  Original original(checkpoint, config, device);
  const int64_t batch = std::min(batch_windows(o.window), windows);
  LayerRun run(config, rope_frequencies(config), device, o.window, batch);
  std::vector<float> stream = original.embed(tokens.first(size_t(windows * o.window)));
  std::vector<LayerCalibration> out;
  for (int l = 0; l < config.num_hidden_layers; ++l) {
    original.load(l);
    CalibrationSums sums(config, shape, o, device);
    for (int64_t first = 0; first < windows; first += batch) {
      if (progress) progress((l + double(first) / double(windows)) / config.num_hidden_layers);
      const int64_t rows = std::min(batch, windows - first) * o.window;
      const Tensor x = view(stream.data() + first * o.window * D, DType::f32, {rows, D});
      sums.add(original, run, x);
      run.attend(original.gqa(), x);
      run.feed_forward(original.layer(), x);
    }
    out.push_back(std::move(sums).result());
  }
  return out;
}

Converted convert(const Checkpoint& checkpoint, std::span<const LayerCalibration> calibration, const ConvertOptions& options,
                  Device& device, const Progress& progress) {
  const Config config = original_config(checkpoint);
  check_convertible(checkpoint, config, options);
  CHECK(int(calibration.size()) == config.num_hidden_layers, "{} layers calibrated of {}", calibration.size(), config.num_hidden_layers);
  const LayerMaker maker(checkpoint, config, options);
  Original original(checkpoint, config, device);
  Converted out{maker.config(), {}};
  const MathThreads all(device.threads().count());
  for (int l = 0; l < config.num_hidden_layers; ++l) {
    if (progress) progress(double(l) / config.num_hidden_layers);
    original.load(l);
    const LayerMoments moments = maker.moments(calibration[size_t(l)]);
    MlaMatrices m = maker.make(original.matrices(), moments);
    maker.finish(m, moments);
    for (const auto& [name, values] : maker.tensors(m, moments))
      out.tensors[fmt::format("layers.{}.{}", l, name)] = rounded(values, options.type);
    std::vector<double> bias(size_t(config.hidden_size), 0);
    if (const Tensor& stored = original.gqa().o_bias; stored.data) std::copy_n(stored.f32(), stored.count(), bias.begin());
    out.tensors[fmt::format("layers.{}.attn.o.bias", l)] = rounded(bias, options.type);
  }
  drop_biases(out);
  return out;
}

Converted convert(const Checkpoint& checkpoint, std::span<const int32_t> tokens, const ConvertOptions& options, Device& device,
                  const Progress& progress) {
  const Config config = original_config(checkpoint);
  check_convertible(checkpoint, config, options);
  check_tensors(checkpoint, config);
  check_text(tokens, options);
  if (!options.sequential && options.refit == Refit::none && !options.refit_down && options.fit_passes == 0)
    return convert(checkpoint, calibrate(checkpoint, tokens, options, device, progress), options, device);
  return Converter(checkpoint, config, tokens, options, device, progress).run();
}

}  // namespace mla
