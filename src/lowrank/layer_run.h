// Runs single layers of a model over windows of text, and takes from them the sums that a conversion needs.
#pragma once

#include "lowrank/gqa_to_mla.h"
#include "model/step.h"

#include <span>

namespace mla {

class Threads;

// A batch of windows of one length, each from position 0, through one layer's attention or feed-forward network.
class LayerRun {
 public:
  // `frequencies`: of the rotary pairs. `config` and `device` outlive this.
  LayerRun(const Config& config, std::vector<double> frequencies, Device& device, int64_t window, int64_t windows);

  // x f32 [n, D] += attention(x), n a multiple of the window.
  void attend(const GqaWeights& w, Tensor x);
  // What the heads put out before W_O, f32 [n, h, d_v].
  void attend_heads(const MlaWeights& w, Tensor x, Tensor heads);
  // What attention starts from, of normed inputs f32 [n, D]: queries [n, h, d] and keys [n, g, d], rotated.
  void project(const GqaWeights& w, Tensor inputs, Tensor queries, Tensor keys);
  void feed_forward(const Layer& layer, Tensor x);

 private:
  template <class Run>
  void run(int64_t rows, const Run& what);

  const Config& config_;
  Device& device_;
  int64_t window_;
  LatentCache cache_;
  Arena arena_;
  std::vector<int64_t> slots_;
  std::vector<float> cos_sin_;
  std::vector<double> frequencies_;
};

// C [m, n] = op(A) op(B) of row-major f32 matrices with rows of lda, ldb and n; blocks of C's rows are the threads' tasks, each with BLAS
// to itself. `lower`: of C only what is left of the diagonal and on it is sure to be there.
void threaded_product(Threads& threads, Transposed which, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                      int64_t ldb, float* c, bool lower = false);

// Σ xᵀx and Σ xᵀy over rows of f32, summed in f32 within a call and in double over calls. Our threads do it, each with BLAS to itself.
class Sums {
 public:
  Sums(int64_t x_cols, int64_t y_cols, Threads& threads) : threads_(threads), gram_(x_cols, x_cols), cross_(x_cols, y_cols) {}
  void add(const float* x, int64_t rows);  // xᵀx
  void add_cross(const float* x, const float* y, int64_t rows);
  Matrix gram() const;  // both triangles
  const Matrix& cross() const { return cross_; }

 private:
  Threads& threads_;
  Matrix gram_, cross_;  // of the gram, the lower triangle
  std::vector<float> scratch_;
};

// For each query head, rotary pair and distance Δ = t − s, the attention paid over that distance in a GQA layer, Σ P(t, s) |q_t|² |k_s|² of
// the pair, or Σ P alone. Which constant stands best for which rotation follows from it.
class DistanceSums {
 public:
  DistanceSums(const GqaShape& shape, int64_t window, Constant which);
  // One window: q f32 [T, h, d] and k f32 [T, g, d], rotated, rows strided as given.
  void add(const Tensor& q, const Tensor& k, float scale, Threads& threads);
  // [h, d/2]: the constants nearest to e^{−iωΔ}, ω of each pair.
  std::vector<std::complex<double>> constants(const std::vector<double>& frequencies) const;

 private:
  void add_head(int64_t head, const Tensor& q, const Tensor& k, float scale);
  std::vector<float> energies(const Tensor& x, int64_t head) const;

  GqaShape shape_;
  int64_t window_;
  bool weighted_;
  std::vector<double> paid_;  // [h, T, d/2]
};

// Scores are formed a tile of queries at a time, which stays in the cache and leaves out what no query of it sees.
constexpr int64_t score_tile_rows = 128;
// Scores [rows, cols] of the queries at positions from `from` on, as probabilities in place; those of later keys are 0.
void causal_softmax(float* scores, int64_t from, int64_t rows, int64_t cols);

}  // namespace mla
