// What the writers leave on disk: files that read back, byte for byte the gguf package's GGUF, and nothing at all when the work fails.
#include "io/writer.h"

#include "bytes.h"
#include "io/checkpoint.h"

#include <sys/resource.h>
#include <nlohmann/json.hpp>

#include <csignal>
#include <iterator>
#include <numeric>

namespace mla::test {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

std::string contents(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

size_t files_in(const fs::path& folder) {
  return size_t(std::distance(fs::recursive_directory_iterator(folder), fs::recursive_directory_iterator()));
}

std::vector<std::byte> counted(size_t n) {
  std::vector<std::byte> bytes(n);
  for (size_t i = 0; i < n; ++i) bytes[i] = std::byte(i * 7 + i / 256);
  return bytes;
}

const std::vector<TensorPlan> plans{
    {"embed", DType::f16, {5, 32}}, {"norm", DType::f32, {3}}, {"layers.0.ffn.experts.down", DType::q4_0, {2, 3, 64}}};
constexpr size_t plan_bytes = 5 * 64 + 12 + 6 * 36;

const json metadata = {{"general.architecture", "llama"},
                       {"llama.block_count", 1},
                       {"llama.rope.freq_base", 10000.0},
                       {"tokenizer.ggml.add_bos_token", true},
                       {"tokenizer.ggml.merges", json::array({"x"})},
                       {"tokenizer.ggml.scores", {0.5, -1.0}},
                       {"tokenizer.ggml.token_type", {1, 3}},
                       {"tokenizer.ggml.tokens", {"a", "ü"}},
                       {"z.big", uint64_t(1) << 40},
                       {"z.negative", -5}};

// tools/golden/make_written_gguf.py
TEST(GgufWriter, BytesAreThoseOfTheGgufPackage) {
  const Folder folder;
  const auto writer = write_gguf(folder.path() / "a.gguf", metadata, plans);
  writer->append(counted(plan_bytes));
  writer->finish();
  EXPECT_EQ(contents(folder.path() / "a.gguf"), contents(fs::path(MLA_TEST_DATA) / "golden/written.gguf"));
}

TEST(GgufWriter, PartsMayBeOfAnySize) {
  const Folder folder;
  const std::vector<std::byte> bytes = counted(plan_bytes);
  for (const size_t part : {size_t(1), size_t(7), size_t(100), bytes.size()}) {
    const auto writer = write_gguf(folder.path() / "a.gguf", metadata, plans);
    for (size_t at = 0; at < bytes.size(); at += part) writer->append(std::span(bytes).subspan(at, std::min(part, bytes.size() - at)));
    writer->finish();
    EXPECT_EQ(contents(folder.path() / "a.gguf"), contents(fs::path(MLA_TEST_DATA) / "golden/written.gguf")) << part;
  }
}

TEST(GgufWriter, ReplacesAFileOnlyWhenComplete) {
  const Folder folder;
  const fs::path path = folder.write("a.gguf", "old");
  {
    const auto writer = write_gguf(path, metadata, plans);
    writer->append(counted(plan_bytes / 2));
  }
  EXPECT_EQ(contents(path), "old");
  EXPECT_EQ(files_in(folder.path()), 1u);
  const auto writer = write_gguf(path, metadata, plans);
  writer->append(counted(plan_bytes));
  writer->finish();
  EXPECT_NE(contents(path), "old");
  EXPECT_EQ(files_in(folder.path()), 1u);
}

TEST(GgufWriter, MissingOrSurplusBytesAreErrors) {
  const Folder folder;
  const auto writer = write_gguf(folder.path() / "a.gguf", metadata, plans);
  writer->append(counted(plan_bytes - 1));
  EXPECT_THROW(writer->finish(), Error);
  writer->append(counted(1));
  EXPECT_THROW(writer->append(counted(1)), Error);
}

TEST(GgufWriter, SaysWhereItCannotWrite) {
  const Folder folder;
  expect_refused([&] { write_gguf(folder.path() / "none" / "a.gguf", metadata, plans); }, "none/a.gguf");
  expect_refused([&] { write_gguf(folder.path(), metadata, plans); }, "is a folder");
}

// A limit on the file's size stands for the full disk: both fail the same call.
TEST(GgufWriter, FullDiskLeavesNothing) {
  const Folder folder;
  rlimit before{};
  getrlimit(RLIMIT_FSIZE, &before);
  const auto old = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit low{1000, before.rlim_max};
  setrlimit(RLIMIT_FSIZE, &low);
  try {
    const auto writer = write_gguf(folder.path() / "a.gguf", metadata, plans);
    writer->append(counted(plan_bytes));
    ADD_FAILURE() << "written beyond the limit";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::failed);
    EXPECT_NE(std::string_view(error.what()).find("a.gguf"), std::string_view::npos) << error.what();
  }
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, old);
  EXPECT_EQ(files_in(folder.path()), 0u);
}

TEST(GgufWriter, RefusesWhatDoesNotFitOnTheDisk) {
  const Folder folder;
  const std::vector<TensorPlan> huge{{"embed", DType::f32, {int64_t(1) << 40, 1 << 15}}};
  EXPECT_THROW(write_gguf(folder.path() / "a.gguf", metadata, huge), Error);
  EXPECT_EQ(files_in(folder.path()), 0u);
}

const std::vector<TensorPlan> hf_plans{{"embed", DType::bf16, {4, 8}},
                                       {"layers.0.attn.q", DType::bf16, {8, 8}},
                                       {"layers.0.attn.q.bias", DType::bf16, {8}},
                                       {"norm", DType::bf16, {8}}};
constexpr size_t hf_bytes = 2 * (32 + 64 + 8 + 8);

TEST(HfWriter, ReadsBackWholeAndInShards) {
  for (const int64_t shard : {int64_t(5) << 30, int64_t(130), int64_t(1)}) {
    const Folder folder;
    const fs::path model = folder.path() / "model";
    const auto writer = write_hf(model, {{"model_type", "llama"}}, hf_plans, {{"tokenizer.json", "{}"}}, shard);
    const std::vector<std::byte> bytes = counted(hf_bytes);
    writer->append(std::span(bytes).first(50));
    writer->append(std::span(bytes).subspan(50));
    writer->finish();
    EXPECT_EQ(fs::exists(model / "model.safetensors.index.json"), shard < 1000);
    EXPECT_EQ(files_in(folder.path()), 1u + 2u + (shard > 1000 ? 1u : shard == 130 ? 1u + 3u : 1u + 4u));

    const Checkpoint back = Checkpoint::open(model);
    EXPECT_EQ(back.text("tokenizer.json"), "{}");
    size_t at = 0;
    for (const TensorPlan& plan : hf_plans) {
      const Tensor& t = back.get(plan.name).value;
      EXPECT_EQ(std::vector<int64_t>(t.shape, t.shape + t.rank), plan.shape);
      const size_t n = size_t(t.count()) * 2;
      EXPECT_EQ(std::memcmp(t.data, bytes.data() + at, n), 0) << plan.name;
      at += n;
    }
  }
}

TEST(HfWriter, UnfinishedLeavesNothing) {
  const Folder folder;
  {
    const auto writer = write_hf(folder.path() / "model", {{"model_type", "llama"}}, hf_plans, {}, 100);
    writer->append(counted(hf_bytes - 1));
    EXPECT_THROW(writer->finish(), Error);
  }
  EXPECT_EQ(files_in(folder.path()), 0u);
}

TEST(HfWriter, KeepsWhatIsThere) {
  const Folder folder;
  folder.write("mine.txt", "x");
  expect_refused([&] { write_hf(folder.path(), json::object(), hf_plans, {}); }, "not empty");
  EXPECT_EQ(files_in(folder.path()), 1u);
  expect_refused([&] { write_hf(folder.path() / "q", json::object(), {{"embed", DType::q8_0, {2, 32}}}, {}); }, "q8_0");
}

}  // namespace
}  // namespace mla::test
