// mla convert --sweep: what sizes, methods and weights cost, from one calibration; and the search for the balance, which measures alike.
#include "cli/chart.h"
#include "cli/convert.h"
#include "cli/format.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "core/check.h"
#include "io/writer_file.h"
#include "lowrank/original.h"
#include "model/make.h"

#include <nlohmann/json.hpp>

#include <cmath>

namespace mla {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

std::vector<std::string> words(const std::string& list, const char* option) {
  std::vector<std::string> out;
  for (size_t from = 0; from <= list.size();) {
    const size_t end = std::min(list.find(',', from), list.size());
    if (end == from) fail_input("{} is \"{}\"; give words with commas between", option, list);
    out.push_back(list.substr(from, end - from));
    from = end + 1;
  }
  return out;
}

// The model that a conversion makes, on the disk for as long as it is measured.
std::vector<Comparison> measured(const Checkpoint& checkpoint, Converted converted, const fs::path& folder, DType type,
                                 const std::vector<EvaluationText>& texts, Model& original, DType kv_type, Device& device) {
  const Replacement instead{std::move(converted.config), std::move(converted.tensors), {}};
  export_hf(checkpoint, instead, folder, type, device.threads(), [](double) { throw_if_interrupted(); });
  std::vector<Comparison> out;
  {
    const Checkpoint written = Checkpoint::open(folder);
    Model model(written, device);
    out = compare_on(texts, original, model, kv_type);
  }
  fs::remove_all(folder);
  return out;
}

std::vector<LayerCalibration> calibrated(const Checkpoint& checkpoint, std::span<const int32_t> tokens, const ConvertOptions& o,
                                         Device& device) {
  ProgressBar bar("calibrating");
  return calibrate(checkpoint, tokens, o, device, [&](double fraction) {
    throw_if_interrupted();
    bar.update(fraction);
  });
}

struct Point {
  std::string cut, weights;
  ConvertOptions options;
  std::vector<Comparison> quality;

  int64_t elements() const { return options.layer.kv_lora_rank + options.layer.qk_rope_head_dim; }
  double lost() const {
    const Comparison c = mean_of(quality);
    return c.nll_after - c.nll_before;
  }
};

class Sweep {
 public:
  explicit Sweep(const ConvertArguments& a)
      : a_(a), checkpoint_(Checkpoint::open(a.path)), config_(original_config(checkpoint_)), kv_type_(parse_kv_type(a.kv_type)) {
    check_target(a);
    for (const std::string& weights : words(a.sweep_weights, "--sweep-weights"))
      for (const std::string& method : words(a.sweep_methods, "--sweep-methods"))
        for (const std::string& cut : words(a.sweep_cuts, "--sweep-cuts")) points_.push_back(point(cut, method, weights));
    check_tensors(checkpoint_, config_);
  }

  void run() {
    const ConvertTexts texts = read_texts(a_, checkpoint_);
    const auto device = open_host(a_);
    const Draft draft(a_.out);
    const auto calibration = calibrated(checkpoint_, texts.calibration, points_[0].options, *device);
    Model original(checkpoint_, *device);
    ProgressBar bar("sweeping");
    for (size_t i = 0; i < points_.size(); ++i) {
      bar.update(double(i) / double(points_.size()), fmt::format("{} of {}", i + 1, points_.size()));
      Point& p = points_[i];
      p.quality = measured(checkpoint_, convert(checkpoint_, calibration, p.options, *device), draft.path() / "model", p.options.type,
                           texts.evaluation, original, kv_type_, *device);
    }
    bar.clear();
    const Json json = as_json(texts);
    write(draft.path() / "sweep.json", json.dump(2) + "\n");
    write(draft.path() / "sweep.md", as_table(texts).markdown());
    write(draft.path() / "sweep.svg", svg(as_chart()));
    draft.keep();
    if (a_.json)
      print_json(json);
    else
      fmt::print("{}", as_table(texts).markdown());
  }

 private:
  Point point(const std::string& cut, const std::string& method, const std::string& weights) const {
    ConvertArguments one = a_;
    one.method = method;
    Point p{cut, weights, read_steps(one), {}};
    skip_refits(p.options);
    choose_sizes(a_, cut, checkpoint_, config_, p.options);
    if (weights != "none" && weights != "activations" && weights != "metric")
      fail_input("--sweep-weights has \"{}\"; known are none, activations and metric", weights);
    p.options.layer.activations = weights != "none";
    p.options.layer.metric = weights == "metric";
    check_convertible(checkpoint_, config_, p.options);
    return p;
  }

  int64_t cache_bytes(const Point& p) const {
    const KvFormat format{KvLayout::mla(int(p.options.layer.kv_lora_rank), int(p.options.layer.qk_rope_head_dim)), kv_type_};
    return format.row_bytes() * config_.num_hidden_layers;
  }

  Table as_table(const ConvertTexts& texts) const {
    Table t{{"method, weights", "cut", "latent + rotary", "bytes a token"}, {}};
    for (const EvaluationText& text : texts.evaluation) t.header.push_back(fs::path(text.name).filename().string());
    t.header.insert(t.header.end(), {"lost", "KL"});
    const KvFormat now{config_.kv_layout(), kv_type_};
    std::vector<std::string> row{"original", "", std::to_string(config_.kv_layout().row()),
                                 grouped(now.row_bytes() * config_.num_hidden_layers)};
    for (const Comparison& c : points_[0].quality) row.push_back(fmt::format("{:.2f}", std::exp(c.nll_before)));
    row.insert(row.end(), {"", ""});
    t.rows.push_back(row);
    for (const Point& p : points_) {
      row = {fmt::format("{}, {}", name(p.options.layer.method), p.weights), p.cut,
             fmt::format("{} + {}", p.options.layer.kv_lora_rank, p.options.layer.qk_rope_head_dim), grouped(cache_bytes(p))};
      for (const Comparison& c : p.quality) row.push_back(fmt::format("{:.2f}", std::exp(c.nll_after)));
      row.push_back(fmt::format("{:.3f}", p.lost()));
      row.push_back(fmt::format("{:.3f}", mean_of(p.quality).kl));
      t.rows.push_back(row);
    }
    return t;
  }

  Json as_json(const ConvertTexts& texts) const {
    Json out{{"model", a_.path},       {"calibration_tokens", texts.calibration.size()},     {"kv_type", a_.kv_type},
             {"texts", Json::array()}, {"cache_elements_before", config_.kv_layout().row()}, {"points", Json::array()}};
    for (size_t i = 0; i < texts.evaluation.size(); ++i)
      out["texts"].push_back({{"name", texts.evaluation[i].name}, {"perplexity_before", std::exp(points_[0].quality[i].nll_before)}});
    for (const Point& p : points_) {
      Json perplexities = Json::array();
      for (const Comparison& c : p.quality) perplexities.push_back(std::exp(c.nll_after));
      out["points"].push_back({{"cut", p.cut},
                               {"method", name(p.options.layer.method)},
                               {"weights", p.weights},
                               {"kv_lora_rank", p.options.layer.kv_lora_rank},
                               {"qk_rope_head_dim", p.options.layer.qk_rope_head_dim},
                               {"cache_elements_after", p.elements()},
                               {"cache_bytes_per_token", cache_bytes(p)},
                               {"perplexity_after", perplexities},
                               {"log_perplexity_lost", p.lost()},
                               {"kl", mean_of(p.quality).kl}});
    }
    return out;
  }

  Chart as_chart() const {
    Chart chart{"Converted without refits", {{"Log-perplexity lost", {}}, {"KL divergence", {}}, {"Cache, bytes of a token", {}}}};
    for (const Point& p : points_) {
      const std::string label = fmt::format("{} {} {}", name(p.options.layer.method), p.weights.substr(0, 6), p.cut);
      const double values[] = {p.lost(), mean_of(p.quality).kl, double(cache_bytes(p))};
      for (size_t i = 0; i < 3; ++i)
        chart.panels[i].bars.push_back({label, std::max(values[i], 0.0),
                                        i < 2 ? fmt::format("{:.3f}", values[i]) : grouped(int64_t(values[i])),
                                        p.options.layer.method == Method::svd});
    }
    return chart;
  }

  static void write(const fs::path& path, const std::string& text) {
    OutputFile file(path);
    file.write(text);
    file.finish();
  }

  const ConvertArguments& a_;
  Checkpoint checkpoint_;
  Config config_;
  DType kv_type_;
  std::vector<Point> points_;
};

}  // namespace

void sweep_conversions(const ConvertArguments& a) {
  if (a.rank > 0 || !a.cut.empty()) fail_input("--sweep takes its sizes from --sweep-cuts; leave --cut and --kv-lora-rank out");
  Sweep(a).run();
}

double search_value_share(const ConvertArguments& a, const Checkpoint& checkpoint, const ConvertOptions& options,
                          std::span<const int32_t> tokens, const fs::path& scratch, Device& device) {
  // One window in eight is held out, of long texts eight in all, so that they are of every kind the text has; the rest calibrates.
  const int64_t windows = int64_t(tokens.size()) / options.window, step = std::min(windows, std::max<int64_t>(8, windows / 8));
  EvaluationText held_out{a.calibrate, {}, options.window};
  std::vector<int32_t> seen;
  for (int64_t w = 0; w < windows && windows > 1; ++w) {
    const auto part = tokens.subspan(size_t(w * options.window), size_t(options.window));
    auto& to = w % step == step - 1 ? held_out.tokens : seen;
    to.insert(to.end(), part.begin(), part.end());
  }
  if (held_out.tokens.empty() || seen.empty())
    fail_input("--search needs two windows of calibration text; {} has {}", a.calibrate, windows);
  ConvertOptions o = options;
  skip_refits(o);
  const auto calibration = calibrated(checkpoint, seen, o, device);
  Model original(checkpoint, device);
  double best = o.layer.value_share, least = INFINITY;
  for (double share : {0.5, 1.0, 2.0, 4.0}) {
    o.layer.value_share = share;
    const double kl = mean_of(measured(checkpoint, convert(checkpoint, calibration, o, device), scratch, o.type, {held_out}, original,
                                       parse_kv_type(a.kv_type), device))
                          .kl;
    fmt::print(stderr, "mla: β = {}: KL {:.4f}\n", share, kl);
    if (kl < least) best = share, least = kl;
  }
  if (!std::isfinite(least)) fail("no balance gives logits that are finite numbers");
  return best;
}

}  // namespace mla
