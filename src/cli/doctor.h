// The checks of mla doctor.
#pragma once

#include "cli/session.h"

#include <functional>
#include <string>
#include <vector>

namespace mla {

enum class Verdict : uint8_t { ok, wrong, skipped };

struct Check {
  std::string name;
  Verdict verdict;
  std::string found;  // what was found, and what to do where it is wrong
};

std::string_view name(Verdict verdict);

// Checks of what the files say: shapes, widths, numbers, rotary scaling, routing, tokenizer.
std::vector<Check> check_files(const Checkpoint& checkpoint, const Config& config, const Tokenizer* tokenizer);

// Checks that run the model: chunked = at once, absorbed = expanded, batched = alone, forked = cold.
std::vector<Check> check_model(Session& session, const std::function<void(double fraction)>& progress);

}  // namespace mla
