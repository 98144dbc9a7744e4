// tokenizer.json in the form the tokenizers library writes it: added tokens, pre-tokenizer, BPE's vocabulary and merges.
#include "text/tokenizer_export.h"

#include "text/pre_tokenizer.h"

#include <nlohmann/json.hpp>

namespace mla {
namespace {

using Json = nlohmann::ordered_json;

constexpr int control = 3, user_defined = 4, unknown = 2;  // GGUF's token types

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

// BOS in front of a text, as Llama 3's vocabularies have it if their file does not say otherwise.
Json post_processor(const Tokenizer::GgufVocabulary& v) {
  if (!v.add_bos.value_or(v.pre.starts_with("llama")) || v.bos < 0) return nullptr;
  const std::string& bos = v.tokens.at(size_t(v.bos));
  const auto piece = [](const char* kind, const std::string& id, int type) { return Json{{kind, {{"id", id}, {"type_id", type}}}}; };
  return {{"type", "TemplateProcessing"},
          {"single", Json::array({piece("SpecialToken", bos, 0), piece("Sequence", "A", 0)})},
          {"pair", Json::array({piece("SpecialToken", bos, 0), piece("Sequence", "A", 0), piece("SpecialToken", bos, 1),
                                piece("Sequence", "B", 1)})},
          {"special_tokens", {{bos, {{"id", bos}, {"ids", Json::array({v.bos})}, {"tokens", Json::array({bos})}}}}}};
}

}  // namespace

std::optional<TokenizerFiles> export_tokenizer(const Tokenizer::GgufVocabulary& v) {
  const Json pre = v.model == "gpt2" ? pre_tokenizer(v.pre) : nullptr;
  if (pre.is_null()) return std::nullopt;
  nlohmann::json vocabulary = nlohmann::json::object();  // sorted: an ordered object of this size would be searched from end to end
  for (size_t id = 0; id < v.tokens.size(); ++id) vocabulary[v.tokens[id]] = id;
  const bool composes = v.pre == "qwen2", whole_words = v.pre.starts_with("llama");
  const Json tokenizer{{"version", "1.0"},
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
  const auto text = [](const Json& json) { return json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n"; };
  return TokenizerFiles{text(tokenizer), text(settings(v))};
}

}  // namespace mla
