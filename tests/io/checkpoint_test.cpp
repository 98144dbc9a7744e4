// Whole models on disk: folders with one file or many, GGUF files, names put into our words, and folders that lie.
#include "io/checkpoint.h"

#include "bytes.h"

#include <sys/stat.h>
#include <nlohmann/json.hpp>

namespace mla::test {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

// One f16 tensor after another, each filled with its number.
std::string folder_file(const std::vector<std::pair<std::string, std::vector<int64_t>>>& tensors, const std::string& type = "F16") {
  json header;
  std::string data;
  for (const auto& [name, shape] : tensors) {
    size_t count = 1;
    for (int64_t n : shape) count *= size_t(n);
    const size_t begin = data.size();
    for (size_t i = 0; i < count; ++i) data += raw(uint16_t(begin / 2 + i));
    header[name] = {{"dtype", type}, {"shape", shape}, {"data_offsets", {begin, data.size()}}};
  }
  return safetensors(header.dump(), data);
}

std::string index_of(const json& weight_map) { return json{{"metadata", json::object()}, {"weight_map", weight_map}}.dump(); }

TEST(Checkpoint, folder_with_one_file) {
  Folder folder;
  folder.write("config.json", R"({"model_type":"llama"})");
  folder.write("tokenizer_config.json", "{}");
  folder.write("model.safetensors", folder_file({{"model.embed_tokens.weight", {3, 4}},
                                                 {"model.layers.0.self_attn.rotary_emb.inv_freq", {2}},
                                                 {"model.norm.weight", {4}}}));
  const Checkpoint model = Checkpoint::open(folder.path());
  EXPECT_EQ(model.format(), Format::hf);
  EXPECT_EQ(model.metadata()["model_type"], "llama");
  ASSERT_EQ(model.tensors().size(), 2u);  // the rotary table is outside ours
  const StoredTensor& embed = model.get("embed");
  EXPECT_EQ(describe(embed.value), "f16 [3, 4]");
  EXPECT_EQ(embed.value.as<uint16_t>()[5], 5);
  EXPECT_EQ(model.get("norm").value.as<uint16_t>()[0], 14);
  EXPECT_EQ(model.find("lm_head"), nullptr);
  EXPECT_EQ(model.text("tokenizer_config.json"), "{}");
  EXPECT_EQ(model.text("tokenizer.json"), std::nullopt);
  EXPECT_TRUE(model.strings("tokenizer.ggml.tokens").empty());
  expect_refused([&] { model.get("layers.0.attn.kv_a"); }, "lacks the tensor model.layers.0.self_attn.kv_a_proj_with_mqa.weight");
}

TEST(Checkpoint, chat_template_in_a_file_of_its_own) {
  Folder folder;
  folder.write("config.json", "{}");
  folder.write("model.safetensors", folder_file({{"model.norm.weight", {4}}}));
  EXPECT_EQ(json::parse(Checkpoint::open(folder.path()).tokenizer_config()), json::object());
  folder.write("tokenizer_config.json", R"({"bos_token": "<s>", "chat_template": "old"})");
  EXPECT_EQ(json::parse(Checkpoint::open(folder.path()).tokenizer_config())["chat_template"], "old");
  folder.write("chat_template.jinja", "{{ messages }}\n");
  const json config = json::parse(Checkpoint::open(folder.path()).tokenizer_config());
  EXPECT_EQ(config["chat_template"], "{{ messages }}\n");
  EXPECT_EQ(config["bos_token"], "<s>");
  folder.write("tokenizer_config.json", "[1]");
  expect_refused([&] { Checkpoint::open(folder.path()).tokenizer_config(); }, "not an object");
}

TEST(Checkpoint, folder_with_shards_and_links_into_a_cache) {
  Folder blobs, folder;
  folder.write("config.json", "{}");
  fs::create_symlink(blobs.write("abc", folder_file({{"model.norm.weight", {4}}, {"not.in.the.index", {1}}})),
                     folder.path() / "one.safetensors");
  folder.write("two.safetensors", folder_file({{"lm_head.weight", {2, 2}}}));
  folder.write("model.safetensors.index.json", index_of({{"model.norm.weight", "one.safetensors"}, {"lm_head.weight", "two.safetensors"}}));
  const Checkpoint model = Checkpoint::open(folder.path());
  EXPECT_EQ(model.tensors().size(), 2u);
  EXPECT_NE(model.get("norm").file, model.get("lm_head").file);
}

TEST(Checkpoint, folder_without_weights_opens_and_says_so_when_asked) {
  Folder folder;
  folder.write("config.json", "{}");
  const Checkpoint model = Checkpoint::open(folder.path());
  expect_refused([&] { model.get("embed"); }, "holds no weights");
}

TEST(Checkpoint, fused_experts_become_one_tensor_each) {
  Folder folder;
  folder.write("config.json", "{}");
  folder.write("model.safetensors",
               folder_file({{"model.layers.1.mlp.experts.gate_up_proj", {3, 4, 5}}, {"model.layers.1.mlp.experts.down_proj", {3, 5, 2}}}));
  const Checkpoint model = Checkpoint::open(folder.path());
  EXPECT_EQ(model.tensors().size(), 9u);
  EXPECT_EQ(describe(model.get("layers.1.ffn.experts.up.2").value), "f16 [2, 5]");
  EXPECT_EQ(model.get("layers.1.ffn.experts.gate.2").value.as<uint16_t>()[0], 40);
  EXPECT_EQ(model.get("layers.1.ffn.experts.up.2").value.as<uint16_t>()[9], 59);
  EXPECT_EQ(model.get("layers.1.ffn.experts.down.1").value.as<uint16_t>()[0], 70);
}

// Tensors of codes and of scales, as DeepSeek's folders have them; entries are names, types and shapes.
std::string fp8_file(const std::vector<std::tuple<std::string, std::string, std::vector<int64_t>>>& tensors) {
  json header;
  std::string data;
  for (const auto& [name, type, shape] : tensors) {
    const size_t begin = data.size();
    int64_t count = 1;
    for (int64_t n : shape) count *= n;
    for (int64_t i = 0; i < count; ++i) data += type == "F32" ? raw(float(i)) : std::string(1, char(i % 100));
    header[name] = {{"dtype", type}, {"shape", shape}, {"data_offsets", {begin, data.size()}}};
  }
  return safetensors(header.dump(), data);
}
constexpr const char* fp8_config = R"({"quantization_config":{"quant_method":"fp8","fmt":"e4m3","weight_block_size":[128,128]}})";

TEST(Checkpoint, fp8_weights_have_their_scales) {
  const std::string q = "model.layers.0.self_attn.q_proj.weight", experts = "model.layers.0.mlp.experts.";
  Folder folder;
  folder.write("config.json", fp8_config);
  folder.write("model.safetensors", fp8_file({{q, "F8_E4M3", {130, 3}},
                                              {q + "_scale_inv", "F32", {2, 1}},
                                              {experts + "gate_up_proj", "F8_E4M3", {2, 256, 4}},
                                              {experts + "gate_up_proj_scale_inv", "F32", {2, 2, 1}},
                                              {experts + "down_proj", "F8_E4M3", {2, 4, 128}},
                                              {experts + "down_proj_scale_inv", "F32", {2, 1, 1}}}));
  const Checkpoint model = Checkpoint::open(folder.path());
  EXPECT_EQ(model.tensors().size(), 7u);
  EXPECT_EQ(describe(model.get("layers.0.attn.q").value), "fp8 [130, 3]");
  EXPECT_EQ(model.get("layers.0.attn.q").value.scales[1], 1.0f);
  EXPECT_EQ(model.get("layers.0.ffn.experts.up.1").value.scales[0], 3.0f);
  EXPECT_EQ(model.get("layers.0.ffn.experts.down.1").value.scales[0], 1.0f);
}

TEST(Checkpoint, fp8_weights_that_lie) {
  const std::string q = "model.layers.0.self_attn.q_proj.weight", s = q + "_scale_inv", fused = "model.layers.0.mlp.experts.gate_up_proj";
  Folder folder;
  auto refused = [&](const decltype(std::vector{std::tuple{q, q, std::vector<int64_t>{}}}) & tensors, std::string_view part) {
    folder.write("model.safetensors", fp8_file(tensors));
    expect_refused([&] { Checkpoint::open(folder.path()); }, part);
  };
  folder.write("config.json", fp8_config);
  refused({{q, "F8_E4M3", {130, 3}}}, "has no scales (" + s);
  refused({{q, "F8_E4M3", {130, 3}}, {s, "F32", {1, 1}}}, "they would be f32 [2, 1]");
  refused({{q, "F8_E4M3", {130, 3}}, {s, "F32", {2}}}, "they would be f32 [2, 1]");
  refused({{q, "F8_E4M3", {130, 3}}, {s, "F8_E4M3", {2, 1}}}, "they would be f32 [2, 1]");
  refused({{q, "F32", {2, 3}}, {s, "F32", {1, 1}}}, "has scales, but is f32 [2, 3]");
  refused({{s, "F32", {1, 1}}}, "but not the tensor");
  refused({{"model.norm.weight", "F8_E4M3", {4}}}, "only matrices may be fp8");
  refused({{fused, "F8_E4M3", {2, 448, 4}}, {fused + "_scale_inv", "F32", {2, 4, 1}}}, "have 224 rows");
  for (const auto& [config, part] : {std::pair(R"({"quant_method":"fp8","weight_block_size":[64,128]})", "weight_block_size [64,128]"),
                                     std::pair(R"({"quant_method":"fp8"})", "weight_block_size nothing"),
                                     std::pair(R"({"quant_method":"fp8","weight_block_size":[128,128],"fmt":"e5m2"})", "fmt \"e5m2\""),
                                     std::pair(R"({"quant_method":"gptq"})", "quant_method \"gptq\""), std::pair(R"([])", "no object")}) {
    folder.write("config.json", std::string(R"({"quantization_config":)") + config + "}");
    refused({{q, "F32", {2, 3}}}, part);
  }
}

TEST(Checkpoint, tensors_at_odd_addresses_are_copied_to_even_ones) {
  Folder folder;
  folder.write("config.json", "{}");
  const std::string data = raw(1.5f) + raw(-2.0f);
  for (int spaces = 0; spaces < 4; ++spaces) {
    folder.write(
        "model.safetensors",
        safetensors(R"({"model.norm.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})" + std::string(size_t(spaces), ' '), data));
    const Checkpoint model = Checkpoint::open(folder.path());
    const Tensor norm = model.get("norm").value;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(norm.data) % 4, 0u);
    EXPECT_EQ(norm.f32()[1], -2.0f);
  }
}

TEST(Checkpoint, gguf_file_with_names_in_our_words) {
  Folder folder;
  GgufBytes file;
  file.pair("general.architecture", 8, GgufBytes::text("deepseek2")).tensor("blk.0.attn_k_b.weight", {2, 3, 4}, 1, 0);
  file.tensor("blk.0.ffn_gate_exps.weight", {4, 2, 3}, 1, 64)
      .tensor("blk.0.attn_kv_a_mqa.bias", {5}, 0, 128)
      .tensor("somebody.elses", {1}, 24, 160);
  file.data = std::string(161, 'x');
  const Checkpoint model = Checkpoint::open(folder.write("model.gguf", file.bytes()));
  EXPECT_EQ(model.format(), Format::gguf);
  EXPECT_EQ(model.tensors().size(), 3u);
  EXPECT_EQ(describe(model.get("layers.0.attn.k_b").value), "f16 [4, 3, 2]");
  EXPECT_EQ(describe(model.get("layers.0.ffn.experts.gate").value), "f16 [3, 2, 4]");
  EXPECT_EQ(describe(model.get("layers.0.attn.kv_a.bias").value), "f32 [5]");
  EXPECT_EQ(model.text("tokenizer.json"), std::nullopt);
  EXPECT_EQ(model.file_bytes(), int64_t(file.bytes().size()));
}

TEST(Checkpoint, released_pages_can_be_read_again) {
  Folder folder;
  std::string content(100000, 'a');
  content[70000] = 'b';
  const MappedFile file(folder.write("file", content));
  file.release(file.data() + 10, 99000);
  file.release(file.data() + 70000, SIZE_MAX);
  file.release(&content, 8);
  EXPECT_EQ(char(file.data()[70000]), 'b');
  EXPECT_EQ(MappedFile(folder.write("empty", "")).size(), 0u);
}

TEST(CheckpointHostile, paths_that_are_no_model) {
  Folder folder;
  expect_refused([&] { Checkpoint::open(folder.path() / "absent"); }, "does not exist");
  expect_refused([&] { Checkpoint::open(folder.path()); }, "has no config.json");
  expect_refused([&] { Checkpoint::open(folder.write("notes.txt", "hello")); }, "is not a GGUF file");
  folder.write("config.json", "[1]");
  expect_refused([&] { Checkpoint::open(folder.path()); }, "holds no JSON object");
  folder.write("config.json", "{");
  expect_refused([&] { Checkpoint::open(folder.path()); }, "not valid JSON");
  folder.write("config.json", std::string(200000, '['));
  expect_refused([&] { Checkpoint::open(folder.path()); }, "nested deeper");
}

TEST(CheckpointHostile, pipe_in_place_of_a_file_does_not_hang) {
  Folder folder;
  ASSERT_EQ(mkfifo((folder.path() / "model.gguf").c_str(), 0600), 0);
  expect_refused([&] { Checkpoint::open(folder.path() / "model.gguf"); }, "not a regular file");
}

TEST(CheckpointHostile, index_that_leads_out_of_the_folder) {
  Folder outside, folder;
  folder.write("config.json", "{}");
  outside.write("x.safetensors", folder_file({{"model.norm.weight", {4}}}));
  const std::string there = (outside.path() / "x.safetensors").string();
  for (const std::string& name : {there, "../" + outside.path().filename().string() + "/x.safetensors", std::string(".."), std::string("."),
                                  std::string(""), std::string("a/b"), std::string("..\\x"), std::string("x\0y", 3)}) {
    folder.write("model.safetensors.index.json", index_of({{"model.norm.weight", name}}));
    expect_refused([&] { Checkpoint::open(folder.path()); }, "no file of this folder");
  }
}

TEST(CheckpointHostile, index_that_lies) {
  Folder folder;
  folder.write("config.json", "{}");
  folder.write("one.safetensors", folder_file({{"model.norm.weight", {4}}}));
  auto refused = [&](const std::string& index, std::string_view part) {
    folder.write("model.safetensors.index.json", index);
    expect_refused([&] { Checkpoint::open(folder.path()); }, part);
  };
  refused("{}", "no object weight_map");
  refused(R"({"weight_map":[]})", "no object weight_map");
  refused(R"({"weight_map":{"a":1}})", "gives no file name");
  refused(index_of({{"model.norm.weight", "two.safetensors"}}), "cannot open");
  refused(index_of({{"model.norm.weight", "one.safetensors"}, {"lm_head.weight", "one.safetensors"}}), "holds 1 of the 2 tensors");
  refused(R"({"weight_map":{"a":"one.safetensors","a":"one.safetensors"}})", "twice");
}

TEST(CheckpointHostile, the_same_weight_under_two_names) {
  Folder folder;
  folder.write("config.json", "{}");
  folder.write("model.safetensors", folder_file({{"model.layers.0.mlp.experts.down_proj", {1, 2, 2}},
                                                 {"model.layers.0.mlp.experts.0.down_proj.weight", {2, 2}}}));
  expect_refused([&] { Checkpoint::open(folder.path()); }, "layers.0.ffn.experts.down.0 twice");
}

TEST(CheckpointHostile, weights_of_types_and_shapes_that_no_weight_has) {
  Folder folder;
  folder.write("config.json", "{}");
  folder.write("model.safetensors", folder_file({{"lm_head.weight", {2, 2}}}, "I16"));
  expect_refused([&] { Checkpoint::open(folder.path()); }, "lm_head.weight has the type I16");
  for (const std::vector<int64_t>& shape : {std::vector<int64_t>{}, {0, 4}, {1, 1, 2, 2}}) {
    folder.write("model.safetensors", folder_file({{"lm_head.weight", shape}}));
    expect_refused([&] { Checkpoint::open(folder.path()); }, "weights have 1 to 3 dimensions");
  }
  folder.write("model.safetensors", folder_file({{"model.layers.0.mlp.experts.gate_up_proj", {2, 3, 4}}}));
  expect_refused([&] { Checkpoint::open(folder.path()); }, "[experts, rows, columns]");
  folder.write("model.safetensors", folder_file({{"model.layers.0.mlp.experts.down_proj", {70000, 1, 1}}}));
  expect_refused([&] { Checkpoint::open(folder.path()); }, "[experts, rows, columns]");
}

}  // namespace
}  // namespace mla::test
