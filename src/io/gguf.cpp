// Reading GGUF: a cursor that cannot leave the file, and counts that are checked against what is left of it.
#include "io/gguf.h"

#include "core/check.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace mla {
namespace {

using nlohmann::json;
static_assert(std::endian::native == std::endian::little, "GGUF and safetensors files are little endian");

constexpr uint64_t max_pairs = 1 << 16, max_tensors = 1 << 20, max_name = 256, max_key = 65535, short_array = 1024;
constexpr uint64_t max_alignment = 1 << 16;

enum : uint32_t {
  gguf_u8,
  gguf_i8,
  gguf_u16,
  gguf_i16,
  gguf_u32,
  gguf_i32,
  gguf_f32,
  gguf_bool,
  gguf_string,
  gguf_array,
  gguf_u64,
  gguf_i64,
  gguf_f64
};

constexpr std::string_view value_names[] = {"u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64"};
constexpr uint64_t value_bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};  // 0: not of one size

// Every tensor type a file may name. bytes 0: a type whose tensors this program cannot even size.
struct TensorType {
  uint32_t number;
  std::string_view name;
  uint64_t block, bytes;
  std::optional<DType> dtype;
};
constexpr TensorType plain(uint32_t number, std::string_view name, DType type) {
  return {number, name, uint64_t(info(type).block), uint64_t(info(type).block_bytes), type};
}
constexpr TensorType tensor_types[] = {
    plain(0, "F32", DType::f32),          plain(1, "F16", DType::f16),           plain(2, "Q4_0", DType::q4_0),
    plain(3, "Q4_1", DType::q4_1),        plain(8, "Q8_0", DType::q8_0),         plain(12, "Q4_K", DType::q4_k),
    plain(13, "Q5_K", DType::q5_k),       plain(14, "Q6_K", DType::q6_k),        plain(30, "BF16", DType::bf16),
    {24, "I8", 1, 1, std::nullopt},       {25, "I16", 1, 2, std::nullopt},       {26, "I32", 1, 4, std::nullopt},
    {27, "I64", 1, 8, std::nullopt},      {28, "F64", 1, 8, std::nullopt},       {6, "Q5_0", 32, 0, std::nullopt},
    {7, "Q5_1", 32, 0, std::nullopt},     {9, "Q8_1", 32, 0, std::nullopt},      {10, "Q2_K", 256, 0, std::nullopt},
    {11, "Q3_K", 256, 0, std::nullopt},   {15, "Q8_K", 256, 0, std::nullopt},    {16, "IQ2_XXS", 256, 0, std::nullopt},
    {17, "IQ2_XS", 256, 0, std::nullopt}, {18, "IQ3_XXS", 256, 0, std::nullopt}, {19, "IQ1_S", 256, 0, std::nullopt},
    {20, "IQ4_NL", 32, 0, std::nullopt},  {21, "IQ3_S", 256, 0, std::nullopt},   {22, "IQ2_S", 256, 0, std::nullopt},
    {23, "IQ4_XS", 256, 0, std::nullopt}, {29, "IQ1_M", 256, 0, std::nullopt},   {34, "TQ1_0", 256, 0, std::nullopt},
    {35, "TQ2_0", 256, 0, std::nullopt},  {39, "MXFP4", 32, 0, std::nullopt},
};

class Reader {
 public:
  Reader(std::span<const std::byte> file, std::string_view what, uint64_t at = 0) : file_(file), what_(what), at_(at) {}

  uint64_t at() const { return at_; }
  uint64_t left() const { return file_.size() - at_; }

  const std::byte* take(uint64_t bytes) {
    if (bytes > left()) fail_input("{} is cut short or damaged: {} bytes are wanted at byte {} and {} are left", what_, bytes, at_, left());
    const std::byte* p = file_.data() + at_;
    at_ += bytes;
    return p;
  }
  template <class T>
  T value() {
    T x;
    std::memcpy(&x, take(sizeof x), sizeof x);
    return x;
  }
  std::string_view string() {
    const uint64_t bytes = value<uint64_t>();
    return {reinterpret_cast<const char*>(take(bytes)), bytes};
  }
  // A number of things of which each takes at least `least` bytes of what follows.
  uint64_t count(uint64_t least, uint64_t cap, std::string_view things) {
    const uint64_t n = value<uint64_t>();
    if (n > left() / least || n > cap)
      fail_input("{} claims {} {}; {} bytes are left of it, and more than {} are never read", what_, n, things, left(), cap);
    return n;
  }

 private:
  std::span<const std::byte> file_;
  std::string_view what_;
  uint64_t at_;
};

// Text for metadata() must be UTF-8, so that it can be shown; what is not becomes U+FFFD. Bytes as they are: Gguf::strings.
json text(std::string_view bytes) { return json::parse(json(std::string(bytes)).dump(-1, ' ', false, json::error_handler_t::replace)); }

class Parser {
 public:
  Parser(std::span<const std::byte> file, std::string_view what) : reader_(file, what) {
    out_.file = file;
    out_.what = what;
  }

  Gguf parse() {
    const auto [tensors, pairs] = counts();
    out_.values = json::object();
    for (uint64_t i = 0; i < pairs; ++i) pair();
    check_whole();
    for (uint64_t i = 0; i < tensors; ++i) out_.tensors.push_back(tensor());
    place();
    return std::move(out_);
  }

 private:
  struct Counts {
    uint64_t tensors, pairs;
  };

  Counts counts() {
    if (reader_.left() < 24 || std::memcmp(reader_.take(4), "GGUF", 4) != 0) fail_input("{} is not a GGUF file", out_.what);
    const auto version = reader_.value<uint32_t>();
    if (version != 0 && (version & 0xffff) == 0)
      fail_input("{} is a big-endian GGUF file; this program reads little-endian ones", out_.what);
    if (version != 2 && version != 3) fail_input("{} has GGUF version {}; versions 2 and 3 are read", out_.what, version);
    // The shortest tensor: name length, one letter, dimensions, one of them, type, offset. The shortest pair: key length, letter, type,
    // byte.
    const uint64_t tensors = reader_.count(8 + 1 + 4 + 8 + 4 + 8, max_tensors, "tensors");
    return {tensors, reader_.count(8 + 1 + 4 + 1, max_pairs, "metadata keys")};
  }

  void pair() {
    const std::string_view bytes = reader_.string();
    if (bytes.empty() || bytes.size() > max_key)
      fail_input("{} has a metadata key of {} bytes; 1 to {} are allowed", out_.what, bytes.size(), max_key);
    if (!is_printable(bytes)) fail_input("{} has a metadata key with control characters", out_.what);
    const std::string key = text(bytes).get<std::string>();
    const auto type = reader_.value<uint32_t>();
    if (out_.values.contains(key) || out_.arrays.contains(key)) fail_input("{} has the metadata key {} twice", out_.what, key);
    if (type == gguf_array)
      array(key);
    else
      out_.values[key] = scalar(type, key);
  }

  json scalar(uint32_t type, std::string_view key) {
    switch (type) {
      case gguf_u8: return reader_.value<uint8_t>();
      case gguf_i8: return reader_.value<int8_t>();
      case gguf_u16: return reader_.value<uint16_t>();
      case gguf_i16: return reader_.value<int16_t>();
      case gguf_u32: return reader_.value<uint32_t>();
      case gguf_i32: return reader_.value<int32_t>();
      case gguf_f32: return reader_.value<float>();
      case gguf_u64: return reader_.value<uint64_t>();
      case gguf_i64: return reader_.value<int64_t>();
      case gguf_f64: return reader_.value<double>();
      case gguf_string: return text(reader_.string());
      case gguf_bool: {
        const auto x = reader_.value<uint8_t>();
        if (x > 1) fail_input("{}: the bool {} holds {}", out_.what, key, x);
        return x == 1;
      }
      default: fail_input("{}: the metadata key {} has the type {}, which is not known", out_.what, key, type);
    }
  }

  void array(const std::string& key) {
    const auto type = reader_.value<uint32_t>();
    if (type == gguf_array) fail_input("{}: {} is an array of arrays, which is not read", out_.what, key);
    if (type > gguf_f64) fail_input("{}: the elements of {} have the type {}, which is not known", out_.what, key, type);
    const uint64_t least = type == gguf_string ? 8 : value_bytes[type];
    const GgufArray array{type, reader_.count(least, UINT64_MAX, fmt::format("elements of {}", key)), reader_.at()};
    if (array.count <= short_array) {
      json& list = out_.values[key] = json::array();
      for (uint64_t i = 0; i < array.count; ++i) list.push_back(scalar(type, key));
    } else if (type == gguf_string) {
      for (uint64_t i = 0; i < array.count; ++i) reader_.string();
    } else {
      reader_.take(array.count * least);  // fits: count has been checked against the bytes left
    }
    out_.arrays.emplace(key, array);
  }

  void check_whole() const {
    const auto pieces = out_.values.find("split.count");
    if (pieces != out_.values.end() && pieces->is_number_integer() && pieces->get<int64_t>() > 1)
      fail_input("{} is one of {} pieces of a model; join them first (llama.cpp's gguf-split --merge)", out_.what, pieces->get<int64_t>());
  }

  ListedTensor tensor() {
    ListedTensor t;
    const std::string_view name = reader_.string();
    if (name.empty() || name.size() > max_name)
      fail_input("{} has a tensor name of {} bytes; 1 to {} are allowed", out_.what, name.size(), max_name);
    t.name = text(name).get<std::string>();
    const auto dimensions = reader_.value<uint32_t>();
    if (dimensions < 1 || dimensions > 4)
      fail_input("{}: the tensor {} has {} dimensions; 1 to 4 are allowed", out_.what, t.name, dimensions);
    uint64_t count = 1;
    for (uint32_t i = 0; i < dimensions; ++i) {
      const auto n = reader_.value<uint64_t>();
      if (n == 0) fail_input("{}: dimension {} of the tensor {} is 0", out_.what, i, t.name);
      if (!multiply(count, n, count) || count > uint64_t(INT64_MAX))
        fail_input("{}: the sizes of the tensor {} multiply to more than 63 bits hold", out_.what, t.name);
      t.shape.push_back(int64_t(n));
    }
    const TensorType& type = type_of(reader_.value<uint32_t>(), t.name);
    if (uint64_t(t.shape[0]) % type.block != 0)
      fail_input("{}: the rows of the tensor {} have {} elements, which is no whole number of {} blocks", out_.what, t.name, t.shape[0],
                 type.name);
    if (!multiply(count / type.block, type.bytes, t.bytes))
      fail_input("{}: the bytes of the tensor {} are more than 64 bits hold", out_.what, t.name);
    t.type = type.name;
    t.dtype = type.dtype;
    t.begin = reader_.value<uint64_t>();  // from the start of the data; place() adds where that is
    std::reverse(t.shape.begin(), t.shape.end());
    return t;
  }

  const TensorType& type_of(uint32_t number, std::string_view name) const {
    const auto type =
        std::find_if(std::begin(tensor_types), std::end(tensor_types), [&](const TensorType& t) { return t.number == number; });
    if (type == std::end(tensor_types)) fail_input("{}: the tensor {} has the type {}, which is not known", out_.what, name, number);
    if (type->bytes == 0)
      fail_input("{}: the tensor {} has the type {}; F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q5_K and Q6_K are read", out_.what, name,
                 type->name);
    return *type;
  }

  uint64_t alignment() const {
    const auto found = out_.values.find("general.alignment");
    if (found == out_.values.end()) return 32;
    if (!found->is_number_unsigned()) fail_input("{}: general.alignment is no u32", out_.what);
    const auto n = found->get<uint64_t>();
    if (n < 8 || n > max_alignment || !std::has_single_bit(n))
      fail_input("{}: general.alignment is {}; powers of two from 8 to {} are allowed", out_.what, n, max_alignment);
    return n;
  }

  void place() {
    const uint64_t step = alignment(), data_begin = (reader_.at() + step - 1) / step * step;
    for (ListedTensor& t : out_.tensors) {
      if (t.begin % step != 0) fail_input("{}: the tensor {} begins at {}, which is no multiple of {}", out_.what, t.name, t.begin, step);
      if (!add(data_begin, t.begin, t.begin)) fail_input("{}: the tensor {} begins past any file's end", out_.what, t.name);
    }
    check_extents(out_.tensors, data_begin, out_.file.size(), false, out_.what);
  }

  Reader reader_;
  Gguf out_;
};

// The array, or null when the key is absent.
const GgufArray* find_array(const Gguf& gguf, std::string_view key) {
  const auto found = gguf.arrays.find(key);
  if (found != gguf.arrays.end()) return &found->second;
  if (gguf.values.contains(key)) fail_input("{}: {} is one value, not an array", gguf.what, key);
  return nullptr;
}

[[noreturn]] void wrong_elements(const Gguf& gguf, std::string_view key, const GgufArray& array, std::string_view wanted) {
  fail_input("{}: the elements of {} are {}, not {}", gguf.what, key, value_names[array.type], wanted);
}

template <class Stored>
std::vector<int32_t> read_ints(const Gguf& gguf, std::string_view key, const GgufArray& array) {
  std::vector<int32_t> out(array.count);
  Reader reader(gguf.file, gguf.what, array.begin);
  for (int32_t& x : out) {
    const auto stored = reader.value<Stored>();
    if (!std::in_range<int32_t>(stored)) fail_input("{}: {} holds {}, which does not fit 32 bits", gguf.what, key, stored);
    x = int32_t(stored);
  }
  return out;
}

}  // namespace

Gguf parse_gguf(std::span<const std::byte> file, std::string_view what) { return Parser(file, what).parse(); }

std::vector<std::string> Gguf::strings(std::string_view key) const {
  const GgufArray* array = find_array(*this, key);
  if (!array) return {};
  if (array->type != gguf_string) wrong_elements(*this, key, *array, "strings");
  std::vector<std::string> out;
  out.reserve(array->count);
  Reader reader(file, what, array->begin);
  for (uint64_t i = 0; i < array->count; ++i) out.emplace_back(reader.string());
  return out;
}

std::vector<float> Gguf::floats(std::string_view key) const {
  const GgufArray* array = find_array(*this, key);
  if (!array) return {};
  if (array->type != gguf_f32) wrong_elements(*this, key, *array, "f32");
  std::vector<float> out(array->count);
  if (!out.empty()) std::memcpy(out.data(), file.data() + array->begin, out.size() * 4);
  return out;
}

std::vector<int32_t> Gguf::ints(std::string_view key) const {
  const GgufArray* array = find_array(*this, key);
  if (!array) return {};
  switch (array->type) {
    case gguf_u8: return read_ints<uint8_t>(*this, key, *array);
    case gguf_i8: return read_ints<int8_t>(*this, key, *array);
    case gguf_u16: return read_ints<uint16_t>(*this, key, *array);
    case gguf_i16: return read_ints<int16_t>(*this, key, *array);
    case gguf_u32: return read_ints<uint32_t>(*this, key, *array);
    case gguf_i32: return read_ints<int32_t>(*this, key, *array);
    case gguf_u64: return read_ints<uint64_t>(*this, key, *array);
    case gguf_i64: return read_ints<int64_t>(*this, key, *array);
    default: wrong_elements(*this, key, *array, "whole numbers");
  }
}

uint32_t gguf_type(DType type) {
  for (const TensorType& t : tensor_types)
    if (t.dtype == type) return t.number;
  fail("GGUF files hold no weights of type {}", info(type).name);
}

}  // namespace mla
