// Attention on every device of this machine against the double reference, and what must hold bit for bit.
#include "attention_ref.h"
#include "core/random.h"
#include "machines.h"
#include "tiles_by_hand/kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

namespace mla {
namespace {

// Sequences over one shuffled page pool; everything that no sequence owns is NaN.
struct Problem {
  KvFormat format;
  int n_h;
  Mask mask;
  float scale;
  std::vector<std::byte> cache;
  std::vector<std::vector<int32_t>> pages;
  std::vector<Span> spans;
  std::vector<float> q;
  int64_t n = 0;
  Kv kv;

  Tensor queries() { return view(q.data(), DType::f32, {n, n_h, format.layout.d_k}); }
};

struct Sequence {
  int count, kv_count;
};

void fill_nan(std::vector<std::byte>& bytes, const KvFormat& format) {
  // A row of every type decodes to NaN: bf16, f16 and f32 read all ones as NaN, and so do the scales of codes.
  (void)format;
  std::fill(bytes.begin(), bytes.end(), std::byte(0xff));
}

Problem make_problem(Device& device, KvFormat format, int n_h, int page, std::vector<Sequence> sequences, Mask mask = {},
                     uint64_t seed = 1) {
  Problem p{format, n_h, mask, 1.0f / std::sqrt(float(format.layout.d_k)), {}, {}, {}, {}, 0, {}};
  int64_t total = 0;
  for (auto [count, kv_count] : sequences) total += (kv_count + page - 1) / page;
  std::vector<int32_t> order(size_t(total + 2));
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[random_bits(seed, i) % (i + 1)]);
  const int64_t page_bytes = page * format.row_bytes();
  p.cache.resize(order.size() * size_t(page_bytes));
  fill_nan(p.cache, format);
  p.kv = {format, p.cache.data(), page_bytes, page};
  size_t next = 0;
  uint64_t draw = 0;
  for (auto [count, kv_count] : sequences) {
    p.pages.emplace_back();
    for (int j = 0; j < kv_count; j += page) p.pages.back().push_back(order[next++]);
    std::vector<float> rows(size_t(kv_count * format.layout.row()));
    for (float& x : rows) x = float(random_normal(seed + 7, draw++));
    std::vector<int64_t> slots;
    for (int j = 0; j < kv_count; ++j) slots.push_back(int64_t(p.pages.back()[size_t(j / page)]) * page + j % page);
    device.store(view(rows.data(), DType::f32, {kv_count, format.layout.row()}), slots, p.kv);
    p.spans.push_back({int32_t(p.n), count, std::max(0, kv_count - count), 0, kv_count, nullptr});
    p.n += count;
  }
  for (size_t i = 0; i < p.spans.size(); ++i) p.spans[i].pages = p.pages[i].data();
  p.q.resize(size_t(p.n * n_h * format.layout.d_k));
  for (float& x : p.q) x = float(random_normal(seed + 8, draw++));
  return p;
}

struct Output {
  std::vector<float> o, lse;
};

Output run(Device& device, Problem& p, Spans spans, Output start = {}, Attend how = Attend::replace) {
  const int64_t d_v = p.format.layout.d_v;
  if (start.o.empty()) start = {std::vector<float>(size_t(p.n * p.n_h * d_v), nan), std::vector<float>(size_t(p.n * p.n_h), nan)};
  device.attend(p.queries(), p.kv, spans, p.mask, p.scale, view(start.o.data(), DType::f32, {p.n, p.n_h, d_v}),
                view(start.lse.data(), DType::f32, {p.n, p.n_h}), how);
  return start;
}

// f32 caches are met in f32. Others are met in bf16 by GPUs and where the CPU has fast products of it, which rounds q and the weights by up
// to 2^-8, elsewhere in f32 or in whole numbers of 12 bits and a sign.
double tolerance(const Device& device, DType type) {
  const std::string name = device.describe();
  if (type == DType::f32) return 2e-5;
  const bool bf16 = name.find("CPU") != 0 || name.find("bf16") != std::string::npos || name.find("amx") != std::string::npos ||
                    name.find("tiles") != std::string::npos;
  return bf16 ? 2e-2 : 3e-3;
}

void expect_close(const Output& got, const ref::Result& want, double tolerance) {
  ASSERT_EQ(got.o.size(), want.o.size());
  double error = 0, lse_error = 0;
  for (size_t i = 0; i < want.o.size(); ++i) {
    ASSERT_EQ(std::isnan(got.o[i]), std::isnan(want.o[i])) << "o[" << i << "]";
    if (!std::isnan(want.o[i])) error = std::max(error, std::abs(got.o[i] - want.o[i]) / std::max(1.0, std::abs(want.o[i])));
  }
  for (size_t i = 0; i < want.lse.size(); ++i) {
    ASSERT_EQ(std::isnan(got.lse[i]), std::isnan(want.lse[i])) << "lse[" << i << "]";
    if (std::isinf(want.lse[i])) { ASSERT_EQ(double(got.lse[i]), want.lse[i]) << "lse[" << i << "]"; }
    if (std::isfinite(want.lse[i])) lse_error = std::max(lse_error, std::abs(got.lse[i] - want.lse[i]));
  }
  EXPECT_LE(error, tolerance);
  EXPECT_LE(lse_error, tolerance);
}

void expect_correct(Device& device, Problem& p) {
  expect_close(run(device, p, p.spans), ref::attend(p.queries(), p.kv, p.spans, p.mask, p.scale), tolerance(device, p.format.type));
}

void expect_same(const Output& a, const Output& b) {
  ASSERT_EQ(a.o.size(), b.o.size());
  EXPECT_EQ(std::memcmp(a.o.data(), b.o.data(), a.o.size() * 4), 0);
  EXPECT_EQ(std::memcmp(a.lse.data(), b.lse.data(), a.lse.size() * 4), 0);
}

class EveryMachine : public testing::TestWithParam<Machine> {
 protected:
  std::unique_ptr<Device> device = GetParam().open(2);
};
std::vector<Machine> machines_and_tiles() {
  std::vector<Machine> all = machines();
  all.push_back({&kernels_tiles_by_hand()});
  return all;
}
INSTANTIATE_TEST_SUITE_P(Every, EveryMachine, testing::ValuesIn(machines_and_tiles()), [](const auto& info) { return info.param.name(); });

constexpr DType types[] = {DType::f32, DType::f16, DType::bf16, DType::i8, DType::f8};

struct Shape {
  const char* name;
  KvLayout layout;
  int n_h;
};
const Shape shapes[] = {
    {"mha", KvLayout::mha(4, 64), 4},
    {"mha odd", KvLayout::mha(3, 20), 3},
    {"gqa 3 to 1", KvLayout::gqa(3, 64), 9},
    {"gqa 5 to 1", KvLayout::gqa(2, 40), 10},
    {"mqa 17", KvLayout::mqa(32), 17},
    {"mla", KvLayout::mla(64, 16), 16},
    {"mla odd", KvLayout::mla(40, 8), 5},
    {"mla odd sizes", KvLayout::mla(33, 6), 3},
    {"mla full vector", KvLayout::mla(20, 12), 3},
    {"mla 128 heads", KvLayout::mla(96, 32), 128},
    {"expanded", {3, 48, 32, false}, 3},
    {"expanded odd", {2, 19, 25, false}, 4},
    {"wide value", {2, 16, 80, false}, 8},
    {"mla as published", KvLayout::mla(512, 64), 16},
    {"expanded as published", {4, 192, 128, false}, 4},
    {"gqa 4 to 1, 128", KvLayout::gqa(2, 128), 8},
    {"expanded, 96 and 64", {2, 96, 64, false}, 2},
    {"mla, one whole chunk", KvLayout::mla(128, 8), 16},
    {"mla, a value ends within a chunk", KvLayout::mla(300, 20), 6},
    {"mla, a rotary part of two chunks", KvLayout::mla(128, 140), 5},
    {"a chunk and one element", {1, 129, 257, false}, 5},
};

TEST_P(EveryMachine, AgreesWithTheReferenceForEveryLayoutTypeAndLength) {
  for (const Shape& shape : shapes) {
    for (DType type : types) {
      SCOPED_TRACE(fmt::format("{} {}", shape.name, info(type).name));
      Problem p = make_problem(*device, {shape.layout, type}, shape.n_h, 16, {{1, 1}, {1, 63}, {2, 64}, {7, 65}, {1, 130}, {20, 20}});
      expect_correct(*device, p);
    }
  }
}

TEST(Attention, ValuesWiderThanWholeNumbersTake) {
  const auto device = make_cpu(2);
  Problem p = make_problem(*device, {{1, 16, 2100, false}, DType::bf16}, 5, 16, {{20, 70}});
  expect_correct(*device, p);
}

TEST(Attention, RowsThatHoldNoNumberReachTheOutput) {
  const auto device = make_cpu(2);
  for (DType type : types)
    for (int queries : {1, 20}) {
      SCOPED_TRACE(fmt::format("{} queries, {}", queries, info(type).name));
      Problem p = make_problem(*device, {KvLayout::mla(128, 16), type}, 4, 16, {{queries, 70}});
      std::memset(p.kv.row(p.pages[0][1], 3), 0xff, size_t(p.format.row_bytes()));  // NaN in every type, or in its scales
      const Output got = run(*device, p, p.spans);
      for (float o : got.o) ASSERT_TRUE(std::isnan(o));
    }
}

TEST_P(EveryMachine, LongContextsInPieces) {
  for (DType type : types) {
    for (const Shape& shape : {Shape{"gqa", KvLayout::gqa(3, 32), 9}, Shape{"mla", KvLayout::mla(32, 16), 16}}) {
      SCOPED_TRACE(fmt::format("{} {}", shape.name, info(type).name));
      Problem p = make_problem(*device, {shape.layout, type}, shape.n_h, 64, {{1, 1000}, {2, 640}});
      expect_correct(*device, p);
    }
  }
}

TEST_P(EveryMachine, LongPrefillIsCausal) {
  for (DType type : {DType::f32, DType::bf16}) {
    Problem p = make_problem(*device, {{2, 24, 16, false}, type}, 2, 300, {{65, 300}, {200, 200}});
    expect_correct(*device, p);
  }
}

TEST_P(EveryMachine, WindowsAndNoMask) {
  for (DType type : {DType::f32, DType::bf16})
    for (Mask mask : {Mask{true, 1}, Mask{true, 5}, Mask{true, 70}, Mask{false, 0}, Mask{false, 40}}) {
      SCOPED_TRACE(mask.window);
      Problem few = make_problem(*device, {KvLayout::gqa(2, 32), type}, 4, 16, {{1, 200}, {2, 150}, {40, 190}}, mask);
      expect_correct(*device, few);
    }
}

TEST_P(EveryMachine, RowsThatSeeNothingGiveZerosAndMinusInfinity) {
  for (int count : {1, 40}) {
    Problem p = make_problem(*device, {KvLayout::gqa(2, 32), DType::bf16}, 4, 16, {{count, 0}, {count, 48}, {0, 10}, {0, 0}});
    p.spans[1].position = 0;      // a tile of the context that lies
    p.spans[1].kv_position = 20;  // after some of the queries
    expect_correct(*device, p);
    const Output out = run(*device, p, p.spans);
    EXPECT_EQ(out.o[0], 0);
    EXPECT_EQ(out.lse[0], -std::numeric_limits<float>::infinity());
  }
}

TEST_P(EveryMachine, TilesOfTheContextMergeToTheWhole) {
  for (DType type : {DType::f32, DType::bf16})
    for (int count : {1, 3, 33}) {
      SCOPED_TRACE(count);
      Problem p = make_problem(*device, {KvLayout::gqa(2, 32), type}, 4, 16, {{count, 600}});
      Output out;
      for (int from = 0, n = 0; from < 600; from += n) {
        n = std::min(160, 600 - from);
        Span part = p.spans[0];
        part.kv_position = from, part.kv_count = n, part.pages += from / 16;
        out = run(*device, p, Spans(&part, 1), out, from == 0 ? Attend::replace : Attend::merge);
      }
      expect_close(out, ref::attend(p.queries(), p.kv, p.spans, p.mask, p.scale), tolerance(*device, type));
    }
}

TEST_P(EveryMachine, MergingIntoTheUnitIsReplacing) {
  if (!GetParam().kernels) GTEST_SKIP() << "other kernels merge than replace";
  Problem p = make_problem(*device, {KvLayout::mla(32, 16), DType::f32}, 16, 16, {{2, 100}});
  const Output want = run(*device, p, p.spans);
  Output unit{std::vector<float>(want.o.size(), 0), std::vector<float>(want.lse.size(), -std::numeric_limits<float>::infinity())};
  expect_same(run(*device, p, p.spans, unit, Attend::merge), want);
}

TEST_P(EveryMachine, ResultsDependNeitherOnTheBatchNorOnTheThreads) {
  if (!GetParam().kernels) GTEST_SKIP() << "a GPU's work is shared out by the batch";
  for (const Shape& shape : {Shape{"gqa", KvLayout::gqa(3, 32), 9}, Shape{"mla", KvLayout::mla(32, 16), 16}}) {
    for (DType type : {DType::f32, DType::bf16}) {
      Problem p = make_problem(*device, {shape.layout, type}, shape.n_h, 64, {{1, 700}, {150, 200}, {3, 90}, {1, 700}});
      const Output together = run(*device, p, p.spans);
      Output alone;
      for (const Span& span : p.spans) alone = run(*device, p, Spans(&span, 1), alone);
      expect_same(alone, together);
      for (int threads : {1, 5}) expect_same(run(*GetParam().open(threads), p, p.spans), together);
    }
  }
}

// The queries of a chunk are lanes, so where a chunk begins changes nothing.
TEST_P(EveryMachine, ChunksOfAPromptGiveTheSameBits) {
  if (!GetParam().kernels) GTEST_SKIP() << "a GPU's work is shared out by the batch";
  Problem p = make_problem(*device, {KvLayout::mla(32, 16), DType::bf16}, 16, 64, {{70, 70}});
  const Output whole = run(*device, p, p.spans);
  Output chunks;
  for (int from = 0, n = 0; from < 70; from += n) {
    n = std::min(from + 7, 70 - from);
    const Span chunk{from, n, from, 0, from + n, p.spans[0].pages};
    chunks = run(*device, p, Spans(&chunk, 1), chunks);
  }
  expect_same(chunks, whole);
}

TEST_P(EveryMachine, LargeScoresDoNotOverflow) {
  for (int count : {1, 20}) {
    Problem p = make_problem(*device, {KvLayout::gqa(2, 32), DType::f32}, 4, 16, {{count, 100}});
    p.scale = 50;
    expect_close(run(*device, p, p.spans), ref::attend(p.queries(), p.kv, p.spans, p.mask, p.scale), 2e-3);
  }
}

TEST_P(EveryMachine, StridedQueriesAndOutputs) {
  Problem p = make_problem(*device, {KvLayout::gqa(2, 32), DType::f32}, 4, 16, {{3, 40}});
  const Output want = run(*device, p, p.spans);
  std::vector<float> wide(p.q.size() * 2, nan), o(want.o.size() * 2, nan), lse(want.lse);
  for (size_t row = 0; row < p.q.size() / 32; ++row) std::copy_n(p.q.data() + 32 * row, 32, wide.data() + 64 * row);
  const Tensor q_wide = slice(view(wide.data(), DType::f32, {p.n, 4, 64}), 2, 0, 32),
               o_wide = slice(view(o.data(), DType::f32, {p.n, 4, 64}), 2, 0, 32);
  device->attend(q_wide, p.kv, p.spans, p.mask, p.scale, o_wide, view(lse.data(), DType::f32, {p.n, 4}));
  for (size_t i = 0; i < want.o.size(); ++i) EXPECT_EQ(o[i / 32 * 64 + i % 32], want.o[i]);
  for (size_t i = 0; i < o.size(); ++i) {
    if (i % 64 >= 32) { EXPECT_TRUE(std::isnan(o[i])); }
  }
}

TEST(Attention, WrongShapesAreErrors) {
  const auto device = make_cpu(*available_kernels().front(), 1);
  Problem p = make_problem(*device, {KvLayout::gqa(2, 32), DType::f32}, 4, 16, {{3, 40}});
  std::vector<float> o(p.q.size()), lse(12);
  const Tensor q = p.queries(), out = view(o.data(), DType::f32, {3, 4, 32}), sums = view(lse.data(), DType::f32, {3, 4});
  EXPECT_THROW(device->attend(slice(q, 2, 0, 16), p.kv, p.spans, {}, 1, out, sums), Error);
  EXPECT_THROW(device->attend(slice(q, 1, 0, 3), p.kv, p.spans, {}, 1, out, sums), Error);
  EXPECT_THROW(device->attend(q, p.kv, p.spans, {}, 1, slice(out, 2, 0, 16), sums), Error);
  EXPECT_THROW(device->attend(q, p.kv, p.spans, {}, 1, out, slice(sums, 0, 0, 2)), Error);
  p.spans[0].count = 4;
  EXPECT_THROW(device->attend(q, p.kv, p.spans, {}, 1, out, sums), Error);
}

}  // namespace
}  // namespace mla
