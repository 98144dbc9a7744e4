// A model in memory and its forward pass over a ragged batch.
#pragma once

#include "model/cache.h"
#include "model/config.h"

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <variant>
#include <vector>

namespace mla {

class Checkpoint;

// Multi-head latent attention, with the paper's names. Bias tensors may be empty.
struct MlaWeights {
  Tensor attn_norm;             // [D]
  Weight q;                     // W_Q [n_h (d_h + d_R), D], when there is no query latent
  Weight q_a;                   // W_DQ [d_c', D]
  Tensor q_a_norm;              // [d_c']
  Weight q_b;                   // W_UQ and W_QR, head by head [n_h (d_h + d_R), d_c']
  Weight kv_a;                  // W_DKV and W_KR [d_c + d_R, D]
  Tensor kv_a_bias, kv_a_norm;  // [d_c + d_R], [d_c]
  Weight k_b_absorbed;          // W_UKᵀ of each head [n_h, d_c, d_h]
  Weight v_b;                   // W_UV of each head [n_h, d_v, d_c]
  Weight kv_b;                  // W_UK and W_UV, head by head [n_h (d_h + d_v), d_c], for the expanded form
  Weight o;                     // W_O [D, n_h d_v]
  Tensor q_a_bias, o_bias;
};

// Grouped-query attention; MHA and MQA are its ends.
struct GqaWeights {
  Tensor attn_norm;
  Weight q, k, v, o;
  Tensor q_bias, k_bias, v_bias, o_bias;
};

struct DenseFfn {
  Tensor norm;
  FfnWeights ffn;
};

struct MoeFfn {
  Tensor norm;
  Weight router;               // [experts, D]
  FfnWeights experts, shared;  // shared has no data when the model has none
};

struct Layer {
  std::variant<MlaWeights, GqaWeights> attention;
  std::variant<DenseFfn, MoeFfn> ffn;
};

struct Weights {
  Weight embed;    // [vocab, D]
  Weight lm_head;  // the same memory as embed when tied
  Tensor norm;
  std::vector<Layer> layers;
  std::vector<Buffer> small;  // owns the f32 tensors above
};

using Progress = std::function<void(double fraction)>;

Weights load_weights(const Checkpoint& checkpoint, const Config& config, Device& device, const Progress& progress = {});

enum class MlaForm : uint8_t { automatic, absorbed, expanded };

// New tokens of one sequence in a step. An id of -1 - r is the one that Model::choose chose last for row r.
struct Chunk {
  int sequence;  // in the cache
  std::span<const int32_t> tokens;
  enum class Logits : uint8_t { none, last, all } logits = Logits::last;
};

// Receives every named intermediate of a forward pass: "layers.3.attn.latent", host f32.
using Dump = std::function<void(const std::string& name, const Tensor& value)>;

class Model {
 public:
  // Reads the checkpoint's weights onto the device, which must outlive the model.
  Model(const Checkpoint& checkpoint, Device& device, const Progress& progress = {});

  // Appends the chunks' tokens to their sequences and returns the logits asked for, f32 [rows, vocab], in the chunks' order; they
  // live in the device's memory until the next call. When the cache has too few pages nothing changes, and the answer has no data.
  // `progress` is called before each layer; it may throw, which ends the pass and leaves the cache as it was.
  Tensor forward(std::span<const Chunk> chunks, LatentCache& cache, const Progress& progress = {});

  // Device::choose of the last pass's logits, whose ids the next passes may name; false where the host has to choose.
  bool choose(const Tensor& logits, double temperature, std::span<const double> at);

  // Logits where the host can read them, until the next call.
  Tensor to_host(const Tensor& logits) { return on_host(logits, device_->memory(), host_logits_); }

  LatentCache make_cache(int64_t tokens, DType type) const;
  const Config& config() const { return config_; }
  const Weights& weights() const { return weights_; }
  Device& device() const { return *device_; }
  MlaForm form = MlaForm::automatic;
  Dump dump;

  // Bytes of weights a step reads that runs `tokens` tokens: each matrix once, and of the routed experts those expected to be chosen.
  double step_weight_bytes(int64_t tokens) const;
  // Multiply-adds × 2 of one token's products with weights, and of attention over a context in the form the model would
  // choose; `context` is what a new token sees on average, with half the new tokens in it.
  double token_ops() const;
  double attention_ops(int64_t new_tokens, int64_t context) const;

 private:
  Config config_;
  Device* device_;
  Weights weights_;
  uint64_t number_;                       // of this model among all that were made
  std::vector<double> rope_frequencies_;  // [d_R / 2]
  Arena arena_;
  int64_t chosen_ = 0;  // ids that the device has chosen
  std::vector<float> host_logits_;
};

}  // namespace mla
