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

TEST(DecodePlan, SharesOutAsEvenlyAsPiecesAllow) {
  const std::vector<int32_t> pages(512, 0);
  const struct {
    int heads, batch, length, most_tiles;
  } cases[] = {{16, 64, 8192, 64}, {16, 64, 1024, 8}, {16, 16, 1024, 2}, {128, 16, 1024, 4}, {128, 4, 1024, 1}, {16, 1, 64, 1}};
  for (const auto& c : cases) {
    std::vector<Span> spans;
    for (int i = 0; i < c.batch; ++i) spans.push_back({i, 1, c.length - 1, 0, c.length, pages.data()});
    const DecodePlan plan = plan_decode(spans, true, c.heads, 64, 132);
    int most = 0;
    for (const DecodePart& part : plan.parts) most = std::max(most, int(part.tiles));
    EXPECT_EQ(most, c.most_tiles) << c.heads << " heads, " << c.batch << " sequences of " << c.length;
  }
}

TEST(DecodePlan, LeavesSequencesWithoutQueriesOut) {
  const std::vector<int32_t> pages(64, 0);
  const std::vector<Span> spans = {{0, 0, 100, 0, 100, pages.data()}, {0, 1, 4095, 0, 4096, pages.data()}, {1, 0, 70, 0, 70, pages.data()}};
  const DecodePlan plan = plan_decode(spans, true, 16, 64, 8);
  ASSERT_EQ(plan.merges.size(), 1u);
  EXPECT_EQ(plan.merges[0].pieces, plan.slots);
  EXPECT_EQ(int(plan.items.size()), plan.slots);
  EXPECT_TRUE(plan_decode(Spans(spans).first(1), true, 16, 64, 8).parts.empty());
}

// Few pieces of many sequences or many of one: blocks fit their memory and share the work evenly.
TEST(DecodePlan, MergesFitAMultiprocessor) {
  for (const int processors : {78, 114, 132})
    for (const int d_v : {512, 128, 64})
      for (const int rows : {1, 16, 17, 64, 128, 512})
        for (int merges = 1; merges < processors; ++merges)
          for (int pieces = 2; pieces <= processors; ++pieces) {
            const MergeShape s = merge_shape(merges, pieces, rows, d_v, processors);
            ASSERT_LE(s.bytes(), MergeShape::most_bytes) << merges << " merges of " << pieces << " pieces, " << rows << " rows";
            ASSERT_GE(s.share * s.team, pieces);
            ASSERT_EQ(s.warps % s.team, 0);
            ASSERT_EQ(d_v / 16 * s.team % s.warps, 0);
            ASSERT_EQ(s.blocks, merges * ((rows + 15) / 16) * (d_v / 16 * s.team / s.warps));
          }
}

}  // namespace
}  // namespace mla::cuda
