// JSON from outside: the values of a good text, and the refusals of a bad one.
#include "io/json.h"

#include "bytes.h"

namespace mla::test {
namespace {

TEST(Json, builds_what_the_library_builds) {
  for (const char* text : {"null", "[]", "{}", "-3", R"([1,-2,3.5,true,false,null,"x",[],{"a":[{"b":{}}]},18446744073709551615])",
                           R"({"a":{"x":1},"b":{"x":2},"c":[[1],[2,[3]]]})"})
    EXPECT_EQ(parse_json(text, "test"), nlohmann::json::parse(text)) << text;
}

TEST(JsonHostile, nested_too_deep) {
  const std::string deep = std::string(64, '[') + std::string(64, ']');
  EXPECT_NO_THROW(parse_json(deep, "test"));
  expect_refused([&] { parse_json("[" + deep + "]", "test"); }, "deeper than 64");
  expect_refused([] { parse_json(std::string(1 << 20, '['), "test"); }, "deeper than 64");
}

TEST(JsonHostile, key_twice_in_one_object) {
  expect_refused([] { parse_json(R"({"a":1,"b":{"a":2},"a":3})", "test"); }, "\"a\" twice");
}

TEST(JsonHostile, broken_text) {
  for (const char* text : {"", " ", "{", "[1,]", "{\"a\"}", "nul", "1e999", "\"\\ud800\"", "\"\xc3\x28\"", "{} {}", "[1] x", "\"\x01\""})
    expect_refused([&] { parse_json(text, "test"); }, "test is not valid JSON");
}

}  // namespace
}  // namespace mla::test
