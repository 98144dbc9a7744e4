// The goldens on a GPU, where there is one: every form, chunk and type of cache, batches, graphs of decode steps, and generation.
#include "core/check.h"
#include "core/random.h"
#include "golden.h"
#include "model/generate.h"
#include "model/make.h"

namespace mla::test {
namespace {

Device* gpu() {
  static const std::unique_ptr<Device> device = [] {
    try {
      return make_cuda(0);
    } catch (const Error& e) {
      if (e.kind() != ErrorKind::input) throw;  // there is one, and it fails
      return std::unique_ptr<Device>();
    }
  }();
  return device.get();
}

// f32 products and caches run in f32; bf16 activations round every product. Half of a token's logits must be near: the other of two close
// experts moves all of a token's.
constexpr double f32_median = 1e-4, bf16_median = 1e-2, most = 0.3;

class Gpu : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    if (!gpu()) GTEST_SKIP() << "no GPU here";
  }
  double median() const { return GetParam().ends_with("bf16") ? bf16_median : f32_median; }
};
INSTANTIATE_TEST_SUITE_P(All, Gpu, testing::ValuesIn(all_goldens()), test_name);

TEST_P(Gpu, LogitsOfTheWholeSequence) {
  const Golden golden = read_golden(GetParam());
  Model model = load(golden.folder, *gpu());
  for (const size_t chunk : {512, 100}) {
    const Difference d = difference(run(model, golden, {.chunk = chunk}), golden.logits);
    EXPECT_LE(d.median, median());
    EXPECT_LE(d.max, GetParam().ends_with("bf16") ? most : 1e-3);
  }
}

TEST_P(Gpu, CacheTypesFormsAndChunks) {
  const Golden golden = read_golden(GetParam()).first(130);
  Model model = load(golden.folder, *gpu());
  for (const DType type : {DType::f32, DType::f16, DType::bf16, DType::i8, DType::f8})
    for (const MlaForm form : {MlaForm::absorbed, MlaForm::expanded})
      for (const size_t chunk : {1, 7, 130}) {
        const Difference d = difference(run(model, golden, {.form = form, .kv = type, .chunk = chunk}), golden.logits);
        EXPECT_LE(d.median, type == DType::f8 ? 2 * bf16_median : bf16_median) << info(type).name << ", chunks of " << chunk;
        EXPECT_LE(d.max, most) << info(type).name << ", chunks of " << chunk;
      }
}

TEST_P(Gpu, GreedyContinuation) {
  if (GetParam().ends_with("bf16")) GTEST_SKIP() << "bf16 products may take the other of two close tokens";
  const Golden golden = read_golden(GetParam());
  Model model = load(golden.folder, *gpu());
  EXPECT_EQ(continue_greedily(model, std::span(golden.ids.data(), 32), golden.greedy.size()), golden.greedy);
}

// Quantised weights as they are, against the CPU with the same file.
TEST_P(Gpu, QuantisedWeightsAreThoseOfTheCpu) {
  const Golden golden = read_golden(GetParam()).first(100);
  if (GetParam() == "mistral") GTEST_SKIP() << "GGUF files of the llama architecture carry no sliding window";
  for (const DType type : {DType::q8_0, DType::q4_0, DType::f8}) {
    const Scratch scratch;
    const auto file = scratch / (type == DType::f8 ? "model" : "model.gguf");
    const Checkpoint checkpoint = Checkpoint::open(golden.folder);
    if (type == DType::f8)
      export_hf(checkpoint, file, type, cpu().threads());
    else
      quantize_model(checkpoint, file, type, cpu().threads());
    Model here = load(file), there = load(file, *gpu());
    for (const size_t chunk : {1, 100}) {
      const Difference d = difference(run(there, golden, {.chunk = chunk}), run(here, golden, {.chunk = chunk}));
      EXPECT_LE(d.median, 2e-2) << info(type).name << ", chunks of " << chunk;
      EXPECT_LE(d.max, most) << info(type).name << ", chunks of " << chunk;
    }
  }
}

// Decode steps of several sequences repeat what was recorded; sequences end at different times, fork, and prompts come in between.
TEST_P(Gpu, RepeatedStepsAreFreshOnes) {
  const Golden golden = read_golden(GetParam()).first(200);
  Model model = load(golden.folder, *gpu());
  const std::span<const int32_t> ids = golden.ids;
  const size_t starts[] = {3, 70, 20};
  LatentCache cache = model.make_cache(2048, DType::bf16);
  std::vector<int> sequences;
  for (const size_t start : starts) {
    sequences.push_back(cache.open());
    step(model, cache, sequences.back(), ids.first(start));
  }
  std::vector<std::vector<float>> last(3);
  for (size_t now = 0; now < 80; ++now) {
    if (now == 40) {  // a prompt takes scratch of another size
      const int other = cache.open();
      step(model, cache, other, ids.first(130));
      cache.close(other);
    }
    std::vector<Chunk> chunks;
    for (size_t i = 0; i < 3; ++i)
      if (i != 2 || now < 30) chunks.push_back({sequences[i], ids.subspan(starts[i] + now, 1)});
    const Tensor logits = model.to_host(model.forward(chunks, cache));
    for (size_t i = 0; i < chunks.size(); ++i) {
      const float* row = logits.f32() + int64_t(i) * logits.stride[0];
      last[i].assign(row, row + logits.shape[1]);
    }
  }
  for (size_t i = 0; i < 2; ++i) {  // the third ended on the way, so that steps are of two sizes
    const size_t length = starts[i] + 80;
    LatentCache fresh = model.make_cache(256, DType::bf16);
    const auto alone = step(model, fresh, fresh.open(), ids.first(length));
    const Difference d = difference(last[i], alone);
    EXPECT_LE(d.median, 2 * bf16_median) << "sequence " << i;
    EXPECT_LE(d.max, most) << "sequence " << i;
  }
}

TEST_P(Gpu, ForksAndTruncationCopyPages) {
  const Golden golden = read_golden(GetParam()).first(150);
  Model model = load(golden.folder, *gpu());
  const std::span<const int32_t> ids = golden.ids;
  LatentCache cache = model.make_cache(1024, DType::bf16);
  const int first = cache.open();
  step(model, cache, first, ids.first(70));
  const int fork = cache.fork(first);
  step(model, cache, first, ids.subspan(100, 40));  // another way
  const auto forked = step(model, cache, fork, ids.subspan(70, 30));
  LatentCache fresh = model.make_cache(256, DType::bf16);
  const auto alone = step(model, fresh, fresh.open(), ids.first(100));
  EXPECT_LE(difference(forked, alone).median, bf16_median);
}

// Tokens that the GPU draws are those that the host draws from the same logits.
TEST(GpuDevice, ChoosesAsTheHostDoes) {
  if (!gpu()) GTEST_SKIP() << "no GPU here";
  for (const int64_t vocab : {1, 5, 1000, 102400}) {
    constexpr int64_t rows = 7;
    std::vector<float> logits(size_t(rows * vocab));
    for (size_t i = 0; i < logits.size(); ++i) logits[i] = float(std::floor(8 * random_normal(1, i)) / 2);  // with equal ones
    const Buffer memory(logits.size() * 4, gpu()->memory());
    gpu()->memory().upload(logits.data(), memory.data(), memory.bytes());
    const Tensor t = view(memory.data(), DType::f32, {rows, vocab}, Place::device);
    int same = 0, draws = 0;
    for (const double temperature : {0.0, 0.5, 2.0}) {
      SamplingOptions options;
      options.temperature = temperature;
      std::vector<double> at;
      for (int64_t r = 0; r < rows; ++r) at.push_back(random_uniform(options.seed, uint64_t(r)));
      std::vector<int32_t> ids(rows, -2);
      ASSERT_TRUE(gpu()->choose(t, temperature, at));
      gpu()->chosen(ids);
      for (int64_t r = 0; r < rows; ++r) {
        const std::span<const float> row(logits.data() + r * vocab, size_t(vocab));
        const int32_t expected = sample(row, {}, options, r).token;
        if (temperature == 0) { EXPECT_EQ(ids[size_t(r)], expected); }
        same += ids[size_t(r)] == expected, ++draws;
      }
    }
    EXPECT_GE(same, draws - 1) << vocab;  // a draw on the border of two ids may fall on either side
  }
  for (const std::vector<float>& bad : {std::vector<float>{NAN, NAN, NAN, NAN}, std::vector<float>{1, 2, NAN, 0}})
    for (const double temperature : {0.0, 1.0}) {
      const Buffer memory(16, gpu()->memory());
      gpu()->memory().upload(bad.data(), memory.data(), 16);
      std::vector<int32_t> id(1);
      const double at[] = {0.5};
      ASSERT_TRUE(gpu()->choose(view(memory.data(), DType::f32, {1, 4}, Place::device), temperature, at));
      gpu()->chosen(id);
      EXPECT_EQ(id[0], -1);
    }
}

// What the program does: a text written on the GPU is the text the CPU writes, greedy, for one prompt and for several.
TEST(GpuDevice, GeneratesWhatTheCpuGenerates) {
  if (!gpu()) GTEST_SKIP() << "no GPU here";
  const Golden golden = read_golden("dsv2-q-group");
  auto written = [&](Device& device) {
    Model model = load(golden.folder, device);
    LatentCache cache = model.make_cache(1024, DType::f32);
    std::vector<Generation> texts(2);
    for (size_t i = 0; i < texts.size(); ++i) {
      texts[i].sequence = cache.open();
      texts[i].tokens.assign(golden.ids.begin(), golden.ids.begin() + (i ? 70 : 32));
    }
    GenerateOptions options;
    options.max_tokens = 24;
    generate(model, cache, texts, options);
    std::vector<int32_t> ids;
    for (const Generation& text : texts) ids.insert(ids.end(), text.tokens.begin(), text.tokens.end());
    return ids;
  };
  EXPECT_EQ(written(*gpu()), written(cpu()));
}

TEST(GpuDevice, WeightsThatDoNotFitSayWhatWould) {
  if (!gpu()) GTEST_SKIP() << "no GPU here";
  std::vector<Buffer> taken;
  for (size_t bytes = size_t(1) << 40; bytes >= size_t(2) << 20; bytes /= 2) try {
      for (;;) taken.emplace_back(bytes, gpu()->memory());
    } catch (const Error&) {}
  Config config = read_config_file(read_golden("dsv2-q-group").folder);
  config.intermediate_size = 65536;
  const Scratch scratch;
  make_random(config, scratch / "model", DType::f32, 1, cpu().threads());
  if (gpu()->memory().free_bytes() > 2e6) GTEST_SKIP() << "others give memory back";
  try {
    load(scratch / "model", *gpu());
    FAIL() << "there was no room";
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::input);
    EXPECT_NE(std::string(e.what()).find("not even q4_0 would fit"), std::string::npos) << e.what();
  }
}

TEST(GpuDevice, OutOfMemorySaysWhatIsFree) {
  if (!gpu()) GTEST_SKIP() << "no GPU here";
  try {
    const Buffer buffer(size_t(1) << 42, gpu()->memory());
    FAIL() << "4 TB were given";
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::input);
    EXPECT_NE(std::string(e.what()).find("are free"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace mla::test
