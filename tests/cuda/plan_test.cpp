// Decode's plan: every tile of every sequence once, parts of nearly the same cost.
#include "cuda/decode_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>

namespace mla::cuda {
namespace {

TEST(DecodePlan, CoversEveryTileOnceInPartsOfEqualCost) {
  const std::vector<int32_t> pages(2000, 0);
  const std::vector<std::vector<int>> batches = {{1}, {0}, {0, 0, 5}, {100000}, {4096, 4096, 4096}, {1, 70, 3000, 0, 20000, 64, 65, 128}};
  for (const auto& lengths : batches)
    for (const int processors : {1, 3, 66, 132})
      for (const int heads : {16, 128}) {
        std::vector<Span> spans;
        for (size_t i = 0; i < lengths.size(); ++i) spans.push_back({int32_t(i), 1, lengths[i] - 1, 0, lengths[i], pages.data()});
        const DecodePlan plan = plan_decode(spans, true, heads, 64, processors);
        ASSERT_LE(int(plan.parts.size()) * plan.row_blocks, std::max(processors, plan.row_blocks));
        ASSERT_EQ(plan.parts.back().end, int(plan.items.size()));
        std::map<int, int> done;  // tiles of each sequence so far
        int64_t most = 0, all = 0;
        int next = 0;
        for (const DecodePart& part : plan.parts) {
          ASSERT_EQ(part.begin, next);
          next = part.end;
          int64_t tiles = 0;
          for (int i = part.begin; i < part.end; ++i) {
            const DecodeItem& item = plan.items[size_t(i)];
            ASSERT_EQ(item.tile_begin, done[item.start]);
            done[item.start] = item.tile_end;
            tiles += item.tile_end - item.tile_begin;
          }
          most = std::max(most, tiles), all += tiles;
        }
        for (size_t i = 0; i < lengths.size(); ++i) ASSERT_EQ(done[int(i)], (lengths[i] + 63) / 64);
        EXPECT_LE(most, (all + int64_t(lengths.size()) * 2) / std::max(1, processors / plan.row_blocks) + 9);
        int slots = 0;
        for (const DecodeMerge& m : plan.merges) slots += m.pieces;
        EXPECT_EQ(slots, plan.slots);
      }
}

}  // namespace
}  // namespace mla::cuda
