// What each command prints and writes, as scripts rely on it.
#include "program.h"

#include <algorithm>
#include <cmath>

namespace mla::test {
namespace {

const std::vector<std::string> commands{"run",  "chat",    "eval",    "inspect",  "compare", "bench", "quantize",
                                        "init", "convert", "lowrank", "tokenize", "logits",  "doctor"};

std::string model(const std::string& name) { return golden(name).string(); }
std::vector<int32_t> first(std::vector<int32_t> ids, size_t n) { return ids.resize(n), ids; }

// The last line of stderr, which says what was done.
std::string figures(const Outcome& o) {
  const size_t end = o.err.find_last_not_of('\n'), begin = end == std::string::npos ? end : o.err.rfind('\n', end);
  return begin == std::string::npos ? o.err : o.err.substr(begin + 1);
}

// That work goes on shows in its --dump: true when it has this many bytes so far.
std::function<bool(const Outcome&)> dumped(const std::string& name, uintmax_t bytes) {
  return [=](const Outcome&) {
    for (const auto& entry : fs::directory_iterator(scratch()))
      if (entry.path().filename().string().starts_with(name + ".") && entry.file_size() > bytes) return true;
    return false;
  };
}

Json safetensors_header(const std::string& bytes) {
  uint64_t length = 0;
  std::copy_n(bytes.data(), 8, reinterpret_cast<char*>(&length));
  return Json::parse(bytes.substr(8, length));
}

TEST(Help, EveryCommandShowsExamples) {
  for (const std::string& command : commands) {
    const Outcome o = run({command, "--help"});
    EXPECT_EQ(o.code, 0);
    EXPECT_TRUE(o.err.empty()) << o.err;
    EXPECT_NE(o.out.find("usage: mla " + command), std::string::npos) << o.out;
    EXPECT_NE(o.out.find("examples\n  "), std::string::npos) << o.out;
  }
  const Outcome all = run({"--help"});
  for (const std::string& command : commands) EXPECT_NE(all.out.find("\n  " + command + " "), std::string::npos) << command;
  EXPECT_EQ(run({"--version"}).out, "mla 0.1.0\n");
}

TEST(Help, NothingAtAllIsWrongUsage) {
  const Outcome o = run(std::vector<std::string>{});
  EXPECT_EQ(o.code, 2);
  EXPECT_TRUE(o.out.empty());
  EXPECT_NE(o.err.find("usage: mla COMMAND"), std::string::npos);
}

TEST(Run, JsonHoldsTheGoldenContinuation) {
  for (const char* name : {"dsv2-q-group", "llama3"}) {
    write_ids(path("prompt.npy"), first(read_ids(golden(name) / "golden-ids.npy"), 32));
    const auto wanted = read_ids(golden(name) / "golden-greedy.npy");
    const Outcome o = run({"run", model(name), "--ids", path("prompt.npy"), "-n", std::to_string(wanted.size()), "--ignore-eos", "--json",
                           "--kv-type", "f32"});
    ASSERT_EQ(o.code, 0) << o.err;
    const Json json = o.json();
    EXPECT_EQ(json["ids"].get<std::vector<int32_t>>(), wanted) << name;
    EXPECT_EQ(json["prompt_tokens"], 32);
    EXPECT_EQ(json["finish"], "length");
    EXPECT_TRUE(json["text"].is_string());
    EXPECT_GT(json["prefill_tok_s"].get<double>(), 0);
    EXPECT_GT(json["decode_tok_s"].get<double>(), 0);
    EXPECT_GT(json["cache_bytes_per_token"].get<int64_t>(), 0);
  }
}

TEST(Run, CacheBytesFollowTheLayoutAndTheType) {
  write_ids(path("prompt.npy"), {1, 2, 3});
  for (const auto& [type, bytes] :
       {std::pair<const char*, int64_t>{"f32", 3 * 40 * 4}, {"bf16", 3 * 40 * 2}, {"f16", 3 * 40 * 2}, {"i8", 3 * (28 + 24 + 4)}}) {
    const Outcome o = run({"run", model("dsv2-q-group"), "--ids", path("prompt.npy"), "-n", "2", "--json", "--kv-type", type});
    EXPECT_EQ(o.json()["cache_bytes_per_token"], bytes) << type;
    EXPECT_NE(figures(o).find(std::to_string(bytes) + " bytes per token (" + type + ")"), std::string::npos) << o.err;
  }
}

TEST(Run, TextFromArgumentFileAndStdinIsTheSame) {
  write_text(path("prompt.txt"), "Hello");
  const std::vector<std::string> common{"run", small_model(), "-n", "5"};
  auto with = [&](std::vector<std::string> more, const std::string& input) {
    std::vector<std::string> all = common;
    all.insert(all.end(), more.begin(), more.end());
    const Outcome o = run(all, input);
    EXPECT_EQ(o.code, 0) << o.err;
    return o.out;
  };
  const std::string text = with({"--prompt", "Hello"}, "");
  EXPECT_FALSE(text.empty());
  EXPECT_EQ(with({"--prompt-file", path("prompt.txt")}, ""), text);
  EXPECT_EQ(with({"--prompt-file", "-"}, "Hello"), text);
  EXPECT_EQ(with({}, "Hello"), text);
}

TEST(Run, SeveralPromptsAreOneBatchWithTheTextsOfEachAlone) {
  const std::vector<std::string> options{"-n", "6", "--temperature", "1", "--seed", "5", "--json"};
  auto ids = [&](const std::vector<std::string>& prompts) {
    std::vector<std::string> all{"run", small_model()};
    for (const std::string& p : prompts) all.insert(all.end(), {"-p", p});
    all.insert(all.end(), options.begin(), options.end());
    return run(all).json();
  };
  const Json both = ids({"one", "and another"});
  ASSERT_EQ(both["results"].size(), 2u);
  EXPECT_EQ(both["results"][0]["ids"], ids({"one"})["ids"]);
  EXPECT_EQ(both["results"][1]["ids"], ids({"and another"})["ids"]);
  EXPECT_NE(both["results"][0]["ids"], ids({"and another"})["ids"]);
}

TEST(Run, SeedsAndThreads) {
  auto ids = [&](const char* seed, const char* threads) {
    return run({"run", small_model(), "-p", "x", "-n", "12", "--temperature", "1.5", "--seed", seed, "-t", threads, "--json"})
        .json()["ids"];
  };
  EXPECT_EQ(ids("1", "1"), ids("1", "2"));
  EXPECT_NE(ids("1", "1"), ids("2", "1"));
}

TEST(Run, LogprobsAndStops) {
  const Json json = run({"run", small_model(), "-p", "x", "-n", "3", "--ignore-eos", "--logprobs", "2", "--json"}).json();
  ASSERT_EQ(json["logprobs"].size(), 3u);
  EXPECT_EQ(json["logprobs"][0]["top"].size(), 2u);
  EXPECT_EQ(json["logprobs"][0]["id"], json["ids"][0]);
  EXPECT_FLOAT_EQ(json["logprobs"][0]["logprob"].get<float>(), json["logprobs"][0]["top"][0]["logprob"].get<float>());
  // Force a text, then stop in front of it.
  const Json ids = run({"tokenize", small_model(), "--text", "Q", "--json"}).json()["ids"];
  const Json stopped =
      run({"run", small_model(), "-p", "x", "-n", "9", "--logit-bias", ids[0].dump() + "=1000", "--stop", "QQQ", "--json"}).json();
  EXPECT_EQ(stopped["finish"], "stop_string");
  EXPECT_EQ(stopped["text"], "");
  EXPECT_EQ(stopped["ids"].size(), 3u);
}

TEST(Run, ContextPastThePoolIsAClearRefusal) {
  expect_refused({"run", small_model(), "-p", "hello", "-n", "100", "--context", "64"}, {"--context gives 64", "raise --context"});
  EXPECT_EQ(run({"run", small_model(), "-p", "hello", "-n", "20", "--context", "64", "--ignore-eos"}).code, 0);
}

TEST(Run, DumpNamesIntermediates) {
  write_ids(path("prompt.npy"), {1, 2, 3});
  ASSERT_EQ(run({"run", model("dsv2-q-group"), "--ids", path("prompt.npy"), "-n", "2", "--dump", path("dump.safetensors")}).code, 0);
  const std::string bytes = read_text(path("dump.safetensors"));
  const Json header = safetensors_header(bytes);
  EXPECT_EQ(header["layers.2.attn.latent"]["shape"], Json({3, 40}));
  EXPECT_EQ(header["layers.2.attn.latent.2"]["shape"], Json({1, 40}));  // of the decode step
  uint64_t length = 0, end = 0;
  std::copy_n(bytes.data(), 8, reinterpret_cast<char*>(&length));
  for (const auto& [name, entry] : header.items()) end = std::max(end, entry["data_offsets"][1].get<uint64_t>());
  EXPECT_EQ(8 + length + end, bytes.size());
}

TEST(Run, InterruptPrintsWhatWasDone) {
  write_ids(path("prompt.npy"), {1, 2, 3});
  const Outcome o =
      run(Call{{"run", model("dsv2-q-group"), "--ids", path("prompt.npy"), "-n", "200000", "--ignore-eos"}, {}, [](const Outcome& so_far) {
                 return so_far.out.size() > 8;
               }});
  EXPECT_EQ(o.code, 130) << o.err;
  EXPECT_NE(o.err.find("tok/s"), std::string::npos) << o.err;
  EXPECT_NE(o.err.find("mla: interrupted"), std::string::npos) << o.err;
}

TEST(Run, InterruptedJsonIsStillOneObject) {
  write_ids(path("prompt.npy"), {1, 2, 3});
  const Outcome o = run(Call{{"run", model("dsv2-noq-greedy"), "--ids", path("prompt.npy"), "-n", "200000", "--ignore-eos", "--json",
                              "--dump", path("running.safetensors")},
                             {},
                             dumped("running.safetensors", 100000)});
  EXPECT_EQ(o.code, 130) << o.err;
  EXPECT_EQ(o.json()["finish"], "cancelled");
  EXPECT_GT(o.json()["ids"].size(), 0u);
}

// A command that has a long prompt to run, in so many passes, interrupted in its first layers: it must not reach the last.
Outcome interrupt_in_a_chunk(std::vector<std::string> arguments, const std::string& input = {}, int passes = 1) {
  const std::string dump = arguments[0] + ".safetensors";
  arguments.insert(arguments.begin() + 1, {deep_model(), "-t", "1", "--dump", path(dump)});
  const Outcome o = run(Call{std::move(arguments), input, dumped(dump, 1000000)});
  EXPECT_EQ(o.code, 130) << o.err;
  EXPECT_TRUE(o.err.ends_with("mla: interrupted\n")) << o.err;
  const Json header = safetensors_header(read_text(path(dump)));
  EXPECT_TRUE(header.contains("layers.0.attn.query"));
  const std::string last = "layers." + std::to_string(deep_layers - 1) + ".attn.query";
  EXPECT_FALSE(header.contains(passes == 1 ? last : last + "." + std::to_string(passes)));
  return o;
}

TEST(Interrupt, EndsALongPromptWithinItsChunk) {
  write_ids(path("long.npy"), std::vector<int32_t>(2048, 7));
  const Json text = interrupt_in_a_chunk({"run", "--ids", path("long.npy"), "-n", "4", "--json"}).json();
  EXPECT_EQ(text["finish"], "cancelled");
  EXPECT_EQ(text["prompt_tokens"], 2048);
  EXPECT_TRUE(text["ids"].empty());
  EXPECT_TRUE(text["prefill_tok_s"].is_null());
  const Json score = interrupt_in_a_chunk({"eval", "--ids", path("long.npy"), "--context", "2048", "--json"}, {}, 4).json();
  EXPECT_EQ(score["windows"], 0);
  EXPECT_LT(score["tokens_scored"].get<int>(), 2047);
  interrupt_in_a_chunk({"logits", "--ids", path("long.npy"), "--chunk", "2048", "-o", path("never.npy")});
  EXPECT_FALSE(fs::exists(path("never.npy")));
  EXPECT_TRUE(interrupt_in_a_chunk({"bench", "--prompt", "2048", "--depth", "0", "--batch", "0", "--json"}).json()["rows"].empty());
  interrupt_in_a_chunk({"chat", "--chat-template", "chatml", "-n", "4"}, std::string(2000, 'x') + "\n/stats\n");
}

TEST(Logits, AreTheGoldenOnes) {
  const fs::path folder = golden("dsv2-q-group");
  for (const char* form : {"auto", "absorbed", "expanded"}) {
    const Outcome o =
        run({"logits", folder.string(), "--ids", (folder / "golden-ids.npy").string(), "--rows", (folder / "golden-rows.npy").string(),
             "--chunk", "300", "--attention", form, "--kv-type", "f32", "-o", path("logits.npy")});
    ASSERT_EQ(o.code, 0) << o.err;
    EXPECT_TRUE(o.out.empty());
    int64_t rows = 0, cols = 0, golden_rows = 0, golden_cols = 0;
    const auto got = read_floats(path("logits.npy"), rows, cols),
               wanted = read_floats(folder / "golden-logits.npy", golden_rows, golden_cols);
    ASSERT_EQ(rows, golden_rows);
    ASSERT_EQ(cols, golden_cols);
    float most = 0, high = 0;
    for (size_t i = 0; i < got.size(); ++i)
      most = std::max(most, std::fabs(got[i] - wanted[i])), high = std::max(high, std::fabs(wanted[i]));
    EXPECT_LT(most, 1e-3F * high) << form;
  }
}

TEST(Logits, RowsComeInTheOrderAskedFor) {
  write_ids(path("ids.npy"), {5, 9, 17, 3, 8});
  write_ids(path("rows.npy"), {4, 0, 4});
  ASSERT_EQ(run({"logits", model("llama3"), "--ids", path("ids.npy"), "-o", path("all.npy")}).code, 0);
  ASSERT_EQ(run({"logits", model("llama3"), "--ids", path("ids.npy"), "--rows", path("rows.npy"), "-o", path("some.npy")}).code, 0);
  int64_t rows = 0, cols = 0;
  const auto all = read_floats(path("all.npy"), rows, cols);
  EXPECT_EQ(rows, 5);
  const auto some = read_floats(path("some.npy"), rows, cols);
  ASSERT_EQ(rows, 3);
  const auto row = [&](int64_t i) { return std::vector<float>(all.begin() + i * cols, all.begin() + (i + 1) * cols); };
  for (const auto& [at, from] : {std::pair<int64_t, int64_t>{0, 4}, {1, 0}, {2, 4}})
    EXPECT_EQ(std::vector<float>(some.begin() + at * cols, some.begin() + (at + 1) * cols), row(from)) << at;
}

TEST(Eval, IsTheLikelihoodOfTheLogits) {
  const auto ids = first(read_ids(golden("llama3") / "golden-ids.npy"), 50);
  write_ids(path("ids.npy"), ids);
  // Two windows of 20; the ten tokens behind them make no window.
  const Json json = run({"eval", model("llama3"), "--ids", path("ids.npy"), "--context", "20", "--kv-type", "f32", "--json"}).json();
  EXPECT_EQ(json["tokens"], 50);
  EXPECT_EQ(json["windows"], 2);
  EXPECT_EQ(json["tokens_scored"], 38);
  double nll = 0;
  for (int window = 0; window < 2; ++window) {
    const std::vector<int32_t> part(ids.begin() + 20 * window, ids.begin() + 20 * (window + 1));
    write_ids(path("part.npy"), part);
    ASSERT_EQ(run({"logits", model("llama3"), "--ids", path("part.npy"), "--kv-type", "f32", "-o", path("part-logits.npy")}).code, 0);
    int64_t rows = 0, cols = 0;
    const auto logits = read_floats(path("part-logits.npy"), rows, cols);
    for (int64_t i = 0; i + 1 < rows; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < cols; ++j) sum += std::exp(double(logits[size_t(i * cols + j)]));
      nll += std::log(sum) - logits[size_t(i * cols + part[size_t(i + 1)])];
    }
  }
  EXPECT_NEAR(json["nll"].get<double>(), nll / 38, 1e-5);
  EXPECT_NEAR(json["perplexity"].get<double>(), std::exp(nll / 38), 1e-3);
}

TEST(Eval, StrideWindowsAndShortTexts) {
  write_text(path("text.txt"), std::string(100, 'a'));
  const Json tokens = run({"tokenize", small_model(), "--file", path("text.txt"), "--json"}).json()["tokens"];
  const auto n = tokens.get<int64_t>();
  const Json strided = run({"eval", small_model(), "--file", path("text.txt"), "--context", "20", "--stride", "10", "--json"}).json();
  EXPECT_GE(strided["tokens"].get<int64_t>(), n);
  EXPECT_EQ(strided["windows"], 1 + (strided["tokens"].get<int64_t>() - 20) / 10);
  EXPECT_EQ(strided["tokens_scored"], strided["windows"].get<int64_t>() * 19);
  EXPECT_EQ(run({"eval", small_model(), "--file", path("text.txt"), "--context", "20", "--windows", "1", "--json"}).json()["tokens_scored"],
            19);
  const Json whole = run({"eval", small_model(), "--file", path("text.txt"), "--json"}).json();
  EXPECT_EQ(whole["windows"], 1);
  EXPECT_EQ(whole["tokens_scored"], whole["tokens"].get<int64_t>() - 1);
}

TEST(Tokenize, ThereAndBack) {
  const std::string text = "Hello\n  w\xC3\xB6rld 123";
  const Outcome o = run({"tokenize", small_model(), "--text", text, "--json", "-o", path("text-ids.npy")});
  ASSERT_EQ(o.code, 0) << o.err;
  EXPECT_EQ(o.json()["ids"].get<std::vector<int32_t>>(), read_ids(path("text-ids.npy")));
  EXPECT_EQ(o.json()["bytes"], text.size());
  EXPECT_EQ(run({"tokenize", small_model(), "--decode", path("text-ids.npy")}).out, text);
  EXPECT_EQ(run({"tokenize", small_model(), "--decode", path("text-ids.npy"), "--json"}).json()["text"], text);
}

TEST(Tokenize, ReadsATokenizerJson) {
  const std::string file = (fs::path(MLA_TEST_DATA) / "text" / "tiny_bytes.json").string();
  const Outcome o = run({"tokenize", file, "--text", "<s>", "--parse-special", "--json"});
  ASSERT_EQ(o.code, 0) << o.err;
  EXPECT_EQ(o.json()["ids"], Json({1500}));
  EXPECT_NE(run({"tokenize", file, "--text", "<s>", "--json"}).json()["ids"], Json({1500}));
}

TEST(Inspect, CountsWhatEachAttentionKeeps) {
  const Json json = run({"inspect", model("dsv2-q-group"), "--memory", "1G", "--json"}).json();
  EXPECT_EQ(json["architecture"], "deepseek_v2");
  EXPECT_EQ(json["attention"], "MLA");
  ASSERT_EQ(json["cache"].size(), 4u);
  EXPECT_EQ(json["cache"][0]["elements"], 2 * 4 * 20);  // MHA: 2 n_h d_h
  EXPECT_EQ(json["cache"][2]["elements"], 2 * 20);      // MQA: 2 d_h
  EXPECT_EQ(json["cache"][3]["elements"], 28 + 12);     // MLA: d_c + d_R
  EXPECT_EQ(json["cache"][3]["own"], true);
  EXPECT_EQ(json["cache"][3]["bytes_per_token"]["bf16"], 3 * 40 * 2);
  EXPECT_EQ(json["memory_bytes"], 1e9);
}

TEST(Inspect, PlansFromAConfigAlone) {
  const Outcome o =
      run({"inspect", (golden("llama3") / "config.json").string(), "--memory", "24GiB", "--users", "1,8", "--contexts", "4096"});
  EXPECT_EQ(o.code, 0) << o.err;
  for (const char* words : {"llama", "MHA", "GQA", "MQA", "MLA", "25.8 GB", "users at a context of 4 096", "context of each of 8 users"})
    EXPECT_NE(o.out.find(words), std::string::npos) << words << "\n" << o.out;
}

TEST(Compare, MeasuresAllFour) {
  const Outcome o = run({"compare", model("dsv2-q-group"), "--depth", "64,200", "--repeat", "1", "--json", "--svg", path("chart.svg")});
  ASSERT_EQ(o.code, 0) << o.err;
  const Json rows = o.json()["rows"];
  ASSERT_EQ(rows.size(), 4u);
  EXPECT_EQ(rows[3]["cache_bytes_per_token"], 3 * 40 * 2);
  for (const Json& row : rows) {
    ASSERT_EQ(row["decode"].size(), 2u);
    EXPECT_GT(row["decode"][1]["tok_s"].get<double>(), 0);
  }
  const std::string svg = read_text(path("chart.svg"));
  EXPECT_TRUE(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
  const Outcome table = run({"compare", (golden("llama3") / "config.json").string(), "--depth", "64", "--repeat", "1"});
  EXPECT_NE(table.out.find("| attention"), std::string::npos) << table.out;
  EXPECT_NE(table.out.find("**GQA"), std::string::npos) << table.out;
}

TEST(Bench, RowsHaveTheirLimits) {
  const Outcome o = run({"bench", model("dsv2-q-group"), "--prompt", "24", "--depth", "0,80", "--batch", "1,3", "--repeat", "1", "--steps",
                         "2", "-t", "1", "--ops", "--json"});
  ASSERT_EQ(o.code, 0) << o.err;
  const Json json = o.json();
  ASSERT_EQ(json["rows"].size(), 6u);
  for (const Json& row : json["rows"]) {
    for (const char* key : {"tok_s", "bytes", "ops", "share", "read_gb_s", "f32_gflop_s"})
      EXPECT_GT(row[key].get<double>(), 0) << key << row;
    EXPECT_GE(row["int8_gop_s"].get<double>(), 0);
    EXPECT_EQ(row["threads"], 1);
  }
  EXPECT_EQ(json["rows"][0]["phase"], "prefill");
  EXPECT_EQ(json["rows"][0]["prompt"], 24);
  EXPECT_EQ(json["rows"][5]["phase"], "decode");
  EXPECT_EQ(json["rows"][5]["batch"], 3);
  EXPECT_EQ(json["rows"][5]["depth"], 80);
  EXPECT_GT(json["ops"].size(), 5u);
}

TEST(Doctor, FindsGoldensInOrderAndDamageWrong) {
  const Outcome good = run({"doctor", model("dsv2-noq-greedy"), "--json"});
  EXPECT_EQ(good.code, 0) << good.err << good.out;
  const Json json = good.json();
  for (const Json& check : json["checks"]) EXPECT_NE(check["verdict"], "wrong") << check;
  EXPECT_GT(json["machine"]["all_threads"]["read_gb_s"].get<double>(), 0);
  // One infinite weight, in the middle of the last tensor's bytes.
  fs::copy(golden("llama3"), scratch() / "damaged", fs::copy_options::recursive | fs::copy_options::overwrite_existing);
  std::string bytes = read_text(scratch() / "damaged" / "model.safetensors");
  const float infinite = INFINITY;
  std::copy_n(reinterpret_cast<const char*>(&infinite), 4, bytes.end() - 64);
  fs::permissions(scratch() / "damaged" / "model.safetensors", fs::perms::owner_all);
  write_text(scratch() / "damaged" / "model.safetensors", bytes);
  const Outcome bad = run({"doctor", path("damaged"), "--json"});
  EXPECT_EQ(bad.code, 1);
  EXPECT_EQ(bad.json()["wrong"], 1);
}

TEST(QuantizeAndInit, WriteWhatRuns) {
  for (const char* type : {"q8_0", "bf16"}) {
    const Outcome o = run({"quantize", model("llama3"), "-o", path("quantized.gguf"), "--type", type});
    ASSERT_EQ(o.code, 0) << o.err;
    write_ids(path("prompt.npy"), {1, 2, 3});
    EXPECT_EQ(run({"run", path("quantized.gguf"), "--ids", path("prompt.npy"), "-n", "2", "--json"}).json()["prompt_tokens"], 3);
  }
  ASSERT_EQ(run({"quantize", model("dsv2-q-group"), "-o", path("exported"), "--type", "f32"}).code, 0);
  EXPECT_TRUE(fs::exists(scratch() / "exported" / "config.json"));
  const std::string config = (golden("qwen2") / "config.json").string();
  ASSERT_EQ(run({"init", config, "-o", path("a.gguf"), "--type", "q8_0", "--seed", "4"}).code, 0);
  ASSERT_EQ(run({"init", config, "-o", path("b.gguf"), "--type", "q8_0", "--seed", "4", "-t", "1"}).code, 0);
  EXPECT_EQ(read_text(path("a.gguf")), read_text(path("b.gguf")));
}

TEST(Chat, KeepsItsHistoryInTheCache) {
  const Outcome o =
      run({"chat", small_model(), "--chat-template", "chatml", "--temperature", "0", "-n", "4", "--system", "Be brief."},
          "first\n/stats\nsecond question\n/stats\n/save " + path("talk.txt") + "\n/reset\n/stats\n/nonsense\n/help\n/exit\nnever\n");
  ASSERT_EQ(o.code, 0) << o.err;
  EXPECT_NE(o.err.find("3 messages"), std::string::npos) << o.err;
  EXPECT_NE(o.err.find("5 messages"), std::string::npos) << o.err;
  EXPECT_NE(o.err.find("1 messages; 0 of"), std::string::npos) << o.err;
  EXPECT_NE(o.err.find("no command /nonsense"), std::string::npos) << o.err;
  EXPECT_NE(o.err.find("/again"), std::string::npos) << o.err;
  EXPECT_NE(figures(o).find("prefill"), std::string::npos);
  const std::string saved = read_text(path("talk.txt"));
  EXPECT_NE(saved.find("user:\nfirst\n\nassistant:\n"), std::string::npos) << saved;
  EXPECT_NE(saved.find("user:\nsecond question\n"), std::string::npos) << saved;
}

TEST(Chat, AFullContextIsSaidAndSurvived) {
  const Outcome o =
      run({"chat", small_model(), "--chat-template", "chatml", "--context", "64", "-n", "4"}, std::string(300, 'x') + "\n/stats\n");
  EXPECT_EQ(o.code, 0);
  EXPECT_NE(o.err.find("The context is full"), std::string::npos) << o.err;
  EXPECT_NE(o.err.find("0 messages"), std::string::npos) << o.err;
}

TEST(LowRank, ComparesTheMethodsOnAMatrix) {
  std::vector<float> values;
  for (int i = 0; i < 12; ++i)
    for (int j = 0; j < 9; ++j) values.push_back(float(1.0 / (1 + i + j) + (i == j ? 2.0 : 0.0) / (1 + i)));
  write_floats(path("matrix.npy"), values, 12, 9);
  const Outcome o = run({"lowrank", path("matrix.npy"), "--rank", "3", "--svg", path("lowrank.svg"), "--json"});
  ASSERT_EQ(o.code, 0) << o.err;
  const Json json = o.json();
  EXPECT_EQ(json["shape"], Json({12, 9}));
  EXPECT_EQ(json["rank"], 3);
  ASSERT_EQ(json["singular_values"].size(), 9U);
  double tail = 0, all = 0;
  for (size_t i = 0; i < 9; ++i) {
    const auto s = json["singular_values"][i].get<double>();
    all += s * s;
    if (i >= 3) tail += s * s;
  }
  ASSERT_EQ(json["methods"].size(), 4U);
  for (const Json& method : json["methods"]) EXPECT_GE(method["error"].get<double>(), std::sqrt(tail / all) * (1 - 1e-6)) << method;
  EXPECT_EQ(json["methods"][0]["method"], "svd");
  EXPECT_NEAR(json["methods"][0]["error"].get<double>(), std::sqrt(tail / all), 1e-6);
  EXPECT_NE(read_text(path("lowrank.svg")).find("<svg"), std::string::npos);

  const Outcome table = run({"lowrank", path("matrix.npy"), "--rank", "9"});
  ASSERT_EQ(table.code, 0) << table.err;
  for (const char* method : {"svd", "qr", "rsvd", "cur"}) EXPECT_NE(table.out.find(std::string("\n  ") + method), std::string::npos);
}

TEST(LowRank, TakesTensorsOfSafetensorsAndModels) {
  const std::string file = (golden("llama3") / "model.safetensors").string();
  const Outcome raw = run({"lowrank", file, "--tensor", "model.layers.0.self_attn.q_proj.weight", "--rank", "4", "--json"});
  ASSERT_EQ(raw.code, 0) << raw.err;
  const Outcome ours = run({"lowrank", model("llama3"), "--tensor", "layers.0.attn.q", "--rank", "4", "--json"});
  ASSERT_EQ(ours.code, 0) << ours.err;
  EXPECT_EQ(raw.json()["singular_values"], ours.json()["singular_values"]);
}

}  // namespace
}  // namespace mla::test
