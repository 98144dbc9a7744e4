// Draws at most ten times a second, and not at all for work that takes less than a moment.
#include "cli/progress.h"

#include "cli/format.h"

#include <fmt/core.h>

#include <unistd.h>
#include <algorithm>
#include <cstdlib>
#include <string_view>

namespace mla {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

bool stderr_is_terminal() {
  const char* term = std::getenv("TERM");
  return isatty(STDERR_FILENO) && term && std::string_view(term) != "dumb";
}

ProgressBar::ProgressBar(std::string label) : label_(std::move(label)), terminal_(stderr_is_terminal()), begin_(Clock::now()) {}

void ProgressBar::update(double fraction, const std::string& note) {
  using namespace std::chrono_literals;
  const auto now = Clock::now();
  if (!terminal_ || now - begin_ < 300ms || (shown_ && now - drawn_ < 100ms)) return;
  drawn_ = now;
  shown_ = true;
  constexpr int width = 28;
  const int full = std::clamp(int(fraction * width), 0, width);
  std::string bar;
  for (int i = 0; i < width; ++i) bar += i < full ? "━" : "╌";
  const double passed = std::chrono::duration<double>(now - begin_).count();
  const std::string left = fraction > 0.02 ? duration_text(passed / fraction - passed) + " left" : "";
  fmt::print(stderr, "\r  {} {} {:3.0f}%  {}{}\x1b[K", label_, bar, 100 * fraction, left, note.empty() ? "" : "  " + note);
  std::fflush(stderr);
}

void ProgressBar::clear() {
  if (!shown_) return;
  fmt::print(stderr, "\r\x1b[K");
  std::fflush(stderr);
  shown_ = false;
}

}  // namespace mla
