// The vocabulary's side of a tokenizer's state: spellings, GPT-2's byte alphabet, byte tokens.
#include "core/check.h"
#include "text/state.h"
#include "text/unicode.h"

namespace mla {

namespace {

constexpr int64_t kLargestVocabulary = 1 << 22;
constexpr size_t kLongestAddedToken = 4096;

// Bytes that print stand for themselves; the others are numbered from U+0100 on.
bool prints(int byte) { return (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE; }

struct Alphabet {
  std::array<char32_t, 256> character;
  std::array<int, 512> byte;  // -1: not of the alphabet

  Alphabet() {
    byte.fill(-1);
    char32_t next = 0x100;
    for (int b = 0; b < 256; b++) {
      character[b] = prints(b) ? char32_t(b) : next++;
      byte[character[b]] = b;
    }
  }
};

const Alphabet& alphabet() {
  static const Alphabet instance;
  return instance;
}

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  return -1;
}

}  // namespace

std::optional<std::string> bytes_of_alphabet(std::string_view spelling) {
  std::string out;
  for (size_t i = 0; i < spelling.size();) {
    const size_t length = utf8_length(spelling.substr(i, 4));
    if (length == 0) return std::nullopt;
    const char32_t c = utf8_decode(spelling.substr(i, length));
    if (c >= alphabet().byte.size() || alphabet().byte[c] < 0) return std::nullopt;
    out += char(alphabet().byte[c]);
    i += length;
  }
  return out;
}

std::string alphabet_of_bytes(std::string_view bytes) {
  std::string out;
  for (unsigned char byte : bytes) append_utf8(out, alphabet().character[byte]);
  return out;
}

std::optional<char> byte_of_fallback(std::string_view spelling) {
  if (spelling.size() != 6 || !spelling.starts_with("<0x") || spelling[5] != '>') return std::nullopt;
  const int high = hex_digit(spelling[3]), low = hex_digit(spelling[4]);
  if (high < 0 || low < 0) return std::nullopt;
  return char(high << 4 | low);
}

std::string replace_metaspace(std::string_view spelling) {
  std::string out;
  for (size_t i = 0; i < spelling.size();) {
    const bool space = spelling.substr(i, kMetaspace.size()) == kMetaspace;
    out += space ? ' ' : spelling[i];
    i += space ? kMetaspace.size() : 1;
  }
  return out;
}

void Tokenizer::State::set(int64_t id, std::string_view spelling) {
  if (id < 0 || id >= kLargestVocabulary) fail_input("token \"{}\" has id {}; ids go from 0 to {}", spelling, id, kLargestVocabulary - 1);
  if (size_t(id) >= spellings.size()) spellings.resize(size_t(id) + 1);
  spellings[size_t(id)] = spelling;
}

void Tokenizer::State::index_spellings() {
  ids.clear();
  ids.reserve(spellings.size());
  for (size_t id = 0; id < spellings.size(); id++)
    if (!spellings[id].empty()) ids.try_emplace(spellings[id], int32_t(id));
  special.resize(spellings.size());
}

std::optional<int32_t> Tokenizer::State::find(std::string_view spelling) const {
  const auto at = ids.find(spelling);
  return at == ids.end() ? std::nullopt : std::optional(at->second);
}

void Tokenizer::State::set_added(std::vector<AddedToken> tokens) {
  MatchBudget budget(0);
  std::vector<AddedToken> before, after;
  for (AddedToken& token : tokens) {
    if (token.spelling.size() > kLongestAddedToken)
      fail_input("added token {} is {} bytes long; at most {} are supported", token.id, token.spelling.size(), kLongestAddedToken);
    if (token.special) special[size_t(token.id)] = true;
    if (!token.normalized) {
      before.push_back(std::move(token));
      continue;
    }
    std::string spelling;
    run_steps(normalizer, {token.spelling, true}, budget, [&](Piece piece) { spelling += piece.text; });
    token.spelling = std::move(spelling);
    after.push_back(std::move(token));
  }
  plain = AddedTokens(std::move(before));
  normalized = AddedTokens(std::move(after));
}

void Tokenizer::State::add_merge(int32_t left, int32_t right, int32_t rank, int32_t result) {
  if (spellings[size_t(right)].starts_with(kMetaspace) && !spellings[size_t(left)].ends_with(kMetaspace)) merges_cross_spaces = true;
  merges.add(left, right, rank, result);
}

void Tokenizer::State::add_merge(std::string_view left, std::string_view right, int32_t rank) {
  const auto id_of = [&](std::string_view spelling) {
    const auto id = find(spelling);
    if (!id) fail_input("merge {} (\"{}\" and \"{}\") needs the token \"{}\", which is not in the vocabulary", rank, left, right, spelling);
    return *id;
  };
  add_merge(id_of(left), id_of(right), rank, id_of(std::string(left).append(right)));
}

void Tokenizer::State::add_merge(std::string_view both, int32_t rank) {
  const size_t space = both.find(' ', 1);
  if (space == std::string_view::npos || space + 1 >= both.size())
    fail_input("merge {} is \"{}\"; it should be two tokens with a space between", rank, both);
  add_merge(both.substr(0, space), both.substr(space + 1), rank);
}

}  // namespace mla
