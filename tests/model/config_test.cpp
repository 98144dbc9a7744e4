// Configurations: published shapes in both HF styles, what follows from them, the way through GGUF's keys, and files that make no sense.
#include "model/config.h"

#include "core/check.h"
#include "core/threads.h"
#include "io/checkpoint.h"
#include "model/make.h"

#include <gtest/gtest.h>
#include <unistd.h>
#include <nlohmann/json.hpp>

#include <cmath>
#include <fstream>

namespace mla::test {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

json published(const std::string& name) {
  std::ifstream in(fs::path(MLA_TEST_DATA) / "../../bench/configs" / (name + ".json"));
  return json::parse(in);
}

json tiny_llama() {
  return {{"model_type", "llama"},  {"vocab_size", 64},         {"hidden_size", 32},        {"intermediate_size", 48},
          {"num_hidden_layers", 2}, {"num_attention_heads", 4}, {"num_key_value_heads", 2}, {"rope_theta", 500000.0}};
}

void expect_refused(const json& config, std::string_view part) {
  try {
    parse_hf_config(config);
    ADD_FAILURE() << "accepted: " << config.dump();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::input);
    EXPECT_NE(std::string_view(error.what()).find(part), std::string_view::npos) << error.what();
  }
}

json with(json config, const std::string& key, const json& value) {
  config[key] = value;
  return config;
}

TEST(Config, ParametersOfPublishedModels) {
  const Config lite = parse_hf_config(published("v2-lite")), v2 = parse_hf_config(published("v2"));
  EXPECT_NEAR(double(lite.parameters()), 15.7e9, 0.05e9);
  EXPECT_NEAR(double(lite.active_parameters()), 2.4e9, 0.1e9);
  EXPECT_NEAR(double(v2.parameters()), 236e9, 1e9);
  EXPECT_NEAR(double(v2.active_parameters()), 21e9, 1e9);
  EXPECT_EQ(parse_hf_config(published("smollm2-135m")).parameters(), 134515008);
  EXPECT_EQ(parse_hf_config(published("llama-3.1-8b")).parameters(), 8030261248);
  EXPECT_NEAR(double(parse_hf_config(published("mistral-7b")).parameters()), 7.24e9, 0.01e9);
}

// Position 0 hides this bug: the factor is in the softmax scale, not in the rotation.
TEST(Config, SoftmaxScaleHoldsYarnsMscaleSquared) {
  Config c = parse_hf_config(published("v2-lite"));
  EXPECT_NEAR(c.softmax_scale(), 0.114721, 5e-7);
  c.rope_scaling.mscale = 1;  // only mscale_all_dim counts here
  EXPECT_NEAR(c.softmax_scale(), 0.114721, 5e-7);
  c.rope_scaling.mscale_all_dim = 0;
  EXPECT_NEAR(c.softmax_scale(), std::pow(192.0, -0.5), 1e-12);
}

TEST(Config, RouterTakesWhatTheFileSays) {
  const RouterConfig r = parse_hf_config(published("v2")).router();
  EXPECT_EQ(r.gating, Gating::group_limited_greedy);
  EXPECT_EQ(r.experts, 160);
  EXPECT_EQ(r.top_k, 6);
  EXPECT_EQ(r.groups, 8);
  EXPECT_EQ(r.top_groups, 3);
  EXPECT_FALSE(r.renormalise);
  EXPECT_EQ(r.scale, 16.0f);
}

TEST(Config, LatentNormKeepsItsOwnEpsilon) {
  const Config c = parse_hf_config(with(published("v2-lite"), "rms_norm_eps", 1e-5));
  EXPECT_EQ(c.rms_norm_eps, 1e-5);
  EXPECT_EQ(c.latent_norm_eps, 1e-6);
}

TEST(Config, BothStylesSayTheSame) {
  const json classic = published("v2-lite");
  json modern = classic;
  modern.erase("rope_theta");
  modern.erase("rope_scaling");
  modern.erase("torch_dtype");
  modern["dtype"] = "bfloat16";
  modern["rope_parameters"] = classic["rope_scaling"];
  modern["rope_parameters"].erase("type");
  modern["rope_parameters"]["rope_type"] = "yarn";
  modern["rope_parameters"]["rope_theta"] = 10000;
  EXPECT_EQ(to_hf_config(parse_hf_config(classic)), to_hf_config(parse_hf_config(modern)));

  json plain = tiny_llama();
  plain.erase("rope_theta");
  plain["rope_parameters"] = {{"rope_theta", 500000.0}, {"rope_type", "default"}};
  EXPECT_EQ(to_hf_config(parse_hf_config(plain)), to_hf_config(parse_hf_config(tiny_llama())));
}

TEST(Config, WritesWhatItReads) {
  for (const char* name : {"v2-lite", "v2", "llama-3.1-8b", "smollm2-135m", "qwen2-0.5b", "mistral-7b"}) {
    const json source = published(name), written = to_hf_config(parse_hf_config(source));
    EXPECT_EQ(to_hf_config(parse_hf_config(written)), written) << name;
    for (const auto& [key, value] : source.items()) {
      if (written.contains(key) && key != "rope_scaling" && key != "sliding_window") {
        EXPECT_EQ(written[key], value) << name << " " << key;
      }
    }
  }
}

TEST(Config, SlidingWindowsFollowTheFamily) {
  EXPECT_EQ(parse_hf_config(published("mistral-7b")).sliding_window, 4096);
  EXPECT_EQ(parse_hf_config(with(published("mistral-7b"), "sliding_window", nullptr)).sliding_window, 0);
  EXPECT_EQ(parse_hf_config(published("qwen2-0.5b")).sliding_window, 0);  // use_sliding_window false
  EXPECT_EQ(parse_hf_config(with(tiny_llama(), "sliding_window", 5)).sliding_window, 0);
  expect_refused(with(published("qwen2-0.5b"), "use_sliding_window", true), "max_window_layers");
}

TEST(Config, RotaryRowsArePairsOnlyInDeepseek) {
  EXPECT_TRUE(parse_hf_config(published("v2")).rope_interleaved);
  for (const char* name : {"llama-3.1-8b", "qwen2-0.5b", "mistral-7b"})
    EXPECT_FALSE(parse_hf_config(published(name)).rope_interleaved) << name;
}

TEST(Config, DefaultsAreThoseOfTransformers) {
  const Config c = parse_hf_config(tiny_llama());
  EXPECT_EQ(c.head_dim, 8);
  EXPECT_EQ(c.rms_norm_eps, 1e-6);
  EXPECT_FALSE(c.attention_bias);
  EXPECT_EQ(c.rope_scaling.type, RopeScaling::Type::none);
  json qwen = tiny_llama();
  qwen["model_type"] = "qwen2";
  EXPECT_TRUE(parse_hf_config(qwen).attention_bias);
  const json mha = [] {
    json j = tiny_llama();
    j.erase("num_key_value_heads");
    return j;
  }();
  EXPECT_EQ(parse_hf_config(mha).num_key_value_heads, 4);
}

TEST(Config, EndTokensMayBeOneOrMany) {
  EXPECT_EQ(parse_hf_config(with(tiny_llama(), "eos_token_id", 7)).eos_token_ids, std::vector<int32_t>({7}));
  EXPECT_EQ(parse_hf_config(with(tiny_llama(), "eos_token_id", {7, 9})).eos_token_ids, std::vector<int32_t>({7, 9}));
  EXPECT_TRUE(parse_hf_config(with(tiny_llama(), "eos_token_id", nullptr)).eos_token_ids.empty());
  expect_refused(with(tiny_llama(), "eos_token_id", "x"), "eos_token_id");
}

TEST(Config, RefusesWhatItDoesNotKnow) {
  expect_refused(json::array(), "object");
  expect_refused(with(tiny_llama(), "model_type", "gemma"), "deepseek_v2, llama, mistral or qwen2");
  expect_refused(with(tiny_llama(), "model_type", 3), "model_type");
  expect_refused(with(tiny_llama(), "hidden_act", "gelu"), "gelu");
  expect_refused(with(tiny_llama(), "rope_scaling", {{"type", "dynamic"}}), "default, linear, yarn and llama3");
  expect_refused(with(tiny_llama(), "rope_scaling", 3), "rope_scaling");
  expect_refused(with(published("v2"), "topk_method", "noaux_tc"), "greedy and group_limited_greedy");
  expect_refused(with(published("v2"), "scoring_func", "sigmoid"), "sigmoid");
}

TEST(Config, RefusesSizesWithoutSense) {
  for (const char* key : {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}) {
    for (const json& value : {json(0), json(-5), json(int64_t(1) << 60), json("12"), json(1.5), json(nullptr), json(UINT64_MAX)})
      expect_refused(with(tiny_llama(), key, value), key);
  }
  expect_refused(with(tiny_llama(), "num_key_value_heads", 3), "multiple");
  expect_refused(with(tiny_llama(), "head_dim", 7), "odd");
  expect_refused(with(tiny_llama(), "rms_norm_eps", -1), "rms_norm_eps");
  expect_refused(with(tiny_llama(), "rope_theta", 0), "rope_theta");
  expect_refused(with(published("v2"), "num_experts_per_tok", 200), "num_experts_per_tok");
  expect_refused(with(published("v2"), "n_group", 7), "n_group");
  expect_refused(with(published("v2"), "topk_group", 9), "topk_group");
  expect_refused(with(with(published("v2"), "moe_intermediate_size", 1 << 24), "hidden_size", 1 << 20), "too many");
  expect_refused(with(published("v2"), "kv_lora_rank", 0), "kv_lora_rank");
  expect_refused(with(published("v2"), "qk_rope_head_dim", -64), "qk_rope_head_dim");
  expect_refused(with(tiny_llama(), "rope_scaling", {{"type", "linear"}, {"factor", 0}}), "factor");
}

// A random file of each family comes back with the same configuration.
TEST(Config, ComesBackFromGguf) {
  const json mla = {{"model_type", "deepseek_v2"},
                    {"vocab_size", 300},
                    {"hidden_size", 64},
                    {"intermediate_size", 96},
                    {"num_hidden_layers", 2},
                    {"num_attention_heads", 2},
                    {"kv_lora_rank", 32},
                    {"qk_nope_head_dim", 32},
                    {"qk_rope_head_dim", 16},
                    {"v_head_dim", 32},
                    {"q_lora_rank", 32},
                    {"n_routed_experts", 8},
                    {"n_shared_experts", 1},
                    {"num_experts_per_tok", 3},
                    {"moe_intermediate_size", 32},
                    {"first_k_dense_replace", 1},
                    {"topk_method", "group_limited_greedy"},
                    {"n_group", 4},
                    {"topk_group", 2},
                    {"routed_scaling_factor", 4.0},
                    {"eos_token_id", 3},
                    {"bos_token_id", 2},
                    {"rope_scaling",
                     {{"type", "yarn"},
                      {"factor", 40},
                      {"original_max_position_embeddings", 4096},
                      {"mscale", 0.8},
                      {"mscale_all_dim", 0.707},
                      {"beta_fast", 16}}}};
  json qwen = tiny_llama();
  qwen["model_type"] = "qwen2";
  const fs::path file = fs::temp_directory_path() / fmt::format("mla-config-{}.gguf", getpid());
  Threads threads(1);
  for (json config : {mla, tiny_llama(), qwen}) {
    config["eos_token_id"] = 3, config["bos_token_id"] = 2;
    const Config wanted = parse_hf_config(config);
    make_random(wanted, file, DType::f32, 1, threads);
    const Config got = read_config(Checkpoint::open(file));
    json a = to_hf_config(wanted), b = to_hf_config(got);
    EXPECT_NEAR(a["rms_norm_eps"].get<double>(), b["rms_norm_eps"].get<double>(), 1e-12);
    a.erase("rms_norm_eps"), b.erase("rms_norm_eps");
    EXPECT_EQ(a, b);
    EXPECT_EQ(got.rope_interleaved, wanted.family != Family::qwen2);
    EXPECT_NEAR(got.softmax_scale(), wanted.softmax_scale(), 1e-9);
  }
  fs::remove(file);
}

}  // namespace
}  // namespace mla::test
