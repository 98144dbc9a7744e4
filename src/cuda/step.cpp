// Packs a step's inputs into one copy, and records and repeats its operations.
#include "cuda/step.h"

#include <algorithm>
#include <cstring>

namespace mla::cuda {
namespace {

// Pieces one after the other, each on a boundary of 64 bytes.
class Packing {
 public:
  template <class T>
  size_t add(const T* data, size_t count) {
    const size_t at = (bytes_ + 63) / 64 * 64;
    bytes_ = at + count * sizeof(T);
    pieces_.push_back({data, count * sizeof(T), at});
    return at;
  }
  template <class T>
  size_t add(const std::vector<T>& data) {
    return add(data.data(), data.size());
  }
  size_t bytes() const { return bytes_; }
  void write(std::byte* to) const {
    for (const Piece& p : pieces_)
      if (p.bytes > 0) std::memcpy(to + p.at, p.data, p.bytes);
  }

 private:
  struct Piece {
    const void* data;
    size_t bytes, at;
  };
  std::vector<Piece> pieces_;
  size_t bytes_ = 0;
};

bool same(const Span& a, const Span& b) {
  return a.start == b.start && a.count == b.count && a.position == b.position && a.kv_position == b.kv_position &&
         a.kv_count == b.kv_count && a.pages == b.pages;
}

constexpr size_t most_recordings = 64;

}  // namespace

bool same_spans(Spans a, Spans b) { return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), same); }

void list_spans(Spans spans, int page_tokens, std::vector<GpuSpan>& table, std::vector<int32_t>& pages) {
  for (const Span& s : spans) {
    table.push_back({s.start, s.count, s.position, s.kv_position, s.kv_count, int32_t(pages.size())});
    pages.insert(pages.end(), s.pages, s.pages + (s.kv_count + page_tokens - 1) / page_tokens);
  }
}

StagedInputs::StagedInputs(cudaStream_t stream) : stream_(stream) {
  for (Slot& slot : slots_) check(cudaEventCreateWithFlags(&slot.copied, cudaEventDisableTiming));
}

StagedInputs::~StagedInputs() {
  for (Slot& slot : slots_)
    if (slot.copied) cudaEventDestroy(slot.copied);
}

void StagedInputs::begin(const StepInputs& in, int page_tokens, const DecodePlan* plan) {
  in_ = in, page_tokens_ = page_tokens, active_ = false;
  std::vector<GpuSpan> table;
  std::vector<int32_t> pages;
  list_spans(in.spans, page_tokens, table, pages);
  spans_ = {nullptr, nullptr, int(table.size()), 0};
  tables_.clear();
  for (const GpuSpan& s : table) tables_.push_back(s.table);
  for (const Span& s : in.spans) spans_.most_queries = std::max(spans_.most_queries, s.count);

  // What grows with the context comes last, so that the rest stays where it is from step to step.
  Packing packing;
  ids_ = packing.add(in.ids.data(), in.ids.size());
  slots_at_ = packing.add(in.slots.data(), in.slots.size());
  const size_t table_at = packing.add(table);
  size_t parts = 0, items = 0, merges = 0, plan_pages = 0;
  if (plan) parts = packing.add(plan->parts), items = packing.add(plan->items), merges = packing.add(plan->merges);
  // A list of pages that doubles its room when it is full leaves the other where it is.
  while (pages_room_ < pages.size()) pages_room_ *= 2;
  pages.resize(pages_room_);
  const size_t pages_at = packing.add(pages);
  if (plan) plan_pages = packing.add(plan->pages);

  if (memory_.bytes() < packing.bytes()) memory_ = GpuBuffer(std::max<size_t>(packing.bytes() * 2, size_t(1) << 20));
  Slot& slot = slots_[size_t(next_++ % int(slots_.size()))];
  const size_t angles = (packing.bytes() + 63) / 64 * 64, needed = angles + in.cos_sin_from.size_bytes();
  check(cudaEventSynchronize(slot.copied));
  if (slot.memory.bytes() < needed) slot.memory = PinnedBuffer(needed * 2);
  packing.write(slot.memory.data());
  check(cudaMemcpyAsync(memory_.data(), slot.memory.data(), packing.bytes(), cudaMemcpyHostToDevice, stream_));
  if (!in.cos_sin_from.empty()) {
    std::memcpy(slot.memory.data() + angles, in.cos_sin_from.data(), in.cos_sin_from.size_bytes());
    check(cudaMemcpyAsync(in.cos_sin.data, slot.memory.data() + angles, in.cos_sin_from.size_bytes(), cudaMemcpyHostToDevice, stream_));
  }
  check(cudaEventRecord(slot.copied, stream_));

  auto at = [this]<class T>(size_t offset, T*) { return reinterpret_cast<const T*>(memory_.data() + offset); };
  spans_.spans = at(table_at, static_cast<GpuSpan*>(nullptr));
  spans_.pages = at(pages_at, static_cast<int32_t*>(nullptr));
  plan_.reset();
  if (plan)
    plan_ = DeviceDecodePlan{plan->row_blocks,
                             int(plan->parts.size()),
                             int(plan->items.size()),
                             plan->slots,
                             int(plan->merges.size()),
                             plan->most_rows,
                             plan->most_pieces,
                             at(parts, static_cast<DecodePart*>(nullptr)),
                             at(items, static_cast<DecodeItem*>(nullptr)),
                             at(merges, static_cast<DecodeMerge*>(nullptr)),
                             at(plan_pages, static_cast<int32_t*>(nullptr))};
  active_ = true;
}

const void* StagedInputs::find(const void* data, size_t bytes) const {
  if (!active_) return nullptr;
  if (data == in_.ids.data() && bytes == in_.ids.size_bytes()) return memory_.data() + ids_;
  if (data == in_.slots.data() && bytes == in_.slots.size_bytes()) return memory_.data() + slots_at_;
  return nullptr;
}

bool StagedInputs::holds(Spans spans) const { return active_ && same_spans(spans, in_.spans); }

const int32_t* StagedInputs::pages(const int32_t* host, int page_tokens) const {
  if (!active_ || page_tokens != page_tokens_) return nullptr;
  for (size_t i = 0; i < in_.spans.size(); ++i)
    if (in_.spans[i].pages == host) return spans_.pages + tables_[i];
  return nullptr;
}

const SpanTable* StagedInputs::find(Spans spans, int page_tokens) const {
  return page_tokens == page_tokens_ && holds(spans) ? &spans_ : nullptr;
}

std::optional<DecodeRecipe> StepGraphs::recipe(uint64_t key) const {
  const auto step = steps_.find(key);
  return step == steps_.end() ? std::nullopt : step->second.recipe;
}

cudaGraphExec_t StepGraphs::record(const std::function<void()>& issue) {
  check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed));
  recording_ = true;
  cudaGraph_t graph = nullptr;
  try {
    issue();
  } catch (...) {
    recording_ = false;
    cudaStreamEndCapture(stream_, &graph);
    if (graph) cudaGraphDestroy(graph);
    throw;
  }
  recording_ = false;
  check(cudaStreamEndCapture(stream_, &graph));
  cudaGraphExec_t executable = nullptr;
  const cudaError_t made = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check(made);
  return executable;
}

void StepGraphs::run(uint64_t key, const Shape& shape, const std::function<void()>& issue, const std::function<size_t()>& held) {
  if (!steps_[key].seen) {
    steps_[key].seen = true;
    return issue();
  }
  for (const Recorded& r : steps_[key].graphs)
    if (r.shape == shape) return check(cudaGraphLaunch(r.graph, stream_));
  size_t recordings = 0;
  for (const auto& [other, step] : steps_) recordings += step.graphs.size();
  if (recordings >= most_recordings)
    for (auto& [other, step] : steps_) {
      for (const Recorded& r : step.graphs) cudaGraphExecDestroy(r.graph);
      step.graphs.clear();
    }
  const size_t before = held();
  const cudaGraphExec_t graph = record(issue);
  check(cudaGraphLaunch(graph, stream_));
  if (held() == before)
    steps_[key].graphs.push_back({shape, graph});
  else
    cudaGraphExecDestroy(graph);
}

void StepGraphs::clear() {
  for (auto& [key, step] : steps_)
    for (const Recorded& r : step.graphs) cudaGraphExecDestroy(r.graph);
  steps_.clear();
}

}  // namespace mla::cuda
