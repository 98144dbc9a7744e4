// What a leaf offers: one table of kernels for each instruction set, chosen once at start.
#pragma once

#include "core/dtype.h"

#include <cstddef>
#include <cstdint>

#if __has_include("cpu/attention.h")
#include "cpu/attention.h"
#else
namespace mla {
struct AttentionKernels {};
}  // namespace mla
#endif

namespace mla {

constexpr int lanes = 16;      // output rows that share a vector; packed weights interleave this many
constexpr int act_block = 32;  // activations quantised with one scale
constexpr int dtypes = int(DType::q6_k) + 1;

// How a weight type wants its activations.
enum class ActKind : uint8_t {
  f32,        // 32 floats
  bf16,       // 32 bf16
  i8,         // i8 against centred codes: the weight's offset is taken off through the sum of each half block
  i8_affine,  // i8 against codes with a minimum: the sum is kept as f32
};

// One block of i8 activations: x ≈ scale · code.
struct I8Block {
  int8_t code[act_block];
  float scale;
  union {
    int32_t start[2];  // i8: -offset · Σ code over each half; start[0] holds both where the weight's scale spans the block
    float sum;         // i8_affine: scale · Σ code
  };
  int32_t unused;
};
static_assert(sizeof(I8Block) == 48);

// A tile of activations is [block][token] of records.
struct ActFormat {
  ActKind kind;
  int offset;               // i8: what the stored codes count from
  bool halves;              // i8: the weight has a scale for every 16 columns
  int block_bytes;          // of one token's record
  int tile;                 // the most tokens that one pass over the weights serves
  bool any_tokens = false;  // whether a product takes any number, in tiles one after the other; else one tile of a power of two
  bool operator==(const ActFormat&) const = default;
};

// The product of consecutive groups of 16 rows with a tile, or with some, one after the other: out[t · stride + 16 g + lane].
struct Product {
  const std::byte* weights;  // the first group
  int64_t group_bytes;
  int64_t groups;
  const std::byte* acts;
  int tokens;             // a number that the format takes
  int64_t units;          // packed units along the columns
  bool fetch;             // bring weights closer: they come from memory (products of many tokens bring the next stretch's anyway)
  const std::byte* next;  // what the caller reads afterwards, fetched towards the end; may be null
  float* out;
  int64_t stride;
};

struct Kernels {
  const char* name;
  ActFormat acts[dtypes];  // by weight type; tile 0 where there is no product
  void (*product[dtypes])(const Product&);
  // Writes a row of `cols` floats as records `step` bytes apart; columns beyond `cols` are zeros.
  void (*write_row)(const ActFormat&, const float* x, int64_t cols, int64_t blocks, std::byte* record, int64_t step);

  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t d, float* y);
  void (*rope)(float* x, const float* cos_sin, int64_t d, bool interleaved);
  void (*softmax)(float* x, int64_t n);
  void (*silu_mul)(float* gate, const float* up, int64_t n);                         // gate = silu(gate) ⊙ up
  void (*add)(const float* x, float scale, int64_t n, float* y);                     // y += scale · x
  void (*finish)(const float* x, const float* bias, bool add, int64_t n, float* y);  // y = x (+ bias) (+ y)

  float (*read)(const std::byte* p, int64_t bytes);  // streams through memory
  double (*int8_ops)(int64_t rounds);                // each runs a loop of dots in registers and returns its operations
  double (*bf16_ops)(int64_t rounds);
  double (*i16_ops)(int64_t rounds);  // pairs of 16-bit integers, as attention multiplies; null where it does not
  double (*f32_ops)(int64_t rounds);

  AttentionKernels attention;
};

const Kernels& kernels_plain();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512_bf16();
const Kernels& kernels_avx512_amx();

}  // namespace mla
