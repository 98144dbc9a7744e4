// Products on the GPU in every size of tile, gated or not, with runs of rows and without, against double precision at random places.
#include "cuda/product.h"
#include "cuda/memory.h"
#include "ref.h"

#include <gtest/gtest.h>

#include <cmath>

namespace mla::cuda {
namespace {

constexpr float nan_value = std::numeric_limits<float>::quiet_NaN();

std::vector<uint16_t> to_bf16(std::vector<float>& x) {
  std::vector<uint16_t> out;
  for (float& v : x) out.push_back(f32_to_bf16(v)), v = bf16_to_f32(out.back());
  return out;
}

// Where a row has the code of column k, and which nibble of it (pack.h).
size_t place_of(DType type, int64_t k) {
  if (type == DType::q4_0) return size_t(k / 128 * 64 + k % 32 / 8 * 16 + k / 32 % 4 * 4 + k % 2 * 2 + k % 8 / 2 / 2);
  return size_t(k / 64 * 64 + k % 32 / 8 * 16 + k / 32 % 2 * 8 + k % 8);
}

// A stack of matrices as pack.h lays them out; `values` is what meets the activations: codes times scales are rounded to bf16 where
// `rounds`.
struct Stack {
  PackedMatrix m;
  GpuBuffer memory;
  std::vector<float> values;  // [count, rows, cols]

  Stack(DType type, int count, int rows, int cols, uint64_t seed, bool rounds) : m(packed(type, rows, cols)) {
    std::vector<std::byte> laid(size_t(m.matrix_bytes * count));
    m.data = laid.data();
    for (int64_t c = 0; c < count; ++c)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < cols; ++k) values.push_back(put(c, r, k, random_bits(seed, values.size()), rounds));
    memory = upload<std::byte>(laid);
    m.data = memory.data();
  }

 private:
  // Writes the element, a random one, and returns it.
  float put(int64_t c, int64_t r, int64_t k, uint64_t random, bool rounds) {
    auto* codes = const_cast<std::byte*>(m.codes(c, r));
    auto* scales = const_cast<std::byte*>(m.scales(c, r));
    const float size = 1 / std::sqrt(float(m.cols));
    if (m.type == DType::bf16) {
      const uint16_t bits = f32_to_bf16((float(random % 2001) / 1000 - 1) * 2 * size);
      reinterpret_cast<uint16_t*>(codes)[k] = bits;
      return bf16_to_f32(bits);
    }
    std::byte& at = codes[place_of(m.type, k)];
    float scale, code;
    if (m.type == DType::f8) {
      // As large as any that do not overflow, and not the same for neighbours.
      scale = size * (0.01f + 0.003f * float((c + r / 128 + k / 128) % 5));
      reinterpret_cast<float*>(scales)[k / 128] = scale;
      at = std::byte(random & 0xff);
      if ((random & 0x7f) == 0x7f) at = std::byte(0x38);           // no number
      if ((random & 0x70) == 0x70) at = std::byte(random & 0xbf);  // no larger than 16
      code = f8_to_f32(uint8_t(at));
    } else {
      const int range = m.type == DType::q8_0 ? 127 : 8;
      const uint16_t half = f32_to_f16(size * (1 + 0.1f * float((r + k / 32) % 7)) / float(range));
      reinterpret_cast<uint16_t*>(scales)[k / 32] = half;
      scale = f16_to_f32(half);
      if (m.type == DType::q8_0) {
        at = std::byte(random & 0xff);
        code = float(int8_t(at));
      } else {
        const int shift = int(k % 8 / 2 % 2 * 4);
        at |= std::byte((random & 15) << shift);
        code = float(int(random & 15) - 8);
      }
    }
    return rounds ? bf16_to_f32(f32_to_bf16(scale * code)) : scale * code;
  }
};

struct Case {
  DType type;
  int tile;  // 0: the kernel of few rows
  bool gated, runs;
};

class ProductTest : public testing::TestWithParam<Case> {};

TEST_P(ProductTest, AgreesWithDouble) {
  int devices = 0;
  const cudaError_t found = cudaGetDeviceCount(&devices);
  if (found == cudaErrorNoDevice || found == cudaErrorInsufficientDriver) GTEST_SKIP() << "no GPU here";
  ASSERT_EQ(found, cudaSuccess);
  const auto [type, tile, gated, runs] = GetParam();
  const int step = tile ? tile : 8;
  const bool codes = type != DType::bf16;
  for (const int cols : {40, 64, 96, 128, 1000, 2048, 2816}) {
    if (codes && cols % 32 != 0) continue;
    const int rows = 328, matrices = 3, n = 2 * step + step / 2 + 1;
    const Stack w(type, matrices, rows, cols, 1, tile > 0), up(type, matrices, rows, cols, 2, tile > 0);
    // With runs, all matrices share n rows, the last matrix has none; without, each head has n of its own.
    const int total = runs ? n : n * matrices, pitch = int(round_up(cols, 128));
    std::vector<float> x = ref::random_floats(int64_t(total) * cols, 3);
    const std::vector<uint16_t> narrow = to_bf16(x);
    std::vector<uint16_t> laid(size_t(total) * size_t(pitch), 0);
    for (int64_t i = 0; i < total; ++i)
      for (int k = 0; k < cols; ++k) laid[size_t(i * pitch + k)] = narrow[size_t(i * cols + (codes && tile ? code_column(k) : k))];
    const GpuBuffer x_gpu = upload<uint16_t>(laid);
    std::vector<cuda::Run> cut;
    std::vector<int> matrix_of(size_t(total), 0);
    const int first = n / 3;
    for (int m = 0; m < 2; ++m)
      for (int at = m ? first : 0, end = m ? n : first; at < end; at += step) cut.push_back({m, at, std::min(step, end - at)});
    for (int i = 0; i < total; ++i) matrix_of[size_t(i)] = runs ? i >= first : i / n;
    const std::vector<int32_t> count = {int32_t(cut.size())};
    cut.resize(cut.size() + 2, {9, 1 << 20, 1});  // beyond the count: not to be looked at
    const GpuBuffer cut_gpu = upload<cuda::Run>(cut), count_gpu = upload<int32_t>(count);

    std::vector<float> y(size_t(total) * rows, nan_value);
    const GpuBuffer y_gpu = upload<float>(y);
    Product p{};
    p.part[0] = {w.m, gated ? up.m : PackedMatrix{}, {y_gpu.data(), false, rows, int64_t(n) * rows, nullptr, false}};
    p.parts = 1, p.matrices = matrices, p.n = n, p.most = runs ? step : n, p.tile = tile;
    p.x = {x_gpu.data(), true, pitch, int64_t(n) * pitch, nullptr};
    if (runs)
      p.runs = reinterpret_cast<const cuda::Run*>(cut_gpu.data()), p.run_count = reinterpret_cast<const int32_t*>(count_gpu.data()),
      p.most_runs = int(cut.size());
    if (tile)
      product_gemm(p, {x_gpu.data(), total, pitch, tile}, nullptr);
    else
      product_gemv(p, nullptr);
    check(cudaDeviceSynchronize());
    y = download<float>(y_gpu.data(), y.size());
    for (const float v : y) ASSERT_FALSE(std::isnan(v));
    double worst = 0;
    // The edges of runs, tiles and blocks of rows, and places at random.
    std::vector<std::pair<int64_t, int64_t>> places;
    for (const int64_t i : {0, step - 1, step, first - 1, first, first + step - 1, n - 1, total - 1})
      for (const int64_t r : {0, 15, 63, 64, 127, 128, 255, 256, rows - 1}) places.emplace_back(std::clamp<int64_t>(i, 0, total - 1), r);
    for (uint64_t sample = 0; sample < 3000; ++sample)
      places.emplace_back(random_bits(5, sample) % uint64_t(total), random_bits(6, sample) % uint64_t(rows));
    for (const auto& place : places) {
      const int64_t i = place.first, r = place.second;
      auto dot = [&](const Stack& s) {
        double sum = 0;
        for (int64_t k = 0; k < cols; ++k)
          sum += double(s.values[size_t((matrix_of[size_t(i)] * rows + r) * cols + k)]) * x[size_t(i * cols + k)];
        return sum;
      };
      double expected = dot(w);
      if (gated) expected = expected / (1 + std::exp(-expected)) * dot(up);
      worst = std::max(worst, std::fabs(expected - y[size_t(i * rows + r)]));
    }
    EXPECT_LT(worst, 1e-4) << cols;
  }
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const DType type : {DType::bf16, DType::f8, DType::q8_0, DType::q4_0})
    for (const int tile : {0, 16, 32, 64, 128, 256})
      for (const bool gated : {false, true})
        for (const bool runs : {false, true})
          if (!(gated && tile == 256)) all.push_back({type, tile, gated, runs});
  return all;
}

INSTANTIATE_TEST_SUITE_P(Tiles, ProductTest, testing::ValuesIn(cases()), [](const auto& info) {
  return std::string(mla::info(info.param.type).name) + "_" + std::to_string(info.param.tile) + (info.param.gated ? "_gated" : "") +
         (info.param.runs ? "_runs" : "");
});

}  // namespace
}  // namespace mla::cuda
