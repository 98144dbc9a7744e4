// The safetensors container: a JSON header of names, types, shapes and byte ranges, then the bytes.
#pragma once

#include "io/listing.h"

#include <cstddef>
#include <span>
#include <string_view>

namespace mla {

// Lists the tensors of a whole file in the order of their bytes. `what` names the file in messages. Raises Error for anything the format
// forbids: a header over 100 MB, ranges that differ from shape × type, that overlap, leave holes or leave the file.
std::vector<ListedTensor> parse_safetensors(std::span<const std::byte> file, std::string_view what);

}  // namespace mla
