// Absorbed MLA decode for Hopper: a block serves 64 (query, head) rows; each tile of 64 latents is loaded once, for scores and values
// alike. docs/cuda-decode.md has the schedule.
#include "cuda/decode.h"
#include "cuda/decode_kernel.cuh"
#include "cuda/decode_narrow.cuh"
#include "cuda/error.h"
#include "cuda/hopper.h"
#include "cuda/launch.cuh"
#include "cuda/tensor_map.h"

namespace mla::cuda {
namespace {

template <class S>
void launch_wide(const DecodeCall& call, cudaStream_t stream) {
  const DeviceDecodePlan& plan = call.plan;
  const DecodeArguments a{call, decode_partials(call, S::values)};
  const CUtensorMap queries = query_map(call.q, int64_t(call.n) * call.n_h, call.kv.format.layout.d_k, query_rows(plan.most_rows));
  launch(decode_kernel<S>, dim3(unsigned(plan.row_blocks), unsigned(plan.part_count)), dim3(decode_threads), size_t(S::shared_bytes),
         stream, queries, S::codes ? queries : cache_map(call.kv), a);
  if (plan.merges > 0) merge_decode(call, a.partial, S::values, stream);
}

template <bool Codes>
void launch_narrow(const DecodeCall& call, cudaStream_t stream) {
  using S = NarrowShape<Codes>;
  const DecodePartials partial = decode_partials(call, S::d_v);
  const Kv& kv = call.kv;
  const CUtensorMap rows = Codes ? CUtensorMap{} : pages_map(kv.base, S::d_k, kv.page_tokens, S::row_bytes, kv.page_bytes, S::stage_rows);
  launch(narrow_kernel<Codes>, dim3(1, unsigned(call.plan.part_count)), dim3(S::all_threads), size_t(narrow_bytes<Codes>), stream, rows,
         call, partial);
  if (call.plan.merges > 0) merge_decode(call, partial, S::d_v, stream);
}

struct Instance {
  DType type;
  int d_k, d_v;  // at most d_k; of codes just d_k
  void (*launch)(const DecodeCall&, cudaStream_t);
};
constexpr Instance instances[] = {{DType::bf16, 576, 512, launch_wide<DecodeShape<9, 512>>},
                                  {DType::bf16, 192, 128, launch_wide<DecodeShape<3, 128>>},
                                  {DType::bf16, 128, 64, launch_wide<DecodeShape<2, 64>>},
                                  {DType::f8, 576, 512, launch_wide<DecodeShape<9, 512, true>>}};

const Instance* find(const Kv& kv) {
  const KvLayout& l = kv.format.layout;
  if (!l.v_in_k || l.heads != 1 || kv.page_tokens % tile_tokens != 0 || l.d_k % 8 != 0) return nullptr;
  for (const Instance& i : instances)
    if (kv.format.type == i.type && l.d_v == i.d_v && l.d_k > i.d_v && (i.type == DType::f8 ? l.d_k == i.d_k : l.d_k <= i.d_k)) return &i;
  return nullptr;
}

}  // namespace

bool decode_sm90_takes(const Kv& kv) { return hopper() && find(kv); }

void decode_sm90(const DecodeCall& call, cudaStream_t stream) {
  const Instance* instance = find(call.kv);
  require(instance, "no Hopper kernel for this cache");
  if (call.plan.part_count == 0) return;
  const bool narrow = call.plan.most_rows <= narrow_rows && call.kv.format.layout.d_k == NarrowShape<false>::d_k;
  if (!narrow) return instance->launch(call, stream);
  if (instance->type == DType::f8)
    launch_narrow<true>(call, stream);
  else
    launch_narrow<false>(call, stream);
}

}  // namespace mla::cuda
