// The house rules a machine can check: who includes whom, how long files are, and that the documents name files that exist.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

namespace {

namespace fs = std::filesystem;
using Rooms = std::set<std::string>;

const fs::path root = fs::path(MLA_TEST_DATA).parent_path().parent_path();

// The rooms of src and whose headers each may see, itself aside. Models never name a device's room: make_cpu and make_cuda are
// declared in device/device.h.
const std::map<std::string, Rooms> may_include = {
    {"core", {}},
    {"device", {"core"}},
    {"cpu", {"core", "device"}},
    {"cuda", {"core", "device"}},
    {"io", {"core"}},
    {"text", {"core"}},
    {"model", {"core", "device", "io"}},
    {"lowrank", {"core", "device", "io", "model"}},
    {"cli", {"core", "device", "io", "text", "model", "lowrank"}},
};

std::string read(const fs::path& file) {
  std::ifstream in(file, std::ios::binary);
  EXPECT_TRUE(in) << file;
  return std::string(std::istreambuf_iterator<char>(in), {});
}

std::vector<fs::path> files_under(const fs::path& folder, const std::set<std::string>& extensions) {
  std::vector<fs::path> found;
  if (!fs::exists(folder)) return found;
  for (const auto& entry : fs::recursive_directory_iterator(folder))
    if (entry.is_regular_file() && extensions.contains(entry.path().extension())) found.push_back(entry.path());
  return found;
}

std::vector<fs::path> sources() {
  std::vector<fs::path> all;
  for (const char* folder : {"src", "tests", "bench"})
    for (auto& file : files_under(root / folder, {".h", ".cpp", ".inc", ".cu", ".cuh"})) all.push_back(file);
  return all;
}

// Lines of `text` that match, as (line number, first group).
std::vector<std::pair<int, std::string>> matches(const std::string& text, const std::regex& pattern) {
  std::vector<std::pair<int, std::string>> found;
  std::istringstream lines(text);
  std::string line;
  for (int number = 1; std::getline(lines, line); ++number) {
    for (auto it = std::sregex_iterator(line.begin(), line.end(), pattern); it != std::sregex_iterator(); ++it) {
      found.emplace_back(number, (*it)[1]);
    }
  }
  return found;
}

TEST(Layout, RoomsIncludeOnlyWhatTheyMay) {
  const std::regex include(R"(^\s*#\s*include\s*"([^"]+)\")");
  int checked = 0;
  for (const auto& file : files_under(root / "src", {".h", ".cpp", ".inc", ".cu", ".cuh"})) {
    const std::string room = *fs::relative(file, root / "src").begin();
    ASSERT_TRUE(may_include.contains(room)) << file << " is in a room without a rule";
    for (const auto& [line, header] : matches(read(file), include)) {
      ASSERT_TRUE(fs::exists(root / "src" / header)) << file << ":" << line << ": include \"" << header << "\" by its path from src";
      const std::string other = *fs::path(header).begin();
      EXPECT_TRUE(other == room || may_include.at(room).contains(other))
          << file << ":" << line << ": " << room << " must not include from " << other;
      ++checked;
    }
  }
  EXPECT_GT(checked, 50);
}

TEST(Layout, RulesHaveNoCycle) {
  // Repeatedly takes away the rooms that see none of those left; a cycle would stay.
  std::map<std::string, Rooms> left = may_include;
  while (!left.empty()) {
    const auto free = std::find_if(left.begin(), left.end(), [&](const auto& room) {
      return std::none_of(room.second.begin(), room.second.end(), [&](const auto& seen) { return left.contains(seen); });
    });
    ASSERT_NE(free, left.end());
    left.erase(free);
  }
}

TEST(Layout, FilesOpenWithTheirPurposeAndStayShort) {
  for (const auto& file : sources()) {
    const std::string text = read(file);
    EXPECT_TRUE(text.starts_with("// ")) << file << " does not open with a sentence that says what it is for";
    EXPECT_LE(std::count(text.begin(), text.end(), '\n'), 600) << file << " is too long to read; split it";
  }
}

TEST(Layout, HeadersAreGuarded) {
  for (const auto& file : sources()) {
    if (file.extension() == ".h") EXPECT_NE(read(file).find("#pragma once"), std::string::npos) << file;
  }
}

// In backticks, a path that starts with one of our folders must be there (a pattern with * or { } is left alone); so must a link's target.
TEST(Layout, DocumentsNameFilesThatExist) {
  const std::regex path(R"(`((?:src|tests|bench|tools|docs)/[A-Za-z0-9_./-]+)`)"), link(R"(\]\(([A-Za-z0-9_./-]+)\))");
  std::vector<fs::path> documents = files_under(root / "docs", {".md"});
  for (const char* name : {"README.md", "CONTRIBUTING.md"}) documents.push_back(root / name);
  int checked = 0;
  for (const auto& document : documents) {
    const std::string text = read(document);
    for (const auto& [pattern, base] : {std::pair(path, root), std::pair(link, document.parent_path())}) {
      for (const auto& [line, named] : matches(text, pattern)) {
        EXPECT_TRUE(fs::exists(base / named)) << document << ":" << line << ": there is no " << named;
        ++checked;
      }
    }
  }
  EXPECT_GT(checked, 20);
}

}  // namespace
