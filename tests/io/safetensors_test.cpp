// The safetensors container: what is read, and every way of lying in a header.
#include "io/safetensors.h"

#include "bytes.h"

namespace mla::test {
namespace {

std::vector<ListedTensor> parsed(const std::string& file) { return parse_safetensors(as_bytes(file), "test.safetensors"); }

void refused(const std::string& header, const std::string& data, std::string_view part) {
  expect_refused([&] { parsed(safetensors(header, data)); }, part);
}

TEST(Safetensors, lists_tensors_in_the_order_of_their_bytes) {
  const std::string header =
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]},"b":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}}  )";
  const auto tensors = parsed(safetensors(header, std::string(14, 'x')));
  ASSERT_EQ(tensors.size(), 2u);
  EXPECT_EQ(tensors[0].name, "b");
  EXPECT_EQ(tensors[0].shape, (std::vector<int64_t>{2, 1}));
  EXPECT_EQ(tensors[0].begin, 8 + header.size());
  EXPECT_EQ(tensors[0].dtype, DType::f32);
  EXPECT_EQ(tensors[1].dtype, DType::bf16);
  EXPECT_EQ(tensors[1].end(), 8 + header.size() + 14);
}

TEST(Safetensors, scalars_empty_tensors_and_no_tensors_are_legal) {
  EXPECT_EQ(parsed(safetensors("{}", "")).size(), 0u);
  const auto tensors = parsed(safetensors(R"({"none":{"dtype":"F32","shape":[0,4],"data_offsets":[0,0]},)"
                                          R"("also":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},)"
                                          R"("one":{"dtype":"F64","shape":[],"data_offsets":[0,8]}})",
                                          std::string(8, 'x')));
  ASSERT_EQ(tensors.size(), 3u);
  EXPECT_EQ(tensors[2].name, "one");
  EXPECT_FALSE(tensors[2].dtype.has_value());
}

TEST(SafetensorsHostile, file_of_a_few_bytes) {
  for (size_t n = 0; n < 10; ++n) expect_refused([&] { parsed(std::string(n, '\0')); }, "too few");
}

TEST(SafetensorsHostile, header_over_100_megabytes) {
  expect_refused([] { parsed(raw(uint64_t(100'000'001)) + "{}" + std::string(100, ' ')); }, "the format allows 100000000");
  expect_refused([] { parsed(raw(UINT64_MAX) + "{}"); }, "the format allows");
}

TEST(SafetensorsHostile, header_longer_than_the_file) {
  expect_refused([] { parsed(raw(uint64_t(3)) + "{}"); }, "cut short");
}

TEST(SafetensorsHostile, header_that_is_no_object) {
  refused("[]", "", "does not begin with an object");
  refused("  {}", "", "does not begin with an object");
  refused("{]", "", "not valid JSON");
  refused("{}{}", "", "not valid JSON");
  refused("{\"a\xff\":1}", "", "not valid JSON");
  refused(R"({"a":7})", "", "is no object");
}

TEST(SafetensorsHostile, header_nested_too_deep) {
  refused(R"({"a":)" + std::string(100000, '[') + std::string(100000, ']') + "}", "", "nested deeper than 8");
}

TEST(SafetensorsHostile, duplicate_names) {
  refused(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})", "xx", "twice");
}

TEST(SafetensorsHostile, range_that_differs_from_shape_and_type) {
  refused(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", "xxxx", "8 bytes, but its range holds 4");
}

TEST(SafetensorsHostile, shape_product_overflows) {
  refused(R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", "", "more than 64 bits");
  refused(R"({"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}})", "", "more than 64 bits");
  refused(R"({"a":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,0]}})", "", "more than 64 bits");
}

TEST(SafetensorsHostile, numbers_that_are_not_whole) {
  refused(R"({"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}})", "x", "no whole number");
  refused(R"({"a":{"dtype":"U8","shape":[1.5],"data_offsets":[0,1]}})", "x", "no whole number");
  refused(R"({"a":{"dtype":"U8","shape":["1"],"data_offsets":[0,1]}})", "x", "no whole number");
  refused(R"({"a":{"dtype":"U8","shape":[1e99999],"data_offsets":[0,1]}})", "x", "not valid JSON");
}

TEST(SafetensorsHostile, range_that_runs_backwards) {
  refused(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}})", "x", "before it begins");
}

TEST(SafetensorsHostile, range_past_the_end_of_the_file) {
  refused(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", "xxxx", "cut short");
  refused(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[18446744073709551614,18446744073709551615]}})", "x", "past any file's end");
}

TEST(SafetensorsHostile, overlapping_tensors) {
  refused(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}})", "xxxxxx",
          "a and b overlap");
  refused(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", "xxxx",
          "overlap");
}

TEST(SafetensorsHostile, holes_between_and_after_tensors) {
  refused(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})", "xx", "no tensor owns bytes");
  refused(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", "xx", "no tensor owns the last 1 bytes");
  refused("{}", "xx", "no tensor owns the last 2 bytes");
}

TEST(SafetensorsHostile, missing_or_mistyped_members) {
  refused(R"({"a":{"shape":[1],"data_offsets":[0,1]}})", "x", "has no dtype");
  refused(R"({"a":{"dtype":3,"shape":[1],"data_offsets":[0,1]}})", "x", "is no string");
  refused(R"({"a":{"dtype":"F128","shape":[1],"data_offsets":[0,1]}})", "x", "F128");
  refused(R"({"a":{"dtype":"U8","data_offsets":[0,1]}})", "x", "has no shape");
  refused(R"({"a":{"dtype":"U8","shape":{},"data_offsets":[0,1]}})", "x", "no array");
  refused(R"({"a":{"dtype":"U8","shape":[1]}})", "x", "has no data_offsets");
  refused(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}})", "x", "no two numbers");
  refused(R"({"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}})", "x", "at most 16");
  refused(R"({"__metadata__":{"a":1}})", "", "nothing but strings");
}

}  // namespace
}  // namespace mla::test
