// Numbers and tables as people read them.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace mla {

std::string bytes_text(double bytes);       // "1.24 GB"; powers of 1000, as bandwidths are
std::string count_text(double n);           // "15.7 B", "135 M", "49152"
std::string grouped(int64_t n);             // "15 706 484"
std::string duration_text(double seconds);  // "4 s", "2:05 min"
std::string rate_text(double per_second);   // three digits: "1480", "146", "7.42"

int64_t parse_size(std::string_view text, std::string_view option);  // "24G", "640GB", "512MiB", "1000000"; raises Error
std::vector<int64_t> parse_list(std::string_view text, std::string_view option, int64_t least);  // "0,4096"; raises Error

// Rows of cells under a header; the first column is text, the others are numbers and stand to the right.
struct Table {
  std::vector<std::string> header;
  std::vector<std::vector<std::string>> rows;
  std::string text() const;  // aligned, indented by two
  std::string markdown() const;
};

void print_json(const nlohmann::ordered_json& json);  // one line on stdout; bytes that are not UTF-8 become U+FFFD

}  // namespace mla
