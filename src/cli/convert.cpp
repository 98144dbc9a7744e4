// mla convert: a checkpoint with grouped-query attention as a DeepSeek-V2 checkpoint, calibrated on a text, verified before it is kept.
#include "lowrank/convert.h"
#include "cli/command.h"
#include "cli/format.h"
#include "cli/help.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "cli/score.h"
#include "cli/session.h"
#include "core/check.h"
#include "core/threads.h"
#include "io/writer_file.h"
#include "model/make.h"
#include "text/tokenizer_export.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <unistd.h>
#include <array>
#include <charconv>
#include <chrono>
#include <cmath>
#include <filesystem>

namespace mla {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

struct Arguments {
  std::string path, out, type = "bf16", calibrate, evaluate, preset = "mla", cut, method, constant, refit, latent_norm, kv_type = "bf16";
  MachineOptions machine;
  int64_t rank = 0, rope_dim = 0, tokens = 45056, evaluate_windows = 4, window = 512;
  double value_share = 0;
  uint64_t seed = 0;
  bool no_activations = false, no_metric = false, no_fold = false, no_down = false, parallel = false, force = false, json = false;
};

// A word of a short list.
template <class Value, size_t n>
Value chosen(const std::string& word, const char* option, const std::array<std::pair<const char*, Value>, n>& words) {
  std::string known;
  for (const auto& [name, value] : words) {
    if (word == name) return value;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", name);
  }
  fail_input("{} is \"{}\"; known are {}", option, word, known);
}

ConvertOptions preset_options(const std::string& preset) {
  ConvertOptions o;
  if (preset == "mla") return o;
  if (preset != "transmla" && preset != "mha2mla") fail_input("--preset is \"{}\"; known are mla, transmla and mha2mla", preset);
  // Published pipelines, as far as a DeepSeek-V2 checkpoint can express them: nothing is refitted. Their own model code has no norm on the
  // latent, so they get the constant channel that makes it harmless; with one calibrated scale they would be far worse.
  o.layer.constant = Constant::one;
  o.layer.metric = false;
  o.layer.value_share = 1;
  o.sequential = false;
  o.refit = Refit::none;
  o.refit_down = false;
  if (preset == "mha2mla") o.layer.activations = o.layer.fold = false;
  return o;
}

// The elements of the cache that "68.75%" leaves.
int64_t elements_left(const std::string& cut, int64_t whole) {
  double percent = 0;
  const char* end = cut.data() + cut.size();
  const auto [at, problem] = std::from_chars(cut.data(), end, percent);
  if (problem != std::errc() || (at != end && std::string_view(at) != "%") || !(percent > 0 && percent < 100))
    fail_input("--cut is \"{}\"; give how much of the cache should go, as in 68.75%", cut);
  return std::llround(double(whole) * (1 - percent / 100));
}

void choose_sizes(const Arguments& a, const Config& c, ConvertOptions& o) {
  const int64_t whole = c.kv_layout().row();
  if (a.rank < 0 || a.rope_dim < 0) fail_input("--kv-lora-rank is {} and --rope-dim {}; both must be positive", a.rank, a.rope_dim);
  if ((a.rank > 0) == !a.cut.empty())
    fail_input("give either --kv-lora-rank (with --rope-dim) or --cut, the share of the cache that should go");
  const int64_t left = a.rank > 0 ? a.rank + a.rope_dim : elements_left(a.cut, whole);
  // A wide rotary key is worth its room down to half of the cache; below, half of the frequencies, folded, serve better.
  o.layer.qk_rope_head_dim = a.rope_dim > 0 ? a.rope_dim : 2 * left >= whole || c.head_dim % 4 != 0 ? c.head_dim : c.head_dim / 2;
  o.layer.kv_lora_rank = a.rank > 0 ? a.rank : left - o.layer.qk_rope_head_dim;
  if (o.layer.kv_lora_rank + o.layer.qk_rope_head_dim >= whole)
    fail_input("{} + {} elements are no less than the {} that the model keeps now; ask for a smaller latent", o.layer.kv_lora_rank,
               o.layer.qk_rope_head_dim, whole);
}

ConvertOptions read_options(const Arguments& a, const Config& config) {
  ConvertOptions o = preset_options(a.preset);
  choose_sizes(a, config, o);
  LayerOptions& l = o.layer;
  if (!a.method.empty()) {
    const auto method = parse_method(a.method);
    if (!method) fail_input("--method is \"{}\"; known are svd, qr, rsvd and cur", a.method);
    l.method = *method;
  }
  if (!a.constant.empty())
    l.constant =
        chosen(a.constant, "--constant",
               std::array{std::pair("one", Constant::one), std::pair("mean", Constant::mean), std::pair("ls", Constant::least_squares)});
  if (!a.latent_norm.empty())
    l.latent_norm = chosen(a.latent_norm, "--latent-norm",
                           std::array{std::pair("constant", LatentNorm::constant), std::pair("functional", LatentNorm::functional),
                                      std::pair("scale", LatentNorm::scale)});
  if (!a.refit.empty())
    o.refit = chosen(a.refit, "--refit",
                     std::array{std::pair("none", Refit::none), std::pair("layer", Refit::layer), std::pair("drift", Refit::drift)});
  l.activations = l.activations && !a.no_activations;
  l.metric = l.metric && !a.no_metric;
  l.fold = l.fold && !a.no_fold;
  if (a.value_share != 0) l.value_share = a.value_share;
  l.seed = a.seed;
  o.refit_down = o.refit_down && !a.no_down;
  o.sequential = o.sequential && !a.parallel;
  o.window = a.window;
  const auto type = parse_dtype(a.type);
  if (!type) fail_input("--type is \"{}\"; give bf16 or f32", a.type);
  o.type = *type;
  return o;
}

void check_target(const Arguments& a) {
  std::error_code ignored;
  const fs::path out = a.out, folder = fs::absolute(out.has_filename() ? out : out.parent_path()).parent_path();
  if (!fs::is_directory(folder, ignored)) fail_input("-o is {}, and there is no folder {}; make it first", a.out, folder.string());
  if (fs::equivalent(out, a.path, ignored)) fail_input("-o is the model itself, {}; give another name", a.out);
  if (!fs::exists(out, ignored)) return;
  if (!fs::is_directory(out, ignored)) fail_input("{} is there and no folder; give another name", a.out);
  if (!fs::is_empty(out, ignored) && !a.force) fail_input("{} is there already; --force replaces it", a.out);
  if (!fs::is_empty(out, ignored) && !fs::exists(out / "config.json", ignored))
    fail_input("{} holds something else than a model; --force does not replace that", a.out);
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

std::vector<int32_t> read_text_tokens(const Tokenizer& tokenizer, const std::string& file) {
  return tokenizer.encode(read_file(file), false, false);
}

// A folder under a temporary name; it becomes the target when it has been verified, and is removed otherwise.
class Draft {
 public:
  explicit Draft(const fs::path& target) : target_(target.has_filename() ? target : target.parent_path()), path_(target_) {
    path_ += fmt::format(".{}.draft", getpid());
  }
  ~Draft() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  Draft(const Draft&) = delete;
  Draft& operator=(const Draft&) = delete;
  const fs::path& path() const { return path_; }

  void keep() const {
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

 private:
  fs::path target_, path_;
};

class Conversion {
 public:
  explicit Conversion(const Arguments& a)
      : a_(a), checkpoint_(Checkpoint::open(a.path)), config_(read_config(checkpoint_)), options_(checked_options()) {}

  void run() {
    const auto tokenizer = open_tokenizer(checkpoint_);
    if (!tokenizer) fail_input("{} has no tokenizer to read the calibration text with", a_.path);
    std::vector<int32_t> tokens = read_text_tokens(*tokenizer, a_.calibrate);
    if (int64_t(tokens.size()) < options_.window)
      fail_input("{} has {} tokens, less than a calibration window of {}; give a longer text", a_.calibrate, tokens.size(),
                 options_.window);
    std::vector<int32_t> held_out = a_.evaluate.empty() ? tokens : read_text_tokens(*tokenizer, a_.evaluate);
    if (int64_t(tokens.size()) > a_.tokens) tokens.resize(size_t(std::max(a_.tokens, options_.window)));
    const auto device = a_.machine.open();
    device->activations = Activations::i16;
    const auto begin = std::chrono::steady_clock::now();
    const auto passed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(); };
    Replacement instead = convert_layers(tokens, *device);
    const double seconds = passed();

    const Draft draft(a_.out);
    const Made made =
        export_hf(checkpoint_, instead, draft.path(), options_.type, device->threads(), [](double) { throw_if_interrupted(); });
    const Comparison quality = verify(draft.path(), held_out, *device);
    write_card(draft.path(), tokens.size(), quality);
    draft.keep();
    report(made, quality, tokens.size(), seconds);
  }

 private:
  ConvertOptions checked_options() const {
    check_target(a_);
    if (config_.is_mla()) fail_input("{} has latent attention already", a_.path);
    if (a_.calibrate.empty()) fail_input("--calibrate is missing; it names a text of the kind that the model is for");
    if (a_.evaluate_windows < 1) fail_input("--evaluate-windows is {}; give 1 or more", a_.evaluate_windows);
    parse_kv_type(a_.kv_type);
    ConvertOptions o = read_options(a_, config_);
    check_convertible(checkpoint_, config_, o);
    return o;
  }

  Replacement convert_layers(std::span<const int32_t> tokens, Device& device) const {
    ProgressBar bar("converting");
    Converted converted = convert(checkpoint_, tokens, options_, device, [&](double fraction) {
      throw_if_interrupted();
      bar.update(fraction, fmt::format("layer {} of {}", int(fraction * config_.num_hidden_layers) + 1, config_.num_hidden_layers));
    });
    return {std::move(converted.config), std::move(converted.tensors), tokenizer_files(checkpoint_)};
  }

  // Loads what was written, lets it write, and compares both models on a text.
  Comparison verify(const fs::path& folder, std::span<const int32_t> text, Device& device) const {
    const Checkpoint written = Checkpoint::open(folder);
    Model before(checkpoint_, device), after(written, device);
    std::vector<Generation> texts(1);
    LatentCache cache = after.make_cache(64, DType::bf16);
    texts[0].sequence = cache.open();
    texts[0].tokens.assign(text.begin(), text.begin() + std::min<int64_t>(16, int64_t(text.size())));
    GenerateOptions generating;
    generating.max_tokens = 8;
    generate(after, cache, texts, generating, {});
    if (texts[0].sampled.empty()) fail("the converted model does not write; nothing is kept");

    constexpr int64_t window = 1024;
    const int64_t length = std::min<int64_t>(window, int64_t(text.size()));
    const int64_t count = std::min(a_.evaluate_windows, int64_t(text.size()) / length);
    // Without a text of its own, what calibration saw least: the end.
    const auto part = a_.evaluate.empty() ? text.last(size_t(count * length)) : text.first(size_t(count * length));
    ProgressBar bar("verifying");
    const Comparison c = compare_models(before, after, part, length, parse_kv_type(a_.kv_type), [&](double fraction) {
      throw_if_interrupted();
      bar.update(fraction);
    });
    if (!std::isfinite(c.nll_after) || !std::isfinite(c.kl)) fail("the converted model's logits are no finite numbers; nothing is kept");
    return c;
  }

  void write_card(const fs::path& folder, size_t tokens, const Comparison& q) const {
    const LayerOptions& l = options_.layer;
    OutputFile file(folder / "README.md");
    file.write(fmt::format(
        "# {} with multi-head latent attention\n\n"
        "Converted by `mla convert` from grouped-query attention. It leaves {} + {} elements of a token and layer in the cache instead of "
        "{}.\n\n"
        "| | |\n|---|---|\n| preset | {} |\n| method | {} |\n| weights | {}{} |\n| constants of unrotated channels | {} |\n"
        "| values' share β | {} |\n| latent norm | {} |\n| refit | W_O {}{} |\n| calibration | {} tokens, windows of {}{} |\n"
        "| perplexity before, after | {:.3f}, {:.3f} ({} tokens of {}) |\n| KL divergence | {:.4f} |\n",
        fs::path(a_.path).filename().string(), l.kv_lora_rank, l.qk_rope_head_dim, config_.kv_layout().row(), a_.preset, name(l.method),
        l.activations ? "activations" : "none", l.metric ? " and metric" : "",
        l.constant == Constant::one    ? "1"
        : l.constant == Constant::mean ? "mean"
                                       : "least squares",
        l.value_share,
        l.latent_norm == LatentNorm::constant     ? "constant channel"
        : l.latent_norm == LatentNorm::functional ? "linear functional"
                                                  : "scale",
        options_.refit == Refit::none    ? "no"
        : options_.refit == Refit::layer ? "to its layer"
                                         : "to the original's stream",
        options_.refit_down ? ", W_down" : "", tokens, options_.window, options_.sequential ? ", on the converted prefix" : "",
        std::exp(q.nll_before), std::exp(q.nll_after), q.scored, a_.evaluate.empty() ? "the calibration text" : "another text", q.kl));
    file.finish();
  }

  void report(const Made& made, const Comparison& q, size_t tokens, double seconds) const {
    const int64_t before = config_.kv_layout().row(), after = options_.layer.kv_lora_rank + options_.layer.qk_rope_head_dim;
    if (a_.json) {
      print_json(Json{{"kv_lora_rank", options_.layer.kv_lora_rank},
                      {"qk_rope_head_dim", options_.layer.qk_rope_head_dim},
                      {"cache_elements_before", before},
                      {"cache_elements_after", after},
                      {"perplexity_before", std::exp(q.nll_before)},
                      {"perplexity_after", std::exp(q.nll_after)},
                      {"kl", q.kl},
                      {"seconds", seconds},
                      {"calibration_tokens", tokens},
                      {"evaluated_tokens", q.scored},
                      {"evaluated_on", a_.evaluate.empty() ? a_.calibrate : a_.evaluate},
                      {"output", a_.out}});
      return;
    }
    fmt::print("cache of a token and layer: {} → {} elements ({} + {}), {:.2f}% less\n", before, after, options_.layer.kv_lora_rank,
               options_.layer.qk_rope_head_dim, 100 * (1 - double(after) / double(before)));
    fmt::print("perplexity: {:.3f} → {:.3f}, KL {:.4f} ({} tokens of {})\n", std::exp(q.nll_before), std::exp(q.nll_after), q.kl,
               grouped(q.scored), a_.evaluate.empty() ? a_.calibrate : a_.evaluate);
    std::fflush(stdout);
    fmt::print(stderr, "mla: converted {} layers on {} tokens in {}; wrote {}, {}\n", config_.num_hidden_layers, grouped(int64_t(tokens)),
               duration_text(seconds), a_.out, bytes_text(double(made.bytes)));
  }

  const Arguments& a_;
  Checkpoint checkpoint_;
  Config config_;
  ConvertOptions options_;
};

}  // namespace

void add_convert(CLI::App& program, Work& work) {
  auto a = std::make_shared<Arguments>();
  CLI::App& c =
      add_command(program, "convert", "turn a LLaMA-like model into one with latent attention (DeepSeek-V2)",
                  "  mla convert model.gguf -o folder --cut 50% --calibrate text.txt\n"
                  "  mla convert model -o folder --kv-lora-rank 88 --rope-dim 32 --calibrate text.txt --evaluate other.txt --json\n"
                  "  mla convert model -o folder --cut 50% --preset transmla --calibrate text.txt");
  add_model_path(c, a->path);
  c.add_option("-o,--output", a->out, "the folder to write")->required()->option_text("FOLDER")->group("output");
  c.add_option("--type", a->type, "bf16 or f32 (default: bf16)")->option_text("TYPE")->group("output");
  c.add_flag("--force", a->force, "replace a model that is there")->group("output");
  add_json(c, a->json);
  c.add_option("--cut", a->cut, "how much of the cache should go, as in 68.75%")->option_text("SHARE")->group("size");
  c.add_option("--kv-lora-rank", a->rank, "elements of the latent")->option_text("R")->group("size");
  c.add_option("--rope-dim", a->rope_dim, "elements of the rotary key: the head's width, a half or a quarter (default: by the cut)")
      ->option_text("N")
      ->group("size");
  c.add_option("--calibrate", a->calibrate, "a text of the kind the model is for")->option_text("FILE")->group("text");
  c.add_option("--calibration-tokens", a->tokens, "use so much of it (default: 45056)")->option_text("N")->group("text");
  c.add_option("--calibration-window", a->window, "in windows of so many (default: 512)")->option_text("N")->group("text");
  c.add_option("--evaluate", a->evaluate, "measure on this text (default: the calibration text's end)")->option_text("FILE")->group("text");
  c.add_option("--evaluate-windows", a->evaluate_windows, "in so many windows of 1024 (default: 4)")->option_text("K")->group("text");
  c.add_option("--kv-type", a->kv_type, "type of the cache it is measured with (default: bf16)")->option_text("TYPE")->group("text");
  c.add_option("--preset", a->preset, "mla, transmla or mha2mla (default: mla, the best known)")->option_text("NAME")->group("steps");
  c.add_option("--method", a->method, "svd, qr, rsvd or cur (default: svd)")->option_text("NAME")->group("steps");
  c.add_option("--constant", a->constant, "what stands for a lost rotation: one, mean or ls (default: ls)")
      ->option_text("NAME")
      ->group("steps");
  c.add_option("--latent-norm", a->latent_norm, "constant, functional or scale (default: constant)")->option_text("NAME")->group("steps");
  c.add_option("--refit", a->refit, "of W_O: none, layer or drift (default: drift)")->option_text("NAME")->group("steps");
  c.add_option("--value-share", a->value_share, "the values' share in the factorisation, the keys' being 1 (default: 2)")
      ->option_text("BETA")
      ->group("steps");
  c.add_flag("--no-activations", a->no_activations, "do not weigh inputs by their second moments")->group("steps");
  c.add_flag("--no-metric", a->no_metric, "do not weigh keys and values by what they do")->group("steps");
  c.add_flag("--no-fold", a->no_fold, "do not fold neighbouring frequencies into a rotary pair")->group("steps");
  c.add_flag("--no-down", a->no_down, "do not refit W_down")->group("steps");
  c.add_flag("--parallel", a->parallel, "calibrate every layer on the original's stream")->group("steps");
  c.add_option("--seed", a->seed, "of the randomised SVD (default: 0)")->option_text("S")->group("steps");
  add_machine_options(c, a->machine);
  c.final_callback([a, &work] { work = [a] { Conversion(*a).run(); }; });
}

}  // namespace mla
