// Whole conversions of small random models: exact where they can be, every step's switch at work, and models that cannot be converted.
#include "lowrank/convert.h"

#include "core/check.h"
#include "core/threads.h"
#include "io/checkpoint.h"
#include "lowrank/layer_run.h"
#include "lowrank/original.h"
#include "model/make.h"
#include "model/rope.h"
#include "random.h"

#include <gtest/gtest.h>
#include <unistd.h>
#include <nlohmann/json.hpp>

#include <cmath>
#include <fstream>
#include <tuple>

namespace mla::test {
namespace {

namespace fs = std::filesystem;

struct Folder {
  fs::path path = fs::temp_directory_path() / fmt::format("mla-convert-{}", getpid());
  Folder() { fs::create_directories(path); }
  ~Folder() { fs::remove_all(path); }
};

Config llama(int groups, nlohmann::json more = {}) {
  nlohmann::json json{{"model_type", "llama"},        {"vocab_size", 120},        {"hidden_size", 48}, {"intermediate_size", 72},
                      {"num_hidden_layers", 2},       {"num_attention_heads", 4}, {"head_dim", 16},    {"max_position_embeddings", 512},
                      {"num_key_value_heads", groups}};
  json.update(more.is_null() ? nlohmann::json::object() : more);
  return parse_hf_config(json);
}

std::vector<int32_t> random_ids(size_t n, uint64_t seed) {
  std::vector<int32_t> ids;
  for (size_t i = 0; i < n; ++i) ids.push_back(int32_t(random_bits(seed, i) % 120));
  return ids;
}

ConvertOptions sized(int64_t rank, int64_t d_R) {
  ConvertOptions o;
  o.layer.kv_lora_rank = rank, o.layer.qk_rope_head_dim = d_R;
  o.type = DType::f32;
  o.window = 32;
  o.constant_windows = 4;
  return o;
}

std::vector<float> logits(const Checkpoint& checkpoint, Device& device, const std::vector<int32_t>& ids,
                          MlaForm form = MlaForm::automatic) {
  Model model(checkpoint, device);
  model.form = form;
  LatentCache cache = model.make_cache(int64_t(ids.size()), DType::f32);
  const Chunk chunk{cache.open(), ids, Chunk::Logits::all};
  const Tensor t = model.forward({&chunk, 1}, cache);
  return {t.f32(), t.f32() + t.count()};
}

// Root mean square of the difference, over the spread of the first.
double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, mean = 0, spread = 0;
  for (float x : a) mean += double(x) / double(a.size());
  for (size_t i = 0; i < a.size(); ++i) difference += std::pow(double(a[i]) - b[i], 2), spread += std::pow(a[i] - mean, 2);
  return std::sqrt(difference / spread);
}

class ConvertModel : public testing::Test {
 protected:
  Checkpoint random(const Config& config, const char* name = "original") {
    make_random(config, folder_.path / name, DType::f32, 3, device_->threads());
    return Checkpoint::open(folder_.path / name);
  }
  Checkpoint written(const Checkpoint& original, Converted converted, DType type = DType::f32) {
    static int count = 0;
    const fs::path path = folder_.path / fmt::format("converted-{}", count++);
    export_hf(original, Replacement{std::move(converted.config), std::move(converted.tensors), {}}, path, type, device_->threads());
    return Checkpoint::open(path);
  }
  Checkpoint converted(const Checkpoint& original, const ConvertOptions& o) {
    return written(original, convert(original, calibration_, o, *device_), o.type);
  }

  Folder folder_;
  std::unique_ptr<Device> device_ = make_cpu(2);
  std::vector<int32_t> calibration_ = random_ids(32 * 12, 1), text_ = random_ids(100, 2);
};

TEST_F(ConvertModel, AnMqaModelAtFullRankIsTheSameModel) {
  const Checkpoint original = random(llama(1));
  const std::vector<float> theirs = logits(original, *device_, text_);
  for (Method method : all_methods) {
    ConvertOptions o = sized(17, 16);
    o.layer.method = method;
    const Checkpoint ours = converted(original, o);
    for (MlaForm form : {MlaForm::absorbed, MlaForm::expanded})
      EXPECT_LT(distance(theirs, logits(ours, *device_, text_, form)), 1e-4) << name(method);
  }
}

TEST_F(ConvertModel, AGqaModelWithKeysInOneDirectionIsTheSameModel) {
  const Checkpoint base = random(llama(2), "base");
  Replacement instead{llama(2), {}, {}};
  for (int l = 0; l < 2; ++l) {
    const std::string name = fmt::format("layers.{}.attn.k", l);
    const Tensor& t = base.get(name).value;
    std::vector<float> k(t.f32(), t.f32() + t.count());
    for (int64_t p = 0; p < 8; ++p)
      for (int64_t j = 0; j < 48; ++j) {  // the second head's: a complex multiple of the first's
        const auto z =
            std::polar(1.0F + 0.1F * float(p), float(p)) * std::complex<float>(k[size_t(p * 48 + j)], k[size_t((p + 8) * 48 + j)]);
        k[size_t((16 + p) * 48 + j)] = z.real(), k[size_t((24 + p) * 48 + j)] = z.imag();
      }
    instead.tensors[name] = k;
  }
  export_hf(base, instead, folder_.path / "aligned", DType::f32, device_->threads());
  const Checkpoint original = Checkpoint::open(folder_.path / "aligned");
  EXPECT_LT(distance(logits(original, *device_, text_), logits(converted(original, sized(33, 16)), *device_, text_)), 1e-4);
}

TEST_F(ConvertModel, EveryStepCanBeSwitchedOffAndMatters) {
  const Checkpoint original = random(llama(2));
  const std::vector<float> theirs = logits(original, *device_, calibration_);
  const Converted all = convert(original, calibration_, sized(24, 8), *device_);
  const auto without = [&](const char* step, const std::function<void(ConvertOptions&)>& change) {
    ConvertOptions o = sized(24, 8);
    change(o);
    Converted less = convert(original, calibration_, o, *device_);
    bool differs = false;
    for (const auto& [name, values] : all.tensors) differs |= !less.tensors.contains(name) || less.tensors.at(name) != values;
    EXPECT_TRUE(differs) << step;
    const double d = distance(theirs, logits(written(original, std::move(less)), *device_, calibration_));
    EXPECT_TRUE(std::isfinite(d)) << step;
    return d;
  };
  const double ours = distance(theirs, logits(written(original, all), *device_, calibration_));
  EXPECT_LT(ours, 1);
  without("refit of W_O", [](ConvertOptions& o) { o.refit = Refit::none; });
  without("refit of W_down", [](ConvertOptions& o) { o.refit_down = false; });
  without("drift", [](ConvertOptions& o) { o.refit = Refit::layer; });
  without("converted prefix", [](ConvertOptions& o) { o.sequential = false; });
  without("activations", [](ConvertOptions& o) { o.layer.activations = false; });
  without("metric", [](ConvertOptions& o) { o.layer.metric = false; });
  without("fold", [](ConvertOptions& o) { o.layer.fold = false; });
  without("constants", [](ConvertOptions& o) { o.layer.constant = Constant::one; });
  without("least squares", [](ConvertOptions& o) { o.layer.constant = Constant::mean; });
  without("fit", [](ConvertOptions& o) { o.fit_passes = 0; });
  without("rotary base", [](ConvertOptions& o) { o.rope_theta = 3000; });
  without("best direction", [](ConvertOptions& o) { o.layer.rotary = Rotary::norm; });
  without("balance", [](ConvertOptions& o) { o.layer.balance = false; });
  without("values' share", [](ConvertOptions& o) { o.layer.value_share = 0.5; });
  without("constant channel", [](ConvertOptions& o) { o.layer.latent_norm = LatentNorm::scale; });
  without("bias", [](ConvertOptions& o) { o.layer.latent_norm = LatentNorm::functional; });
  for (Method method : {Method::qr, Method::rsvd, Method::cur}) without("svd", [&](ConvertOptions& o) { o.layer.method = method; });
}

// Biases, which a query latent and the constant channels carry: queries', keys' and values' exactly, and W_O's.
TEST_F(ConvertModel, AnMqaModelWithBiasesIsTheSameModel) {
  const Checkpoint original = random(llama(1, {{"attention_bias", true}}));
  ASSERT_TRUE(original.find("layers.1.attn.q.bias") && original.find("layers.1.attn.o.bias"));
  const std::vector<float> theirs = logits(original, *device_, text_);
  ConvertOptions o = sized(17 + 16, 16);
  o.q_lora_rank = 50;
  for (bool refits : {false, true}) {
    if (!refits) o.refit = Refit::none, o.refit_down = false, o.fit_passes = 0;
    const Checkpoint ours = converted(original, o);
    EXPECT_EQ(read_config(ours).q_lora_rank, 50);
    for (MlaForm form : {MlaForm::absorbed, MlaForm::expanded})
      EXPECT_LT(distance(theirs, logits(ours, *device_, text_, form)), 1e-4) << refits;
    o = sized(17 + 16, 16);
    o.q_lora_rank = 50;
  }
}

// Checkpoints of Hugging Face's Llama with attention_bias and one KV head, and of its Qwen2 with two, whose second's keys, biases included,
// become complex multiples of the first's, pair by pair.
TEST_F(ConvertModel, PublishedFormsWithBiasesAreTheSameModels) {
  for (const char* name : {"mqa-bias", "qwen2"}) {
    const Checkpoint base = Checkpoint::open(fs::path(MLA_TEST_DATA) / "golden" / name);
    const Config config = read_config(base);
    const int64_t d = config.head_dim, D = config.hidden_size, F = d / 2, h = config.num_attention_heads;
    Replacement instead{config, {}, {}};
    for (const StoredTensor& t : base.tensors()) {
      if (!t.name.ends_with("attn.k") && !t.name.ends_with("attn.k.bias")) continue;
      const int64_t cols = t.value.rank == 2 ? D : 1;
      std::vector<float> k(t.value.f32(), t.value.f32() + t.value.count());
      for (int64_t p = 0; p < F && config.num_key_value_heads == 2; ++p)
        for (int64_t j = 0; j < cols; ++j) {
          const auto z =
              std::polar(1.0F + 0.1F * float(p), float(p)) * std::complex<float>(k[size_t(p * cols + j)], k[size_t((p + F) * cols + j)]);
          k[size_t((d + p) * cols + j)] = z.real(), k[size_t((d + p + F) * cols + j)] = z.imag();
        }
      instead.tensors[t.name] = k;
    }
    for (const StoredTensor& t : base.tensors())
      if (t.name.ends_with(".bias") && !instead.tensors.contains(t.name))
        instead.tensors[t.name] = {t.value.f32(), t.value.f32() + t.value.count()};
    const fs::path path = folder_.path / name;
    export_hf(base, instead, path, DType::f32, device_->threads());
    const Checkpoint original = Checkpoint::open(path);
    std::vector<int32_t> ids = text_;
    ConvertOptions o = sized(2 * config.num_key_value_heads * d + 1, d);
    o.q_lora_rank = std::min(2 * h * d, D + 1) + 1;
    EXPECT_LT(distance(logits(original, *device_, ids), logits(converted(original, o), *device_, ids)), 1e-4) << name;
  }
}

TEST_F(ConvertModel, AQueryLatentAtFullRankChangesNothingAndALessOneDoes) {
  const Checkpoint original = random(llama(1));
  const std::vector<float> theirs = logits(original, *device_, text_);
  ConvertOptions o = sized(17, 16);
  o.q_lora_rank = 49;
  EXPECT_LT(distance(theirs, logits(converted(original, o), *device_, text_)), 1e-4);
  o.q_lora_rank = 12;
  EXPECT_GT(distance(theirs, logits(converted(original, o), *device_, text_)), 1e-2);
}

// Rotary pairs over a base of their own: with ½ of the width and the root of the base, they are the faster half of the original's.
TEST_F(ConvertModel, ARotaryBaseOfItsOwnKeepsFasterPairs) {
  Config config = llama(1);
  const Checkpoint base = random(config, "base");
  Replacement instead{config, {}, {}};
  for (int l = 0; l < 2; ++l) {
    const std::string name = fmt::format("layers.{}.attn.k", l);
    const Tensor& t = base.get(name).value;
    std::vector<float> k(t.f32(), t.f32() + t.count());
    for (int64_t p = 4; p < 8; ++p)
      for (int64_t j = 0; j < 48; ++j) k[size_t(p * 48 + j)] = k[size_t((p + 8) * 48 + j)] = 0;  // keys without their slower half
    instead.tensors[name] = k;
  }
  export_hf(base, instead, folder_.path / "fast", DType::f32, device_->threads());
  const Checkpoint original = Checkpoint::open(folder_.path / "fast");
  ConvertOptions o = sized(17, 8);
  o.rope_theta = std::sqrt(config.rope_theta);
  const Checkpoint ours = converted(original, o);
  EXPECT_EQ(read_config(ours).rope_theta, o.rope_theta);
  const std::vector<float> theirs = logits(original, *device_, text_);
  EXPECT_LT(distance(theirs, logits(ours, *device_, text_)), 1e-4);
  o.rope_theta = 0;
  EXPECT_GT(distance(theirs, logits(converted(original, o), *device_, text_)), 1e-3);
}

TEST_F(ConvertModel, OneCalibrationServesManyConversions) {
  const Checkpoint original = random(llama(2));
  ConvertOptions o = sized(24, 8);
  o.sequential = false, o.refit = Refit::none, o.refit_down = false, o.fit_passes = 0;
  const std::vector<LayerCalibration> calibration = calibrate(original, calibration_, o, *device_);
  for (int64_t rank : {12, 24})
    for (int64_t d_R : {8, 16}) {
      o.layer.kv_lora_rank = rank, o.layer.qk_rope_head_dim = d_R;
      ConvertOptions alone = o;
      alone.refit = Refit::layer;  // takes the way with streams; the latents do not know of it
      const Converted shared = convert(original, calibration, o, *device_), one = convert(original, calibration_, alone, *device_);
      for (const char* name : {"layers.0.attn.kv_a", "layers.1.attn.kv_b"})
        EXPECT_LT(distance(one.tensors.at(name), shared.tensors.at(name)), 1e-5) << name;
    }
}

// The stream behind a layer's part is what the refits aim at, on the windows of the calibration.
TEST_F(ConvertModel, RefitsBringTheStreamNearer) {
  const Checkpoint original = random(llama(2));
  const auto stream = [&](const Checkpoint& checkpoint, const std::string& name) {
    Model model(checkpoint, *device_);
    std::vector<float> out;
    model.dump = [&](const std::string& given, const Tensor& t) {
      if (given == name) out.insert(out.end(), t.f32(), t.f32() + t.count());
    };
    LatentCache cache = model.make_cache(int64_t(calibration_.size()), DType::f32);
    for (size_t from = 0; from < calibration_.size(); from += 32) {
      const Chunk chunk{cache.open(), std::span(calibration_).subspan(from, 32), Chunk::Logits::none};
      model.forward({&chunk, 1}, cache);
    }
    return out;
  };
  const auto apart = [&](const char* name, Refit refit, bool down, int passes = 0) {
    ConvertOptions o = sized(24, 8);
    o.refit = refit, o.refit_down = down, o.fit_passes = passes;
    return distance(stream(original, name), stream(converted(original, o), name));
  };
  for (const char* name : {"layers.0.attn.stream", "layers.0.stream"})
    EXPECT_LT(apart(name, Refit::layer, false), apart(name, Refit::none, false)) << name;
  EXPECT_LT(apart("layers.1.attn.stream", Refit::drift, false), apart("layers.1.attn.stream", Refit::layer, false));
  for (const char* name : {"layers.0.stream", "layers.1.stream"})
    EXPECT_LT(apart(name, Refit::drift, true), apart(name, Refit::drift, false)) << name;
  for (const char* name : {"layers.0.attn.stream", "layers.1.attn.stream"})
    EXPECT_LT(apart(name, Refit::none, false, 4), apart(name, Refit::none, false)) << name;
}

// Biases far above the weights, as Qwen2's keys have, say nothing of how far weights may move.
TEST_F(ConvertModel, TheFitStandsLargeBiases) {
  const Config config = llama(2, {{"attention_bias", true}});
  const Checkpoint base = random(config, "base");
  Replacement instead{config, {}, {}};
  for (int l = 0; l < 2; ++l) {
    const std::string name = fmt::format("layers.{}.attn.k.bias", l);
    const Tensor& t = base.get(name).value;
    for (int64_t i = 0; i < t.count(); ++i) instead.tensors[name].push_back(t.f32()[i] + (i % 2 ? 30.0F : -30.0F));
  }
  export_hf(base, instead, folder_.path / "biased", DType::f32, device_->threads());
  const Checkpoint original = Checkpoint::open(folder_.path / "biased");
  const std::vector<float> theirs = logits(original, *device_, calibration_);
  const auto lost = [&](int passes) {
    ConvertOptions o = sized(24, 8);
    o.q_lora_rank = 50;
    o.fit_passes = passes;
    return distance(theirs, logits(converted(original, o), *device_, calibration_));
  };
  EXPECT_LT(lost(4), lost(0));
}

// Windows of more than one tile, of which fewer than eight go through a layer at once, and of more than go through at once.
TEST_F(ConvertModel, LongWindowsAreTheSameModelToo) {
  const Checkpoint original = random(llama(1, {{"max_position_embeddings", 8192}}));
  const std::vector<float> theirs = logits(original, *device_, text_);
  calibration_ = random_ids(4200, 1);
  for (int64_t window : {1050, 4200}) {
    ConvertOptions o = sized(17, 16);
    o.window = window;
    EXPECT_LT(distance(theirs, logits(converted(original, o), *device_, text_)), 1e-4) << window;
  }
}

TEST_F(ConvertModel, MoreRankIsNearer) {
  const Checkpoint original = random(llama(2));
  const std::vector<float> theirs = logits(original, *device_, calibration_);
  double before = 10;
  for (int64_t rank : {6, 16, 33}) {
    const double d = distance(theirs, logits(converted(original, sized(rank, 16)), *device_, calibration_));
    EXPECT_LT(d, before) << rank;
    before = d;
  }
}

TEST_F(ConvertModel, TheCheckpointIsDeepSeekV2AndItsTypeIsKept) {
  const Checkpoint original = random(llama(2));
  ConvertOptions o = sized(24, 8);
  o.type = DType::bf16;
  Converted made = convert(original, calibration_, o, *device_);
  for (const auto& [name, values] : made.tensors)
    for (float x : values) ASSERT_EQ(x, bf16_to_f32(f32_to_bf16(x))) << name;
  const Checkpoint ours = written(original, std::move(made), DType::bf16);
  const Config c = read_config(ours);
  EXPECT_EQ(c.family, Family::deepseek_v2);
  EXPECT_TRUE(c.attention_bias);
  EXPECT_EQ(c.kv_layout().row(), 32);
  EXPECT_EQ(c.qk_nope_head_dim, 16);
  EXPECT_EQ(ours.get("layers.1.attn.kv_a").value.dtype, DType::bf16);
  for (float x : logits(ours, *device_, text_)) ASSERT_TRUE(std::isfinite(x));
}

TEST_F(ConvertModel, TheResultDependsOnlyOnItsInputs) {
  const Checkpoint original = random(llama(2));
  EXPECT_EQ(convert(original, calibration_, sized(24, 8), *device_).tensors,
            convert(original, calibration_, sized(24, 8), *device_).tensors);
}

TEST_F(ConvertModel, WhatCannotBeConvertedIsRefusedBeforeWork) {
  const auto refused = [&](const Checkpoint& c, const ConvertOptions& o, const char* said) {
    try {
      convert(c, calibration_, o, *device_, [](double) { FAIL() << "work began"; });
      FAIL() << said;
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::input);
      EXPECT_NE(std::string(e.what()).find(said), std::string::npos) << e.what();
    }
  };
  const ConvertOptions o = sized(24, 8);
  refused(random(llama(2, {{"attention_bias", true}}), "bias"), o, "a query latent");
  refused(random(llama(2, {{"model_type", "mistral"}, {"sliding_window", 64}}), "window"), o, "sliding window of 64");
  refused(random(llama(2, {{"rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 128}}}}), "yarn"),
          o, "YaRN");
  const Checkpoint plain = random(llama(2));
  refused(plain, sized(24, 7), "rotary width");
  refused(plain, sized(24, 18), "rotary width");
  const auto with = [&](const std::function<void(ConvertOptions&)>& change) {
    ConvertOptions changed = o;
    change(changed);
    return changed;
  };
  refused(plain, with([](ConvertOptions& c) { c.rope_theta = 2; }), "none of the model's is nearest");
  refused(plain, with([](ConvertOptions& c) { c.q_lora_rank = 50; }), "query latent of 50");
  refused(plain, with([](ConvertOptions& c) { c.q_lora_rank = 1; }), "query latent of 1");
  refused(plain, sized(80, 8), "more than full rank");
  refused(converted(plain, o), o, "latent attention already");
  Replacement broken{llama(2), {{"layers.1.attn.v", std::vector<float>(32 * 48, std::nanf(""))}}, {}};
  export_hf(plain, broken, folder_.path / "nan", DType::f32, device_->threads());
  refused(Checkpoint::open(folder_.path / "nan"), o, "layers.1.attn.v holds nan");
  calibration_.resize(31);
  refused(plain, o, "31 tokens");
}

// Files whose configuration promises other shapes than the tensors have: reading them by it would go beyond their ends.
TEST_F(ConvertModel, TensorsOfOtherShapesAreRefused) {
  for (const auto& [name, value, said] : {std::tuple("vocab_size", 140, "embed is"),
                                          {"intermediate_size", 80, "layers.0.ffn.gate is"},
                                          {"num_key_value_heads", 4, "layers.0.attn.k is"},
                                          {"hidden_size", 64, "embed is"}}) {
    const fs::path folder = folder_.path / name;
    make_random(llama(2), folder, DType::f32, 1, device_->threads());
    nlohmann::json config = nlohmann::json::parse(std::ifstream(folder / "config.json"));
    config[name] = value;
    std::ofstream(folder / "config.json") << config;
    const Checkpoint broken = Checkpoint::open(folder);
    try {
      check_tensors(broken, original_config(broken));
      ADD_FAILURE() << name;
    } catch (const Error& e) { EXPECT_NE(std::string(e.what()).find(said), std::string::npos) << e.what(); }
  }
  Replacement biased{llama(2, {{"attention_bias", true}}), {}, {}};
  for (const char* bias : {"q", "k", "v", "o"})
    for (int l : {0, 1})
      biased.tensors[fmt::format("layers.{}.attn.{}.bias", l, bias)] = std::vector<float>(bias[0] == 'q' ? 64 : bias[0] == 'o' ? 48 : 32);
  export_hf(random(llama(2)), biased, folder_.path / "biased", DType::f32, device_->threads());
  const Checkpoint whole = Checkpoint::open(folder_.path / "biased");
  EXPECT_NO_THROW(check_tensors(whole, original_config(whole)));
}

TEST_F(ConvertModel, LlamaThreesScalingSurvives) {
  const Checkpoint original = random(llama(1, {{"rope_scaling",
                                                {{"rope_type", "llama3"},
                                                 {"factor", 8.0},
                                                 {"low_freq_factor", 1.0},
                                                 {"high_freq_factor", 4.0},
                                                 {"original_max_position_embeddings", 64}}}}));
  const std::vector<int32_t> long_text = random_ids(300, 9);
  EXPECT_LT(distance(logits(original, *device_, long_text), logits(converted(original, sized(17, 16)), *device_, long_text)), 1e-4);
}

// A GGUF has the scaling as divisors of the frequencies alone.
TEST_F(ConvertModel, LlamaThreesScalingSurvivesOutOfGguf) {
  const fs::path file = folder_.path / "llama3.gguf";
  make_random(llama(1, {{"rope_theta", 500000.0},
                        {"rope_scaling",
                         {{"rope_type", "llama3"},
                          {"factor", 8.0},
                          {"low_freq_factor", 1.0},
                          {"high_freq_factor", 4.0},
                          {"original_max_position_embeddings", 8192}}}}),
              file, DType::f32, 1, device_->threads());
  const Checkpoint original = Checkpoint::open(file);
  ASSERT_TRUE(original.find("rope_freqs"));
  const std::vector<int32_t> text = random_ids(100, 9);
  const Checkpoint ours = converted(original, sized(17, 16));
  EXPECT_EQ(read_config(ours).rope_scaling.type, RopeScaling::Type::llama3);
  EXPECT_LT(distance(logits(original, *device_, text), logits(ours, *device_, text)), 1e-4);
}

TEST_F(ConvertModel, AnInterruptEndsIt) {
  const Checkpoint original = random(llama(2));
  EXPECT_THROW(convert(original, calibration_, sized(24, 8), *device_,
                       [](double f) {
                         if (f > 0.4) throw Error(ErrorKind::interrupted, "now");
                       }),
               Error);
}

TEST(Sums, AreTheProductsOfTheirRows) {
  const Matrix x = random_matrix(37, 5, 1), y = random_matrix(37, 3, 2);
  std::vector<float> xf(x.data.begin(), x.data.end()), yf(y.data.begin(), y.data.end());
  Threads threads(2);
  Sums sums(5, 3, threads);
  for (int64_t from : {0, 20}) {
    const int64_t n = from == 0 ? 20 : 17;
    sums.add(xf.data() + from * 5, n);
    sums.add_cross(xf.data() + from * 5, yf.data() + from * 3, n);
  }
  EXPECT_LT(frobenius_norm(difference(sums.gram(), multiply(x, x, Transposed::left))), 1e-4);
  EXPECT_LT(frobenius_norm(difference(sums.cross(), multiply(x, y, Transposed::left))), 1e-4);
}

// Against the definition, in double and one term at a time.
TEST(Constants, AreTheWeightedMeansOfTheRotations) {
  for (bool interleaved : {false, true})
    for (Constant which : {Constant::mean, Constant::least_squares}) {
      const GqaShape s{4, 2, 6, 10, interleaved};
      constexpr int64_t T = 141;  // two tiles of queries
      const std::vector<double> frequencies{1, 0.3, 0.01};
      std::vector<float> q(T * 4 * 6), k(T * 2 * 6);
      for (size_t i = 0; i < q.size(); ++i) q[i] = float(random_normal(5, i));
      for (size_t i = 0; i < k.size(); ++i) k[i] = float(random_normal(6, i));
      Threads threads(2);
      DistanceSums sums(s, T, which);
      sums.add(view(q.data(), DType::f32, {T, 4, 6}), view(k.data(), DType::f32, {T, 2, 6}), 0.4F, threads);
      const auto got = sums.constants(frequencies);
      for (int64_t h = 0; h < 4; ++h)
        for (int64_t f = 0; f < 3; ++f) {
          std::complex<double> numerator = 0;
          double denominator = 0;
          const int64_t re = interleaved ? 2 * f : f, im = interleaved ? 2 * f + 1 : f + 3;
          for (int64_t t = 0; t < T; ++t) {
            const float* qt = q.data() + (t * 4 + h) * 6;
            std::vector<double> p;
            double sum = 0;
            for (int64_t u = 0; u <= t; ++u) {
              const float* ku = k.data() + (u * 2 + h / 2) * 6;
              double dot = 0;
              for (int i = 0; i < 6; ++i) dot += double(qt[i]) * ku[i];
              p.push_back(std::exp(0.4 * dot)), sum += p.back();
            }
            for (int64_t u = which == Constant::mean ? 0 : 1; u <= t; ++u) {
              const float* ku = k.data() + (u * 2 + h / 2) * 6;
              double w = p[size_t(u)] / sum;
              if (which == Constant::least_squares) w *= (qt[re] * qt[re] + qt[im] * qt[im]) * (ku[re] * ku[re] + ku[im] * ku[im]);
              numerator += w * std::polar(1.0, frequencies[size_t(f)] * double(u - t));
              denominator += w;
            }
          }
          EXPECT_LT(std::abs(got[size_t(h * 3 + f)] - numerator / denominator), 1e-5);
          EXPECT_LE(std::abs(got[size_t(h * 3 + f)]), 1 + 1e-5);
        }
    }
}

}  // namespace
}  // namespace mla::test
