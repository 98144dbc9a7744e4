// How configurations are read from and written to each format; config.h offers the sum of it.
#pragma once

#include "model/config.h"

namespace mla {

// Raises Error for sizes that make no sense, naming the field and its value.
void check_config(const Config& config);

Config parse_gguf_config(const Checkpoint& checkpoint);

}  // namespace mla
