// Absorbed MLA decode on the GPU: attention of a few queries of each sequence over pages of latents.
#pragma once

#include "cuda/decode_plan.h"
#include "cuda/memory.h"

#include <cuda_runtime.h>

namespace mla::cuda {

// A plan as kernels see it.
struct DeviceDecodePlan {
  int row_blocks, part_count, item_count, slots, merges, most_rows, most_pieces;
  const DecodePart* parts;
  const DecodeItem* items;
  const DecodeMerge* merge;
  const int32_t* pages;
};

// A plan in the GPU's memory, in one piece.
class UploadedPlan {
 public:
  UploadedPlan(const DecodePlan& plan, cudaStream_t stream);
  const DeviceDecodePlan& view() const { return view_; }

 private:
  GpuBuffer memory_;
  DeviceDecodePlan view_;
};

// All memory is the GPU's.
struct DecodeCall {
  const void* q;  // bf16 [n, n_h, d_c + d_R]
  int n;
  Kv kv;  // bf16 or f8, MLA's layout; page_tokens is a multiple of 64
  DeviceDecodePlan plan;
  int n_h;
  float scale;
  bool out_f32;
  void* o;        // [n, n_h, d_c], bf16 or f32
  float* lse;     // [n, n_h], natural logarithm
  void* scratch;  // decode_scratch_bytes
};

// Of the partial results of split sequences; slots and most_rows are a plan's.
size_t decode_scratch_bytes(int slots, int most_rows, int d_v);

// Whether the Hopper kernel has this cache's shape.
bool decode_sm90_takes(const Kv& kv);
// Launches the kernels on the stream. Raises Error for a shape it does not take.
void decode_sm90(const DecodeCall& call, cudaStream_t stream);
// The same by plain instructions, for any d_c and d_R and a plan that splits nothing; slow.
void decode_portable(const DecodeCall& call, cudaStream_t stream);

}  // namespace mla::cuda
