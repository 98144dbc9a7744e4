// Counter-based random numbers: the n-th draw of a seed is the same on every machine and for any number of threads.
#pragma once

#include <cmath>
#include <cstdint>

namespace mla {

// SplitMix64's finaliser over (seed, counter).
inline uint64_t random_bits(uint64_t seed, uint64_t counter) {
  uint64_t z = seed * 0xd1342543de82ef95ull + (counter + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// Uniform in [0, 1) with 53 bits.
inline double random_uniform(uint64_t seed, uint64_t counter) { return double(random_bits(seed, counter) >> 11) * 0x1p-53; }

// Standard normal (Box-Muller; one of the pair).
inline double random_normal(uint64_t seed, uint64_t counter) {
  double u = 1.0 - random_uniform(seed, 2 * counter), v = random_uniform(seed, 2 * counter + 1);
  return std::sqrt(-2.0 * std::log(u)) * std::cos(6.283185307179586 * v);
}

}  // namespace mla
