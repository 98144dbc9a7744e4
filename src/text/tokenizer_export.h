// A GGUF's tokenizer as the files of a Hugging Face folder.
#pragma once

#include "text/tokenizer.h"

#include <string>

namespace mla {

struct TokenizerFiles {
  std::string tokenizer, tokenizer_config;  // tokenizer.json, tokenizer_config.json
};

// Byte-level BPE with a pre-tokenizer of GPT-2, SmolLM, Llama 3 or Qwen2, and sentencepiece's BPE; nothing for other vocabularies. Of
// sentencepiece's tokens with equal scores, tokenizer.json has the one with the lower id first, and not the one further to the left.
std::optional<TokenizerFiles> export_tokenizer(const Tokenizer::GgufVocabulary& gguf);

}  // namespace mla
