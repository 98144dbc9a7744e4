// Stores one block of normal random rows again and again: which values a cache holds does not change how long it takes to read.
#include "cli/filled.h"

#include "core/check.h"
#include "core/random.h"

#include <algorithm>

namespace mla {

bool fill_random(LatentCache& cache, int sequence, int64_t n, Device& device) {
  const int64_t from = cache.length(sequence), row = cache.format().layout.row();
  if (!cache.grow(sequence, n)) return false;
  constexpr int64_t block = 4 * LatentCache::page_tokens;
  std::vector<float> rows(size_t(std::min(block, n) * row));
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = float(random_normal(1, i % 65521));
  const Buffer block_rows(rows.size() * sizeof(float), device.memory());
  device.memory().upload(rows.data(), block_rows.data(), block_rows.bytes());
  std::vector<int64_t> slots;
  for (int64_t at = 0; at < n; at += block) {
    const int64_t m = std::min(block, n - at);
    slots.clear();
    for (int64_t i = 0; i < m; ++i) slots.push_back(cache.slot(sequence, from + at + i));
    for (int l = 0; l < cache.layers(); ++l)
      device.store(view(block_rows.data(), DType::f32, {m, row}, device.memory().place()), slots, cache.layer(l));
  }
  return true;
}

double median(std::vector<double> values) {
  CHECK(!values.empty(), "a median of nothing");
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

}  // namespace mla
