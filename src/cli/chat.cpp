// mla chat: a conversation whose history stays in the cache, so that each turn runs only what is new.
#include "cli/command.h"
#include "cli/format.h"
#include "cli/help.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "cli/session.h"
#include "core/check.h"

#include <unistd.h>
#include <CLI/CLI.hpp>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iostream>

namespace mla {
namespace {

struct ChatOptions {
  ModelOptions model;
  SamplingArguments sampling;
  int64_t tokens = 1024;
  std::string system, chat_template;
};

constexpr const char* commands =
    "  /help          this list\n"
    "  /reset         forget the conversation\n"
    "  /system TEXT   set the system message and start over; without TEXT, none\n"
    "  /again         answer the last message once more, with another seed\n"
    "  /save FILE     write the conversation to a text file\n"
    "  /stats         what is in the cache, and how fast the last answer was\n"
    "  /exit          leave (so does Ctrl-D; Ctrl-C stops an answer)\n"
    "A line that ends in \\ goes on in the next.\n";

class Chat {
 public:
  explicit Chat(const ChatOptions& options)
      : options_(options),
        session_(with_context(options.model)),
        style_(session_.chat_style(options.chat_template)),
        cache_(session_.make_cache(1)),
        sequence_(cache_.open()),
        interactive_(isatty(STDIN_FILENO) && isatty(STDOUT_FILENO)) {
    generate_.max_tokens = options.tokens;
    generate_.sampling = options.sampling.read();
    generate_.stop_strings = options.sampling.stops;
    generate_.end_tokens = session_.end_tokens();
    for (const std::string& stop : chat_stops(style_))
      if (const auto id = session_.tokenizer()->find(stop)) generate_.end_tokens.push_back(*id);
    start(options.system);
  }

  void run() {
    if (interactive_) fmt::print(stderr, "{}\n/help lists the commands.\n", session_.device().describe());
    std::string line;
    while (read_line(line)) {
      if (line.starts_with("/")) {
        if (!command(line)) break;
      } else if (line.find_first_not_of(" \t\r\n") != std::string::npos) {
        say(line);
      }
      if (interrupted() && !interactive_) break;
      forget_interrupt();
    }
    if (interactive_ && std::cin.eof()) fmt::print("\n");
    std::fflush(stdout);
    session_.finish_dump();
    figures().print();
    if (interrupted()) give_up();
  }

 private:
  static ModelOptions with_context(ModelOptions options) {
    if (options.context == 0) options.context = 4096;
    return options;
  }

  RunFigures figures() { return RunFigures(total_, cache_, session_.device()); }

  void start(const std::string& system) {
    messages_.clear();
    if (!system.empty()) messages_.push_back({"system", system});
    cache_.truncate(sequence_, 0);
    tokens_.clear();
    text_.clear();
  }

  // A line, or several joined by backslashes; false at the end.
  bool read_line(std::string& line) {
    line.clear();
    for (std::string part;;) {
      if (interactive_) fmt::print("{}", line.empty() ? "\n> " : "  "), std::fflush(stdout);
      if (!std::getline(std::cin, part)) return !line.empty();
      if (!part.ends_with('\\')) return line += part, true;
      part.back() = '\n';
      line += part;
    }
  }

  // False to leave.
  bool command(const std::string& line) {
    const size_t space = line.find(' ');
    const std::string word = line.substr(0, space);
    std::string rest = space == std::string::npos ? "" : line.substr(space + 1);
    rest.erase(0, std::min(rest.size(), rest.find_first_not_of(' ')));
    if (word == "/exit" || word == "/quit") return false;
    if (word == "/help") {
      fmt::print(stderr, "{}", commands);
    } else if (word == "/reset") {
      start(messages_.empty() || messages_[0].role != "system" ? "" : messages_[0].content);
      fmt::print(stderr, "The conversation is forgotten.\n");
    } else if (word == "/system") {
      start(rest);
      fmt::print(stderr, "{}\n",
                 rest.empty() ? "There is no system message now." : "The system message is set; the conversation starts over.");
    } else if (word == "/again") {
      again();
    } else if (word == "/save") {
      save(rest);
    } else if (word == "/stats") {
      fmt::print(stderr, "{} messages; {} of {} tokens of context used, {} in the cache\n", messages_.size(), tokens_.size(), room(),
                 bytes_text(double(cache_.length(sequence_)) * double(cache_.bytes_per_token())));
      if (last_.decode_tokens > 0) RunFigures(last_, cache_, session_.device()).print();
    } else {
      fmt::print(stderr, "There is no command {}; /help lists them.\n", word);
    }
    return true;
  }

  int64_t room() const { return cache_.length(sequence_) + cache_.free_tokens() + slack(); }
  int64_t slack() const {  // of the page that is partly filled
    const int64_t used = cache_.length(sequence_) % LatentCache::page_tokens;
    return used ? LatentCache::page_tokens - used : 0;
  }

  void again() {
    if (messages_.empty() || messages_.back().role != "assistant") {
      fmt::print(stderr, "There is no answer yet.\n");
      return;
    }
    messages_.pop_back();
    const Message question = messages_.back();
    messages_.pop_back();
    ++generate_.sampling.seed;
    say(question.content);
  }

  void save(const std::string& path) {
    if (path.empty()) return void(fmt::print(stderr, "/save needs the name of a file.\n"));
    std::ofstream out(path);
    for (const Message& m : messages_) out << m.role << ":\n" << m.content << "\n\n";
    out.close();
    if (out)
      fmt::print(stderr, "Saved {} messages to {}.\n", messages_.size(), path);
    else
      fmt::print(stderr, "{} could not be written: {}.\n", path, std::strerror(errno));
  }

  // The conversation's tokens. What was generated stays as it was sampled where the template renders the history as it was said;
  // otherwise the text is tokenized anew.
  std::vector<int32_t> conversation(std::string& rendered) const {
    rendered = chat_prompt(style_, messages_);
    const Tokenizer& tokenizer = *session_.tokenizer();
    if (text_.empty() || !rendered.starts_with(text_)) return tokenizer.encode(rendered, false, true);
    std::vector<int32_t> tokens = tokens_;
    for (int32_t id : tokenizer.encode(std::string_view(rendered).substr(text_.size()), false, true)) tokens.push_back(id);
    return tokens;
  }

  void say(const std::string& message) {
    messages_.push_back({"user", message});
    std::string rendered;
    Generation turn;
    turn.sequence = sequence_;
    turn.tokens = conversation(rendered);
    const int64_t held = cache_.length(sequence_);
    int64_t common = 0;
    const int64_t longest = std::min({held, int64_t(turn.tokens.size()) - 1, int64_t(tokens_.size())});
    while (common < longest && turn.tokens[size_t(common)] == tokens_[size_t(common)]) ++common;
    cache_.truncate(sequence_, common);
    const int64_t prompt = int64_t(turn.tokens.size());
    if (prompt >= room()) {
      messages_.pop_back();
      tokens_.resize(size_t(common));
      text_.clear();
      fmt::print(
          stderr,
          "The context is full: this message needs {} tokens and {} are there. Start over with /reset, or with a larger --context.\n",
          prompt, room());
      return;
    }
    answer(turn, rendered);
  }

  void answer(Generation& turn, const std::string& rendered) {
    const size_t prompt = turn.tokens.size();
    TextStream stream(*session_.tokenizer());
    ProgressBar bar("reading");
    GenerateHooks hooks;
    hooks.spell = [&](size_t, std::optional<int32_t> id) { return id ? stream.push(*id) : stream.flush(); };
    hooks.on_text = [&](size_t, std::string_view piece) {
      std::fwrite(piece.data(), 1, piece.size(), stdout);
      std::fflush(stdout);
    };
    hooks.on_prefill = [&](double fraction) { fraction < 1 ? bar.update(fraction) : bar.clear(); };
    hooks.cancelled = interrupted;
    last_ = generate(session_.model(), cache_, std::span(&turn, 1), generate_, hooks);
    total_.add(last_);
    std::fputc('\n', stdout);
    std::fflush(stdout);
    if (turn.finish == Finish::cache_full) fmt::print(stderr, "The context is full; /reset starts over.\n");

    // The end token is left to the template, which writes it behind the message.
    if (turn.finish == Finish::end_token) turn.tokens.pop_back();
    tokens_ = turn.tokens;
    text_ = rendered + turn.text;
    // A stop string cuts the text but not its tokens; then the history is tokenized anew.
    if (turn.finish == Finish::stop_string || turn.tokens.size() == prompt) text_.clear();
    messages_.push_back({"assistant", turn.text});
  }

  const ChatOptions& options_;
  Session session_;
  ChatStyle style_;
  LatentCache cache_;
  int sequence_;
  bool interactive_;
  GenerateOptions generate_;
  GenerateFigures last_, total_;
  std::vector<Message> messages_;
  std::vector<int32_t> tokens_;  // of the conversation so far; the cache holds the first of them
  std::string text_;             // that tokens_ stand for; empty when they do not stand for a text as the template renders it
};

}  // namespace

void add_chat(CLI::App& program, Work& work) {
  auto o = std::make_shared<ChatOptions>();
  o->sampling.sampling.temperature = 0.6;
  o->sampling.sampling.top_p = 0.95;
  CLI::App& c = add_command(program, "chat", "talk with a model",
                            "  mla chat model.gguf\n"
                            "  mla chat folder --system \"Answer in one sentence.\" --temperature 0\n"
                            "  printf 'Hello!\\n/stats\\n' | mla chat model.gguf");
  add_model_options(c, o->model);
  c.add_option("--system", o->system, "the system message")->option_text("TEXT")->group("prompt");
  c.add_option("--chat-template", o->chat_template, "name of the template (default: recognised from the model)")
      ->option_text("NAME")
      ->group("prompt");
  c.add_option("-n,--tokens", o->tokens, "longest answer, in tokens (default: 1024)")->option_text("N")->group("prompt");
  add_sampling_options(c, o->sampling);
  c.final_callback([o, &work] {
    work = [o] {
      if (o->tokens < 1) fail_input("-n is {}; give the longest answer in tokens, 1 or more", o->tokens);
      check_sampling(o->sampling.sampling, INT32_MAX);
      Chat(*o).run();
    };
  });
}

}  // namespace mla
