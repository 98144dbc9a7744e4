// Generation: the same text whatever batch, chunks and threads; ends, stop strings, interruption, a full cache.
#include "model/generate.h"

#include "core/check.h"
#include "golden.h"
#include "machines.h"

#include <atomic>
#include <cmath>
#include <map>

namespace mla {
namespace {

using test::read_golden;

// One model a family for all tests.
Model& model(const std::string& name) {
  static std::map<std::string, std::unique_ptr<Model>> models;
  auto& m = models[name];
  if (!m) m = std::make_unique<Model>(Checkpoint::open(read_golden(name).folder), test::cpu());
  return *m;
}

std::vector<int32_t> prompt_of(const std::string& name, size_t from, size_t n) {
  const auto ids = read_golden(name).ids;
  return {ids.begin() + ptrdiff_t(from), ids.begin() + ptrdiff_t(from + n)};
}

// "a" to "z" by id, so that text and stop strings can be looked at.
std::string letter(int32_t id) { return std::string(1, char('a' + id % 26)); }

GenerateHooks letters() {
  GenerateHooks hooks;
  hooks.spell = [](size_t, std::optional<int32_t> id) { return id ? letter(*id) : std::string(); };
  return hooks;
}

std::vector<Generation> run(Model& m, const std::vector<std::vector<int32_t>>& prompts, const GenerateOptions& o,
                            const GenerateHooks& hooks = {}) {
  LatentCache cache = m.make_cache(16384, DType::f32);
  std::vector<Generation> texts(prompts.size());
  for (size_t i = 0; i < texts.size(); ++i) texts[i].tokens = prompts[i], texts[i].sequence = cache.open();
  generate(m, cache, texts, o, hooks);
  return texts;
}

std::vector<int32_t> new_ids(const Generation& text) {
  std::vector<int32_t> ids;
  for (const Sampled& s : text.sampled) ids.push_back(s.token);
  return ids;
}

class Generate : public testing::TestWithParam<std::string> {};

TEST_P(Generate, GreedyIsTheGoldenContinuation) {
  const auto golden = read_golden(GetParam());
  GenerateOptions o;
  o.max_tokens = int64_t(golden.greedy.size());
  EXPECT_EQ(new_ids(run(model(GetParam()), {prompt_of(GetParam(), 0, 32)}, o)[0]), golden.greedy);
}

TEST_P(Generate, SameSeedSameTextWhateverBatch) {
  GenerateOptions o;
  o.max_tokens = 12;
  o.sampling.temperature = 1.2;
  o.sampling.seed = 3;
  const std::vector<std::vector<int32_t>> prompts{prompt_of(GetParam(), 0, 5), prompt_of(GetParam(), 7, 130), prompt_of(GetParam(), 20, 1)};
  const auto together = run(model(GetParam()), prompts, o);
  for (size_t i = 0; i < prompts.size(); ++i) EXPECT_EQ(new_ids(run(model(GetParam()), {prompts[i]}, o)[0]), new_ids(together[i])) << i;
}

TEST_P(Generate, SameSeedSameTextWhateverThreads) {
  GenerateOptions o;
  o.max_tokens = 12;
  o.sampling.temperature = 1.2;
  const auto two = run(model(GetParam()), {prompt_of(GetParam(), 0, 90)}, o);
  for (int threads : {1, 3}) {
    const auto device = make_cpu(threads);
    Model other(Checkpoint::open(read_golden(GetParam()).folder), *device);
    EXPECT_EQ(new_ids(run(other, {prompt_of(GetParam(), 0, 90)}, o)[0]), new_ids(two[0])) << threads;
  }
}

TEST_P(Generate, APassThatIsGivenUpLeavesNoTrace) {
  Model& m = model(GetParam());
  const auto ids = prompt_of(GetParam(), 0, 150);
  const std::vector<int32_t> others(ids.rbegin() + 10, ids.rbegin() + 90);  // longer than what comes in their place
  LatentCache cache = m.make_cache(256, DType::f32), unharmed = m.make_cache(256, DType::f32);
  const int sequence = cache.open(), same = unharmed.open();
  const std::span<const int32_t> all(ids), first = all.first(80), second = all.subspan(80);
  test::step(m, unharmed, same, first);
  const auto wanted = test::step(m, unharmed, same, second, Chunk::Logits::all);
  test::step(m, cache, sequence, first);
  for (int layer = 0; layer < m.config().num_hidden_layers; ++layer) {
    const Chunk chunk{sequence, others};
    int left = layer;
    const auto give_up = [&](double) {
      if (left-- == 0) throw Error(ErrorKind::interrupted, "enough");
    };
    EXPECT_THROW(m.forward(std::span(&chunk, 1), cache, give_up), Error);
    EXPECT_EQ(left, -1);
    EXPECT_EQ(cache.length(sequence), 80);
    EXPECT_EQ(cache.free_tokens(), 128);
  }
  EXPECT_EQ(test::step(m, cache, sequence, second, Chunk::Logits::all), wanted);
}

INSTANTIATE_TEST_SUITE_P(Models, Generate, testing::Values("dsv2-q-group", "dsv2-noq-greedy", "llama3", "qwen2"), test::test_name);

// A device that chooses ids, as a GPU does, and knows those that steps name.
class Chooser final : public FromHost {
 public:
  Chooser() : FromHost(make_cpu(2)) {}
  int named = 0;

  bool choose(Tensor logits, double temperature, std::span<const double> at) override {
    ids_.clear();
    for (int64_t r = 0; r < logits.shape[0]; ++r) {
      const std::span<const float> row(logits.f32() + r * logits.stride[0], size_t(logits.shape[1]));
      const auto best = std::max_element(row.begin(), row.end());
      auto id = best - row.begin();
      if (temperature > 0) {
        double left = 0;
        for (const float x : row) left += at[size_t(r)] * std::exp((double(x) - *best) / temperature);
        for (id = 0; (left -= std::exp((double(row[size_t(id)]) - *best) / temperature)) >= 0;) ++id;
      }
      ids_.push_back(int32_t(id));
    }
    return true;
  }
  void chosen(std::span<int32_t> ids) override { std::copy(ids_.begin(), ids_.end(), ids.begin()); }
  void embed(std::span<const int32_t> ids, const Weight& w, Tensor out) override {
    std::vector<int32_t> known(ids.begin(), ids.end());
    for (int32_t& id : known)
      if (id < 0) id = ids_[size_t(-1 - id)], ++named;
    FromHost::embed(known, w, out);
  }

 private:
  std::vector<int32_t> ids_;
};

TEST(GenerateAhead, TextsAreTheSame) {
  const std::string name = "dsv2-q-group";
  Chooser chooser;
  Model ahead(Checkpoint::open(read_golden(name).folder), chooser);
  const std::vector<std::vector<int32_t>> prompts{prompt_of(name, 0, 5), prompt_of(name, 7, 130), prompt_of(name, 20, 1)};
  struct Outcome {
    std::vector<std::vector<int32_t>> ids;
    std::vector<std::string> text;
    std::vector<Finish> finish;
    std::vector<int64_t> cached;
    int64_t decoded;
    bool operator==(const Outcome&) const = default;
  };
  auto outcome = [&](Model& m, const GenerateOptions& o, int64_t room, int64_t most_layers) {
    LatentCache cache = m.make_cache(room, DType::f32);
    std::vector<Generation> texts(prompts.size());
    for (size_t i = 0; i < texts.size(); ++i) texts[i].tokens = prompts[i], texts[i].sequence = cache.open();
    GenerateHooks hooks = letters();
    int64_t layers = 0;
    hooks.cancelled = [&] { return ++layers > most_layers; };
    Outcome out{};
    out.decoded = generate(m, cache, texts, o, hooks).decode_tokens;
    for (const Generation& t : texts) {
      out.ids.push_back(new_ids(t)), out.text.push_back(t.text), out.finish.push_back(t.finish);
      out.cached.push_back(cache.length(t.sequence));
    }
    return out;
  };
  const int64_t layers = ahead.config().num_hidden_layers;
  for (const double temperature : {0.0, 1.2}) {
    GenerateOptions o;
    o.max_tokens = 70;
    o.sampling.temperature = temperature;
    const Outcome free = outcome(model(name), o, 4096, 1 << 20);
    chooser.named = 0;
    EXPECT_EQ(outcome(ahead, o, 4096, 1 << 20), free);
    EXPECT_EQ(chooser.named, 3 * 68);  // all but the first of each and the last, which no step follows
    EXPECT_EQ(outcome(ahead, o, 384, 1 << 20), outcome(model(name), o, 384, 1 << 20)) << "a full cache";
    EXPECT_EQ(outcome(ahead, o, 4096, 5 * layers + 1), outcome(model(name), o, 4096, 5 * layers + 1)) << "cancelled";
    // Ends that differ from text to text, one of them where a page ends.
    o.end_tokens = {free.ids[1][62]};
    o.stop_strings = {free.text[0].substr(20, 3)};
    EXPECT_EQ(outcome(ahead, o, 4096, 1 << 20), outcome(model(name), o, 4096, 1 << 20));
    EXPECT_EQ(outcome(ahead, o, 384, 1 << 20), outcome(model(name), o, 384, 1 << 20));
  }
}

TEST(GenerateEnds, EndTokensEndAndAreKeptAmongTheIds) {
  GenerateOptions o;
  o.max_tokens = 10;
  const auto free = new_ids(run(model("llama3"), {prompt_of("llama3", 0, 20)}, o, letters())[0]);
  const auto first = size_t(std::find(free.begin(), free.end(), free[4]) - free.begin());
  o.end_tokens = {free[4]};
  const Generation text = run(model("llama3"), {prompt_of("llama3", 0, 20)}, o, letters())[0];
  EXPECT_EQ(text.finish, Finish::end_token);
  EXPECT_EQ(new_ids(text), std::vector<int32_t>(free.begin(), free.begin() + ptrdiff_t(first + 1)));
  EXPECT_EQ(text.text.size(), first);
}

TEST(GenerateEnds, StopStringsCutTheTextAndAreNeverShown) {
  GenerateOptions o;
  o.max_tokens = 10;
  const std::string free = run(model("llama3"), {prompt_of("llama3", 0, 20)}, o, letters())[0].text;
  ASSERT_EQ(free.size(), 10u);
  o.stop_strings = {free.substr(5, 3), "never there"};
  std::string shown;
  GenerateHooks hooks = letters();
  hooks.on_text = [&](size_t, std::string_view piece) { shown += piece; };
  const Generation text = run(model("llama3"), {prompt_of("llama3", 0, 20)}, o, hooks)[0];
  EXPECT_EQ(text.finish, Finish::stop_string);
  EXPECT_EQ(text.text, free.substr(0, free.find(o.stop_strings[0])));
  EXPECT_EQ(shown, text.text);
}

TEST(GenerateEnds, CancelledTextsKeepWhatThereIs) {
  GenerateOptions o;
  o.max_tokens = 100;
  int layers = 0;
  GenerateHooks hooks;
  // One prefill step, three more, and a layer of the next.
  hooks.cancelled = [&] { return ++layers > 4 * model("llama3").config().num_hidden_layers + 1; };
  const auto texts = run(model("llama3"), {prompt_of("llama3", 0, 20), prompt_of("llama3", 3, 9)}, o, hooks);
  for (const Generation& text : texts) {
    EXPECT_EQ(text.finish, Finish::cancelled);
    EXPECT_EQ(text.sampled.size(), 4u);
  }
}

TEST(GenerateEnds, AFullCacheEndsTheTextsAndSaysSo) {
  Model& m = model("llama3");
  LatentCache cache = m.make_cache(64, DType::f32);
  Generation text;
  text.sequence = cache.open();
  text.tokens = prompt_of("llama3", 0, 60);
  GenerateOptions o;
  generate(m, cache, std::span(&text, 1), o);
  EXPECT_EQ(text.finish, Finish::cache_full);
  EXPECT_EQ(text.sampled.size(), 5u);  // four that entered the cache and one that would be the 65th
  EXPECT_EQ(cache.length(text.sequence), 64);
}

TEST(GenerateEnds, NoTokensWantedRunsThePromptAlone) {
  GenerateOptions o;
  o.max_tokens = 0;
  const Generation text = run(model("llama3"), {prompt_of("llama3", 0, 20)}, o)[0];
  EXPECT_EQ(text.finish, Finish::length);
  EXPECT_TRUE(text.sampled.empty());
}

TEST(GenerateHistory, OnlyNewTokensAreRun) {
  Model& m = model("dsv2-noq-greedy");
  const auto whole = prompt_of("dsv2-noq-greedy", 0, 150);
  GenerateOptions o;
  o.max_tokens = 6;
  const auto cold = new_ids(run(m, {whole}, o)[0]);
  LatentCache cache = m.make_cache(1024, DType::f32);
  Generation first, second;
  first.sequence = second.sequence = cache.open();
  first.tokens = {whole.begin(), whole.begin() + 100};
  o.max_tokens = 0;
  generate(m, cache, std::span(&first, 1), o);
  second.tokens = whole;
  o.max_tokens = 6;
  const GenerateFigures figures = generate(m, cache, std::span(&second, 1), o);
  EXPECT_EQ(figures.prefill_tokens, 50);
  EXPECT_EQ(figures.decode_tokens, 5);
  EXPECT_EQ(new_ids(second), cold);
}

TEST(GenerateHistory, GoesOnAfterAPrefillThatWasCancelledWithinAChunk) {
  Model& m = model("dsv2-noq-greedy");
  GenerateOptions o;
  o.max_tokens = 6;
  o.prefill_chunk = 64;
  const auto prompt = prompt_of("dsv2-noq-greedy", 0, 150);
  const auto cold = new_ids(run(m, {prompt}, o)[0]);
  LatentCache cache = m.make_cache(256, DType::f32);
  Generation text;
  text.sequence = cache.open();
  text.tokens = prompt;
  int layers = 0;
  double last = 0;
  GenerateHooks hooks;
  hooks.cancelled = [&] { return ++layers > m.config().num_hidden_layers + 1; };
  hooks.on_prefill = [&](double fraction) {
    EXPECT_GE(fraction, last);
    last = fraction;
  };
  const GenerateFigures figures = generate(m, cache, std::span(&text, 1), o, hooks);
  EXPECT_EQ(text.finish, Finish::cancelled);
  EXPECT_TRUE(text.sampled.empty());
  EXPECT_EQ(figures.prefill_tokens, 64);
  EXPECT_EQ(cache.length(text.sequence), 64);
  text.finish = Finish::running;
  EXPECT_EQ(generate(m, cache, std::span(&text, 1), o).prefill_tokens, 150 - 64);
  EXPECT_EQ(new_ids(text), cold);
}

TEST(GenerateHistory, LongPromptsThatDoNotFitOneStepTakeTurns) {
  const auto ids = prompt_of("llama3", 0, 150);
  std::vector<std::vector<int32_t>> prompts(3);
  for (size_t i = 0; i < 3; ++i)
    while (int64_t(prompts[i].size()) < test::cpu().step_tokens * 3 / 5)
      prompts[i].insert(prompts[i].end(), ids.begin() + int64_t(i), ids.end());
  prompts[2].resize(100);  // fits beside the first
  GenerateOptions o;
  o.max_tokens = 3;
  const auto together = run(model("llama3"), prompts, o);
  for (size_t i = 0; i < 3; ++i) EXPECT_EQ(new_ids(run(model("llama3"), {prompts[i]}, o)[0]), new_ids(together[i])) << i;
}

TEST(GenerateHistory, APromptWithoutTokensIsRefused) { EXPECT_THROW(run(model("llama3"), {{}}, {}), Error); }

TEST(StopScan, FindsStopsAcrossPieces) {
  const std::vector<std::string> stops{"abc", "x"};
  const StopScan scan(stops);
  std::string text = "12";
  EXPECT_FALSE(scan.append(text, "a"));
  EXPECT_EQ(scan.settled(text), 2u);
  EXPECT_FALSE(scan.append(text, "ba"));
  EXPECT_EQ(scan.settled(text), 4u);
  EXPECT_FALSE(scan.append(text, "b"));
  EXPECT_TRUE(scan.append(text, "cd x"));
  EXPECT_EQ(text, "12ab");
}

TEST(StopScan, TheEarliestOfSeveralCuts) {
  const std::vector<std::string> stops{"later", "soon"};
  std::string text;
  EXPECT_TRUE(StopScan(stops).append(text, "so soon, later"));
  EXPECT_EQ(text, "so ");
}

}  // namespace
}  // namespace mla
