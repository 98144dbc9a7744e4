// What a Tokenizer is made of; filled by tokenizer_json.cpp or tokenizer_gguf.cpp, used by tokenizer.cpp.
#pragma once

#include "text/added_tokens.h"
#include "text/bpe.h"
#include "text/pre_tokenizer.h"
#include "text/tokenizer.h"

#include <array>
#include <unordered_map>

namespace mla {

enum GgufToken : int32_t { normal = 1, unknown, control, user_defined, unused, byte };  // tokenizer.ggml.token_type

inline constexpr std::string_view kMetaspace = "\xE2\x96\x81";  // U+2581, sentencepiece's space

struct Tokenizer::State {
  // The vocabulary by id. Spellings are as in the file; bytes are what the token stands for in text.
  std::vector<std::string> spellings, bytes;
  std::vector<bool> special;
  std::unordered_map<std::string_view, int32_t> ids;  // by spelling; views into spellings, which do not change any more

  std::vector<Step> normalizer, pre_tokenizer;
  AddedTokens plain, normalized;  // sought before and after the normalizer

  // Symbols that a word starts as: bytes (byte level), or characters and, where these are unknown, bytes.
  bool byte_level = false;
  std::array<int32_t, 256> byte_ids;                 // -1: none
  std::unordered_map<std::string, int32_t> symbols;  // characters; not used at byte level
  int32_t unknown = -1;
  bool fuse_unknown = false;
  Bpe merges;
  std::unordered_map<std::string, int32_t> words;  // words that are taken whole, without merging (ignore_merges)
  bool has_metaspace = false;                      // as a symbol
  bool merges_cross_spaces = false;                // some token has a space behind another character

  std::vector<int32_t> front, back;  // what add_special puts around the text
  size_t strip = 0;                  // spaces that decode takes from the front of a text
  int32_t bos = -1, eos = -1;
  std::string chat_template;

  State() { byte_ids.fill(-1); }

  // Sets one entry of the vocabulary, which grows; raises Error when the id is not one.
  void set(int64_t id, std::string_view spelling);
  // Called once all spellings are there.
  void index_spellings();
  std::optional<int32_t> find(std::string_view spelling) const;
  void set_added(std::vector<AddedToken> tokens);
  void add_merge(int32_t left, int32_t right, int32_t rank, int32_t result);
  void add_merge(std::string_view both, int32_t rank);  // two spellings with a space between; raises Error when one is not there
  void add_merge(std::string_view left, std::string_view right, int32_t rank);
};

// GPT-2's alphabet, which spells every byte as a printable character: the bytes a spelling stands for, or nothing when a character in it
// is not of the alphabet.
std::optional<std::string> bytes_of_alphabet(std::string_view spelling);
std::string alphabet_of_bytes(std::string_view bytes);
std::string replace_metaspace(std::string_view spelling);  // by spaces
// The byte a token such as <0x0A> stands for.
std::optional<char> byte_of_fallback(std::string_view spelling);

}  // namespace mla
