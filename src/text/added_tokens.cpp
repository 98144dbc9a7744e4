// A trie over the spellings, walked at each byte that may start one.
#include "text/added_tokens.h"

#include "text/unicode.h"

#include <algorithm>

namespace mla {

namespace {

uint64_t edge(int32_t node, char byte) { return uint64_t(node) << 8 | static_cast<unsigned char>(byte); }

// The last character of valid UTF-8 before this point, empty when there is none.
std::string_view last_character(std::string_view text) {
  for (size_t n = 1; n <= std::min<size_t>(4, text.size()); n++) {
    const std::string_view tail = text.substr(text.size() - n);
    if (utf8_length(tail) == n) return tail;
  }
  return {};
}

std::string_view first_character(std::string_view text) { return text.substr(0, utf8_length(text.substr(0, 4))); }

bool word(std::string_view character) { return !character.empty() && is_word(utf8_decode(character)); }

bool space(std::string_view character) { return !character.empty() && is_space(utf8_decode(character)); }

}  // namespace

AddedTokens::AddedTokens(std::vector<AddedToken> tokens) : tokens_(std::move(tokens)), ends_(1, -1) {
  for (size_t i = 0; i < tokens_.size(); i++) {
    int32_t node = 0;
    for (char byte : tokens_[i].spelling) {
      const auto [at, fresh] = edges_.try_emplace(edge(node, byte), int32_t(ends_.size()));
      if (fresh) ends_.push_back(-1);
      node = at->second;
    }
    if (node == 0) continue;  // an empty spelling is nowhere
    if (ends_[node] < 0) ends_[node] = int32_t(i);
    starts_[static_cast<unsigned char>(tokens_[i].spelling[0])] = true;
  }
}

const AddedToken* AddedTokens::match(std::string_view text) const {
  int32_t node = 0, longest = -1;
  for (char byte : text) {
    const auto at = edges_.find(edge(node, byte));
    if (at == edges_.end()) break;
    node = at->second;
    if (ends_[node] >= 0) longest = ends_[node];
  }
  return longest < 0 ? nullptr : &tokens_[longest];
}

void AddedTokens::split(std::string_view text, bool parse_special, const Sink& sink) const {
  size_t done = 0;
  for (size_t i = 0; i < text.size();) {
    const AddedToken* token = starts_[static_cast<unsigned char>(text[i])] ? match(text.substr(i)) : nullptr;
    if (!token) {
      i++;
      continue;
    }
    size_t begin = i, end = i + token->spelling.size();
    i = end;
    if (token->special && !parse_special) continue;
    if (token->single_word && (word(last_character(text.substr(0, begin))) || word(first_character(text.substr(end))))) continue;
    if (token->left_strip)
      while (begin > done && space(last_character(text.substr(done, begin - done)))) begin -= last_character(text.substr(0, begin)).size();
    if (token->right_strip)
      while (space(first_character(text.substr(end)))) end += first_character(text.substr(end)).size();
    if (begin > done) sink(done, begin, nullptr);
    sink(begin, end, token);
    done = end;
  }
  if (done < text.size()) sink(done, text.size(), nullptr);
}

}  // namespace mla
