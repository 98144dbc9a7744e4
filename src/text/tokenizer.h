// Text to token ids and back: byte-level BPE (GPT-2 kind) and sentencepiece-style BPE with byte fallback.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace mla {

class Tokenizer {
 public:
  // tokenizer.json's text, and tokenizer_config.json's if there is one (BOS, EOS, chat template).
  static Tokenizer from_json(std::string_view tokenizer_json, std::string_view tokenizer_config_json = {});

  // What a GGUF says, under tokenizer.ggml.*
  struct GgufVocabulary {
    std::string model, pre;  // "gpt2" or "llama"; the pre-tokenizer's name
    std::vector<std::string> tokens, merges;
    std::vector<float> scores;
    std::vector<int32_t> types;
    int32_t bos = -1, eos = -1, unknown = -1;
    std::optional<bool> add_bos, add_eos, add_space_prefix;
    std::string chat_template;
  };
  static Tokenizer from_gguf(GgufVocabulary vocabulary);

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  // add_special: BOS/EOS as the tokenizer asks for. parse_special: control tokens spelled in the text become their ids; without it
  // they are ordinary text. Invalid UTF-8 is encoded byte by byte where the vocabulary can, else as U+FFFD. Thread-safe.
  std::vector<int32_t> encode(std::string_view text, bool add_special, bool parse_special) const;
  // The exact bytes; skip_special leaves control tokens out, and ids without a token (a model's vocabulary may be padded) say nothing.
  std::string decode(std::span<const int32_t> ids, bool skip_special = false) const;

  int32_t vocab_size() const;
  std::string_view token(int32_t id) const;  // its raw spelling
  std::optional<int32_t> find(std::string_view spelling) const;
  int32_t bos() const;  // -1: none
  int32_t eos() const;
  bool adds_bos() const;  // encode(add_special) puts one in front
  bool is_special(int32_t id) const;
  const std::string& chat_template() const;  // the source text, to recognise it by; empty when there is none

  struct State;

 private:
  friend class TextStream;
  explicit Tokenizer(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// Turns ids into text as they come and never splits a UTF-8 character: all that push and flush return is decode of the same ids.
class TextStream {
 public:
  explicit TextStream(const Tokenizer& tokenizer, bool skip_special = false) : tokenizer_(tokenizer), skip_special_(skip_special) {}
  std::string push(int32_t id);  // what is complete now; may be empty
  std::string flush();           // the rest, incomplete bytes as they are; the stream starts anew

 private:
  const Tokenizer& tokenizer_;
  bool skip_special_, started_ = false;
  std::string pending_;
};

}  // namespace mla
