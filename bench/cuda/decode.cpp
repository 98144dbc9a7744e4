// Absorbed decode on the GPU: checks each shape against the portable kernel, then times it beside the machine's limits and FlashMLA's
// figures (bf16), or the bf16 cache (fp8).
//   bench_cuda_decode [bf16 or fp8, or bf16-clean or fp8-clean] [part of a shape's name] [what an item costs, in tiles] [fewest tiles of a
//   piece]
// A shape's name is heads x batch x queries x context, as 16x64x1x4096. Runs start behind an L2 cache full of what a memset wrote, which
// has to go to memory first, as the protocol of the figures has it; with -clean what is there has been read and can be dropped.
#include "cuda/decode.h"
#include "core/check.h"
#include "core/random.h"
#include "kernels.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <string>
#include <thread>

namespace mla::cuda {
namespace {

// FlashMLA's release of 2026-04, measured by this protocol on an H100 80GB HBM3; µs, 0 where there is no figure.
struct Shape {
  int heads, batch, queries, context;
  double flash_us;
};

std::vector<Shape> shapes() {
  constexpr int contexts[] = {1024, 4096, 8192, 16384, 32768};
  constexpr struct {
    int heads, batch;
    double us[5];
  } flash[] = {
      {128, 1, {17.8, 24.3, 30.5, 43.8, 46.7}},     {128, 4, {19.5, 32.1, 43.4, 54.4, 82.3}},
      {128, 16, {28.2, 52.4, 81.1, 137.7, 255.5}},  {128, 64, {44.7, 132.5, 247.7, 502.5, 963.0}},
      {128, 128, {93.0, 259.4, 517.9, 992.5, 0}},   {16, 1, {17.1, 29.2, 31.6, 48.4, 54.1}},
      {16, 4, {17.7, 25.3, 33.4, 48.4, 76.6}},      {16, 16, {22.3, 44.0, 72.0, 126.0, 234.9}},
      {16, 64, {45.1, 125.6, 235.3, 442.8, 846.4}}, {16, 128, {75.9, 231.6, 439.8, 848.2, 0}},
  };
  std::vector<Shape> list;
  for (const auto& row : flash)
    for (int i = 0; i < 5; ++i)
      if (row.us[i] > 0) list.push_back({row.heads, row.batch, 1, contexts[i], row.us[i]});
  list.push_back({128, 128, 2, 4096, 439.2});
  list.push_back({128, 132, 1, 8192, 496.8});
  return list;
}

constexpr KvFormat bf16_format{KvLayout::mla(512, 64), DType::bf16}, f8_format{bf16_format.layout, DType::f8};
constexpr int d_k = 576, d_v = 512, page_tokens = 64, runs = 30;

class Bench {
 public:
  Bench(int64_t pages, DecodeCosts costs, bool clean)
      : costs_(costs),
        clean_(clean),
        pages_(pages),
        cache_(size_t(pages * page_tokens * bf16_format.row_bytes())),
        codes_(size_t(pages * page_tokens * f8_format.row_bytes())),
        flush_(size_t(256) << 20),
        q_(size_t(264) * 128 * d_k * 2),
        o_(q_.bytes() * 2) {
    fill_normal(cache_.data(), cache_.bytes() / 2, 1, nullptr);
    fill_f8_rows(codes_.data(), size_t(pages * page_tokens), 3, nullptr);
    fill_normal(q_.data(), q_.bytes() / 2, 2, nullptr);
    check(cudaEventCreate(&begin_));
    check(cudaEventCreate(&end_));
    cudaDeviceProp p{};
    check(cudaGetDeviceProperties(&p, 0));
    processors_ = p.multiProcessorCount;
    fmt::print("{}, {} multiprocessors\n", p.name, processors_);
  }

  // Median time in µs, with the second-level cache flushed before each run.
  double time(const std::function<void()>& work) {
    std::vector<float> us;
    for (int i = 0; i < runs + 3; ++i) {
      check(cudaMemsetAsync(flush_.data(), i, flush_.bytes(), nullptr));
      if (clean_) read_all(codes_.data(), size_t(256) << 20, reinterpret_cast<float*>(o_.data()), nullptr);
      check(cudaEventRecord(begin_, nullptr));
      work();
      check(cudaEventRecord(end_, nullptr));
      check(cudaEventSynchronize(end_));
      float ms = 0;
      check(cudaEventElapsedTime(&ms, begin_, end_));
      if (i >= 3) us.push_back(1000 * ms);
    }
    std::nth_element(us.begin(), us.begin() + runs / 2, us.end());
    return us[runs / 2];
  }

  void limits() {
    const size_t bytes = std::min(cache_.bytes() / 2, size_t(1) << 30);
    auto* sink = reinterpret_cast<float*>(o_.data());
    read_gb_s_ = 1e-3 * double(bytes) / time([&] { read_all(cache_.data(), bytes, sink, nullptr); });
    const double copy = 2e-3 * double(bytes) / time([&] {
                          check(cudaMemcpyAsync(cache_.data(), cache_.data() + bytes, bytes, cudaMemcpyDeviceToDevice, nullptr));
                        });
    constexpr int n = 8192;
    const GpuBuffer product(size_t(n) * n * 2);
    tflop_s_ = 2e-6 * n * n * n / time([&] { multiply(cache_.data(), cache_.data() + size_t(n) * n * 2, product.data(), n, nullptr); });
    fmt::print("limits: read {:.0f} GB/s, copy {:.0f} GB/s, bf16 product of 8192³ {:.0f} TFLOP/s\n", read_gb_s_, copy, tflop_s_);
    // Behind products the first shapes would be slower, by a tenth and now and then by a half.
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
  }

  // Returns the µs.
  double run(const Shape& s, const KvFormat& format, double peer_us) {
    const int per_sequence = s.context / page_tokens;
    std::vector<int32_t> pages(static_cast<size_t>(pages_));
    std::iota(pages.begin(), pages.end(), 0);
    for (size_t i = pages.size(); i > 1; --i) std::swap(pages[i - 1], pages[random_bits(1, i) % i]);
    std::vector<Span> spans;
    for (int b = 0; b < s.batch; ++b)
      spans.push_back({b * s.queries, s.queries, s.context - s.queries, 0, s.context, pages.data() + int64_t(b) * per_sequence});
    const DecodePlan plan = plan_decode(spans, true, s.heads, page_tokens, processors_, costs_);
    const UploadedPlan uploaded(plan, nullptr);
    const GpuBuffer scratch(decode_scratch_bytes(plan.slots, plan.most_rows, d_v));
    const int64_t rows = int64_t(s.batch) * s.queries * s.heads;
    const float scale = 1 / std::sqrt(192.0F);
    const GpuBuffer lse(size_t(rows) * 4);
    const Kv kv{format, (format.type == DType::f8 ? codes_ : cache_).data(), page_tokens * format.row_bytes(), page_tokens};
    DecodeCall call{
        q_.data(),     s.batch * s.queries, kv, uploaded.view(), s.heads, scale, false, o_.data(), reinterpret_cast<float*>(lse.data()),
        scratch.data()};
    check(cudaMemset(o_.data(), 0xff, size_t(rows) * d_v * 2));
    decode_sm90(call, nullptr);
    check(cudaDeviceSynchronize());
    const double error = compare(call, spans, rows);
    CHECK(error < 1e-2, "{} heads, batch {}, {} queries, {} tokens: off by {}", s.heads, s.batch, s.queries, s.context, error);
    const double us = time([&] { decode_sm90(call, nullptr); });

    const double flop = 2.0 * double(rows) * s.context * (d_k + d_v);
    const double bytes = double(s.batch) * s.context * double(format.row_bytes()) + 2.0 * double(rows) * (d_k + d_v);
    const double limit = std::max(1e-3 * bytes / read_gb_s_, 1e-6 * flop / tflop_s_);
    fmt::print("{:>5} {:>5} {:>3} {:>6} | {:>7.1f} {:>5.0f} {:>4.0f}% {:>5.0f} {:>4.0f}% | {:>4.0f}% | {:>7.1f} {:>5.2f} | {:.1e} {}\n",
               s.heads, s.batch, s.queries, s.context, us, 1e-3 * bytes / us, 100e-3 * bytes / us / read_gb_s_, 1e-6 * flop / us,
               100e-6 * flop / us / tflop_s_, 100 * limit / us, peer_us, peer_us / us, error, plan.slots);
    std::fflush(stdout);
    return us;
  }

 private:
  // ‖o − reference‖ / ‖reference‖ against the portable kernel, for at most 4 sequences from the batch's ends.
  double compare(DecodeCall call, std::vector<Span> spans, int64_t rows) {
    const int64_t a_sequence = rows / int64_t(spans.size()) * d_v;
    std::vector<Span> some = {spans.front()};
    if (spans.size() > 1) some.push_back(spans[spans.size() / 2]), some.push_back(spans.back());
    const auto got = download<uint16_t>(o_.data(), size_t(rows) * d_v);
    const UploadedPlan whole(plan_decode(some, true, call.n_h, page_tokens, 1), nullptr);
    const GpuBuffer o(size_t(rows) * d_v * 4);
    call.plan = whole.view(), call.o = o.data(), call.out_f32 = true;
    decode_portable(call, nullptr);
    const auto expected = download<float>(o.data(), size_t(rows) * d_v);
    double off = 0, square = 0;
    for (const Span& s : some)
      for (int64_t i = 0; i < a_sequence; ++i) {
        const int64_t at = s.start / s.count * a_sequence + i;
        const double x = expected[size_t(at)], d = bf16_to_f32(got[size_t(at)]) - x;
        off += d * d, square += x * x;
      }
    for (const uint16_t x : got)
      if (std::isnan(bf16_to_f32(x))) return NAN;
    return std::sqrt(off / square);
  }

  DecodeCosts costs_;
  bool clean_;
  int64_t pages_;
  GpuBuffer cache_, codes_, flush_, q_, o_;
  cudaEvent_t begin_{}, end_{};
  int processors_ = 0;
  double read_gb_s_ = 0, tflop_s_ = 0;
};

int run(const std::string& how, const std::string& wanted, DecodeCosts costs) {
  const bool f8 = how.starts_with("fp8");
  const std::vector<Shape> all = shapes();
  int64_t pages = 0;
  for (const Shape& s : all) pages = std::max(pages, int64_t(s.batch) * s.context / page_tokens);
  Bench bench(pages, costs, how.ends_with("-clean"));
  bench.limits();
  fmt::print("heads batch  q context |      µs  GB/s  of read TFLOP/s of product | of limit | {:>8} ratio | error slots\n",
             f8 ? "bf16" : "FlashMLA");
  double sum = 0;
  int count = 0;
  for (const Shape& s : all)
    if (fmt::format("{}x{}x{}x{}", s.heads, s.batch, s.queries, s.context).find(wanted) != std::string::npos) {
      const double us = bench.run(s, bf16_format, s.flash_us);
      sum += std::log(f8 ? us / bench.run(s, f8_format, us) : s.flash_us / us), ++count;
    }
  fmt::print("geometric mean of {}'s time over ours: {:.3f}\n", f8 ? "bf16" : "FlashMLA", std::exp(sum / std::max(1, count)));
  return 0;
}

}  // namespace
}  // namespace mla::cuda

int main(int argc, char** argv) try {
  mla::cuda::DecodeCosts costs;
  if (argc > 3) costs.item = std::atoi(argv[3]);
  if (argc > 4) costs.fewest_tiles = std::atoi(argv[4]), costs.few_tiles = 0;
  return mla::cuda::run(argc > 1 ? argv[1] : "", argc > 2 ? argv[2] : "", costs);
} catch (const mla::Error& e) {
  fmt::print(stderr, "{}\n", e.what());
  return 1;
}
