// The forward pass: a ragged batch of prefill chunks and decodes through all layers.
#include "model/model.h"

#include "core/check.h"
#include "core/random.h"
#include "io/checkpoint.h"
#include "model/rope.h"
#include "model/step.h"

#include <atomic>
#include <cmath>
#include <limits>

namespace mla {
namespace {

// Tokens enter the cache before the pass; if the pass fails they leave again, so that nothing half-written stays.
class Growth {
 public:
  explicit Growth(LatentCache& cache) : cache_(cache) {}
  ~Growth() {
    for (const auto& [sequence, length] : before_) cache_.truncate(sequence, length);
  }
  Growth(const Growth&) = delete;
  Growth& operator=(const Growth&) = delete;
  bool grow(int sequence, int64_t n) {
    const int64_t length = cache_.length(sequence);
    if (!cache_.grow(sequence, n)) return false;
    before_.emplace_back(sequence, length);
    return true;
  }
  void keep() { before_.clear(); }

 private:
  LatentCache& cache_;
  std::vector<std::pair<int, int64_t>> before_;
};

void check_tokens(const Chunk& chunk, int64_t vocabulary, int64_t chosen) {
  if (chunk.tokens.empty()) fail_input("a sequence has no tokens to run; give at least one");
  for (int32_t id : chunk.tokens)
    if (id < -chosen || id >= vocabulary) fail_input("token id {} is outside the vocabulary of {}", id, vocabulary);
}

int64_t wanted_rows(std::span<const Chunk> chunks) {
  int64_t rows = 0;
  for (const Chunk& chunk : chunks)
    rows += chunk.logits == Chunk::Logits::all ? int64_t(chunk.tokens.size()) : chunk.logits == Chunk::Logits::last;
  return rows;
}

// The rows of x that the chunks want logits of, in order: [rows, D]. Stretches of neighbours are copied at once; x serves if it is all.
Tensor gather_wanted(Step& s, std::span<const Chunk> chunks, Tensor x) {
  const int64_t rows = wanted_rows(chunks);
  if (rows == x.shape[0]) return x;
  Tensor wanted = s.arena.tensor(DType::f32, {rows, x.shape[1]});
  int64_t to = 0, from = 0, n = 0;
  auto copy = [&] {
    if (n > 0) s.device.copy(slice(x, 0, from, n), slice(wanted, 0, to, n));
    to += n;
  };
  for (size_t i = 0; i < chunks.size(); ++i) {
    if (chunks[i].logits == Chunk::Logits::none) continue;
    const int64_t more = chunks[i].logits == Chunk::Logits::all ? s.spans[i].count : 1, first = s.spans[i].start + s.spans[i].count - more;
    if (n > 0 && first == from + n) {
      n += more;
    } else {
      copy();
      from = first, n = more;
    }
  }
  copy();
  return wanted;
}

// Decode steps of as many sequences on the same memory repeat one another, but for the expanded form, whose tiles follow the context.
// 0 for any other step.
uint64_t repeats(const Step& s, uint64_t model, std::span<const Chunk> chunks, const Tensor& x) {
  for (size_t i = 0; i < chunks.size(); ++i) {
    if (chunks[i].tokens.size() != 1 || chunks[i].logits != Chunk::Logits::last) return 0;
    if (s.config.is_mla() && !absorbs(s, s.spans[i])) return 0;
  }
  uint64_t key = model;
  for (const void* at : {x.data, static_cast<void*>(s.cache.layer(0).base), static_cast<void*>(s.cache.layer(s.cache.layers() - 1).base)})
    key = random_bits(key, reinterpret_cast<uintptr_t>(at));
  return random_bits(key, chunks.size() * 64 + uint64_t(s.cache.format().type)) | 1;
}

// Models are told apart even where one takes another's place in memory.
uint64_t next_number() {
  static std::atomic<uint64_t> count = 0;
  return ++count;
}

}  // namespace

void feed_forward(Step& s, const Layer& layer, Tensor x) {
  const Config& c = s.config;
  ArenaScope scope(s.arena);
  const int64_t n = x.shape[0];
  Tensor h = s.arena.tensor(DType::f32, {n, c.hidden_size});
  if (const auto* dense = std::get_if<DenseFfn>(&layer.ffn)) {
    s.device.rms_norm(x, dense->norm, float(c.rms_norm_eps), h);
    s.device.ffn(h, dense->ffn, nullptr, x);
    return;
  }
  // DeepSeekMoE (eq. 20-22): h' = u + Σ shared(u) + Σ g_i expert_i(u)
  const auto& moe = std::get<MoeFfn>(layer.ffn);
  Tensor scores = s.arena.tensor(DType::f32, {n, c.n_routed_experts});
  const Routing routing{s.arena.tensor(DType::i32, {n, c.num_experts_per_tok}), s.arena.tensor(DType::f32, {n, c.num_experts_per_tok})};
  s.device.gate(x, moe.norm, float(c.rms_norm_eps), h, moe.router, c.router(), scores, routing, moe.shared);
  s.note("ffn.scores", scores);
  s.note("ffn.gate_weight", routing.weight);
  s.device.ffn(h, moe.experts, &routing, x);
}

Model::Model(const Checkpoint& checkpoint, Device& device, const Progress& progress)
    : config_(read_config(checkpoint)),
      device_(&device),
      weights_(load_weights(checkpoint, config_, device, progress)),
      number_(next_number()),
      arena_(device.memory()) {
  std::vector<float> factors;
  if (const StoredTensor* stored = checkpoint.find("rope_freqs")) {
    if (stored->value.dtype != DType::f32) fail_input("rope_freqs is {}; it must be f32", info(stored->value.dtype).name);
    factors.assign(stored->value.f32(), stored->value.f32() + stored->value.count());
  }
  rope_frequencies_ = rope_frequencies(config_, factors);
}

bool Model::choose(const Tensor& logits, double temperature, std::span<const double> at) {
  const bool chooses = device_->choose(logits, temperature, at);
  chosen_ = chooses ? logits.shape[0] : 0;
  return chooses;
}

LatentCache Model::make_cache(int64_t tokens, DType type) const {
  return LatentCache(config_.num_hidden_layers, {config_.kv_layout(), type}, tokens, device_->memory());
}

Tensor Model::forward(std::span<const Chunk> chunks, LatentCache& cache, const Progress& progress) {
  CHECK(cache.layers() == config_.num_hidden_layers, "a cache of {} layers for a model of {}", cache.layers(), config_.num_hidden_layers);
  for (const Chunk& chunk : chunks) check_tokens(chunk, config_.vocab_size, chosen_);
  arena_.reset();
  Growth growth(cache);
  Step step{config_, *device_, arena_, cache, form, dump, {}, {}, {}, {}};
  std::vector<int32_t> ids, positions;
  for (const Chunk& chunk : chunks) {
    const int64_t length = cache.length(chunk.sequence), count = int64_t(chunk.tokens.size());
    if (length + count > std::numeric_limits<int32_t>::max() || !growth.grow(chunk.sequence, count)) return {};
    step.spans.push_back({int32_t(ids.size()), int32_t(count), int32_t(length), 0, int32_t(length + count), nullptr});
    ids.insert(ids.end(), chunk.tokens.begin(), chunk.tokens.end());
    for (int64_t i = 0; i < count; ++i) {
      positions.push_back(int32_t(length + i));
      step.slots.push_back(cache.slot(chunk.sequence, length + i));
    }
  }
  for (size_t i = 0; i < chunks.size(); ++i) step.spans[i].pages = cache.pages(chunks[i].sequence).data();
  const auto n = int64_t(ids.size());
  std::vector<float> cos_sin(size_t(n) * rope_frequencies_.size() * 2);
  rope_table(rope_frequencies_, rope_magnitude(config_), positions, cos_sin.data());
  step.cos_sin = arena_.tensor(DType::f32, {n, int64_t(rope_frequencies_.size()), 2});

  Tensor x = arena_.tensor(DType::f32, {n, config_.hidden_size});  // the residual stream
  Tensor logits = arena_.tensor(DType::f32, {wanted_rows(chunks), config_.vocab_size});
  const uint64_t key = dump ? 0 : repeats(step, number_, chunks, x);
  if (progress) progress(0);
  device_->step({ids, step.slots, step.spans, cos_sin, step.cos_sin}, key, [&] {
    device_->embed(ids, weights_.embed, x);
    step.note("embed", x);
    for (size_t l = 0; l < weights_.layers.size(); ++l) {
      const Layer& layer = weights_.layers[l];
      if (progress && l > 0) progress(double(l) / double(weights_.layers.size()));
      step.prefix = fmt::format("layers.{}.", l);
      if (const auto* w = std::get_if<MlaWeights>(&layer.attention))
        attend_mla(step, int(l), *w, x);
      else
        attend_gqa(step, int(l), std::get<GqaWeights>(layer.attention), x);
      step.note("attn.stream", x);
      feed_forward(step, layer, x);
      step.note("stream", x);
    }
    if (logits.shape[0] == 0) return;
    const Tensor h = gather_wanted(step, chunks, x);
    device_->rms_norm(h, weights_.norm, float(config_.rms_norm_eps), h);
    device_->linear(h, weights_.lm_head, {}, logits);
  });
  growth.keep();
  return logits;
}

double Model::step_weight_bytes(int64_t tokens) const {
  auto linear = [](const Weight& w) { return double(w.bytes()); };
  double total = linear(weights_.lm_head);
  for (const Layer& layer : weights_.layers) {
    if (const auto* w = std::get_if<MlaWeights>(&layer.attention))
      total += linear(w->q) + linear(w->q_a) + linear(w->q_b) + linear(w->kv_a) + linear(w->k_b_absorbed) + linear(w->v_b) + linear(w->o);
    else if (const auto* g = std::get_if<GqaWeights>(&layer.attention))
      total += linear(g->q) + linear(g->k) + linear(g->v) + linear(g->o);
    if (const auto* dense = std::get_if<DenseFfn>(&layer.ffn)) {
      total += linear(dense->ffn.gate) + linear(dense->ffn.up) + linear(dense->ffn.down);
    } else {
      const auto& moe = std::get<MoeFfn>(layer.ffn);
      total += linear(moe.router) + linear(moe.shared.gate) + linear(moe.shared.up) + linear(moe.shared.down);
      const double share = double(config_.num_experts_per_tok) / config_.n_routed_experts;
      const double chosen = 1 - std::pow(1 - share, double(tokens));  // expected part of the experts that some token goes to
      total += chosen * (linear(moe.experts.gate) + linear(moe.experts.up) + linear(moe.experts.down));
    }
  }
  return total;
}

double Model::token_ops() const {
  // Every active parameter is one multiply-add, but for the embedding's row, which is only copied.
  return 2 * (double(config_.active_parameters()) - double(config_.hidden_size));
}

double Model::attention_ops(int64_t new_tokens, int64_t context) const {
  const Config& c = config_;
  const double pairs = double(new_tokens) * double(context), heads = double(c.num_attention_heads) * c.num_hidden_layers;
  if (!c.is_mla()) return heads * pairs * 4 * c.head_dim;
  const double d_h = c.qk_nope_head_dim, d_R = c.qk_rope_head_dim, d_c = c.kv_lora_rank, d_v = c.v_head_dim;
  const bool absorbed = form == MlaForm::automatic ? absorbed_is_cheaper(c, new_tokens, context) : form == MlaForm::absorbed;
  if (absorbed) return heads * pairs * 2 * (2 * d_c + d_R);
  // token_ops() counts W_UK and W_UV once for each new token; the tokens before them are expanded too.
  const double before = std::max(0.0, double(context) - double(new_tokens) / 2);
  return heads * (pairs * 2 * (d_h + d_R + d_v) + before * 2 * d_c * (d_h + d_v));
}

}  // namespace mla
