// Shares tiles out so that every part has the same cost, splitting sequences where a part is full.
#include "cuda/decode_plan.h"

#include <algorithm>

namespace mla::cuda {
namespace {

int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

DecodeItem whole_item(const Span& s, bool causal, int n_h) {
  DecodeItem item{s.start, s.count * n_h, 0, 0, 0, s.kv_count, s.kv_count, -1, 0, 1};
  if (causal) item.limit = int(std::clamp<int64_t>(int64_t(s.position) - s.kv_position + 1, -s.count, s.kv_count));
  const int seen = std::clamp(item.limit + s.count - 1, 0, s.kv_count);
  item.tile_end = ceil_div(causal ? seen : s.kv_count, tile_tokens);
  return item;
}

// The least that the costliest of `parts` runs of whole sequences costs.
int64_t cost_unsplit(const std::vector<DecodeItem>& wholes, int parts, int item_cost) {
  int64_t low = 0, high = 0;
  for (const DecodeItem& w : wholes) low = std::max<int64_t>(low, w.tile_end + item_cost), high += w.tile_end + item_cost;
  auto fits = [&](int64_t capacity) {
    int64_t used = 1, room = capacity;
    for (const DecodeItem& w : wholes) {
      if (room < w.tile_end + item_cost) ++used, room = capacity;
      room -= w.tile_end + item_cost;
    }
    return used <= parts;
  };
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (fits(middle))
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

DecodePart part_of(const DecodePlan& plan, size_t begin, size_t end, int page_tokens) {
  DecodePart part{plan.items[begin], int32_t(begin), int32_t(end), 0, {}};
  for (size_t i = begin; i < end; ++i) part.tiles += plan.items[i].tile_end - plan.items[i].tile_begin;
  for (int i = 0; i < DecodePart::first_tiles && part.first.tile_begin + i < part.first.tile_end; ++i)
    part.page[i] = plan.pages[size_t(part.first.table + (part.first.tile_begin + i) * tile_tokens / page_tokens)];
  return part;
}

}  // namespace

DecodePlan plan_decode(Spans spans, bool causal, int n_h, int page_tokens, int processors, DecodeCosts costs) {
  DecodePlan plan;
  int64_t cost = 0;
  std::vector<DecodeItem> wholes;
  for (const Span& s : spans) {
    DecodeItem item = whole_item(s, causal, n_h);
    item.table = int32_t(plan.pages.size());
    plan.pages.insert(plan.pages.end(), s.pages, s.pages + ceil_div(s.kv_count, page_tokens));
    plan.most_rows = std::max(plan.most_rows, item.rows);
    cost += item.tile_end + costs.item;
    wholes.push_back(item);
  }
  plan.row_blocks = std::max(1, ceil_div(plan.most_rows, block_rows));
  const int parts = std::max(1, processors / plan.row_blocks);
  int longest = 0;
  for (const DecodeItem& w : wholes) longest = std::max(longest, w.tile_end);
  if (longest <= costs.few_tiles) costs.fewest_tiles = 1;
  int capacity = costs.item + std::max(costs.fewest_tiles, ceil_div(cost, parts));  // each part may split one
  const int64_t unsplit = cost_unsplit(wholes, parts, costs.item);
  const bool split = unsplit > capacity + costs.merge;
  if (!split) capacity = int(unsplit);
  int room = capacity;
  size_t begin = 0;
  for (const DecodeItem& whole : wholes) {
    const size_t first = plan.items.size();
    DecodeItem item = whole;
    do {
      // The last part takes what is left, a part nearly full nothing more.
      bool last = int(plan.parts.size()) + 1 == parts;
      const int least = costs.item + (split ? std::min(costs.fewest_tiles, whole.tile_end - item.tile_begin) : whole.tile_end);
      if (!last && room < least && room < capacity) {
        plan.parts.push_back(part_of(plan, begin, plan.items.size(), page_tokens));
        begin = plan.items.size(), room = capacity;
        last = int(plan.parts.size()) + 1 == parts;
      }
      const int left = whole.tile_end - item.tile_begin;
      const int tiles = last ? left : std::min(left, std::max(1, room - costs.item));
      item.tile_end = item.tile_begin + tiles;
      plan.items.push_back(item);
      item.tile_begin = item.tile_end;
      room -= tiles + costs.item;
    } while (item.tile_begin < whole.tile_end);
    const int pieces = int(plan.items.size() - first);
    if (pieces == 1) continue;
    plan.merges.push_back({whole.start, whole.rows, plan.slots, pieces});
    for (int i = 0; i < pieces; ++i) {
      DecodeItem& piece = plan.items[first + size_t(i)];
      piece.slot = plan.slots, piece.piece = i, piece.pieces = pieces;
    }
    plan.slots += pieces;
    plan.most_pieces = std::max(plan.most_pieces, pieces);
  }
  if (begin < plan.items.size()) plan.parts.push_back(part_of(plan, begin, plan.items.size(), page_tokens));
  // Slots were given after some parts had copied their first items.
  for (DecodePart& part : plan.parts) part.first = plan.items[size_t(part.begin)];
  return plan;
}

}  // namespace mla::cuda
