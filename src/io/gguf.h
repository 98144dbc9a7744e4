// The GGUF container, versions 2 and 3: typed metadata, a list of tensors, then their bytes at aligned offsets.
#pragma once

#include "io/listing.h"

#include <nlohmann/json.hpp>

#include <cstddef>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace mla {

// A metadata array, left where it is in the file; parse_gguf has walked over it, so every element lies inside.
struct GgufArray {
  uint32_t type;  // GGUF's number of the elements' type
  uint64_t count;
  uint64_t begin;  // of the first element, from the start of the file
};

// What a GGUF file says. It looks into the bytes that were parsed, which must outlive it.
struct Gguf {
  std::span<const std::byte> file;
  std::string what;       // the file, for messages
  nlohmann::json values;  // scalars and arrays of at most 1024 elements, flat, by key
  std::map<std::string, GgufArray, std::less<>> arrays;
  std::vector<ListedTensor> tensors;

  // A whole array; empty when absent, Error when its elements are of another kind or do not fit.
  std::vector<std::string> strings(std::string_view key) const;
  std::vector<float> floats(std::string_view key) const;
  std::vector<int32_t> ints(std::string_view key) const;
};

// Raises Error for anything that is damaged, that could not be what a writer meant, or that this program does not read.
Gguf parse_gguf(std::span<const std::byte> file, std::string_view what);

// GGUF's number for a type, as the tensor list and general.file_type use it.
uint32_t gguf_type(DType type);

}  // namespace mla
