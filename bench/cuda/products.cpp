// Products and networks of DeepSeek-V2-Lite's shape on the GPU, with weights that no cache holds, as shares of the read bandwidth: each
// launched many times over in a recorded step, the next one's weights on their way while one runs, as in a model.
//   bench_cuda_products [tokens, as 1,8,32] [part of a name] [bf16, fp8, q8_0 or q4_0]
#include "core/check.h"
#include "core/random.h"
#include "cuda/cuda.h"
#include "cuda/pack.h"
#include "kernels.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <string>

namespace mla::cuda {
namespace {

constexpr int64_t hidden = 2048, heads = 16, latent = 512, experts = 64, chosen = 6, width = 1408;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

class Bench {
 public:
  explicit Bench(DType type) : type_(type), device_(0), arena_(device_.memory()), weights_(size_t(2) << 30) {
    // Two GiB, which all weights are views of. As codes they are whatever they are: no number takes longer than another.
    fill_normal(weights_.data(), weights_.bytes() / 2, 1, nullptr);
    check(cudaDeviceSynchronize());
    read_gb_s_ = device_.probe(0.2).read_gb_s;
    fmt::print("{}; read {:.0f} GB/s; {} weights\n{:<34} {:>6} {:>9} {:>9} {:>8}\n", device_.describe(), read_gb_s_, info(type_).name, "",
               "tokens", "MB", "us", "of read");
  }

  void run(int64_t n, const std::string& wanted) {
    arena_.reset();
    x_ = floats({n, 16384}), y_ = floats({n, 102400});
    auto linear = [&](const char* name, int64_t rows, int64_t cols, DType type) {
      time(name, n, double(packed(type, rows, cols).bytes()), wanted,
           [=, this] { device_.linear(slice(x_, 1, 0, cols), next(type, 1, rows, cols), {}, slice(y_, 1, 0, rows)); });
    };
    auto by_head = [&](const char* name, int64_t rows, int64_t cols) {
      time(name, n, double(heads * packed(type_, rows, cols).bytes()), wanted, [=, this] {
        const Tensor x = view(x_.data, DType::f32, {n, heads, cols}, Place::device);
        device_.linear_heads(x, next(type_, heads, rows, cols), view(y_.data, DType::f32, {n, heads, rows}, Place::device));
      });
    };
    time("queries and latents", n, double(packed(type_, heads * 192 + latent + 64, hidden).bytes()), wanted, [=, this] {
      const Weight q = next(type_, 1, heads * 192, hidden), a = next(type_, 1, latent + 64, hidden);
      device_.linear(slice(x_, 1, 0, hidden), {{q, {}, slice(y_, 1, 0, heads * 192)}, {a, {}, slice(y_, 1, 4096, latent + 64)}});
    });
    by_head("queries into the latent space", latent, 128);
    by_head("values out of it", 128, latent);
    linear("attention's output", hidden, heads * 128, type_);
    linear("router, f32", experts, hidden, DType::f32);
    network("shared experts", n, 1, 2 * width, nullptr, wanted);
    network("dense layer", n, 1, 10944, nullptr, wanted);
    routed(n, wanted);
    linear("logits", 102400, hidden, type_);
  }

 private:
  Tensor floats(std::initializer_list<int64_t> shape) {
    const Tensor t = arena_.tensor(DType::f32, shape);
    std::vector<float> values(size_t(t.count()));
    for (size_t i = 0; i < values.size(); ++i) values[i] = float(random_bits(7, i) >> 40) * 0x1p-24F - 0.5F;
    device_.memory().upload(values.data(), t.data, values.size() * 4);
    return t;
  }

  // Weights behind those of the call before.
  Weight next(DType type, int64_t count, int64_t rows, int64_t cols) {
    Weight w{type, count, rows, cols, nullptr, packed(type, rows, cols).matrix_bytes, {}};
    if (at_ + w.bytes() > int64_t(weights_.bytes())) at_ = 0;
    w.data = weights_.data() + at_;
    at_ += w.bytes();
    return w;
  }

  void network(const char* name, int64_t n, int64_t count, int64_t wide, const Routing* routing, const std::string& wanted) {
    time(name, n, 3.0 * double(packed(type_, wide, hidden).bytes()), wanted, [=, this] {
      const FfnWeights w{next(type_, count, wide, hidden), next(type_, count, wide, hidden), next(type_, count, hidden, wide)};
      device_.ffn(slice(x_, 1, 0, hidden), w, routing, slice(y_, 1, 0, hidden));
    });
  }

  // Experts drawn at random, other ones for each launch.
  void routed(int64_t n, const std::string& wanted) {
    at_ = 0;
    const FfnWeights w{next(type_, experts, width, hidden), next(type_, experts, width, hidden), next(type_, experts, hidden, width)};
    constexpr int routings = 8;
    std::vector<Routing> routing;
    double read = 0;
    for (int r = 0; r < routings; ++r) {
      std::vector<int32_t> expert;
      std::vector<float> weight(size_t(n * chosen), 1.0F / chosen);
      std::vector<bool> any(experts);
      for (int64_t t = 0; t < n; ++t) {
        std::vector<int32_t> all(experts);
        for (int e = 0; e < experts; ++e) all[size_t(e)] = e;
        for (int64_t j = 0; j < chosen; ++j) {
          std::swap(all[size_t(j)], all[size_t(j) + random_bits(uint64_t(r), uint64_t(t * chosen + j)) % uint64_t(experts - j)]);
          expert.push_back(all[size_t(j)]), any[size_t(all[size_t(j)])] = true;
        }
      }
      routing.push_back({arena_.tensor(DType::i32, {n, chosen}), arena_.tensor(DType::f32, {n, chosen})});
      device_.memory().upload(expert.data(), routing.back().expert.data, expert.size() * 4);
      device_.memory().upload(weight.data(), routing.back().weight.data, weight.size() * 4);
      read += 3.0 * double(std::count(any.begin(), any.end(), true)) * double(packed(type_, width, hidden).bytes()) / routings;
    }
    int turn = 0;
    time("routed experts", n, read, wanted,
         [&, this] { device_.ffn(slice(x_, 1, 0, hidden), w, &routing[size_t(turn++ % routings)], slice(y_, 1, 0, hidden)); });
  }

  void time(const char* name, int64_t n, double bytes, const std::string& wanted, const std::function<void()>& once) {
    if (std::string(name).find(wanted) == std::string::npos) return;
    const int launches = int(std::clamp(1e9 / bytes, 8.0, 256.0)) / 8 * 8;
    const auto issue = [&] {
      for (int i = 0; i < launches; ++i) once();
    };
    ++key_;
    std::vector<double> us;
    for (int r = 0; r < 12; ++r) {
      const double begin = now();
      device_.step({}, key_, issue);
      device_.memory().wait();
      if (r >= 3) us.push_back(1e6 * (now() - begin) / launches);
    }
    std::nth_element(us.begin(), us.begin() + 4, us.end());
    fmt::print("{:<34} {:>6} {:>9.1f} {:>9.2f} {:>7.0f}%\n", name, n, 1e-6 * bytes, us[4], 0.1 * bytes / us[4] / read_gb_s_);
    std::fflush(stdout);
  }

  DType type_;
  CudaDevice device_;
  Arena arena_;
  GpuBuffer weights_;
  Tensor x_{}, y_{};
  int64_t at_ = 0;
  uint64_t key_ = 1;
  double read_gb_s_ = 0;
};

}  // namespace
}  // namespace mla::cuda

int main(int argc, char** argv) try {
  const auto type = mla::parse_dtype(argc > 3 ? argv[3] : "bf16");
  CHECK(type, "no type {}; give bf16, fp8, q8_0 or q4_0", argv[3]);
  mla::cuda::Bench bench(*type);
  std::string tokens = argc > 1 ? argv[1] : "1,8,32,128";
  for (size_t at = 0; at < tokens.size(); at = tokens.find(',', at) == std::string::npos ? tokens.size() : tokens.find(',', at) + 1)
    bench.run(std::stoll(tokens.substr(at)), argc > 2 ? argv[2] : "");
  return 0;
} catch (const mla::Error& e) {
  fmt::print(stderr, "{}\n", e.what());
  return 1;
}
