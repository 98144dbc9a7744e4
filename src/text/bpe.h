// Byte-pair encoding: joins neighbouring symbols by rank until no pair has a merge.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace mla {

class Bpe {
 public:
  explicit Bpe(size_t merges = 0);  // room for this many

  // The lower the rank the earlier the merge; of equal ranks the leftmost goes first. A pair added twice keeps the last.
  void add(int32_t left, int32_t right, int32_t rank, int32_t result);

  // Merges symbols[from...] in place; the vector shrinks. O(n log n).
  void merge(std::vector<int32_t>& symbols, size_t from) const;

 private:
  struct Slot {
    uint64_t pair;
    int32_t rank, result;
  };
  const Slot* find(int32_t left, int32_t right) const;
  void merge_short(int32_t* symbols, size_t& count) const;
  void merge_long(int32_t* symbols, size_t& count) const;
  size_t slot_of(uint64_t pair) const { return size_t(pair * 0x9E3779B97F4A7C15u >> shift_); }

  std::vector<Slot> slots_;  // open addressing, a power of two, at most half full
  size_t used_ = 0;
  int shift_ = 60;
};

}  // namespace mla
