// A tensor is a view: a pointer, a type, a shape and strides. Plain data, so that kernels can take it as it is.
#pragma once

#include "core/dtype.h"

#include <cstdint>
#include <initializer_list>
#include <string>

namespace mla {

enum class Place : uint8_t { host, device };

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  Place place = Place::host;
  int rank = 0;
  int64_t shape[4] = {};
  int64_t stride[4] = {};         // in elements; a quantised type is contiguous along its last dimension
  const float* scales = nullptr;  // of fp8 weights: [f8_blocks(rows), f8_blocks(cols)] for each matrix

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  float* f32() const { return static_cast<float*>(data); }

  int64_t count() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
  bool contiguous() const {
    int64_t expected = 1;
    for (int i = rank - 1; i >= 0; --i) {
      if (shape[i] != 1 && stride[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }
};

// A contiguous tensor over memory the caller owns.
inline Tensor view(void* data, DType dtype, std::initializer_list<int64_t> shape, Place place = Place::host) {
  Tensor t;
  t.data = data;
  t.dtype = dtype;
  t.place = place;
  for (int64_t n : shape) t.shape[t.rank++] = n;
  int64_t step = 1;
  for (int i = t.rank - 1; i >= 0; --i) {
    t.stride[i] = step;
    step *= t.shape[i];
  }
  return t;
}

// Elements [from, from + n) of dimension dim, sharing memory. Plain (unquantised) types only.
inline Tensor slice(Tensor t, int dim, int64_t from, int64_t n) {
  t.data = static_cast<char*>(t.data) + from * t.stride[dim] * info(t.dtype).block_bytes;
  t.shape[dim] = n;
  return t;
}

std::string describe(const Tensor& t);  // "f32 [3, 64]", for messages

}  // namespace mla
