// The texts of mla convert and the folder it writes.
#include "cli/convert.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "core/check.h"
#include "io/checkpoint.h"
#include "model/make.h"
#include "text/tokenizer_export.h"

#include <unistd.h>
#include <algorithm>

namespace mla {

namespace fs = std::filesystem;

namespace {

bool lies_under(const fs::path& file, const fs::path& folder) {
  std::error_code ignored;
  const fs::path relative = fs::weakly_canonical(file, ignored).lexically_relative(fs::weakly_canonical(folder, ignored));
  return !relative.empty() && *relative.begin() != "..";
}

bool holds_a_sweep(const fs::path& folder) {
  return std::ranges::all_of(fs::directory_iterator(folder), [](const auto& entry) {
    const std::string name = entry.path().filename().string();
    return name == "sweep.md" || name == "sweep.json" || name == "sweep.svg";
  });
}

}  // namespace

void check_target(const ConvertArguments& a) {
  std::error_code ignored;
  const fs::path out = a.out, folder = fs::absolute(out.has_filename() ? out : out.parent_path()).parent_path();
  if (!fs::is_directory(folder, ignored)) fail_input("-o is {}, and there is no folder {}; make it first", a.out, folder.string());
  if (fs::equivalent(out, a.path, ignored)) fail_input("-o is the model itself, {}; give another name", a.out);
  if (!fs::exists(out, ignored)) return;
  if (!fs::is_directory(out, ignored)) fail_input("{} is there and no folder; give another name", a.out);
  if (!fs::is_empty(out, ignored) && !a.force) fail_input("{} is there already; --force replaces it", a.out);
  if (!fs::is_empty(out, ignored) && !(a.sweep ? holds_a_sweep(out) : fs::exists(out / "config.json", ignored)))
    fail_input("{} holds something else than a {}; --force does not replace that", a.out, a.sweep ? "sweep" : "model");
  std::vector<std::string> read{a.path, a.calibrate};
  read.insert(read.end(), a.evaluate.begin(), a.evaluate.end());
  for (const std::string& file : read)
    if (!file.empty() && lies_under(file, out)) fail_input("{} lies in {}, which would be replaced; give another name", file, a.out);
}

std::unique_ptr<Device> open_host(const ConvertArguments& a) {
  auto device = a.machine.open();
  if (device->memory().place() != Place::host) fail_input("mla convert factorises on the CPU; leave --device out");
  device->activations = Activations::i16;
  return device;
}

std::vector<SideFile> tokenizer_files(const Checkpoint& checkpoint) {
  std::vector<SideFile> files = text_files(checkpoint);
  if (checkpoint.format() != Format::gguf) return files;
  if (auto exported = export_tokenizer(gguf_vocabulary(checkpoint))) {
    files.push_back({"tokenizer.json", std::move(exported->tokenizer)});
    files.push_back({"tokenizer_config.json", std::move(exported->tokenizer_config)});
  }
  return files;
}

ConvertTexts read_texts(const ConvertArguments& a, const Checkpoint& checkpoint) {
  const auto tokenizer = open_tokenizer(checkpoint);
  if (!tokenizer) fail_input("{} has no tokenizer to read the calibration text with", a.path);
  if (a.calibrate.empty()) fail_input("--calibrate is missing; it names a text of the kind that the model is for");
  if (a.evaluate_windows < 1) fail_input("--evaluate-windows is {}; give 1 or more", a.evaluate_windows);
  constexpr int64_t window = 1024;
  const auto read = [&](const std::string& file) { return tokenizer->encode(read_file(file), false, false); };
  const auto windows_of = [&](std::vector<int32_t> tokens, const std::string& name, bool from_end) {
    const auto length = std::min<int64_t>(window, int64_t(tokens.size()));
    if (length < 2) fail_input("{} has {} tokens; give a longer text to measure on", name, tokens.size());
    const int64_t count = std::min(a.evaluate_windows, int64_t(tokens.size()) / length) * length;
    const auto first = from_end ? tokens.end() - count : tokens.begin();
    return EvaluationText{name, {first, first + count}, length};
  };
  ConvertTexts texts;
  texts.calibration = read(a.calibrate);
  if (int64_t(texts.calibration.size()) < a.window)
    fail_input("{} has {} tokens, less than a calibration window of {}; give a longer text", a.calibrate, texts.calibration.size(),
               a.window);
  for (const std::string& file : a.evaluate) texts.evaluation.push_back(windows_of(read(file), file, false));
  if (a.evaluate.empty()) texts.evaluation.push_back(windows_of(texts.calibration, a.calibrate, true));
  if (int64_t(texts.calibration.size()) > a.tokens) texts.calibration.resize(size_t(std::max(a.tokens, a.window)));
  return texts;
}

std::vector<Comparison> compare_on(const std::vector<EvaluationText>& texts, Model& before, Model& after, DType kv_type) {
  std::vector<Comparison> out;
  out.reserve(texts.size());
  ProgressBar bar("measuring");
  for (const EvaluationText& text : texts)
    out.push_back(compare_models(before, after, text.tokens, text.window, kv_type, [&](double fraction) {
      throw_if_interrupted();
      bar.update((double(out.size()) + fraction) / double(texts.size()));
    }));
  return out;
}

Comparison mean_of(const std::vector<Comparison>& each) {
  Comparison out;
  const auto n = double(each.size());
  for (const Comparison& c : each)
    out.nll_before += c.nll_before / n, out.nll_after += c.nll_after / n, out.kl += c.kl / n, out.scored += c.scored;
  return out;
}

Draft::Draft(const fs::path& target)
    : target_(fs::weakly_canonical(target.has_filename() ? target : target.parent_path())), path_(target_) {
  path_ += fmt::format(".{}.draft", getpid());
  std::error_code error;
  fs::create_directory(path_, error);
  if (error) fail_input("cannot write beside {}: {}", target_.string(), error.message());
}

Draft::~Draft() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

void Draft::keep() const {
  std::error_code error;
  fs::path old = path_;
  old += ".old";
  const bool replaces = fs::exists(target_);
  if (replaces) fs::rename(target_, old, error);
  if (!error) fs::rename(path_, target_, error);
  if (error) {
    std::error_code ignored;
    if (replaces) fs::rename(old, target_, ignored);
    fail("cannot give {} its name: {}", target_.string(), error.message());
  }
  fs::remove_all(old, error);
}

}  // namespace mla
