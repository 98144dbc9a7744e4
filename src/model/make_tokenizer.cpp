// tokenizer.json as the keys llama.cpp reads: tokens, their types, merges or scores, and the name of the pre-tokenizer.
#include "model/make_tokenizer.h"

#include "core/check.h"
#include "io/checkpoint.h"
#include "io/json.h"

#include <algorithm>
#include <array>
#include <optional>

namespace mla {
namespace {

using nlohmann::json;

enum Type { normal = 1, unknown = 2, control = 3, user_defined = 4, unused = 5, byte = 6 };

std::string utf8(uint32_t c) {
  if (c < 0x80) return {char(c)};
  return {char(0xc0 | c >> 6), char(0x80 | (c & 63))};
}

// GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 onwards.
std::string byte_letter(int wanted) {
  uint32_t next = 0x100;
  for (int b = 0;; ++b) {
    const bool printable = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
    if (b == wanted) return utf8(printable ? uint32_t(b) : next);
    if (!printable) ++next;
  }
}

std::string placeholder(int64_t id) { return fmt::format("<unused_{}>", id); }

struct Vocabulary {
  std::vector<std::string> tokens;
  std::vector<int> types;

  void resize(int64_t n) {
    for (int64_t id = int64_t(tokens.size()); id < n; ++id) tokens.push_back(placeholder(id)), types.push_back(unused);
  }
  void set(int64_t id, const std::string& spelling, Type type) { tokens[size_t(id)] = spelling, types[size_t(id)] = type; }
};

const json* find(const json& object, const char* key) {
  if (!object.is_object()) return nullptr;
  const auto it = object.find(key);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

bool is_true(const json& object, const char* key) {
  const json* value = find(object, key);
  return value && value->is_boolean() && value->get<bool>();
}

std::string string_at(const json& object, const char* key) {
  const json* value = find(object, key);
  return value && value->is_string() ? value->get<std::string>() : "";
}

// Each pre-tokenizer that llama.cpp knows, recognised by what only its text has.
std::string pre_tokenizer_name(const json& tokenizer) {
  const json* pre = find(tokenizer, "pre_tokenizer");
  const std::string text = pre ? pre->dump() : "";
  auto has = [&](const char* what) { return text.find(what) != text.npos; };
  if (has("一-龥ࠀ-一가-퟿")) return has("µÀ-Ö") ? "deepseek-llm" : "deepseek-coder";
  if (has("一-龥぀-ゟ゠-ヿ")) return "deepseek-v3";
  if (has("(?i:'s|'t|'re|'ve|'m|'ll|'d)")) return has("\\\\p{N}{1,3}") ? "llama-bpe" : "qwen2";
  if (has("\"use_regex\":true")) return has("\"individual_digits\":true") ? "smollm" : "gpt-2";
  fail_input("tokenizer.json: its pre-tokenizer has no name in GGUF; known are those of DeepSeek, Llama 3, Qwen2, SmolLM and GPT-2");
}

int64_t checked_id(const json& id, int64_t vocab_size, const std::string& spelling) {
  if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= vocab_size)
    fail_input("tokenizer.json: token '{}' has the id {}, outside the model's vocabulary of {}", spelling, id.dump().substr(0, 20),
               vocab_size);
  return id.get<int64_t>();
}

json merges_of(const json& model) {
  json merges = json::array();
  const json* list = find(model, "merges");
  if (!list || !list->is_array()) return merges;
  for (const json& m : *list) {
    if (m.is_string())
      merges.push_back(m);
    else if (m.is_array() && m.size() == 2 && m[0].is_string() && m[1].is_string())
      merges.push_back(m[0].get<std::string>() + " " + m[1].get<std::string>());
    else
      fail_input("tokenizer.json: a merge must be a string or a pair of strings, not {}", m.dump().substr(0, 60));
  }
  return merges;
}

// Sentencepiece's BPE is stored as scores: minus the rank of the merge that makes a token.
std::vector<double> scores_of(const Vocabulary& vocabulary, const json& merges) {
  std::vector<std::pair<std::string, size_t>> made;
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    std::string whole = merges[rank].get<std::string>();
    if (const size_t gap = whole.find(' '); gap != whole.npos) whole.erase(gap, 1);
    made.emplace_back(std::move(whole), rank);
  }
  std::sort(made.begin(), made.end());
  std::vector<double> scores;
  for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
    const auto it = std::lower_bound(made.begin(), made.end(), std::pair(vocabulary.tokens[id], size_t(0)));
    const bool found = it != made.end() && it->first == vocabulary.tokens[id];
    scores.push_back(vocabulary.types[id] != normal ? 0.0 : found ? -double(it->second) : -1e6 - double(id));
  }
  return scores;
}

std::optional<int64_t> id_of(const Vocabulary& vocabulary, const json& token) {
  const std::string spelling = token.is_string() ? token.get<std::string>() : string_at(token, "content");
  if (spelling.empty()) return std::nullopt;
  const auto it = std::find(vocabulary.tokens.begin(), vocabulary.tokens.end(), spelling);
  if (it == vocabulary.tokens.end()) return std::nullopt;
  return it - vocabulary.tokens.begin();
}

// Chat templates may come as a list of named ones.
std::string chat_template_of(const json& config) {
  const json* value = find(config, "chat_template");
  if (!value) return "";
  if (value->is_string()) return value->get<std::string>();
  if (value->is_array())
    for (const json& entry : *value)
      if (string_at(entry, "name") == "default") return string_at(entry, "template");
  return "";
}

Vocabulary vocabulary_of(const json& tokenizer, const json& model, int64_t vocab_size, bool byte_fallback) {
  const json* vocab = find(model, "vocab");
  if (!vocab || !vocab->is_object()) fail_input("tokenizer.json: model.vocab must be an object of tokens and ids");
  Vocabulary out;
  out.resize(vocab_size);
  const std::string unknown_token = string_at(model, "unk_token");
  for (const auto& [spelling, id] : vocab->items()) {
    const bool is_byte = byte_fallback && spelling.size() == 6 && spelling.starts_with("<0x");
    out.set(checked_id(id, vocab_size, spelling), spelling, is_byte ? byte : spelling == unknown_token ? unknown : normal);
  }
  if (const json* added = find(tokenizer, "added_tokens"); added && added->is_array())
    for (const json& token : *added) {
      const std::string spelling = string_at(token, "content");
      const json* id = find(token, "id");
      if (spelling.empty() || !id) fail_input("tokenizer.json: an added token lacks its content or id");
      const bool is_unknown = byte_fallback && spelling == unknown_token;
      out.set(checked_id(*id, vocab_size, spelling), spelling, is_unknown ? unknown : is_true(token, "special") ? control : user_defined);
    }
  return out;
}

void translate(const json& tokenizer, const json& tokenizer_config, const Config& config, json& m) {
  const json* model = find(tokenizer, "model");
  if (!model || string_at(*model, "type") != "BPE") fail_input("tokenizer.json: only BPE models can be written to GGUF");
  const bool sentencepiece = is_true(*model, "byte_fallback");
  const Vocabulary vocabulary = vocabulary_of(tokenizer, *model, config.vocab_size, sentencepiece);
  const json merges = merges_of(*model);
  m["tokenizer.ggml.model"] = sentencepiece ? "llama" : "gpt2";
  m["tokenizer.ggml.tokens"] = vocabulary.tokens;
  m["tokenizer.ggml.token_type"] = vocabulary.types;
  if (sentencepiece) {
    m["tokenizer.ggml.pre"] = "default";
    m["tokenizer.ggml.scores"] = scores_of(vocabulary, merges);
    const json* normalizer = find(tokenizer, "normalizer");
    m["tokenizer.ggml.add_space_prefix"] = normalizer && normalizer->dump().find("\"Prepend\"") != std::string::npos;
  } else {
    m["tokenizer.ggml.pre"] = pre_tokenizer_name(tokenizer);
    m["tokenizer.ggml.merges"] = merges;
  }
  constexpr std::array<std::pair<const char*, const char*>, 4> named{
      {{"bos_token", "bos_token_id"}, {"eos_token", "eos_token_id"}, {"unk_token", "unknown_token_id"}, {"pad_token", "padding_token_id"}}};
  for (const auto& [token, key] : named)
    if (const json* value = find(tokenizer_config, token))
      if (const auto id = id_of(vocabulary, *value)) m[std::string("tokenizer.ggml.") + key] = *id;
  for (const char* key : {"add_bos_token", "add_eos_token"})
    if (find(tokenizer_config, key)) m[std::string("tokenizer.ggml.") + key] = is_true(tokenizer_config, key);
  if (const std::string text = chat_template_of(tokenizer_config); !text.empty()) m["tokenizer.chat_template"] = text;
}

void copy_gguf(const Checkpoint& checkpoint, const Config& config, json& m) {
  for (const auto& [key, value] : checkpoint.metadata().items())
    if (key.starts_with("tokenizer.")) m[key] = value;
  std::vector<std::string> tokens = checkpoint.strings("tokenizer.ggml.tokens");
  std::vector<int32_t> types = checkpoint.ints("tokenizer.ggml.token_type");
  std::vector<float> scores = checkpoint.floats("tokenizer.ggml.scores");
  const int64_t n = std::max<int64_t>(config.vocab_size, int64_t(tokens.size()));
  types.resize(tokens.size(), normal);
  for (int64_t id = int64_t(tokens.size()); id < n; ++id) tokens.push_back(placeholder(id)), types.push_back(unused);
  m["tokenizer.ggml.tokens"] = std::move(tokens);
  m["tokenizer.ggml.token_type"] = std::move(types);
  if (!scores.empty()) scores.resize(size_t(n), 0), m["tokenizer.ggml.scores"] = scores;
  m["tokenizer.ggml.merges"] = checkpoint.strings("tokenizer.ggml.merges");
}

}  // namespace

bool carry_tokenizer(const Checkpoint& checkpoint, const Config& config, json& metadata, std::vector<std::string>& notes) {
  if (checkpoint.format() == Format::gguf) {
    if (checkpoint.metadata().contains("tokenizer.ggml.model")) return copy_gguf(checkpoint, config, metadata), true;
  } else if (const auto text = checkpoint.text("tokenizer.json")) {
    const json tokenizer_config = parse_json(checkpoint.tokenizer_config(), "tokenizer_config.json");
    translate(parse_json(*text, "tokenizer.json"), tokenizer_config, config, metadata);
    return true;
  }
  notes.emplace_back("the model has no tokenizer; a stand-in of single bytes was written, so that the file loads");
  return false;
}

void stand_in_tokenizer(const Config& config, json& m) {
  const int64_t n = config.vocab_size;
  auto inside = [&](int64_t id, int64_t otherwise) { return id >= 0 && id < n ? id : std::max<int64_t>(otherwise, 0); };
  const int64_t bos = inside(config.bos_token_id, n - 2);
  const int64_t eos = inside(config.eos_token_ids.empty() ? -1 : config.eos_token_ids[0], n - 1);
  Vocabulary v;
  v.resize(n);
  int next = 0;
  for (int64_t id = 0; id < n && next < 256; ++id)
    if (id != bos && id != eos) v.set(id, byte_letter(next++), normal);
  v.set(bos, "<|bos|>", control);
  v.set(eos, bos == eos ? "<|bos|>" : "<|eos|>", control);
  m["tokenizer.ggml.model"] = "gpt2";
  m["tokenizer.ggml.pre"] = "gpt-2";
  m["tokenizer.ggml.tokens"] = v.tokens;
  m["tokenizer.ggml.token_type"] = v.types;
  m["tokenizer.ggml.merges"] = json::array();
  m["tokenizer.ggml.bos_token_id"] = bos;
  m["tokenizer.ggml.eos_token_id"] = eos;
  m["tokenizer.ggml.add_bos_token"] = false;
}

}  // namespace mla
