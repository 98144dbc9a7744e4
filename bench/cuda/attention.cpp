// Attention over keys and values on the GPU, the last queries of one causal sequence, all of them in prefill: checks both ends against the
// portable kernel, then times it. bench/cuda/attention_cudnn.py times cuDNN by the same protocol.
//   bench_cuda_attention [part of a shape's name]
// A shape's name is query heads x cache heads x d_k x d_v x tokens x queries, as 16x16x192x128x8192x8192.
#include "cuda/attention.h"
#include "core/check.h"
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace mla::cuda {
namespace {

struct Shape {
  int n_h, heads, d_k, d_v, tokens, queries;
};

constexpr Shape shapes[] = {{16, 16, 192, 128, 512, 512},   {16, 16, 192, 128, 2048, 2048},   {16, 16, 192, 128, 4096, 4096},
                            {16, 16, 192, 128, 8192, 8192}, {128, 128, 192, 128, 2048, 2048}, {128, 128, 192, 128, 8192, 8192},
                            {32, 8, 128, 128, 4096, 4096},  {32, 32, 128, 128, 8192, 8192},   {32, 8, 64, 64, 4096, 4096},
                            {16, 16, 96, 64, 4096, 4096},   {16, 16, 192, 128, 8192, 512},    {32, 8, 128, 128, 1024, 1},
                            {32, 8, 128, 128, 8192, 1},     {32, 8, 128, 128, 65536, 1},      {32, 32, 128, 128, 32768, 1}};

constexpr int runs = 30;

// q: bf16 values as f32.
GpuBuffer random_queries(size_t count) {
  const GpuBuffer narrow(count * 2);
  fill_normal(narrow.data(), count, 2, nullptr);
  std::vector<float> wide(count);
  const auto values = download<uint16_t>(narrow.data(), count);
  for (size_t i = 0; i < count; ++i) wide[i] = bf16_to_f32(values[i]);
  return upload<float>(wide);
}

// ‖o − reference‖ / ‖reference‖ over the first and last queries.
double compare(AttentionCall call, const std::vector<float>& got) {
  const int queries = call.one.count, position = call.one.position, checked = std::min(64, queries);
  const auto row = size_t(call.o_row);
  double off = 0, square = 0;
  for (const int first : {0, queries - checked}) {
    call.one.start = first, call.one.position = position + first, call.one.count = call.spans.most_queries = checked;
    const GpuBuffer o(size_t(queries) * row * 4);
    call.o = reinterpret_cast<float*>(o.data());
    attend_portable(call, nullptr);
    const auto expected = download<float>(o.data() + size_t(first) * row * 4, size_t(checked) * row);
    for (size_t i = 0; i < expected.size(); ++i) {
      const double d = got[size_t(first) * row + i] - expected[i];
      off += d * d, square += double(expected[i]) * expected[i];
    }
  }
  return std::sqrt(off / square);
}

void run(const Shape& s, const GpuBuffer& flush, int processors) {
  const KvFormat format{{s.heads, s.d_k, s.d_v, false}, DType::bf16};
  const auto n = size_t(s.queries), n_h = size_t(s.n_h);
  const GpuBuffer q = random_queries(n * n_h * size_t(s.d_k)), cache(size_t(s.tokens) * size_t(format.row_bytes())),
                  o(n * n_h * size_t(s.d_v) * 4), lse(n * n_h * 4);
  fill_normal(cache.data(), cache.bytes() / 2, 1, nullptr);
  check(cudaMemset(o.data(), 0xff, o.bytes()));
  AttentionCall call{};
  call.q = reinterpret_cast<const float*>(q.data()), call.q_row = s.n_h * s.d_k, call.q_head = s.d_k;
  call.base = cache.data(), call.page_bytes = int64_t(cache.bytes()), call.page_tokens = s.tokens, call.format = RowFormat(format);
  call.spans.count = 1, call.spans.most_queries = s.queries, call.one = {0, s.queries, s.tokens - s.queries, 0, s.tokens, 0};
  call.n = s.queries, call.most_seen = s.tokens;
  call.n_h = s.n_h, call.processors = processors, call.causal = true, call.scale = 1 / std::sqrt(float(s.d_k));
  call.o = reinterpret_cast<float*>(o.data()), call.o_row = s.n_h * s.d_v, call.o_head = s.d_v;
  call.lse = reinterpret_cast<float*>(lse.data()), call.lse_row = s.n_h, call.lse_head = 1;
  const GpuBuffer scratch(attend_tiles_scratch_bytes(call)), taken(sizeof(unsigned));
  check(cudaMemset(taken.data(), 0, taken.bytes()));
  call.taken = reinterpret_cast<unsigned*>(taken.data());
  attend_tiles(call, scratch.data(), nullptr);
  const double error = compare(call, download<float>(o.data(), n * n_h * size_t(s.d_v)));

  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<float> us;
  for (int i = 0; i < runs + 3; ++i) {
    check(cudaMemsetAsync(flush.data(), i, flush.bytes(), nullptr));
    check(cudaEventRecord(begin, nullptr));
    attend_tiles(call, scratch.data(), nullptr);
    check(cudaEventRecord(end, nullptr));
    check(cudaEventSynchronize(end));
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 3) us.push_back(1000 * ms);
  }
  check(cudaEventDestroy(begin));
  check(cudaEventDestroy(end));
  std::nth_element(us.begin(), us.begin() + runs / 2, us.end());
  const double seen = s.queries == s.tokens ? 0.5 * s.tokens : s.tokens - 0.5 * s.queries;  // by a query, on average
  const double flop = 2 * seen * s.queries * s.n_h * (s.d_k + s.d_v), bytes = double(cache.bytes()) + double(q.bytes()) + double(o.bytes());
  fmt::print("{:>5} {:>5} {:>4} {:>4} {:>7} {:>7} | {:>8.1f} {:>7.0f} {:>5.0f} | {:.1e}\n", s.n_h, s.heads, s.d_k, s.d_v, s.tokens,
             s.queries, us[runs / 2], 1e-6 * flop / us[runs / 2], 1e-3 * bytes / us[runs / 2], error);
  std::fflush(stdout);
}

int run(const std::string& wanted) {
  const GpuBuffer flush(size_t(256) << 20);
  cudaDeviceProp p{};
  check(cudaGetDeviceProperties(&p, 0));
  fmt::print("{}\n", p.name);
  fmt::print("heads cache  d_k  d_v  tokens queries |       µs TFLOP/s  GB/s | error\n");
  for (const Shape& s : shapes)
    if (fmt::format("{}x{}x{}x{}x{}x{}", s.n_h, s.heads, s.d_k, s.d_v, s.tokens, s.queries).find(wanted) != std::string::npos)
      run(s, flush, p.multiProcessorCount);
  return 0;
}

}  // namespace
}  // namespace mla::cuda

int main(int argc, char** argv) try { return mla::cuda::run(argc > 1 ? argv[1] : ""); } catch (const mla::Error& e) {
  fmt::print(stderr, "{}\n", e.what());
  return 1;
}
