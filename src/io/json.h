// JSON from files that may be hostile: no nesting deeper than a cap, no key twice in an object, errors in one sentence.
#pragma once

#include <nlohmann/json.hpp>

#include <string_view>

namespace mla {

constexpr int json_max_depth = 64;

// `what` names the text in messages: a path, or "the header of PATH".
nlohmann::json parse_json(std::string_view text, std::string_view what, int max_depth = json_max_depth);

}  // namespace mla
