// tokenizer.json in the form the tokenizers library writes it: added tokens, pre-tokenizer, BPE's vocabulary and merges.
#include "text/tokenizer_export.h"

#include "text/pre_tokenizer.h"
#include "text/state.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <string_view>
#include <unordered_set>

namespace mla {
namespace {

using Json = nlohmann::ordered_json;

Json byte_level(bool use_regex) {
  return {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", use_regex}};
}

Json split(const char* pattern) {
  return {{"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"}, {"invert", false}};
}

// Null for those that are not known here.
Json pre_tokenizer(std::string_view name) {
  const auto sequence = [](Json first, Json second) {
    return Json{{"type", "Sequence"}, {"pretokenizers", Json::array({std::move(first), std::move(second)})}};
  };
  if (name == "gpt-2") return byte_level(true);
  if (name == "smollm" || name == "starcoder") return sequence({{"type", "Digits"}, {"individual_digits", true}}, byte_level(true));
  if (name == "llama-bpe" || name == "llama3" || name == "llama-v3") return sequence(split(kLlama3), byte_level(false));
  if (name == "qwen2") return sequence(split(kQwen2), byte_level(false));
  return nullptr;
}

Json added_tokens(const Tokenizer::GgufVocabulary& v) {
  Json added = Json::array();
  for (size_t id = 0; id < v.types.size(); ++id) {
    const int type = v.types[id];
    if ((type != control && type != user_defined && type != unknown) || v.tokens[id].empty()) continue;
    added.push_back({{"id", id},
                     {"content", v.tokens[id]},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", type != user_defined}});
  }
  return added;
}

Json settings(const Tokenizer::GgufVocabulary& v) {
  Json out{{"tokenizer_class", "PreTrainedTokenizerFast"}, {"clean_up_tokenization_spaces", false}};
  const auto name = [&](const char* key, int32_t id) {
    if (id >= 0 && size_t(id) < v.tokens.size()) out[key] = v.tokens[size_t(id)];
  };
  name("bos_token", v.bos), name("eos_token", v.eos), name("unk_token", v.unknown);
  if (!v.chat_template.empty()) out["chat_template"] = v.chat_template;
  return out;
}

// BOS in front of a text, as Llama's vocabularies have it if their file does not say otherwise.
Json post_processor(const Tokenizer::GgufVocabulary& v) {
  if (!v.add_bos.value_or(v.model == "llama" || v.pre.starts_with("llama")) || v.bos < 0) return nullptr;
  const std::string& bos = v.tokens.at(size_t(v.bos));
  const auto piece = [](const char* kind, const std::string& id, int type) { return Json{{kind, {{"id", id}, {"type_id", type}}}}; };
  return {{"type", "TemplateProcessing"},
          {"single", Json::array({piece("SpecialToken", bos, 0), piece("Sequence", "A", 0)})},
          {"pair", Json::array({piece("SpecialToken", bos, 0), piece("Sequence", "A", 0), piece("SpecialToken", bos, 1),
                                piece("Sequence", "B", 1)})},
          {"special_tokens", {{bos, {{"id", bos}, {"ids", Json::array({v.bos})}, {"tokens", Json::array({bos})}}}}}};
}

// Every way to halve a token into two others is a merge; the token with the higher score goes first.
Json sentencepiece_merges(const Tokenizer::GgufVocabulary& v) {
  constexpr size_t longest = 256;  // no trainer makes longer ones; halving them every way would take long
  std::unordered_set<std::string_view> known;
  std::vector<size_t> order;
  for (size_t id = 0; id < v.tokens.size(); ++id)
    if (v.types[id] == normal || v.types[id] == user_defined) known.insert(v.tokens[id]), order.push_back(id);
  std::ranges::stable_sort(order, [&](size_t a, size_t b) { return v.scores[a] > v.scores[b]; });
  Json merges = Json::array();
  for (size_t id : order) {
    const std::string_view whole = v.tokens[id];
    for (size_t cut = 1; cut < whole.size() && whole.size() <= longest; ++cut) {
      const auto left = whole.substr(0, cut), right = whole.substr(cut);
      const bool between_characters = (static_cast<unsigned char>(whole[cut]) & 0xC0) != 0x80;
      if (between_characters && known.contains(left) && known.contains(right)) merges.push_back({left, right});
    }
  }
  return merges;
}

// Spaces are spelled ▁, and one goes before a text unless the file says otherwise.
void add_sentencepiece(const Tokenizer::GgufVocabulary& v, Json& tokenizer) {
  const bool prefix = v.add_space_prefix.value_or(true);
  const Json to_mark{{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "▁"}};
  const Json to_space{{"type", "Replace"}, {"pattern", {{"String", "▁"}}}, {"content", " "}};
  Json normalizers = Json::array(), decoders = Json::array({to_space, {{"type", "ByteFallback"}}, {{"type", "Fuse"}}});
  if (prefix) {
    normalizers.push_back({{"type", "Prepend"}, {"prepend", "▁"}});
    decoders.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
  }
  normalizers.push_back(to_mark);
  tokenizer["normalizer"] = {{"type", "Sequence"}, {"normalizers", normalizers}};
  tokenizer["decoder"] = {{"type", "Sequence"}, {"decoders", decoders}};
  Json& model = tokenizer["model"];
  if (v.unknown >= 0) model["unk_token"] = v.tokens.at(size_t(v.unknown));
  model["fuse_unk"] = model["byte_fallback"] = true;
  model["merges"] = sentencepiece_merges(v);
}

}  // namespace

std::optional<TokenizerFiles> export_tokenizer(const Tokenizer::GgufVocabulary& v) {
  const Json pre = v.model == "gpt2" ? pre_tokenizer(v.pre) : nullptr;
  const bool sentencepiece = v.model == "llama" && v.scores.size() == v.tokens.size() && v.types.size() == v.tokens.size();
  if (pre.is_null() && !sentencepiece) return std::nullopt;
  nlohmann::json vocabulary = nlohmann::json::object();  // sorted: an ordered object of this size would be searched from end to end
  for (size_t id = 0; id < v.tokens.size(); ++id) vocabulary[v.tokens[id]] = id;
  const bool composes = v.pre == "qwen2", whole_words = v.pre.starts_with("llama");
  Json tokenizer{{"version", "1.0"},
                 {"truncation", nullptr},
                 {"padding", nullptr},
                 {"added_tokens", added_tokens(v)},
                 {"normalizer", composes ? Json{{"type", "NFC"}} : Json()},
                 {"pre_tokenizer", pre},
                 {"post_processor", post_processor(v)},
                 {"decoder", byte_level(true)},
                 {"model",
                  {{"type", "BPE"},
                   {"dropout", nullptr},
                   {"unk_token", nullptr},
                   {"continuing_subword_prefix", nullptr},
                   {"end_of_word_suffix", nullptr},
                   {"fuse_unk", false},
                   {"byte_fallback", false},
                   {"ignore_merges", whole_words},
                   {"vocab", std::move(vocabulary)},
                   {"merges", v.merges}}}};
  if (sentencepiece) add_sentencepiece(v, tokenizer);
  const auto text = [](const Json& json) { return json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n"; };
  return TokenizerFiles{text(tokenizer), text(settings(v))};
}

}  // namespace mla
