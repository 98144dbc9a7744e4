// Reading a safetensors header with every number checked against the file's size.
#include "io/safetensors.h"

#include "core/check.h"
#include "io/json.h"

#include <algorithm>
#include <cstring>

namespace mla {
namespace {

using nlohmann::json;

constexpr uint64_t max_header = 100'000'000;
constexpr size_t max_dimensions = 16;

struct Type {
  std::string_view name;
  uint64_t bytes;
  std::optional<DType> dtype;
};

constexpr Type types[] = {
    {"F32", 4, DType::f32},   {"F16", 2, DType::f16},   {"BF16", 2, DType::bf16},  {"F64", 8, std::nullopt},  {"I64", 8, std::nullopt},
    {"I32", 4, std::nullopt}, {"I16", 2, std::nullopt}, {"I8", 1, std::nullopt},   {"U64", 8, std::nullopt},  {"U32", 4, std::nullopt},
    {"U16", 2, std::nullopt}, {"U8", 1, std::nullopt},  {"BOOL", 1, std::nullopt}, {"F8_E4M3", 1, DType::f8}, {"F8_E5M2", 1, std::nullopt},
};

// A member of a tensor's entry: a whole number that is not negative.
uint64_t whole(const json& value, std::string_view what, const std::string& name, std::string_view member) {
  if (!value.is_number_unsigned())
    fail_input("{}: {} of the tensor {} holds {}, which is no whole number", what, member, name, value.dump(-1, ' ', true));
  return value.get<uint64_t>();
}

const json& member(const json& entry, const char* key, std::string_view what, const std::string& name) {
  const auto found = entry.find(key);
  if (found == entry.end()) fail_input("{}: the tensor {} has no {}", what, name, key);
  return *found;
}

const Type& type_of(const json& entry, std::string_view what, const std::string& name) {
  const json& text = member(entry, "dtype", what, name);
  if (!text.is_string()) fail_input("{}: the dtype of the tensor {} is no string", what, name);
  for (const Type& type : types)
    if (type.name == text.get_ref<const std::string&>()) return type;
  fail_input("{}: the tensor {} has the type {}, which is not known", what, name, text.dump());
}

ListedTensor list_one(const std::string& name, const json& entry, uint64_t data_begin, std::string_view what) {
  if (!entry.is_object()) fail_input("{}: the entry of the tensor {} is no object", what, name);
  const Type& type = type_of(entry, what, name);
  ListedTensor t{name, std::string(type.name), type.dtype, {}, 0, 0};

  const json& shape = member(entry, "shape", what, name);
  if (!shape.is_array() || shape.size() > max_dimensions)
    fail_input("{}: the shape of the tensor {} is no array of at most {} numbers", what, name, max_dimensions);
  uint64_t bytes = type.bytes;
  for (const json& n : shape) {
    const uint64_t size = whole(n, what, name, "the shape");
    if (size > uint64_t(INT64_MAX) || !multiply(bytes, size, bytes))
      fail_input("{}: the sizes of the tensor {} multiply to more than 64 bits hold", what, name);
    t.shape.push_back(int64_t(size));
  }

  const json& offsets = member(entry, "data_offsets", what, name);
  if (!offsets.is_array() || offsets.size() != 2) fail_input("{}: data_offsets of the tensor {} are no two numbers", what, name);
  const uint64_t begin = whole(offsets[0], what, name, "data_offsets"), end = whole(offsets[1], what, name, "data_offsets");
  if (begin > end) fail_input("{}: the tensor {} ends at byte {}, before it begins at {}", what, name, end, begin);
  if (end - begin != bytes)
    fail_input("{}: the tensor {} is {} {}, {} bytes, but its range holds {}", what, name, type.name, describe(t.shape), bytes,
               end - begin);
  if (!add(data_begin, begin, t.begin)) fail_input("{}: the tensor {} begins at byte {}, past any file's end", what, name, begin);
  t.bytes = bytes;
  return t;
}

}  // namespace

std::vector<ListedTensor> parse_safetensors(std::span<const std::byte> file, std::string_view what) {
  if (file.size() < 10) fail_input("{} has {} bytes, too few for a safetensors file", what, file.size());
  uint64_t header_bytes;
  std::memcpy(&header_bytes, file.data(), 8);
  if (header_bytes > max_header)
    fail_input("{}: the safetensors header claims {} bytes; the format allows {}", what, header_bytes, max_header);
  if (header_bytes > file.size() - 8)
    fail_input("{}: the safetensors header claims {} bytes, but the file has {}; it is cut short or damaged", what, header_bytes,
               file.size());
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + 8, header_bytes);
  if (text.empty() || text[0] != '{') fail_input("{}: the safetensors header does not begin with an object", what);

  const json header = parse_json(text, fmt::format("the header of {}", what), 8);
  const uint64_t data_begin = 8 + header_bytes;
  std::vector<ListedTensor> tensors;
  tensors.reserve(header.size());
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") {
      if (!entry.is_object() || !std::all_of(entry.begin(), entry.end(), [](const json& x) { return x.is_string(); }))
        fail_input("{}: __metadata__ may hold nothing but strings", what);
      continue;
    }
    tensors.push_back(list_one(name, entry, data_begin, what));
  }
  check_extents(tensors, data_begin, file.size(), true, what);
  std::stable_sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) { return a.begin < b.begin; });
  return tensors;
}

}  // namespace mla
