// Products of rows of activations with packed weights, one matrix or stacks of them; which kernel runs depends on the weights' type and
// on how many rows meet a matrix.
#pragma once

#include "cuda/pack.h"

namespace mla::cuda {

// Rows [first, first + count) of the activations meet one matrix of a stack.
struct Run {
  int32_t matrix, first, count;
};

// The order in which a lane of the matrix units has columns of codes (pack.h) is not theirs. Activations that meet codes there lie so that
// both agree: within 32 columns, the fours of pairs are transposed. The column that lies at `place`:
__host__ __device__ constexpr int code_column(int place) { return place / 32 * 32 + place / 2 % 4 * 8 + place % 32 / 8 * 2 + place % 2; }

// Activations. Row i of head h is at data + index(i) * row + h * head elements; index is the identity where it is null.
struct Rows {
  const void* data;
  bool bf16;
  int64_t row, head;
  const int32_t* index;
  const float* norm = nullptr;  // f32 rows few at a time: multiplied by it and by 1 / sqrt(mean of their squares + eps); null: as they are
  float eps = 0;
  bool code_order = false;  // rows of bf16 whose columns lie as code_column says
};

// Where results go: f32 y = W x (+ bias) (+ y if add), or bf16 for another product.
struct Results {
  void* data;
  bool bf16;
  int64_t row, head;
  const float* bias;
  bool add;
  bool code_order = false;  // as Rows'
};

struct Part {
  PackedMatrix w;
  PackedMatrix up;  // with data: the result is silu(w x) ⊙ up x
  Results y;
};

// Without runs, rows [0, n) of head h meet matrix h, or matrix choice[h]. With runs, the first *run_count of them say which of n rows meet
// which matrix.
struct Product {
  static constexpr int most_parts = 3;
  Part part[most_parts];
  int parts;
  Rows x;
  int n, matrices;
  int most;  // rows that meet one matrix, at most
  const int32_t* choice;
  bool choice_is_old;  // it, or the runs, written by a kernel before the one before
  bool next_at_once;   // of few rows: the next kernel, which reads constants alone before it waits, may come before this one has waited
  const Run* runs;
  const int32_t* run_count;
  int most_runs, tile;  // runs have at most `tile` rows; up to few_rows, or 0 for any number, they are made for product_gemv
};

// Up to so many rows a matrix, weights are multiplied as they stream by, each read once.
constexpr int few_rows = 8;

void product_f32(const Product& p, cudaStream_t stream);   // f32 weights, any number of rows
void product_gemv(const Product& p, cudaStream_t stream);  // bf16, f8, q8_0, q4_0; rows in groups of 8
// y += Σ weight[j] · W_choice[j] x[j] for one token, whose x[j] are heads.
bool product_sum_takes(const Product& p);
void product_sum(const Product& p, const float* weight, cudaStream_t stream);
// By Hopper's matrix units: x is bf16, in code order where weights are codes, its rows `pitch` apart and in order, `total` of them; `runs`
// are tiles of at most `tile` rows. Codes have columns in whole 32s.
struct GemmInput {
  const void* x;
  int64_t total;
  int pitch, tile;
};
void product_gemm(const Product& p, const GemmInput& in, cudaStream_t stream);
void product_gemm_f8(const Product& p, const GemmInput& in, cudaStream_t stream);
void product_gemm_q8_0(const Product& p, const GemmInput& in, cudaStream_t stream);
void product_gemm_q4_0(const Product& p, const GemmInput& in, cudaStream_t stream);

// x as bf16 [heads, n, pitch], padded with zeros, in code order if x says so; rows beyond are not touched.
void rows_to_bf16(const Rows& x, int n, int heads, int cols, int pitch, void* to, cudaStream_t stream);

}  // namespace mla::cuda
