// NumPy's .npy: a magic number, a Python dict in a line of text, then the elements.
#include "io/npy.h"

#include "core/check.h"
#include "io/checkpoint.h"

#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstring>
#include <fstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

namespace mla {
namespace {

namespace fs = std::filesystem;
constexpr std::string_view magic = "\x93NUMPY";

struct Header {
  std::string_view type, shape;  // "<i4", "12,"
  bool fortran = false;
  std::span<const std::byte> data;
};

// The text between two marks that follow a key of the header's dict.
std::string_view member(std::string_view dict, std::string_view key, char open, char close, const std::string& what) {
  const size_t at = dict.find(key);
  const size_t begin = at == dict.npos ? at : dict.find(open, at + key.size());
  const size_t end = begin == dict.npos ? begin : dict.find(close, begin + 1);
  if (end == dict.npos) fail_input("{}: the .npy header has no readable {}", what, key);
  return dict.substr(begin + 1, end - begin - 1);
}

Header parse_header(const MappedFile& file, const std::string& what) {
  const std::string_view text(reinterpret_cast<const char*>(file.data()), file.size());
  if (text.size() < 10 || !text.starts_with(magic)) fail_input("{} is not a .npy file", what);
  const int version = uint8_t(text[6]);
  if (version < 1 || version > 3) fail_input("{} has .npy version {}; 1 to 3 are read", what, version);
  const size_t begin = version == 1 ? 10 : 12;
  uint32_t bytes = 0;
  if (text.size() >= begin) std::memcpy(&bytes, text.data() + 8, begin - 8);
  if (text.size() < begin || bytes > text.size() - begin) fail_input("{} is cut short in its header", what);
  const std::string_view dict = text.substr(begin, bytes);
  Header header;
  header.type = member(dict, "'descr'", '\'', '\'', what);
  header.shape = member(dict, "'shape'", '(', ')', what);
  header.fortran = member(dict, "'fortran_order'", ':', ',', what).find("True") != std::string_view::npos;
  header.data = {file.data() + begin + bytes, file.size() - begin - bytes};
  return header;
}

// "12," or "12": the one dimension.
uint64_t one_dimension(std::string_view shape, const std::string& what) {
  uint64_t n = 0;
  const auto [end, error] = std::from_chars(shape.data(), shape.data() + shape.size(), n);
  const std::string_view rest(end, size_t(shape.data() + shape.size() - end));
  if (error != std::errc{} || (!rest.empty() && rest != ",")) fail_input("{} has the shape ({}); ids are one row of numbers", what, shape);
  return n;
}

// "3, 4": the two dimensions.
std::pair<int64_t, int64_t> two_dimensions(std::string_view shape, const std::string& what) {
  int64_t rows = 0, cols = 0;
  const char* end = shape.data() + shape.size();
  const auto [comma, error] = std::from_chars(shape.data(), end, rows);
  const char* second = comma;
  while (second < end && (*second == ',' || *second == ' ')) ++second;
  const auto [rest, error2] = std::from_chars(second, end, cols);
  if (error != std::errc{} || error2 != std::errc{} || second == comma || rest != end || rows < 1 || cols < 1)
    fail_input("{} has the shape ({}); a matrix has two dimensions, each at least 1", what, shape);
  return {rows, cols};
}

template <class Stored>
double number_at(const std::byte* data, uint64_t i) {
  Stored x;
  std::memcpy(&x, data + i * sizeof x, sizeof x);
  if constexpr (std::is_same_v<Stored, uint16_t>)
    return double(f16_to_f32(x));
  else
    return double(x);
}

template <class Stored>
std::vector<double> read_matrix_as(const Header& header, int64_t rows, int64_t cols, const std::string& what) {
  const auto bytes = uint64_t(header.data.size());
  uint64_t n = 0;
  if (__builtin_mul_overflow(uint64_t(rows), uint64_t(cols), &n) || bytes % sizeof(Stored) != 0 || n != bytes / sizeof(Stored))
    fail_input("{} claims [{}, {}] numbers of {} bytes, but holds {} bytes", what, rows, cols, sizeof(Stored), bytes);
  std::vector<double> values(n);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j)
      values[size_t(i * cols + j)] = number_at<Stored>(header.data.data(), uint64_t(header.fortran ? j * rows + i : i * cols + j));
  return values;
}

template <class Stored>
std::vector<int32_t> read_as(std::span<const std::byte> data, uint64_t n, const std::string& what) {
  if (n != data.size() / sizeof(Stored) || data.size() % sizeof(Stored) != 0)
    fail_input("{} claims {} numbers of {} bytes, but holds {} bytes", what, n, sizeof(Stored), data.size());
  std::vector<int32_t> ids(n);
  for (size_t i = 0; i < n; ++i) {
    Stored x;
    std::memcpy(&x, data.data() + i * sizeof x, sizeof x);
    if (!std::in_range<int32_t>(x)) fail_input("{}: number {} is {}, which does not fit 32 bits", what, i, x);
    ids[i] = int32_t(x);
  }
  return ids;
}

void write_file(const fs::path& path, std::string_view type, const std::string& shape, std::span<const std::byte> data) {
  std::string dict = fmt::format("{{'descr': '{}', 'fortran_order': False, 'shape': ({}), }}", type, shape);
  dict.resize((10 + dict.size() + 1 + 63) / 64 * 64 - 10, ' ');  // the data begin at a multiple of 64
  dict.back() = '\n';
  const fs::path temporary = path.string() + fmt::format(".{}.tmp", getpid());
  std::ofstream out(temporary, std::ios::binary);
  if (!out) fail_input("cannot write {}: {}", temporary.string(), std::strerror(errno));
  const char bytes[4] = {1, 0, char(dict.size() & 255), char(dict.size() >> 8)};
  out.write(magic.data(), std::streamsize(magic.size())).write(bytes, 4).write(dict.data(), std::streamsize(dict.size()));
  out.write(reinterpret_cast<const char*>(data.data()), std::streamsize(data.size()));
  out.close();
  std::error_code error;
  if (out) fs::rename(temporary, path, error);
  if (out && !error) return;
  const std::string reason = error ? error.message() : std::strerror(errno);
  fs::remove(temporary, error);
  fail("cannot write {}: {}", path.string(), reason);
}

}  // namespace

std::vector<int32_t> read_npy_ids(const fs::path& path) {
  const std::string what = path.string();
  const MappedFile file(path);
  const Header header = parse_header(file, what);
  if (header.fortran) fail_input("{} is in Fortran order; ids are read in C order", what);
  const uint64_t n = one_dimension(header.shape, what);
  if (header.type == "<i4") return read_as<int32_t>(header.data, n, what);
  if (header.type == "<i8") return read_as<int64_t>(header.data, n, what);
  if (header.type == "<u2") return read_as<uint16_t>(header.data, n, what);
  if (header.type == "<u4") return read_as<uint32_t>(header.data, n, what);
  fail_input("{} holds numbers of type {}; ids are <i4, <i8, <u2 or <u4", what, header.type);
}

NpyMatrix read_npy_matrix(const fs::path& path) {
  const std::string what = path.string();
  const MappedFile file(path);
  const Header header = parse_header(file, what);
  const auto [rows, cols] = two_dimensions(header.shape, what);
  if (header.type == "<f4") return {rows, cols, read_matrix_as<float>(header, rows, cols, what)};
  if (header.type == "<f8") return {rows, cols, read_matrix_as<double>(header, rows, cols, what)};
  if (header.type == "<f2") return {rows, cols, read_matrix_as<uint16_t>(header, rows, cols, what)};
  fail_input("{} holds numbers of type {}; a matrix is <f4, <f8 or <f2", what, header.type);
}

void write_npy(const fs::path& path, std::span<const float> values, int64_t rows, int64_t cols) {
  CHECK(rows >= 0 && cols >= 0 && int64_t(values.size()) == rows * cols, "{} values for [{}, {}]", values.size(), rows, cols);
  write_file(path, "<f4", fmt::format("{}, {}", rows, cols), std::as_bytes(values));
}

void write_npy_ids(const fs::path& path, std::span<const int32_t> ids) {
  write_file(path, "<i4", fmt::format("{},", ids.size()), std::as_bytes(ids));
}

}  // namespace mla
