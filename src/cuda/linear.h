// The way from a product to the kernel that is best for it.
#pragma once

#include "core/memory.h"
#include "cuda/product.h"

namespace mla::cuda {

// Whether such a product with w is for the matrix units (product_gemm). Others go through the kernel of few rows, those of codes whose
// columns are not whole 32s, too, and those of codes whose bf16 activations are not in their order.
bool is_for_gemm(const Product& p, const PackedMatrix& w);
// Products of all parts with the rows of x. Without runs; with bf16 activations their rows must be a whole number of units long.
void multiply(const Product& p, Arena& scratch, int processors, cudaStream_t stream);
// y [n, heads, rows] = x [n, heads, cols] with each head's own matrix.
Product product_of_heads(const Tensor& x, const Weight& w, const Tensor& y);

}  // namespace mla::cuda
