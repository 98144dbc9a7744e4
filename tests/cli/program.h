// Runs the program as a user would: arguments, stdin, signals in; stdout, stderr and an exit code out.
#pragma once

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace mla::test {

namespace fs = std::filesystem;
using Json = nlohmann::json;

struct Outcome {
  int code = -1;
  std::string out, err;
  // stdout as one JSON object; fails the test when it is anything else.
  Json json() const;
};

struct Call {
  std::vector<std::string> arguments;
  std::string input;
  std::function<bool(const Outcome& so_far)> interrupt_when = {};  // sends SIGINT, once, when this is true; empty: never
};

Outcome run(const Call& call);
Outcome run(std::vector<std::string> arguments, std::string input = {});

// A folder of this test program's own, removed at its end.
fs::path scratch();
std::string path(const std::string& name);  // in scratch

fs::path golden(const std::string& name);  // a folder or file of tests/data/golden

// A small random deepseek_v2 GGUF with a byte vocabulary, made by `mla init` on first use.
std::string small_model();
// The same with so many layers that one chunk of a long prompt takes seconds on any machine.
std::string deep_model();
constexpr int deep_layers = 200;

void write_ids(const fs::path& path, const std::vector<int32_t>& ids);                                  // .npy, i4
void write_floats(const fs::path& path, const std::vector<float>& values, int64_t rows, int64_t cols);  // .npy, f4
std::vector<float> read_floats(const fs::path& path, int64_t& rows, int64_t& cols);                     // .npy, f4
std::vector<int32_t> read_ids(const fs::path& path);
void write_text(const fs::path& path, const std::string& text);
std::string read_text(const fs::path& path);

// Expects exit code 2, nothing on stdout, and one line "mla: error: …" on stderr that holds every one of these.
void expect_refused(const std::vector<std::string>& arguments, const std::vector<std::string>& said);

}  // namespace mla::test
