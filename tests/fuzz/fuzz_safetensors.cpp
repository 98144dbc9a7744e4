// Any bytes as a safetensors file: read or refused; what is listed lies in the file and is as large as its shape says.
#include "core/check.h"
#include "io/safetensors.h"

#include <cstdint>
#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    for (const mla::ListedTensor& t : mla::parse_safetensors(std::as_bytes(std::span(data, size)), "input")) {
      int64_t count = 1;
      for (int64_t n : t.shape) count *= n;
      if (t.end() > size || (t.dtype && uint64_t(mla::row_bytes(*t.dtype, count)) != t.bytes)) std::abort();
    }
  } catch (const mla::Error&) {}
  return 0;
}
