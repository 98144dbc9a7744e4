// Files made by the program: random checkpoints, quantised GGUFs and HF folders hold what they should, in the order they should.
#include "model/make.h"

#include "core/check.h"
#include "core/quant.h"
#include "core/threads.h"
#include "golden.h"
#include "text/tokenizer.h"

#include <nlohmann/json.hpp>

#include <numeric>

namespace mla::test {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

Config tiny_mla() {
  return parse_hf_config({{"model_type", "deepseek_v2"},
                          {"vocab_size", 300},
                          {"hidden_size", 64},
                          {"intermediate_size", 96},
                          {"num_hidden_layers", 2},
                          {"num_attention_heads", 2},
                          {"kv_lora_rank", 64},
                          {"qk_nope_head_dim", 32},
                          {"qk_rope_head_dim", 16},
                          {"v_head_dim", 32},
                          {"q_lora_rank", 32},
                          {"n_routed_experts", 4},
                          {"n_shared_experts", 1},
                          {"num_experts_per_tok", 2},
                          {"moe_intermediate_size", 32},
                          {"first_k_dense_replace", 1}});
}

json tiny_llama_json() {
  return {{"model_type", "llama"},
          {"vocab_size", 300},
          {"hidden_size", 64},
          {"intermediate_size", 96},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"attention_bias", true},
          {"rope_theta", 500000.0},
          {"rope_scaling",
           {{"rope_type", "llama3"},
            {"factor", 8.0},
            {"low_freq_factor", 1.0},
            {"high_freq_factor", 4.0},
            {"original_max_position_embeddings", 8192}}}};
}

std::string contents(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::vector<float> values(const Checkpoint& checkpoint, const std::string& name) {
  const Tensor t = checkpoint.get(name).value;
  std::vector<float> out(size_t(t.count()));
  dequantise(t, out.data());
  return out;
}

size_t entries(const Scratch& folder) { return size_t(std::distance(fs::directory_iterator(folder / "."), fs::directory_iterator())); }

TEST(MakeRandom, DependsOnTheSeedAndNotOnThreads) {
  const Scratch scratch;
  Threads one(1), three(3);
  for (const DType type : {DType::q4_0, DType::bf16}) {
    make_random(tiny_mla(), scratch / "a.gguf", type, 7, one);
    make_random(tiny_mla(), scratch / "b.gguf", type, 7, three);
    make_random(tiny_mla(), scratch / "c.gguf", type, 8, three);
    EXPECT_EQ(contents(scratch / "a.gguf"), contents(scratch / "b.gguf"));
    EXPECT_NE(contents(scratch / "a.gguf"), contents(scratch / "c.gguf"));
  }
}

TEST(MakeRandom, MatricesAreNormalAndNormsOne) {
  const Scratch scratch;
  Threads threads(2);
  make_random(tiny_mla(), scratch / "a.gguf", DType::f32, 1, threads);
  const Checkpoint checkpoint = Checkpoint::open(scratch / "a.gguf");
  const std::vector<float> w = values(checkpoint, "embed");  // [300, 64]
  double sum = 0, squares = 0, fourth = 0;
  for (double x : w) sum += x, squares += x * x, fourth += x * x * x * x;
  const double n = double(w.size()), variance = squares / n;
  EXPECT_NEAR(sum / n, 0, 5 * std::sqrt(1.0 / 64 / n));
  EXPECT_NEAR(variance * 64, 1, 0.05);
  EXPECT_NEAR(fourth / n / (variance * variance), 3, 0.2);
  EXPECT_NE(values(checkpoint, "layers.0.ffn.gate"), values(checkpoint, "layers.0.ffn.up"));
  for (float x : values(checkpoint, "layers.1.attn.kv_a_norm")) EXPECT_EQ(x, 1);
}

TEST(MakeRandom, FilesAreAsLargeAsTheConfigSays) {
  const Scratch scratch;
  Threads threads(2);
  const Made made = make_random(tiny_mla(), scratch / "model", DType::f32, 1, threads);
  EXPECT_EQ(made.bytes, 4 * tiny_mla().parameters());
  EXPECT_EQ(Checkpoint::open(scratch / "model").metadata()["torch_dtype"], "float32");
}

TEST(MakeRandom, BothFormatsRunAndSayTheSame) {
  const Scratch scratch;
  make_random(tiny_mla(), scratch / "model", DType::f32, 3, cpu().threads());
  quantize_model(Checkpoint::open(scratch / "model"), scratch / "model.gguf", DType::f32, cpu().threads());
  export_hf(Checkpoint::open(scratch / "model.gguf"), scratch / "again", DType::f32, cpu().threads());
  std::vector<int32_t> ids(20), rows{19};
  std::iota(ids.begin(), ids.end(), 5);
  Model folder = load(scratch / "model"), gguf = load(scratch / "model.gguf"), again = load(scratch / "again");
  const std::vector<float> wanted = run(folder, ids, rows);
  EXPECT_LE(difference(run(gguf, ids, rows), wanted).max, 1e-5);
  EXPECT_EQ(run(again, ids, rows), wanted);
}

// HF keeps a head's rotary rows as halves, llama.cpp's llama as pairs; there and back is the identity.
// Rows of 300 and columns of 200 leave blocks that end early.
TEST(MakeRandom, Fp8IsTheSameNumbersWithinHalfAStep) {
  const Scratch scratch;
  json json = to_hf_config(tiny_mla());
  json["hidden_size"] = 200, json["intermediate_size"] = 300;
  const Config config = parse_hf_config(json);
  make_random(config, scratch / "f32", DType::f32, 3, cpu().threads());
  make_random(config, scratch / "fp8", DType::f8, 3, cpu().threads());
  const Checkpoint exact = Checkpoint::open(scratch / "f32"), coded = Checkpoint::open(scratch / "fp8");
  ASSERT_EQ(exact.tensors().size(), coded.tensors().size());
  int fp8 = 0;
  for (const StoredTensor& t : exact.tensors()) {
    const Tensor& c = coded.get(t.name).value;
    const std::vector<float> wanted = values(exact, t.name), got = values(coded, t.name);
    const bool kept = t.value.rank == 1 || t.name == "embed" || t.name == "lm_head" || t.name.ends_with("router");
    EXPECT_EQ(c.dtype, kept ? DType::bf16 : DType::f8) << t.name;
    fp8 += !kept;
    for (size_t i = 0; i < wanted.size(); ++i) {
      const int64_t cols = t.value.shape[t.value.rank - 1];
      // Half a step of a code: 1/16 of its value, or half of the least code, 2^-9.
      const double least = kept ? 0 : 0x1p-10 * c.scales[int64_t(i) / cols / 128 * f8_blocks(cols) + int64_t(i) % cols / 128];
      ASSERT_NEAR(got[i], wanted[i], std::max(least, std::fabs(wanted[i]) * (kept ? 0x1p-8 : 0x1p-4))) << t.name << " " << i;
    }
  }
  EXPECT_EQ(fp8, 28);
  // Written again it is the same, and the model says what it said.
  export_hf(coded, scratch / "again", DType::f8, cpu().threads());
  EXPECT_EQ(values(Checkpoint::open(scratch / "again"), "layers.0.ffn.down"), values(coded, "layers.0.ffn.down"));
}

TEST(Model, Fp8WeightsRunAsTheirDecodedSelves) {
  const Scratch scratch;
  make_random(tiny_mla(), scratch / "fp8", DType::f8, 3, cpu().threads());
  export_hf(Checkpoint::open(scratch / "fp8"), scratch / "bf16", DType::bf16, cpu().threads());
  Golden golden;
  for (int i = 0; i < 40; ++i) golden.ids.push_back(i * 7 % 300), golden.rows.push_back(i);
  Model coded = load(scratch / "fp8"), decoded = load(scratch / "bf16");
  EXPECT_EQ(run(coded, golden, {}), run(decoded, golden, {}));
}

TEST(Model, Fp8CodesThatAreNoNumbersAreRefused) {
  const Scratch scratch;
  make_random(tiny_mla(), scratch / "fp8", DType::f8, 3, cpu().threads());
  const std::string bytes = contents(scratch / "fp8/model.safetensors");
  const Checkpoint checkpoint = Checkpoint::open(scratch / "fp8");
  const StoredTensor& up = checkpoint.get("layers.1.ffn.experts.up.2");
  const size_t code = size_t(up.value.as<std::byte>() - up.file->data()) + 70;
  const size_t scale = size_t(reinterpret_cast<const std::byte*>(up.value.scales) - up.file->data());
  auto refused = [&](size_t at, std::string_view damage, const char* part) {
    fs::create_directory(scratch / "bad");
    fs::copy_file(scratch / "fp8/config.json", scratch / "bad/config.json", fs::copy_options::overwrite_existing);
    std::string bad = bytes;
    bad.replace(at, damage.size(), damage);
    std::ofstream(scratch / "bad/model.safetensors", std::ios::binary) << bad;
    try {
      load(scratch / "bad");
      FAIL() << part;
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::input);
      EXPECT_NE(std::string_view(e.what()).find(part), std::string_view::npos) << e.what();
    }
  };
  refused(code, "\xff", "row 1 of tensor layers.1.ffn.experts.up.2 holds fp8 codes that are no numbers");
  refused(scale, std::string_view("\0\0\x80\x7f", 4), "the scales of tensor layers.1.ffn.experts.up.2");
}

TEST(Quantize, LlamaRowsArePermutedToPairs) {
  const Scratch scratch;
  Threads threads(2);
  make_random(parse_hf_config(tiny_llama_json()), scratch / "model", DType::f32, 1, threads);
  const Checkpoint source = Checkpoint::open(scratch / "model");
  quantize_model(source, scratch / "a.gguf", DType::f32, threads);
  const Checkpoint gguf = Checkpoint::open(scratch / "a.gguf");
  for (const std::string name : {"layers.1.attn.q", "layers.1.attn.k", "layers.1.attn.q.bias"}) {
    const std::vector<float> from = values(source, name), to = values(gguf, name);
    const size_t cols = name.ends_with("bias") ? 1 : 64;
    for (size_t row = 0; row < to.size() / cols; ++row) {
      const size_t head = row / 16 * 16, r = row % 16, origin = head + (r % 2 == 0 ? r / 2 : 8 + r / 2);
      for (size_t i = 0; i < cols; ++i) ASSERT_EQ(to[row * cols + i], from[origin * cols + i]) << name << " row " << row;
    }
  }
  EXPECT_EQ(values(source, "layers.1.attn.v"), values(gguf, "layers.1.attn.v"));
  export_hf(gguf, scratch / "again", DType::f32, threads);
  const Checkpoint again = Checkpoint::open(scratch / "again");
  ASSERT_EQ(again.tensors().size(), source.tensors().size());
  for (const StoredTensor& t : source.tensors()) EXPECT_EQ(values(again, t.name), values(source, t.name)) << t.name;
}

TEST(Quantize, LlamaThreesScalingBecomesDivisorsAndComesBack) {
  const Scratch scratch;
  Threads threads(2);
  const Config config = parse_hf_config(tiny_llama_json());
  make_random(config, scratch / "a.gguf", DType::bf16, 1, threads);
  const std::vector<float> divisors = values(Checkpoint::open(scratch / "a.gguf"), "rope_freqs");
  ASSERT_EQ(divisors.size(), 8u);
  EXPECT_EQ(divisors.front(), 1);
  EXPECT_NEAR(divisors.back(), 8, 1e-5);
  export_hf(Checkpoint::open(scratch / "a.gguf"), scratch / "model", DType::bf16, threads);
  EXPECT_EQ(Checkpoint::open(scratch / "model").metadata()["rope_scaling"], to_hf_config(config)["rope_scaling"]);
}

TEST(Quantize, TypesFollowWidthsAndUses) {
  const Scratch scratch;
  Threads threads(2);
  json config = tiny_llama_json();
  config["hidden_size"] = 256, config["intermediate_size"] = 80, config["attention_bias"] = false;
  const Made made = make_random(parse_hf_config(config), scratch / "a.gguf", DType::q4_0, 1, threads);
  const Checkpoint a = Checkpoint::open(scratch / "a.gguf");
  auto type = [&](const std::string& name) { return a.get(name).value.dtype; };
  EXPECT_EQ(type("lm_head"), DType::q6_k);
  EXPECT_EQ(type("embed"), DType::q4_0);
  EXPECT_EQ(type("layers.0.attn.q"), DType::q4_0);
  EXPECT_EQ(type("layers.0.ffn.down"), DType::f16);  // rows of 80
  EXPECT_EQ(type("norm"), DType::f32);
  ASSERT_EQ(made.notes.size(), 1u);
  EXPECT_NE(made.notes[0].find("ffn.down is stored as f16: its rows of 80"), std::string::npos) << made.notes[0];

  make_random(tiny_mla(), scratch / "b.gguf", DType::q4_0, 1, threads);
  const Checkpoint b = Checkpoint::open(scratch / "b.gguf");
  EXPECT_EQ(b.get("layers.1.ffn.router").value.dtype, DType::f32);
  EXPECT_EQ(b.get("lm_head").value.dtype, DType::q8_0);  // rows of 64 hold no q6_k block
  EXPECT_EQ(b.get("layers.1.ffn.experts.down").value.rank, 3);
  EXPECT_EQ(b.find("layers.0.attn.kv_b"), nullptr);
}

TEST(Quantize, BlocksOfTheSameTypeAreCopied) {
  const Scratch scratch;
  Threads threads(2);
  make_random(tiny_mla(), scratch / "a.gguf", DType::q4_0, 1, threads);
  quantize_model(Checkpoint::open(scratch / "a.gguf"), scratch / "b.gguf", DType::q4_0, threads);
  const Checkpoint a = Checkpoint::open(scratch / "a.gguf"), b = Checkpoint::open(scratch / "b.gguf");
  for (const StoredTensor& t : a.tensors()) {
    const Tensor& copy = b.get(t.name).value;
    ASSERT_EQ(copy.dtype, t.value.dtype);
    EXPECT_EQ(std::memcmp(copy.data, t.value.data, size_t(row_bytes(copy.dtype, copy.count()))), 0) << t.name;
  }
}

Tokenizer tokenizer_of(const Checkpoint& gguf) {
  const json& m = gguf.metadata();
  Tokenizer::GgufVocabulary v;
  v.model = m["tokenizer.ggml.model"], v.pre = m["tokenizer.ggml.pre"];
  v.tokens = gguf.strings("tokenizer.ggml.tokens"), v.merges = gguf.strings("tokenizer.ggml.merges");
  v.scores = gguf.floats("tokenizer.ggml.scores"), v.types = gguf.ints("tokenizer.ggml.token_type");
  if (m.contains("tokenizer.ggml.add_space_prefix")) v.add_space_prefix = m["tokenizer.ggml.add_space_prefix"].get<bool>();
  if (m.contains("tokenizer.ggml.unknown_token_id")) v.unknown = m["tokenizer.ggml.unknown_token_id"];
  return Tokenizer::from_gguf(std::move(v));
}

void expect_carried(json tokenizer, const std::string& pre) {
  const Scratch scratch;
  Threads threads(2);
  json config = tiny_llama_json();
  config["vocab_size"] = 1600;
  make_random(parse_hf_config(config), scratch / "model", DType::bf16, 1, threads);
  std::ofstream(scratch / "model" / "tokenizer.json") << tokenizer.dump();
  std::ofstream(scratch / "model" / "tokenizer_config.json") << R"({"chat_template": "{{ messages }}", "unk_token": "<unk>"})";
  const Made made = quantize_model(Checkpoint::open(scratch / "model"), scratch / "a.gguf", DType::bf16, threads);
  EXPECT_TRUE(made.notes.empty());
  quantize_model(Checkpoint::open(scratch / "a.gguf"), scratch / "b.gguf", DType::q8_0, threads);  // and once more, from GGUF
  const Tokenizer wanted = Tokenizer::from_json(tokenizer.dump());
  for (const char* file : {"a.gguf", "b.gguf"}) {
    const Checkpoint gguf = Checkpoint::open(scratch / file);
    EXPECT_EQ(gguf.metadata()["tokenizer.chat_template"], "{{ messages }}");
    EXPECT_EQ(gguf.metadata()["tokenizer.ggml.pre"], pre);
    const Tokenizer got = tokenizer_of(gguf);
    for (const char* text :
         {"Hello there, world!", "  the 2026 models  are\n\nrun 12345", "grüße — 你好 🙂", "the theory of the thing", ""})
      EXPECT_EQ(got.encode(text, false, true), wanted.encode(text, false, true)) << text;
  }
}

json tokenizer_file(const std::string& name) {
  std::ifstream in(fs::path(MLA_TEST_DATA) / "text" / name);
  return json::parse(in);
}

TEST(Quantize, ByteLevelTokenizersAreCarried) {
  json tokenizer = tokenizer_file("tiny_bytes.json");
  tokenizer["pre_tokenizer"] = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}};
  expect_carried(tokenizer, "gpt-2");
  const json digits = {{"type", "Digits"}, {"individual_digits", true}};
  tokenizer["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", {digits, tokenizer["pre_tokenizer"]}}};
  expect_carried(tokenizer, "smollm");
}

TEST(Quantize, SentencepieceTokenizersAreCarried) { expect_carried(tokenizer_file("tiny_sentencepiece.json"), "default"); }

TEST(Quantize, TokenizersThatGgufCannotNameAreRefused) {
  json tokenizer = tokenizer_file("tiny_bytes.json");
  tokenizer["pre_tokenizer"] = {{"type", "Whitespace"}};
  try {
    expect_carried(tokenizer, "");
    ADD_FAILURE() << "accepted";
  } catch (const Error& error) { EXPECT_EQ(error.kind(), ErrorKind::input); }
}

TEST(Quantize, InterruptionLeavesNothing) {
  const Scratch scratch;
  Threads threads(2);
  const Progress interrupt = [](double fraction) {
    if (fraction > 0.3) throw Error(ErrorKind::interrupted, "interrupted");
  };
  EXPECT_THROW(make_random(tiny_mla(), scratch / "a.gguf", DType::q8_0, 1, threads, interrupt), Error);
  EXPECT_THROW(make_random(tiny_mla(), scratch / "model", DType::bf16, 1, threads, interrupt), Error);
  EXPECT_EQ(entries(scratch), 0u);
}

TEST(Quantize, RefusesWhatCannotBe) {
  const Scratch scratch;
  Threads threads(1);
  EXPECT_THROW(make_random(tiny_mla(), scratch / "folder", DType::q4_0, 1, threads), Error);
  make_random(tiny_mla(), scratch / "a.gguf", DType::bf16, 1, threads);
  const Checkpoint a = Checkpoint::open(scratch / "a.gguf");
  EXPECT_THROW(quantize_model(a, scratch / "b.gguf", DType::q4_k, threads), Error);
  EXPECT_THROW(quantize_model(a, scratch / "a.gguf", DType::q8_0, threads), Error);  // itself
  EXPECT_THROW(export_hf(a, scratch / "folder", DType::q8_0, threads), Error);
  EXPECT_EQ(entries(scratch), 1u);
}

}  // namespace
}  // namespace mla::test
