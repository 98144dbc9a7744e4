// Tokenizers out of a GGUF's metadata: a table from the names of pre-tokenizers to their steps.
#include "core/check.h"
#include "text/state.h"
#include "text/unicode.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace mla {

namespace {

constexpr const char* kGpt2 = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr const char* kDigit = R"(\p{N})";
// The alphabets that DeepSeek's first tokenizer names character by character.
constexpr const char* kDeepseekLetters =
    R"(\s?[)"
    R"(A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}\x{295}-\x{2AF}\x{370}-\x{373})"
    R"(\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481})"
    R"(\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF})"
    R"(\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45})"
    R"(\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE})"
    R"(\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4})"
    R"(\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D})"
    R"(\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4})"
    R"(\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E})"
    R"(\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F})"
    R"(\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}\x{1E900}-\x{1E943})"
    "]+";
constexpr const char* kDeepseekPunctuation = R"(\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+)";
constexpr const char* kDeepseekCjk = R"([\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+)";
constexpr const char* kDeepseek3Cjk = R"([\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+)";
constexpr const char* kDeepseek3Words =
    R"([!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

struct PreTokenizer {
  std::vector<const char*> names;     // as tokenizer.ggml.pre spells them
  std::vector<const char*> patterns;  // each cuts what the one before left, matches kept
  bool adds_bos = false;              // unless the file says otherwise
  bool whole_words = false;           // a word that is a token is not merged
  bool compose = false;               // NFC first
};

const std::vector<PreTokenizer>& pre_tokenizers() {
  static const std::vector<PreTokenizer> table = {
      {{"deepseek-llm"}, {R"([\r\n])", kDeepseekLetters, kDeepseekPunctuation, R"(\s+$)", kDeepseekCjk, kDigit}},
      {{"deepseek-coder"}, {R"([\r\n])", R"(\s?\p{L}+)", R"(\s?\p{P}+)", kDeepseekCjk, kDigit}},
      {{"deepseek-v3"}, {R"(\p{N}{1,3})", kDeepseek3Cjk, kDeepseek3Words}},
      {{"llama-bpe", "llama3", "llama-v3"}, {kLlama3}, true, true},
      {{"qwen2", "deepseek-r1-qwen"}, {kQwen2}, false, false, true},
      {{"gpt-2"}, {kGpt2}},
      {{"smollm", "starcoder"}, {kDigit, kGpt2}},
      {{"default"}, {R"([\p{P}\$\+<=>\^~\|]+)", kGpt2, R"(\p{N}+)", "[0-9][0-9][0-9]"}},
  };
  return table;
}

const PreTokenizer& pre_tokenizer_of(std::string_view name) {
  std::string names;
  for (const PreTokenizer& entry : pre_tokenizers())
    for (const char* known : entry.names) {
      if (name == known) return entry;
      names += fmt::format("{}{}", names.empty() ? "" : ", ", known);
    }
  fail_input("the GGUF's pre-tokenizer \"{}\" (tokenizer.ggml.pre) is not known; known are {}", name, names);
}

using Gguf = Tokenizer::GgufVocabulary;

GgufToken type_of(const Gguf& gguf, size_t id) { return gguf.types.empty() ? normal : GgufToken(gguf.types[id]); }

void check(const Gguf& gguf) {
  const size_t n = gguf.tokens.size();
  if (n == 0) fail_input("the GGUF's tokenizer.ggml.tokens is empty or missing; the file has no vocabulary");
  if (!gguf.types.empty() && gguf.types.size() != n)
    fail_input("the GGUF has {} tokens but {} entries in tokenizer.ggml.token_type", n, gguf.types.size());
  for (size_t i = 0; i < gguf.types.size(); i++)
    if (gguf.types[i] < normal || gguf.types[i] > byte)
      fail_input("token {} has type {} in tokenizer.ggml.token_type; types go from 1 to 6", i, gguf.types[i]);
  const auto inside = [&](const char* key, int32_t id) {
    if (id < -1 || (id >= 0 && size_t(id) >= n)) fail_input("tokenizer.ggml.{} is {}, outside the vocabulary of {} tokens", key, id, n);
  };
  inside("bos_token_id", gguf.bos);
  inside("eos_token_id", gguf.eos);
  inside("unknown_token_id", gguf.unknown);
}

void set_added(Tokenizer::State& state, const Gguf& gguf) {
  std::vector<AddedToken> added;
  for (size_t id = 0; id < gguf.tokens.size(); id++) {
    const GgufToken type = type_of(gguf, id);
    if (type != control && type != user_defined && type != unknown) continue;
    if (gguf.tokens[id].empty()) continue;
    added.push_back({.id = int32_t(id), .spelling = gguf.tokens[id], .special = type != user_defined});
  }
  state.set_added(std::move(added));
}

// Byte-level BPE: tokens spelled in GPT-2's alphabet and merges in order of rank.
void set_byte_level(Tokenizer::State& state, const Gguf& gguf) {
  const PreTokenizer& pre = pre_tokenizer_of(gguf.pre.empty() ? "default" : gguf.pre);
  if (pre.compose) state.normalizer.push_back(ComposeStep{});
  for (const char* pattern : pre.patterns) state.pre_tokenizer.push_back(SplitStep{Regex(pattern)});
  state.byte_level = true;
  state.bytes.resize(gguf.tokens.size());
  for (size_t id = 0; id < gguf.tokens.size(); id++) {
    const bool ordinary = type_of(gguf, id) == normal;
    const auto bytes = ordinary ? bytes_of_alphabet(gguf.tokens[id]) : std::nullopt;
    state.bytes[id] = bytes.value_or(gguf.tokens[id]);
    if (bytes && bytes->size() == 1) state.byte_ids[static_cast<unsigned char>((*bytes)[0])] = int32_t(id);
    if (bytes && bytes->size() > 1 && pre.whole_words) state.words.try_emplace(*bytes, int32_t(id));
  }
  state.merges = Bpe(gguf.merges.size());
  for (size_t rank = 0; rank < gguf.merges.size(); rank++) state.add_merge(gguf.merges[rank], int32_t(rank));
  if (gguf.add_bos.value_or(pre.adds_bos) && gguf.bos >= 0) state.front = {gguf.bos};
}

// Sentencepiece's BPE: every way to halve a token is a merge, the token with the higher score goes first.
void set_sentencepiece(Tokenizer::State& state, const Gguf& gguf) {
  const size_t n = gguf.tokens.size();
  if (gguf.scores.size() != n) fail_input("the GGUF has {} tokens but {} entries in tokenizer.ggml.scores", n, gguf.scores.size());
  std::vector<int32_t> order;
  state.bytes.resize(n);
  for (size_t id = 0; id < n; id++) {
    if (std::isnan(gguf.scores[id])) fail_input("token {} has no number as its score in tokenizer.ggml.scores", id);
    const std::string& spelling = gguf.tokens[id];
    const GgufToken type = type_of(gguf, id);
    const auto fallback = type == byte ? byte_of_fallback(spelling) : std::nullopt;
    if (type == byte && !fallback) fail_input("token {} is a byte, but spelled \"{}\" and not like <0x0A>", id, spelling);
    if (fallback) state.byte_ids[static_cast<unsigned char>(*fallback)] = int32_t(id);
    state.bytes[id] = fallback ? std::string(1, *fallback) : replace_metaspace(spelling);
    if (type != normal && type != user_defined) continue;
    if (!spelling.empty() && utf8_length(spelling) == spelling.size()) state.symbols.try_emplace(spelling, int32_t(id));
    order.push_back(int32_t(id));
  }
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return gguf.scores[a] > gguf.scores[b]; });
  const auto mergeable = [&](std::string_view spelling) -> std::optional<int32_t> {
    const auto id = state.find(spelling);
    const bool in = id && (type_of(gguf, size_t(*id)) == normal || type_of(gguf, size_t(*id)) == user_defined);
    return in ? id : std::nullopt;
  };
  state.merges = Bpe(2 * n);
  int32_t rank = 0;
  for (size_t i = 0; i < order.size(); i++) {
    if (i > 0 && gguf.scores[order[i]] != gguf.scores[order[i - 1]]) rank++;
    const std::string_view spelling = gguf.tokens[order[i]];
    if (spelling.size() > 256) continue;  // no trainer makes such; halving it every way would take long
    for (size_t cut = utf8_length(spelling); cut > 0 && cut < spelling.size();) {
      const auto left = mergeable(spelling.substr(0, cut)), right = mergeable(spelling.substr(cut));
      if (left && right) state.add_merge(*left, *right, rank, order[i]);
      const size_t step = utf8_length(spelling.substr(cut, 4));
      cut = step == 0 ? spelling.size() : cut + step;
    }
  }
  state.has_metaspace = state.symbols.contains(std::string(kMetaspace));
  state.unknown = gguf.unknown;
  if (gguf.add_space_prefix.value_or(true)) {
    state.normalizer.push_back(PrefixStep{.text = std::string(kMetaspace), .unless_there = false});
    state.strip = 1;
  }
  state.normalizer.push_back(ReplaceStep{Regex::literal(" "), std::string(kMetaspace)});
  if (gguf.add_bos.value_or(true) && gguf.bos >= 0) state.front = {gguf.bos};
}

}  // namespace

Tokenizer Tokenizer::from_gguf(GgufVocabulary gguf) {
  check(gguf);
  auto state = std::make_unique<State>();
  for (size_t id = 0; id < gguf.tokens.size(); id++) state->set(int64_t(id), gguf.tokens[id]);
  state->index_spellings();
  if (gguf.model == "gpt2")
    set_byte_level(*state, gguf);
  else if (gguf.model == "llama")
    set_sentencepiece(*state, gguf);
  else
    fail_input("the GGUF's tokenizer.ggml.model is \"{}\"; known are gpt2 (byte-level BPE) and llama (sentencepiece BPE)", gguf.model);
  set_added(*state, gguf);
  state->bos = gguf.bos;
  state->eos = gguf.eos;
  if (gguf.add_eos.value_or(false) && gguf.eos >= 0) state->back = {gguf.eos};
  state->chat_template = std::move(gguf.chat_template);
  return Tokenizer(std::move(state));
}

}  // namespace mla
