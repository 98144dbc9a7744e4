// One layer of grouped-query attention as one of multi-head latent attention: the algebra, on matrices and second moments alone.
#pragma once

#include "lowrank/factor.h"

#include <complex>
#include <optional>
#include <string_view>

namespace mla {

// What stands for e^{iθ(s−t)}, the rotation of a channel that loses its own: 1, its mean under attention, or the constant that is nearest
// in the least squares, weighted by attention, |q|² and |k|².
enum class Constant : uint8_t { one, mean, least_squares };
// What becomes of the RMSNorm that DeepSeek-V2 puts on the latent: a channel held at a large constant by the bias, which makes the norm
// constant to second order; the linear functional of the input that is nearest to a constant; or one calibrated scale.
enum class LatentNorm : uint8_t { constant, functional, scale };

// What a rotary pair carries of the KV heads' pairs that it stands for: the complex direction over them that carries the most, or the one
// pair of one head with the largest Σ |q| |k| over that head's queries. The second is MHA2MLA's choice as far as DeepSeek-V2 can express
// it: there every KV head turns pairs of its own, whichever it chooses. Here one key over one ladder serves all heads, so that a pair of
// the ladder turns for one KV head's queries and for no others, and a chosen pair that is not of the ladder turns by the nearest that is;
// without folding and over the model's own base only pairs of the ladder are chosen.
enum class Rotary : uint8_t { direction, norm };

struct LayerOptions {
  Method method = Method::svd;
  int64_t kv_lora_rank = 0, qk_rope_head_dim = 0;
  Rotary rotary = Rotary::direction;
  Constant constant = Constant::least_squares;
  bool activations = true;  // weigh inputs by their second moments
  bool metric = true;       // weigh keys by E[q qᵀ] and values by W_Oᵀ W_O, in the choice of a rotary direction too
  bool fold = true;         // fold neighbouring frequencies into each rotary pair, where qk_rope_head_dim < head_dim
  bool balance = true;      // divide keys and values by their energies in the metric
  double value_share = 2;   // β: the values' energy in the metric, over the keys'; without balance its factor
  LatentNorm latent_norm = LatentNorm::constant;
  uint64_t seed = 0;
  // The original's pairs that each rotary pair stands for; empty: neighbours in equal numbers.
  std::vector<std::vector<int64_t>> slots;

  int64_t latent_rank() const { return kv_lora_rank - (latent_norm == LatentNorm::scale ? 0 : 1); }  // what is left for keys and values
};

struct GqaShape {
  int64_t heads, groups, head_dim, hidden;  // hidden: columns of W_Q, W_K and W_V; one more than the stream where the last are biases
  bool interleaved;                         // rotary pairs are rows (2i, 2i+1) of a head; else (i, i + head_dim/2)
  int64_t pairs() const { return head_dim / 2; }
};

struct GqaMatrices {
  Matrix q, k, v, o;  // [h d, D], [g d, D], [g d, D], [stream, h d]
};

struct LayerMoments {
  Matrix inputs;             // E[a aᵀ] of the normed stream a [D, D]; where there are biases, a ends in a 1
  std::vector<double> mean;  // E[a]
  // For each query head and pair [h, d/2], what stands for its rotation where it has none, and for what its rotation lacks where it turns
  // by its slot's frequency instead; empty: 1.
  std::vector<std::complex<double>> constants, folded;
};

// Of factor_layer, bias and norm are empty and kv_b meets the latent as it is; neutralise_norm fills them.
struct MlaMatrices {
  Matrix q;                                  // [h (d + d_R), D], scaled for the softmax of d + d_R
  Matrix kv_a;                               // [r + d_R, D]
  std::vector<double> kv_a_bias, kv_a_norm;  // [r + d_R], [r]
  Matrix kv_b;                               // [h (d + d), r]
  Matrix o;                                  // [stream, h d]
};

// What makes the RMSNorm on a latent harmless: `weight` behind it, `bias` of the latent, whose last element may be the constant; what reads
// the latent is multiplied by `factor`. `down` [r, D]: its last row is written where that is the constant.
struct NeutralNorm {
  std::vector<double> bias, weight;  // [r]
  double factor = 1;
};
NeutralNorm neutral_norm(LatentNorm which, Matrix& down, const LayerMoments& moments, double norm_eps);

void neutralise_norm(MlaMatrices& m, int64_t rank, LatentNorm which, const LayerMoments& moments, double norm_eps);

// Raises Error where rank or rotary width do not fit the shape.
void check_layer_options(const GqaShape& shape, const LayerOptions& options);
// Without the latent's norm, which neutralise_norm adds.
MlaMatrices factor_layer(const GqaShape& shape, const GqaMatrices& w, const LayerMoments& moments, const LayerOptions& options);

}  // namespace mla
