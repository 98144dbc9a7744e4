// The GGUF container: what is read, and every way of lying in one.
#include "io/gguf.h"

#include "bytes.h"

namespace mla::test {
namespace {

enum : uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };
constexpr uint32_t type_f32 = 0, type_q4_0 = 2, type_q5_0 = 6, type_q6_k = 14;

Gguf parse(const std::string& file) { return parse_gguf(as_bytes(file), "test.gguf"); }
void refused(const GgufBytes& file, std::string_view part) {
  const std::string bytes = file.bytes();
  expect_refused([&] { parse(bytes); }, part);
}

std::string array_of(uint32_t type, uint64_t count, const std::string& elements) { return raw(type) + raw(count) + elements; }

TEST(Gguf, reads_every_scalar_type) {
  GgufBytes file;
  file.pair("a", u8, raw(uint8_t(200)))
      .pair("b", i8, raw(int8_t(-5)))
      .pair("c", u16, raw(uint16_t(65000)))
      .pair("d", i16, raw(int16_t(-300)));
  file.pair("e", u32, raw(uint32_t(4000000000)))
      .pair("f", i32, raw(int32_t(-7)))
      .pair("g", f32, raw(0.5f))
      .pair("h", boolean, raw(uint8_t(1)));
  file.pair("i", string, GgufBytes::text("text")).pair("j", u64, raw(UINT64_MAX)).pair("k", i64, raw(INT64_MIN)).pair("l", f64, raw(0.25));
  const std::string bytes = file.bytes();
  const auto values = parse(bytes).values;
  EXPECT_EQ(values.dump(), R"({"a":200,"b":-5,"c":65000,"d":-300,"e":4000000000,"f":-7,"g":0.5,"h":true,"i":"text",)"
                           R"("j":18446744073709551615,"k":-9223372036854775808,"l":0.25})");
}

TEST(Gguf, versions_2_and_3_and_a_file_that_holds_only_a_vocabulary) {
  for (uint32_t version : {2u, 3u}) {
    GgufBytes file;
    file.version = version;
    file.pair("tokens", array, array_of(string, 2, GgufBytes::text("a") + GgufBytes::text("\xff")));
    const std::string bytes = file.bytes();
    const Gguf gguf = parse(bytes);
    EXPECT_TRUE(gguf.tensors.empty());
    EXPECT_EQ(gguf.strings("tokens"), (std::vector<std::string>{"a", "\xff"}));     // bytes as they are
    EXPECT_EQ(gguf.values["tokens"], nlohmann::json::parse(R"(["a", "\ufffd"])"));  // and what can be shown
  }
}

TEST(Gguf, long_arrays_are_read_by_the_typed_getters_alone) {
  std::string numbers, floats, words;
  for (int i = 0; i < 1025; ++i) numbers += raw(int32_t(i - 5)), floats += raw(float(i) / 4), words += GgufBytes::text(std::to_string(i));
  GgufBytes file;
  file.pair("n", array, array_of(i32, 1025, numbers))
      .pair("f", array, array_of(f32, 1025, floats))
      .pair("s", array, array_of(string, 1025, words));
  const std::string bytes = file.bytes();
  const Gguf gguf = parse(bytes);
  EXPECT_TRUE(gguf.values.empty());
  EXPECT_EQ(gguf.ints("n")[1024], 1019);
  EXPECT_EQ(gguf.floats("f")[1024], 256.0f);
  EXPECT_EQ(gguf.strings("s")[1024], "1024");
  EXPECT_TRUE(gguf.ints("absent").empty());
}

TEST(Gguf, shapes_are_turned_outermost_first_and_blocks_counted) {
  GgufBytes file;
  file.tensor("a", {64, 3, 2}, type_q4_0, 0).tensor("b", {5}, type_f32, 224);
  file.data = std::string(224 + 20, 'x');
  const std::string bytes = file.bytes();
  const Gguf gguf = parse(bytes);
  EXPECT_EQ(gguf.tensors[0].shape, (std::vector<int64_t>{2, 3, 64}));
  EXPECT_EQ(gguf.tensors[0].bytes, 6u * 36);
  EXPECT_EQ(gguf.tensors[1].end(), bytes.size());
}

TEST(Gguf, alignment_is_obeyed) {
  GgufBytes file;
  file.alignment = 128;
  file.pair("general.alignment", u32, raw(uint32_t(128))).tensor("a", {1}, type_f32, 128);
  file.data = std::string(132, 'x');
  const std::string bytes = file.bytes();
  EXPECT_EQ(parse(bytes).tensors[0].begin, bytes.size() - 4);
}

TEST(GgufHostile, not_a_gguf_file) {
  expect_refused([] { parse(""); }, "not a GGUF file");
  expect_refused([] { parse("GGUF"); }, "not a GGUF file");
  expect_refused([] { parse("GGJT" + std::string(40, '\0')); }, "not a GGUF file");
}

TEST(GgufHostile, other_versions_and_byte_orders) {
  GgufBytes file;
  file.version = 1;
  refused(file, "GGUF version 1");
  file.version = 4;
  refused(file, "GGUF version 4");
  file.version = 0x03000000;
  refused(file, "big-endian");
}

TEST(GgufHostile, cut_short_anywhere) {
  GgufBytes file;
  file.pair("general.name", string, GgufBytes::text("name")).pair("t", array, array_of(i32, 2, raw(1) + raw(2)));
  file.tensor("a", {4}, type_f32, 0);
  file.data = std::string(16, 'x');
  const std::string whole = file.bytes();
  EXPECT_NO_THROW(parse(whole));
  for (size_t n = 0; n < whole.size(); ++n) {
    const std::string cut = whole.substr(0, n);
    EXPECT_THROW(parse(cut), Error) << n << " bytes of " << whole.size();
  }
}

TEST(GgufHostile, counts_of_keys_and_tensors_that_cannot_fit) {
  for (uint64_t n : {uint64_t(10), uint64_t(1) << 32, UINT64_MAX, UINT64_MAX / 14 + 1}) {
    GgufBytes keys, tensors;
    keys.n_pairs = n;
    refused(keys, "metadata keys");
    tensors.n_tensors = n;
    refused(tensors, "tensors");
  }
}

TEST(GgufHostile, string_length_past_the_end) {
  for (uint64_t n : {uint64_t(100), UINT64_MAX, UINT64_MAX - 7, uint64_t(1) << 63}) {
    GgufBytes file;
    refused(file.pair("k", string, raw(n) + "abc"), "cut short");
  }
}

TEST(GgufHostile, keys_that_are_empty_long_double_or_hold_control_characters) {
  refused(GgufBytes().pair("", u64, raw(uint64_t(1))), "key of 0 bytes");
  refused(GgufBytes().pair(std::string(65536, 'k'), u8, raw(uint8_t(1))), "key of 65536 bytes");
  refused(GgufBytes().pair("k", u8, raw(uint8_t(1))).pair("k", u8, raw(uint8_t(1))), "the metadata key k twice");
  refused(GgufBytes().pair(std::string_view("k\0\33x", 4), u8, raw(uint8_t(1))), "control characters");
}

TEST(GgufHostile, unknown_value_types_and_bools) {
  refused(GgufBytes().pair("k", 13, raw(uint64_t(0))), "type 13");
  refused(GgufBytes().pair("k", boolean, raw(uint8_t(2))), "the bool k holds 2");
  refused(GgufBytes().pair("k", array, array_of(99, 1, raw(uint64_t(0)))), "type 99");
}

TEST(GgufHostile, array_counts_that_overflow) {
  for (uint32_t type : {u8, i32, u64, string})
    for (uint64_t n : {uint64_t(1) << 61, uint64_t(1) << 62, UINT64_MAX, uint64_t(50)})
      refused(GgufBytes().pair("k", array, array_of(type, n, "abcdefgh")), "elements of k");
}

TEST(GgufHostile, arrays_in_arrays) { refused(GgufBytes().pair("k", array, array_of(array, 1, array_of(u8, 1, "x"))), "array of arrays"); }

TEST(GgufHostile, array_element_type_confusion) {
  GgufBytes file;
  file.pair("scores", array, array_of(u8, 8, "abcdefgh")).pair("types", array, array_of(f32, 1, raw(1.0f)));
  file.pair("tokens", array, array_of(u64, 1, raw(uint64_t(1) << 40))).pair("one", u32, raw(uint32_t(1)));
  const std::string bytes = file.bytes();
  const Gguf gguf = parse(bytes);
  expect_refused([&] { gguf.floats("scores"); }, "the elements of scores are u8, not f32");
  expect_refused([&] { gguf.ints("types"); }, "the elements of types are f32, not whole numbers");
  expect_refused([&] { gguf.strings("tokens"); }, "the elements of tokens are u64, not strings");
  expect_refused([&] { gguf.ints("tokens"); }, "does not fit 32 bits");
  expect_refused([&] { gguf.ints("one"); }, "one is one value, not an array");
}

TEST(GgufHostile, alignment_that_wraps_divides_by_zero_or_is_huge) {
  for (uint32_t n : {0u, 1u, 4u, 33u, 131072u, 0x80000000u, 0xffffffffu})
    refused(GgufBytes().pair("general.alignment", u32, raw(n)), "general.alignment is");
  refused(GgufBytes().pair("general.alignment", u64, raw(UINT64_MAX)), "general.alignment is");
  refused(GgufBytes().pair("general.alignment", i32, raw(-32)), "no u32");
  refused(GgufBytes().pair("general.alignment", string, GgufBytes::text("32")), "no u32");
}

TEST(GgufHostile, number_of_dimensions) {
  refused(GgufBytes().tensor("a", {}, type_f32, 0), "0 dimensions");
  refused(GgufBytes().tensor("a", {1, 1, 1, 1, 1}, type_f32, 0), "5 dimensions");
}

TEST(GgufHostile, dimension_of_zero) { refused(GgufBytes().tensor("a", {4, 0}, type_f32, 0), "is 0"); }

TEST(GgufHostile, dimension_product_overflows) {
  refused(GgufBytes().tensor("a", {uint64_t(1) << 32, uint64_t(1) << 32}, type_f32, 0), "more than 63 bits");
  refused(GgufBytes().tensor("a", {UINT64_MAX}, type_f32, 0), "more than 63 bits");
  refused(GgufBytes().tensor("a", {uint64_t(1) << 62, 2, 2, 2}, type_f32, 0), "more than 63 bits");
}

TEST(GgufHostile, bytes_of_a_tensor_overflow) { refused(GgufBytes().tensor("a", {uint64_t(1) << 62}, type_f32, 0), "more than 64 bits"); }

TEST(GgufHostile, rows_that_are_no_whole_blocks) {
  refused(GgufBytes().tensor("a", {33}, type_q4_0, 0), "no whole number of Q4_0 blocks");
  refused(GgufBytes().tensor("a", {128, 2}, type_q6_k, 0), "no whole number of Q6_K blocks");
}

TEST(GgufHostile, types_that_are_not_read_are_named) {
  refused(GgufBytes().tensor("blk.0.attn_q.weight", {32}, type_q5_0, 0), "blk.0.attn_q.weight has the type Q5_0");
  refused(GgufBytes().tensor("a", {32}, 4, 0), "has the type 4, which is not known");
}

TEST(GgufHostile, offset_and_size_past_the_end) {
  GgufBytes file;
  file.data = std::string(64, 'x');
  refused(GgufBytes(file).tensor("a", {17}, type_f32, 0), "cut short");
  refused(GgufBytes(file).tensor("a", {1}, type_f32, 64), "cut short");
  refused(GgufBytes(file).tensor("a", {1}, type_f32, UINT64_MAX - 31), "past any file's end");
  refused(GgufBytes(file).tensor("a", {1}, type_f32, uint64_t(1) << 63), "cut short");
  refused(GgufBytes(file).tensor("a", {1}, type_f32, 4), "no multiple of 32");
}

TEST(GgufHostile, overlapping_tensors) {
  GgufBytes file;
  file.data = std::string(128, 'x');
  refused(GgufBytes(file).tensor("a", {16}, type_f32, 0).tensor("b", {8}, type_f32, 32), "the tensors a and b overlap");
  refused(GgufBytes(file).tensor("a", {8}, type_f32, 32).tensor("b", {32}, type_f32, 0), "overlap");
}

TEST(GgufHostile, tensor_names) {
  GgufBytes file;
  file.data = std::string(64, 'x');
  refused(GgufBytes(file).tensor("", {1}, type_f32, 0), "name of 0 bytes");
  refused(GgufBytes(file).tensor(std::string(257, 'a'), {1}, type_f32, 0), "name of 257 bytes");
  refused(GgufBytes(file).tensor("a", {1}, type_f32, 0).tensor("a", {1}, type_f32, 32), "the tensor a twice");
  refused(GgufBytes(file).tensor("a\33[2J", {1}, type_f32, 0), "control characters");
}

TEST(GgufHostile, pieces_of_a_split_model) { refused(GgufBytes().pair("split.count", u16, raw(uint16_t(3))), "one of 3 pieces"); }

}  // namespace
}  // namespace mla::test
