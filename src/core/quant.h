// GGUF's quantised blocks in plain C++: the reference that every kernel is checked against, and what the writers use.
#pragma once

#include "core/dtype.h"

namespace mla {

// Decodes n elements (a multiple of the block) of any DType with a numeric meaning to f32.
void dequantise(DType type, const void* from, float* to, int64_t n);

// Encodes n f32 elements as f32, f16, bf16, q8_0, q4_0, q4_1 or q6_k; raises Error for other types.
void quantise(DType type, const float* from, void* to, int64_t n);

bool can_quantise(DType type);

}  // namespace mla
