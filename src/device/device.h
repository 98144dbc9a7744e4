// The whole contract between models and machines: every operation of inference, with a shape on each argument.
// Activations are f32. Tensors lie in the device's memory; spans, ids and slots on the host, and weights come from there. Operations check
// shapes on entry and raise Error; none allocates what grows with the model. They may still run when a call returns:
// Memory::wait and Memory::download wait for them.
#pragma once

#include "core/memory.h"
#include "device/attention.h"

#include <functional>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>

namespace mla {

class Threads;

// Weights in the device's own order. `count` matrices of [rows, cols] (experts, heads; 1 otherwise); y = W x for each.
struct Weight {
  DType dtype = DType::f32;  // as it is held: what the products' precision follows
  int64_t count = 0, rows = 0, cols = 0;
  std::byte* data = nullptr;
  int64_t matrix_bytes = 0;       // bytes from one matrix to the next
  std::shared_ptr<Buffer> owner;  // empty for none
  explicit operator bool() const { return data != nullptr; }
  int64_t bytes() const { return count * matrix_bytes; }
};

// One of several products with the same activations: y f32 [n, rows] = x Wᵀ (+ bias f32 [rows], if it has data) (+ y, if add).
struct Projection {
  const Weight& w;
  Tensor bias, y;
  bool add = false;
};

// What products with quantised weights make of their activations. i8: codes of 8 bits, a scale for each 32. i16: what that rounds off is
// quantised once more and multiplied in a second pass, so that results are those of the dequantised
// weights to about 1e-4 of their size.
enum class Activations : uint8_t { i8, i16 };

// A gated feed-forward network, or a stack of them: down( silu(gate x) ⊙ up x ).
struct FfnWeights {
  Weight gate, up;  // [E, width, D]
  Weight down;      // [E, D, width]
};

// Queries q f32 [n, heads, d_h + d_R] as the latent space has them, to [n, heads, d_c + d_R] in query_type: [W_h q_c ; q_R rotated].
struct Absorbed {
  Tensor q;
  const Weight& w;
  Tensor to;
  static Tensor latent(const Tensor& t, int64_t d_R) { return slice(t, 2, 0, t.shape[2] - d_R); }
  static Tensor rotary(const Tensor& t, int64_t d_R) { return slice(t, 2, t.shape[2] - d_R, d_R); }
};

// Which experts a token goes to. expert i32 [n, k], weight f32 [n, k].
struct Routing {
  Tensor expert, weight;
};

enum class Gating : uint8_t { greedy, group_limited_greedy };

// The gate of DeepSeekMoE (eq. 20-22 and the device-limited routing of 2.2.2): softmax over all experts, then the top k.
struct RouterConfig {
  Gating gating = Gating::greedy;
  int experts = 0, top_k = 0;
  int groups = 1, top_groups = 1;  // group_limited_greedy: a group's score is the maximum in it
  bool renormalise = false;        // norm_topk_prob
  float scale = 1;                 // routed_scaling_factor; applied only where the weights are not renormalised
};

enum class Attend : uint8_t { replace, merge };

// The rate this device reaches, for the shares that runs and benchmarks print.
struct Ceilings {
  double read_gb_s = 0, int8_gop_s = 0, bf16_gflop_s = 0, f32_gflop_s = 0;
  double i16_gop_s = 0;  // 16-bit integers, where attention multiplies in them
};

// What the host gives a step's operations. It stays as it is, and where it is, until the step has been issued.
struct StepInputs {
  std::span<const int32_t> ids;         // of embed
  std::span<const int64_t> slots;       // of store
  Spans spans;                          // of attend, with the pages they name
  std::span<const float> cos_sin_from;  // of rope: copied to
  Tensor cos_sin;
};

class Device {
 public:
  virtual ~Device() = default;
  Activations activations = Activations::i8;
  // What suits the device: bytes of scratch for a tile of expanded context, and tokens of a step of a long prompt. MLA's expanded form
  // forms the keys and values of the whole context again for every step, so few large steps are faster; of 2048 tokens, even DeepSeek-V2's
  // takes no more than about 500 MB of scratch.
  int64_t step_tokens = 2048, tile_bytes = int64_t(24) << 20;
  virtual Memory& memory() = 0;
  // Runs `issue`, which calls the operations of a step. A key other than 0 promises that every step with this key issues the same
  // operations on the same memory, the contents of `in` aside, so that a device may repeat what it recorded and not call `issue`.
  virtual void step(const StepInputs& in, uint64_t key, const std::function<void()>& issue) = 0;
  virtual std::string describe() const = 0;  // "CPU, avx512-bf16, 2 threads"
  virtual Threads& threads() = 0;
  virtual Ceilings probe(double seconds) = 0;  // measures for about `seconds`

  // Puts matrices [rows, cols] (or stacks [n, rows, cols]; pieces are stacked in order) into the device's order. All pieces have
  // one shape and type: f32, f16, bf16, fp8 with scales (contiguous), q8_0, q4_0, q4_1, q4_k, q5_k or q6_k. The pieces may be dropped
  // afterwards.
  virtual Weight pack(std::span<const Tensor> pieces) = 0;
  Weight pack(const Tensor& one) { return pack(std::span(&one, 1)); }

  // out f32 [n, cols] = rows ids[i] of w [1, rows, cols]; an id below 0 names one that was chosen (`choose`).
  virtual void embed(std::span<const int32_t> ids, const Weight& w, Tensor out) = 0;
  // Products of x f32 [n, cols] with each w. Rows of x and y may be strided.
  virtual void linear(Tensor x, std::span<const Projection> projections) = 0;
  void linear(Tensor x, std::initializer_list<Projection> projections) { linear(x, std::span(projections.begin(), projections.size())); }
  void linear(Tensor x, const Weight& w, Tensor bias, Tensor y, bool add = false) { linear(x, {{w, bias, y, add}}); }
  // Products of rms_norm(x, norm, eps), which h, of x's shape, has room for; what is in h then is not said.
  virtual void linear_normed(Tensor x, Tensor norm, float eps, Tensor h, std::span<const Projection> projections) {
    rms_norm(x, norm, eps, h);
    linear(h, projections);
  }
  // y [n, H, rows] = x f32 [n, H, cols] with its own matrix for each head; w.count = H. Both may be strided in dims 0 and 1; y is f32 or of
  // query_type.
  virtual void linear_heads(Tensor x, const Weight& w, Tensor y) = 0;
  // out f32 [n, D] += Σ_j weight[j] · ffn_{expert[j]}(x), experts of all tokens grouped. routing null: expert 0 with weight 1.
  virtual void ffn(Tensor x, const FfnWeights& w, const Routing* routing, Tensor out) = 0;
  // Scores f32 logits [n, experts] to expert i32 [n, k] and weight f32 [n, k]; equal scores go to the lower index.
  virtual void route(Tensor logits, const RouterConfig& config, Routing out) = 0;

  // The gate of a mixture from the residual stream x [n, D] and the experts that every token has: h = rms_norm(x), scores f32 [n, experts]
  // = h routerᵀ, where they send it, and x += shared(h), where there are weights.
  virtual void gate(Tensor x, Tensor norm, float eps, Tensor h, const Weight& router, const RouterConfig& config, Tensor scores,
                    Routing out, const FfnWeights& shared) {
    rms_norm(x, norm, eps, h);
    linear(h, router, {}, scores);
    route(scores, config, out);
    if (shared.gate) ffn(h, shared, nullptr, x);
  }

  // For each row of logits f32 [n, vocab] an id: with temperature 0 that of the largest, the lower of equals; else the one that at[row] in
  // [0, 1) falls on when ids share [0, 1) in order, by exp(logit / temperature). -1 where the logits are no numbers. They stay on the
  // device until the next choice: `chosen` waits for them, and embed takes an id of -1 - r as the one chosen for row r, so that a step need
  // not wait. Returns false, and does nothing, where logits lie on the host: callers choose there.
  virtual bool choose(Tensor, double /* temperature */, std::span<const double> /* at */) { return false; }
  virtual void chosen(std::span<int32_t> /* ids */) {}

  // y f32 [n, d] = x / sqrt(mean(x²) + eps) ⊙ weight f32 [d]. Rows may be strided; y may be x.
  virtual void rms_norm(Tensor x, Tensor weight, float eps, Tensor y) = 0;
  // y [n, heads, d] = x f32 rotated by the pairs' angles; cos_sin f32 [n, d / 2, 2]. Pairs are (2i, 2i+1) if interleaved, else
  // (i, i + d/2). Strided in dims 0 and 1; y may be x, and is f32 or of query_type.
  virtual void rope(Tensor x, Tensor cos_sin, bool interleaved, Tensor y) = 0;
  void rope(Tensor x, Tensor cos_sin, bool interleaved) { rope(x, cos_sin, interleaved, x); }

  // to = from, f32 of one shape; rows may be strided (the last dimension is contiguous).
  virtual void copy(Tensor from, Tensor to) = 0;

  // Writes rows f32 [n, layout.row()] (strided in dim 0) into the cache: row i to slot[i] = page * page_tokens + offset.
  // A row is [K of all heads | V of all heads], or in MLA [latent | rotary key].
  virtual void store(Tensor rows, std::span<const int64_t> slots, const Kv& kv) = 0;
  // What MLA's tokens leave: of rows f32 [n, d_c + d_R], contiguous, the latents are normed by `norm` [d_c] and the keys rotated, in place,
  // as rms_norm and rope do it, and the rows stored. Queries, if there are any, go into the latent space along with them, rotated by the
  // same angles.
  virtual void store_latents(Tensor rows, Tensor norm, float eps, Tensor cos_sin, bool interleaved, std::span<const int64_t> slots,
                             const Kv& kv, const Absorbed* queries) {
    const int64_t n = rows.shape[0], row = rows.shape[1], d_c = norm.count(), d_R = row - d_c;
    const Tensor latents = slice(rows, 1, 0, d_c), heads = view(rows.data, rows.dtype, {n, 1, row}, rows.place);
    rms_norm(latents, norm, eps, latents);
    rope(slice(heads, 2, d_c, d_R), cos_sin, interleaved);
    store(rows, slots, kv);
    if (!queries) return;
    const auto& [q, w, to] = *queries;
    rope(Absorbed::rotary(q, d_R), cos_sin, interleaved, Absorbed::rotary(to, d_R));
    linear_heads(Absorbed::latent(q, d_R), w, Absorbed::latent(to, d_R));
  }
  // Keys and values that were expanded from latents: kv f32 [n, heads, d_h + d_v], as W_UK and W_UV give them, and the rotary key
  // that all heads share, f32 [n, d_R], become rows of a contiguous Kv of d_k = d_h + d_R, f32 or bf16.
  virtual void store_expanded(Tensor kv, Tensor rotary, const Kv& to) = 0;
  // rows f32 [n, layout.row()] = rows first..first+n of the span's pages
  virtual void load(const Kv& kv, const Span& span, int64_t first, Tensor rows) = 0;
  // The type in which attend takes the queries of a latent cache without converting them; f32 it always takes.
  virtual DType query_type(const Kv&) const { return DType::f32; }
  // Attention over pages (eq. 16-18): q [n, n_h, d_k] → o f32 [n, n_h, d_v] and lse f32 [n, n_h] (natural log of Σ exp(scale·q·k)),
  // for the query rows the spans name. Query head h reads cache head h / (n_h / layout.heads). n_h is a multiple of layout.heads.
  // merge: joins with what o and lse hold from other rows of the same sequence (a monoid; lse -inf is its unit). A query that sees no
  // row gets zeros and lse -inf. The result of a span depends on nothing but its own queries and rows.
  virtual void attend(Tensor q, const Kv& kv, Spans spans, Mask mask, float scale, Tensor o, Tensor lse, Attend how = Attend::replace) = 0;
};

// threads 0: all processors. Raises Error where the machine cannot.
std::unique_ptr<Device> make_cpu(int threads = 0);
// index of the GPU; raises Error, in plain words, where this build or machine has none.
std::unique_ptr<Device> make_cuda(int index);

}  // namespace mla
