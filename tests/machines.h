// Every device that this machine has, for tests that run on each: the CPU once per instruction set, and a GPU if there is one. Tests keep
// their tensors on the host; for a GPU, each operation's are copied there and back.
#pragma once

#include "core/check.h"
#include "cpu/cpu.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

namespace mla {

constexpr float nan = std::numeric_limits<float>::quiet_NaN();  // what outputs hold before they are written

// Operations on tensors of the host by a device with memory of its own.
class FromHost : public Device {
 public:
  explicit FromHost(std::unique_ptr<Device> device) : d_(std::move(device)) {}

  std::string describe() const override { return d_->describe(); }
  Threads& threads() override { return d_->threads(); }
  Memory& memory() override { return host_memory(); }
  Ceilings probe(double seconds) override { return d_->probe(seconds); }
  void step(const StepInputs& in, uint64_t, const std::function<void()>& issue) override {
    std::copy(in.cos_sin_from.begin(), in.cos_sin_from.end(), in.cos_sin.f32());
    issue();
  }
  Weight pack(std::span<const Tensor> pieces) override { return d_->pack(pieces); }

  void embed(std::span<const int32_t> ids, const Weight& w, Tensor out) override {
    run([&] { d_->embed(ids, w, there(out)); });
  }
  using Device::linear;
  void linear(Tensor x, std::span<const Projection> projections) override {
    run([&] {
      std::vector<Projection> moved;
      for (const Projection& p : projections) moved.push_back({p.w, p.bias.data ? there(p.bias) : Tensor{}, there(p.y), p.add});
      d_->linear(there(x), moved);
    });
  }
  void linear_normed(Tensor x, Tensor norm, float eps, Tensor h, std::span<const Projection> projections) override {
    run([&] {
      std::vector<Projection> moved;
      for (const Projection& p : projections) moved.push_back({p.w, p.bias.data ? there(p.bias) : Tensor{}, there(p.y), p.add});
      d_->linear_normed(there(x), there(norm), eps, there(h), moved);
    });
  }
  void linear_heads(Tensor x, const Weight& w, Tensor y) override {
    run([&] { d_->linear_heads(there(x), w, there(y)); });
  }
  void ffn(Tensor x, const FfnWeights& w, const Routing* routing, Tensor out) override {
    run([&] {
      Routing moved;
      if (routing) moved = {there(routing->expert), there(routing->weight)};
      d_->ffn(there(x), w, routing ? &moved : nullptr, there(out));
    });
  }
  void route(Tensor logits, const RouterConfig& config, Routing out) override {
    run([&] { d_->route(there(logits), config, {there(out.expert), there(out.weight)}); });
  }
  void gate(Tensor x, Tensor norm, float eps, Tensor h, const Weight& router, const RouterConfig& config, Tensor scores, Routing out,
            const FfnWeights& shared) override {
    run([&] {
      d_->gate(there(x), there(norm), eps, there(h), router, config, there(scores), {there(out.expert), there(out.weight)}, shared);
    });
  }
  void rms_norm(Tensor x, Tensor weight, float eps, Tensor y) override {
    run([&] {
      const Tensor from = there(x);
      d_->rms_norm(from, there(weight), eps, y.data == x.data ? from : there(y));
    });
  }
  using Device::rope;
  void rope(Tensor x, Tensor cos_sin, bool interleaved, Tensor y) override {
    run([&] {
      const Tensor from = there(x);
      d_->rope(from, there(cos_sin), interleaved, y.data == x.data ? from : there(y));
    });
  }
  void copy(Tensor from, Tensor to) override {
    run([&] { d_->copy(there(from), there(to)); });
  }
  void store(Tensor rows, std::span<const int64_t> slots, const Kv& kv) override {
    int64_t pages = 0;
    for (const int64_t slot : slots) pages = std::max(pages, slot / kv.page_tokens + 1);
    run([&] { d_->store(there(rows), slots, there(kv, pages)); });
  }
  void store_latents(Tensor rows, Tensor norm, float eps, Tensor cos_sin, bool interleaved, std::span<const int64_t> slots, const Kv& kv,
                     const Absorbed* queries) override {
    int64_t pages = 0;
    for (const int64_t slot : slots) pages = std::max(pages, slot / kv.page_tokens + 1);
    run([&] {
      std::optional<Absorbed> moved;
      if (queries) moved.emplace(Absorbed{there(queries->q), queries->w, there(queries->to)});
      d_->store_latents(there(rows), there(norm), eps, there(cos_sin), interleaved, slots, there(kv, pages), moved ? &*moved : nullptr);
    });
  }
  void store_expanded(Tensor kv, Tensor rotary, const Kv& to) override {
    run([&] { d_->store_expanded(there(kv), there(rotary), there(to, 1)); });
  }
  void load(const Kv& kv, const Span& span, int64_t first, Tensor rows) override {
    run([&] { d_->load(there(kv, pages_of(kv, Spans(&span, 1))), span, first, there(rows)); });
  }
  void attend(Tensor q, const Kv& kv, Spans spans, Mask mask, float scale, Tensor o, Tensor lse, Attend how) override {
    run([&] { d_->attend(there(q), there(kv, pages_of(kv, spans)), spans, mask, scale, there(o), there(lse), how); });
  }

 private:
  struct Copy {
    void* host;
    Buffer buffer;
  };
  static int64_t pages_of(const Kv& kv, Spans spans) {
    int64_t pages = 0;
    for (const Span& s : spans)
      for (int i = 0; i < (s.kv_count + kv.page_tokens - 1) / kv.page_tokens; ++i) pages = std::max(pages, int64_t(s.pages[i]) + 1);
    return pages;
  }
  std::byte* copied(void* host, int64_t bytes) {
    copies_.push_back({host, Buffer(size_t(bytes), d_->memory())});
    d_->memory().upload(host, copies_.back().buffer.data(), size_t(bytes));
    return copies_.back().buffer.data();
  }
  Tensor there(Tensor t) {
    int64_t last = 0;
    for (int i = 0; i < t.rank; ++i) last += std::max<int64_t>(0, t.shape[i] - 1) * t.stride[i];
    if (t.count() > 0) t.data = copied(t.data, row_bytes(t.dtype, last + 1));
    t.place = d_->memory().place();
    return t;
  }
  Kv there(Kv kv, int64_t pages) {
    if (pages > 0) kv.base = copied(kv.base, pages * kv.page_bytes);
    return kv;
  }
  // Calls an operation on copies and brings them back, unless it fails.
  template <class Operation>
  void run(Operation operation) {
    copies_.clear();
    operation();
    for (const Copy& c : copies_) d_->memory().download(c.buffer.data(), c.host, c.buffer.bytes());
    copies_.clear();
  }

  std::unique_ptr<Device> d_;
  std::vector<Copy> copies_;
};

struct Machine {
  const Kernels* kernels;  // null: the GPU
  std::string name() const {
    std::string name = kernels ? kernels->name : "cuda";
    std::replace(name.begin(), name.end(), '-', '_');
    return name;
  }
  std::unique_ptr<Device> open(int threads) const {
    if (kernels) return make_cpu(*kernels, threads);
    return std::make_unique<FromHost>(make_cuda(0));
  }
  // What products with these weights make of their activations.
  ActKind activations(DType type) const {
    if (kernels) return kernels->acts[int(type == DType::f8 ? DType::bf16 : type)].kind;  // fp8 is packed as bf16
    return type == DType::f32 ? ActKind::f32 : ActKind::bf16;
  }
};

inline void PrintTo(const Machine& m, std::ostream* out) { *out << m.name(); }

inline std::vector<Machine> machines() {
  std::vector<Machine> all;
  for (const Kernels* k : available_kernels()) all.push_back({k});
  try {
    make_cuda(0);
    all.push_back({nullptr});
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::input) throw;  // there is one, and it fails; else there is none, or no code for it
  }
  return all;
}

}  // namespace mla
