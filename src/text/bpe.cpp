// The merge loop: a scan over a few symbols for ordinary words, a heap over a linked list for long ones.
#include "text/bpe.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>

namespace mla {

namespace {

constexpr uint64_t kEmpty = std::numeric_limits<uint64_t>::max();  // no pair: ids are not negative
constexpr size_t kShort = 32;                                      // symbols up to which the scan is faster
constexpr int32_t kNoRank = std::numeric_limits<int32_t>::max();

uint64_t pair_of(int32_t left, int32_t right) { return uint64_t(uint32_t(left)) << 32 | uint32_t(right); }

}  // namespace

Bpe::Bpe(size_t merges) {
  const size_t size = std::bit_ceil(std::max<size_t>(16, 2 * merges));
  slots_.assign(size, {kEmpty, 0, 0});
  shift_ = 64 - std::countr_zero(size);
}

void Bpe::add(int32_t left, int32_t right, int32_t rank, int32_t result) {
  if (2 * (used_ + 1) > slots_.size()) {
    Bpe larger(slots_.size());
    for (const Slot& slot : slots_)
      if (slot.pair != kEmpty) larger.add(int32_t(slot.pair >> 32), int32_t(slot.pair), slot.rank, slot.result);
    *this = std::move(larger);
  }
  const uint64_t pair = pair_of(left, right);
  size_t i = slot_of(pair);
  while (slots_[i].pair != kEmpty && slots_[i].pair != pair) i = (i + 1) & (slots_.size() - 1);
  used_ += slots_[i].pair == kEmpty;
  slots_[i] = {pair, rank, result};
}

const Bpe::Slot* Bpe::find(int32_t left, int32_t right) const {
  const uint64_t pair = pair_of(left, right);
  for (size_t i = slot_of(pair);; i = (i + 1) & (slots_.size() - 1)) {
    if (slots_[i].pair == pair) return &slots_[i];
    if (slots_[i].pair == kEmpty) return nullptr;
  }
}

void Bpe::merge(std::vector<int32_t>& symbols, size_t from) const {
  size_t count = symbols.size() - from;
  if (count < 2) return;
  if (count <= kShort)
    merge_short(symbols.data() + from, count);
  else
    merge_long(symbols.data() + from, count);
  symbols.resize(from + count);
}

void Bpe::merge_short(int32_t* symbols, size_t& count) const {
  std::array<int32_t, kShort> rank, result;  // of the pair that begins here
  const auto look = [&](size_t i) {
    const Slot* slot = find(symbols[i], symbols[i + 1]);
    rank[i] = slot ? slot->rank : kNoRank;
    result[i] = slot ? slot->result : -1;
  };
  for (size_t i = 0; i + 1 < count; i++) look(i);
  while (count > 1) {
    const size_t best = size_t(std::min_element(rank.begin(), rank.begin() + count - 1) - rank.begin());
    if (result[best] < 0) break;
    symbols[best] = result[best];
    count--;
    for (size_t i = best + 1; i < count; i++) {
      symbols[i] = symbols[i + 1];
      rank[i - 1] = rank[i];
      result[i - 1] = result[i];
    }
    if (best > 0) look(best - 1);
    if (best + 1 < count) look(best);
  }
}

void Bpe::merge_long(int32_t* symbols, size_t& count) const {
  struct Candidate {
    int32_t rank, at, result;
    bool operator<(const Candidate& other) const { return rank != other.rank ? rank > other.rank : at > other.at; }  // best on top
  };
  constexpr int32_t kGone = -1;
  const auto n = int32_t(count);
  std::vector<int32_t> previous(count), next(count);
  for (int32_t i = 0; i < n; i++) previous[i] = i - 1, next[i] = i + 1;
  std::vector<Candidate> heap;
  for (int32_t i = 0; i + 1 < n; i++)
    if (const Slot* slot = find(symbols[i], symbols[i + 1])) heap.push_back({slot->rank, i, slot->result});
  std::make_heap(heap.begin(), heap.end());
  const auto push = [&](int32_t left, int32_t right) {
    const Slot* slot = find(symbols[left], symbols[right]);
    if (!slot) return;
    heap.push_back({slot->rank, left, slot->result});
    std::push_heap(heap.begin(), heap.end());
  };
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end());
    const Candidate best = heap.back();
    heap.pop_back();
    const int32_t left = best.at;
    if (symbols[left] == kGone || next[left] == n) continue;
    const int32_t right = next[left];
    const Slot* slot = find(symbols[left], symbols[right]);  // the pair may have changed since it was noted
    if (!slot || slot->rank != best.rank || slot->result != best.result) continue;
    symbols[left] = best.result;
    symbols[right] = kGone;
    next[left] = next[right];
    if (next[left] < n) {
      previous[next[left]] = left;
      push(left, next[left]);
    }
    if (previous[left] >= 0) push(previous[left], left);
  }
  count = size_t(std::remove(symbols, symbols + count, kGone) - symbols);
}

}  // namespace mla
