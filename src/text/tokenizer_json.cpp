// Tokenizers out of tokenizer.json: its normalizer, pre-tokenizer, model, post-processor and decoder, read as general as BPE models need.
#include "core/check.h"
#include "text/state.h"
#include "text/unicode.h"

#include <nlohmann/json.hpp>

#include <algorithm>

namespace mla {

namespace {

using nlohmann::json;

constexpr int kDeepest = 64;       // nesting of JSON
constexpr size_t kMostSteps = 64;  // of normalizer and pre-tokenizer each
constexpr const char* kGpt2 = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

void check_depth(std::string_view text, const char* file) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); i++) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') i++;
      in_string = c != '"';
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > kDeepest) fail_input("{} nests deeper than {} levels at byte {}", file, kDeepest, i);
    } else if (c == ']' || c == '}') {
      depth--;
    }
  }
}

json parse(std::string_view text, const char* file) {
  check_depth(text, file);
  json value;
  try {
    value = json::parse(text);
  } catch (const json::exception& error) { fail_input("{} is not valid JSON: {}", file, error.what()); }
  if (!value.is_object()) fail_input("{} should hold a JSON object, not {}", file, value.type_name());
  return value;
}

// Typed access; a key that is not there, or null, is as if absent.
const json* get(const json& object, const char* key) {
  if (!object.is_object()) return nullptr;
  const auto at = object.find(key);
  return at == object.end() || at->is_null() ? nullptr : &*at;
}

[[noreturn]] void wrong_type(const char* key, const char* wanted, const json& value) {
  fail_input("\"{}\" in the tokenizer's JSON should be {}, not {}", key, wanted, value.type_name());
}

bool flag(const json& object, const char* key, bool absent) {
  const json* value = get(object, key);
  if (value && !value->is_boolean()) wrong_type(key, "true or false", *value);
  return value ? value->get<bool>() : absent;
}

const std::string& text(const json& object, const char* key) {
  static const std::string none;
  const json* value = get(object, key);
  if (value && !value->is_string()) wrong_type(key, "a string", *value);
  return value ? value->get_ref<const std::string&>() : none;
}

const std::vector<json>& list(const json& object, const char* key) {
  static const std::vector<json> none;
  const json* value = get(object, key);
  if (value && !value->is_array()) wrong_type(key, "an array", *value);
  return value ? value->get_ref<const std::vector<json>&>() : none;
}

int64_t integer(const json& value, const char* what) {
  if (!value.is_number_integer() || (value.is_number_unsigned() && value.get<uint64_t>() > uint64_t(INT64_MAX)))
    wrong_type(what, "an integer", value);
  return value.get<int64_t>();
}

[[noreturn]] void unsupported(const char* what, std::string_view type, std::string_view known) {
  fail_input("the {} \"{}\" of this tokenizer.json is not supported; supported are {}", what, type, known);
}

Regex pattern(const json& object) {
  const json* value = get(object, "pattern");
  if (const json* source = value ? get(*value, "Regex") : nullptr; source && source->is_string()) return Regex(source->get<std::string>());
  if (const json* source = value ? get(*value, "String") : nullptr; source && source->is_string())
    return Regex::literal(source->get<std::string>());
  fail_input("\"pattern\" in the tokenizer's JSON should be {{\"Regex\": ...}} or {{\"String\": ...}}");
}

Behaviour behaviour(const std::string& name) {
  if (name == "Isolated") return Behaviour::isolated;
  if (name == "Removed") return Behaviour::removed;
  if (name == "MergedWithPrevious") return Behaviour::merged_with_previous;
  if (name == "MergedWithNext") return Behaviour::merged_with_next;
  if (name == "Contiguous") return Behaviour::contiguous;
  unsupported("split behavior", name, "Isolated, Removed, MergedWithPrevious, MergedWithNext, Contiguous");
}

// Reads normalizer and pre-tokenizer.
class StepReader {
 public:
  explicit StepReader(Tokenizer::State& state) : state_(state) {}

  void normalizer(const json& object) {
    const std::string& type = text(object, "type");
    std::vector<Step>& steps = state_.normalizer;
    check_count(steps);
    if (type == "Sequence") {
      for (const json& part : list(object, "normalizers")) normalizer(part);
    } else if (type == "NFC") {
      steps.push_back(ComposeStep{});
    } else if (type == "Prepend") {
      steps.push_back(PrefixStep{.text = text(object, "prepend"), .unless_there = false});
    } else if (type == "Replace") {
      steps.push_back(ReplaceStep{pattern(object), text(object, "content")});
    } else {
      unsupported("normalizer", type, "Sequence, NFC, Prepend, Replace");
    }
  }

  void pre_tokenizer(const json& object) {
    const std::string& type = text(object, "type");
    std::vector<Step>& steps = state_.pre_tokenizer;
    check_count(steps);
    if (state_.byte_level) fail_input("a pre-tokenizer of type \"{}\" after ByteLevel is not supported; ByteLevel should come last", type);
    if (type == "Sequence") {
      for (const json& part : list(object, "pretokenizers")) pre_tokenizer(part);
    } else if (type == "Split") {
      steps.push_back(SplitStep{pattern(object), behaviour(text(object, "behavior")), flag(object, "invert", false)});
    } else if (type == "Digits") {
      const bool each = flag(object, "individual_digits", false);
      steps.push_back(SplitStep{Regex(R"(\p{N})"), each ? Behaviour::isolated : Behaviour::contiguous});
    } else if (type == "ByteLevel") {
      state_.byte_level = true;
      if (flag(object, "add_prefix_space", true)) steps.push_back(PrefixStep{.text = " "});
      if (flag(object, "use_regex", true)) steps.push_back(SplitStep{Regex(kGpt2)});
    } else if (type == "Metaspace") {
      metaspace(object, steps);
    } else {
      unsupported("pre-tokenizer", type, "Sequence, Split, Digits, ByteLevel, Metaspace");
    }
  }

 private:
  static void check_count(const std::vector<Step>& steps) {
    if (steps.size() >= kMostSteps) fail_input("this tokenizer.json has more than {} normalizers or pre-tokenizers", kMostSteps);
  }

  static void metaspace(const json& object, std::vector<Step>& steps) {
    const std::string replacement = get(object, "replacement") ? text(object, "replacement") : std::string(kMetaspace);
    std::string scheme = text(object, "prepend_scheme");
    if (scheme.empty()) scheme = flag(object, "add_prefix_space", true) ? "always" : "never";
    if (scheme != "always" && scheme != "first" && scheme != "never") unsupported("prepend_scheme", scheme, "always, first, never");
    steps.push_back(ReplaceStep{Regex::literal(" "), replacement});
    if (scheme != "never") steps.push_back(PrefixStep{.text = replacement, .first_only = scheme == "first"});
    if (flag(object, "split", true)) steps.push_back(SplitStep{Regex::literal(replacement), Behaviour::merged_with_next});
  }

  Tokenizer::State& state_;
};

// Reads the decoder: what each token stands for in text, and the spaces that go from the front.
class DecoderReader {
 public:
  explicit DecoderReader(Tokenizer::State& state) : state_(state) {}

  void read(const json* object, const std::vector<AddedToken>& added) {
    if (object) step(*object);
    MatchBudget budget(size_t(1) << 24);
    state_.bytes.assign(state_.spellings.begin(), state_.spellings.end());
    for (std::string& bytes : state_.bytes) apply(bytes, budget);
    // With a byte alphabet added tokens stand for themselves, even those whose spelling happens to be of the alphabet.
    if (byte_level_)
      for (const AddedToken& token : added) state_.bytes[size_t(token.id)] = token.spelling;
  }

 private:
  void step(const json& object) {
    const std::string& type = text(object, "type");
    if (type == "Sequence") {
      for (const json& part : list(object, "decoders")) step(part);
    } else if (type == "ByteLevel") {
      byte_level_ = true;
    } else if (type == "ByteFallback") {
      byte_fallback_ = true;
    } else if (type == "Fuse") {
      fused_ = true;
    } else if (type == "Replace") {
      if (fused_) fail_input("a Replace decoder after Fuse is not supported in tokenizer.json");
      replacements_.push_back({pattern(object), text(object, "content")});
    } else if (type == "Strip") {
      strip(object);
    } else if (type == "Metaspace") {
      const std::string replacement = get(object, "replacement") ? text(object, "replacement") : std::string(kMetaspace);
      replacements_.push_back({Regex::literal(replacement), " "});
      const bool prepends =
          get(object, "prepend_scheme") ? text(object, "prepend_scheme") != "never" : flag(object, "add_prefix_space", true);
      if (prepends) state_.strip = 1;
    } else {
      unsupported("decoder", type, "Sequence, ByteLevel, ByteFallback, Fuse, Replace, Strip, Metaspace");
    }
  }

  void strip(const json& object) {
    const json *start = get(object, "start"), *stop = get(object, "stop");
    const int64_t from_front = start ? integer(*start, "start") : 0, from_back = stop ? integer(*stop, "stop") : 0;
    if (!fused_ || text(object, "content") != " " || from_front < 0 || from_back != 0)
      fail_input("a Strip decoder is supported only after Fuse, for spaces, and at the start of the text");
    state_.strip = size_t(from_front);
  }

  void apply(std::string& bytes, MatchBudget& budget) const {
    for (const ReplaceStep& replacement : replacements_) {
      std::string out;
      replacement.from.split(bytes, budget, [&](size_t begin, size_t end, bool matched) {
        out += matched ? std::string_view(replacement.to) : std::string_view(bytes).substr(begin, end - begin);
      });
      bytes = std::move(out);
    }
    if (byte_fallback_)
      if (const auto byte = byte_of_fallback(bytes)) bytes = *byte;
    if (byte_level_) bytes = bytes_of_alphabet(bytes).value_or(bytes);
  }

  Tokenizer::State& state_;
  std::vector<ReplaceStep> replacements_;
  bool byte_level_ = false, byte_fallback_ = false, fused_ = false;
};

void read_vocabulary(Tokenizer::State& state, const json& model) {
  const json* vocab = get(model, "vocab");
  if (!vocab || !vocab->is_object() || vocab->empty()) fail_input("tokenizer.json has no \"vocab\" object in its model");
  for (const auto& [spelling, id] : vocab->items()) state.set(integer(id, "vocab"), spelling);
}

std::vector<AddedToken> read_added(Tokenizer::State& state, const json& root) {
  std::vector<AddedToken> added;
  for (const json& entry : list(root, "added_tokens")) {
    const json* id = get(entry, "id");
    if (!id) fail_input("an added token in tokenizer.json has no \"id\"");
    AddedToken token;
    token.spelling = text(entry, "content");
    if (token.spelling.empty()) continue;
    const int64_t at = integer(*id, "id");
    const bool taken = at >= 0 && at < int64_t(state.spellings.size()) && !state.spellings[size_t(at)].empty();
    if (taken && state.spellings[size_t(at)] != token.spelling)
      fail_input("added token \"{}\" has the id {} of the token \"{}\"", token.spelling, at, state.spellings[size_t(at)]);
    state.set(at, token.spelling);
    token.id = int32_t(at);
    token.special = flag(entry, "special", false);
    token.normalized = flag(entry, "normalized", !token.special);
    token.single_word = flag(entry, "single_word", false);
    token.left_strip = flag(entry, "lstrip", false);
    token.right_strip = flag(entry, "rstrip", false);
    added.push_back(std::move(token));
  }
  // Of the same spelling a special one comes first.
  std::stable_partition(added.begin(), added.end(), [](const AddedToken& token) { return token.special; });
  return added;
}

void read_symbols(Tokenizer::State& state, const json& model) {
  const bool fallback = flag(model, "byte_fallback", false), whole = flag(model, "ignore_merges", false);
  for (const auto& [spelling, value] : model.at("vocab").items()) {
    const auto id = int32_t(value.get<int64_t>());
    if (state.byte_level) {
      const auto bytes = bytes_of_alphabet(spelling);
      if (!bytes) continue;
      if (bytes->size() == 1) state.byte_ids[static_cast<unsigned char>((*bytes)[0])] = id;
      if (bytes->size() > 1 && whole) state.words.emplace(*bytes, id);
      continue;
    }
    if (const auto byte = fallback ? byte_of_fallback(spelling) : std::nullopt) state.byte_ids[static_cast<unsigned char>(*byte)] = id;
    if (!spelling.empty() && utf8_length(spelling) == spelling.size()) state.symbols.emplace(spelling, id);
    if (whole) state.words.emplace(spelling, id);
  }
  state.has_metaspace = state.symbols.contains(std::string(kMetaspace));
  state.unknown = state.find(text(model, "unk_token")).value_or(-1);
  state.fuse_unknown = flag(model, "fuse_unk", false);
}

void read_merges(Tokenizer::State& state, const json& model) {
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
    if (!text(model, key).empty()) fail_input("tokenizer.json's model has a \"{}\", which is not supported", key);
  const std::vector<json>& merges = list(model, "merges");
  state.merges = Bpe(merges.size());
  for (size_t rank = 0; rank < merges.size(); rank++) {
    const json& merge = merges[rank];
    const bool pair = merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string();
    if (pair)
      state.add_merge(merge[0].get_ref<const std::string&>(), merge[1].get_ref<const std::string&>(), int32_t(rank));
    else if (merge.is_string())
      state.add_merge(merge.get_ref<const std::string&>(), int32_t(rank));
    else
      fail_input("merge {} in tokenizer.json is neither \"left right\" nor [\"left\", \"right\"]", rank);
  }
}

int32_t token_id(const Tokenizer::State& state, const std::string& spelling, const char* where) {
  const auto id = state.find(spelling);
  if (!id) fail_input("{} names the token \"{}\", which is not in the vocabulary", where, spelling);
  return *id;
}

// What TemplateProcessing puts before and behind a single text.
void read_post_processor(Tokenizer::State& state, const json& object) {
  const std::string& type = text(object, "type");
  if (type == "Sequence") {
    for (const json& part : list(object, "processors")) read_post_processor(state, part);
  } else if (type == "TemplateProcessing") {
    bool behind = false;
    state.front.clear();
    state.back.clear();
    for (const json& part : list(object, "single")) {
      const json* special = get(part, "SpecialToken");
      if (special)
        (behind ? state.back : state.front).push_back(token_id(state, text(*special, "id"), "the post-processor"));
      else
        behind = true;
    }
  } else if (type != "ByteLevel") {
    unsupported("post-processor", type, "Sequence, TemplateProcessing, ByteLevel");
  }
}

// A token of tokenizer_config.json: a string or an object with "content".
std::string token_of(const json& config, const char* key) {
  const json* value = get(config, key);
  return !value ? "" : value->is_object() ? text(*value, "content") : text(config, key);
}

std::string template_of(const json& config) {
  const json* value = get(config, "chat_template");
  if (!value) return {};
  if (value->is_string()) return value->get<std::string>();
  for (const json& entry : list(config, "chat_template"))  // several by name
    if (text(entry, "name") == "default") return text(entry, "template");
  return {};
}

void read_config(Tokenizer::State& state, const json& config) {
  const auto id_of = [&](const char* key) { return state.find(token_of(config, key)).value_or(-1); };
  if (get(config, "bos_token")) state.bos = id_of("bos_token");
  if (get(config, "eos_token")) state.eos = id_of("eos_token");
  // Said outright, these two win over the post-processor.
  if (get(config, "add_bos_token")) {
    state.front.clear();
    if (flag(config, "add_bos_token", false) && state.bos >= 0) state.front = {state.bos};
  }
  if (get(config, "add_eos_token")) {
    state.back.clear();
    if (flag(config, "add_eos_token", false) && state.eos >= 0) state.back = {state.eos};
  }
  state.chat_template = template_of(config);
}

}  // namespace

Tokenizer Tokenizer::from_json(std::string_view tokenizer_json, std::string_view tokenizer_config_json) {
  const json root = parse(tokenizer_json, "tokenizer.json");
  const json* model = get(root, "model");
  if (!model || !model->is_object()) fail_input("tokenizer.json has no \"model\" object");
  const std::string& type = text(*model, "type");
  if (type != "BPE" && !(type.empty() && get(*model, "merges"))) unsupported("model", type, "BPE");

  auto state = std::make_unique<State>();
  read_vocabulary(*state, *model);
  std::vector<AddedToken> added = read_added(*state, root);
  state->index_spellings();
  StepReader steps(*state);
  if (const json* object = get(root, "normalizer")) steps.normalizer(*object);
  if (const json* object = get(root, "pre_tokenizer")) steps.pre_tokenizer(*object);
  read_symbols(*state, *model);
  read_merges(*state, *model);
  DecoderReader(*state).read(get(root, "decoder"), added);
  state->set_added(std::move(added));
  if (const json* object = get(root, "post_processor")) read_post_processor(*state, *object);
  if (!state->front.empty() && state->special[size_t(state->front[0])]) state->bos = state->front[0];
  if (!tokenizer_config_json.empty()) read_config(*state, parse(tokenizer_config_json, "tokenizer_config.json"));
  return Tokenizer(std::move(state));
}

}  // namespace mla
