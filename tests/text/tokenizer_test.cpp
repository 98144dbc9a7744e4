// Tokenizers beyond the goldens: long words, broken UTF-8, streams, hostile files and patterns, GGUF and sentencepiece details.
#include "text/tokenizer.h"
#include "core/check.h"
#include "text/bpe.h"
#include "text/regex.h"
#include "text/tokenizer_export.h"
#include "text/unicode.h"

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <random>
#include <sstream>
#include <thread>

namespace {

using mla::Tokenizer;
using nlohmann::json;
using Ids = std::vector<int32_t>;

std::string tiny(const char* name) {
  std::ifstream file(std::string(MLA_TEST_DATA) + "/text/" + name + ".json", std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

const Tokenizer& bytes() {
  static const Tokenizer instance = Tokenizer::from_json(tiny("tiny_bytes"));
  return instance;
}

const Tokenizer& sentencepiece() {
  static const Tokenizer instance = Tokenizer::from_json(tiny("tiny_sentencepiece"));
  return instance;
}

std::string repeat(std::string_view part, size_t n) {
  std::string out;
  for (size_t i = 0; i < n; i++) out += part;
  return out;
}

// The message of the Error that a call raises; it must blame the input.
template <class F>
std::string error_of(const F& call) {
  try {
    call();
  } catch (const mla::Error& error) {
    EXPECT_EQ(error.kind(), mla::ErrorKind::input) << error.what();
    return error.what();
  }
  return "no error";
}

std::string refusal(const json& tokenizer) {
  return error_of([&] { Tokenizer::from_json(tokenizer.dump()); });
}

#define EXPECT_HAS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

// ---- merges

Ids merge_plainly(const std::vector<std::array<int32_t, 4>>& merges, Ids symbols) {
  while (true) {
    int32_t best_rank = INT32_MAX, result = -1;
    size_t at = 0;
    for (size_t i = 0; i + 1 < symbols.size(); i++)
      for (const auto& [left, right, rank, to] : merges)
        if (symbols[i] == left && symbols[i + 1] == right && rank < best_rank) best_rank = rank, result = to, at = i;
    if (result < 0) return symbols;
    symbols[at] = result;
    symbols.erase(symbols.begin() + int64_t(at) + 1);
  }
}

TEST(Bpe, ScanAndHeapMergeAsTheDefinitionDoes) {
  std::mt19937 random(7);
  for (int round = 0; round < 60; round++) {
    std::vector<std::array<int32_t, 4>> merges;
    mla::Bpe bpe;
    for (int32_t i = 0; i < 40; i++) {
      const int32_t left = int32_t(random() % 20), right = int32_t(random() % 20);
      const bool known = std::any_of(merges.begin(), merges.end(), [&](const auto& m) { return m[0] == left && m[1] == right; });
      if (known) continue;
      merges.push_back({left, right, i / 2, int32_t(random() % 20)});  // ranks in pairs: the leftmost goes first
      bpe.add(left, right, i / 2, merges.back()[3]);
    }
    for (const size_t length : {0, 1, 2, 5, 31, 32, 33, 34, 100, 300}) {
      Ids symbols(length);
      for (int32_t& symbol : symbols) symbol = int32_t(random() % 20);
      Ids merged = symbols;
      merged.insert(merged.begin(), {3, 1, 4});
      bpe.merge(merged, 3);
      Ids wanted = merge_plainly(merges, symbols);
      wanted.insert(wanted.begin(), {3, 1, 4});
      ASSERT_EQ(merged, wanted) << "length " << length;
    }
  }
}

TEST(Tokenizer, LongWordsTakeNoTime) {
  const size_t n = 1 << 20;
  std::mt19937 random(5);
  std::string letters(n, ' ');
  for (char& c : letters) c = char('a' + random() % 26);
  for (const Tokenizer* tokenizer : {&bytes(), &sentencepiece()})
    for (const std::string& word :
         {std::string(n, 'a'), std::string(n, ' '), std::string(n, '\n'), letters, repeat("中", n / 3), repeat("ab", n / 2)})
      EXPECT_EQ(tokenizer->decode(tokenizer->encode(word, false, false)), word);
}

// ---- text

TEST(Tokenizer, BrokenUtf8Survives) {
  std::mt19937 random(11);
  for (int round = 0; round < 300; round++) {
    std::string text(random() % 60, ' ');
    for (char& c : text) c = char(random());
    if (text.find("\xE2\x96\x81") != std::string::npos) continue;  // sentencepiece's own space
    for (const Tokenizer* tokenizer : {&bytes(), &sentencepiece()}) {
      const Ids ids = tokenizer->encode(text, false, false);
      EXPECT_EQ(tokenizer->decode(ids), text);
    }
  }
}

TEST(TextStream, NeverSplitsACharacter) {
  const std::string text = "naïve 日本語 👨‍👩‍👧‍👦 🏴‍☠️ end \xE4\xB8 broken \xF0\x9F";
  for (const Tokenizer* tokenizer : {&bytes(), &sentencepiece()}) {
    mla::TextStream stream(*tokenizer);
    std::string all;
    bool waited = false;
    for (int32_t id : tokenizer->encode(text, false, false)) {
      const std::string part = stream.push(id);
      EXPECT_EQ(mla::incomplete_suffix(part), 0u);
      waited |= part.empty();
      all += part;
    }
    EXPECT_TRUE(waited);
    EXPECT_EQ(all + stream.flush(), text);
    EXPECT_EQ(stream.flush(), "");
  }
}

TEST(TextStream, LeavesSpecialAndUnknownIdsOut) {
  const int32_t end = *bytes().find("</s>");
  const Ids ids = {end, *bytes().find("a"), 1 << 20, -1, end, *bytes().find("b")};
  EXPECT_EQ(bytes().decode(ids), "</s>a</s>b");
  EXPECT_EQ(bytes().decode(ids, true), "ab");
  EXPECT_TRUE(bytes().is_special(end));
  EXPECT_FALSE(bytes().is_special(-1));
  EXPECT_FALSE(bytes().is_special(1 << 20));
}

TEST(Tokenizer, ControlTokensAreOrdinaryTextUnlessParsed) {
  const int32_t end = *bytes().find("<|im_end|>");
  EXPECT_EQ(bytes().encode("<|im_end|>", false, true), Ids{end});
  const Ids plain = bytes().encode("x<|im_end|>y", false, false);
  EXPECT_EQ(std::count(plain.begin(), plain.end(), end), 0);
  EXPECT_EQ(bytes().decode(plain), "x<|im_end|>y");
  // Added tokens that are not special are found either way.
  EXPECT_EQ(bytes().encode("<think>", false, false), Ids{*bytes().find("<think>")});
}

// DeepSeek's first vocabulary lacks the bytes that UTF-8 never has and holds the letters that spell them as added tokens.
TEST(Tokenizer, AddedTokensThatLookLikeBytesAreText) {
  json changed = json::parse(tiny("tiny_bytes"));
  const int32_t id = bytes().vocab_size();
  changed["model"]["vocab"].erase("ö");
  changed["added_tokens"].push_back({{"id", id}, {"content", "ö"}, {"special", false}, {"normalized", true}});
  const auto tokenizer = Tokenizer::from_json(changed.dump());
  EXPECT_EQ(tokenizer.encode("ö", false, false), Ids{id});
  EXPECT_EQ(tokenizer.decode(Ids{id}), "ö");
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("a\xF6z", false, false)), "a\uFFFDz");
}

TEST(Tokenizer, WordsWithoutAnyTokenSayNothing) {
  const auto tokenizer =
      Tokenizer::from_json(R"({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}})");
  EXPECT_EQ(tokenizer.encode("zz a", false, false), Ids{0});
}

TEST(Tokenizer, ExactlyOneBos) {
  const int32_t bos = sentencepiece().bos();
  EXPECT_EQ(bos, 1);
  EXPECT_TRUE(sentencepiece().adds_bos());
  const Ids with = sentencepiece().encode("Hello", true, true), without = sentencepiece().encode("Hello", false, true);
  EXPECT_EQ(std::count(with.begin(), with.end(), bos), 1);
  EXPECT_EQ(with.front(), bos);
  EXPECT_EQ(Ids(with.begin() + 1, with.end()), without);
}

TEST(Tokenizer, TheConfigDecidesAboutBosAndEos) {
  const std::string source = tiny("tiny_sentencepiece");
  const auto no_bos = Tokenizer::from_json(
      source, R"({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": false, "add_eos_token": true})");
  EXPECT_FALSE(no_bos.adds_bos());
  EXPECT_EQ(no_bos.bos(), 1);
  EXPECT_EQ(no_bos.eos(), 2);
  EXPECT_EQ(no_bos.encode("", true, false), Ids{2});
  const auto by_name =
      Tokenizer::from_json(source, R"({"chat_template": [{"name": "tool", "template": "a"}, {"name": "default", "template": "b"}]})");
  EXPECT_EQ(by_name.chat_template(), "b");
  EXPECT_TRUE(by_name.adds_bos());
}

TEST(Tokenizer, ManyThreadsShareOne) {
  const std::string text = repeat("Hello world, 123 naïve 日本語 😀\n", 50);
  const Ids wanted = bytes().encode(text, false, true);
  std::vector<Ids> results(4);
  std::vector<std::thread> threads;
  for (Ids& result : results) threads.emplace_back([&] { result = bytes().encode(text, false, true); });
  for (std::thread& thread : threads) thread.join();
  for (const Ids& result : results) EXPECT_EQ(result, wanted);
}

TEST(Unicode, NfcOfTheStandardsExamples) {
  EXPECT_EQ(mla::nfc("e\u0301"), "é");
  EXPECT_EQ(mla::nfc("\u212B"), "\u00C5");
  EXPECT_EQ(mla::nfc("q\u0307\u0323"), "q\u0323\u0307");
  EXPECT_EQ(mla::nfc("\u1112\u1161\u11AB"), "한");
  EXPECT_EQ(mla::nfc("\u0958"), "\u0915\u093C");  // excluded from composition
  EXPECT_EQ(mla::nfc("a\xFF\u0301"), "a\xFF\u0301");
  EXPECT_EQ(mla::nfc(std::string("a\0e\u0301", 5)), std::string("a\0é", 4));
  // A megabyte of marks out of order: sorted, not bubbled.
  const std::string marks = "a" + repeat("\u0301\u0323", 1 << 18);
  EXPECT_EQ(mla::nfc(marks).size(), marks.size());
}

TEST(Unicode, Utf8LengthsAreTheStandards) {
  for (const char* broken : {"\x80", "\xC0\x80", "\xC1\xBF", "\xE0\x9F\xBF", "\xED\xA0\x80", "\xF0\x8F\xBF\xBF", "\xF4\x90\x80\x80",
                             "\xF5\x80\x80\x80", "\xC3", "\xE4\xB8"})
    EXPECT_EQ(mla::utf8_length(broken), 0u) << broken;
  EXPECT_EQ(mla::incomplete_suffix("a\xC3"), 1u);
  EXPECT_EQ(mla::incomplete_suffix("a\xE4\xB8"), 2u);
  EXPECT_EQ(mla::incomplete_suffix("a\xF0\x9F\x98"), 3u);
  EXPECT_EQ(mla::incomplete_suffix("a\xED\xA0"), 0u);  // no character begins so
  EXPECT_EQ(mla::incomplete_suffix("a\x80\x80"), 0u);
  EXPECT_EQ(mla::incomplete_suffix("é"), 0u);
}

// ---- patterns

TEST(Regex, LongRepeatsOfGroupsStillMatch) {
  const std::string text(1 << 14, 'a');
  mla::MatchBudget budget(text.size());
  std::vector<size_t> ends;
  mla::Regex("(?:(?=a)([^b]))+").split(text, budget, [&](size_t, size_t end, bool) { ends.push_back(end); });
  EXPECT_EQ(ends, std::vector<size_t>{text.size()});
}

TEST(Regex, HostilePatternsAreRefusedInTime) {
  const std::string text(1 << 16, 'a');
  const auto run = [&](const char* pattern) {
    return error_of([&] {
      mla::MatchBudget budget(text.size());
      mla::Regex(pattern).split(text, budget, [](size_t, size_t, bool) {});
    });
  };
  for (const char* pattern : {"(a+)+[bc]", "(a|aa)+[bc]", "(a*)*[bc]", "(?:a?){40}a{40}[bc]", "(?=(a+)+[bc])a"})
    EXPECT_HAS(run(pattern), "on this text");
  // Too deep or too large: refused when compiled, or harmless.
  for (const char* pattern : {"((a{1,50}){1,50}){1,50}[bc]", "(.*)*\\1[bc]", "(?<=a|b+)c", "(?R)", "(a(?1)?)[bc]"}) {
    const std::string message = run(pattern);
    EXPECT_TRUE(message == "no error" || message.find("the pattern") != std::string::npos) << message;
  }
}

TEST(Regex, PatternsThatCannotBeMeantAreRefused) {
  for (const char* pattern : {"(", "[", "[a", "a{2,1}", "(?C1)", "(*LIMIT_MATCH=1)a", "\\", "\\K", "\\Ca", "[a&&b]", "[a[b]]", "\\h",
                              "\\u12", "(?<x", "\xFF", "[[:alpha:"})
    EXPECT_NE(error_of([&] { mla::Regex{std::string_view(pattern)}; }), "no error") << pattern;
  EXPECT_NE(error_of([&] { mla::Regex(std::string(1 << 20, 'a')); }), "no error");
  EXPECT_NE(error_of([&] { mla::Regex(repeat("(", 100000)); }), "no error");
}

// ---- files

TEST(TokenizerJson, SaysWhatIsWrong) {
  const json good = json::parse(tiny("tiny_bytes"));
  EXPECT_HAS(error_of([] { Tokenizer::from_json("{"); }), "not valid JSON");
  EXPECT_HAS(error_of([] { Tokenizer::from_json("[]"); }), "object");
  EXPECT_HAS(error_of([] { Tokenizer::from_json("{}"); }), "no \"model\"");
  EXPECT_HAS(error_of([] { Tokenizer::from_json(repeat("[", 1 << 20)); }), "deeper");
  EXPECT_HAS(error_of([&] { Tokenizer::from_json(good.dump(), "nonsense"); }), "tokenizer_config.json");
  const auto with = [&](const char* pointer, json value) {
    json changed = good;
    changed[json::json_pointer(pointer)] = std::move(value);
    return refusal(changed);
  };
  EXPECT_HAS(with("/model/type", "Unigram"), "supported are BPE");
  EXPECT_HAS(with("/model/vocab", 3), "vocab");
  EXPECT_HAS(with("/model/vocab/a", -1), "id -1");
  EXPECT_HAS(with("/model/vocab/a", 1e18), "integer");
  EXPECT_HAS(with("/model/vocab/a", 1ll << 40), "ids go from 0");
  EXPECT_HAS(with("/model/vocab/a", 18446744073709551615ull), "integer");
  EXPECT_HAS(with("/model/vocab/a", "x"), "integer");
  EXPECT_HAS(with("/model/merges/0", "zzzz yyyy"), "not in the vocabulary");
  EXPECT_HAS(with("/model/merges/0", "alone"), "two tokens");
  EXPECT_HAS(with("/model/merges/0", json::array({"a"})), "neither");
  EXPECT_HAS(with("/model/merges", 1), "array");
  EXPECT_HAS(with("/model/end_of_word_suffix", "</w>"), "not supported");
  EXPECT_HAS(with("/normalizer", {{"type", "Precompiled"}}), "supported are");
  EXPECT_HAS(with("/pre_tokenizer", {{"type", "Whitespace"}}), "supported are");
  EXPECT_HAS(with("/pre_tokenizer", {{"type", "Split"}, {"behavior", "Isolated"}}), "pattern");
  EXPECT_HAS(with("/pre_tokenizer", {{"type", "Split"}, {"pattern", {{"Regex", "a"}}}, {"behavior", "Odd"}}), "Isolated");
  EXPECT_HAS(with("/decoder", {{"type", "WordPiece"}}), "supported are");
  EXPECT_HAS(with("/post_processor", {{"type", "BertProcessing"}}), "supported are");
  EXPECT_HAS(with("/added_tokens/0/id", nullptr), "no \"id\"");
  EXPECT_HAS(with("/added_tokens/0/id", 1 << 30), "ids go from 0");
  EXPECT_HAS(with("/added_tokens/0/content", "other"), "has the id");
  EXPECT_HAS(with("/added_tokens/0", {{"id", 1 << 20}, {"content", std::string(5000, 'x')}}), "bytes long");
  EXPECT_HAS(with("/added_tokens/0/special", 1), "true or false");
  json steps = json::array();
  for (int i = 0; i < 100; i++) steps.push_back({{"type", "NFC"}});
  EXPECT_HAS(with("/normalizer", {{"type", "Sequence"}, {"normalizers", steps}}), "more than 64");
}

Tokenizer::GgufVocabulary small_gguf() {
  Tokenizer::GgufVocabulary gguf;
  gguf.model = "llama";
  for (const char* token : {"<unk>", "<s>", "</s>"}) gguf.tokens.emplace_back(token);
  for (int byte = 0; byte < 256; byte++) gguf.tokens.push_back(fmt::format("<0x{:02X}>", byte));
  gguf.types.assign(gguf.tokens.size(), 6);
  gguf.types[0] = 2, gguf.types[1] = gguf.types[2] = 3;
  gguf.scores.assign(gguf.tokens.size(), 0.f);
  const auto add = [&](const char* token, float score) {
    gguf.tokens.emplace_back(token);
    gguf.types.push_back(1);
    gguf.scores.push_back(score);
  };
  for (const char* token : {"▁", "a", "b", "c", "<", "s", ">"}) add(token, -100.f);
  add("ab", -1.f);
  add("bc", -2.f);
  add("▁a", -3.f);
  add("abc", -4.f);
  add("▁ab", -0.5f);
  add("<s", -6.f);
  gguf.bos = 1, gguf.eos = 2, gguf.unknown = 0;
  return gguf;
}

TEST(TokenizerGguf, SentencepieceMergesByScore) {
  const auto tokenizer = Tokenizer::from_gguf(small_gguf());
  const auto spell = [&](std::string_view text) {
    std::string out;
    for (int32_t id : tokenizer.encode(text, false, false)) out.append(tokenizer.token(id)).append("|");
    return out;
  };
  EXPECT_EQ(spell("abc"), "▁ab|c|");  // ab first (-1), then ▁ab (-0.5) before abc (-4)
  EXPECT_EQ(spell("cabc bc"), "▁|c|abc|▁|bc|");
  EXPECT_EQ(spell("é"), "▁|<0xC3>|<0xA9>|");
  EXPECT_EQ(spell("<s>"), "▁|<s|>|");  // a control token is not merged into
  EXPECT_EQ(tokenizer.encode("<s>", true, true), (Ids{1, 1}));
  EXPECT_EQ(spell(""), "");
  for (const char* text : {"abc", " abc", "a  b ", "é\xFF", "<0x41>"})
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text, false, false)), text);
  EXPECT_TRUE(tokenizer.adds_bos());
  auto bare = small_gguf();
  bare.add_space_prefix = false;
  bare.add_bos = false;
  bare.add_eos = true;
  const auto plain = Tokenizer::from_gguf(std::move(bare));
  EXPECT_EQ(plain.token(plain.encode("abc", false, false)[0]), "abc");
  EXPECT_EQ(plain.encode("", true, false), Ids{2});
  EXPECT_EQ(plain.decode(plain.encode(" a", false, false)), " a");
}

TEST(TokenizerGguf, SaysWhatIsWrong) {
  const auto with = [](auto change) {
    auto gguf = small_gguf();
    change(gguf);
    return error_of([&] { Tokenizer::from_gguf(gguf); });
  };
  using Gguf = Tokenizer::GgufVocabulary;
  EXPECT_HAS(with([](Gguf& g) { g.tokens.clear(); }), "no vocabulary");
  EXPECT_HAS(with([](Gguf& g) { g.types.pop_back(); }), "token_type");
  EXPECT_HAS(with([](Gguf& g) { g.types[5] = 77; }), "types go from");
  EXPECT_HAS(with([](Gguf& g) { g.scores.pop_back(); }), "scores");
  EXPECT_HAS(with([](Gguf& g) { g.scores[270] = NAN; }), "score");
  EXPECT_HAS(with([](Gguf& g) { g.bos = 1 << 20; }), "bos_token_id");
  EXPECT_HAS(with([](Gguf& g) { g.eos = -5; }), "eos_token_id");
  EXPECT_HAS(with([](Gguf& g) { g.tokens[10] = "x"; }), "like <0x0A>");
  EXPECT_HAS(with([](Gguf& g) { g.model = "bert"; }), "gpt2");
  EXPECT_HAS(with([](Gguf& g) { g.model = "gpt2", g.pre = "klingon"; }), "deepseek-llm");
  EXPECT_HAS(with([](Gguf& g) { g.model = "gpt2", g.merges = {"a zzz"}; }), "not in the vocabulary");
}

// A vocabulary of all bytes and a few merges, as a GGUF brings it.
Tokenizer::GgufVocabulary gguf_vocabulary(const char* pre) {
  Tokenizer::GgufVocabulary v;
  v.model = "gpt2", v.pre = pre;
  const Tokenizer& alphabet = bytes();
  for (int32_t id = 0; id < alphabet.vocab_size(); ++id) v.tokens.emplace_back(alphabet.token(id));
  for (const std::string merge : {"t h", "th e", "Ġ the", "1 2"}) {
    std::string whole = merge;
    whole.erase(whole.find(' '), 1);
    if (std::find(v.tokens.begin(), v.tokens.end(), whole) == v.tokens.end()) v.tokens.push_back(whole);
    v.merges.push_back(merge);
  }
  v.types.assign(v.tokens.size(), 1);
  v.tokens.push_back("<|end|>"), v.types.push_back(3);
  v.bos = v.eos = int32_t(v.tokens.size()) - 1;
  v.chat_template = "{{ messages }}";
  return v;
}

TEST(Export, AGgufsTokenizerComesBackFromItsFiles) {
  for (const char* pre : {"gpt-2", "smollm", "llama-bpe", "qwen2"}) {
    const Tokenizer original = Tokenizer::from_gguf(gguf_vocabulary(pre));
    const auto files = mla::export_tokenizer(gguf_vocabulary(pre));
    ASSERT_TRUE(files) << pre;
    const Tokenizer back = Tokenizer::from_json(files->tokenizer, files->tokenizer_config);
    EXPECT_EQ(back.vocab_size(), original.vocab_size()) << pre;
    EXPECT_EQ(back.bos(), original.bos());
    EXPECT_EQ(back.chat_template(), original.chat_template());
    for (const char* text : {"the theme of the 12 others, 1234!", "  spaces\n\nand CRLF\r\n", "Ünïcödé 東京 I'LL they'll", "<|end|> the"})
      EXPECT_EQ(back.encode(text, true, true), original.encode(text, true, true)) << pre << ": " << text;
  }
}

TEST(Export, SentencepieceComesBackFromItsFiles) {
  for (bool plain : {false, true}) {
    auto gguf = small_gguf();
    if (plain) gguf.add_space_prefix = gguf.add_bos = false;
    const Tokenizer original = Tokenizer::from_gguf(gguf);
    const auto files = mla::export_tokenizer(gguf);
    ASSERT_TRUE(files);
    const Tokenizer back = Tokenizer::from_json(files->tokenizer, files->tokenizer_config);
    EXPECT_EQ(back.vocab_size(), original.vocab_size());
    for (const char* text : {"abc", "cabc bc", "é", "<s>", "", " a  b ", "é\xFF", "<0x41>", "abcabc ab<s>c"}) {
      const Ids ids = original.encode(text, true, true);
      EXPECT_EQ(back.encode(text, true, true), ids) << text;
      EXPECT_EQ(back.decode(ids), original.decode(ids)) << text;
    }
  }
}

TEST(Export, VocabulariesOfOtherKindsAreLeftOut) {
  EXPECT_FALSE(mla::export_tokenizer(gguf_vocabulary("deepseek-llm")));
  auto v = gguf_vocabulary("gpt-2");
  v.model = "llama";  // without scores
  EXPECT_FALSE(mla::export_tokenizer(v));
}

}  // namespace
