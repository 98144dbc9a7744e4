// UTF-8 by the table of well-formed sequences (Unicode 15, table 3-7); NFC from utf8proc's character data.
#include "text/unicode.h"

#include "core/check.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

namespace mla {

namespace {

bool continues(unsigned char byte) { return (byte & 0xC0) == 0x80; }

// Length a lead byte announces, 0 when none begins with it, and the range its second byte must be in.
struct Lead {
  size_t length;
  unsigned char low, high;
};

Lead lead_of(unsigned char byte) {
  if (byte < 0x80) return {1, 0, 0};
  if (byte < 0xC2) return {0, 0, 0};
  if (byte < 0xE0) return {2, 0x80, 0xBF};
  if (byte == 0xE0) return {3, 0xA0, 0xBF};
  if (byte == 0xED) return {3, 0x80, 0x9F};
  if (byte < 0xF0) return {3, 0x80, 0xBF};
  if (byte == 0xF0) return {4, 0x90, 0xBF};
  if (byte < 0xF4) return {4, 0x80, 0xBF};
  if (byte == 0xF4) return {4, 0x80, 0x8F};
  return {0, 0, 0};
}

}  // namespace

size_t utf8_length(std::string_view text) {
  if (text.empty()) return 0;
  const auto* p = reinterpret_cast<const unsigned char*>(text.data());
  const Lead lead = lead_of(p[0]);
  if (lead.length <= 1) return lead.length;
  if (text.size() < lead.length || p[1] < lead.low || p[1] > lead.high) return 0;
  for (size_t i = 2; i < lead.length; i++)
    if (!continues(p[i])) return 0;
  return lead.length;
}

char32_t utf8_decode(std::string_view character) {
  const auto* p = reinterpret_cast<const unsigned char*>(character.data());
  switch (character.size()) {
    case 1: return p[0];
    case 2: return char32_t(p[0] & 0x1F) << 6 | (p[1] & 0x3F);
    case 3: return char32_t(p[0] & 0x0F) << 12 | char32_t(p[1] & 0x3F) << 6 | (p[2] & 0x3F);
    default: return char32_t(p[0] & 0x07) << 18 | char32_t(p[1] & 0x3F) << 12 | char32_t(p[2] & 0x3F) << 6 | (p[3] & 0x3F);
  }
}

void append_utf8(std::string& out, char32_t c) {
  if (c < 0x80) {
    out += char(c);
  } else if (c < 0x800) {
    out += {char(0xC0 | c >> 6), char(0x80 | (c & 0x3F))};
  } else if (c < 0x10000) {
    out += {char(0xE0 | c >> 12), char(0x80 | (c >> 6 & 0x3F)), char(0x80 | (c & 0x3F))};
  } else {
    out += {char(0xF0 | c >> 18), char(0x80 | (c >> 12 & 0x3F)), char(0x80 | (c >> 6 & 0x3F)), char(0x80 | (c & 0x3F))};
  }
}

size_t valid_prefix(std::string_view text) {
  size_t i = 0;
  while (i < text.size()) {
    uint64_t eight;  // ASCII goes by eight bytes at a time
    while (i + 8 <= text.size() && (std::memcpy(&eight, text.data() + i, 8), (eight & 0x8080808080808080u) == 0)) i += 8;
    const size_t length = utf8_length(text.substr(i, 4));
    if (length == 0) break;
    i += length;
  }
  return i;
}

size_t invalid_prefix(std::string_view text) {
  size_t i = 0;
  while (i < text.size() && utf8_length(text.substr(i, 4)) == 0) i++;
  return i;
}

size_t incomplete_suffix(std::string_view text) {
  for (size_t n = 1; n <= std::min<size_t>(3, text.size()); n++) {
    const auto* p = reinterpret_cast<const unsigned char*>(text.data() + text.size() - n);
    if (continues(p[0])) continue;
    const Lead lead = lead_of(p[0]);
    const bool begins = lead.length > n && (n == 1 || (p[1] >= lead.low && p[1] <= lead.high));
    return begins ? n : 0;
  }
  return 0;
}

bool is_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 ||
         c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

bool is_word(char32_t c) {
  switch (utf8proc_category(utf8proc_int32_t(c))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC: return true;
    default: return false;
  }
}

namespace {

int combining_class(utf8proc_int32_t c) { return utf8proc_get_property(c)->combining_class; }

// Canonical decomposition with its marks in canonical order. utf8proc would order them by exchange of neighbours, which takes minutes on
// a megabyte of marks; a stable sort by class is what the standard asks for.
std::vector<utf8proc_int32_t> decompose(std::string_view text) {
  std::vector<utf8proc_int32_t> points;
  points.reserve(text.size());
  std::array<utf8proc_int32_t, 32> parts;  // the longest canonical decomposition has four
  for (size_t i = 0; i < text.size();) {
    const size_t length = utf8_length(text.substr(i, 4));
    int boundary = 0;
    const auto count = utf8proc_decompose_char(utf8proc_int32_t(utf8_decode(text.substr(i, length))), parts.data(), parts.size(),
                                               UTF8PROC_DECOMPOSE, &boundary);
    CHECK(count >= 0 && size_t(count) <= parts.size(), "decomposition into {} characters", count);
    points.insert(points.end(), parts.begin(), parts.begin() + count);
    i += length;
  }
  for (auto from = points.begin(); from != points.end();) {
    from = std::find_if(from, points.end(), [](auto c) { return combining_class(c) != 0; });
    const auto to = std::find_if(from, points.end(), [](auto c) { return combining_class(c) == 0; });
    std::stable_sort(from, to, [](auto a, auto b) { return combining_class(a) < combining_class(b); });
    from = to;
  }
  return points;
}

// One stretch of valid UTF-8.
void append_nfc(std::string& out, std::string_view text) {
  std::vector<utf8proc_int32_t> points = decompose(text);
  const auto count =
      utf8proc_normalize_utf32(points.data(), utf8proc_ssize_t(points.size()), utf8proc_option_t(UTF8PROC_COMPOSE | UTF8PROC_STABLE));
  CHECK(count >= 0, "composition: {}", utf8proc_errmsg(count));
  for (utf8proc_ssize_t i = 0; i < count; i++) append_utf8(out, char32_t(points[i]));
}

// Below U+0300 nothing decomposes that does not compose again and nothing combines with what stands before it.
bool inert(unsigned char lead) { return lead < 0xCC; }

}  // namespace

std::string nfc(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t i = 0; i < text.size();) {
    const std::string_view valid = text.substr(i, valid_prefix(text.substr(i)));
    // A stretch runs from an inert character, which may take marks, to the next; in between all goes through the tables.
    for (size_t j = 0; j < valid.size();) {
      size_t end = j + utf8_length(valid.substr(j, 4));
      const size_t single = end;
      while (end < valid.size() && !inert(static_cast<unsigned char>(valid[end]))) end += utf8_length(valid.substr(end, 4));
      if (end == single && inert(static_cast<unsigned char>(valid[j]))) {
        out += valid.substr(j, end - j);
      } else {
        append_nfc(out, valid.substr(j, end - j));
      }
      j = end;
    }
    i += valid.size();
    const size_t broken = invalid_prefix(text.substr(i));
    out += text.substr(i, broken);
    i += broken;
  }
  return out;
}

}  // namespace mla
