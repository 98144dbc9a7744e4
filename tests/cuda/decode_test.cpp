// Absorbed decode on the GPU against the double reference: ragged lengths, shuffled pages, NaN where no row is.
#include "cuda/decode.h"
#include "close.h"
#include "core/random.h"
#include "ref.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

namespace mla::cuda {
namespace {

struct Case {
  const char* name;
  int n_h, d_c, d_R;
  int queries;  // of each sequence, or at most
  std::vector<int> lengths;
  int page_tokens = 64;
  bool causal = true;
  double spread = 1;  // of the scores
  DType type = DType::bf16;
  bool mixed_queries = false;  // 1, 2 … queries, then none
  int count(int sequence) const { return mixed_queries ? (sequence + 1) % (queries + 1) : queries; }
};

const std::vector<int> mixed = {0, 1, 63, 64, 65, 128, 200, 5, 577};

const Case cases[] = {
    {"lite", 16, 512, 64, 1, mixed},
    {"v2", 128, 512, 64, 1, mixed},
    {"v2_two_queries", 128, 512, 64, 2, {2, 66, 300, 129}},
    {"three_queries", 17, 512, 64, 3, {3, 4, 66, 300, 1000}},
    {"four_queries", 16, 512, 64, 4, {1, 4, 66, 300, 1000}},
    {"twelve_rows", 4, 512, 64, 3, {3, 4, 66, 300, 1000}},
    {"one_head", 1, 512, 64, 1, {1000}},
    {"many_pieces", 16, 512, 64, 1, {9000}},
    {"one_long_of_many", 16, 512, 64, 4, {20000, 300, 300, 300, 300, 300, 300, 300, 300, 300, 300}},
    {"most_pieces", 16, 512, 64, 1, {33700}},
    {"v2_many_pieces", 128, 512, 64, 1, {4096}},
    {"mixed_few_queries", 8, 512, 64, 2, {300, 70, 65, 700, 1, 80}, 64, true, 1, DType::bf16, true},
    {"mixed_queries", 128, 512, 64, 2, {300, 70, 65, 700, 1, 80}, 64, true, 1, DType::bf16, true},
    {"mixed_row_blocks", 48, 512, 64, 4, {700, 90, 300, 640, 129, 64, 70}, 64, true, 1, DType::bf16, true},
    {"mixed_row_blocks_fp8", 48, 512, 64, 4, {700, 0, 300, 640, 129, 64, 70}, 64, true, 1, DType::f8, true},
    {"three_slabs", 48, 512, 64, 1, {700, 90, 3}},
    {"three_row_blocks", 48, 512, 64, 4, {700, 90, 3}},
    {"odd_heads", 100, 512, 64, 1, {700, 90}},
    {"not_causal", 16, 512, 64, 4, {66, 300}, 64, false},
    {"large_pages", 16, 512, 64, 1, {66, 300, 1000}, 256},
    {"wide_scores", 16, 512, 64, 1, {500, 1500}, 64, true, 30},
    {"v2_wide_scores", 128, 512, 64, 1, {500, 1500}, 64, true, 30},
    {"v2_wide_scores_fp8", 128, 512, 64, 1, {500, 1500}, 64, true, 30, DType::f8},
    {"d_c_128", 9, 128, 64, 1, mixed},
    {"d_c_128_d_R_32", 9, 128, 32, 2, {2, 64, 300, 1000}},
    {"d_c_64", 9, 64, 32, 1, mixed},
    {"d_c_128_pairs", 128, 128, 64, 1, mixed},
    {"d_c_64_d_R_64", 70, 64, 64, 1, {700, 90, 64}},
    {"lite_fp8", 16, 512, 64, 1, mixed, 64, true, 1, DType::f8},
    {"v2_two_queries_fp8", 128, 512, 64, 2, {2, 66, 300, 129}, 64, true, 1, DType::f8},
    {"four_queries_fp8", 16, 512, 64, 4, {1, 4, 66, 300, 1000}, 128, true, 1, DType::f8},
    {"twelve_rows_fp8", 4, 512, 64, 3, {3, 4, 66, 300, 1000}, 64, true, 1, DType::f8},
    {"many_pieces_fp8", 16, 512, 64, 1, {9000}, 64, true, 1, DType::f8},
    // With 1 and 7 processors one team has sequences of a tile, and begins those of more, behind an odd number of tiles.
    {"short_fp8", 16, 512, 64, 1, {64, 1, 0, 0, 129, 65, 0, 64, 200, 0, 64, 64, 64, 128, 0, 5}, 64, true, 1, DType::f8},
    {"odd_pieces_fp8", 16, 512, 64, 1, {64, 13, 26, 891, 166, 81, 147}, 64, true, 1, DType::f8},
    {"large_pages_fp8", 16, 512, 64, 1, {66, 300, 1000}, 256, true, 1, DType::f8},
    {"not_causal_fp8", 4, 512, 64, 4, {66, 300}, 64, false, 1, DType::f8},
    {"mixed_few_queries_fp8", 8, 512, 64, 2, {300, 70, 65, 700, 1, 80}, 64, true, 1, DType::f8, true},
    {"wide_scores_fp8", 16, 512, 64, 1, {500, 1500}, 64, true, 30, DType::f8},
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

bool has_gpu(bool hopper) {
  int count = 0;
  cudaDeviceProp p{};
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0 || cudaGetDeviceProperties(&p, 0) != cudaSuccess) return false;
  return !hopper || (p.major == 9 && p.minor == 0);
}

// A row of bf16 or of f8.
void write_row(const KvFormat& f, const std::vector<float>& row, std::byte* to) {
  auto* kept = reinterpret_cast<uint16_t*>(to + (f.coded() ? f.kept_offset() : 0));
  const int64_t codes = f.quantised();
  for (size_t i = 0; i < row.size(); ++i)
    if (int64_t(i) >= codes) *kept++ = f32_to_bf16(row[i]);
  for (int64_t g = 0; g < codes; g += f.group()) {
    float most = 0;
    for (int64_t i = g; i < g + f.group(); ++i) most = std::max(most, std::fabs(row[size_t(i)]));
    const float scale = f8_scale(most);
    std::memcpy(to + f.scale_offset() + g / f.group() * 4, &scale, 4);
    for (int64_t i = g; i < g + f.group(); ++i) to[i] = std::byte(f32_to_f8(scale > 0 ? row[size_t(i)] / scale : 0));
  }
}

class Decode : public testing::TestWithParam<Case> {
 protected:
  // Fills cache and queries, runs `kernel` with a plan for `processors`, and compares.
  void run(void (*kernel)(const DecodeCall&, cudaStream_t), int processors) {
    const Case& c = GetParam();
    const KvFormat format{KvLayout::mla(c.d_c, c.d_R), c.type};
    const int d_k = c.d_c + c.d_R, sequences = int(c.lengths.size());
    auto pages_of = [&](int length) { return (length + c.page_tokens - 1) / c.page_tokens; };
    const int pages = std::transform_reduce(c.lengths.begin(), c.lengths.end(), 3, std::plus<>(), pages_of);
    std::vector<int32_t> order(static_cast<size_t>(pages));
    std::iota(order.begin(), order.end(), 0);
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_bits(1, i) % i]);

    const int64_t page_bytes = c.page_tokens * format.row_bytes();
    std::vector<std::byte> cache(static_cast<size_t>(pages * page_bytes), std::byte(0xff));  // NaN in every type, or in its scales
    const Kv host{format, cache.data(), page_bytes, c.page_tokens};
    std::vector<Span> spans;
    int next = 0, queries = 0;
    for (int s = 0; s < sequences; ++s) {
      const int length = c.lengths[size_t(s)];
      spans.push_back({queries, c.count(s), length - c.count(s), 0, length, order.data() + next});
      queries += c.count(s);
      for (int j = 0; j < length; ++j) {
        std::vector<float> row(static_cast<size_t>(d_k));
        // Codes' scales differ within tiles and from one to the next.
        const double size = j % 11 == 10 ? 0 : c.type == DType::f8 ? std::exp2(j * 3 % 7 - 3 + j / 64 % 3) : 1;
        for (int i = 0; i < d_k; ++i) row[size_t(i)] = float(size * random_normal(uint64_t(7 + s), uint64_t(j) * 1024 + uint64_t(i)));
        write_row(format, row, host.row(order[size_t(next + j / c.page_tokens)], j % c.page_tokens));
      }
      next += pages_of(length);
    }
    const int64_t n = queries, rows = n * c.n_h;
    std::vector<float> q = ref::random_floats(rows * d_k, 3, c.spread);
    if (rows > 1) std::fill_n(q.begin() + rows / 2 * d_k, d_k, 0.f);
    if (c.type == DType::f8)  // which bring queries into f16's range: rows differ, and where their largest are
      for (int64_t i = 0; i < rows; ++i)
        for (int j = 0; j < d_k; ++j) q[size_t(i * d_k + j)] *= float(std::exp2(-(i % 5) * 4 - 3 * std::abs(j / 128 - (i % 2 ? 3 : 0))));
    std::vector<uint16_t> q_bf16(q.size());
    for (size_t i = 0; i < q.size(); ++i) q_bf16[i] = f32_to_bf16(q[i]), q[i] = bf16_to_f32(q_bf16[i]);
    const float scale = 1 / std::sqrt(float(d_k));
    const auto expected = ref::attend(view(q.data(), DType::f32, {n, c.n_h, d_k}), host, spans, {c.causal, 0}, scale);

    const DecodePlan plan = plan_decode(spans, c.causal, c.n_h, c.page_tokens, processors);
    const UploadedPlan uploaded(plan, nullptr);
    const GpuBuffer cache_gpu = upload<std::byte>(cache), q_gpu = upload<uint16_t>(q_bf16);
    const GpuBuffer scratch(decode_scratch_bytes(plan.slots, plan.most_rows, c.d_c));
    for (const bool f32 : {true, false}) {
      const GpuBuffer o(size_t(rows * c.d_c) * 4), lse(size_t(rows) * 4);
      for (const GpuBuffer* b : {&o, &lse, &scratch})
        if (b->bytes() > 0) check(cudaMemset(b->data(), 0xff, b->bytes()));
      const DecodeCall call{q_gpu.data(),
                            int(n),
                            {format, cache_gpu.data(), page_bytes, c.page_tokens},
                            uploaded.view(),
                            c.n_h,
                            scale,
                            f32,
                            o.data(),
                            reinterpret_cast<float*>(lse.data()),
                            scratch.data()};
      kernel(call, nullptr);
      check(cudaDeviceSynchronize());
      std::vector<float> got = f32 ? download<float>(o.data(), size_t(rows * c.d_c)) : std::vector<float>();
      if (!f32)
        for (const uint16_t x : download<uint16_t>(o.data(), size_t(rows * c.d_c))) got.push_back(bf16_to_f32(x));
      const std::vector<float> sums = download<float>(lse.data(), size_t(rows));
      expect_close(expected, got, sums, 5e-3);
    }
  }
};

TEST_P(Decode, HopperWholeSequences) {
  if (!has_gpu(true)) GTEST_SKIP() << "no Hopper GPU here";
  run(decode_sm90, 1);
}

TEST_P(Decode, HopperSplit) {
  if (!has_gpu(true)) GTEST_SKIP() << "no Hopper GPU here";
  for (const int processors : {7, 132}) run(decode_sm90, processors);
}

TEST_P(Decode, Portable) {
  if (!has_gpu(false)) GTEST_SKIP() << "no GPU here";
  run(decode_portable, 1);
}

INSTANTIATE_TEST_SUITE_P(Cases, Decode, testing::ValuesIn(cases), [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace mla::cuda
