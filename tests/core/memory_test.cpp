// Buffers are zeroed and aligned; the arena hands out memory that does not overlap and takes it back.
#include "core/memory.h"

#include "core/check.h"

#include <gtest/gtest.h>

#include <cstring>

namespace mla::test {
namespace {

TEST(Buffer, small_and_large_ones_are_zeroed_and_aligned) {
  for (size_t bytes : {size_t(1), size_t(63), size_t(4096), (size_t(4) << 20) - 1, size_t(4) << 20, (size_t(5) << 20) + 7}) {
    Buffer buffer(bytes);
    ASSERT_EQ(buffer.bytes(), bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % 64, 0u);
    for (size_t i = 0; i < bytes; i += 4093) ASSERT_EQ(buffer.data()[i], std::byte(0));
    std::memset(buffer.data(), 1, bytes);
  }
}

TEST(Buffer, empty_ones_and_moves) {
  Buffer none, zero(0), one(100);
  EXPECT_EQ(none.data(), nullptr);
  EXPECT_EQ(zero.data(), nullptr);
  std::byte* at = one.data();
  Buffer moved(std::move(one));
  EXPECT_EQ(moved.data(), at);
  none = std::move(moved);
  EXPECT_EQ(none.data(), at);
  EXPECT_EQ(none.bytes(), 100u);
}

TEST(Buffer, more_than_there_can_be_is_an_error) {
  EXPECT_THROW(Buffer{SIZE_MAX}, Error);
  EXPECT_THROW(Buffer{SIZE_MAX / 2}, Error);
}

TEST(Arena, pieces_do_not_overlap_and_are_aligned) {
  Arena arena;
  std::vector<Tensor> pieces;
  for (int i = 1; i < 40; ++i) {
    pieces.push_back(arena.tensor(DType::f32, {i, 4097}));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(pieces.back().data) % 64, 0u);
    for (int64_t j = 0; j < pieces.back().count(); ++j) pieces.back().f32()[j] = float(i);
  }
  for (int i = 1; i < 40; ++i)
    for (int64_t j = 0; j < pieces[size_t(i - 1)].count(); ++j) ASSERT_EQ(pieces[size_t(i - 1)].f32()[j], float(i));
}

TEST(Arena, scopes_give_back_what_they_took) {
  Arena arena;
  void* outer = arena.bytes(100);
  void* inner;
  {
    ArenaScope scope(arena);
    inner = arena.bytes(1000);
    arena.bytes(size_t(9) << 20);  // needs a block of its own
  }
  EXPECT_EQ(arena.bytes(1), inner);
  EXPECT_NE(inner, outer);
}

TEST(Arena, a_second_pass_takes_no_more_memory) {
  Arena arena;
  auto pass = [&] {
    arena.reset();
    for (size_t i = 1; i < 6; ++i) arena.bytes(i << 20);
  };
  pass();
  pass();
  const size_t held = arena.held_bytes();
  for (int i = 0; i < 5; ++i) pass();
  EXPECT_EQ(arena.held_bytes(), held);
}

TEST(Arena, quantised_tensors_are_refused) {
  Arena arena;
  EXPECT_THROW(arena.tensor(DType::q8_0, {32}), Error);
}

TEST(Tensor, views_slices_and_words) {
  float data[24] = {};
  Tensor t = view(data, DType::f32, {2, 3, 4});
  EXPECT_TRUE(t.contiguous());
  EXPECT_EQ(t.count(), 24);
  EXPECT_EQ(describe(t), "f32 [2, 3, 4]");
  const Tensor part = slice(t, 1, 1, 2);
  EXPECT_EQ(part.f32(), data + 4);
  EXPECT_EQ(part.shape[1], 2);
  EXPECT_FALSE(part.contiguous());
  EXPECT_TRUE(slice(t, 0, 1, 1).contiguous());
}

}  // namespace
}  // namespace mla::test
