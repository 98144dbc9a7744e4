// Times the products of DeepSeek-V2-Lite on this machine, as shares of what it reads and multiplies at best, probed beside each row.
#include "core/check.h"
#include "core/random.h"
#include "cpu/cpu.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace mla {
namespace {

struct Options {
  int threads = 0;
  std::vector<int64_t> tokens = {1, 4, 16, 48, 512};
  DType type = DType::q4_0;
  std::string only;
};

// [count, rows, cols]; the bytes of all operations beyond the last cache, so that weights come from memory as they do in a model.
struct Shape {
  const char* name;
  int64_t count, rows, cols;
  DType type;
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Random bytes with small scales, packed.
Weight random_weight(Device& device, const Shape& s) {
  const DTypeInfo type = info(s.type);
  Buffer bytes(size_t(s.count * row_bytes(s.type, s.rows * s.cols)));
  auto* p = reinterpret_cast<uint8_t*>(bytes.data());
  uint64_t word = 0;
  for (size_t i = 0; i < bytes.bytes(); ++i) {
    if (i % 8 == 0) word = random_bits(1, i);
    p[i] = uint8_t(word >> (8 * (i % 8)));
  }
  const uint16_t scale = f32_to_f16(0.01f);
  const int scale_at = s.type == DType::q6_k ? 208 : 0;
  if (is_quantised(s.type))
    for (size_t i = size_t(scale_at); i + 2 <= bytes.bytes(); i += size_t(type.block_bytes)) std::memcpy(p + i, &scale, 2);
  else
    std::memset(p, 0x3c, bytes.bytes());
  return device.pack(view(p, s.type, {s.count, s.rows, s.cols}));
}

struct Row {
  const char* name;
  DType type;
  int64_t tokens;
  double us, bytes, ops;
  Ceilings ceilings;
};

void print(const Row& r) {
  const double gb_s = r.bytes / r.us * 1e-3, gop_s = r.ops / r.us * 1e-3;
  const double rate = is_quantised(r.type)    ? r.ceilings.int8_gop_s
                      : r.type == DType::bf16 ? r.ceilings.bf16_gflop_s
                                              : r.ceilings.f32_gflop_s;
  std::printf("%-28s %5lld %10.1f us %8.1f GB/s %4.0f%% %9.1f GOP/s %4.0f%%\n", r.name, static_cast<long long>(r.tokens), r.us, gb_s,
              100 * gb_s / r.ceilings.read_gb_s, gop_s, 100 * gop_s / rate);
  std::fflush(stdout);
}

// Median of repeated calls; `once(i)` is the i-th.
template <class Once>
double median_us(double seconds, Once once) {
  std::vector<double> times;
  once(0);
  const double start = now();
  for (int i = 1; i < 7 || (now() - start < seconds && i < 1000); ++i) {
    const double begin = now();
    once(i);
    times.push_back((now() - begin) * 1e6);
  }
  std::nth_element(times.begin(), times.begin() + long(times.size() / 2), times.end());
  return times[times.size() / 2];
}

// A matrix of a stack, which turns through the stack so that no call finds its weights in a cache.
Weight matrix(const Weight& w, int64_t i) {
  Weight one = w;
  one.count = 1;
  one.data += i % w.count * w.matrix_bytes;
  return one;
}

void bench_linear(Device& device, const Options& options, const Shape& s) {
  const Weight w = random_weight(device, s);
  for (int64_t n : options.tokens) {
    Buffer x(size_t(n * s.cols * 4)), y(size_t(n * s.rows * 4));
    auto* floats = reinterpret_cast<float*>(x.data());
    for (int64_t i = 0; i < n * s.cols; ++i) floats[i] = float(random_uniform(2, uint64_t(i)) - 0.5);
    const Ceilings c = device.probe(0.4);
    const double us = median_us(0.4, [&](int i) {
      device.linear(view(x.data(), DType::f32, {n, s.cols}), matrix(w, i), {}, view(y.data(), DType::f32, {n, s.rows}));
    });
    print({s.name, s.type, n, us, double(w.matrix_bytes), 2.0 * double(n * s.rows * s.cols), c});
  }
}

// Six of 64 experts a token, as DeepSeek-V2-Lite routes.
void bench_experts(Device& device, const Options& options) {
  const int64_t experts = 64, k = 6, d = 2048, width = 1408;
  const FfnWeights w = {random_weight(device, {"", experts, width, d, options.type}),
                        random_weight(device, {"", experts, width, d, options.type}),
                        random_weight(device, {"", experts, d, width, options.type})};
  for (int64_t n : options.tokens) {
    Buffer x(size_t(n * d * 4)), y(size_t(n * d * 4));
    for (int64_t i = 0; i < n * d; ++i) reinterpret_cast<float*>(x.data())[i] = float(random_uniform(2, uint64_t(i)) - 0.5);
    std::vector<int32_t> expert(static_cast<size_t>(n * k));
    std::vector<float> weight(size_t(n * k), 0.1f);
    auto choose = [&](int round) {
      std::vector<char> used(size_t(experts), 0);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < k; ++j) {
          auto e = int32_t(random_bits(uint64_t(round), uint64_t(i)) % uint64_t(experts));
          expert[size_t(i * k + j)] = int32_t((e + 11 * j) % experts);
          used[size_t(expert[size_t(i * k + j)])] = 1;
        }
      return double(std::count(used.begin(), used.end(), 1));
    };
    double read = 0;
    int rounds = 0;
    const Ceilings c = device.probe(0.4);
    const double us = median_us(0.6, [&](int i) {
      read += choose(i), ++rounds;
      const Routing routing{view(expert.data(), DType::i32, {n, k}), view(weight.data(), DType::f32, {n, k})};
      device.ffn(view(x.data(), DType::f32, {n, d}), w, &routing, view(y.data(), DType::f32, {n, d}));
    });
    const double one = double(w.gate.matrix_bytes + w.up.matrix_bytes + w.down.matrix_bytes);
    print({"experts 6 of 64, 1408x2048", options.type, n, us, read / rounds * one, 6.0 * double(n * k * d * width), c});
  }
}

void run(const Options& options) {
  const auto device = make_cpu(options.threads);
  const Ceilings c = device->probe(1);
  std::printf("%s: read %.1f GB/s, int8 %.0f GOP/s, bf16 %.0f GFLOP/s, f32 %.0f GFLOP/s\n", device->describe().c_str(), c.read_gb_s,
              c.int8_gop_s, c.bf16_gflop_s, c.f32_gflop_s);
  const DType t = options.type;
  for (const Shape& s :
       {Shape{"q 3072x2048", 40, 3072, 2048, t}, Shape{"o 2048x2048", 60, 2048, 2048, t}, Shape{"kv_a 576x2048", 200, 576, 2048, t},
        Shape{"shared up 2816x2048", 40, 2816, 2048, t}, Shape{"dense down 2048x10944", 12, 2048, 10944, t},
        Shape{"lm_head q6_k 102400x2048", 1, 102400, 2048, DType::q6_k}, Shape{"router f32 64x2048", 64, 64, 2048, DType::f32},
        Shape{"bf16 2048x2048", 24, 2048, 2048, DType::bf16}})
    if (options.only.empty() || std::string(s.name).find(options.only) != std::string::npos) bench_linear(*device, options, s);
  if (options.only.empty() || options.only == "experts") bench_experts(*device, options);
}

Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--help" || name == "-h") {
      std::fputs(
          "usage: bench_ops [--threads N] [--tokens 1,4,16,48,512] [--type q4_0] [--only NAME]\n"
          "Times the products of DeepSeek-V2-Lite on this machine, as shares of what it reads and multiplies at best.\n"
          "example: bench_ops --threads 16 --type bf16 --tokens 512,2048 --only experts\n",
          stdout);
      std::exit(0);
    }
    if (i + 1 == argc) fail_input("{} needs a value", name);
    const std::string value = argv[++i];
    if (name == "--threads") {
      o.threads = std::stoi(value);
    } else if (name == "--type") {
      const auto type = parse_dtype(value);
      if (!type) fail_input("'{}' is no type", value);
      o.type = *type;
    } else if (name == "--only") {
      o.only = value;
    } else if (name == "--tokens") {
      o.tokens.clear();
      for (size_t at = 0; at <= value.size();) {
        const size_t comma = std::min(value.find(',', at), value.size());
        o.tokens.push_back(std::stoll(value.substr(at, comma - at)));
        at = comma + 1;
      }
    } else {
      fail_input("{} is unknown; there are --threads, --tokens, --type and --only", name);
    }
  }
  return o;
}

}  // namespace
}  // namespace mla

int main(int argc, char** argv) {
  try {
    mla::run(mla::parse(argc, argv));
  } catch (const std::exception& e) {
    std::fprintf(stderr, "bench_ops: %s\n", e.what());
    return 2;
  }
}
