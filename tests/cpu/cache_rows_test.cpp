// Rows written to the cache come back as their type allows, and nothing else is touched.
#include "attention_ref.h"
#include "core/random.h"
#include "machines.h"
#include "ref.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>

namespace mla {
namespace {

constexpr DType cache_types[] = {DType::f32, DType::f16, DType::bf16, DType::i8, DType::f8};
const KvLayout layouts[] = {KvLayout::mla(512, 64), KvLayout::mla(40, 8), KvLayout::gqa(3, 64), {2, 19, 25, false}, KvLayout::mha(5, 80)};

class Rows : public testing::TestWithParam<Machine> {
 protected:
  std::unique_ptr<Device> device = GetParam().open(2);

  std::vector<float> random_rows(int64_t n, int64_t row, uint64_t seed) {
    std::vector<float> x(size_t(n * row));
    for (size_t i = 0; i < x.size(); ++i) x[i] = float(random_normal(seed, i) * std::exp2(double(i / 64 % 7) - 3));
    return x;
  }
};
INSTANTIATE_TEST_SUITE_P(Every, Rows, testing::ValuesIn(machines()), [](const auto& info) { return info.param.name(); });

// The largest error of element e of a row: half a unit of the type, or half a step of its group's scale.
double bound(const KvFormat& f, const float* row, int64_t e) {
  const KvLayout& l = f.layout;
  const double x = std::abs(row[e]);
  if (f.type == DType::f32) return 0;
  if (f.type == DType::f16) return x * 0x1p-11 + 0x1p-24;
  if (f.type == DType::bf16) return x * 0x1p-8;
  const int64_t keys = int64_t(l.heads) * l.d_k, d = e < keys ? e % l.d_k : (e - keys) % l.d_v;
  if (l.v_in_k && d >= l.d_v) return x * 0x1p-8;
  const int64_t length = e < keys && !l.v_in_k ? l.d_k : l.d_v, first = e - d % f.group();
  const int64_t group = std::min<int64_t>(f.group(), length - (d - d % f.group()));
  double most = 0;
  for (int64_t i = 0; i < group; ++i) most = std::max<double>(most, std::abs(row[first + i]));
  if (f.type == DType::f8) return std::max(x * 0x1p-4, f8_scale(float(most)) * 0x1p-10);
  return most / 127 * 0.5001;
}

TEST_P(Rows, ComeBackAsTheirTypeAllows) {
  for (const KvLayout& layout : layouts) {
    for (DType type : cache_types) {
      const KvFormat format{layout, type};
      SCOPED_TRACE(fmt::format("{} {} {}", layout.d_k, layout.d_v, info(type).name));
      constexpr int page = 8, n = 21;
      std::vector<std::byte> cache(size_t(5 * page * format.row_bytes()), std::byte(0xa5));
      const std::vector<std::byte> before = cache;
      const Kv kv{format, cache.data(), page * format.row_bytes(), page};
      const std::vector<int32_t> pages = {3, 0, 4};
      std::vector<int64_t> slots;
      for (int j = 0; j < n; ++j) slots.push_back(pages[size_t(j / page)] * page + j % page);

      const int64_t row = layout.row();
      std::vector<float> rows = random_rows(n, row + 3, 5);
      device->store(slice(view(rows.data(), DType::f32, {n, row + 3}), 1, 0, row), slots, kv);
      const Span span{0, 0, 0, 0, n, pages.data()};
      std::vector<float> back(size_t((n - 2) * row), NAN);
      device->load(kv, span, 2, view(back.data(), DType::f32, {n - 2, row}));

      for (int j = 2; j < n; ++j) {
        const float* want = rows.data() + j * (row + 3);
        const std::vector<double> decoded = ref::decode_row(format, kv.row(pages[size_t(j / page)], j % page));
        for (int64_t e = 0; e < row; ++e) {
          const float got = back[size_t((j - 2) * row + e)];
          ASSERT_LE(std::abs(got - want[e]), bound(format, want, e)) << "row " << j << " element " << e;
          ASSERT_NEAR(got, decoded[size_t(e)], std::abs(decoded[size_t(e)]) * 1e-7) << "row " << j << " element " << e;
        }
      }
      // Rows nobody wrote are as they were.
      for (int64_t slot = 0; slot < 5 * page; ++slot) {
        if (std::find(slots.begin(), slots.end(), slot) != slots.end()) continue;
        const size_t at = size_t(slot * format.row_bytes());
        ASSERT_TRUE(
            std::equal(cache.begin() + int64_t(at), cache.begin() + int64_t(at) + format.row_bytes(), before.begin() + int64_t(at)));
      }
    }
  }
}

TEST_P(Rows, OfLatentsAreNormedAndRotatedAndQueriesFollow) {
  for (const auto& [d_c, d_R, d_h, n] : {std::array{512, 64, 128, 1}, std::array{512, 64, 128, 5}, std::array{40, 8, 24, 5},
                                         std::array{40, 8, 136, 5}, std::array{40, 8, 24, 9}}) {
    constexpr int heads = 19;
    std::vector<float> matrices = ref::random_floats(heads * d_c * d_h, 10);
    std::vector<uint16_t> narrow;
    for (float& x : matrices) narrow.push_back(f32_to_bf16(x)), x = bf16_to_f32(narrow.back());
    const Weight w = device->pack(view(narrow.data(), DType::bf16, {heads, d_c, d_h}));
    std::vector<ref::Matrix> of_head;
    for (int h = 0; h < heads; ++h) of_head.push_back(ref::to_double(matrices.data() + h * d_c * d_h, d_c, d_h, d_h));
    for (const DType type : cache_types)
      for (const bool interleaved : {false, true}) {
        SCOPED_TRACE(fmt::format("{} {} {} {} {}", d_c, d_h, n, info(type).name, interleaved));
        const KvFormat format{KvLayout::mla(d_c, d_R), type};
        std::vector<std::byte> cache(size_t(n * format.row_bytes()), std::byte(0xff));
        const Kv kv{format, cache.data(), n * format.row_bytes(), n};
        std::vector<float> rows = random_rows(n, d_c + d_R, 6), norm = ref::random_floats(d_c, 7),
                           angles = ref::random_floats(n * d_R / 2, 8, 10);
        const std::vector<float> before = rows;
        std::vector<float> cos_sin;
        for (const float a : angles) cos_sin.push_back(std::cos(a)), cos_sin.push_back(std::sin(a));
        std::vector<int64_t> slots;
        for (int i = 0; i < n; ++i) slots.push_back((i * 2 + n / 2) % n);
        const int d_q = d_h + d_R, d_l = d_c + d_R;
        std::vector<float> queries = ref::random_floats(n * heads * (d_q + 3), 9), to(size_t(n * heads * (d_l + 5)), NAN);
        const Absorbed absorbed{slice(view(queries.data(), DType::f32, {n, heads, d_q + 3}), 2, 3, d_q), w,
                                slice(view(to.data(), DType::f32, {n, heads, d_l + 5}), 2, 4, d_l)};
        device->store_latents(view(rows.data(), DType::f32, {n, d_c + d_R}), view(norm.data(), DType::f32, {d_c}), 1e-6f,
                              view(cos_sin.data(), DType::f32, {n, d_R / 2, 2}), interleaved, slots, kv, &absorbed);
        for (int i = 0; i < n; ++i) {
          const auto row = before.begin() + i * (d_c + d_R);
          const ref::Row turns{angles.begin() + i * d_R / 2, angles.begin() + (i + 1) * d_R / 2};
          ref::Row want = ref::rms_norm({row, row + d_c}, {norm.begin(), norm.end()}, 1e-6);
          const ref::Row key = ref::rope({row + d_c, row + d_c + d_R}, turns, interleaved);
          want.insert(want.end(), key.begin(), key.end());
          EXPECT_LT(ref::relative_error(rows.data() + i * (d_c + d_R), want), 1e-5);
          for (int h = 0; h < heads; ++h) {
            const auto query = queries.begin() + (i * heads + h) * (d_q + 3) + 3;
            const float* got = to.data() + (i * heads + h) * (d_l + 5) + 4;
            EXPECT_LT(ref::relative_error(got, ref::product(of_head[size_t(h)], {query, query + d_h})), 1e-2);
            EXPECT_LT(ref::relative_error(got + d_c, ref::rope({query + d_h, query + d_q}, turns, interleaved)), 1e-5);
            EXPECT_TRUE(std::isnan(got[-1]) && std::isnan(got[d_l]));
          }
          const std::vector<double> stored = ref::decode_row(format, kv.row(0, slots[size_t(i)]));
          for (int64_t e = 0; e < d_c + d_R; ++e)
            ASSERT_LE(std::abs(stored[size_t(e)] - want[size_t(e)]), bound(format, rows.data() + i * (d_c + d_R), e) * 1.01 + 1e-4) << e;
        }
      }
  }
}

TEST_P(Rows, OfZerosAndOfTinyNumbersStayFinite) {
  for (float x : {0.0f, 1e-40f, 1e-30f}) {
    const KvFormat format{KvLayout::mla(64, 8), DType::i8};
    std::vector<std::byte> cache(size_t(format.row_bytes()));
    const Kv kv{format, cache.data(), format.row_bytes(), 1};
    std::vector<float> row(72, x), back(72, NAN);
    const int64_t slot = 0;
    const int32_t page = 0;
    device->store(view(row.data(), DType::f32, {1, 72}), {&slot, 1}, kv);
    device->load(kv, {0, 0, 0, 0, 1, &page}, 0, view(back.data(), DType::f32, {1, 72}));
    for (float y : back) EXPECT_NEAR(y, x, 1e-30f);
  }
}

TEST_P(Rows, AreTheSameOnEveryInstructionSet) {
  for (DType type : cache_types) {
    const KvFormat format{KvLayout::mla(40, 8), type};
    std::vector<std::byte> here(size_t(3 * format.row_bytes())), plain(here.size());
    const std::vector<float> rows = random_rows(3, 48, 9);
    const std::vector<int64_t> slots = {2, 0, 1};
    Tensor x = view(const_cast<float*>(rows.data()), DType::f32, {3, 48});
    device->store(x, slots, {format, here.data(), format.row_bytes(), 1});
    make_cpu(kernels_plain(), 1)->store(x, slots, {format, plain.data(), format.row_bytes(), 1});
    EXPECT_EQ(here, plain) << info(type).name;
  }
}

TEST(CacheRows, WrongShapesAreErrors) {
  const auto device = make_cpu(kernels_plain(), 1);
  const KvFormat format{KvLayout::mla(40, 8), DType::f32};
  std::vector<std::byte> cache(size_t(4 * format.row_bytes()));
  const Kv kv{format, cache.data(), 4 * format.row_bytes(), 4};
  std::vector<float> rows(3 * 48);
  const std::vector<int64_t> slots = {0, 1, 2};
  const int32_t page = 0;
  EXPECT_THROW(device->store(view(rows.data(), DType::f32, {3, 47}), slots, kv), Error);
  EXPECT_THROW(device->store(view(rows.data(), DType::f32, {2, 48}), slots, kv), Error);
  EXPECT_THROW(device->load(kv, {0, 0, 0, 0, 3, &page}, 1, view(rows.data(), DType::f32, {3, 48})), Error);
}

}  // namespace
}  // namespace mla
