// mla convert as a user runs it: what it writes, its sweep and search, and targets that stay as they were.
#include "program.h"

#include <sys/resource.h>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <sstream>

namespace mla::test {
namespace {

// A small llama with a byte vocabulary, and a text of a thousand tokens.
std::string gqa_model() {
  const std::string file = path("gqa.gguf");
  if (fs::exists(file)) return file;
  write_text(path("gqa.json"),
             R"({"model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048})");
  const Outcome o = run({"init", path("gqa.json"), "-o", file, "--type", "f32"});
  EXPECT_EQ(o.code, 0) << o.err;
  std::string text;
  for (int i = 0; text.size() < 2000; ++i) text += "Line " + std::to_string(i * i) + " says nothing of note.\n";
  write_text(path("calibration.txt"), text);
  return file;
}

TEST(Convert, WritesAModelThatRunsAndSaysWhatItKeeps) {
  const std::string file = gqa_model();
  const std::string out = path("converted");
  const Outcome o =
      run({"convert", file, "-o", out, "--cut", "50%", "--calibrate", path("calibration.txt"), "--calibration-window", "64", "--json"});
  ASSERT_EQ(o.code, 0) << o.err;
  const Json json = o.json();
  EXPECT_EQ(json["kv_lora_rank"], 26);
  EXPECT_EQ(json["qk_rope_head_dim"], 6);
  EXPECT_EQ(json["cache_elements_before"], 64);
  EXPECT_EQ(json["cache_elements_after"], 32);
  for (const char* field : {"perplexity_before", "perplexity_after", "seconds"}) EXPECT_GT(json[field].get<double>(), 0) << field;
  EXPECT_GE(json["kl"].get<double>(), 0);
  const Json config = Json::parse(read_text(fs::path(out) / "config.json"));
  EXPECT_EQ(config["model_type"], "deepseek_v2");
  EXPECT_NEAR(config["rope_theta"].get<double>(), 1000, 1e-9);  // 10000 to the power of 3/4
  EXPECT_NE(read_text(fs::path(out) / "README.md").find("| preset | mla |"), std::string::npos);
  // The tokenizer came along, and both forms of attention agree.
  for (const char* form : {"absorbed", "expanded"}) {
    const Outcome written = run({"run", out, "-p", "Line 4", "-n", "8", "--attention", form, "--kv-type", "f32", "--json"});
    ASSERT_EQ(written.code, 0) << written.err;
    EXPECT_EQ(written.json()["ids"].size(), 8U);
  }
  for (const auto& entry : fs::directory_iterator(scratch())) EXPECT_EQ(entry.path().filename().string().find(".draft"), std::string::npos);

  const Outcome again = run({"convert", file, "-o", out, "--kv-lora-rank", "9", "--rope-dim", "8", "--calibrate", path("calibration.txt"),
                             "--calibration-window", "64", "--preset", "transmla", "--type", "f32", "--force"});
  ASSERT_EQ(again.code, 0) << again.err;
  EXPECT_NE(again.out.find("64 → 17 elements"), std::string::npos) << again.out;
  EXPECT_NE(read_text(fs::path(out) / "README.md").find("| preset | transmla |"), std::string::npos);
}

// A preset is its switches: the same checkpoint as with each of them given, and another where one is missing.
TEST(Convert, ThePresetOfMha2MlaIsItsSwitches) {
  const std::string file = gqa_model(), out = path("preset");
  const auto weights = [&](std::vector<std::string> steps) {
    steps.insert(steps.begin(),
                 {"convert", file, "-o", out, "--calibrate", path("calibration.txt"), "--calibration-window", "64", "--force"});
    const Outcome o = run(steps);
    EXPECT_EQ(o.code, 0) << o.err;
    return read_text(fs::path(out) / "model.safetensors");
  };
  const std::string preset = weights({"--preset", "mha2mla", "--cut", "68.75%"}), card = read_text(fs::path(out) / "README.md");
  EXPECT_NE(card.find("| rotary pairs | one head's, by norms |"), std::string::npos) << card;
  EXPECT_NE(card.find("| values' share β | 1, energies not balanced |"), std::string::npos) << card;
  const std::vector<std::string> switches{"--no-activations", "--no-fold", "--no-balance", "--rotary=norm"};
  std::vector<std::string> all{"--preset", "transmla", "--kv-lora-rank", "16", "--rope-dim", "4"};
  all.insert(all.end(), switches.begin(), switches.end());
  EXPECT_TRUE(weights(all) == preset);
  for (const std::string& missing : switches) {
    std::vector<std::string> some = all;
    std::erase(some, missing);
    EXPECT_FALSE(weights(some) == preset) << missing;
  }
}

TEST(Convert, ASweepMeasuresSizesAndMethodsFromOneCalibration) {
  const std::string file = gqa_model(), out = path("swept");
  const Outcome o = run({"convert",
                         file,
                         "-o",
                         out,
                         "--sweep",
                         "--sweep-cuts",
                         "25%,50%",
                         "--sweep-methods",
                         "svd,qr",
                         "--sweep-weights",
                         "none,metric",
                         "--calibrate",
                         path("calibration.txt"),
                         "--calibration-window",
                         "64",
                         "--evaluate",
                         path("calibration.txt"),
                         "--evaluate",
                         path("calibration.txt"),
                         "--evaluate-windows",
                         "1"});
  ASSERT_EQ(o.code, 0) << o.err;
  EXPECT_EQ(o.out, read_text(fs::path(out) / "sweep.md"));
  EXPECT_NE(read_text(fs::path(out) / "sweep.svg").find("qr none"), std::string::npos);
  const Json json = Json::parse(read_text(fs::path(out) / "sweep.json"));
  ASSERT_EQ(json["points"].size(), 8U);
  ASSERT_EQ(json["texts"].size(), 2U);
  for (const Json& p : json["points"]) {
    EXPECT_EQ(p["cache_elements_after"], p["cut"] == "25%" ? 48 : 32);
    EXPECT_EQ(p["cache_bytes_per_token"], p["cache_elements_after"].get<int>() * 2 * 2);  // bf16, two layers
    EXPECT_GT(p["kl"].get<double>(), 0);
    EXPECT_NEAR(std::log(p["perplexity_after"][0].get<double>() / json["texts"][0]["perplexity_before"].get<double>()),
                p["log_perplexity_lost"].get<double>(), 1e-6);
  }
  for (const auto& entry : fs::directory_iterator(out)) EXPECT_FALSE(entry.is_directory()) << entry.path();
  // Its own tables it replaces, if asked to.
  std::vector<std::string> again{"convert",
                                 file,
                                 "-o",
                                 out,
                                 "--sweep",
                                 "--sweep-cuts",
                                 "50%",
                                 "--sweep-methods",
                                 "qr",
                                 "--calibrate",
                                 path("calibration.txt"),
                                 "--calibration-window",
                                 "64",
                                 "--evaluate-windows",
                                 "1"};
  EXPECT_EQ(run(again).code, 2);
  again.emplace_back("--force");
  ASSERT_EQ(run(again).code, 0);
  EXPECT_EQ(Json::parse(read_text(fs::path(out) / "sweep.json"))["points"].size(), 1U);
}

TEST(Convert, SearchesTheBalanceOnCalibrationTextItHasNotSeen) {
  const Outcome o = run({"convert", gqa_model(), "-o", path("searched"), "--cut", "50%", "--search", "--calibrate", path("calibration.txt"),
                         "--calibration-window", "64", "--json"});
  ASSERT_EQ(o.code, 0) << o.err;
  double least = 1e9, best = 0;
  std::istringstream lines(o.err);
  for (std::string line; std::getline(lines, line);) {
    double share = 0, kl = 0;
    if (std::sscanf(line.c_str(), "mla: β = %lf: KL %lf", &share, &kl) == 2 && kl < least) least = kl, best = share;
  }
  EXPECT_NE(read_text(path("searched/README.md"))
                .find("| values' share β | " + std::to_string(best).substr(0, best < 1 ? 3 : 1) + ", searched |"),
            std::string::npos)
      << best;
}

TEST(Convert, AFullDiskLeavesTheTargetAsItWas) {
  const std::string file = gqa_model();
  fs::create_directories(path("full-disk"));
  write_text(path("full-disk/config.json"), "{}");
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit small{20000, before.rlim_max};
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);  // the program inherits both
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const Outcome o = run({"convert", file, "-o", path("full-disk"), "--cut", "50%", "--calibrate", path("calibration.txt"),
                         "--calibration-window", "64", "--force"});
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(o.code, 1) << o.err;
  EXPECT_NE(o.err.find("mla: error: "), std::string::npos) << o.err;
  EXPECT_EQ(read_text(path("full-disk/config.json")), "{}");
  for (const auto& entry : fs::directory_iterator(scratch())) EXPECT_EQ(entry.path().filename().string().find(".draft"), std::string::npos);
}

TEST(Convert, AnInterruptedRunLeavesTheTargetAsItWas) {
  const std::string file = gqa_model();
  fs::create_directories(path("kept"));
  write_text(path("kept/config.json"), "{}");
  std::string text;
  for (int i = 0; text.size() < 300000; ++i) text += "Word " + std::to_string(i) + " ";
  write_text(path("long.txt"), text);
  const Outcome o = run(Call{
      {"convert", file, "-o", path("kept"), "--cut", "50%", "--calibrate", path("long.txt"), "--calibration-tokens", "300000", "--force"},
      {},
      [calls = 0](const Outcome&) mutable { return ++calls > 20; }});
  EXPECT_EQ(o.code, 130) << o.err;
  EXPECT_EQ(read_text(path("kept/config.json")), "{}");
  for (const auto& entry : fs::directory_iterator(scratch())) EXPECT_EQ(entry.path().filename().string().find(".draft"), std::string::npos);
}

}  // namespace
}  // namespace mla::test
