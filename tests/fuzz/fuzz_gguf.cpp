// Any bytes as a GGUF file: read or refused; then every array is read as every type, and every tensor decoded.
#include "core/check.h"
#include "core/quant.h"
#include "io/gguf.h"

#include <cstdint>
#include <cstdlib>

namespace {

// Whether this reading of an array is allowed; if so it must be whole.
template <class Read>
int readable(uint64_t count, Read read) {
  try {
    if (read().size() != count) std::abort();
    return 1;
  } catch (const mla::Error&) { return 0; }
}

void read_arrays(const mla::Gguf& gguf) {
  for (const auto& entry : gguf.arrays) {
    const std::string& key = entry.first;
    const uint64_t count = entry.second.count;
    const int readings = readable(count, [&] { return gguf.strings(key); }) + readable(count, [&] { return gguf.floats(key); }) +
                         readable(count, [&] { return gguf.ints(key); });
    if (readings > 1) std::abort();  // one type, one reading
  }
}

void decode_tensors(const mla::Gguf& gguf) {
  for (const mla::ListedTensor& t : gguf.tensors) {
    if (t.end() > gguf.file.size()) std::abort();
    if (!t.dtype || !mla::is_quantised(*t.dtype)) continue;
    const mla::DTypeInfo type = mla::info(*t.dtype);
    float values[256];
    for (uint64_t at = 0; at < t.bytes; at += uint64_t(type.block_bytes))
      mla::dequantise(*t.dtype, gguf.file.data() + t.begin + at, values, type.block);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const mla::Gguf gguf = mla::parse_gguf(std::as_bytes(std::span(data, size)), "input");
    gguf.values.dump();
    read_arrays(gguf);
    decode_tensors(gguf);
  } catch (const mla::Error&) {}
  return 0;
}
