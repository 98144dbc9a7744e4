// Attention over separate keys and values on the GPU against the double reference: ragged spans, shuffled pages, chunks after a context,
// tiles of a context merged; NaN wherever no row is.
#include "cuda/attention.h"
#include "close.h"
#include "cuda/sizes.h"
#include "ref.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

namespace mla::cuda {
namespace {

struct Sequence {
  int count, kv_count;
  int kv_position = 0;  // the queries are the last of position + count = kv_count if it is 0
  int position = -1;
};

struct Case {
  const char* name;
  int n_h, heads, d_k, d_v, page_tokens;
  std::vector<Sequence> sequences;
  Mask mask{};
  double spread = 1;  // of the scores
};

const std::vector<Sequence> mixed = {{1, 1}, {0, 10}, {7, 65}, {130, 130}, {64, 300}, {5, 0}, {1, 577}, {129, 129}, {200, 456}};

const Case cases[] = {
    {"v2_lite", 4, 4, 192, 128, 64, mixed},
    {"small_pages", 2, 2, 192, 128, 16, mixed},
    {"large_pages", 2, 2, 192, 128, 256, mixed},
    {"odd_pages", 2, 2, 128, 128, 24, mixed},
    {"one_page", 3, 3, 192, 128, 700, {{300, 619}}},
    {"one_page_prompt", 3, 3, 192, 128, 521, {{521, 521}}},
    {"gqa_128", 8, 2, 128, 128, 64, mixed},
    {"gqa_64", 9, 3, 64, 64, 64, mixed},
    {"mha_64", 3, 3, 64, 64, 32, mixed},
    {"mqa_64", 17, 1, 64, 64, 64, mixed},
    {"v_64", 2, 2, 96, 64, 64, mixed},
    {"not_causal", 2, 2, 192, 128, 64, mixed, {false, 0}},
    {"window", 2, 2, 128, 128, 64, mixed, {true, 100}},
    {"window_alone", 2, 2, 128, 128, 64, mixed, {false, 70}},
    {"wide_scores", 2, 2, 192, 128, 64, mixed, {}, 30},
    {"context_later", 2, 2, 192, 128, 64, {{200, 90, 100, 0}, {140, 256, 64, 64}}},
    {"decode_gqa", 8, 2, 128, 128, 64, {{1, 3000}}},
    {"decode_gqa_batch", 8, 2, 64, 64, 64, {{1, 3000}, {1, 1}, {0, 0}, {1, 700}, {3, 1025}, {1, 2049}}},
    {"decode_mha_window", 2, 2, 128, 128, 64, {{2, 2000}, {1, 900}}, {true, 600}},
    {"decode_one_page", 5, 1, 192, 128, 5000, {{4, 4097}}},
    {"many_heads", 40, 40, 192, 128, 64, {{140, 140}, {3, 200}}},
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

class AttentionTest : public testing::TestWithParam<Case> {
 protected:
  void run(bool tiles, int processors = 132) {
    const Case& c = GetParam();
    const KvFormat format{{c.heads, c.d_k, c.d_v, false}, DType::bf16};
    const int64_t row = format.layout.row(), page_bytes = c.page_tokens * format.row_bytes();
    int pages = 2, n = 0;
    for (const Sequence& s : c.sequences) pages += int(ceil_div(s.kv_count, c.page_tokens));
    std::vector<int32_t> order(static_cast<size_t>(pages));
    std::iota(order.begin(), order.end(), 0);
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_bits(1, i) % i]);
    std::vector<uint16_t> cache(size_t(pages * page_bytes / 2), 0x7fff);  // NaN
    const Kv host{format, reinterpret_cast<std::byte*>(cache.data()), page_bytes, c.page_tokens};
    std::vector<Span> spans;
    int next = 0;
    for (const Sequence& s : c.sequences) {
      spans.push_back(
          {n, s.count, s.position < 0 ? std::max(0, s.kv_count - s.count) : s.position, s.kv_position, s.kv_count, order.data() + next});
      for (int j = 0; j < s.kv_count; ++j) {
        auto* to = reinterpret_cast<uint16_t*>(host.row(order[size_t(next + j / c.page_tokens)], j % c.page_tokens));
        for (int64_t i = 0; i < row; ++i) to[i] = f32_to_bf16(float(random_normal(uint64_t(7 + n), uint64_t(j * row + i))));
      }
      n += s.count, next += int(ceil_div(s.kv_count, c.page_tokens));
    }
    std::vector<float> q = ref::random_floats(int64_t(n) * c.n_h * c.d_k, 3, c.spread);
    for (float& x : q) x = bf16_to_f32(f32_to_bf16(x));
    const float scale = 1 / std::sqrt(float(c.d_k));
    const auto expected = ref::attend(view(q.data(), DType::f32, {n, c.n_h, c.d_k}), host, spans, c.mask, scale);

    std::vector<GpuSpan> table;
    std::vector<int32_t> page_list;
    list_spans(spans, c.page_tokens, table, page_list);
    const size_t pages_in_all = page_list.size();
    page_list.push_back(0);
    const GpuBuffer cache_gpu = upload<uint16_t>(cache), q_gpu = upload<float>(q), table_gpu = upload<GpuSpan>(table),
                    pages_gpu = upload<int32_t>(page_list);
    const size_t rows = size_t(n) * size_t(c.n_h), d_v = size_t(c.d_v);
    const std::vector<float> nothing(rows * d_v, std::numeric_limits<float>::quiet_NaN());
    const GpuBuffer o = upload<float>(nothing), lse(rows * 4);
    AttentionCall call{};
    call.n = n, call.q = reinterpret_cast<const float*>(q_gpu.data()), call.q_row = c.n_h * c.d_k, call.q_head = c.d_k;
    call.base = cache_gpu.data(), call.page_bytes = page_bytes, call.page_tokens = c.page_tokens, call.format = RowFormat(format);
    call.n_h = c.n_h, call.processors = processors, call.causal = c.mask.causal, call.window = c.mask.window, call.scale = scale;
    call.o = reinterpret_cast<float*>(o.data()), call.o_row = c.n_h * c.d_v, call.o_head = c.d_v;
    call.lse = reinterpret_cast<float*>(lse.data()), call.lse_row = c.n_h, call.lse_head = 1;
    const GpuBuffer taken = upload<unsigned>(std::vector<unsigned>{0});
    call.taken = reinterpret_cast<unsigned*>(taken.data());
    auto attend = [&] {
      if (tiles) {
        ASSERT_TRUE(attend_tiles_takes(call));
        const GpuBuffer scratch(attend_tiles_scratch_bytes(call));
        if (scratch.bytes() > 0) check(cudaMemset(scratch.data(), 0xff, scratch.bytes()));
        attend_tiles(call, scratch.data(), nullptr);
        check(cudaDeviceSynchronize());
      } else {
        attend_portable(call, nullptr);
      }
      check(cudaDeviceSynchronize());
      EXPECT_EQ(download<unsigned>(taken.data(), 1)[0], 0u);
    };
    call.spans.count = int(table.size()), call.one = table[0], call.page = page_list[0];
    for (const Span& s : spans)
      call.spans.most_queries = std::max(call.spans.most_queries, s.count), call.most_seen = std::max(call.most_seen, s.kv_count);
    if (table.size() > 1) call.spans.spans = reinterpret_cast<const GpuSpan*>(table_gpu.data());
    if (table.size() > 1 || pages_in_all > 1) call.spans.pages = reinterpret_cast<const int32_t*>(pages_gpu.data());
    attend();
    expect_close(expected, o, lse);

    // The same context in two tiles of pages, the second merged into the first.
    std::vector<GpuSpan> early = table, late = table;
    if (table.size() == 1) return;
    for (size_t i = 0; i < table.size(); ++i) {
      const int before = std::min(table[i].kv_count, int(ceil_div(table[i].kv_count / 2, c.page_tokens)) * c.page_tokens);
      early[i].kv_count = before;
      late[i].kv_position += before, late[i].kv_count -= before, late[i].table += before / c.page_tokens;
    }
    const GpuBuffer early_gpu = upload<GpuSpan>(early), late_gpu = upload<GpuSpan>(late);
    check(cudaMemset(o.data(), 0xff, o.bytes()));
    call.spans.spans = reinterpret_cast<const GpuSpan*>(early_gpu.data());
    attend();
    call.merge = true, call.spans.spans = reinterpret_cast<const GpuSpan*>(late_gpu.data());
    attend();
    expect_close(expected, o, lse);
  }

 private:
  static void expect_close(const ref::Result& expected, const GpuBuffer& o, const GpuBuffer& lse) {
    const std::vector<float> got = download<float>(o.data(), expected.o.size()), sums = download<float>(lse.data(), expected.lse.size());
    mla::expect_close(expected, got, sums, 4e-3);
  }
};

bool has_gpu() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

TEST_P(AttentionTest, HopperTiles) {
  if (!has_gpu()) GTEST_SKIP() << "no GPU here";
  for (const int processors : {132, 3}) run(true, processors);  // more and fewer splits
}

TEST_P(AttentionTest, Portable) {
  if (!has_gpu()) GTEST_SKIP() << "no GPU here";
  run(false);
}

INSTANTIATE_TEST_SUITE_P(Cases, AttentionTest, testing::ValuesIn(cases), [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace mla::cuda
