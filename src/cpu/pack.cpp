// Weights from the file's order to the kernels' (pack.h), and single rows of them back.
#include "cpu/pack.h"

#include "core/check.h"
#include "core/quant.h"
#include "cpu/cpu.h"

#include <cstring>

namespace mla {
namespace {

template <int width>
void interleave(const PackedField& f, const std::byte* const (&rows)[lanes], std::byte* to) {
  for (int e = 0; e < f.count; ++e, to += lanes * width)
    for (int r = 0; r < lanes; ++r) std::memcpy(to + r * width, rows[r] + f.from + e * width, width);
}

// One block of sixteen rows into a unit.
void pack_block(const PackedFormat& format, int block, const std::byte* const (&rows)[lanes], std::byte* unit) {
  for (int i = 0; i < format.fields; ++i) {
    const PackedField& f = format.field[i];
    std::byte* to = unit + f.to + block * f.step;
    if (f.width == 1)
      interleave<1>(f, rows, to);
    else if (f.width == 2)
      interleave<2>(f, rows, to);
    else
      interleave<4>(f, rows, to);
    if (f.flip)
      for (int j = 0; j < f.count * f.width * lanes; ++j) to[j] ^= std::byte(f.flip);
  }
}

// Rows [16 g, 16 g + n) of a matrix whose rows are `pitch` bytes apart and `bytes` long. Missing rows and columns become zeros.
void pack_group(const PackedFormat& format, const std::byte* rows, int n, int64_t pitch, int64_t bytes, int64_t units, std::byte* to) {
  constexpr std::byte zeros[256] = {};
  std::byte tail[lanes][256];
  const int blocks = format.unit_cols / format.block_cols;
  for (int64_t u = 0; u < units; ++u, to += format.unit_bytes)
    for (int b = 0; b < blocks; ++b) {
      const int64_t at = (u * blocks + b) * format.block_bytes, left = std::min<int64_t>(bytes - at, format.block_bytes);
      const std::byte* source[lanes];
      for (int r = 0; r < lanes; ++r) {
        source[r] = r < n && left > 0 ? rows + r * pitch + at : zeros;
        if (r < n && left > 0 && left < format.block_bytes) {
          std::memset(tail[r], 0, sizeof tail[r]);
          std::memcpy(tail[r], source[r], size_t(left));
          source[r] = tail[r];
        }
      }
      pack_block(format, b, source, to);
    }
}

// Row r of a group as the file had it, `units` units long.
void unpack_row(const PackedFormat& format, const std::byte* group, int r, int64_t units, std::byte* to) {
  const int blocks = format.unit_cols / format.block_cols;
  for (int64_t u = 0; u < units; ++u, group += format.unit_bytes)
    for (int b = 0; b < blocks; ++b, to += format.block_bytes)
      for (int i = 0; i < format.fields; ++i) {
        const PackedField& f = format.field[i];
        const std::byte* from = group + f.to + b * f.step + r * f.width;
        for (int e = 0; e < f.count; ++e) std::memcpy(to + f.from + e * f.width, from + e * lanes * f.width, size_t(f.width));
        if (f.flip)
          for (int j = 0; j < f.count * f.width; ++j) to[f.from + j] ^= std::byte(f.flip);
      }
}

}  // namespace

Weight CpuDevice::pack(std::span<const Tensor> pieces) {
  CHECK(!pieces.empty(), "nothing to pack");
  const Tensor& first = pieces[0];
  const bool f8 = first.dtype == DType::f8;  // which the kernels meet as bf16
  const DType held = f8 ? DType::bf16 : first.dtype;
  const PackedFormat format = packed_format(held);
  CHECK(format.unit_cols > 0, "no products with {} weights", info(first.dtype).name);
  CHECK(first.rank == 2 || first.rank == 3, "weights are [rows, cols] or [n, rows, cols], not {}", mla::describe(first));
  const int64_t rows = first.shape[first.rank - 2], cols = first.shape[first.rank - 1];
  CHECK(rows > 0 && cols > 0 && cols % info(first.dtype).block == 0, "rows of {} are no whole blocks", mla::describe(first));
  Weight w;
  w.dtype = held, w.rows = rows, w.cols = cols;
  for (const Tensor& t : pieces) {
    CHECK(t.dtype == first.dtype && (t.rank == 2 || t.rank == 3) && t.shape[t.rank - 2] == rows && t.shape[t.rank - 1] == cols,
          "{} does not stack on {}", mla::describe(t), mla::describe(first));
    CHECK(cols == 1 || t.stride[t.rank - 1] == 1, "columns are {} apart", t.stride[t.rank - 1]);
    CHECK(!f8 || (t.scales && t.contiguous()), "fp8 weights {} without scales, or with gaps", mla::describe(t));
    w.count += t.rank == 3 ? t.shape[0] : 1;
  }
  const int64_t groups = packed_groups(rows), group_bytes = packed_group_bytes(w.dtype, cols), units = packed_units(w.dtype, cols);
  w.matrix_bytes = (groups * group_bytes + 63) / 64 * 64;
  w.owner = std::make_shared<Buffer>(size_t(w.bytes()));
  w.data = w.owner->data();

  int64_t done = 0;
  for (const Tensor& t : pieces) {
    const int64_t matrices = t.rank == 3 ? t.shape[0] : 1, pitch = row_bytes(t.dtype, t.stride[t.rank - 2]);
    const int64_t matrix_pitch = t.rank == 3 ? row_bytes(t.dtype, t.stride[0]) : 0;
    threads_.parallel(matrices * groups, [&](int64_t item, int thread) {
      const int64_t m = item / groups, g = item % groups, n = std::min<int64_t>(lanes, rows - lanes * g);
      std::byte* to = w.data + (done + m) * w.matrix_bytes + g * group_bytes;
      if (!f8) {
        const auto* from = static_cast<const std::byte*>(t.data) + m * matrix_pitch + lanes * g * pitch;
        return pack_group(format, from, int(n), pitch, row_bytes(t.dtype, cols), units, to);
      }
      ArenaScope scope(scratch(thread));
      const Tensor row = scratch(thread).tensor(DType::f32, {cols}), decoded = scratch(thread).tensor(held, {n, cols});
      for (int64_t r = 0; r < n; ++r) {
        dequantise(row_of(t, m * rows + lanes * g + r), row.f32());
        quantise(held, row.f32(), row_of(decoded, r).data, cols);
      }
      pack_group(format, decoded.as<std::byte>(), int(n), row_bytes(held, cols), row_bytes(held, cols), units, to);
    });
    done += matrices;
  }
  return w;
}

void CpuDevice::embed(std::span<const int32_t> ids, const Weight& w, Tensor out) {
  CHECK(w.count == 1 && out.rank == 2 && out.shape[0] == int64_t(ids.size()) && out.shape[1] == w.cols, "{} ids of [{}, {}] into {}",
        ids.size(), w.rows, w.cols, mla::describe(out));
  const PackedFormat format = packed_format(w.dtype);
  const int64_t units = packed_units(w.dtype, w.cols), group_bytes = packed_group_bytes(w.dtype, w.cols);
  for (int32_t id : ids) CHECK(id >= 0 && id < w.rows, "row {} of {}", id, w.rows);
  auto row = [&](int64_t i, int thread) {
    ArenaScope scope(scratch(thread));
    const int64_t id = ids[size_t(i)];
    auto* bytes = static_cast<std::byte*>(scratch(thread).bytes(size_t(units * format.unit_bytes / lanes)));
    unpack_row(format, w.data + id / lanes * group_bytes, int(id % lanes), units, bytes);
    dequantise(w.dtype, bytes, out.f32() + i * out.stride[0], w.cols);
  };
  if (ids.size() < 8)
    for (size_t i = 0; i < ids.size(); ++i) row(int64_t(i), 0);
  else
    threads_.parallel(int64_t(ids.size()), row);
}

}  // namespace mla
