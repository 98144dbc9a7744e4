// The golden folders of tests/data/golden (made by tools/golden/make.py) and ways to run a model over them.
#pragma once

#include "io/checkpoint.h"
#include "io/npy.h"
#include "model/model.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace mla::test {

inline const std::vector<std::string> mla_goldens = {"dsv2-noq-greedy", "dsv2-noq-group", "dsv2-q-greedy", "dsv2-q-group",
                                                     "dsv2-mscale",     "dsv2-bias",      "dsv2-renorm",   "dsv2-noq-greedy-bf16"};
inline const std::vector<std::string> gqa_goldens = {"llama3", "llama2-mha", "mqa-bias", "qwen2", "mistral"};

inline std::vector<std::string> all_goldens() {
  std::vector<std::string> names = mla_goldens;
  names.insert(names.end(), gqa_goldens.begin(), gqa_goldens.end());
  return names;
}

inline std::string test_name(const testing::TestParamInfo<std::string>& info) {
  std::string name = info.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

// The values of a small C-ordered f4 array as NumPy writes it; its shape is known from its neighbours.
inline std::vector<float> read_npy_f32(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (bytes.size() < 10 || bytes.find("'<f4'") == std::string::npos) throw std::runtime_error("not an f4 array: " + path.string());
  const size_t start = 10 + size_t(uint8_t(bytes[8])) + 256 * size_t(uint8_t(bytes[9]));
  std::vector<float> values((bytes.size() - start) / 4);
  std::memcpy(values.data(), bytes.data() + start, values.size() * 4);
  return values;
}

struct Golden {
  std::filesystem::path folder;
  std::vector<int32_t> ids, rows, greedy;
  std::vector<float> logits;  // [rows, vocab]
  int64_t vocab() const { return int64_t(logits.size() / rows.size()); }

  // What remains when the sequence ends after `length` ids.
  Golden first(size_t length) const {
    Golden part = *this;
    part.ids.resize(std::min(length, ids.size()));
    while (part.rows.back() >= int32_t(part.ids.size())) part.rows.pop_back();
    part.logits.resize(part.rows.size() * size_t(vocab()));
    return part;
  }
};

inline Golden read_golden(const std::string& name) {
  const std::filesystem::path folder = std::filesystem::path(MLA_TEST_DATA) / "golden" / name;
  return {folder, read_npy_ids(folder / "golden-ids.npy"), read_npy_ids(folder / "golden-rows.npy"),
          read_npy_ids(folder / "golden-greedy.npy"), read_npy_f32(folder / "golden-logits.npy")};
}

inline Device& cpu() {
  static const std::unique_ptr<Device> device = make_cpu(2);
  return *device;
}

inline Model load(const std::filesystem::path& path, Device& device = cpu()) { return Model(Checkpoint::open(path), device); }

// One chunk's logits, copied: [rows asked for, vocab].
inline std::vector<float> step(Model& model, LatentCache& cache, int sequence, std::span<const int32_t> ids,
                               Chunk::Logits which = Chunk::Logits::last) {
  const Chunk chunk{sequence, ids, which};
  const Tensor logits = model.to_host(model.forward(std::span(&chunk, 1), cache));
  if (!logits.data) throw std::runtime_error("the cache is full");
  return std::vector<float>(logits.f32(), logits.f32() + logits.count());
}

struct Run {
  MlaForm form = MlaForm::automatic;
  DType kv = DType::f32;
  size_t chunk = SIZE_MAX;  // tokens in a step
};

// Logits [rows, vocab] of chosen positions of one sequence.
inline std::vector<float> run(Model& model, std::span<const int32_t> ids, std::span<const int32_t> rows, const Run& how = {}) {
  model.form = how.form;
  LatentCache cache = model.make_cache(int64_t(ids.size()), how.kv);
  const int sequence = cache.open();
  const auto vocab = size_t(model.config().vocab_size);
  std::vector<float> out;
  size_t next = 0;
  for (size_t from = 0; from < ids.size();) {
    const size_t n = std::min(how.chunk, ids.size() - from);
    const bool wanted = next < rows.size() && size_t(rows[next]) < from + n;
    const auto logits = step(model, cache, sequence, ids.subspan(from, n), wanted ? Chunk::Logits::all : Chunk::Logits::none);
    for (; next < rows.size() && size_t(rows[next]) < from + n; ++next) {
      const auto row = logits.begin() + std::ptrdiff_t((size_t(rows[next]) - from) * vocab);
      out.insert(out.end(), row, row + std::ptrdiff_t(vocab));
    }
    from += n;
  }
  return out;
}

inline std::vector<float> run(Model& model, const Golden& golden, const Run& how = {}) { return run(model, golden.ids, golden.rows, how); }

// Differences relative to the spread of the wanted logits.
struct Difference {
  double max = 0, rms = 0, median = 0;
};

inline Difference difference(const std::vector<float>& got, const std::vector<float>& wanted) {
  EXPECT_EQ(got.size(), wanted.size());
  const auto [low, high] = std::minmax_element(wanted.begin(), wanted.end());
  const double spread = double(*high) - double(*low);
  std::vector<double> errors;
  double squares = 0;
  for (size_t i = 0; i < std::min(got.size(), wanted.size()); ++i) {
    const double error = std::abs(double(got[i]) - double(wanted[i])) / spread;
    errors.push_back(std::isfinite(error) ? error : HUGE_VAL);
    squares += error * error;
  }
  std::sort(errors.begin(), errors.end());
  return {errors.back(), std::sqrt(squares / double(wanted.size())), errors[errors.size() / 2]};
}

inline std::vector<int32_t> continue_greedily(Model& model, std::span<const int32_t> prompt, size_t count) {
  LatentCache cache = model.make_cache(int64_t(prompt.size() + count), DType::f32);
  const int sequence = cache.open();
  std::vector<int32_t> ids;
  std::vector<float> logits = step(model, cache, sequence, prompt);
  while (true) {
    ids.push_back(int32_t(std::max_element(logits.begin(), logits.end()) - logits.begin()));
    if (ids.size() == count) return ids;
    logits = step(model, cache, sequence, std::span(&ids.back(), 1));
  }
}

// A path that is gone when the test ends.
class Scratch {
 public:
  Scratch() {
    std::string name = (std::filesystem::temp_directory_path() / "mla-test-XXXXXX").string();
    if (!mkdtemp(name.data())) throw std::runtime_error("no temporary folder");
    path_ = name;
  }
  ~Scratch() { std::filesystem::remove_all(path_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

}  // namespace mla::test
