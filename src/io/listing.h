// What the header of a model file lists, before names are given a meaning; and the checks both formats share.
#pragma once

#include "core/dtype.h"

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace mla {

struct ListedTensor {
  std::string name;               // as in the file
  std::string type;               // as the file spells it
  std::optional<DType> dtype;     // nothing: a type that no weight of ours may have
  std::vector<int64_t> shape;     // outermost first
  uint64_t begin = 0, bytes = 0;  // from the start of the file
  uint64_t end() const { return begin + bytes; }
};

// False on overflow.
inline bool multiply(uint64_t a, uint64_t b, uint64_t& product) { return !__builtin_mul_overflow(a, b, &product); }
inline bool add(uint64_t a, uint64_t b, uint64_t& sum) { return !__builtin_add_overflow(a, b, &sum); }

// No control characters: names end up in messages on somebody's terminal.
bool is_printable(std::string_view name);

// "[2, 3]"
std::string describe(const std::vector<int64_t>& shape);

// Raises Error where two tensors share bytes, where one leaves the file, where a name comes twice or cannot be printed and, with
// `no_holes`, where the tensors do not fill [data_begin, file_bytes) to the last byte. `what` names the file.
void check_extents(const std::vector<ListedTensor>& tensors, uint64_t data_begin, uint64_t file_bytes, bool no_holes,
                   std::string_view what);

}  // namespace mla
