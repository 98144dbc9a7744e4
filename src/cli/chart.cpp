// Horizontal bars; readable on white and on dark pages, since GitHub shows both.
#include "cli/chart.h"

#include <fmt/core.h>

#include <algorithm>

namespace mla {
namespace {

constexpr int left = 130, width = 420, bar_height = 22, gap = 10, title_height = 40, page_width = 700;
constexpr const char* quiet = "#9aa5b1";
constexpr const char* accent = "#2f6fde";
constexpr const char* ink = "#6b7580";

std::string escaped(const std::string& text) {
  std::string out;
  for (char c : text) {
    switch (c) {
      case '&': out += "&amp;"; break;
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      default: out += c;
    }
  }
  return out;
}

std::string panel(const Panel& p, int& y) {
  std::string out = fmt::format("<text x=\"20\" y=\"{}\" font-weight=\"600\">{}</text>\n", y + 20, escaped(p.title));
  y += title_height - 6;
  double most = 0;
  for (const Bar& bar : p.bars) most = std::max(most, bar.value);
  for (const Bar& bar : p.bars) {
    const double w = most > 0 ? std::max(1.0, bar.value / most * width) : 1;
    out += fmt::format("<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\n", left - 10, y + 16, escaped(bar.label));
    out += fmt::format("<rect x=\"{}\" y=\"{}\" width=\"{:.1f}\" height=\"{}\" rx=\"3\" fill=\"{}\"/>\n", left, y, w, bar_height,
                       bar.highlighted ? accent : quiet);
    out += fmt::format("<text x=\"{:.1f}\" y=\"{}\">{}</text>\n", left + w + 8, y + 16, escaped(bar.text));
    y += bar_height + gap;
  }
  y += gap;
  return out;
}

}  // namespace

std::string svg(const Chart& chart) {
  int y = title_height;
  std::string body = fmt::format("<text x=\"20\" y=\"26\" font-size=\"16\" font-weight=\"600\">{}</text>\n", escaped(chart.title));
  for (const Panel& p : chart.panels) body += panel(p, y);
  return fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0} {1}\" width=\"{0}\" height=\"{1}\" font-family=\"system-ui, "
      "sans-serif\" "
      "font-size=\"13\" fill=\"{2}\">\n{3}</svg>\n",
      page_width, y + 10, ink, body);
}

}  // namespace mla
