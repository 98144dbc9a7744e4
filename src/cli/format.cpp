// Formatting and parsing of quantities, aligned tables, JSON on stdout.
#include "cli/format.h"

#include "core/check.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>

namespace mla {
namespace {

std::string three_digits(double x) {
  return x >= 99.95 ? fmt::format("{:.0f}", x) : x >= 9.995 ? fmt::format("{:.1f}", x) : fmt::format("{:.2f}", x);
}

std::string scaled(double x, const char* const* units, int count) {
  int unit = 0;
  while (unit + 1 < count && std::fabs(x) >= 999.5) x /= 1000, ++unit;
  return (unit == 0 ? fmt::format("{:.0f}", x) : three_digits(x)) + units[unit];
}

// Characters on the screen: bytes that do not continue a UTF-8 character.
size_t width(const std::string& text) {
  return size_t(std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

std::string padded(const std::string& cell, size_t to, bool right) {
  const std::string space(to - std::min(to, width(cell)), ' ');
  return right ? space + cell : cell + space;
}

std::vector<size_t> widths(const Table& table) {
  std::vector<size_t> out;
  for (const std::string& cell : table.header) out.push_back(width(cell));
  for (const auto& row : table.rows)
    for (size_t i = 0; i < row.size(); ++i) out[i] = std::max(out[i], width(row[i]));
  return out;
}

}  // namespace

std::string bytes_text(double bytes) {
  static const char* const units[] = {" B", " kB", " MB", " GB", " TB"};
  return scaled(bytes, units, 5);
}

std::string count_text(double n) {
  static const char* const units[] = {"", " k", " M", " B"};
  return n < 1e6 ? fmt::format("{:.0f}", n) : scaled(n, units, 4);
}

std::string grouped(int64_t n) {
  std::string digits = std::to_string(n);
  for (auto i = int64_t(digits.size()) - 3; i > (n < 0 ? 1 : 0); i -= 3) digits.insert(size_t(i), 1, ' ');
  return digits;
}

std::string duration_text(double seconds) {
  if (seconds < 10) return fmt::format("{:.1f} s", std::max(0.0, seconds));
  const int64_t s = std::llround(seconds);
  if (s < 60) return fmt::format("{} s", s);
  if (s < 3600) return fmt::format("{}:{:02} min", s / 60, s % 60);
  return fmt::format("{}:{:02} h", s / 3600, s % 3600 / 60);
}

std::string rate_text(double per_second) { return three_digits(per_second); }

int64_t parse_size(std::string_view text, std::string_view option) {
  double number = 0;
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), number);
  std::string unit(end, text.data() + text.size());
  unit.erase(0, unit.find_first_not_of(' ') == std::string::npos ? unit.size() : unit.find_first_not_of(' '));
  std::transform(unit.begin(), unit.end(), unit.begin(), [](char c) { return char(std::toupper(c)); });
  static const std::string letters = "KMGT";
  double factor = 1;
  const size_t power = unit.empty() ? std::string::npos : letters.find(unit[0]);
  if (power != std::string::npos) {
    const std::string rest = unit.substr(1);
    factor = std::pow(rest == "IB" ? 1024.0 : 1000.0, double(power + 1));
    unit = rest == "IB" || rest == "B" ? "" : rest;
  }
  if (problem != std::errc() || !(unit.empty() || unit == "B") || !(number * factor >= 1 && number * factor < 9e18))
    fail_input("{} is \"{}\"; give a size such as 24G, 24GiB or 512M", option, text);
  return int64_t(number * factor);
}

std::vector<int64_t> parse_list(std::string_view text, std::string_view option, int64_t least) {
  std::vector<int64_t> out;
  while (true) {
    const size_t comma = text.find(',');
    const std::string_view item = text.substr(0, comma);
    int64_t value = 0;
    const auto [end, problem] = std::from_chars(item.data(), item.data() + item.size(), value);
    if (problem != std::errc() || end != item.data() + item.size() || value < least || value > (int64_t(1) << 30))
      fail_input("{} has \"{}\"; give whole numbers from {}, separated by commas", option, item, least);
    out.push_back(value);
    if (comma == std::string_view::npos) return out;
    text.remove_prefix(comma + 1);
  }
}

std::string Table::text() const {
  const std::vector<size_t> w = widths(*this);
  auto line = [&](const std::vector<std::string>& cells) {
    std::string out = " ";
    for (size_t i = 0; i < cells.size(); ++i) out.append(i ? "  " : " ").append(padded(cells[i], w[i], i > 0));
    out.erase(out.find_last_not_of(' ') + 1);
    return out + "\n";
  };
  std::string out = line(header);
  for (const auto& row : rows) out += line(row);
  return out;
}

std::string Table::markdown() const {
  const std::vector<size_t> w = widths(*this);
  auto line = [&](const std::vector<std::string>& cells) {
    std::string out = "|";
    for (size_t i = 0; i < cells.size(); ++i) out.append(" ").append(padded(cells[i], w[i], i > 0)).append(" |");
    return out + "\n";
  };
  std::string out = line(header) + "|";
  for (size_t i = 0; i < w.size(); ++i) out += i ? std::string(w[i] + 1, '-') + ":|" : std::string(w[i] + 2, '-') + "|";
  out += "\n";
  for (const auto& row : rows) out += line(row);
  return out;
}

void print_json(const nlohmann::ordered_json& json) {
  const std::string text = json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size()) fail("the output could not be written; is the disk full?");
}

}  // namespace mla
