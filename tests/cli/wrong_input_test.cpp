// Wrong usage and wrong input: for every command, what is said, and that it is said with exit code 2 and one line.
#include "program.h"

#include <sys/stat.h>

#include <cmath>

namespace mla::test {
namespace {

std::string model() { return golden("dsv2-q-group").string(); }

// Files that several tests give.
void make_files() {
  write_ids(path("ids.npy"), {1, 2, 3});
  write_ids(path("big.npy"), {1, 100000});
  write_ids(path("none.npy"), {});
  write_ids(path("negative.npy"), {-1});
  write_text(path("text.txt"), "Some text.");
  write_text(path("not.gguf"), "This is no model.");
  write_text(path("not.npy"), "This is no array.");
  write_text(path("broken.json"), "{\"vocab_size\": ");
}

class WrongInput : public testing::Test {
 protected:
  void SetUp() override { make_files(); }
};

TEST_F(WrongInput, Program) {
  expect_refused({"walk"}, {"walk", "mla --help"});
  expect_refused({"run"}, {"MODEL is missing", "mla run --help"});
  expect_refused({"run", model(), "--spin"}, {"unexpected argument --spin"});
  expect_refused({"run", model(), "-n", "many"}, {"--tokens is \"many\"; give a number"});
  expect_refused({"run", model(), "--threads", "-3", "--ids", path("ids.npy")}, {"--threads is -3", "0 for all"});
}

TEST_F(WrongInput, Run) {
  expect_refused({"run", "no/such/model", "-p", "x"}, {"no/such/model does not exist"});
  expect_refused({"run", path("not.gguf"), "-p", "x"}, {"not.gguf"});
  expect_refused({"run", model(), "-p", "x"}, {"no tokenizer", "--ids"});
  expect_refused({"run", model(), "--ids", path("big.npy")}, {"100000", "199"});
  expect_refused({"run", model(), "--ids", path("negative.npy")}, {"-1"});
  expect_refused({"run", model(), "--ids", path("none.npy")}, {"prompt 1 is empty"});
  expect_refused({"run", model(), "--ids", path("not.npy")}, {"not.npy is not a .npy file"});
  expect_refused({"run", model(), "--ids", path("ids.npy"), "--temperature", "-1"}, {"temperature is -1"});
  expect_refused({"run", model(), "--ids", path("ids.npy"), "--top-p", "2"}, {"top-p is 2"});
  expect_refused({"run", model(), "--ids", path("ids.npy"), "--kv-type", "i4"}, {"--kv-type is \"i4\"", "bf16, f16, f32, i8 or fp8"});
  expect_refused({"run", model(), "--ids", path("ids.npy"), "--device", "tpu"}, {"--device is \"tpu\""});
  expect_refused({"run", model(), "--ids", path("ids.npy"), "--attention", "both"}, {"--attention is \"both\""});
  expect_refused({"run", model(), "--ids", path("ids.npy"), "--logit-bias", "7"}, {"--logit-bias is \"7\"", "ID=BIAS"});
  expect_refused({"run", model(), "--ids", path("ids.npy"), "-n", "-1"}, {"-n is -1"});
  expect_refused({"run", model(), "--ids", path("ids.npy"), "--context", "-5"}, {"--context is -5"});
  expect_refused({"run", model(), "--ids", path("ids.npy"), "-n", "1", "--context", "999999999999"}, {"this machine has", "--context"});
  expect_refused({"run", small_model(), "--chat", "-p", "x", "--chat-template", "klingon"}, {"klingon", "chatml"});
  expect_refused({"run", small_model(), "--prompt-file", path("nowhere.txt")}, {"nowhere.txt", "No such file"});
}

TEST_F(WrongInput, Chat) {
  expect_refused({"chat", "no/such/model"}, {"does not exist"});
  expect_refused({"chat", model()}, {"no tokenizer"});
  expect_refused({"chat", small_model(), "--chat-template", "klingon"}, {"klingon", "llama3"});
  expect_refused({"chat", small_model(), "-n", "0"}, {"-n is 0"});
  expect_refused({"chat", small_model(), "--min-p", "3"}, {"min-p is 3"});
}

TEST_F(WrongInput, Eval) {
  expect_refused({"eval", model()}, {"nothing to score", "--file"});
  expect_refused({"eval", model(), "--file", path("text.txt")}, {"no tokenizer", "--ids"});
  expect_refused({"eval", small_model(), "--file", path("nowhere.txt")}, {"nowhere.txt"});
  expect_refused({"eval", small_model(), "--file", path("text.txt"), "--context", "1"}, {"--context is 1"});
  expect_refused({"eval", small_model(), "--file", path("text.txt"), "--stride", "5000"}, {"--stride is 5000"});
  expect_refused({"eval", model(), "--ids", path("none.npy")}, {"0 tokens"});
}

TEST_F(WrongInput, Inspect) {
  expect_refused({"inspect", "no/such/model"}, {"does not exist"});
  expect_refused({"inspect", path("broken.json")}, {"broken.json"});
  expect_refused({"inspect", model(), "--memory", "lots"}, {"--memory is \"lots\"", "24G"});
  expect_refused({"inspect", model(), "--users", "1,0"}, {"--users has \"0\""});
  expect_refused({"inspect", model(), "--contexts", "4k"}, {"--contexts has \"4k\""});
}

TEST_F(WrongInput, Compare) {
  expect_refused({"compare", "no/such/model"}, {"does not exist"});
  expect_refused({"compare", model(), "--depth", "0"}, {"--depth has \"0\""});
  expect_refused({"compare", model(), "--repeat", "0"}, {"--repeat is 0"});
  expect_refused({"compare", model(), "--kv-type", "q4_0"}, {"--kv-type is \"q4_0\""});
  expect_refused({"compare", model(), "--device", "cuda:x"}, {"--device is \"cuda:x\""});
}

TEST_F(WrongInput, Bench) {
  expect_refused({"bench", "no/such/model"}, {"does not exist"});
  expect_refused({"bench", model(), "--prompt", "-1"}, {"--prompt has \"-1\""});
  expect_refused({"bench", model(), "--depth", "a"}, {"--depth has \"a\""});
  expect_refused({"bench", model(), "--batch", "1,,2"}, {"--batch has \"\""});
  expect_refused({"bench", model(), "--prompt", "0", "--batch", "0"}, {"nothing to measure"});
  expect_refused({"bench", model(), "--steps", "0"}, {"--steps is 0"});
  expect_refused({"bench", model(), "--depth", "900000000", "--batch", "1000"}, {"are free"});
}

TEST_F(WrongInput, Quantize) {
  expect_refused({"quantize", model()}, {"--output is missing"});
  expect_refused({"quantize", "no/such/model", "-o", path("x.gguf")}, {"does not exist"});
  expect_refused({"quantize", model(), "-o", path("x.gguf"), "--type", "q3"}, {"--type is \"q3\""});
  expect_refused({"quantize", model(), "-o", path("folder"), "--type", "q4_0"}, {"--type is \"q4_0\"", ".gguf"});
  expect_refused({"quantize", small_model(), "-o", small_model()}, {"-o is the model itself"});
}

TEST_F(WrongInput, Init) {
  const std::string config = (golden("llama3") / "config.json").string();
  expect_refused({"init", config}, {"--output is missing"});
  expect_refused({"init", path("nowhere.json"), "-o", path("x.gguf")}, {"nowhere.json"});
  expect_refused({"init", path("broken.json"), "-o", path("x.gguf")}, {"broken.json"});
  expect_refused({"init", config, "-o", path("x.gguf"), "--type", "f64"}, {"--type is \"f64\""});
  expect_refused({"init", config, "-o", path("x.gguf"), "-t", "-1"}, {"--threads is -1"});
}

TEST_F(WrongInput, Tokenize) {
  expect_refused({"tokenize", small_model()}, {"nothing to tokenize"});
  expect_refused({"tokenize", small_model(), "--text", "a", "--file", path("text.txt")}, {"more than one thing"});
  expect_refused({"tokenize", model(), "--text", "a"}, {"no tokenizer"});
  expect_refused({"tokenize", path("broken.json"), "--text", "a"}, {"mla: error"});
  expect_refused({"tokenize", small_model(), "--decode", path("big.npy")}, {"100000"});
}

TEST_F(WrongInput, Logits) {
  expect_refused({"logits", model(), "-o", path("x.npy")}, {"--ids is missing"});
  expect_refused({"logits", model(), "--ids", path("none.npy"), "-o", path("x.npy")}, {"holds no ids"});
  expect_refused({"logits", model(), "--ids", path("ids.npy"), "--chunk", "0", "-o", path("x.npy")}, {"--chunk is 0"});
  expect_refused({"logits", model(), "--ids", path("ids.npy"), "--rows", path("big.npy"), "-o", path("x.npy")},
                 {"position 100000", "3 ids"});
  expect_refused({"logits", model(), "--ids", path("big.npy"), "-o", path("x.npy")}, {"100000"});
  expect_refused({"logits", model(), "--ids", path("ids.npy"), "-o", path("no/such/folder/x.npy")}, {"x.npy"});
}

TEST_F(WrongInput, OutputsThatAreNoFiles) {
  // Renaming a finished file onto a device or a pipe would replace it.
  ASSERT_EQ(mkfifo(path("pipe").c_str(), 0600), 0);
  fs::create_directories(path("folder.gguf"));
  expect_refused({"logits", model(), "--ids", path("ids.npy"), "-o", path("pipe")}, {"pipe", "no file"});
  expect_refused({"tokenize", small_model(), "--text", "a", "-o", path("pipe")}, {"pipe", "no file"});
  expect_refused({"run", model(), "--ids", path("ids.npy"), "--dump", path("pipe")}, {"--dump is", "no file"});
  expect_refused({"compare", model(), "--svg", path("no/where.svg")}, {"--svg is", "there is no folder"});
  expect_refused({"quantize", model(), "-o", path("folder.gguf")}, {"folder.gguf", "no file"});
  EXPECT_TRUE(fs::is_fifo(path("pipe")));
}

TEST_F(WrongInput, Doctor) {
  auto refused = [](const std::vector<std::string>& arguments, const std::string& said) {
    const Outcome o = run(arguments);
    EXPECT_EQ(o.code, 2) << o.err;
    EXPECT_NE(o.err.find(said), std::string::npos) << o.err;
  };
  refused({"doctor", "no/such/model", "--json"}, "does not exist");
  refused({"doctor", path("not.gguf"), "--json"}, "not.gguf");
  refused({"doctor", "--device", "cuda:9"}, "--device");
  refused({"doctor", "--threads", "-1"}, "--threads is -1");
  refused({"doctor", model(), "extra"}, "extra");
}

TEST_F(WrongInput, LowRank) {
  write_floats(path("matrix.npy"), std::vector<float>(12, 1.0F), 3, 4);
  write_floats(path("nan.npy"), {1, 2, std::nanf(""), 4}, 2, 2);
  expect_refused({"lowrank", path("matrix.npy")}, {"--rank is missing"});
  expect_refused({"lowrank", path("matrix.npy"), "--rank", "0"}, {"--rank is 0", "1 to 3"});
  expect_refused({"lowrank", path("matrix.npy"), "--rank", "4"}, {"--rank is 4", "[3, 4]"});
  expect_refused({"lowrank", path("matrix.npy"), "--rank", "1", "--tensor", "w"}, {"--tensor is \"w\"", "one matrix"});
  expect_refused({"lowrank", path("nan.npy"), "--rank", "1"}, {"nan at [1, 0]"});
  expect_refused({"lowrank", path("ids.npy"), "--rank", "1"}, {"shape"});
  expect_refused({"lowrank", path("not.npy"), "--rank", "1"}, {"not a .npy file"});
  expect_refused({"lowrank", model(), "--rank", "1"}, {"--tensor is missing"});
  expect_refused({"lowrank", model(), "--rank", "1", "--tensor", "layers.0.attn.x"}, {"layers.0.attn.x"});
  expect_refused({"lowrank", (golden("llama3") / "model.safetensors").string(), "--rank", "1", "--tensor", "x"}, {"no matrix \"x\""});
  expect_refused({"lowrank", path("matrix.npy"), "--rank", "1", "--svg", "no/such/folder/x.svg"}, {"--svg", "no folder"});
}

TEST_F(WrongInput, Convert) {
  write_text(path("gqa.json"),
             R"({"model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
                 "num_attention_heads": 4, "num_key_value_heads": 2})");
  ASSERT_EQ(run({"init", path("gqa.json"), "-o", path("gqa.gguf"), "--type", "f32"}).code, 0);
  const std::string gqa = path("gqa.gguf"), out = path("out");
  const auto refused = [&](std::vector<std::string> more, const std::vector<std::string>& said) {
    more.insert(more.begin(), {"convert", gqa, "-o", out, "--calibrate", path("text.txt")});
    expect_refused(more, said);
    EXPECT_FALSE(fs::exists(out));
  };
  refused({}, {"--kv-lora-rank", "--cut"});
  refused({"--cut", "50%", "--kv-lora-rank", "8"}, {"either"});
  refused({"--cut", "half"}, {"--cut is \"half\"", "68.75%"});
  refused({"--cut", "100%"}, {"--cut is"});
  refused({"--cut", "99%"}, {"too small"});
  refused({"--kv-lora-rank", "60"}, {"no less than the 64"});
  refused({"--kv-lora-rank", "16", "--rope-dim", "7"}, {"rotary width of 7"});
  refused({"--kv-lora-rank", "16", "--rope-dim", "32"}, {"rotary width of 32"});
  refused({"--kv-lora-rank", "-4"}, {"--kv-lora-rank is -4"});
  refused({"--cut", "50%", "--method", "lu"}, {"--method is \"lu\""});
  refused({"--cut", "50%", "--preset", "best"}, {"--preset is \"best\""});
  refused({"--cut", "50%", "--refit", "all"}, {"--refit is \"all\"", "drift"});
  refused({"--cut", "50%", "--rotary", "best"}, {"--rotary is \"best\"", "norm"});
  refused({"--cut", "50%", "--latent-norm", "no"}, {"--latent-norm is \"no\""});
  refused({"--cut", "50%", "--value-share", "-1"}, {"-1"});
  refused({"--cut", "50%", "--type", "q8_0"}, {"bf16 or f32"});
  refused({"--kv-lora-rank", "16", "--rope-dim", "8", "--rope-theta", "1.5"}, {"rotary width of 8", "1.5"});
  refused({"--cut", "50%", "--rope-theta", "-3"}, {"rotary base is -3"});
  refused({"--cut", "50%", "--q-lora-rank", "300"}, {"query latent of 300"});
  refused({"--cut", "50%", "--value-share", "0"}, {"β is 0"});
  refused({"--cut", "50%", "--fit-passes", "-1"}, {"--fit-passes is -1"});
  refused({"--cut", "50%", "--fit-rate", "-1"}, {"--fit-rate is -1"});
  refused({"--cut", "50%", "--output-ridge", "-2"}, {"--output-ridge is -2"});
  refused({"--cut", "50%", "--down-ridge", "nan"}, {"--down-ridge is nan"});
  refused({"--cut", "50%", "--search", "--calibration-window", "0"}, {"--calibration-window is 0"});
  refused({"--cut", "50%", "--calibration-tokens", "-5"}, {"--calibration-tokens is -5"});
  refused({"--cut", "50%", "--sweep"}, {"--sweep-cuts"});
  refused({"--sweep", "--sweep-cuts", "50%,all"}, {"\"all\""});
  refused({"--sweep", "--sweep-methods", "svd,,qr"}, {"--sweep-methods"});
  refused({"--sweep", "--sweep-weights", "heavy"}, {"\"heavy\"", "activations"});
  refused({"--cut", "50%"}, {"10 tokens", "512"});  // the text is shorter than a window
  expect_refused({"convert", gqa, "-o", out, "--cut", "50%"}, {"--calibrate is missing"});
  expect_refused({"convert", model(), "-o", out, "--cut", "50%", "--calibrate", path("text.txt")}, {"latent attention already"});
  expect_refused({"convert", golden("qwen2").string(), "-o", out, "--kv-lora-rank", "20", "--rope-dim", "10", "--latent-norm", "scale",
                  "--calibrate", path("text.txt")},
                 {"biases", "constant"});
  // Attention that is not converted: norms on queries and keys, a sliding window, an unknown family.
  const auto config_of = [&](const char* name, const char* family, const std::string& more) {
    fs::create_directories(path(name));
    write_text(path(name) + "/config.json", std::string(R"({"model_type": ")") + family +
                                                R"(", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
                                                   "num_attention_heads": 4, "num_key_value_heads": 2)" +
                                                more + "}");
    return path(name);
  };
  const auto attention_refused = [&](const std::string& folder, const char* said) {
    expect_refused({"convert", folder, "-o", out, "--cut", "50%", "--calibrate", path("text.txt")}, {said});
  };
  attention_refused(config_of("qwen3", "qwen3", ""), "qwen3");
  attention_refused(config_of("strange", "mamba", ""), "mamba");
  fs::create_directories(path("full"));
  write_text(path("full/config.json"), "{}");
  expect_refused({"convert", gqa, "-o", path("full"), "--cut", "50%", "--calibrate", path("text.txt")}, {"--force"});
  fs::create_directories(path("photos"));
  write_text(path("photos/a.jpg"), "x");
  expect_refused({"convert", gqa, "-o", path("photos"), "--cut", "50%", "--calibrate", path("text.txt"), "--force"}, {"something else"});
  // What is read would go with the folder that --force replaces; a sweep does not replace a model.
  fs::create_directories(path("source"));
  write_text(path("source/config.json"), "{}");
  fs::copy_file(gqa, path("source/model.gguf"));
  expect_refused({"convert", path("source/model.gguf"), "-o", path("source"), "--cut", "50%", "--calibrate", path("text.txt"), "--force"},
                 {"lies in"});
  EXPECT_TRUE(fs::exists(path("source/model.gguf")));
  write_text(path("full/text.txt"), "text");
  expect_refused({"convert", gqa, "-o", path("full"), "--cut", "50%", "--calibrate", path("full/text.txt"), "--force"}, {"lies in"});
  expect_refused({"convert", gqa, "-o", path("full"), "--sweep", "--calibrate", path("text.txt"), "--force"}, {"than a sweep"});
  expect_refused({"convert", gqa, "-o", path("no/such/out"), "--cut", "50%", "--calibrate", path("text.txt")}, {"no folder"});
}

}  // namespace
}  // namespace mla::test
