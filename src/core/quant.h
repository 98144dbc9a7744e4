// Quantised weights in plain C++, GGUF's blocks and fp8 with scales: the reference for every kernel, and what the writers use.
#pragma once

#include "core/tensor.h"

namespace mla {

// Decodes n elements (a multiple of the block) of any DType with a numeric meaning to f32.
void dequantise(DType type, const void* from, float* to, int64_t n);

// Decodes a contiguous tensor; fp8 weights with their scales.
void dequantise(const Tensor& t, float* to);

// A row of a contiguous matrix or of a stack, whose rows are counted through; a vector is its own. fp8: with the row's scales.
Tensor row_of(const Tensor& t, int64_t row);

// The scale of a block of fp8 weights whose largest magnitude is `most`: its code will be 448.
inline float f8_weight_scale(float most) { return most > 0 ? most / 448 : 1; }

// Encodes n f32 elements as f32, f16, bf16, q8_0, q4_0, q4_1 or q6_k; raises Error for other types.
void quantise(DType type, const float* from, void* to, int64_t n);

bool can_quantise(DType type);

}  // namespace mla
