// Everything a leaf compiles, and the table it makes of it.
#pragma once

#include "cpu/kernels.h"
#include "cpu/linear_kernels.h"
#include "cpu/pointwise_kernels.h"
#include "cpu/probe_kernels.h"
#include "cpu/simd.h"
#if defined(__AMX_BF16__)
#include "cpu/linear_amx_kernels.h"
#endif
#if __has_include("cpu/attention_kernels.h")
#include "cpu/attention_kernels.h"
#endif

namespace mla {
namespace {

constexpr Kernels make_kernels(const char* name) {
  Kernels k{};
  k.name = name;
  add_linear(k);
#if defined(__AMX_BF16__)
  add_linear_amx(k);
#endif
  add_pointwise(k);
  add_probe(k);
#if __has_include("cpu/attention_kernels.h")
  k.attention = attention_kernels();
#endif
  return k;
}

}  // namespace
}  // namespace mla
