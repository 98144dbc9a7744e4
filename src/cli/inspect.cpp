// mla inspect: what a model is made of, what each attention would keep for it, and what fits in memory.
#include "cli/command.h"
#include "cli/format.h"
#include "cli/help.h"
#include "cli/layouts.h"
#include "cli/machine.h"
#include "cli/session.h"
#include "core/check.h"
#include "model/make.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <filesystem>
#include <map>

namespace mla {
namespace {

using Json = nlohmann::ordered_json;

struct InspectOptions {
  std::string path, memory, weights, contexts, users;
  bool json = false;
};

constexpr double aside = 500e6;  // bytes for activations and the program itself
constexpr DType cache_types[] = {DType::bf16, DType::i8};

// A model as far as it is there: a config.json has neither weights nor a tokenizer.
struct Subject {
  Config config;
  std::map<DType, int> types;  // of tensors
  double weight_bytes = 0;
  bool has_weights = false;
  int64_t tensors = 0;
  int32_t tokenizer = -1;  // entries of its vocabulary
};

Subject open(const InspectOptions& o) {
  Subject s;
  if (std::filesystem::path(o.path).extension() == ".json") {
    s.config = read_config_file(o.path);
    const auto type = parse_dtype(s.config.torch_dtype == "float32" ? "f32" : "bf16");
    s.weight_bytes = double(s.config.parameters()) * info(*type).block_bytes;
  } else {
    const Checkpoint checkpoint = Checkpoint::open(o.path);
    s.config = read_config(checkpoint);
    for (const StoredTensor& t : checkpoint.tensors()) {
      ++s.types[t.value.dtype];
      s.weight_bytes += double(t.bytes());
    }
    s.tensors = int64_t(checkpoint.tensors().size());
    s.has_weights = s.tensors > 0;
    if (const auto tokenizer = open_tokenizer(checkpoint)) s.tokenizer = tokenizer->vocab_size();
  }
  if (!o.weights.empty()) s.weight_bytes = double(parse_size(o.weights, "--weights"));
  return s;
}

std::string_view family_name(Family family) {
  switch (family) {
    case Family::deepseek_v2: return "deepseek_v2";
    case Family::llama: return "llama";
    case Family::mistral: return "mistral";
    case Family::qwen2: return "qwen2";
  }
  return "?";
}

std::string attention_text(const Config& c) {
  const int n_h = c.num_attention_heads;
  if (!c.is_mla()) {
    const char* kind = c.num_key_value_heads == n_h ? "MHA" : c.num_key_value_heads == 1 ? "MQA" : "GQA";
    std::string out = fmt::format("{}: {} heads of {}, {} of keys and values", kind, n_h, c.head_dim, c.num_key_value_heads);
    return c.sliding_window ? out + fmt::format(", window {}", c.sliding_window) : out;
  }
  return fmt::format("MLA: {} heads of {} + {} (rotary), values of {}; latents of {}{}", n_h, c.qk_nope_head_dim, c.qk_rope_head_dim,
                     c.v_head_dim, c.kv_lora_rank, c.q_lora_rank ? fmt::format(", queries of {}", c.q_lora_rank) : "");
}

std::string ffn_text(const Config& c) {
  if (c.n_routed_experts == 0) return fmt::format("dense, width {}", c.intermediate_size);
  return fmt::format("{} shared + {} of {} routed experts, width {}; first {} dense, width {}; {} routing", c.n_shared_experts,
                     c.num_experts_per_tok, c.n_routed_experts, c.moe_intermediate_size, c.first_k_dense_replace, c.intermediate_size,
                     c.topk_method == Gating::greedy ? "greedy" : fmt::format("{} of {} groups", c.topk_group, c.n_group));
}

std::string rope_text(const Config& c) {
  const RopeScaling& s = c.rope_scaling;
  std::string out = fmt::format("theta {:g} over {} of {} columns", c.rope_theta, c.rope_dim(), c.query_dim());
  const char* const names[] = {"", "linear", "YaRN", "llama3"};
  if (s.type != RopeScaling::Type::none) out += fmt::format("; {} × {:g}", names[int(s.type)], s.factor);
  if (s.original_max_position_embeddings) out += fmt::format(" from {}", s.original_max_position_embeddings);
  return out + fmt::format("; softmax scale {:.6f}", c.softmax_scale());
}

std::string weights_text(const Subject& s) {
  if (!s.has_weights)
    return fmt::format("{} (not here; at {})", bytes_text(s.weight_bytes), s.config.torch_dtype.empty() ? "bf16" : s.config.torch_dtype);
  std::string types;
  for (const auto& [type, n] : s.types) types += fmt::format("{}{} {}", types.empty() ? "" : ", ", n, info(type).name);
  return fmt::format("{} in {} tensors: {}", bytes_text(s.weight_bytes), s.tensors, types);
}

int64_t token_bytes(const Subject& s, const KvLayout& layout, DType type) {
  return KvFormat{layout, type}.row_bytes() * s.config.num_hidden_layers;
}

struct Plan {
  double memory, left;
  std::vector<int64_t> contexts, users;
};

Plan plan(const InspectOptions& o, const Subject& s) {
  Plan p;
  p.memory = o.memory.empty() ? memory().total_bytes : double(parse_size(o.memory, "--memory"));
  p.left = std::max(0.0, p.memory - s.weight_bytes - aside);
  if (!o.contexts.empty()) p.contexts = parse_list(o.contexts, "--contexts", 1);
  const int64_t longest = std::max<int64_t>(s.config.max_position_embeddings, 4096);
  if (o.contexts.empty())
    for (int64_t n = 1024; n <= longest && p.contexts.size() < 5; n *= 4) p.contexts.push_back(n);
  p.users = parse_list(o.users.empty() ? "1,16" : o.users, "--users", 1);
  return p;
}

// Users that fit at a context, and the longest context for a number of users; both in whole pages.
int64_t fitting_users(const Plan& p, int64_t context, int64_t bytes) {
  const int64_t page = LatentCache::page_tokens;
  return int64_t(p.left / (double((context + page - 1) / page * page) * double(bytes)));
}
int64_t fitting_context(const Plan& p, int64_t users, int64_t bytes) {
  const int64_t page = LatentCache::page_tokens;
  return int64_t(p.left / double(users) / double(bytes * page)) * page;
}

Json to_json(const Subject& s, const Plan& p) {
  const Config& c = s.config;
  Json out;
  out["architecture"] = family_name(c.family);
  out["layers"] = c.num_hidden_layers;
  out["hidden_size"] = c.hidden_size;
  out["vocab_size"] = c.vocab_size;
  out["max_position_embeddings"] = c.max_position_embeddings;
  out["attention_heads"] = c.num_attention_heads;
  out["attention"] = c.is_mla()                                       ? "MLA"
                     : c.num_key_value_heads == c.num_attention_heads ? "MHA"
                     : c.num_key_value_heads == 1                     ? "MQA"
                                                                      : "GQA";
  out["softmax_scale"] = c.softmax_scale();
  out["parameters"] = c.parameters();
  out["active_parameters"] = c.active_parameters();
  out["weight_bytes"] = s.weight_bytes;
  out["tensors"] = Json::object();
  for (const auto& [type, n] : s.types) out["tensors"][std::string(info(type).name)] = n;
  out["tokenizer_tokens"] = s.tokenizer < 0 ? Json() : Json(s.tokenizer);
  out["cache"] = Json::array();
  for (const AttentionKind& kind : four_attentions(c)) {
    Json row{{"attention", kind.name}, {"formula", kind.formula}, {"elements", kind.layout.row()}, {"own", kind.own}};
    for (DType type : {DType::f32, DType::bf16, DType::i8}) {
      const int64_t bytes = token_bytes(s, kind.layout, type);
      row["bytes_per_token"][std::string(info(type).name)] = bytes;
      for (int64_t n : p.contexts) row["users"][std::string(info(type).name)][std::to_string(n)] = fitting_users(p, n, bytes);
      for (int64_t n : p.users) row["contexts"][std::string(info(type).name)][std::to_string(n)] = fitting_context(p, n, bytes);
    }
    out["cache"].push_back(std::move(row));
  }
  out["memory_bytes"] = p.memory;
  out["memory_for_cache_bytes"] = p.left;
  return out;
}

void print_architecture(const InspectOptions& o, const Subject& s) {
  const Config& c = s.config;
  auto line = [](const char* what, const std::string& text) { fmt::print("  {:<14}{}\n", what, text); };
  fmt::print("{}\n\n", std::filesystem::path(o.path).lexically_normal().string());
  line("architecture", fmt::format("{}: {} layers, hidden {}, vocabulary {}, trained context {}", family_name(c.family),
                                   c.num_hidden_layers, c.hidden_size, c.vocab_size, c.max_position_embeddings));
  line("attention", attention_text(c));
  line("feed-forward", ffn_text(c));
  line("rotary", rope_text(c));
  line("parameters", c.n_routed_experts == 0
                         ? grouped(c.parameters())
                         : fmt::format("{}; a token reads {}", grouped(c.parameters()), grouped(c.active_parameters())));
  line("weights", weights_text(s));
  line("tokenizer", s.tokenizer < 0 ? "none here" : fmt::format("{} tokens", s.tokenizer));
}

void print_cache(const Subject& s, const std::vector<AttentionKind>& kinds) {
  fmt::print("\nWhat a token leaves in the cache, with attention of this size\n\n");
  Table table{{"attention", "", "elements a layer", fmt::format("bf16, {} layers", s.config.num_hidden_layers), "int8", "of MHA"}, {}};
  const auto all = double(kinds[0].layout.row());
  for (const AttentionKind& kind : kinds)
    table.rows.push_back({kind.name + (kind.own ? "  ← this model" : ""), kind.formula, std::to_string(kind.layout.row()),
                          bytes_text(double(token_bytes(s, kind.layout, DType::bf16))),
                          bytes_text(double(token_bytes(s, kind.layout, DType::i8))),
                          fmt::format("{:.1f}%", 100 * double(kind.layout.row()) / all)});
  fmt::print("{}", table.text());
}

void print_plan(const Subject& s, const Plan& p, const std::vector<AttentionKind>& kinds) {
  fmt::print("\nWhat fits in {}: {} of weights, {} aside, {} for caches\n\n", bytes_text(p.memory), bytes_text(s.weight_bytes),
             bytes_text(aside), bytes_text(p.left));
  if (p.left == 0) return void(fmt::print("  Nothing: the weights alone take more.\n"));
  Table table{{"", ""}, {}};
  for (const AttentionKind& kind : kinds) table.header.push_back(kind.name + (kind.own ? " ←" : ""));
  for (DType type : cache_types) {
    auto add = [&](const std::string& what, auto fits) {
      std::vector<std::string> row{what, std::string(info(type).name)};
      for (const AttentionKind& kind : kinds) row.push_back(grouped(fits(token_bytes(s, kind.layout, type))));
      table.rows.push_back(std::move(row));
    };
    for (int64_t n : p.contexts)
      add(fmt::format("users at a context of {}", grouped(n)), [&](int64_t bytes) { return fitting_users(p, n, bytes); });
    for (int64_t n : p.users)
      add(n == 1 ? "context of one user" : fmt::format("context of each of {} users", n),
          [&](int64_t bytes) { return fitting_context(p, n, bytes); });
  }
  fmt::print("{}", table.text());
}

void inspect(const InspectOptions& o) {
  const Subject subject = open(o);
  const Plan p = plan(o, subject);
  if (o.json) return print_json(to_json(subject, p));
  const auto kinds = four_attentions(subject.config);
  print_architecture(o, subject);
  print_cache(subject, kinds);
  print_plan(subject, p, kinds);
}

}  // namespace

void add_inspect(CLI::App& program, Work& work) {
  auto o = std::make_shared<InspectOptions>();
  CLI::App& c = add_command(program, "inspect", "show a model's architecture, what each attention would keep, and what fits in memory",
                            "  mla inspect model.gguf\n"
                            "  mla inspect config.json --memory 640G --contexts 4096,131072\n"
                            "  mla inspect folder --memory 24GiB --users 1,8,64 --json");
  add_model_path(c, o->path, "a Hugging Face folder, a GGUF file or a config.json alone");
  c.add_option("--memory", o->memory, "plan for this much memory, as in 24G (default: this machine's)")
      ->option_text("SIZE")
      ->group("planner");
  c.add_option("--weights", o->weights, "weights take this much (default: what the model says)")->option_text("SIZE")->group("planner");
  c.add_option("--contexts", o->contexts, "how many users fit at these contexts, as in 4096,32768")->option_text("LIST")->group("planner");
  c.add_option("--users", o->users, "which context fits for so many users (default: 1,16)")->option_text("LIST")->group("planner");
  add_json(c, o->json);
  c.final_callback([o, &work] { work = [o] { inspect(*o); }; });
}

}  // namespace mla
