// mla run: continues one prompt or several, as one batch, and streams the text.
#include "cli/command.h"
#include "cli/format.h"
#include "cli/help.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "cli/session.h"
#include "core/check.h"
#include "io/npy.h"

#include <unistd.h>
#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

namespace mla {
namespace {

using Json = nlohmann::ordered_json;

struct RunOptions {
  ModelOptions model;
  SamplingArguments sampling;
  std::vector<std::string> prompts, prompt_files, id_files;
  int64_t tokens = 128;
  std::optional<int> logprobs;
  bool ignore_eos = false, chat = false, json = false;
  std::string system, chat_template;
};

// What a prompt was made of, and its ids.
struct Prompt {
  std::string text;
  std::vector<int32_t> ids;
};

Prompt encode(const Session& session, const RunOptions& o, std::string text) {
  const Tokenizer& tokenizer = session.need_tokenizer("give token ids with --ids");
  Prompt prompt{std::move(text), {}};
  if (o.chat) {
    std::vector<Message> messages;
    if (!o.system.empty()) messages.push_back({"system", o.system});
    messages.push_back({"user", prompt.text});
    prompt.ids = tokenizer.encode(chat_prompt(session.chat_style(o.chat_template), messages), false, true);
  } else {
    prompt.ids = tokenizer.encode(prompt.text, true, true);
  }
  return prompt;
}

std::vector<Prompt> read_prompts(const Session& session, const RunOptions& o) {
  std::vector<Prompt> prompts;
  for (const std::string& text : o.prompts) prompts.push_back(encode(session, o, text));
  for (const std::string& file : o.prompt_files) prompts.push_back(encode(session, o, read_file(file)));
  for (const std::string& file : o.id_files) prompts.push_back({{}, read_npy_ids(file)});
  if (prompts.empty()) prompts.push_back(encode(session, o, read_file("-")));
  for (size_t i = 0; i < prompts.size(); ++i)
    if (prompts[i].ids.empty()) fail_input("prompt {} is empty; give at least one token", i + 1);
  return prompts;
}

// Shows texts in the order of their prompts: the first that runs as it comes, those behind it when it is done.
class Screen {
 public:
  Screen(const std::vector<Prompt>& prompts, bool show) : prompts_(prompts), waiting_(prompts.size()), done_(prompts.size()), show_(show) {}

  void text(size_t i, std::string_view piece) {
    waiting_[i] += piece;
    if (i == front_) print();
  }
  void finished(size_t i) {
    done_[i] = true;
    while (front_ < done_.size() && done_[front_]) {
      print();
      if (show_) std::fputc('\n', stdout);
      ++front_;
      opened_ = false;
    }
    if (front_ < done_.size()) print();
  }

 private:
  void print() {
    if (!show_) return;
    if (!opened_ && prompts_.size() > 1) fmt::print("{}[{}] {}\n", front_ ? "\n" : "", front_ + 1, first_line(prompts_[front_]));
    opened_ = true;
    std::fwrite(waiting_[front_].data(), 1, waiting_[front_].size(), stdout);
    std::fflush(stdout);
    waiting_[front_].clear();
  }
  static std::string first_line(const Prompt& prompt) {
    if (prompt.text.empty()) return fmt::format("{} ids", prompt.ids.size());
    std::string line = prompt.text.substr(0, prompt.text.find('\n'));
    if (line.size() > 70) {
      size_t cut = 67;
      while (cut > 0 && (line[cut] & 0xC0) == 0x80) --cut;
      line = line.substr(0, cut) + "...";
    }
    return line;
  }

  const std::vector<Prompt>& prompts_;
  std::vector<std::string> waiting_;
  std::vector<bool> done_;
  bool show_, opened_ = false;
  size_t front_ = 0;
};

Json logprobs_json(const Generation& text, const Tokenizer* tokenizer) {
  Json out = Json::array();
  auto entry = [&](int32_t id, float logprob) {
    Json e{{"id", id}, {"logprob", logprob}};
    if (tokenizer) e["token"] = tokenizer->decode(std::span(&id, 1));
    return e;
  };
  for (const Sampled& s : text.sampled) {
    Json e = entry(s.token, s.logprob);
    e["top"] = Json::array();
    for (const auto& [id, logprob] : s.alternatives) e["top"].push_back(entry(id, logprob));
    out.push_back(std::move(e));
  }
  return out;
}

Json text_json(const Generation& text, const RunOptions& o, const Tokenizer* tokenizer) {
  std::vector<int32_t> ids;
  for (const Sampled& s : text.sampled) ids.push_back(s.token);
  Json out;
  out["text"] = text.text;
  out["ids"] = ids;
  out["prompt_tokens"] = text.tokens.size() - ids.size();
  out["finish"] = name(text.finish);
  if (o.logprobs) out["logprobs"] = logprobs_json(text, tokenizer);
  return out;
}

// Without --json: token by token, what the model would rather have said.
void print_logprobs(const Generation& text, const Tokenizer* tokenizer) {
  auto spelled = [&](int32_t id) {
    return tokenizer ? Json(tokenizer->decode(std::span(&id, 1))).dump(-1, ' ', false, Json::error_handler_t::replace) : std::to_string(id);
  };
  for (const Sampled& s : text.sampled) {
    fmt::print("  {:8.4f}  {}", s.logprob, spelled(s.token));
    for (const auto& [id, logprob] : s.alternatives) fmt::print("   {} {:.2f}", spelled(id), logprob);
    fmt::print("\n");
  }
}

GenerateOptions generate_options(const Session& session, const RunOptions& o) {
  GenerateOptions g;
  g.max_tokens = o.tokens;
  g.sampling = o.sampling.read();
  g.sampling.logprobs = o.logprobs;
  g.stop_strings = o.sampling.stops;
  if (!g.stop_strings.empty()) session.need_tokenizer("--stop needs one");
  if (o.ignore_eos) return g;
  g.end_tokens = session.end_tokens();
  if (o.chat)
    for (const std::string& stop : chat_stops(session.chat_style(o.chat_template)))
      if (const auto id = session.tokenizer()->find(stop)) g.end_tokens.push_back(*id);
  return g;
}

void run(const RunOptions& o) {
  if (o.tokens < 0 || o.tokens > (int64_t(1) << 31) - 1) fail_input("-n is {}; give the number of tokens to write, 0 or more", o.tokens);
  if (!o.chat && (!o.system.empty() || !o.chat_template.empty())) fail_input("--system and --chat-template belong to --chat; add it");
  check_sampling(o.sampling.sampling, INT32_MAX);
  if (o.prompts.empty() && o.prompt_files.empty() && o.id_files.empty() && isatty(STDIN_FILENO))
    fail_input("there is no prompt; give --prompt TEXT, --prompt-file FILE or --ids IDS.npy, or pipe one in");

  Session session(o.model);
  const GenerateOptions options = generate_options(session, o);
  const std::vector<Prompt> prompts = read_prompts(session, o);
  int64_t needed = 0;  // whole pages for each sequence
  constexpr int64_t page = LatentCache::page_tokens;
  for (const Prompt& p : prompts) {
    const int64_t tokens = int64_t(p.ids.size()) + o.tokens;
    needed += prompts.size() == 1 ? tokens : (tokens + page - 1) / page * page;
  }
  LatentCache cache = session.make_cache(needed);
  std::vector<Generation> texts(prompts.size());
  std::vector<TextStream> streams;
  for (size_t i = 0; i < texts.size(); ++i) {
    texts[i].sequence = cache.open();
    texts[i].tokens = prompts[i].ids;
    if (session.tokenizer()) streams.emplace_back(*session.tokenizer());
  }

  Screen screen(prompts, !o.json);
  ProgressBar bar("reading");
  GenerateHooks hooks;
  hooks.spell = [&](size_t i, std::optional<int32_t> id) -> std::string {
    if (streams.empty()) return id ? fmt::format("{} ", *id) : "";
    return id ? streams[i].push(*id) : streams[i].flush();
  };
  hooks.on_text = [&](size_t i, std::string_view piece) { screen.text(i, piece); };
  hooks.on_finish = [&](size_t i) { bar.clear(), screen.finished(i); };
  hooks.on_prefill = [&](double fraction) { fraction < 1 ? bar.update(fraction) : bar.clear(); };
  hooks.cancelled = interrupted;
  const RunFigures figures(generate(session.model(), cache, texts, options, hooks), cache, session.device());
  session.finish_dump();

  if (o.json) {
    if (streams.empty())
      for (Generation& text : texts) text.text.clear();  // ids alone
    Json out = texts.size() == 1 ? text_json(texts[0], o, session.tokenizer()) : Json{{"results", Json::array()}};
    if (texts.size() > 1)
      for (const Generation& text : texts) out["results"].push_back(text_json(text, o, session.tokenizer()));
    figures.add_to(out);
    print_json(out);
  } else if (o.logprobs) {
    for (const Generation& text : texts) print_logprobs(text, session.tokenizer());
  }
  std::fflush(stdout);
  figures.print();
  if (interrupted()) give_up();
}

}  // namespace

void add_run(CLI::App& program, Work& work) {
  auto o = std::make_shared<RunOptions>();
  CLI::App& c = add_command(program, "run", "continue a prompt",
                            "  mla run model.gguf --prompt \"The capital of France is\" -n 20\n"
                            "  mla run model.gguf --chat -p \"Why is the sky blue?\" -p \"Why is the sea salty?\"\n"
                            "  git diff | mla run model.gguf --chat --system \"Describe this change.\" --prompt-file -\n"
                            "  mla run folder --ids ids.npy -n 64 --ignore-eos --json");
  add_model_options(c, o->model);
  const std::string group = "prompt";
  c.add_option("-p,--prompt", o->prompts, "text to continue; several run as one batch")
      ->option_text("TEXT")
      ->expected(1)
      ->take_all()
      ->group(group);
  c.add_option("-f,--prompt-file", o->prompt_files, "a file with the text; - is stdin")
      ->option_text("FILE")
      ->expected(1)
      ->take_all()
      ->group(group);
  c.add_option("--ids", o->id_files, "a .npy file with token ids, taken as they are")
      ->option_text("FILE")
      ->expected(1)
      ->take_all()
      ->group(group);
  c.add_flag("--chat", o->chat, "the prompt is a user's message; put it into the model's chat template")->group(group);
  c.add_option("--system", o->system, "the system message before it")->option_text("TEXT")->group(group);
  c.add_option("--chat-template", o->chat_template, "name of the template (default: recognised from the model)")
      ->option_text("NAME")
      ->group(group);
  c.add_option("-n,--tokens", o->tokens, "how many tokens to write at most (default: 128)")->option_text("N")->group("output");
  c.add_flag("--ignore-eos", o->ignore_eos, "go on after the model's end token")->group("output");
  c.add_option("--logprobs", o->logprobs, "also show the log-probability of each token and of the K likeliest")
      ->option_text("K")
      ->group("output");
  add_json(c, o->json);
  add_sampling_options(c, o->sampling);
  c.final_callback([o, &work] { work = [o] { run(*o); }; });
}

}  // namespace mla
