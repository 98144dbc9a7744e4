// Added tokens: spellings found in text before anything else looks at it, such as control tokens.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace mla {

struct AddedToken {
  int32_t id = -1;
  std::string spelling;
  bool special = false;
  bool normalized = false;                       // sought after normalization, not before
  bool single_word = false;                      // only with no word character beside it
  bool left_strip = false, right_strip = false;  // takes the white space on that side with it
};

class AddedTokens {
 public:
  AddedTokens() = default;
  explicit AddedTokens(std::vector<AddedToken> tokens);

  bool empty() const { return tokens_.empty(); }

  // Hands out the text from front to back: stretches without added tokens (token is null) and tokens. The leftmost match wins, of
  // those the longest. A special token that is not to be parsed is ordinary text, and so is what else might be found inside it.
  using Sink = std::function<void(size_t begin, size_t end, const AddedToken* token)>;
  void split(std::string_view text, bool parse_special, const Sink& sink) const;

 private:
  const AddedToken* match(std::string_view text) const;  // the longest one the text starts with

  std::vector<AddedToken> tokens_;
  std::unordered_map<uint64_t, int32_t> edges_;  // (node, byte) -> node
  std::vector<int32_t> ends_;                    // node -> index of the token that ends there, or -1
  bool starts_[256] = {};                        // bytes a token may start with
};

}  // namespace mla
