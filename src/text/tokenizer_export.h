// A GGUF's tokenizer as the files of a Hugging Face folder.
#pragma once

#include "text/tokenizer.h"

#include <string>

namespace mla {

struct TokenizerFiles {
  std::string tokenizer, tokenizer_config;  // tokenizer.json, tokenizer_config.json
};

// Byte-level BPE with a pre-tokenizer of GPT-2, SmolLM, Llama 3 or Qwen2; nothing for other vocabularies.
std::optional<TokenizerFiles> export_tokenizer(const Tokenizer::GgufVocabulary& gguf);

}  // namespace mla
