// Writing rows into the cache and reading them back as f32.
#include "core/check.h"
#include "cpu/cpu.h"

#include <algorithm>

namespace mla {
namespace {

constexpr int64_t rows_a_task = 64;  // fewer do not pay for waking a thread

void check_rows(const Tensor& rows, const Kv& kv) {
  CHECK(rows.rank == 2 && rows.dtype == DType::f32 && rows.shape[1] == kv.format.layout.row() && rows.stride[1] == 1,
        "rows are {}, the cache's {}", describe(rows), kv.format.layout.row());
}

}  // namespace

void cpu_store(CpuDevice& device, Tensor rows, std::span<const int64_t> slots, const Kv& kv) {
  check_rows(rows, kv);
  CHECK(rows.shape[0] == int64_t(slots.size()), "{} rows, {} slots", rows.shape[0], slots.size());
  const int64_t n = rows.shape[0];
  device.threads().parallel((n + rows_a_task - 1) / rows_a_task, [&](int64_t task, int) {
    for (int64_t i = task * rows_a_task; i < std::min(n, (task + 1) * rows_a_task); ++i) {
      const int64_t slot = slots[size_t(i)];
      device.kernels().attention.write_row(kv.format, rows.f32() + i * rows.stride[0],
                                           kv.row(int32_t(slot / kv.page_tokens), slot % kv.page_tokens));
    }
  });
}

void cpu_load(CpuDevice& device, const Kv& kv, const Span& span, int64_t first, Tensor rows) {
  check_rows(rows, kv);
  const int64_t n = rows.shape[0];
  CHECK(first >= 0 && first + n <= span.kv_count, "rows {} to {} of {}", first, first + n, span.kv_count);
  device.threads().parallel((n + rows_a_task - 1) / rows_a_task, [&](int64_t task, int) {
    for (int64_t i = task * rows_a_task; i < std::min(n, (task + 1) * rows_a_task); ++i) {
      const int64_t j = first + i;
      device.kernels().attention.read_row(kv.format, kv.row(span.pages[j / kv.page_tokens], j % kv.page_tokens),
                                          rows.f32() + i * rows.stride[0]);
    }
  });
}

}  // namespace mla
