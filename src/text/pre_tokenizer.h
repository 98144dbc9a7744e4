// What happens to text before BPE: normalizers and pre-tokenizers as one list of small steps that rewrite a piece or cut it up.
#pragma once

#include "text/regex.h"

#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <variant>

namespace mla {

// The words of Llama 3's and of Qwen2's pre-tokenizer.
inline constexpr const char* kLlama3 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
inline constexpr const char* kQwen2 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

struct ComposeStep {};  // NFC

struct ReplaceStep {
  Regex from;
  std::string to;
};

// Puts text in front of a piece: only of the text's first piece, or only where it is not there already, if so asked.
struct PrefixStep {
  std::string text;
  bool first_only = false;
  bool unless_there = true;
};

enum class Behaviour { removed, isolated, merged_with_previous, merged_with_next, contiguous };

struct SplitStep {
  Regex pattern;
  Behaviour behaviour = Behaviour::isolated;
  bool invert = false;  // what does not match is the separator
};

using Step = std::variant<ComposeStep, ReplaceStep, PrefixStep, SplitStep>;

// A stretch of text; `first` when the user's text begins with it.
struct Piece {
  std::string_view text;
  bool first = false;
};

// Sends a piece through all steps, in order, and hands out what is left. The pieces' text lives only during the call.
void run_steps(std::span<const Step> steps, Piece piece, MatchBudget& budget, const std::function<void(Piece)>& sink);

}  // namespace mla
