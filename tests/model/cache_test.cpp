// Pages and sequences: growing, forking, closing, cutting, and what happens when the pool is empty.
#include "model/cache.h"

#include "core/check.h"

#include <gtest/gtest.h>

namespace mla {
namespace {

LatentCache small_cache(int64_t tokens) { return LatentCache(2, {KvLayout::mla(6, 2), DType::f32}, tokens); }

float* row(const LatentCache& cache, int layer, int sequence, int64_t position) {
  const int64_t slot = cache.slot(sequence, position);
  return reinterpret_cast<float*>(cache.layer(layer).row(int32_t(slot / LatentCache::page_tokens), slot % LatentCache::page_tokens));
}

// A device that has a megabyte.
class SmallDevice final : public Memory {
 public:
  Place place() const override { return Place::device; }
  std::byte* take(size_t bytes) override { return host_memory().take(bytes); }
  void give_back(std::byte* data, size_t bytes) noexcept override { host_memory().give_back(data, bytes); }
  void upload(const void*, void*, size_t) override {}
  void download(const void*, void*, size_t) override {}
  void copy(const void*, void*, size_t) override {}
  void wait() override {}
  double free_bytes() const override { return 1e6; }
};

TEST(LatentCache, ADeviceSaysWhatWouldFit) {
  SmallDevice memory;
  const KvFormat format{KvLayout::mla(512, 64), DType::bf16};  // 4 layers of 1152 bytes a token
  try {
    LatentCache(4, format, int64_t(1) << 36, memory);
    FAIL() << "316 TB were promised";
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::input);
    EXPECT_STREQ(e.what(), "a cache of 68719476736 tokens takes 3.167e+05 GB, and the device has 0.001 GB free; 192 tokens would fit");
  }
  EXPECT_EQ(LatentCache(4, format, 192, memory).free_tokens(), 192);
}

TEST(PagePool, CountsReferences) {
  PagePool pool(2);
  const int32_t a = pool.take(), b = pool.take();
  EXPECT_NE(a, b);
  EXPECT_EQ(pool.take(), -1);
  pool.share(a);
  pool.free(a);
  EXPECT_EQ(pool.available(), 0);
  pool.free(a);
  EXPECT_EQ(pool.available(), 1);
  EXPECT_EQ(pool.take(), a);
  pool.free(b);
  EXPECT_THROW(pool.free(b), Error);
  EXPECT_THROW(pool.share(7), Error);
}

TEST(LatentCache, GrowsByPages) {
  LatentCache cache = small_cache(130);
  const int s = cache.open();
  EXPECT_EQ(cache.free_tokens(), 192);
  EXPECT_TRUE(cache.grow(s, 64));
  EXPECT_EQ(cache.pages(s).size(), 1u);
  EXPECT_TRUE(cache.grow(s, 1));
  EXPECT_EQ(cache.pages(s).size(), 2u);
  EXPECT_EQ(cache.length(s), 65);
}

TEST(LatentCache, RefusesWhatDoesNotFitAndChangesNothing) {
  LatentCache cache = small_cache(128);
  const int a = cache.open(), b = cache.open();
  EXPECT_TRUE(cache.grow(a, 100));
  EXPECT_FALSE(cache.grow(b, 1));
  EXPECT_EQ(cache.length(b), 0);
  EXPECT_FALSE(cache.grow(a, 29));
  EXPECT_EQ(cache.length(a), 100);
  EXPECT_TRUE(cache.grow(a, 28));
  cache.close(a);
  EXPECT_TRUE(cache.grow(b, 128));
}

TEST(LatentCache, ForkSharesFullPagesAndCopiesTheLast) {
  LatentCache cache = small_cache(64 * 5);
  const int a = cache.open();
  ASSERT_TRUE(cache.grow(a, 70));
  for (int64_t t = 0; t < 70; ++t)
    for (int layer = 0; layer < 2; ++layer) row(cache, layer, a, t)[0] = float(100 * layer + t);
  const int b = cache.fork(a);
  ASSERT_GE(b, 0);
  EXPECT_EQ(cache.pages(a)[0], cache.pages(b)[0]);
  EXPECT_NE(cache.pages(a)[1], cache.pages(b)[1]);
  for (int64_t t = 0; t < 70; ++t) EXPECT_EQ(row(cache, 1, b, t)[0], float(100 + t));
  ASSERT_TRUE(cache.grow(b, 1));
  row(cache, 0, b, 70)[0] = -1;
  row(cache, 0, b, 69)[0] = -2;
  EXPECT_EQ(row(cache, 0, a, 69)[0], 69);
  cache.close(a);
  EXPECT_EQ(row(cache, 0, b, 3)[0], 3);
  cache.close(b);
  EXPECT_EQ(cache.free_tokens(), 64 * 5);
}

TEST(LatentCache, WritingIntoASharedPageAfterACutCopiesIt) {
  LatentCache cache = small_cache(64 * 4);
  const int a = cache.open();
  ASSERT_TRUE(cache.grow(a, 128));
  row(cache, 0, a, 10)[0] = 10;
  const int b = cache.fork(a);
  cache.truncate(b, 40);
  ASSERT_TRUE(cache.grow(b, 1));
  EXPECT_NE(cache.pages(a)[0], cache.pages(b)[0]);
  EXPECT_EQ(row(cache, 0, b, 10)[0], 10);
}

TEST(LatentCache, ForkWithoutAPageLeftSaysSo) {
  LatentCache cache = small_cache(64);
  const int a = cache.open();
  ASSERT_TRUE(cache.grow(a, 10));
  EXPECT_EQ(cache.fork(a), -1);
  EXPECT_EQ(cache.length(a), 10);
}

TEST(LatentCache, ClosedSequencesAreGone) {
  LatentCache cache = small_cache(64);
  const int a = cache.open();
  cache.close(a);
  EXPECT_THROW(cache.length(a), Error);
  EXPECT_THROW(cache.grow(a, 1), Error);
  EXPECT_EQ(cache.open(), a);
}

}  // namespace
}  // namespace mla
