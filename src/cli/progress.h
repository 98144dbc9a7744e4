// A progress bar on stderr, with the time left; nothing where stderr is not a terminal.
#pragma once

#include <chrono>
#include <string>

namespace mla {

class ProgressBar {
 public:
  explicit ProgressBar(std::string label);
  ~ProgressBar() { clear(); }
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  void update(double fraction, const std::string& note = {});
  void clear();  // takes the bar off the screen

 private:
  using Clock = std::chrono::steady_clock;
  std::string label_;
  bool terminal_, shown_ = false;
  Clock::time_point begin_, drawn_;
};

bool stderr_is_terminal();
double now();  // seconds of a clock that never goes back

}  // namespace mla
