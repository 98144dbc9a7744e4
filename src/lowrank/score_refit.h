// Queries refitted so that scores against the converted keys are what they were.
#pragma once

#include "lowrank/gqa_to_mla.h"
#include "model/step.h"

#include <span>
#include <vector>

namespace mla {

class Threads;

// A window of one layer under both attentions, T tokens; all f32, queries and keys rotated.
struct ScoreWindow {
  std::vector<float> inputs;         // a, the normed stream [T, D]
  std::vector<float> query, key;     // the original's [T, h, d], [T, g, d]
  std::vector<float> still, rotary;  // the converted keys [T, h, d] and [T, d_R]
};

struct ScoreShape {
  GqaShape gqa;
  int64_t window, d_R;
  float scale, fitted_scale;        // of the softmax, before and after
  std::vector<double> frequencies;  // of the d_R/2 rotary pairs
};

// Each step moves every head's W_Q along K⁻¹ G C⁻¹ as far as lowers the error most: G is the gradient of Σ P (score − original's)², each
// query's mean taken off since a softmax ignores it, P the mean of both attentions; K the keys' covariance under P, C = E[a aᵀ]. K ⊗ C
// stands for the Hessian, in which the keys seen by a query and the query itself are not independent. Returns the share of the error left.
double refit_queries(Matrix& q, std::span<const ScoreWindow> windows, const ScoreShape& shape, const Matrix& inputs, int steps,
                     Threads& threads);

}  // namespace mla
