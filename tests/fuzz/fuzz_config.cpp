// Any bytes as a config.json: read or refused; what was read is sane and survives being written and read again.
#include "core/check.h"
#include "io/json.h"
#include "model/config.h"

#include <cmath>
#include <cstdint>
#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const auto json = mla::parse_json({reinterpret_cast<const char*>(data), size}, "input");
    const mla::Config config = mla::parse_hf_config(json);
    if (config.parameters() <= 0 || config.active_parameters() <= 0 || !std::isfinite(config.softmax_scale())) std::abort();
    mla::to_gguf_metadata(config).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    const auto written = mla::to_hf_config(config);
    if (mla::to_hf_config(mla::parse_hf_config(written)) != written) std::abort();
  } catch (const mla::Error&) {}
  return 0;
}
