// mla bench: prefill and decode speed at several depths and batch sizes, beside the machine's limits.
#include "cli/bench.h"

#include "cli/command.h"
#include "cli/filled.h"
#include "cli/format.h"
#include "cli/help.h"
#include "cli/interrupt.h"
#include "cli/machine.h"
#include "cli/progress.h"
#include "cli/session.h"
#include "core/check.h"
#include "core/random.h"
#include "core/threads.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>

namespace mla {
namespace {

using Json = nlohmann::ordered_json;

struct BenchOptions {
  ModelOptions model;
  std::string prompts = "512", depths = "0,4096", batches = "1,16";
  int repeat = 5, steps = 16;
  bool ops = false, fit = false, json = false;
};

struct Row {
  std::string phase;
  int64_t prompt = 0, depth = 0, batch = 1;
  int threads = 0;
  double bytes = 0, ops = 0;  // of one pass
  std::vector<double> tok_s, share;
  std::vector<Ceilings> ceilings;
};

// The median of one of the ceilings over a row's samples.
double middle(const std::vector<Ceilings>& samples, double Ceilings::*what) {
  std::vector<double> values;
  values.reserve(samples.size());
  for (const Ceilings& c : samples) values.push_back(c.*what);
  return median(std::move(values));
}

class Bench {
 public:
  Bench(Session& session, const BenchOptions& o) : session_(session), model_(session.model()), o_(o), kv_type_(o.model.kv_type()) {}

  // The operations' limit for the precision that products with these weights run in, Gop/s.
  static double rate(const Ceilings& c, DType weights) {
    if (is_quantised(weights) && c.int8_gop_s > 0) return c.int8_gop_s;
    if (weights != DType::f32 && c.bf16_gflop_s > 0) return c.bf16_gflop_s;
    return c.f32_gflop_s;
  }

  // Runs `prompt` new tokens of one sequence on a context of `depth`, as generation runs a prompt: in chunks.
  Row prefill(int64_t prompt, int64_t depth, const std::function<void(double)>& progress) {
    Row row = start("prefill", prompt, depth, 1);
    LatentCache cache = make_cache(1, depth + prompt);
    const int sequence = cache.open();
    CHECK(fill_random(cache, sequence, depth, session_.device()), "no room for {} tokens", depth);
    const std::vector<int32_t> ids = tokens(prompt, 0);
    const double head = 2.0 * double(model_.config().vocab_size) * double(model_.config().hidden_size);
    // Logits are formed for the last token alone. Causal: a token sees on average the depth and half the prompt.
    row.ops = double(prompt) * (model_.token_ops() - head) + head + model_.attention_ops(prompt, depth + (prompt + 1) / 2);
    row.bytes = model_.step_weight_bytes(prompt) + double(depth + prompt) * double(cache.bytes_per_token());
    for (int r = -1; r < o_.repeat; ++r) {  // the first one warms up
      throw_if_interrupted();
      progress(double(r + 1) / (o_.repeat + 1));
      const Ceilings ceilings = session_.device().probe(0.1);
      const double begin = now();
      for (int64_t at = 0; at < prompt; at += model_.device().step_tokens) {
        const int64_t n = std::min(model_.device().step_tokens, prompt - at);
        const Chunk step{sequence, std::span(ids).subspan(size_t(at), size_t(n)),
                         at + n == prompt ? Chunk::Logits::last : Chunk::Logits::none};
        model_.forward(std::span(&step, 1), cache, [&](double fraction) {
          throw_if_interrupted();
          progress((r + 1 + (double(at) + fraction * double(n)) / double(prompt)) / (o_.repeat + 1));
        });
      }
      session_.device().memory().wait();
      const double seconds = now() - begin;
      cache.truncate(sequence, depth);
      if (r >= 0) add(row, double(prompt) / seconds, row.ops / seconds / 1e9 / rate(ceilings, weight_type()), ceilings);
    }
    return row;
  }

  // One new token for each of `batch` sequences, each on a context of `depth` of its own.
  Row decode(int64_t depth, int64_t batch, const std::function<void(double)>& progress) {
    Row row = start("decode", 0, depth, batch);
    LatentCache cache = make_cache(batch, depth + o_.steps);
    std::vector<int> sequences;
    for (int64_t b = 0; b < batch; ++b) {
      sequences.push_back(cache.open());
      CHECK(fill_random(cache, sequences.back(), depth, session_.device()), "no room for {} × {} tokens", batch, depth);
    }
    const double context = double(depth) + (o_.steps + 1) / 2.0;  // on average over the steps, the new token included
    row.bytes = model_.step_weight_bytes(batch) + double(batch) * context * double(cache.bytes_per_token());
    row.ops = double(batch) * (model_.token_ops() + model_.attention_ops(1, int64_t(context)));
    for (int r = -1; r < o_.repeat; ++r) {
      throw_if_interrupted();
      progress(double(r + 1) / (o_.repeat + 1));
      const Ceilings ceilings = session_.device().probe(0.1);
      const double begin = now();
      for (int s = 0; s < o_.steps; ++s) step(cache, sequences, s);
      session_.device().memory().wait();
      const double seconds = (now() - begin) / o_.steps;
      for (int sequence : sequences) cache.truncate(sequence, depth);
      if (r >= 0) add(row, double(batch) / seconds, row.bytes / seconds / 1e9 / ceilings.read_gb_s, ceilings);
    }
    return row;
  }

  // Bytes that a sequence of `length` tokens takes: its pages.
  double cache_bytes(int64_t length) const {
    constexpr int64_t page = LatentCache::page_tokens;
    const double row = double(KvFormat{model_.config().kv_layout(), kv_type_}.row_bytes()) * model_.config().num_hidden_layers;
    return row * double((length + page - 1) / page * page);
  }

  // Sequences of `length` tokens that the memory holds with their logits; a sixteenth of it is left to other activations.
  int64_t fitting(int64_t length) const {
    const double sequence = cache_bytes(length) + 4.0 * double(model_.config().vocab_size);
    return int64_t(session_.device().memory().free_bytes() * 15 / 16 / sequence);
  }

  void check_memory(int64_t sequences, int64_t length) const {
    const double bytes = double(sequences) * cache_bytes(length);
    if (session_.device().memory().place() != Place::host) return;  // a GPU says itself what does not fit
    const double available = memory().available_bytes;
    if (bytes > available)
      fail_input("{} caches of {} tokens take {} and {} are free; lower --depth or --batch, or take --kv-type i8", sequences, length,
                 bytes_text(bytes), bytes_text(available));
  }

 private:
  Row start(const char* phase, int64_t prompt, int64_t depth, int64_t batch) const {
    Row row;
    row.phase = phase;
    row.prompt = prompt;
    row.depth = depth;
    row.batch = batch;
    row.threads = session_.device().threads().count();
    return row;
  }

  static void add(Row& row, double tok_s, double share, const Ceilings& ceilings) {
    row.tok_s.push_back(tok_s);
    row.share.push_back(share);
    row.ceilings.push_back(ceilings);
  }

  LatentCache make_cache(int64_t sequences, int64_t length) const {
    check_memory(sequences, length);
    const int64_t page = LatentCache::page_tokens;
    return model_.make_cache(sequences * ((length + page - 1) / page * page), kv_type_);
  }

  // The type that the most weights of a layer have: what the limit follows.
  DType weight_type() const {
    const Layer& layer = model_.weights().layers.back();
    if (const auto* moe = std::get_if<MoeFfn>(&layer.ffn)) return moe->experts.gate.dtype;
    return std::get<DenseFfn>(layer.ffn).ffn.gate.dtype;
  }

  std::vector<int32_t> tokens(int64_t n, uint64_t seed) const {
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < n; ++i) ids.push_back(int32_t(random_bits(seed, uint64_t(i)) % uint64_t(model_.config().vocab_size)));
    return ids;
  }

  // Random tokens, so that a mixture's experts are chosen as widely as by real text.
  void step(LatentCache& cache, const std::vector<int>& sequences, int number) {
    const std::vector<int32_t> ids = tokens(int64_t(sequences.size()), uint64_t(number) + 1);
    std::vector<Chunk> chunks;
    for (size_t b = 0; b < sequences.size(); ++b) chunks.push_back({sequences[b], std::span(ids).subspan(b, 1), Chunk::Logits::last});
    model_.forward(chunks, cache, [](double) { throw_if_interrupted(); });
  }

  Session& session_;
  Model& model_;
  const BenchOptions& o_;
  DType kv_type_;
};

Json to_json(const Row& row) {
  return {{"phase", row.phase},
          {"prompt", row.prompt},
          {"depth", row.depth},
          {"batch", row.batch},
          {"threads", row.threads},
          {"tok_s", median(row.tok_s)},
          {"bytes", row.bytes},
          {"ops", row.ops},
          {"share", median(row.share)},
          {"limit", row.phase == "decode" ? "bytes" : "ops"},
          {"read_gb_s", middle(row.ceilings, &Ceilings::read_gb_s)},
          {"int8_gop_s", middle(row.ceilings, &Ceilings::int8_gop_s)},
          {"bf16_gflop_s", middle(row.ceilings, &Ceilings::bf16_gflop_s)},
          {"f32_gflop_s", middle(row.ceilings, &Ceilings::f32_gflop_s)},
          {"samples", row.tok_s}};
}

std::string table_of(const std::vector<Row>& rows) {
  Table table{{"phase", "prompt", "depth", "batch", "tok/s", "ms a pass", "share of the limit", "limit", "read GB/s", "int8 Gop/s",
               "bf16 GFLOP/s", "f32 GFLOP/s"},
              {}};
  for (const Row& row : rows) {
    const double tok_s = median(row.tok_s), tokens = double(row.phase == "decode" ? row.batch : row.prompt);
    table.rows.push_back({row.phase, row.prompt ? std::to_string(row.prompt) : "–", std::to_string(row.depth), std::to_string(row.batch),
                          rate_text(tok_s), rate_text(1e3 * tokens / tok_s), fmt::format("{:.2f}", median(row.share)),
                          row.phase == "decode" ? bytes_text(row.bytes) : fmt::format("{} Gop", rate_text(row.ops / 1e9)),
                          rate_text(middle(row.ceilings, &Ceilings::read_gb_s)), rate_text(middle(row.ceilings, &Ceilings::int8_gop_s)),
                          rate_text(middle(row.ceilings, &Ceilings::bf16_gflop_s)),
                          rate_text(middle(row.ceilings, &Ceilings::f32_gflop_s))});
  }
  return table.text();
}

std::string table_of(const std::vector<OpTime>& times) {
  Table table{{"operation", "tokens", "us", "GB/s", "of read", "Gop/s", "of int8", "of bf16", "of f32"}, {}};
  for (const OpTime& t : times) {
    const double gb_s = t.bytes / t.us / 1e3, gop_s = t.ops / t.us / 1e3;
    auto of = [](double x, double limit) { return limit > 0 ? fmt::format("{:.2f}", x / limit) : std::string("–"); };
    table.rows.push_back({t.op, std::to_string(t.tokens), rate_text(t.us), rate_text(gb_s), of(gb_s, t.ceilings.read_gb_s),
                          rate_text(gop_s), of(gop_s, t.ceilings.int8_gop_s), of(gop_s, t.ceilings.bf16_gflop_s),
                          of(gop_s, t.ceilings.f32_gflop_s)});
  }
  return table.text();
}

Json to_json(const std::vector<OpTime>& times) {
  Json out = Json::array();
  for (const OpTime& t : times)
    out.push_back({{"op", t.op},
                   {"tokens", t.tokens},
                   {"us", t.us},
                   {"bytes", t.bytes},
                   {"ops", t.ops},
                   {"read_gb_s", t.ceilings.read_gb_s},
                   {"int8_gop_s", t.ceilings.int8_gop_s},
                   {"bf16_gflop_s", t.ceilings.bf16_gflop_s},
                   {"f32_gflop_s", t.ceilings.f32_gflop_s}});
  return out;
}

struct Case {
  int64_t prompt, depth, batch;  // prompt 0: decode; batch 0: as many as fit
};

std::vector<Case> cases(const BenchOptions& o) {
  std::vector<Case> out;
  const auto depths = parse_list(o.depths, "--depth", 0);
  for (int64_t prompt : parse_list(o.prompts, "--prompt", 0))
    for (int64_t depth : depths)
      if (prompt > 0) out.push_back({prompt, depth, 1});
  for (int64_t batch : parse_list(o.batches, "--batch", 0))
    for (int64_t depth : depths)
      if (batch > 0) out.push_back({0, depth, batch});
  for (int64_t depth : depths)
    if (o.fit) out.push_back({0, depth, 0});
  return out;
}

void print(const std::vector<Row>& rows, const std::vector<OpTime>& ops, const BenchOptions& o, Session& session) {
  if (o.json) {
    Json out{{"model", o.model.path}, {"device", session.device().describe()}, {"kv_type", o.model.kv_type_name}, {"rows", Json::array()}};
    out["cache_bytes_per_token"] =
        KvFormat{session.config().kv_layout(), o.model.kv_type()}.row_bytes() * session.config().num_hidden_layers;
    out["loaded_bytes"] = session.loaded_bytes(), out["loading_seconds"] = session.loading_seconds();
    for (const Row& row : rows) out["rows"].push_back(to_json(row));
    if (o.ops) out["ops"] = to_json(ops);
    print_json(out);
  } else {
    if (!rows.empty())
      fmt::print("{}; cache in {}; medians of {}; {:.1f} GB loaded in {:.1f} s, {:.1f} GB/s\n\n{}", session.device().describe(),
                 o.model.kv_type_name, o.repeat, 1e-9 * session.loaded_bytes(), session.loading_seconds(),
                 1e-9 * session.loaded_bytes() / session.loading_seconds(), table_of(rows));
    if (!ops.empty()) fmt::print("\n{}", table_of(ops));
  }
  std::fflush(stdout);
  const KvFormat format{session.config().kv_layout(), o.model.kv_type()};
  auto first = [&](const char* phase) { return std::find_if(rows.begin(), rows.end(), [&](const Row& r) { return r.phase == phase; }); };
  std::string line;
  if (const auto p = first("prefill"); p != rows.end()) line += fmt::format("prefill {} tok/s · ", rate_text(median(p->tok_s)));
  if (const auto d = first("decode"); d != rows.end()) line += fmt::format("decode {} tok/s · ", rate_text(median(d->tok_s)));
  line += fmt::format("cache {} bytes per token ({})", format.row_bytes() * session.config().num_hidden_layers, o.model.kv_type_name);
  if (const auto d = first("decode"); d != rows.end()) line += fmt::format(" · {:.0f}% of memory bandwidth", 100 * median(d->share));
  fmt::print(stderr, "mla: {}\n", line);
}

void bench(const BenchOptions& o) {
  if (o.repeat < 1 || o.repeat > 1000) fail_input("--repeat is {}; give how often to measure, 1 to 1000", o.repeat);
  if (o.steps < 1 || o.steps > 100000) fail_input("--steps is {}; give the tokens of a decode sample, 1 to 100000", o.steps);
  const std::vector<Case> all = cases(o);
  if (all.empty() && !o.ops) fail_input("there is nothing to measure; give a --prompt, a --batch, --fit or --ops");
  Session session(o.model);
  Bench bench(session, o);
  for (const Case& c : all) bench.check_memory(c.prompt ? 1 : c.batch, c.depth + std::max<int64_t>(c.prompt, o.steps));
  std::vector<Row> rows;
  std::vector<OpTime> ops;
  {
    ProgressBar bar("measuring");
    until_interrupted([&] {
      const double parts = double(all.size()) + o.ops;
      for (size_t i = 0; i < all.size(); ++i) {
        Case c = all[i];
        if (c.prompt == 0 && c.batch == 0) c.batch = bench.fitting(c.depth + o.steps);
        if (c.batch == 0) fail_input("the memory holds no sequence of {} tokens beside the model; lower --depth", c.depth + o.steps);
        const std::string note =
            c.prompt ? fmt::format("prefill {} at {}", c.prompt, c.depth) : fmt::format("decode {} at {}", c.batch, c.depth);
        const auto progress = [&](double part) { bar.update((double(i) + part) / parts, note); };
        rows.push_back(c.prompt ? bench.prefill(c.prompt, c.depth, progress) : bench.decode(c.depth, c.batch, progress));
      }
      const auto progress = [&](double part) { bar.update((double(all.size()) + part) / parts, "operations"); };
      if (o.ops) ops = time_ops(session.model(), o.model.kv_type(), 512, parse_list(o.depths, "--depth", 0), progress);
    });
  }
  session.finish_dump();
  print(rows, ops, o, session);
  if (interrupted()) give_up();
}

}  // namespace

void add_bench(CLI::App& program, Work& work) {
  auto o = std::make_shared<BenchOptions>();
  CLI::App& c = add_command(program, "bench", "measure prefill and decode, as a share of what the machine can do",
                            "  mla bench model.gguf\n"
                            "  mla bench model.gguf --prompt 512,2048 --depth 0,4096,16384 --batch 1 --threads 2\n"
                            "  mla bench model.gguf --prompt 0 --batch 1 --ops --json");
  add_model_options(c, o->model, false);
  c.add_option("--prompt", o->prompts, "lengths of prompts to prefill, 0 for none (default: 512)")->option_text("LIST")->group("work");
  c.add_option("--depth", o->depths, "tokens in the cache before (default: 0,4096)")->option_text("LIST")->group("work");
  c.add_option("--batch", o->batches, "sequences that decode together, 0 for none (default: 1,16)")->option_text("LIST")->group("work");
  c.add_flag("--fit", o->fit, "also decode as many sequences together as the memory holds")->group("work");
  c.add_option("--repeat", o->repeat, "samples of each figure; medians are shown (default: 5)")->option_text("N")->group("work");
  c.add_option("--steps", o->steps, "tokens of a decode sample (default: 16)")->option_text("N")->group("work");
  c.add_flag("--ops", o->ops, "also time every operation by itself")->group("work");
  add_json(c, o->json);
  c.final_callback([o, &work] { work = [o] { bench(*o); }; });
}

}  // namespace mla
