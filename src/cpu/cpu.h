// The CPU device: a table of kernels for this machine, threads, and scratch that is kept between operations.
#pragma once

#include "core/check.h"
#include "core/threads.h"
#include "cpu/kernels.h"
#include "device/device.h"

#include <vector>

namespace mla {

class CpuDevice final : public Device {
 public:
  CpuDevice(const Kernels& kernels, int threads);

  std::string describe() const override;
  Threads& threads() override { return threads_; }
  Memory& memory() override { return host_memory(); }
  void step(const StepInputs& in, uint64_t key, const std::function<void()>& issue) override;
  Ceilings probe(double seconds) override;
  Weight pack(std::span<const Tensor> pieces) override;
  void embed(std::span<const int32_t> ids, const Weight& w, Tensor out) override;
  using Device::linear;
  void linear(Tensor x, std::span<const Projection> projections) override;
  void linear_heads(Tensor x, const Weight& w, Tensor y) override;
  void ffn(Tensor x, const FfnWeights& w, const Routing* routing, Tensor out) override;
  void route(Tensor logits, const RouterConfig& config, Routing out) override;
  void rms_norm(Tensor x, Tensor weight, float eps, Tensor y) override;
  using Device::rope;
  void rope(Tensor x, Tensor cos_sin, bool interleaved, Tensor y) override;
  void copy(Tensor from, Tensor to) override;
  void store_expanded(Tensor kv, Tensor rotary, const Kv& to) override;
  void store(Tensor rows, std::span<const int64_t> slots, const Kv& kv) override;
  void load(const Kv& kv, const Span& span, int64_t first, Tensor rows) override;
  void attend(Tensor q, const Kv& kv, Spans spans, Mask mask, float scale, Tensor o, Tensor lse, Attend how) override;

  const Kernels& kernels() const { return kernels_; }
  Arena& scratch() { return scratch_; }                                   // of the operation that runs, used by its caller
  Arena& scratch(int thread) { return thread_scratch_[size_t(thread)]; }  // of one worker

 private:
  const Kernels& kernels_;
  Threads threads_;
  Arena scratch_;
  std::vector<Arena> thread_scratch_;
};

// The best kernels of this machine, or those that MLA_ISA names; raises Error for a name it does not know or cannot run.
const Kernels& choose_kernels();
std::vector<const Kernels*> available_kernels();  // slowest first
std::unique_ptr<Device> make_cpu(const Kernels& kernels, int threads);

// Attention, in attention.cpp.
void cpu_store(CpuDevice& device, Tensor rows, std::span<const int64_t> slots, const Kv& kv);
void cpu_load(CpuDevice& device, const Kv& kv, const Span& span, int64_t first, Tensor rows);
void cpu_attend(CpuDevice& device, Tensor q, const Kv& kv, Spans spans, Mask mask, float scale, Tensor o, Tensor lse, Attend how);

}  // namespace mla
