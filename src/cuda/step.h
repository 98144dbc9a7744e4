// What the host gives a step, brought over in one copy, and decode steps recorded as graphs.
#pragma once

#include "cuda/decode.h"
#include "cuda/memory.h"
#include "device/device.h"

#include <array>
#include <optional>
#include <unordered_map>
#include <vector>

namespace mla::cuda {

// A Span as kernels see it: its pages begin at `table` in the list of all pages.
struct GpuSpan {
  int32_t start, count, position, kv_position, kv_count, table;
};

struct SpanTable {
  const GpuSpan* spans;
  const int32_t* pages;
  int count, most_queries;  // spans, and queries of one
};

// Makes the tables on the host, to be copied.
void list_spans(Spans spans, int page_tokens, std::vector<GpuSpan>& table, std::vector<int32_t>& pages);

bool same_spans(Spans a, Spans b);

// What a decode plan depends on beside the spans.
struct DecodeRecipe {
  bool causal;
  int n_h, page_tokens;
  bool operator==(const DecodeRecipe&) const = default;
};

class StagedInputs {
 public:
  explicit StagedInputs(cudaStream_t stream);
  ~StagedInputs();
  StagedInputs(const StagedInputs&) = delete;
  StagedInputs& operator=(const StagedInputs&) = delete;

  // Copies ids, slots, spans and their pages, the angles and the plan, if there is one.
  void begin(const StepInputs& in, int page_tokens, const DecodePlan* plan);
  void end() { active_ = false; }

  const void* find(const void* data, size_t bytes) const;  // where the ids or the slots are, or null
  const SpanTable* find(Spans spans, int page_tokens) const;
  const int32_t* pages(const int32_t* host, int page_tokens) const;  // of one of the spans, or null
  bool holds(Spans spans) const;                                     // the same spans
  bool active() const { return active_; }
  const DeviceDecodePlan* plan() const { return active_ && plan_ ? &*plan_ : nullptr; }
  const std::byte* base() const { return memory_.data(); }
  size_t pages_room() const { return pages_room_; }

 private:
  struct Slot {
    PinnedBuffer memory;
    cudaEvent_t copied = nullptr;
  };
  cudaStream_t stream_;
  std::array<Slot, 3> slots_;  // the host may be that many steps ahead
  int next_ = 0;
  GpuBuffer memory_;
  bool active_ = false;
  StepInputs in_;
  int page_tokens_ = 0;
  size_t ids_ = 0, slots_at_ = 0, pages_room_ = 1024;
  SpanTable spans_{};
  std::vector<int32_t> tables_;  // where each span's pages begin
  std::optional<DeviceDecodePlan> plan_;
};

// Steps that promise to be the same are recorded the second time they come and repeated from then on.
class StepGraphs {
 public:
  // What a recorded step has in itself beside its key: addresses and the sizes of its plan.
  using Shape = std::array<uint64_t, 10>;

  explicit StepGraphs(cudaStream_t stream) : stream_(stream) {}
  ~StepGraphs() { clear(); }
  StepGraphs(const StepGraphs&) = delete;
  StepGraphs& operator=(const StepGraphs&) = delete;

  // `held` tells how much scratch there is: a recording that had to take more is used once.
  void run(uint64_t key, const Shape& shape, const std::function<void()>& issue, const std::function<size_t()>& held);
  bool recording() const { return recording_; }
  void note(uint64_t key, const DecodeRecipe& recipe) { steps_[key].recipe = recipe; }
  std::optional<DecodeRecipe> recipe(uint64_t key) const;
  void clear();

 private:
  struct Recorded {
    Shape shape;
    cudaGraphExec_t graph;
  };
  struct Step {
    std::optional<DecodeRecipe> recipe;
    bool seen = false;
    std::vector<Recorded> graphs;
  };
  cudaGraphExec_t record(const std::function<void()>& issue);

  cudaStream_t stream_;
  bool recording_ = false;
  std::unordered_map<uint64_t, Step> steps_;
};

}  // namespace mla::cuda
