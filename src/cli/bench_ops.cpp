// Times the operations of a forward pass one by one, at the shapes of the model that was loaded.
#include "cli/bench.h"
#include "cli/filled.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "core/check.h"
#include "core/random.h"

#include <algorithm>
#include <cmath>

namespace mla {
namespace {

class OpBench {
 public:
  OpBench(Model& model, DType kv_type, const std::function<void(double)>& progress)
      : model_(model), config_(model.config()), device_(model.device()), kv_type_(kv_type), progress_(progress), arena_(device_.memory()) {}

  std::vector<OpTime> run(int64_t prompt, const std::vector<int64_t>& depths) {
    const Layer& layer = model_.weights().layers.back();
    const std::vector<int64_t> sizes{1, 16, prompt};
    for (size_t i = 0; i < sizes.size(); ++i) {
      progress_(double(i) / double(sizes.size() + 1));
      linears(layer, sizes[i]);
      feed_forward(layer, sizes[i]);
      small(sizes[i]);
    }
    progress_(double(sizes.size()) / double(sizes.size() + 1));
    for (int64_t depth : depths) attention(depth);
    return std::move(times_);
  }

 private:
  Tensor random(std::initializer_list<int64_t> shape) {
    Tensor t = arena_.tensor(DType::f32, shape);
    std::vector<float> values(size_t(t.count()));
    for (size_t i = 0; i < values.size(); ++i) values[i] = float(random_normal(3, i % 65521));
    device_.memory().upload(values.data(), t.data, values.size() * sizeof(float));
    return t;
  }

  // Median over samples of at least a few milliseconds each.
  template <class Op>
  void time(std::string name, int64_t tokens, double bytes, double ops, Op&& op) {
    throw_if_interrupted();
    op();
    device_.memory().wait();
    std::vector<double> us;
    for (int sample = 0; sample < 5; ++sample) {
      int64_t calls = 0;
      const double begin = now();
      do op(), ++calls;
      while (now() - begin < 0.01);
      device_.memory().wait();
      us.push_back((now() - begin) * 1e6 / double(calls));
    }
    times_.push_back({std::move(name), tokens, median(us), bytes, ops, device_.probe(0.05)});
  }

  void linear(const char* what, const Weight& w, int64_t n) {
    if (!w) return;
    ArenaScope scope(arena_);
    const Tensor x = random({n, w.cols}), y = random({n, w.rows});
    time(fmt::format("linear {} {}→{} {}", what, w.cols, w.rows, info(w.dtype).name), n,
         double(w.bytes()) + 4.0 * double(n) * double(w.cols + w.rows), 2.0 * double(n) * double(w.rows) * double(w.cols),
         [&] { device_.linear(x, w, {}, y); });
  }

  void linear_heads(const char* what, const Weight& w, int64_t n) {
    ArenaScope scope(arena_);
    const Tensor x = random({n, w.count, w.cols}), y = random({n, w.count, w.rows});
    time(fmt::format("heads {} {}×{}→{} {}", what, w.count, w.cols, w.rows, info(w.dtype).name), n,
         double(w.bytes()) + 4.0 * double(n) * double(w.count * (w.cols + w.rows)),
         2.0 * double(n) * double(w.count) * double(w.rows) * double(w.cols), [&] { device_.linear_heads(x, w, y); });
  }

  void linears(const Layer& layer, int64_t n) {
    if (const auto* w = std::get_if<MlaWeights>(&layer.attention)) {
      linear("q", w->q, n);
      linear("q_a", w->q_a, n);
      linear("q_b", w->q_b, n);
      linear("kv_a", w->kv_a, n);
      linear_heads("k_b", w->k_b_absorbed, n);
      linear_heads("v_b", w->v_b, n);
      if (n > 1) linear("kv_b", w->kv_b, n);
      linear("o", w->o, n);
    } else {
      const auto& g = std::get<GqaWeights>(layer.attention);
      linear("q", g.q, n);
      linear("k", g.k, n);
      linear("o", g.o, n);
    }
    if (n <= 16) linear("head", model_.weights().lm_head, n);
  }

  void ffn(const char* what, const FfnWeights& w, int64_t n, const Routing* routing, double read, double chosen) {
    ArenaScope scope(arena_);
    const Tensor x = random({n, config_.hidden_size}), y = random({n, config_.hidden_size});
    const double bytes = double(w.gate.bytes() + w.up.bytes() + w.down.bytes()) * read + 8.0 * double(n) * double(config_.hidden_size);
    time(fmt::format("ffn {} {}→{} {}", what, w.gate.cols, w.gate.rows, info(w.gate.dtype).name), n, bytes,
         6.0 * double(n) * chosen * double(w.gate.rows) * double(w.gate.cols), [&] { device_.ffn(x, w, routing, y); });
  }

  void feed_forward(const Layer& layer, int64_t n) {
    if (const auto* dense = std::get_if<DenseFfn>(&layer.ffn)) return ffn("dense", dense->ffn, n, nullptr, 1, 1);
    const auto& moe = std::get<MoeFfn>(layer.ffn);
    if (moe.shared.gate) ffn("shared", moe.shared, n, nullptr, 1, 1);
    ArenaScope scope(arena_);
    const int64_t k = config_.num_experts_per_tok;
    const Tensor scores = random({n, config_.n_routed_experts});
    const Routing routing{arena_.tensor(DType::i32, {n, k}), arena_.tensor(DType::f32, {n, k})};
    time(fmt::format("route {} of {}", k, config_.n_routed_experts), n, 4.0 * double(scores.count()), 0,
         [&] { device_.route(scores, config_.router(), routing); });
    std::vector<int32_t> chosen(size_t(n * k));
    device_.memory().download(routing.expert.data, chosen.data(), chosen.size() * sizeof(int32_t));
    std::sort(chosen.begin(), chosen.end());
    const auto distinct = std::unique(chosen.begin(), chosen.end()) - chosen.begin();
    ffn("experts", moe.experts, n, &routing, double(distinct) / config_.n_routed_experts, double(k));
  }

  void small(int64_t n) {
    ArenaScope scope(arena_);
    const int64_t D = config_.hidden_size, heads = config_.num_attention_heads, d = config_.rope_dim();
    const Tensor x = random({n, D}), y = random({n, D}), weight = random({D});
    time(fmt::format("rms_norm {}", D), n, 8.0 * double(n * D), 4.0 * double(n * D), [&] { device_.rms_norm(x, weight, 1e-6F, y); });
    const Tensor q = random({n, heads, d}), table = random({n, d / 2, 2});
    time(fmt::format("rope {}×{}", heads, d), n, 8.0 * double(q.count()), 3.0 * double(q.count()),
         [&] { device_.rope(q, table, config_.rope_interleaved); });
  }

  // Decode over one layer's cache: a query for each head.
  void attention(int64_t depth) {
    if (depth == 0) return;
    const KvFormat format{config_.kv_layout(), kv_type_};
    LatentCache cache(1, format, depth, device_.memory());
    const int sequence = cache.open();
    CHECK(fill_random(cache, sequence, depth, device_), "no room for {} tokens", depth);
    ArenaScope scope(arena_);
    const int64_t n_h = config_.num_attention_heads;
    const Tensor q = random({1, n_h, format.layout.d_k}), o = random({1, n_h, format.layout.d_v}), lse = random({1, n_h});
    const Span span{0, 1, int32_t(depth - 1), 0, int32_t(depth), cache.pages(sequence).data()};
    time(fmt::format("attend {} rows {}", depth, info(kv_type_).name), 1, double(depth) * double(format.row_bytes()),
         2.0 * double(n_h) * double(depth) * double(format.layout.d_k + format.layout.d_v),
         [&] { device_.attend(q, cache.layer(0), Spans(&span, 1), {}, 0.1F, o, lse); });
  }

  Model& model_;
  const Config& config_;
  Device& device_;
  DType kv_type_;
  const std::function<void(double)>& progress_;
  Arena arena_;
  std::vector<OpTime> times_;
};

}  // namespace

std::vector<OpTime> time_ops(Model& model, DType kv_type, int64_t prompt, const std::vector<int64_t>& depths,
                             const std::function<void(double fraction)>& progress) {
  return OpBench(model, kv_type, progress).run(prompt, depths);
}

}  // namespace mla
