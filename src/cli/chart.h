// Bar charts as SVG.
#pragma once

#include <string>
#include <vector>

namespace mla {

struct Bar {
  std::string label;
  double value;
  std::string text;  // beside the bar
  bool highlighted;
};

struct Panel {
  std::string title;
  std::vector<Bar> bars;
};

struct Chart {
  std::string title;
  std::vector<Panel> panels;  // one below the other
};

std::string svg(const Chart& chart);

}  // namespace mla
