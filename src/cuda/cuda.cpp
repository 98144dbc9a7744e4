// Opens a GPU, measures what it does at best, and runs steps.
#include "cuda/cuda.h"

#include "core/check.h"
#include "cuda/gate.h"
#include "cuda/hopper.h"
#include "cuda/probe.h"

#include <algorithm>

namespace mla {
namespace cuda {
namespace {

// The properties of GPU `index`, in words if there is none.
cudaDeviceProp open(int index) {
  int count = 0;
  const cudaError_t found = cudaGetDeviceCount(&count);
  if (found == cudaErrorInsufficientDriver)
    fail_input("--device cuda needs a newer NVIDIA driver (or one at all: none may be installed); use --device cpu");
  if (found != cudaSuccess || count == 0)
    fail_input("--device cuda found no usable NVIDIA GPU on this machine ({}); use --device cpu", cudaGetErrorString(found));
  if (index >= count)
    fail_input("--device cuda:{} is not there; this machine has {} GPU{}, counted from 0", index, count, count == 1 ? "" : "s");
  cudaDeviceProp p{};
  check(cudaGetDeviceProperties(&p, index));
  if (p.major < 8)
    fail_input("--device cuda:{} is {}, compute capability {}.{}; 8.0 (Ampere) or newer is needed", index, p.name, p.major, p.minor);
  check(cudaSetDevice(index));
  hopper();
  return p;
}

cudaStream_t new_stream() {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return stream;
}

}  // namespace

CudaDevice::CudaDevice(int index)
    : properties_(open(index)),
      stream_(new_stream()),
      memory_(stream_),
      scratch_(memory_),
      staging_(stream_, threads_),
      inputs_(stream_),
      graphs_(stream_),
      gate_exchange_(few_rows * most_experts * 4),
      attention_taken_(sizeof(unsigned)) {
  check(cudaMemsetAsync(gate_exchange_.data(), 0xff, gate_exchange_.bytes(), stream_));
  check(cudaMemsetAsync(attention_taken_.data(), 0, attention_taken_.bytes(), stream_));
  check(cudaEventCreateWithFlags(&choice_.made, cudaEventDisableTiming));
  step_tokens = 4096, tile_bytes = int64_t(1) << 30;
}

CudaDevice::~CudaDevice() {
  cudaStreamSynchronize(stream_);
  graphs_.clear();
  cudaEventDestroy(choice_.made);
  cudaStreamDestroy(stream_);
}

std::string CudaDevice::describe() const {
  return fmt::format("{}, {:.0f} GB{}", properties_.name, 1e-9 * double(properties_.totalGlobalMem), hopper() ? "" : ", portable kernels");
}

Ceilings CudaDevice::probe(double seconds) {
  if (ceilings_.read_gb_s == 0) {
    ceilings_.read_gb_s = probe_read(stream_, seconds / 2);
    ceilings_.bf16_gflop_s = probe_bf16(stream_, seconds / 2);
  }
  return ceilings_;
}

void CudaDevice::step(const StepInputs& in, uint64_t key, const std::function<void()>& issue) {
  scratch_.reset();
  constexpr int page_tokens = 64;
  const auto recipe = key ? graphs_.recipe(key) : std::nullopt;
  std::optional<DecodePlan> plan;
  if (recipe) plan = plan_decode(in.spans, recipe->causal, recipe->n_h, recipe->page_tokens, properties_.multiProcessorCount);
  struct End {
    CudaDevice& d;
    ~End() { d.inputs_.end(), d.plans_.clear(), d.key_ = 0; }
  } end{*this};
  inputs_.begin(in, page_tokens, plan ? &*plan : nullptr);
  key_ = key;
  if (key == 0) return issue();
  StepGraphs::Shape shape{};
  {
    ArenaScope scope(scratch_);
    shape = {reinterpret_cast<uint64_t>(inputs_.base()), reinterpret_cast<uint64_t>(scratch_.bytes(1)), uint64_t(inputs_.pages_room())};
  }
  if (plan)
    for (size_t i = 0; const uint64_t size : {plan->parts.size(), plan->items.size(), plan->merges.size(), size_t(plan->slots),
                                              size_t(plan->most_pieces), size_t(plan->most_rows), size_t(plan->row_blocks)})
      shape[3 + i++] = size;
  graphs_.run(key, shape, issue, [this] { return scratch_.held_bytes(); });
}

}  // namespace cuda

std::unique_ptr<Device> make_cuda(int index) { return std::make_unique<cuda::CudaDevice>(index); }

}  // namespace mla
