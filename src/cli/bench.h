// One device operation timed at the sizes a model uses it in.
#pragma once

#include "model/model.h"

#include <functional>
#include <string>
#include <vector>

namespace mla {

struct OpTime {
  std::string op;  // "linear 576→1536 q4_1"
  int64_t tokens = 0;
  double us = 0, bytes = 0, ops = 0;  // of one call
  Ceilings ceilings;
};

// Every kind of operation in the model's first layers, at 1 token and at `prompt` tokens, attention over `depth` rows.
std::vector<OpTime> time_ops(Model& model, DType kv_type, int64_t prompt, const std::vector<int64_t>& depths,
                             const std::function<void(double fraction)>& progress);

}  // namespace mla
