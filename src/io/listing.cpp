// Tensors of a file lie in it, apart from each other.
#include "io/listing.h"

#include "core/check.h"

#include <algorithm>
#include <unordered_set>

namespace mla {

bool is_printable(std::string_view name) {
  return std::none_of(name.begin(), name.end(), [](char c) { return uint8_t(c) < 0x20 || c == 0x7f; });
}

std::string describe(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += fmt::format("{}{}", i ? ", " : "", shape[i]);
  return text + "]";
}

void check_extents(const std::vector<ListedTensor>& tensors, uint64_t data_begin, uint64_t file_bytes, bool no_holes,
                   std::string_view what) {
  std::unordered_set<std::string_view> names;
  std::vector<const ListedTensor*> order;
  order.reserve(tensors.size());
  for (const ListedTensor& t : tensors) {
    if (!is_printable(t.name)) fail_input("{}: the name of a tensor has control characters", what);
    if (!names.insert(t.name).second) fail_input("{} lists the tensor {} twice", what, t.name);
    uint64_t end;
    if (t.begin < data_begin || !add(t.begin, t.bytes, end) || end > file_bytes)
      fail_input("{}: the tensor {} needs {} bytes from byte {} on, but the file has {}; it is cut short or damaged, fetch it again", what,
                 t.name, t.bytes, t.begin, file_bytes);
    order.push_back(&t);
  }
  std::sort(order.begin(), order.end(), [](auto* a, auto* b) { return a->begin != b->begin ? a->begin < b->begin : a->bytes < b->bytes; });
  uint64_t free_from = data_begin;
  const ListedTensor* last = nullptr;
  for (const ListedTensor* t : order) {
    if (t->begin < free_from && t->bytes > 0) fail_input("{}: the tensors {} and {} overlap", what, last->name, t->name);
    if (no_holes && t->begin > free_from) fail_input("{}: no tensor owns bytes {} to {}", what, free_from, t->begin);
    if (t->end() < free_from) continue;
    free_from = t->end();
    last = t;
  }
  if (no_holes && free_from != file_bytes) fail_input("{}: no tensor owns the last {} bytes", what, file_bytes - free_from);
}

}  // namespace mla
