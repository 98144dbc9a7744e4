// Rotary position embedding: the angle of each pair at each position, with the stretchings that checkpoints ask for.
#pragma once

#include "model/config.h"

#include <span>
#include <vector>

namespace mla {

// Radians per position for each of the d/2 pairs: theta^(-2i/d), stretched as config.rope_scaling says. `factors` divide them one by
// one where a file brings its own (GGUF's rope_freqs); empty: none.
std::vector<double> rope_frequencies(const Config& config, std::span<const float> factors = {});

// What cos and sin are multiplied by: YaRN's mscale(factor, mscale) / mscale(factor, mscale_all_dim); 1 without YaRN.
double rope_magnitude(const Config& config);

// cos_sin [n, d/2, 2] of the positions. Angles are formed in double: at position 100,000 a float angle is off by 0.004.
void rope_table(std::span<const double> frequencies, double magnitude, std::span<const int32_t> positions, float* cos_sin);

}  // namespace mla
