// Runs single layers of a model over windows of text, and takes from them the sums that a conversion needs.
#pragma once

#include "lowrank/gqa_to_mla.h"
#include "model/step.h"

#include <span>

namespace mla {

// A batch of windows of one length, each from position 0, through one layer's attention or feed-forward network.
class LayerRun {
 public:
  // `frequencies`: of the rotary pairs. `config` and `device` outlive this.
  LayerRun(const Config& config, std::vector<double> frequencies, Device& device, int64_t window, int64_t windows);

  // x f32 [n, D] += attention(x), n a multiple of the window; `dump` sees the intermediates.
  void attend(const GqaWeights& w, Tensor x, const Dump& dump = {});
  void attend(const MlaWeights& w, Tensor x, const Dump& dump = {});
  void feed_forward(const Layer& layer, Tensor x);

 private:
  template <class Run>
  void run(int64_t rows, const Dump& dump, const Run& what);

  const Config& config_;
  Device& device_;
  int64_t window_;
  LatentCache cache_;
  Arena arena_;
  std::vector<int64_t> slots_;
  std::vector<float> cos_sin_;
  std::vector<double> frequencies_;
};

// Σ xᵀx and Σ xᵀy over rows of f32, summed in f32 within a call and in double over calls.
class Sums {
 public:
  Sums(int64_t x_cols, int64_t y_cols) : gram_(x_cols, x_cols), cross_(x_cols, y_cols) {}
  void add(const float* x, int64_t rows);  // xᵀx
  void add_cross(const float* x, const float* y, int64_t rows);
  Matrix gram() const;  // both triangles
  const Matrix& cross() const { return cross_; }

 private:
  Matrix gram_, cross_;  // of the gram, the lower triangle
  std::vector<float> scratch_;
};

// For each query head and rotary pair, the constant that stands best for e^{iθ(s−t)} under the attention of a GQA layer.
class ConstantSums {
 public:
  ConstantSums(const GqaShape& shape, const std::vector<double>& frequencies, int64_t window, Constant which);
  // One window: q f32 [T, h, d] and k f32 [T, g, d], rotated, rows strided as given.
  void add(const Tensor& q, const Tensor& k, float scale);
  std::vector<std::complex<double>> constants() const;

 private:
  void add_head(int64_t head, const Tensor& q, const Tensor& k, float scale);
  double squared(const float* head_row, int64_t pair) const;

  GqaShape shape_;
  int64_t window_;
  bool weighted_;
  std::vector<float> cos_, sin_;  // [T, d/2]
  std::vector<float> scores_, weighted_keys_, seen_;
  std::vector<std::complex<double>> numerator_;
  std::vector<double> denominator_;
};

}  // namespace mla
