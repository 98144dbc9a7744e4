// What `mla convert` and its sweep share: the options, the texts, a folder that becomes the target once it is whole.
#pragma once

#include "cli/command.h"
#include "cli/score.h"
#include "cli/session.h"
#include "io/writer.h"
#include "lowrank/convert.h"

#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace mla {

class Tokenizer;

struct ConvertArguments {
  std::string path, out, type = "bf16", calibrate, preset = "mla", cut, method, constant, rotary, refit, latent_norm, kv_type = "bf16";
  std::vector<std::string> evaluate;
  MachineOptions machine;
  int64_t rank = 0, rope_dim = 0, query_rank = 0, tokens = 45056, evaluate_windows = 4, window = 512;
  double rope_theta = 0;
  std::optional<double> value_share, output_ridge, down_ridge, fit_rate;
  std::optional<int> fit_passes;
  uint64_t seed = 0;
  bool no_activations = false, no_metric = false, no_fold = false, no_balance = false, no_down = false, parallel = false, force = false,
       json = false;
  bool sweep = false, search = false;
  std::string sweep_cuts = "33.33%,50%,68.75%,81.25%", sweep_methods = "svd,qr,rsvd,cur", sweep_weights = "metric";
};

// The steps that the arguments ask for; sizes are chosen apart.
ConvertOptions read_steps(const ConvertArguments& a);
// Sizes of the arguments: --kv-lora-rank and --rope-dim, or `cut`, the share of the cache that should go, as "68.75%".
void choose_sizes(const ConvertArguments& a, const std::string& cut, const Checkpoint& checkpoint, const Config& config, ConvertOptions& o);
void skip_refits(ConvertOptions& o);

// A text in windows of one length.
struct EvaluationText {
  std::string name;
  std::vector<int32_t> tokens;
  int64_t window;
};
struct ConvertTexts {
  std::vector<int32_t> calibration;
  std::vector<EvaluationText> evaluation;  // without --evaluate, what calibration saw least: the end of its text
};
ConvertTexts read_texts(const ConvertArguments& a, const Checkpoint& checkpoint);

// Both models on each text.
std::vector<Comparison> compare_on(const std::vector<EvaluationText>& texts, Model& before, Model& after, DType kv_type);
Comparison mean_of(const std::vector<Comparison>& each);

// The tokenizer's files for a folder, of a GGUF's vocabulary too.
std::vector<SideFile> tokenizer_files(const Checkpoint& checkpoint);

// Raises Error unless -o can be written, or replaced with --force: a model by a model, a sweep by a sweep, and nothing that is read here.
void check_target(const ConvertArguments& a);
// The machine that the arguments name, which must be the host's.
std::unique_ptr<Device> open_host(const ConvertArguments& a);

// A folder under a temporary name, made at once; it becomes the target when it has been verified, and is removed otherwise.
class Draft {
 public:
  explicit Draft(const std::filesystem::path& target);
  ~Draft();
  Draft(const Draft&) = delete;
  Draft& operator=(const Draft&) = delete;
  const std::filesystem::path& path() const { return path_; }

  void keep() const;

 private:
  std::filesystem::path target_, path_;
};

// One calibration, then every size and method from it, with nothing refitted: sweep.md, sweep.json and sweep.svg in the folder -o.
void sweep_conversions(const ConvertArguments& a);
// The balance of values and keys whose conversion, with nothing refitted, diverges least on windows of the calibration text it has not
// seen. `scratch`: a folder for models, which is removed.
double search_value_share(const ConvertArguments& a, const Checkpoint& checkpoint, const ConvertOptions& options,
                          std::span<const int32_t> tokens, const std::filesystem::path& scratch, Device& device);

}  // namespace mla
