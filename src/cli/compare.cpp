// mla compare: the paper's table of MHA, GQA, MQA and MLA for a model's shape, with the decode speed of each on this machine.
#include "cli/chart.h"
#include "cli/command.h"
#include "cli/filled.h"
#include "cli/format.h"
#include "cli/help.h"
#include "cli/interrupt.h"
#include "cli/layouts.h"
#include "cli/machine.h"
#include "cli/options.h"
#include "cli/progress.h"
#include "cli/session.h"
#include "core/check.h"
#include "core/random.h"
#include "model/make.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <cmath>
#include <filesystem>
#include <fstream>

namespace mla {
namespace {

using Json = nlohmann::ordered_json;

struct CompareOptions {
  std::string path, depths = "1024,4096,16384", kv_type = "bf16", svg;
  MachineOptions machine;
  int repeat = 5;
  bool json = false;
};

struct Speed {
  int64_t depth;
  double seconds;  // of one token, all layers
  double bytes;    // of the cache that it read
  double read_gb_s;
  double tok_s() const { return 1 / seconds; }
  double share() const { return bytes / seconds / (read_gb_s * 1e9); }
};

struct Measured {
  AttentionKind kind;
  int64_t cache_bytes = 0;  // a token, all layers, as allocated
  std::vector<Speed> speeds;
};

// Decode attention of one token over random caches, as it is in the model: every layer has a cache of its own, so that rows come from
// memory and not from the processor's caches. Where all layers take too much memory, fewer are measured and the time is scaled.
class CacheBench {
 public:
  CacheBench(const Config& config, const CompareOptions& o, Device& device)
      : config_(config), repeat_(o.repeat), type_(parse_kv_type(o.kv_type)), device_(device) {}

  Measured measure(const AttentionKind& kind, const std::vector<int64_t>& depths, const std::function<void(double)>& progress) {
    Measured out{kind, 0, {}};
    const KvFormat format{kind.layout, type_};
    out.cache_bytes = LatentCache(config_.num_hidden_layers, format, 1).bytes_per_token();
    for (size_t i = 0; i < depths.size(); ++i) {
      throw_if_interrupted();
      progress(double(i) / double(depths.size()));
      if (const auto speed = at_depth(format, depths[i])) out.speeds.push_back(*speed);
    }
    return out;
  }

 private:
  std::optional<Speed> at_depth(const KvFormat& format, int64_t depth) {
    const double layer_bytes = double(format.row_bytes()) * double(depth);
    const double room = std::min(1.5e9, memory().available_bytes / 2);
    const int layers = std::clamp(int(room / layer_bytes), 0, config_.num_hidden_layers);
    if (layers == 0) return std::nullopt;
    LatentCache cache(layers, format, depth, device_.memory());
    const int sequence = cache.open();
    if (!fill_random(cache, sequence, depth, device_)) return std::nullopt;

    const int64_t n_h = config_.num_attention_heads;
    Arena arena(device_.memory());
    const Tensor q = arena.tensor(DType::f32, {1, n_h, format.layout.d_k}), o = arena.tensor(DType::f32, {1, n_h, format.layout.d_v});
    const Tensor lse = arena.tensor(DType::f32, {1, n_h});
    std::vector<float> queries(size_t(q.count()));
    for (size_t i = 0; i < queries.size(); ++i) queries[i] = float(random_normal(2, i));
    device_.memory().upload(queries.data(), q.data, queries.size() * sizeof(float));
    const Span span{0, 1, int32_t(depth - 1), 0, int32_t(depth), cache.pages(sequence).data()};
    const auto scale = float(1 / std::sqrt(double(format.layout.d_k)));
    auto step = [&] {
      for (int l = 0; l < layers; ++l) device_.attend(q, cache.layer(l), Spans(&span, 1), {}, scale, o, lse);
    };
    step();
    device_.memory().wait();
    std::vector<double> seconds, ceilings;
    for (int r = 0; r < repeat_; ++r) {
      throw_if_interrupted();
      ceilings.push_back(device_.probe(0.05).read_gb_s);
      int64_t steps = 0;
      const double begin = now();
      do step(), ++steps;
      while (now() - begin < 0.05);
      device_.memory().wait();
      seconds.push_back((now() - begin) / double(steps) / layers * config_.num_hidden_layers);
    }
    return Speed{depth, median(seconds), layer_bytes * config_.num_hidden_layers, median(ceilings)};
  }

  const Config& config_;
  int repeat_;
  DType type_;
  Device& device_;
};

std::string markdown(const Config& c, const CompareOptions& o, const Device& device, const std::vector<Measured>& all,
                     const std::vector<int64_t>& depths) {
  Table table{
      {"attention", "cache per token and layer", "elements", fmt::format("bytes per token, {} layers", c.num_hidden_layers), "of MHA"}, {}};
  for (int64_t depth : depths) table.header.push_back(fmt::format("decode @{}, tok/s", depth));
  for (const Measured& m : all) {
    std::vector<std::string> row{m.kind.own ? "**" + m.kind.name + "**" : m.kind.name, m.kind.formula, std::to_string(m.kind.layout.row()),
                                 std::to_string(m.cache_bytes),
                                 fmt::format("{:.1f}%", 100 * double(m.cache_bytes) / double(all[0].cache_bytes))};
    for (int64_t depth : depths) {
      std::string cell = "–";
      for (const Speed& s : m.speeds)
        if (s.depth == depth) cell = rate_text(s.tok_s());
      row.push_back(cell);
    }
    table.rows.push_back(std::move(row));
  }
  return fmt::format(
      "Attention of {} heads of {} over {} layers, cache rows in {}; {}.\n"
      "Decode: one token's attention over the caches of all layers, without the projections around it.\n\n{}",
      c.num_attention_heads, head_size(c), c.num_hidden_layers, o.kv_type, device.describe(), table.markdown());
}

Json to_json(const Config& c, const CompareOptions& o, const Device& device, const std::vector<Measured>& all) {
  Json out{{"device", device.describe()}, {"layers", c.num_hidden_layers}, {"heads", c.num_attention_heads},
           {"head_dim", head_size(c)},    {"kv_type", o.kv_type},          {"rows", Json::array()}};
  for (const Measured& m : all) {
    Json row{{"attention", m.kind.name},
             {"formula", m.kind.formula},
             {"elements", m.kind.layout.row()},
             {"cache_bytes_per_token", m.cache_bytes},
             {"own", m.kind.own},
             {"decode", Json::array()}};
    for (const Speed& s : m.speeds)
      row["decode"].push_back({{"depth", s.depth},
                               {"tok_s", s.tok_s()},
                               {"us", s.seconds * 1e6},
                               {"bytes", s.bytes},
                               {"read_gb_s", s.read_gb_s},
                               {"share", s.share()}});
    out["rows"].push_back(std::move(row));
  }
  return out;
}

std::string chart(const Config& c, const CompareOptions& o, const std::vector<Measured>& all) {
  Chart chart;
  chart.title = fmt::format("{} heads of {}, {} layers, cache in {}", c.num_attention_heads, head_size(c), c.num_hidden_layers, o.kv_type);
  Panel bytes{"Cache of one token, bytes", {}}, speed{"", {}};
  for (const Measured& m : all) {
    bytes.bars.push_back({m.kind.name, double(m.cache_bytes), bytes_text(double(m.cache_bytes)), m.kind.name == "MLA"});
    if (m.speeds.empty()) continue;
    const Speed& s = m.speeds.back();
    speed.title = "Attention of one token at the deepest context, tok/s";
    speed.bars.push_back({m.kind.name, s.tok_s(), fmt::format("{} @ {}", rate_text(s.tok_s()), s.depth), m.kind.name == "MLA"});
  }
  chart.panels.push_back(bytes);
  if (!speed.bars.empty()) chart.panels.push_back(speed);
  return svg(chart);
}

void compare(const CompareOptions& o) {
  if (o.repeat < 1 || o.repeat > 1000) fail_input("--repeat is {}; give how often to measure, 1 to 1000", o.repeat);
  const std::vector<int64_t> depths = parse_list(o.depths, "--depth", 1);
  parse_kv_type(o.kv_type);
  if (!o.svg.empty()) check_output(o.svg, "--svg");
  const Config config =
      std::filesystem::path(o.path).extension() == ".json" ? read_config_file(o.path) : read_config(Checkpoint::open(o.path));
  const auto device = o.machine.open();
  CacheBench bench(config, o, *device);
  std::vector<Measured> all;
  ProgressBar bar("measuring");
  const auto kinds = four_attentions(config);
  for (size_t i = 0; i < kinds.size(); ++i)
    all.push_back(
        bench.measure(kinds[i], depths, [&](double part) { bar.update((double(i) + part) / double(kinds.size()), kinds[i].name); }));
  bar.clear();
  if (!o.svg.empty()) {
    std::ofstream file(o.svg);
    file << chart(config, o, all);
    file.close();
    if (!file) fail("cannot write {}; is the folder there?", o.svg);
  }
  if (o.json)
    print_json(to_json(config, o, *device, all));
  else
    fmt::print("{}", markdown(config, o, *device, all, depths));
  std::fflush(stdout);
  for (const Measured& m : all) {
    if (!m.kind.layout.v_in_k || m.speeds.empty()) continue;
    const Speed& s = m.speeds.back();
    fmt::print(stderr,
               "mla: {} · attention of a token at {} takes {:.0f} us · cache {} bytes per token ({}) · {:.0f}% of memory bandwidth ({} of "
               "{} GB/s)\n",
               m.kind.name, s.depth, s.seconds * 1e6, m.cache_bytes, o.kv_type, 100 * s.share(), rate_text(s.bytes / s.seconds / 1e9),
               rate_text(s.read_gb_s));
  }
}

}  // namespace

void add_compare(CLI::App& program, Work& work) {
  auto o = std::make_shared<CompareOptions>();
  CLI::App& c = add_command(program, "compare", "measure MHA, GQA, MQA and MLA of a model's size on this machine",
                            "  mla compare model.gguf\n"
                            "  mla compare deepseek-v2/config.json --depth 4096 --svg table.svg\n"
                            "  mla compare folder --kv-type i8 --threads 2 --json");
  add_model_path(c, o->path, "a Hugging Face folder, a GGUF file or a config.json alone; only its shape is used");
  c.add_option("--depth", o->depths, "tokens in the cache (default: 1024,4096,16384)")->option_text("LIST")->group("work");
  c.add_option("--repeat", o->repeat, "samples of each figure; medians are shown (default: 5)")->option_text("N")->group("work");
  add_machine_options(c, o->machine);
  add_kv_type(c, o->kv_type);
  c.add_option("--svg", o->svg, "also draw the table as a chart")->option_text("FILE")->group("output");
  add_json(c, o->json);
  c.final_callback([o, &work] { work = [o] { compare(*o); }; });
}

}  // namespace mla
