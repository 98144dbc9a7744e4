// Shares tiles out so that every part has the same cost, splitting sequences where a part is full.
#include "cuda/decode_plan.h"

#include <algorithm>
#include <limits>

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

// Goes through the sequences in runs of tiles: `run(whole, first tile, tiles)` for each, `close()` where a part is full, that is, costs
// `capacity`. The last of `parts` takes what is left, a part nearly full nothing more. Returns how many parts were used.
template <class Close, class Run>
int share_out(const std::vector<DecodeItem>& wholes, int capacity, bool split, int parts, const DecodeCosts& costs, Close close, Run run) {
  int used = 1, room = capacity;
  for (const DecodeItem& whole : wholes) {
    int done = 0;
    do {
      const int left = whole.tile_end - done, least = costs.item + (split ? std::min(costs.fewest_tiles, left) : left);
      if (used < parts && room < least && room < capacity) close(), ++used, room = capacity;
      const int tiles = used == parts ? left : std::min(left, std::max(1, room - costs.item));
      run(whole, done, tiles);
      done += tiles, room -= tiles + costs.item;
    } while (done < whole.tile_end);
  }
  return used;
}

int parts_used(const std::vector<DecodeItem>& wholes, int capacity, bool split, const DecodeCosts& costs) {
  auto nothing = [](auto...) {};
  return share_out(wholes, capacity, split, std::numeric_limits<int>::max(), costs, nothing, nothing);
}

// The least that the costliest of `parts` runs of whole sequences costs.
int capacity_whole(const std::vector<DecodeItem>& wholes, int parts, const DecodeCosts& costs) {
  int low = 0, high = 0;
  for (const DecodeItem& w : wholes) low = std::max(low, w.tile_end + costs.item), high += w.tile_end + costs.item;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (parts_used(wholes, middle, false, costs) <= parts)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// The least that parts may cost if sequences are split, at most what they cost if each splits one. Less by a few percent is not worth the
// pieces it takes.
int capacity_split(const std::vector<DecodeItem>& wholes, int parts, const DecodeCosts& costs) {
  constexpr double worth = 0.95;
  int64_t tiles = 0;
  for (const DecodeItem& w : wholes) tiles += w.tile_end;
  auto capacity = [&](int64_t cost) { return costs.item + std::max(costs.fewest_tiles, ceil_div(cost, parts)); };
  const int most = capacity(tiles + int64_t(wholes.size()) * costs.item);
  for (int c = capacity(tiles); c <= int(worth * most); ++c)
    if (parts_used(wholes, c, true, costs) <= parts) return c;
  return most;
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
  std::vector<DecodeItem> wholes;
  for (const Span& s : spans) {
    if (s.count == 0) continue;
    DecodeItem item = whole_item(s, causal, n_h);
    item.table = int32_t(plan.pages.size());
    plan.pages.insert(plan.pages.end(), s.pages, s.pages + ceil_div(s.kv_count, page_tokens));
    plan.most_rows = std::max(plan.most_rows, item.rows);
    wholes.push_back(item);
  }
  plan.row_blocks = std::max(1, ceil_div(plan.most_rows, block_rows));
  const int parts = std::max(1, processors / plan.row_blocks);
  int longest = 0;
  for (const DecodeItem& w : wholes) longest = std::max(longest, w.tile_end);
  if (longest <= costs.few_tiles) costs.fewest_tiles = 1;
  const int left_whole = capacity_whole(wholes, parts, costs), split_up = capacity_split(wholes, parts, costs);
  const bool split = left_whole > split_up + costs.merge;
  size_t begin = 0;
  auto close = [&] {
    plan.parts.push_back(part_of(plan, begin, plan.items.size(), page_tokens));
    begin = plan.items.size();
  };
  share_out(wholes, split ? split_up : left_whole, split, parts, costs, close, [&](const DecodeItem& whole, int from, int tiles) {
    plan.items.push_back(whole);
    plan.items.back().tile_begin = from, plan.items.back().tile_end = from + tiles;
  });
  if (begin < plan.items.size()) close();
  for (size_t i = 0, end; i < plan.items.size(); i = end) {
    for (end = i + 1; end < plan.items.size() && plan.items[end].tile_begin > 0; ++end) {}  // a sequence's other runs
    const int pieces = int(end - i);
    if (pieces == 1) continue;
    plan.merges.push_back({plan.items[i].start, plan.items[i].rows, plan.slots, pieces});
    for (int piece = 0; piece < pieces; ++piece) {
      DecodeItem& item = plan.items[i + size_t(piece)];
      item.slot = plan.slots, item.piece = piece, item.pieces = pieces;
    }
    plan.slots += pieces;
    plan.most_pieces = std::max(plan.most_pieces, pieces);
  }
  // Slots were given after some parts had copied their first items.
  for (DecodePart& part : plan.parts) part.first = plan.items[size_t(part.begin)];
  return plan;
}

MergeShape merge_shape(int merges, int most_pieces, int most_rows, int d_v, int processors) {
  const int sixteens = d_v / 16, tasks = merges * ceil_div(most_rows, slab_rows) * sixteens,
            places = 2 * processors * MergeShape::most_warps;
  MergeShape s{1, MergeShape::most_warps, 0, most_pieces};
  // Few pieces a warp as long as a quarter of the places is enough for all warps, many as long as they have a place at once.
  auto larger = [&](int pieces, int of_places) { return pieces * s.team < most_pieces && 2 * s.team * tasks <= of_places; };
  while (s.team < MergeShape::most_warps && (larger(MergeShape::few, places / 4) || larger(MergeShape::many, places))) s.team *= 2;
  s.share = ceil_div(most_pieces, s.team);
  auto blocks = [&] { return tasks * s.team / s.warps; };
  // Fewer warps if there would be multiprocessors without, or if a block would be too large.
  while (s.warps > s.team && (blocks() < processors || s.warps > s.team * sixteens || s.bytes() > MergeShape::most_bytes)) s.warps /= 2;
  s.blocks = blocks();
  return s;
}

}  // namespace mla::cuda
