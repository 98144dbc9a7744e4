// A mixture's gate for few tokens, and the product that goes with it.
#pragma once

#include "cuda/product.h"
#include "device/device.h"

namespace mla::cuda {

constexpr int most_experts = 1024;

struct Gate {
  const float *x, *norm;
  float* h;
  float* scores;
  int64_t x_row, h_row, score_row;
  float eps;
  int tokens;
  PackedMatrix router;  // f32
  RouterConfig config;
  int32_t* expert;
  float* weight;
  float* exchange;  // [few_rows, most_experts] of scores between blocks; all bits are set between launches
};

// One launch: the first of a network's two products, and in front of it the gate, which wants nothing of it.
void product_behind_gate(const Product& p, const Gate& gate, cudaStream_t stream);

}  // namespace mla::cuda
