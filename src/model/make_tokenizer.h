// The tokenizer's part of a GGUF's metadata: carried over from another GGUF, translated from tokenizer.json, or made up.
#pragma once

#include "model/config.h"

#include <nlohmann/json_fwd.hpp>

#include <string>
#include <vector>

namespace mla {

// Adds the tokenizer.* keys of a checkpoint with a tokenizer; false, and a note, when it has none. The token list is filled up to the
// model's vocabulary.
bool carry_tokenizer(const Checkpoint& checkpoint, const Config& config, nlohmann::json& metadata, std::vector<std::string>& notes);

// A vocabulary for models without one: a token for each byte, then placeholders. llama.cpp loads no model without.
void stand_in_tokenizer(const Config& config, nlohmann::json& metadata);

}  // namespace mla
