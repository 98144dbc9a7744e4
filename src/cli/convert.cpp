// mla convert: a checkpoint with grouped-query attention as a DeepSeek-V2 checkpoint, calibrated on a text, verified before it is kept.
#include "cli/convert.h"
#include "cli/format.h"
#include "cli/help.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "core/check.h"
#include "core/threads.h"
#include "io/writer_file.h"
#include "lowrank/original.h"
#include "model/make.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <chrono>
#include <cmath>
#include <filesystem>

namespace mla {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

class Conversion {
 public:
  explicit Conversion(const ConvertArguments& a)
      : a_(a), checkpoint_(Checkpoint::open(a.path)), config_(original_config(checkpoint_)), options_(checked_options()) {}

  void run() {
    const ConvertTexts texts = read_texts(a_, checkpoint_);
    const auto device = open_host(a_);
    const Draft draft(a_.out);
    check_room(draft.path());
    const auto begin = std::chrono::steady_clock::now();
    const auto passed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(); };
    if (a_.search)
      options_.layer.value_share = search_value_share(a_, checkpoint_, options_, texts.calibration, draft.path() / "search", *device);
    Replacement instead = convert_layers(texts.calibration, *device);
    const double seconds = passed();

    const Made made =
        export_hf(checkpoint_, instead, draft.path(), options_.type, device->threads(), [](double) { throw_if_interrupted(); });
    const Comparison quality = verify(draft.path(), texts, *device);
    write_card(draft.path(), texts.calibration.size(), quality);
    draft.keep();
    report(made, quality, texts.calibration.size(), seconds);
  }

 private:
  ConvertOptions checked_options() const {
    check_target(a_);
    if (config_.is_mla()) fail_input("{} has latent attention already", a_.path);
    if (a_.calibrate.empty()) fail_input("--calibrate is missing; it names a text of the kind that the model is for");
    parse_kv_type(a_.kv_type);
    ConvertOptions o = read_steps(a_);
    choose_sizes(a_, a_.cut, checkpoint_, config_, o);
    check_convertible(checkpoint_, config_, o);
    check_tensors(checkpoint_, config_);
    return o;
  }

  void check_room(const fs::path& folder) const {
    int64_t bytes = 0;
    for (const StoredTensor& t : checkpoint_.tensors()) bytes += row_bytes(options_.type, t.value.count());
    if (const auto free = fs::space(folder).available; int64_t(free) < bytes)
      fail("the converted model takes about {}, and {} has room for {}", bytes_text(double(bytes)), folder.parent_path().string(),
           bytes_text(double(free)));
  }

  std::string evaluated_on() const {
    std::string out;
    for (const std::string& file : a_.evaluate) out += (out.empty() ? "" : ", ") + file;
    return out.empty() ? a_.calibrate : out;
  }

  Replacement convert_layers(std::span<const int32_t> tokens, Device& device) const {
    ProgressBar bar("converting");
    Converted converted = convert(checkpoint_, tokens, options_, device, [&](double fraction) {
      throw_if_interrupted();
      bar.update(fraction, fmt::format("layer {} of {}", int(fraction * config_.num_hidden_layers) + 1, config_.num_hidden_layers));
    });
    return {std::move(converted.config), std::move(converted.tensors), tokenizer_files(checkpoint_)};
  }

  // Loads what was written, lets it write, and compares both models.
  Comparison verify(const fs::path& folder, const ConvertTexts& texts, Device& device) const {
    const Checkpoint written = Checkpoint::open(folder);
    Model before(checkpoint_, device), after(written, device);
    std::vector<Generation> prompts(1);
    LatentCache cache = after.make_cache(64, DType::bf16);
    prompts[0].sequence = cache.open();
    const std::vector<int32_t>& text = texts.evaluation[0].tokens;
    prompts[0].tokens.assign(text.begin(), text.begin() + std::min<int64_t>(16, int64_t(text.size())));
    GenerateOptions generating;
    generating.max_tokens = 8;
    generate(after, cache, prompts, generating, {});
    if (prompts[0].sampled.empty()) fail("the converted model does not write; nothing is kept");
    const Comparison c = mean_of(compare_on(texts.evaluation, before, after, parse_kv_type(a_.kv_type)));
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
        "| rotary pairs | {} |\n| frequencies folded | {} |\n| seed | {} |\n"
        "| rotary base | {} |\n| query latent | {} |\n| values' share β | {}{}{} |\n| latent norm | {} |\n"
        "| refit | W_O {} (λ {}){}{} |\n| calibration | {} tokens of {}, windows of {}{} |\n"
        "| perplexity before, after | {:.3f}, {:.3f} ({} tokens of {}, a cache in {}) |\n| KL divergence | {:.4f} |\n",
        fs::weakly_canonical(a_.path).filename().string(), l.kv_lora_rank, l.qk_rope_head_dim, config_.kv_layout().row(), a_.preset,
        name(l.method), l.activations ? "activations" : "none", l.metric ? " and metric" : "",
        l.constant == Constant::one    ? "1"
        : l.constant == Constant::mean ? "mean"
                                       : "least squares",
        l.rotary == Rotary::norm ? "one head's, by norms" : "a direction over heads", l.fold ? "yes" : "no", l.seed,
        options_.rope_theta > 0 ? options_.rope_theta : config_.rope_theta,
        options_.q_lora_rank > 0 ? std::to_string(options_.q_lora_rank) : "none", l.value_share, a_.search ? ", searched" : "",
        l.balance ? "" : ", energies not balanced",
        l.latent_norm == LatentNorm::constant     ? "constant channel"
        : l.latent_norm == LatentNorm::functional ? "linear functional"
                                                  : "scale",
        options_.refit == Refit::none    ? "no"
        : options_.refit == Refit::layer ? "to its layer"
                                         : "to the original's stream",
        options_.output_ridge, options_.refit_down ? fmt::format(", W_down (λ {})", options_.down_ridge) : "",
        options_.fit_passes > 0 ? fmt::format(", attention fitted (passes {}, rate {})", options_.fit_passes, options_.fit_rate) : "",
        tokens / size_t(options_.window) * size_t(options_.window), a_.calibrate, options_.window,
        options_.sequential ? ", on the converted prefix" : "", std::exp(q.nll_before), std::exp(q.nll_after), q.scored, evaluated_on(),
        a_.kv_type, q.kl));
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
                      {"evaluated_on", evaluated_on()},
                      {"output", a_.out}});
      return;
    }
    fmt::print("cache of a token and layer: {} → {} elements ({} + {}), {:.2f}% less\n", before, after, options_.layer.kv_lora_rank,
               options_.layer.qk_rope_head_dim, 100 * (1 - double(after) / double(before)));
    fmt::print("perplexity: {:.3f} → {:.3f}, KL {:.4f} ({} tokens of {})\n", std::exp(q.nll_before), std::exp(q.nll_after), q.kl,
               grouped(q.scored), evaluated_on());
    std::fflush(stdout);
    fmt::print(stderr, "mla: converted {} layers on {} tokens in {}; wrote {}, {}\n", config_.num_hidden_layers, grouped(int64_t(tokens)),
               duration_text(seconds), a_.out, bytes_text(double(made.bytes)));
  }

  const ConvertArguments& a_;
  Checkpoint checkpoint_;
  Config config_;
  ConvertOptions options_;
};

}  // namespace

void add_convert(CLI::App& program, Work& work) {
  auto a = std::make_shared<ConvertArguments>();
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
  c.add_option("--rope-dim", a->rope_dim, "elements of the rotary key, even and no more than the head's width (default: by the cut)")
      ->option_text("N")
      ->group("size");
  c.add_option("--calibrate", a->calibrate, "a text of the kind the model is for")->option_text("FILE")->group("text");
  c.add_option("--calibration-tokens", a->tokens, "use so much of it (default: 45056)")->option_text("N")->group("text");
  c.add_option("--calibration-window", a->window, "in windows of so many (default: 512)")->option_text("N")->group("text");
  c.add_option("--evaluate", a->evaluate, "measure on this text, may be repeated (default: the calibration text's end)")
      ->allow_extra_args(false)
      ->option_text("FILE")
      ->group("text");
  c.add_option("--evaluate-windows", a->evaluate_windows, "in so many windows of 1024 (default: 4)")->option_text("K")->group("text");
  c.add_option("--kv-type", a->kv_type, "type of the cache it is measured with (default: bf16)")->option_text("TYPE")->group("text");
  c.add_option("--preset", a->preset, "mla, transmla or mha2mla (default: mla, the best known)")->option_text("NAME")->group("steps");
  c.add_option("--method", a->method, "svd, qr, rsvd or cur (default: svd)")->option_text("NAME")->group("steps");
  c.add_option("--constant", a->constant, "what stands for a lost rotation: one, mean or ls (default: ls)")
      ->option_text("NAME")
      ->group("steps");
  c.add_option("--rotary", a->rotary, "what a rotary pair carries: direction or norm (default: direction; norm in mha2mla)")
      ->option_text("NAME")
      ->group("steps");
  c.add_option("--latent-norm", a->latent_norm, "constant, functional or scale (default: constant)")->option_text("NAME")->group("steps");
  c.add_option("--refit", a->refit, "of W_O: none, layer or drift (default: drift)")->option_text("NAME")->group("steps");
  c.add_option("--value-share", a->value_share, "the values' share in the factorisation, the keys' being 1 (default: 2; 1 in the presets)")
      ->option_text("BETA")
      ->group("steps");
  c.add_option("--rope-theta", a->rope_theta, "base of the rotary pairs' frequencies (default: by the cut)")
      ->option_text("B")
      ->group("size");
  c.add_option("--q-lora-rank", a->query_rank, "of a query latent (default: none, or as wide as the queries where they have biases)")
      ->option_text("R")
      ->group("size");
  c.add_option("--fit-passes", a->fit_passes, "over the text, of the attention's fit to the original's stream (default: 1)")
      ->option_text("N")
      ->group("steps");
  c.add_option("--fit-rate", a->fit_rate, "of its steps, times the share of the cache that goes (default: 0.0125)")
      ->option_text("R")
      ->group("steps");
  c.add_option("--output-ridge", a->output_ridge, "of the refit of W_O, of the mean diagonal (default: 0.1)")
      ->option_text("L")
      ->group("steps");
  c.add_option("--down-ridge", a->down_ridge, "of the refit of W_down (default: 1)")->option_text("L")->group("steps");
  c.add_flag("--search", a->search, "search the values' share by the divergence on held-out calibration text")->group("steps");
  c.add_flag("--sweep", a->sweep, "measure sizes and methods from one calibration, nothing refitted; writes sweep.md, .json and .svg")
      ->group("sweep");
  c.add_option("--sweep-cuts", a->sweep_cuts, "the sizes (default: 33.33%,50%,68.75%,81.25%)")->option_text("LIST")->group("sweep");
  c.add_option("--sweep-methods", a->sweep_methods, "the methods (default: svd,qr,rsvd,cur)")->option_text("LIST")->group("sweep");
  c.add_option("--sweep-weights", a->sweep_weights, "none, activations, metric (with activations; the default), or several")
      ->option_text("LIST")
      ->group("sweep");
  c.add_flag("--no-activations", a->no_activations, "do not weigh inputs by their second moments")->group("steps");
  c.add_flag("--no-metric", a->no_metric, "do not weigh keys and values by what they do")->group("steps");
  c.add_flag("--no-fold", a->no_fold, "do not fold neighbouring frequencies into a rotary pair")->group("steps");
  c.add_flag("--no-balance", a->no_balance, "do not divide keys and values by their energies")->group("steps");
  c.add_flag("--no-down", a->no_down, "do not refit W_down")->group("steps");
  c.add_flag("--parallel", a->parallel, "calibrate every layer on the original's stream")->group("steps");
  c.add_option("--seed", a->seed, "of the randomised SVD (default: 0)")->option_text("S")->group("steps");
  add_machine_options(c, a->machine);
  c.final_callback([a, &work] { work = [a] { a->sweep ? sweep_conversions(*a) : Conversion(*a).run(); }; });
}

}  // namespace mla
