// Frequencies and tables of the rotary embedding.
#include "model/rope.h"

#include "core/check.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace mla {
namespace {

// YaRN's length correction of the softmax temperature (arXiv 2309.00071, eq. 22, with DeepSeek's mscale).
double yarn_mscale(double factor, double mscale) { return factor <= 1 ? 1 : 0.1 * mscale * std::log(factor) + 1; }

// YaRN (NTK by parts): pairs that turn more than beta_fast times in the trained context keep their frequency, those that turn less
// than beta_slow times are slowed down by the factor, and a linear ramp over the pair's index joins the two.
void stretch_yarn(std::vector<double>& frequency, const Config& config) {
  const RopeScaling& s = config.rope_scaling;
  const double d = 2.0 * double(frequency.size()), context = double(s.original_max_position_embeddings);
  auto pair_that_turns = [&](double turns) {
    return d * std::log(context / (turns * 2 * std::numbers::pi)) / (2 * std::log(config.rope_theta));
  };
  const double low = std::max(std::floor(pair_that_turns(s.beta_fast)), 0.0);
  double high = std::min(std::ceil(pair_that_turns(s.beta_slow)), d - 1);
  if (low == high) high += 0.001;
  for (size_t i = 0; i < frequency.size(); ++i) {
    const double slowed = std::clamp((double(i) - low) / (high - low), 0.0, 1.0);
    frequency[i] = frequency[i] / s.factor * slowed + frequency[i] * (1 - slowed);
  }
}

// Llama 3.1: by wavelength against the trained context.
void stretch_llama3(std::vector<double>& frequency, const RopeScaling& s) {
  const double context = double(s.original_max_position_embeddings);
  for (double& f : frequency) {
    const double wavelength = 2 * std::numbers::pi / f;
    if (wavelength < context / s.high_freq_factor) continue;
    if (wavelength > context / s.low_freq_factor) {
      f /= s.factor;
    } else {
      const double keep = (context / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
      f = (1 - keep) * f / s.factor + keep * f;
    }
  }
}

}  // namespace

std::vector<double> rope_frequencies(const Config& config, std::span<const float> factors) {
  const int pairs = config.rope_dim() / 2;
  std::vector<double> frequency(static_cast<size_t>(pairs));
  for (int i = 0; i < pairs; ++i) frequency[size_t(i)] = std::pow(config.rope_theta, -double(i) / pairs);
  switch (config.rope_scaling.type) {
    case RopeScaling::Type::none: break;
    case RopeScaling::Type::linear:
      for (double& f : frequency) f /= config.rope_scaling.factor;
      break;
    case RopeScaling::Type::yarn: stretch_yarn(frequency, config); break;
    case RopeScaling::Type::llama3: stretch_llama3(frequency, config.rope_scaling); break;
  }
  if (!factors.empty()) {
    if (factors.size() != frequency.size()) fail_input("the file has {} rotary factors, the model {} pairs", factors.size(), pairs);
    for (size_t i = 0; i < factors.size(); ++i) frequency[i] /= double(factors[i]);
  }
  return frequency;
}

double rope_magnitude(const Config& config) {
  const RopeScaling& s = config.rope_scaling;
  if (s.type != RopeScaling::Type::yarn) return 1;
  if (s.attention_factor > 0) return s.attention_factor;
  if (s.mscale > 0 && s.mscale_all_dim > 0) return yarn_mscale(s.factor, s.mscale) / yarn_mscale(s.factor, s.mscale_all_dim);
  return yarn_mscale(s.factor, 1);
}

void rope_table(std::span<const double> frequencies, double magnitude, std::span<const int32_t> positions, float* cos_sin) {
  for (int32_t position : positions)
    for (double f : frequencies) {
      const double angle = double(position) * f;
      *cos_sin++ = float(std::cos(angle) * magnitude);
      *cos_sin++ = float(std::sin(angle) * magnitude);
    }
}

}  // namespace mla
