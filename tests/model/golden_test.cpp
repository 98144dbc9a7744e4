// Small checkpoints of every family against the float64 model of tools/golden/reference.py: logits and greedy continuations.
#include "model/make.h"

#include "golden.h"

#include "core/threads.h"

namespace mla::test {
namespace {

// Products follow the weights' precision: with f32 weights only rounding in f32 is left, with bf16 weights activations are bf16 too.
double tolerance(const std::string& name) { return name.ends_with("bf16") ? 3e-2 : 1e-3; }

class Goldens : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(All, Goldens, testing::ValuesIn(all_goldens()), test_name);

TEST_P(Goldens, LogitsOfTheWholeSequence) {
  const Golden golden = read_golden(GetParam());
  Model model = load(golden.folder);
  ASSERT_EQ(model.config().vocab_size, golden.vocab());
  EXPECT_LE(difference(run(model, golden, {.chunk = 512}), golden.logits).max, tolerance(GetParam()));
}

TEST_P(Goldens, GreedyContinuation) {
  if (GetParam().ends_with("bf16")) GTEST_SKIP() << "bf16 products may take the other of two close tokens";
  const Golden golden = read_golden(GetParam());
  Model model = load(golden.folder);
  const std::span<const int32_t> prompt(golden.ids.data(), 32);
  for (const MlaForm form : {MlaForm::automatic, MlaForm::absorbed, MlaForm::expanded}) {
    model.form = form;
    EXPECT_EQ(continue_greedily(model, prompt, golden.greedy.size()), golden.greedy);
  }
}

// Cache types lose precision in the rows only. A token whose experts change is off by more, so it is the median that is bounded; a NaN
// or a wrong row would be far from the maximum allowed.
TEST_P(Goldens, CacheTypes) {
  const Golden golden = read_golden(GetParam()).first(130);
  Model model = load(golden.folder);
  struct Case {
    DType type;
    double median;
  };
  for (const auto& [type, median] : {Case{DType::f16, 1.5e-3}, Case{DType::bf16, 1.5e-3}, Case{DType::i8, 3e-3}, Case{DType::f8, 1.2e-2}})
    for (const MlaForm form : {MlaForm::absorbed, MlaForm::expanded})
      for (const size_t chunk : {1, 130}) {
        const Difference d = difference(run(model, golden, {.form = form, .kv = type, .chunk = chunk}), golden.logits);
        EXPECT_LE(d.median, median) << info(type).name << ", chunks of " << chunk;
        EXPECT_LE(d.max, 0.3) << info(type).name << ", chunks of " << chunk;
      }
}

// A GGUF of the same weights gives the same logits: names, permuted rows and metadata all come back.
TEST_P(Goldens, SurvivesTheWayThroughGguf) {
  const Golden golden = read_golden(GetParam()).first(300);
  if (GetParam() == "mistral") GTEST_SKIP() << "GGUF files of the llama architecture carry no sliding window";
  const Scratch scratch;
  quantize_model(Checkpoint::open(golden.folder), scratch / "model.gguf", GetParam().ends_with("bf16") ? DType::bf16 : DType::f32,
                 cpu().threads());
  Model model = load(scratch / "model.gguf");
  EXPECT_LE(difference(run(model, golden), golden.logits).max, tolerance(GetParam()));
}

class MlaGoldens : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(All, MlaGoldens, testing::ValuesIn(mla_goldens), test_name);

TEST_P(MlaGoldens, AbsorbedAndExpandedAlike) {
  const Golden golden = read_golden(GetParam());
  Model model = load(golden.folder);
  for (const MlaForm form : {MlaForm::absorbed, MlaForm::expanded})
    EXPECT_LE(difference(run(model, golden, {.form = form, .chunk = 1000}), golden.logits).max, tolerance(GetParam()));
}

// llama.cpp's two ways to store W_UK and W_UV, written by the gguf package (tools/golden/make_gguf.py).
TEST(GgufForms, FusedAndSplitGiveTheSameLogits) {
  const Golden golden = read_golden("dsv2-q-group").first(300);
  std::vector<std::vector<float>> logits;
  for (const char* file : {"deepseek2-fused.gguf", "deepseek2-split.gguf"}) {
    Model model = load(golden.folder.parent_path() / file);
    for (const MlaForm form : {MlaForm::absorbed, MlaForm::expanded}) {
      logits.push_back(run(model, golden, {.form = form}));
      EXPECT_LE(difference(logits.back(), golden.logits).max, 1e-3) << file;
    }
  }
  EXPECT_EQ(logits[0], logits[2]);
  EXPECT_EQ(logits[1], logits[3]);
}

}  // namespace
}  // namespace mla::test
