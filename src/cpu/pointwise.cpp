// Norms, rotation and routing: rows shared out over threads where there are enough of them.
#include "core/check.h"
#include "cpu/cpu.h"

#include <algorithm>
#include <limits>

namespace mla {
namespace {

// Below this many elements a parallel loop costs more than it saves.
constexpr int64_t worth_sharing = 32768;

template <class Row>
void for_rows(Threads& threads, int64_t n, int64_t elements, Row row) {
  if (n * elements < worth_sharing) {
    for (int64_t i = 0; i < n; ++i) row(i);
    return;
  }
  const int64_t step = std::max<int64_t>(1, worth_sharing / 4 / elements), pieces = (n + step - 1) / step;
  threads.parallel(pieces, [&](int64_t p, int) {
    for (int64_t i = p * step; i < std::min(n, (p + 1) * step); ++i) row(i);
  });
}

constexpr float never = -std::numeric_limits<float>::infinity();

// Index of the largest score; the lower one of equals.
int best(const float* score, int n) {
  int at = 0;
  for (int i = 1; i < n; ++i)
    if (score[i] > score[at]) at = i;
  return at;
}

// Leaves only the experts of the best groups in the running (section 2.2.2, with a group's best expert as its score).
void keep_groups(float* score, const RouterConfig& c) {
  const int size = c.experts / c.groups;
  uint64_t kept = 0;
  for (int taken = 0; taken < c.top_groups; ++taken) {
    int chosen = -1;
    float most = never;
    for (int g = 0; g < c.groups; ++g) {
      const float s = *std::max_element(score + g * size, score + (g + 1) * size);
      if (!(kept >> g & 1) && (chosen < 0 || s > most)) chosen = g, most = s;
    }
    kept |= uint64_t(1) << chosen;
  }
  for (int i = 0; i < c.experts; ++i)
    if (!(kept >> (i / size) & 1)) score[i] = never;
}

}  // namespace

void CpuDevice::rms_norm(Tensor x, Tensor weight, float eps, Tensor y) {
  const int64_t n = x.shape[0], d = x.shape[1];
  CHECK(x.rank == 2 && y.rank == 2 && y.shape[0] == n && y.shape[1] == d && weight.count() == d, "norm of {} by {} into {}",
        mla::describe(x), mla::describe(weight), mla::describe(y));
  for_rows(threads_, n, d,
           [&](int64_t i) { kernels_.rms_norm(x.f32() + i * x.stride[0], weight.f32(), eps, d, y.f32() + i * y.stride[0]); });
}

void CpuDevice::rope(Tensor x, Tensor cos_sin, bool interleaved, Tensor y) {
  const int64_t n = x.shape[0], heads = x.shape[1], d = x.shape[2];
  CHECK(x.rank == 3 && d % 2 == 0 && cos_sin.shape[0] == n && cos_sin.count() == n * d, "rotation of {} by {}", mla::describe(x),
        mla::describe(cos_sin));
  CHECK(y.rank == 3 && y.dtype == DType::f32 && y.shape[0] == n && y.shape[1] == heads && y.shape[2] == d, "rotation of {} into {}",
        mla::describe(x), mla::describe(y));
  for_rows(threads_, n, heads * d, [&](int64_t i) {
    for (int64_t h = 0; h < heads; ++h) {
      float* to = y.f32() + i * y.stride[0] + h * y.stride[1];
      if (y.data != x.data) std::copy_n(x.f32() + i * x.stride[0] + h * x.stride[1], d, to);
      kernels_.rope(to, cos_sin.f32() + i * cos_sin.stride[0], d, interleaved);
    }
  });
}

void CpuDevice::route(Tensor logits, const RouterConfig& c, Routing out) {
  const int64_t n = logits.shape[0];
  const bool limited = c.gating == Gating::group_limited_greedy;
  CHECK(logits.rank == 2 && logits.shape[1] == c.experts && c.top_k > 0 && c.top_k <= c.experts, "{} for {} of {} experts",
        mla::describe(logits), c.top_k, c.experts);
  CHECK(out.expert.count() == n * c.top_k && out.weight.count() == n * c.top_k && out.expert.contiguous() && out.weight.contiguous(),
        "routing of {} into {}", mla::describe(logits), mla::describe(out.expert));
  CHECK(!limited || (c.groups > 0 && c.groups <= 64 && c.experts % c.groups == 0 && c.top_groups > 0 && c.top_groups <= c.groups &&
                     c.top_k <= c.experts / c.groups * c.top_groups),
        "{} of {} groups of {} experts, {} chosen", c.top_groups, c.groups, c.experts, c.top_k);
  ArenaScope scope(scratch_);
  float* scores = scratch_.tensor(DType::f32, {n, c.experts}).f32();
  for_rows(threads_, n, int64_t(c.experts) * 16, [&](int64_t i) {
    float* score = scores + i * c.experts;
    std::copy_n(logits.f32() + i * logits.stride[0], c.experts, score);
    kernels_.softmax(score, c.experts);
    if (limited) keep_groups(score, c);
    auto* expert = out.expert.as<int32_t>() + i * c.top_k;
    float *weight = out.weight.f32() + i * c.top_k, total = 0;
    for (int k = 0; k < c.top_k; ++k) {
      const int e = best(score, c.experts);
      expert[k] = e, weight[k] = score[e], total += score[e];
      score[e] = never;
    }
    const float scale = c.renormalise && c.top_k > 1 ? 1 / (total + 1e-20f) : c.scale;
    for (int k = 0; k < c.top_k; ++k) weight[k] *= scale;
  });
}

}  // namespace mla
