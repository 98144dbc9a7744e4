// Which kernels this machine runs, and how fast it is at best.
#include "cpu/cpu.h"

#include "core/check.h"
#include "cpu/work.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#endif
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <string_view>

namespace mla {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Rate of `once`, which returns what it did, over about `seconds`. The mean and not the best: where others share the processors, a long run
// beside it meets the same ups and downs.
template <class Once>
double mean_rate(double seconds, Once once) {
  once();
  double done = 0, elapsed = 0;
  for (const auto start = Clock::now(); elapsed < seconds; elapsed = seconds_since(start)) done += once();
  return done / elapsed;
}

#if defined(__x86_64__)
// Whether there are AMX tiles for bf16, and Linux grants this process their registers; it has to be asked before their first use.
bool tiles_granted() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 22 & 5) != 5) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

}  // namespace

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> list = {&kernels_plain()};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // F16C came before AVX2
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  if (avx2) list.push_back(&kernels_avx2());
  if (avx512) list.push_back(&kernels_avx512());
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (bf16) list.push_back(&kernels_avx512_bf16());
  if (bf16 && tiles_granted()) list.push_back(&kernels_avx512_amx());
#endif
  return list;
}

const Kernels& choose_kernels() {
  const auto list = available_kernels();
  const char* wanted = std::getenv("MLA_ISA");
  if (!wanted || !*wanted) {
#if defined(__x86_64__)
    // Intel's processors with bf16 dots (Sapphire Rapids) run them at half their f32 rate: 158 against 350 GFLOP/s on two cores.
    if (list.back() == &kernels_avx512_bf16() && __builtin_cpu_is("intel")) return kernels_avx512();
#endif
    return *list.back();
  }
  for (const Kernels* k : list)
    if (std::string_view(k->name) == wanted) return *k;
  std::string names;
  for (const Kernels* k : list) names += fmt::format("{}{}", names.empty() ? "" : ", ", k->name);
  fail_input("MLA_ISA is '{}', but this machine runs {}; unset it or name one of these", wanted, names);
}

CpuDevice::CpuDevice(const Kernels& kernels, int threads) : kernels_(kernels), threads_(threads) {
  thread_scratch_.resize(size_t(threads_.count()));
}

std::string CpuDevice::describe() const {
  return fmt::format("CPU, {}, {} thread{}", kernels_.name, threads_.count(), threads_.count() == 1 ? "" : "s");
}

Ceilings CpuDevice::probe(double seconds) {
  // Larger than the last cache (300 MB on some servers), so that what one pass leaves there is of no use to the next.
  const int64_t cache = std::max<int64_t>(0, sysconf(_SC_LEVEL3_CACHE_SIZE));
  const int64_t bytes = std::clamp<int64_t>(4 * cache, int64_t(64) << 20, int64_t(1) << 30), piece = 1 << 18;
  const Buffer buffer{size_t(bytes)};
  share_out(threads_, bytes / piece, [&](int64_t i, int) { std::fill_n(buffer.data() + i * piece, piece, std::byte(1)); });
  Ceilings c;
  c.read_gb_s = 1e-9 * mean_rate(seconds / 2, [&] {
                  share_out(threads_, bytes / piece, [&](int64_t i, int) { kernels_.read(buffer.data() + i * piece, piece); });
                  return double(bytes);
                });
  auto arithmetic = [&](double (*ops)(int64_t)) {
    // In shares small enough that a slow processor (of two that are one core's) takes fewer, as in products.
    constexpr int64_t shares = 32, rounds = 20000 / shares;
    return 1e-9 * mean_rate(seconds / 8, [&] {
             std::atomic<double> done = 0;
             threads_.parallel(threads_.count() * shares, [&](int64_t, int) {
               const double n = ops(rounds);
               for (double old = done; !done.compare_exchange_weak(old, old + n);) {}
             });
             return done.load();
           });
  };
  c.int8_gop_s = arithmetic(kernels_.int8_ops);
  c.bf16_gflop_s = arithmetic(kernels_.bf16_ops);
  if (kernels_.i16_ops) c.i16_gop_s = arithmetic(kernels_.i16_ops);
  c.f32_gflop_s = arithmetic(kernels_.f32_ops);
  return c;
}

void CpuDevice::step(const StepInputs& in, uint64_t, const std::function<void()>& issue) {
  std::copy(in.cos_sin_from.begin(), in.cos_sin_from.end(), in.cos_sin.f32());
  issue();
}

void CpuDevice::store(Tensor rows, std::span<const int64_t> slots, const Kv& kv) { cpu_store(*this, rows, slots, kv); }

void CpuDevice::load(const Kv& kv, const Span& span, int64_t first, Tensor rows) { cpu_load(*this, kv, span, first, rows); }

void CpuDevice::attend(Tensor q, const Kv& kv, Spans spans, Mask mask, float scale, Tensor o, Tensor lse, Attend how) {
  cpu_attend(*this, q, kv, spans, mask, scale, o, lse, how);
}

std::unique_ptr<Device> make_cpu(const Kernels& kernels, int threads) { return std::make_unique<CpuDevice>(kernels, threads); }

std::unique_ptr<Device> make_cpu(int threads) { return make_cpu(choose_kernels(), threads); }

}  // namespace mla
