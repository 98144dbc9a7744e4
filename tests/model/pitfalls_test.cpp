// Mistakes that other implementations of these models have shipped, one test each. Those about cutting, batching and sharing sequences
// and about the two forms of attention are in invariance_test.cpp; those about tokens are with the tokenizers.
#include "model/make.h"
#include "model/rope.h"

#include "golden.h"

#include "core/check.h"

#include <nlohmann/json.hpp>

namespace mla::test {
namespace {

// DeepSeek-V2's published configuration, as far as rotary embedding and attention go.
Config deepseek_v2(double mscale = 0.707, double mscale_all_dim = 0.707) {
  Config c;
  c.family = Family::deepseek_v2;
  c.qk_nope_head_dim = 128, c.qk_rope_head_dim = 64, c.v_head_dim = 128, c.kv_lora_rank = 512;
  c.rope_scaling.type = RopeScaling::Type::yarn;
  c.rope_scaling.factor = 40;
  c.rope_scaling.original_max_position_embeddings = 4096;
  c.rope_scaling.mscale = mscale, c.rope_scaling.mscale_all_dim = mscale_all_dim;
  return c;
}

nlohmann::json config_of(const Golden& golden) {
  std::ifstream file(golden.folder / "config.json");
  return nlohmann::json::parse(file);
}

// The golden folder with another config.json.
std::filesystem::path with_config(const Golden& golden, const nlohmann::json& config, const Scratch& scratch) {
  const std::filesystem::path folder = scratch / "changed";
  std::filesystem::remove_all(folder);
  std::filesystem::copy(golden.folder, folder);
  std::ofstream(folder / "config.json") << config;
  return folder;
}

std::vector<float> route_weights(const std::vector<float>& logits, const RouterConfig& config, std::vector<int32_t>* experts = nullptr) {
  std::vector<int32_t> expert(size_t(config.top_k));
  std::vector<float> weight(size_t(config.top_k)), scores = logits;
  cpu().route(view(scores.data(), DType::f32, {1, config.experts}), config,
              {view(expert.data(), DType::i32, {1, config.top_k}), view(weight.data(), DType::f32, {1, config.top_k})});
  if (experts) *experts = expert;
  return weight;
}

// RoPE rows are stored interleaved in DeepSeek's checkpoints, as halves in Hugging Face's other families.
TEST(Pitfalls, RotaryPairsAreInterleavedInDeepSeekAndHalvesElsewhere) {
  EXPECT_TRUE(read_config(Checkpoint::open(read_golden("dsv2-q-group").folder)).rope_interleaved);
  EXPECT_FALSE(read_config(Checkpoint::open(read_golden("llama3").folder)).rope_interleaved);
  std::vector<float> x = {1, 2, 3, 4}, y = x;
  const float quarter_turn_of_the_first_pair[] = {0, 1, 1, 0};
  std::vector<float> turn(std::begin(quarter_turn_of_the_first_pair), std::end(quarter_turn_of_the_first_pair));
  const Tensor cos_sin = view(turn.data(), DType::f32, {1, 2, 2});
  cpu().rope(view(x.data(), DType::f32, {1, 1, 4}), cos_sin, true);
  EXPECT_EQ(x, (std::vector<float>{-2, 1, 3, 4}));
  cpu().rope(view(y.data(), DType::f32, {1, 1, 4}), cos_sin, false);
  EXPECT_EQ(y, (std::vector<float>{-3, 2, 1, 4}));
}

// A wrong pairing or frequency hides at small positions.
TEST(Pitfalls, PositionsPast4096) {
  for (const char* name : {"dsv2-noq-greedy", "dsv2-q-group", "dsv2-mscale"}) {
    const Golden golden = read_golden(name);
    Model model = load(golden.folder);
    const auto far = size_t(std::lower_bound(golden.rows.begin(), golden.rows.end(), 4096) - golden.rows.begin());
    ASSERT_GE(golden.rows.size() - far, 4u);
    const std::vector<int32_t> rows(golden.rows.begin() + int64_t(far), golden.rows.end());
    const std::vector<float> wanted(golden.logits.begin() + int64_t(far) * golden.vocab(), golden.logits.end());
    EXPECT_LE(difference(run(model, golden.ids, rows, {.chunk = 1024}), wanted).max, 1e-3) << name;
  }
}

// Angles at large positions: the frequency must be more precise than f32, or positions near 160K are off by a hundredth of a turn.
TEST(Pitfalls, AnglesStayPreciseAtLargePositions) {
  const std::vector<double> frequency = rope_frequencies(deepseek_v2(), {});
  const int32_t position[] = {163839};
  std::vector<float> cos_sin(frequency.size() * 2);
  rope_table(frequency, 1, position, cos_sin.data());
  EXPECT_NEAR(cos_sin[0], std::cos(163839.0L), 1e-6);
  EXPECT_NEAR(cos_sin[1], std::sin(163839.0L), 1e-6);
}

TEST(Pitfalls, YarnMultipliesTheRotationByTheRatioOfItsMscales) {
  EXPECT_DOUBLE_EQ(rope_magnitude(deepseek_v2()), 1);
  const double ln = std::log(40.0);
  EXPECT_NEAR(rope_magnitude(deepseek_v2(1, 0.5)), (0.1 * ln + 1) / (0.05 * ln + 1), 1e-12);
}

TEST(Pitfalls, YarnMultipliesTheSoftmaxScale) {
  EXPECT_NEAR(deepseek_v2().softmax_scale(), 0.114721, 5e-7);
  EXPECT_NEAR(deepseek_v2(1, 0).softmax_scale(), 1 / std::sqrt(192.0), 1e-12);
}

// Position 0 attends to itself alone: no scale shows there, and the next row is already wrong without it.
TEST(Pitfalls, PositionZeroHidesTheSoftmaxScale) {
  const Golden golden = read_golden("dsv2-noq-greedy").first(16);
  nlohmann::json config = config_of(golden);
  config["rope_scaling"]["mscale"] = config["rope_scaling"]["mscale_all_dim"] = 1e-9;
  const Scratch scratch;
  Model model = load(with_config(golden, config, scratch));
  const std::vector<float> got = run(model, golden);
  const auto vocab = golden.vocab();
  const std::vector<float> first(golden.logits.begin(), golden.logits.begin() + vocab);
  EXPECT_LE(difference({got.begin(), got.begin() + vocab}, first).max, 1e-4);
  EXPECT_GE(difference(got, golden.logits).max, 2e-2);
}

// Softmax over all experts, then the choice: the weights of the chosen do not sum to 1.
TEST(Pitfalls, GateTakesSoftmaxBeforeTopK) {
  const std::vector<float> logits = {1, 3, 2, 0};
  std::vector<int32_t> experts;
  const auto weight = route_weights(logits, {.experts = 4, .top_k = 2}, &experts);
  const double sum = std::exp(1) + std::exp(3) + std::exp(2) + 1;
  EXPECT_EQ(experts, (std::vector<int32_t>{1, 2}));
  EXPECT_NEAR(weight[0], std::exp(3) / sum, 1e-6);
  EXPECT_NEAR(weight[1], std::exp(2) / sum, 1e-6);
}

TEST(Pitfalls, GateIsF32) {
  const std::vector<float> logits = {10.0f, 10.0001f, 9.9999f, 10.0002f};  // one value in bf16 and in f16
  std::vector<int32_t> experts;
  route_weights(logits, {.experts = 4, .top_k = 2}, &experts);
  EXPECT_EQ(experts, (std::vector<int32_t>{3, 1}));
}

// DeepSeek-V2 ranks groups by their best expert, V3 by the sum of the best two.
TEST(Pitfalls, GroupScoreIsTheMaximum) {
  const std::vector<float> logits = {5, 0, 0, 4.5, 4.5, 4.5};
  std::vector<int32_t> experts;
  const RouterConfig config{
      .gating = Gating::group_limited_greedy, .experts = 6, .top_k = 2, .groups = 2, .top_groups = 1, .renormalise = false, .scale = 1};
  const auto weight = route_weights(logits, config, &experts);
  EXPECT_EQ(experts, (std::vector<int32_t>{0, 1}));
  EXPECT_NEAR(weight[0], std::exp(5) / (std::exp(5) + 2 + 3 * std::exp(4.5)), 1e-6);  // softmax over all groups
}

TEST(Pitfalls, ScalingFactorOnlyWithoutRenormalisation) {
  const std::vector<float> logits = {1, 3, 2, 0};
  RouterConfig config{.experts = 4, .top_k = 2, .groups = 1, .top_groups = 1, .renormalise = true, .scale = 16};
  const auto renormalised = route_weights(logits, config);
  EXPECT_NEAR(renormalised[0] + renormalised[1], 1, 1e-6);
  config.renormalise = false;
  const auto scaled = route_weights(logits, config);
  config.scale = 1;
  const auto plain = route_weights(logits, config);
  EXPECT_NEAR(scaled[0], 16 * plain[0], 1e-5);
  EXPECT_NEAR(scaled[1], 16 * plain[1], 1e-5);
}

// kv_a_layernorm: over the latent alone, the rotary key stays as it is.
TEST(Pitfalls, LatentNormLeavesTheRotaryKeyAlone) {
  const Golden golden = read_golden("dsv2-q-greedy").first(8);
  Model model = load(golden.folder);
  const int64_t d_c = model.config().kv_lora_rank, d_R = model.config().qk_rope_head_dim;
  std::vector<float> rows;
  model.dump = [&](const std::string& name, const Tensor& value) {
    if (name == "layers.0.attn.latent") rows.assign(value.f32(), value.f32() + value.count());
  };
  run(model, golden);
  ASSERT_EQ(int64_t(rows.size()), 8 * (d_c + d_R));
  // In this model the latent is 500 times smaller than the rotary key before the norm: a norm over both would leave nothing of it.
  double latent = 0, rotary = 0;
  for (size_t i = 0; i < rows.size(); ++i) (int64_t(i) % (d_c + d_R) < d_c ? latent : rotary) += double(rows[i]) * rows[i];
  EXPECT_GT(latent / double(8 * d_c), 0.3);
  EXPECT_GT(rotary / double(8 * d_R), 0.3);
}

// The latent norms' epsilon is 1e-6 whatever rms_norm_eps says (1e-5 in these goldens). dsv2-q-greedy has latents so small that it shows.
TEST(Pitfalls, LatentNormEpsilonIsItsOwn) {
  const Golden golden = read_golden("dsv2-q-greedy");
  Model model = load(golden.folder);
  EXPECT_FLOAT_EQ(float(model.config().rms_norm_eps), 1e-5f);
  EXPECT_FLOAT_EQ(float(model.config().latent_norm_eps), 1e-6f);
  EXPECT_LE(difference(run(model, golden), golden.logits).max, 1e-3);
}

// 1408 and 10944 are multiples of 32 and not of 256; a width may be neither. Every type must load and mean the same weights.
TEST(Pitfalls, WidthsNeedNotBeMultiplesOfABlock) {
  Config config = parse_hf_config(config_of(read_golden("dsv2-noq-greedy")));
  config.hidden_size = 320, config.moe_intermediate_size = 352, config.intermediate_size = 416, config.num_hidden_layers = 2;
  config.n_routed_experts = 4, config.num_experts_per_tok = 2;
  const Scratch scratch;
  const std::vector<int32_t> ids = {5, 17, 80, 3, 3, 121, 44, 9}, rows = {0, 3, 7};
  for (const int width : {352, 72}) {
    config.moe_intermediate_size = width;
    for (const DType type : {DType::q4_0, DType::q8_0, DType::bf16}) {
      const auto name = fmt::format("{}-{}", info(type).name, width);
      make_random(config, scratch / (name + ".gguf"), type, 7, cpu().threads());
      const Checkpoint quantised = Checkpoint::open(scratch / (name + ".gguf"));
      export_hf(quantised, scratch / name, DType::f32, cpu().threads());
      Model model(quantised, cpu()), wide = load(scratch / name);
      EXPECT_LE(difference(run(model, ids, rows), run(wide, ids, rows)).rms, 2e-2) << name;
    }
  }
}

// Keys and values beyond f16's range, sums beyond it: bf16 keeps them, and products are accumulated in f32.
TEST(Pitfalls, SumsLeaveTheRangeOfF16) {
  constexpr int d = 64, rows = 3;
  const KvLayout layout = KvLayout::mqa(d);
  struct Case {
    DType type;
    float key, value;
  };
  for (const auto& [type, key, value] : {Case{DType::bf16, 1e5f, 1e36f}, Case{DType::f32, 1e5f, 1e36f}, Case{DType::f16, 6e4f, 6e4f}}) {
    const KvFormat format{layout, type};
    std::vector<std::byte> memory(size_t(format.row_bytes() * rows));
    const Kv kv{format, memory.data(), format.row_bytes() * rows, rows};
    std::vector<float> stored(size_t(rows * 2 * d), key), q(d, key), o(d);
    for (int r = 0; r < rows; ++r) std::fill_n(stored.begin() + r * 2 * d + d, d, value);
    const int64_t slots[] = {0, 1, 2};
    cpu().store(view(stored.data(), DType::f32, {rows, 2 * d}), slots, kv);
    float lse = 0;
    const int32_t page = 0;
    const Span span{0, 1, rows - 1, 0, rows, &page};
    cpu().attend(view(q.data(), DType::f32, {1, 1, d}), kv, Spans(&span, 1), {}, 1e-9f, view(o.data(), DType::f32, {1, 1, d}),
                 view(&lse, DType::f32, {1, 1}));
    for (const float x : o) EXPECT_NEAR(x / value, 1, 1e-2) << info(type).name;
    EXPECT_NEAR(lse, std::log(3.0) + 1e-9 * double(key) * key * d, 5) << info(type).name;
    EXPECT_TRUE(std::isfinite(lse));
  }
}

// Llama's rows in a GGUF are permuted to interleaved pairs, Qwen's are not.
TEST(Pitfalls, GgufPermutesLlamaAndNotQwen) {
  const Scratch scratch;
  for (const char* name : {"llama3", "qwen2"}) {
    const Golden golden = read_golden(name).first(300);
    const auto path = scratch / (std::string(name) + ".gguf");
    quantize_model(Checkpoint::open(golden.folder), path, DType::f32, cpu().threads());
    Model model = load(path);
    EXPECT_EQ(model.config().rope_interleaved, name == std::string("llama3"));
    EXPECT_LE(difference(run(model, golden), golden.logits).max, 1e-3) << name;
  }
}

}  // namespace
}  // namespace mla::test
