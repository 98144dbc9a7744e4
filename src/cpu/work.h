// Splits work over threads so that each walks through its own stretch of memory, and takes from the others when it is done.
#pragma once

#include "core/threads.h"

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace mla {

// Calls task(i, thread) once for each i in [0, n).
template <class Task>
void share_out(Threads& threads, int64_t n, Task&& task) {
  constexpr int most = 64;
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t parts = threads.count();
  if (parts == 1 || parts > most || n <= parts) return threads.parallel(n, task);
  Range range[most];
  for (int64_t p = 0; p < parts; ++p) {
    range[p].next.store(n * p / parts, std::memory_order_relaxed);
    range[p].end = n * (p + 1) / parts;
  }
  threads.parallel(parts, [&](int64_t own, int thread) {
    for (int64_t p = 0; p < parts; ++p) {
      Range& r = range[(own + p) % parts];
      for (int64_t i; (i = r.next.fetch_add(1, std::memory_order_relaxed)) < r.end;) task(i, thread);
    }
  });
}

}  // namespace mla
