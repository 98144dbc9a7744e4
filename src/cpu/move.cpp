// Operations that only move values: copies between strided tensors, and expanded keys and values into cache rows.
#include "core/check.h"
#include "cpu/cpu.h"

#include <algorithm>
#include <cstring>

namespace mla {
namespace {

constexpr int64_t copy_share = int64_t(1) << 15;  // elements that are worth a task

}  // namespace

void CpuDevice::copy(Tensor from, Tensor to) {
  CHECK(from.rank == to.rank && from.rank >= 2 && from.rank <= 3, "{} to {}", mla::describe(from), mla::describe(to));
  for (int i = 0; i < from.rank; ++i) CHECK(from.shape[i] == to.shape[i], "{} to {}", mla::describe(from), mla::describe(to));
  const int last = from.rank - 1;
  CHECK(from.stride[last] == 1 && to.stride[last] == 1, "rows of {} must be contiguous", mla::describe(from));
  const int64_t rows = from.shape[0], inner = from.rank == 3 ? from.shape[1] : 1, n = from.shape[last];
  const int64_t share = std::max<int64_t>(1, copy_share / std::max<int64_t>(1, inner * n));
  threads_.parallel((rows + share - 1) / share, [&](int64_t part, int) {
    for (int64_t i = part * share; i < std::min(rows, (part + 1) * share); ++i)
      for (int64_t j = 0; j < inner; ++j)
        std::memcpy(to.f32() + i * to.stride[0] + j * to.stride[1] * (to.rank == 3),
                    from.f32() + i * from.stride[0] + j * from.stride[1] * (from.rank == 3), size_t(n) * 4);
  });
}

void CpuDevice::store_expanded(Tensor kv, Tensor rotary, const Kv& to) {
  const KvLayout& l = to.format.layout;
  const int64_t n = kv.shape[0], heads = l.heads, d_R = rotary.shape[1], d_h = l.d_k - d_R, d_v = l.d_v;
  CHECK(!l.v_in_k && kv.rank == 3 && kv.shape[1] == heads && kv.shape[2] == d_h + d_v && kv.contiguous(), "kv is {}", mla::describe(kv));
  CHECK(rotary.rank == 2 && rotary.shape[0] == n && rotary.stride[1] == 1 && n <= to.page_tokens, "rotary keys are {}",
        mla::describe(rotary));
  constexpr int64_t share = 8;
  threads_.parallel((n + share - 1) / share, [&](int64_t part, int thread) {
    ArenaScope scope(scratch(thread));
    float* row = scratch(thread).tensor(DType::f32, {l.row()}).f32();
    for (int64_t t = part * share; t < std::min(n, (part + 1) * share); ++t) {
      float *key = row, *value = row + heads * l.d_k;
      for (int64_t h = 0; h < heads; ++h, key += l.d_k, value += d_v) {
        const float* from = kv.f32() + (t * heads + h) * (d_h + d_v);
        std::memcpy(key, from, size_t(d_h) * 4);
        std::memcpy(key + d_h, rotary.f32() + t * rotary.stride[0], size_t(d_R) * 4);
        std::memcpy(value, from + d_h, size_t(d_v) * 4);
      }
      kernels_.attention.write_row(to.format, row, to.row(0, t));
    }
  });
}

}  // namespace mla
