// What must not change an answer: how a prompt is cut into chunks, what else is in the batch, shared prefixes, the form of attention.
#include "golden.h"

#include "core/check.h"

namespace mla::test {
namespace {

constexpr double f32_noise = 2e-5;  // of the logits' spread: another order of the same sums

class Invariance : public testing::TestWithParam<std::string> {
 protected:
  Golden golden = read_golden(GetParam()).first(200);
  Model model = load(golden.folder);
  double noise = GetParam().ends_with("bf16") ? 2e-2 : f32_noise;

  std::span<const int32_t> ids(size_t from, size_t n) const { return std::span(golden.ids).subspan(from, n); }
};
INSTANTIATE_TEST_SUITE_P(All, Invariance, testing::ValuesIn(all_goldens()), test_name);

TEST_P(Invariance, PrefillInChunksIsOneGo) {
  for (const MlaForm form : {MlaForm::automatic, MlaForm::absorbed, MlaForm::expanded}) {
    const std::vector<float> whole = run(model, golden, {.form = form});
    for (const size_t chunk : {1, 7, 63, 64, 65})
      EXPECT_LE(difference(run(model, golden, {.form = form, .chunk = chunk}), whole).max, noise) << "chunks of " << chunk;
    if (!model.config().is_mla()) break;
  }
}

TEST_P(Invariance, AbsorbedIsExpanded) {
  if (!model.config().is_mla()) GTEST_SKIP();
  const auto absorbed = run(model, golden, {.form = MlaForm::absorbed}), expanded = run(model, golden, {.form = MlaForm::expanded});
  EXPECT_LE(difference(absorbed, expanded).max, noise);
}

// Chunks and decodes of several sequences in one step give each of them, bit for bit, what it gets alone.
TEST_P(Invariance, BatchOfManyIsBatchOfOne) {
  const size_t lengths[] = {1, 70, 5, 131};
  constexpr size_t decodes = 6;
  std::vector<std::vector<std::vector<float>>> alone;  // [sequence][step]
  for (const size_t length : lengths) {
    LatentCache cache = model.make_cache(256, DType::f32);
    const int sequence = cache.open();
    alone.push_back({step(model, cache, sequence, ids(0, length))});
    for (size_t i = 0; i < decodes; ++i) alone.back().push_back(step(model, cache, sequence, ids(length + i, 1)));
  }
  LatentCache cache = model.make_cache(1024, DType::f32);
  std::vector<int> sequences;
  for (size_t i = 0; i < std::size(lengths); ++i) sequences.push_back(cache.open());
  // The last sequence starts two steps late, so that its prefill shares a step with the others' decodes.
  for (size_t now = 0; now <= decodes + 2; ++now) {
    std::vector<Chunk> chunks;
    std::vector<const std::vector<float>*> wanted;
    for (size_t i = 0; i < std::size(lengths); ++i) {
      const size_t late = i == 3 ? 2 : 0;
      if (now < late || now - late > decodes) continue;
      chunks.push_back({sequences[i], now == late ? ids(0, lengths[i]) : ids(lengths[i] + now - late - 1, 1)});
      wanted.push_back(&alone[i][now - late]);
    }
    const Tensor logits = model.to_host(model.forward(chunks, cache));
    for (size_t i = 0; i < chunks.size(); ++i) {
      const float* row = logits.f32() + int64_t(i) * model.config().vocab_size;
      EXPECT_EQ(std::vector<float>(row, row + model.config().vocab_size), *wanted[i]) << "step " << now << ", chunk " << i;
    }
  }
}

TEST_P(Invariance, ForkedPrefixIsCold) {
  for (const DType kv : {DType::f32, DType::bf16, DType::i8, DType::f8}) {
    LatentCache cache = model.make_cache(1024, kv);
    const int first = cache.open();
    step(model, cache, first, ids(0, 70));
    const int fork = cache.fork(first);
    ASSERT_GE(fork, 0);
    // The original goes another way before the fork goes on: the copied page must not see it.
    step(model, cache, first, ids(100, 30));
    const std::vector<float> forked = step(model, cache, fork, ids(70, 40));
    const int cold = cache.open();
    step(model, cache, cold, ids(0, 70));
    EXPECT_EQ(forked, step(model, cache, cold, ids(70, 40)));
    cache.close(first);
    EXPECT_EQ(step(model, cache, fork, ids(110, 1)), step(model, cache, cold, ids(110, 1)));
  }
}

TEST_P(Invariance, TruncatedIsNeverWritten) {
  LatentCache cache = model.make_cache(256, DType::f32);
  const int sequence = cache.open();
  const std::vector<float> before = step(model, cache, sequence, ids(0, 66));
  const std::vector<float> wanted = step(model, cache, sequence, ids(66, 3));
  cache.truncate(sequence, 40);
  step(model, cache, sequence, ids(100, 30));
  cache.truncate(sequence, 0);
  EXPECT_EQ(step(model, cache, sequence, ids(0, 66)), before);
  EXPECT_EQ(step(model, cache, sequence, ids(66, 3)), wanted);
}

TEST_P(Invariance, ThreadsDoNotMatter) {
  const std::unique_ptr<Device> one = make_cpu(1);
  Model other(Checkpoint::open(golden.folder), *one);
  EXPECT_EQ(run(other, golden), run(model, golden));
  EXPECT_EQ(continue_greedily(other, ids(0, 20), 20), continue_greedily(model, ids(0, 20), 20));
}

TEST_P(Invariance, FullCacheRefusesAndForgetsNothing) {
  LatentCache cache = model.make_cache(128, DType::f32);
  const int a = cache.open(), b = cache.open();
  step(model, cache, a, ids(0, 60));
  step(model, cache, b, ids(0, 60));
  const Chunk both[] = {{a, ids(60, 4)}, {b, ids(60, 5)}};
  EXPECT_EQ(model.forward(both, cache).data, nullptr);
  EXPECT_EQ(cache.length(a), 60);
  EXPECT_EQ(cache.length(b), 60);
  LatentCache fresh = model.make_cache(128, DType::f32);
  const int c = fresh.open();
  step(model, fresh, c, ids(0, 60));
  EXPECT_EQ(step(model, cache, a, ids(60, 4)), step(model, fresh, c, ids(60, 4)));
}

TEST_P(Invariance, WrongTokensAreRefused) {
  LatentCache cache = model.make_cache(128, DType::f32);
  const int sequence = cache.open();
  for (const int32_t wrong : {-1, int32_t(model.config().vocab_size)}) {
    const int32_t tokens[] = {3, wrong};
    EXPECT_THROW(step(model, cache, sequence, tokens), Error);
    EXPECT_EQ(cache.length(sequence), 0);
  }
}

}  // namespace
}  // namespace mla::test
