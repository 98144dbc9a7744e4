// Any tokenizer.json, then a zero byte and any text: loads or is refused; what loads encodes and decodes, and streams the same.
#include "core/check.h"
#include "text/tokenizer.h"

#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t end = input.find('\0');
  const std::string_view text = end == input.npos ? std::string_view("Hello  w\xC3\xB6rld 12\n") : input.substr(end + 1);
  try {
    const auto tokenizer = mla::Tokenizer::from_json(input.substr(0, end));
    for (const bool parse_special : {false, true}) {
      const auto ids = tokenizer.encode(text, true, parse_special);
      std::string streamed;
      mla::TextStream stream(tokenizer);
      for (int32_t id : ids) streamed += stream.push(id);
      if (streamed + stream.flush() != tokenizer.decode(ids)) std::abort();
      for (int32_t id : ids)
        if (id < 0 || id >= tokenizer.vocab_size()) std::abort();
    }
  } catch (const mla::Error&) {}
  return 0;
}
