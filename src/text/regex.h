// Regular expressions of pre-tokenizers (PCRE2 with Unicode classes), under limits on time, so that no pattern from a file can hang us.
#pragma once

#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace mla {

// How long all matching for one text may take: generous for honest patterns, which run at tens of MB/s.
class MatchBudget {
 public:
  explicit MatchBudget(size_t text_bytes);
  bool spent();
  bool spent_now_and_then();  // looks at the clock in one call of 64

 private:
  std::chrono::steady_clock::time_point deadline_;
  unsigned calls_ = 0;
};

class Regex {
 public:
  // Oniguruma's syntax, as in tokenizer.json, as far as PCRE2 shares it. Raises Error that shows the pattern and what is wrong with it.
  explicit Regex(std::string_view pattern);
  static Regex literal(std::string_view text);

  // Covers the text from front to back with spans that match and spans between them. Matches may be empty, spans between are not.
  // Bytes that are not UTF-8 never match and end what is before them. Raises Error when the budget or a match limit is spent.
  using Sink = std::function<void(size_t begin, size_t end, bool matched)>;
  void split(std::string_view text, MatchBudget& budget, const Sink& sink) const;

 private:
  Regex(std::string_view pattern, std::string source, unsigned options);
  void split_valid(std::string_view text, size_t offset, MatchBudget& budget, const Sink& sink) const;

  std::string pattern_;
  std::shared_ptr<void> code_;  // pcre2_code
};

}  // namespace mla
