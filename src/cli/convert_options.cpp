// The options of mla convert.
#include "cli/convert.h"
#include "core/check.h"
#include "io/checkpoint.h"
#include "lowrank/original.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>

namespace mla {
namespace {

// A word of a short list.
template <class Value, size_t n>
Value chosen(const std::string& word, const char* option, const std::array<std::pair<const char*, Value>, n>& words) {
  std::string known;
  for (const auto& [name, value] : words) {
    if (word == name) return value;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", name);
  }
  fail_input("{} is \"{}\"; known are {}", option, word, known);
}

ConvertOptions preset_options(const std::string& preset) {
  ConvertOptions o;
  if (preset == "mla") return o;
  if (preset != "transmla" && preset != "mha2mla") fail_input("--preset is \"{}\"; known are mla, transmla and mha2mla", preset);
  // Published pipelines, as far as a DeepSeek-V2 checkpoint can express them: nothing is refitted. Their own model code has no norm on the
  // latent, so they get the constant channel that makes it harmless; with one calibrated scale they would be far worse.
  o.layer.constant = Constant::one;
  o.layer.metric = false;
  o.layer.value_share = 1;
  o.sequential = false;
  o.refit = Refit::none;
  o.refit_down = false;
  o.fit_passes = 0;
  if (preset == "mha2mla") {
    o.layer.activations = o.layer.balance = false;
    o.layer.fold = false;  // the pair that is chosen keeps its frequency
    o.layer.rotary = Rotary::norm;
  }
  return o;
}

double not_negative(const std::optional<double>& given, const char* option, double usual) {
  if (given && (!(*given >= 0) || !std::isfinite(*given))) fail_input("{} is {}; give 0 or more", option, *given);
  return given.value_or(usual);
}

// The elements of the cache that "68.75%" leaves.
int64_t elements_left(const std::string& cut, int64_t whole) {
  double percent = 0;
  const char* end = cut.data() + cut.size();
  const auto [at, problem] = std::from_chars(cut.data(), end, percent);
  if (problem != std::errc() || (at != end && std::string_view(at) != "%") || !(percent > 0 && percent < 100))
    fail_input("--cut is \"{}\"; give how much of the cache should go, as in 68.75%", cut);
  return std::llround(double(whole) * (1 - percent / 100));
}

// Three quarters of the frequencies, the faster ones, hold what attention tells apart by. The less is left, the more a rotary pair's two
// elements are worth to the latent: fewer pairs then stand for all frequencies of that range (docs/conversion.md).
int64_t rotary_width(int head_dim, int64_t left, int64_t whole) {
  const double rest = double(left) / double(whole);
  const double share = rest >= 0.6 ? 3. / 4 : rest >= 0.4 ? 3. / 8 : rest >= 0.25 ? 1. / 4 : 3. / 16;
  return 2 * std::clamp<int64_t>(std::llround(head_dim * share / 2), 1, std::max<int64_t>(left / 4, 1));  // half of it is the latent's
}

}  // namespace

void skip_refits(ConvertOptions& o) {
  o.sequential = o.refit_down = false;
  o.refit = Refit::none;
  o.fit_passes = 0;
}

void choose_sizes(const ConvertArguments& a, const std::string& cut, const Checkpoint& checkpoint, const Config& c, ConvertOptions& o) {
  const int64_t whole = c.kv_layout().row();
  if (a.rank < 0 || a.rope_dim < 0) fail_input("--kv-lora-rank is {} and --rope-dim {}; both must be positive", a.rank, a.rope_dim);
  if ((a.rank > 0) == !cut.empty())
    fail_input("give either --kv-lora-rank (with --rope-dim) or --cut, the share of the cache that should go");
  const int64_t left = a.rank > 0 ? a.rank + a.rope_dim : elements_left(cut, whole);
  const bool ours = a.preset == "mla";
  int64_t d_R = ours ? rotary_width(c.head_dim, left, whole) : c.head_dim;
  // Theirs have the model's own base, of which every second pair and every fourth is a ladder too.
  if (!ours && 2 * left < whole && c.head_dim % 4 == 0) d_R = c.head_dim / 2;  // the best for TransMLA
  if (a.preset == "mha2mla" && c.head_dim % 8 == 0) d_R = c.head_dim / 4;  // of whole, half and quarter the best at most cuts for MHA2MLA
  o.layer.qk_rope_head_dim = a.rope_dim > 0 ? a.rope_dim : d_R;
  if (ours && a.rope_theta == 0 && o.layer.qk_rope_head_dim < c.head_dim) o.rope_theta = std::pow(c.rope_theta, 0.75);
  o.layer.kv_lora_rank = a.rank > 0 ? a.rank : left - o.layer.qk_rope_head_dim;
  // Biases of queries need a query latent; in one as wide as the queries are, nothing is lost.
  if (o.q_lora_rank == 0 && has_biases(checkpoint))
    o.q_lora_rank = std::min<int64_t>(c.num_attention_heads * (c.head_dim + o.layer.qk_rope_head_dim), c.hidden_size + 1) + 1;
  if (o.layer.kv_lora_rank + o.layer.qk_rope_head_dim >= whole)
    fail_input("{} + {} elements are no less than the {} that the model keeps now; ask for a smaller latent", o.layer.kv_lora_rank,
               o.layer.qk_rope_head_dim, whole);
}

ConvertOptions read_steps(const ConvertArguments& a) {
  ConvertOptions o = preset_options(a.preset);
  LayerOptions& l = o.layer;
  if (!a.method.empty()) {
    const auto method = parse_method(a.method);
    if (!method) fail_input("--method is \"{}\"; known are svd, qr, rsvd and cur", a.method);
    l.method = *method;
  }
  if (!a.constant.empty())
    l.constant =
        chosen(a.constant, "--constant",
               std::array{std::pair("one", Constant::one), std::pair("mean", Constant::mean), std::pair("ls", Constant::least_squares)});
  if (!a.rotary.empty())
    l.rotary = chosen(a.rotary, "--rotary", std::array{std::pair("direction", Rotary::direction), std::pair("norm", Rotary::norm)});
  if (!a.latent_norm.empty())
    l.latent_norm = chosen(a.latent_norm, "--latent-norm",
                           std::array{std::pair("constant", LatentNorm::constant), std::pair("functional", LatentNorm::functional),
                                      std::pair("scale", LatentNorm::scale)});
  if (!a.refit.empty())
    o.refit = chosen(a.refit, "--refit",
                     std::array{std::pair("none", Refit::none), std::pair("layer", Refit::layer), std::pair("drift", Refit::drift)});
  l.activations = l.activations && !a.no_activations;
  l.metric = l.metric && !a.no_metric;
  l.fold = l.fold && !a.no_fold;
  l.balance = l.balance && !a.no_balance;
  if (a.value_share) l.value_share = *a.value_share;
  l.seed = a.seed;
  o.refit_down = o.refit_down && !a.no_down;
  o.sequential = o.sequential && !a.parallel;
  o.window = a.window;
  if (a.window < 2) fail_input("--calibration-window is {}; give 2 or more", a.window);
  if (a.tokens < 1) fail_input("--calibration-tokens is {}; give 1 or more", a.tokens);
  if (a.fit_passes.value_or(0) < 0) fail_input("--fit-passes is {}; give 0 or more", *a.fit_passes);
  o.fit_passes = a.fit_passes.value_or(o.fit_passes);
  o.fit_rate = not_negative(a.fit_rate, "--fit-rate", o.fit_rate);
  o.output_ridge = not_negative(a.output_ridge, "--output-ridge", o.output_ridge);
  o.down_ridge = not_negative(a.down_ridge, "--down-ridge", o.down_ridge);
  o.rope_theta = a.rope_theta;
  o.q_lora_rank = a.query_rank;
  const auto type = parse_dtype(a.type);
  if (!type) fail_input("--type is \"{}\"; give bf16 or f32", a.type);
  o.type = *type;
  return o;
}

}  // namespace mla
