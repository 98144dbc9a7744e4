// Times attention beside the machine's limits: for each shape µs, GB/s, GFLOP/s and the share of the limit that binds.
//   bench_attention [threads] [part of a shape's name]
#include "core/random.h"
#include "cpu/cpu.h"

#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <numeric>
#include <string>
#include <vector>

namespace mla {
namespace {

struct Case {
  const char* name;
  KvFormat format;
  int n_h;
  int batch, queries, context;  // queries at the end of each sequence's context
  int page;                     // 0: contiguous
};

constexpr KvLayout lite = KvLayout::mla(512, 64), expanded = {16, 192, 128, false}, smol = KvLayout::gqa(3, 64);
const Case cases[] = {
    {"V2-Lite decode, 4096", {lite, DType::bf16}, 16, 1, 1, 4096, 64},
    {"V2-Lite decode, 16384", {lite, DType::bf16}, 16, 1, 1, 16384, 64},
    {"V2-Lite decode, 16384, i8 cache", {lite, DType::i8}, 16, 1, 1, 16384, 64},
    {"V2-Lite decode, 16384, f16 cache", {lite, DType::f16}, 16, 1, 1, 16384, 64},
    {"V2-Lite decode, 4096, f32 cache", {lite, DType::f32}, 16, 1, 1, 4096, 64},
    {"V2-Lite decode, batch 16 at 512", {lite, DType::bf16}, 16, 16, 1, 512, 64},
    {"V2-Lite absorbed, 64 new at 4096", {lite, DType::bf16}, 16, 1, 64, 4096, 64},
    {"V2 decode (128 heads), 4096", {lite, DType::bf16}, 128, 1, 1, 4096, 64},
    {"V2-Lite expanded, 512 of 512", {expanded, DType::bf16}, 16, 1, 512, 512, 0},
    {"V2-Lite expanded, 512 of 4096", {expanded, DType::bf16}, 16, 1, 512, 4096, 0},
    {"V2-Lite expanded, 512 of 16384", {expanded, DType::bf16}, 16, 1, 512, 16384, 0},
    {"SmolLM2 decode, 4096", {smol, DType::bf16}, 9, 1, 1, 4096, 64},
    {"SmolLM2 decode, 4096, f16 cache", {smol, DType::f16}, 9, 1, 1, 4096, 64},
    {"SmolLM2 decode, 4096, f32 cache", {smol, DType::f32}, 9, 1, 1, 4096, 64},
    {"SmolLM2 decode, batch 16 at 512", {smol, DType::bf16}, 9, 16, 1, 512, 64},
    {"SmolLM2 prefill, 512 of 512", {smol, DType::bf16}, 9, 1, 512, 512, 64},
    {"MHA 32 x 128 decode, 4096", {KvLayout::mha(32, 128), DType::bf16}, 32, 1, 1, 4096, 64},
    {"GQA 32 to 8 x 128 decode, 4096", {KvLayout::gqa(8, 128), DType::bf16}, 32, 1, 1, 4096, 64},
};

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void run(const Case& c, Device& device, const Ceilings& limit) {
  const KvLayout& l = c.format.layout;
  const int page = c.page ? c.page : c.context;
  const int64_t per_sequence = (c.context + page - 1) / page, page_bytes = page * c.format.row_bytes();
  // Copies of the layer, so that a pass finds its cache in memory as a model's many layers do; at most 512 MB.
  const int64_t bytes = c.batch * per_sequence * page_bytes, layers = std::clamp<int64_t>((int64_t(512) << 20) / bytes, 1, 27);
  Buffer pool{size_t(layers * bytes)};
  std::vector<int32_t> pages(size_t(c.batch * per_sequence));
  std::iota(pages.begin(), pages.end(), 0);
  for (size_t i = pages.size(); i > 1; --i) std::swap(pages[i - 1], pages[random_bits(1, i) % i]);
  std::vector<Span> spans;
  for (int b = 0; b < c.batch; ++b)
    spans.push_back({b * c.queries, c.queries, c.context - c.queries, 0, c.context, pages.data() + b * per_sequence});

  const int64_t n = c.batch * c.queries;
  std::vector<float> rows(size_t(page * l.row())), q(size_t(n * c.n_h * l.d_k)), o(size_t(n * c.n_h * l.d_v)), lse(size_t(n * c.n_h));
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = float(random_uniform(2, i) * 2 - 1);
  for (size_t i = 0; i < q.size(); ++i) q[i] = float(random_uniform(3, i) * 2 - 1);
  std::vector<int64_t> slots(static_cast<size_t>(page));
  auto kv = [&](int64_t layer) { return Kv{c.format, pool.data() + layer * bytes, page_bytes, page}; };
  for (int64_t layer = 0; layer < layers; ++layer)
    for (int32_t p : pages) {
      std::iota(slots.begin(), slots.end(), int64_t(p) * page);
      device.store(view(rows.data(), DType::f32, {page, l.row()}), slots, kv(layer));
    }

  const Tensor query = view(q.data(), DType::f32, {n, c.n_h, l.d_k}), out = view(o.data(), DType::f32, {n, c.n_h, l.d_v}),
               sums = view(lse.data(), DType::f32, {n, c.n_h});
  std::vector<double> times;
  for (double end = seconds() + 0.6; seconds() < end || times.size() < 5;)
    for (int64_t layer = 0; layer < layers; ++layer) {
      const double start = seconds();
      device.attend(query, kv(layer), spans, {}, 0.1f, out, sums);
      times.push_back(seconds() - start);
    }
  std::nth_element(times.begin(), times.begin() + int64_t(times.size() / 2), times.end());
  const double time = times[times.size() / 2], best = *std::min_element(times.begin(), times.end());
  // A causal query sees the context up to itself.
  const double pairs = double(c.batch) * c.queries * (c.context - (c.queries - 1) * 0.5);
  const double flop = 2 * pairs * c.n_h * (l.d_k + l.d_v), read = double(c.batch) * c.context * double(c.format.row_bytes());
  const double narrow = std::max(limit.i16_gop_s, limit.bf16_gflop_s);
  const double rate = c.format.type != DType::f32 && narrow > 0 ? narrow : limit.f32_gflop_s;
  const double by_rate = flop / rate * 1e-9, by_bytes = read / limit.read_gb_s * 1e-9;
  fmt::print("{:34} {:9.1f} µs (best {:9.1f}) {:6.1f} GB/s {:6.1f} GFLOP/s  {:3.0f}% of {}\n", c.name, time * 1e6, best * 1e6,
             read / time * 1e-9, flop / time * 1e-9, 100 * std::max(by_rate, by_bytes) / time,
             by_rate > by_bytes ? "arithmetic" : "bandwidth");
}

}  // namespace
}  // namespace mla

int main(int argc, char** argv) {
  using namespace mla;
  const int threads = argc > 1 ? std::atoi(argv[1]) : 0;
  const auto device = make_cpu(threads);
  for (const Case& c : cases) {
    if (argc > 2 && std::string(c.name).find(argv[2]) == std::string::npos) continue;
    const Ceilings limit = device->probe(0.3);
    run(c, *device, limit);
  }
  const Ceilings limit = device->probe(0.5);
  fmt::print("{}: read {:.1f} GB/s, f32 {:.0f} GFLOP/s, bf16 {:.0f} GFLOP/s, int16 {:.0f} GOP/s, int8 {:.0f} GOP/s\n", device->describe(),
             limit.read_gb_s, limit.f32_gflop_s, limit.bf16_gflop_s, limit.i16_gop_s, limit.int8_gop_s);
}
