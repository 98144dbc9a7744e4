// A converted attention, moved by gradients until it does to the stream what the original's did.
#pragma once

#include "lowrank/gqa_to_mla.h"

#include <array>
#include <vector>

namespace mla {

class Threads;

struct FitShape {
  GqaShape gqa;
  int64_t window, latent, d_R, stream;  // tokens T, r, rotary width, rows of W_O
  float scale;                          // of the softmax
  std::vector<double> frequencies;      // of the d_R/2 rotary pairs
  int64_t query_width() const { return gqa.head_dim + d_R; }
};

// A window from position 0, f32: a, the normed stream [T, D]; what attention should add to the stream [T, stream]; what a token counts [T].
struct FitWindow {
  const float *inputs, *target, *weight;
};

// f32, row by row: W_Q [h (d + d_R), D], W_DKV [r, D], W_KR [d_R, D], W_UK and W_UV [h d, r], W_O [stream, h d].
struct FitWeights {
  std::vector<float> q, down, rotary, uk, uv, o;
  std::array<std::vector<float>*, 6> all() { return {&q, &down, &rotary, &uk, &uv, &o}; }
};

// Everything is fitted at once, since keys, values and queries share the latent: Adam on Σ w ‖target − output‖², a window a step. The norm
// on the latent is left out. A matrix moves by `rate` of the root mean square that it started with, a column of biases left out of that.
// The same for any number of threads, if BLAS has one.
class AttentionFit {
 public:
  AttentionFit(const FitShape& shape, const MlaMatrices& start, Threads& threads);  // start: before neutralise_norm

  double error(const FitWindow& window);  // Σ w ‖target − output‖²
  // The same, with its gradient in gradient().
  double differentiate(const FitWindow& window);
  void move(double rate);  // against the gradient
  void put(MlaMatrices& m) const;

  FitWeights& weights() { return weights_; }
  FitWeights& gradient() { return gradient_; }

 private:
  void forward(const FitWindow& window);
  double subtract_target(const FitWindow& window);  // leaves the gradient of the outputs in output_
  void backward(const FitWindow& window);
  void attend(int64_t head, bool back);

  FitShape s_;
  Threads& threads_;
  FitWeights weights_, gradient_, mean_, square_;
  std::array<double, 6> spread_{};  // root mean squares at the start
  int64_t steps_ = 0;
  std::vector<float> turns_;  // cosine and sine [T, d_R/2, 2]
  // Of a window: queries and what they attend to, turned; heads' outputs; and the gradients of all these.
  std::vector<float> queries_, latent_, rotary_, keys_, values_, attended_, output_;
  std::vector<float> d_queries_, d_latent_, d_rotary_, d_keys_, d_values_, d_attended_;
};

}  // namespace mla
