// Products of few rows by themselves.
#include "cuda/product_gemv.cuh"

namespace mla::cuda {

void product_gemv(const Product& p, cudaStream_t stream) {
  for (int i = 1; i < p.parts; ++i)
    require(p.part[i].w.type == p.part[0].w.type && p.part[i].w.cols == p.part[0].w.cols, "these products together");
  if (p.part[0].up.data)
    launch_gemv<Kind::gated, gemv_warps>(p, nullptr, Nothing{}, stream);
  else if (has_few_columns(p))
    launch_gemv<Kind::plain, few_warps>(p, nullptr, Nothing{}, stream);
  else
    launch_gemv<Kind::plain, gemv_warps>(p, nullptr, Nothing{}, stream);
}

bool product_sum_takes(const Product& p) {
  const PackedMatrix& w = p.part[0].w;
  return w.type != DType::f32 && p.x.bf16 && p.choice &&
         sizeof(Sums<Team<gemv_warps>>) + size_t(p.matrices) * size_t(shared_pitch(w.pitch)) * 2 <= most_shared_bytes();
}

void product_sum(const Product& p, const float* weight, cudaStream_t stream) {
  Product sum = p;
  sum.part[0].y.add = true;
  launch_gemv<Kind::sum, gemv_warps>(sum, weight, Nothing{}, stream);
}

}  // namespace mla::cuda
