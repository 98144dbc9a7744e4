// What the GPU benchmarks need beside the library: random data, and the machine's limits.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace mla::cuda {

// bf16 numbers drawn from N(0, 1) / 10, clamped to ±1.
void fill_normal(void* to, size_t count, uint64_t seed, cudaStream_t stream);
// Rows of an f8 cache of 512 + 64 columns (KvFormat), from the same distribution.
void fill_f8_rows(void* to, size_t rows, uint64_t seed, cudaStream_t stream);
// Reads everything.
void read_all(const void* from, size_t bytes, float* sink, cudaStream_t stream);
// d = a b for bf16 n × n matrices, through cuBLAS.
void multiply(const void* a, const void* b, void* d, int n, cudaStream_t stream);

}  // namespace mla::cuda
