// Ids of a few hundred awkward strings against the `tokenizers` library (tools/make_tokenizer_goldens.py made them).
#include "io/checkpoint.h"
#include "text/tokenizer.h"

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>

namespace {

using nlohmann::json;
namespace fs = std::filesystem;

std::string read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

const fs::path kData = fs::path(MLA_TEST_DATA) / "text";

const json& goldens() {
  static const json instance = json::parse(read(kData / "goldens.json"));
  return instance;
}

fs::path cache() {
  const char *xdg = std::getenv("XDG_CACHE_HOME"), *home = std::getenv("HOME");
  return (xdg && *xdg ? fs::path(xdg) : fs::path(home ? home : ".") / ".cache") / "mla";
}

// Where a vocabulary is, or nothing: then the test is skipped when MLA_OFFLINE is set and fails otherwise.
fs::path vocabulary(const std::string& base) {
  if (base.starts_with("tiny")) return kData / (base + ".json");
  if (base == "smollm2") return cache() / "SmolLM2-135M-Instruct.Q4_1.gguf";
  return cache() / "tokenizers" / (base + ".json");
}

#define NEED(base)                                                                                           \
  if (!fs::exists(vocabulary(base))) {                                                                       \
    if (std::getenv("MLA_OFFLINE")) GTEST_SKIP() << vocabulary(base) << " is not there";                     \
    FAIL() << vocabulary(base) << " is not there; run tools/fetch_tokenizers and tools/fetch_smollm2 first"; \
  }

mla::Tokenizer from_gguf_file(const fs::path& path) {
  const mla::Checkpoint file = mla::Checkpoint::open(path);
  const json& meta = file.metadata();
  mla::Tokenizer::GgufVocabulary vocabulary;
  vocabulary.model = meta.at("tokenizer.ggml.model");
  vocabulary.pre = meta.at("tokenizer.ggml.pre");
  vocabulary.tokens = file.strings("tokenizer.ggml.tokens");
  vocabulary.merges = file.strings("tokenizer.ggml.merges");
  vocabulary.types = file.ints("tokenizer.ggml.token_type");
  vocabulary.bos = meta.at("tokenizer.ggml.bos_token_id");
  vocabulary.eos = meta.at("tokenizer.ggml.eos_token_id");
  vocabulary.add_bos = meta.at("tokenizer.ggml.add_bos_token").get<bool>();
  vocabulary.chat_template = meta.at("tokenizer.chat_template");
  return mla::Tokenizer::from_gguf(std::move(vocabulary));
}

// The same vocabulary as a GGUF would hold it.
mla::Tokenizer::GgufVocabulary as_gguf(const json& tokenizer, const std::string& pre) {
  mla::Tokenizer::GgufVocabulary out;
  out.model = "gpt2";
  out.pre = pre;
  const auto put = [&](const std::string& spelling, size_t id, int32_t type) {
    if (id >= out.tokens.size()) out.tokens.resize(id + 1), out.types.resize(id + 1, 5);
    out.tokens[id] = spelling;
    out.types[id] = type;
  };
  for (const auto& [spelling, id] : tokenizer.at("model").at("vocab").items()) put(spelling, id.get<size_t>(), 1);
  for (const json& added : tokenizer.at("added_tokens")) put(added.at("content"), added.at("id"), added.at("special").get<bool>() ? 3 : 4);
  for (const json& merge : tokenizer.at("model").at("merges"))
    out.merges.push_back(merge.is_string() ? merge.get<std::string>() : merge[0].get<std::string>() + " " + merge[1].get<std::string>());
  return out;
}

void expect_case(const mla::Tokenizer& tokenizer, const json& golden) {
  const json& strings = goldens().at("strings");
  int wrong = 0;
  for (size_t i = 0; i < strings.size(); i++) {
    const auto text = strings[i].get<std::string>();
    const auto ids = tokenizer.encode(text, golden.at("add_special"), golden.at("parse_special"));
    const auto wanted = golden.at("ids")[i].get<std::vector<int32_t>>();
    EXPECT_EQ(ids, wanted) << "string " << i << ": " << strings[i].dump();
    wrong += ids != wanted;
    if (wrong > 5) FAIL() << "and more";
    if (golden.contains("decoded")) {
      const auto decoded = golden.at("decoded")[i].get<std::string>();
      EXPECT_EQ(tokenizer.decode(ids, true), decoded) << "string " << i;
    }
  }
}

mla::Tokenizer make(const json& golden) {
  const fs::path path = vocabulary(golden.at("base"));
  if (path.extension() == ".gguf") return from_gguf_file(path);
  const json& patch = golden.at("patch");
  if (patch.empty() && golden.at("pre") != "llama-bpe") return mla::Tokenizer::from_json(read(path));
  json tokenizer = json::parse(read(path));
  for (const auto& [key, value] : patch.items()) tokenizer[key] = value;
  if (golden.at("pre") == "llama-bpe") tokenizer["model"]["ignore_merges"] = true;
  return mla::Tokenizer::from_json(tokenizer.dump());
}

class Golden : public testing::TestWithParam<size_t> {};

TEST_P(Golden, SameIdsAsTheTokenizersLibrary) {
  const json& golden = goldens().at("cases").at(GetParam());
  NEED(golden.at("base").get<std::string>());
  SCOPED_TRACE(golden.at("base").dump() + " " + golden.at("pre").dump() + " " + golden.at("patch").dump());
  expect_case(make(golden), golden);
}

TEST_P(Golden, GgufOfTheSameNameSplitsTheSame) {
  const json& golden = goldens().at("cases").at(GetParam());
  const std::string pre = golden.at("pre");
  if (pre.empty()) return;  // only the cases that name a GGUF pre-tokenizer
  // A GGUF has no flags on its added tokens, so both sides get them without.
  json tokenizer = json::parse(read(vocabulary(golden.at("base"))));
  for (const auto& [key, value] : golden.at("patch").items()) tokenizer[key] = value;
  for (json& added : tokenizer["added_tokens"])
    for (const char* key : {"lstrip", "rstrip", "single_word", "normalized"}) added[key] = false;
  if (pre == "llama-bpe") tokenizer["model"]["ignore_merges"] = true;
  const auto ours = mla::Tokenizer::from_json(tokenizer.dump());
  const auto gguf = mla::Tokenizer::from_gguf(as_gguf(tokenizer, pre));
  for (const json& text : goldens().at("strings"))
    for (const bool parse_special : {true, false})
      EXPECT_EQ(ours.encode(text.get<std::string>(), false, parse_special), gguf.encode(text.get<std::string>(), false, parse_special))
          << pre << ": " << text.dump();
}

INSTANTIATE_TEST_SUITE_P(All, Golden, testing::Range<size_t>(0, goldens().at("cases").size()));

class RoundTrip : public testing::TestWithParam<const char*> {};

TEST_P(RoundTrip, EveryStringAndBrokenUtf8Survives) {
  NEED(GetParam());
  const mla::Tokenizer tokenizer = make({{"base", GetParam()}, {"patch", json::object()}, {"pre", ""}});
  const bool composes = std::string_view(GetParam()) == "qwen2";  // NFC changes text
  std::vector<std::string> texts;
  for (const json& text : goldens().at("strings"))
    if (!composes ||
        text.get<std::string>().find_first_of("\xCC\xCD\xE1\xE2\xE3\xE0\xF0\xEF\xD6\xD7\xD8\xD9\xEA\xEB\xEC\xED\xE4") == std::string::npos)
      texts.push_back(text);
  for (const char* broken : {"\xFF", "\x80", "a\xC3", "\xE4\xB8", "\xF0\x9F\x98", "\xED\xA0\x80", "\xC0\xAF", "\xF4\x90\x80\x80",
                             "ok \xFE\xFF ok", "\xC3\xA9\xC3"})
    texts.emplace_back(broken);
  for (const std::string& text : texts) {
    const auto ids = tokenizer.encode(text, false, true);
    // SmolLM2's vocabulary lacks the bytes that UTF-8 never has; they become U+FFFD.
    const bool lacks = std::string_view(GetParam()) == "smollm2" && text.find_first_of("\xC0\xED\xF4\xFE\xFF") != std::string::npos;
    if (!lacks) { EXPECT_EQ(tokenizer.decode(ids), text); }
    std::string streamed;
    mla::TextStream stream(tokenizer);
    for (int32_t id : ids) streamed += stream.push(id);
    EXPECT_EQ(streamed + stream.flush(), tokenizer.decode(ids));
  }
}

INSTANTIATE_TEST_SUITE_P(All, RoundTrip, testing::Values("deepseek", "qwen2", "smollm2"));

}  // namespace
