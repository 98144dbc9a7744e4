// The CUDA device: one stream, scratch that is kept between operations, and decode steps recorded as graphs.
#pragma once

#include "core/threads.h"
#include "cuda/decode.h"
#include "cuda/memory.h"
#include "cuda/staging.h"
#include "cuda/step.h"
#include "device/device.h"

#include <optional>
#include <string>

namespace mla::cuda {

struct Gate;

// The ids of the last choice: where kernels read them, and where the host does once `made` has come to pass.
struct Choice {
  GpuBuffer ids;
  PinnedBuffer host;  // [draws f64 | ids i32]
  int count = 0;
  cudaEvent_t made = nullptr;
  int32_t* host_ids() const { return reinterpret_cast<int32_t*>(host.data() + host.bytes() / 3 * 2); }
};

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int index);
  ~CudaDevice() override;
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  std::string describe() const override;
  Threads& threads() override { return threads_; }
  Memory& memory() override { return memory_; }
  Ceilings probe(double seconds) override;
  void step(const StepInputs& in, uint64_t key, const std::function<void()>& issue) override;
  Weight pack(std::span<const Tensor> pieces) override;
  void embed(std::span<const int32_t> ids, const Weight& w, Tensor out) override;
  using Device::linear;
  void linear(Tensor x, std::span<const Projection> projections) override;
  void linear_normed(Tensor x, Tensor norm, float eps, Tensor h, std::span<const Projection> projections) override;
  void linear_heads(Tensor x, const Weight& w, Tensor y) override;
  void ffn(Tensor x, const FfnWeights& w, const Routing* routing, Tensor out) override;
  void route(Tensor logits, const RouterConfig& config, Routing out) override;
  void gate(Tensor x, Tensor norm, float eps, Tensor h, const Weight& router, const RouterConfig& config, Tensor scores, Routing out,
            const FfnWeights& shared) override;
  bool choose(Tensor logits, double temperature, std::span<const double> at) override;
  void chosen(std::span<int32_t> ids) override;
  void rms_norm(Tensor x, Tensor weight, float eps, Tensor y) override;
  using Device::rope;
  void rope(Tensor x, Tensor cos_sin, bool interleaved, Tensor y) override;
  DType query_type(const Kv& kv) const override { return decode_sm90_takes(kv) ? DType::bf16 : DType::f32; }
  void copy(Tensor from, Tensor to) override;
  void store_expanded(Tensor kv, Tensor rotary, const Kv& to) override;
  void store_latents(Tensor rows, Tensor norm, float eps, Tensor cos_sin, bool interleaved, std::span<const int64_t> slots, const Kv& kv,
                     const Absorbed* queries) override;
  void store(Tensor rows, std::span<const int64_t> slots, const Kv& kv) override;
  void load(const Kv& kv, const Span& span, int64_t first, Tensor rows) override;
  void attend(Tensor q, const Kv& kv, Spans spans, Mask mask, float scale, Tensor o, Tensor lse, Attend how) override;

 private:
  // Host data where kernels can read them: in the step's inputs, or copied to scratch.
  template <class T>
  const T* on_gpu(std::span<const T> data) {
    if (const void* staged = inputs_.find(data.data(), data.size_bytes())) return static_cast<const T*>(staged);
    auto* to = scratch_.bytes(data.size_bytes());
    memory_.upload(data.data(), to, data.size_bytes());
    return static_cast<const T*>(to);
  }
  // in_front: a gate in whose launch the first product goes, with the gate's norm of x.
  void feed(Tensor x, const FfnWeights& w, const Routing* routing, Tensor out, const Gate* in_front);
  void project(Tensor x, const float* norm, float eps, std::span<const Projection> projections);
  void attend_decode(Tensor q, const Kv& kv, Spans spans, Mask mask, float scale, Tensor o, Tensor lse);

  struct MadePlan {
    std::vector<Span> spans;
    DecodeRecipe recipe;
    UploadedPlan plan;
  };

  cudaDeviceProp properties_{};
  Threads threads_;
  cudaStream_t stream_ = nullptr;
  GpuMemory memory_;
  Arena scratch_;    // of the operation that runs
  Staging staging_;  // of weights
  StagedInputs inputs_;
  StepGraphs graphs_;
  GpuBuffer gate_exchange_;             // Gate::exchange
  GpuBuffer attention_taken_;           // AttentionCall::taken
  const void* fresh_choice_ = nullptr;  // of the last routing, until another product has been launched
  uint64_t key_ = 0;                    // of the step that runs
  Choice choice_;
  Ceilings ceilings_;
  std::vector<MadePlan> plans_;  // of this step, beside the staged one
};

}  // namespace mla::cuda
