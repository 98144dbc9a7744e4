// mla eval: perplexity of a text, in windows.
#include "cli/command.h"
#include "cli/format.h"
#include "cli/help.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "cli/score.h"
#include "cli/session.h"
#include "core/check.h"
#include "core/threads.h"
#include "io/npy.h"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <chrono>
#include <cmath>

namespace mla {
namespace {

struct EvalOptions {
  ModelOptions model;
  std::string file, ids;
  int64_t window = 1024, stride = 0, windows = 0;
  bool json = false;
};

struct Score {
  double nll = 0;  // summed
  int64_t scored = 0, windows = 0, tokens = 0;
  double seconds = 0;
};

class Evaluation {
 public:
  Evaluation(Session& session, const EvalOptions& o, std::vector<int32_t> tokens)
      : session_(session),
        tokens_(std::move(tokens)),
        window_(std::min<int64_t>(o.window, int64_t(tokens_.size()))),
        stride_(o.stride > 0 ? o.stride : o.window),
        cache_(session.make_cache(window_)) {
    planned_ = 1 + (int64_t(tokens_.size()) - window_) / stride_;
    if (o.windows > 0) planned_ = std::min(planned_, o.windows);
  }

  Score run() {
    ProgressBar bar("scoring");
    begin_ = std::chrono::steady_clock::now();
    until_interrupted([&] {
      for (; score_.windows < planned_; ++score_.windows) score_window(score_.windows * stride_, bar);
    });
    return score_;
  }

  const LatentCache& cache() const { return cache_; }
  int64_t window() const { return window_; }
  int64_t stride() const { return stride_; }

 private:
  // Tokens of one step: few enough that their logits stay below 128 MB.
  int64_t chunk() const { return std::clamp<int64_t>((int64_t(128) << 20) / 4 / session_.config().vocab_size, 16, 512); }

  void score_window(int64_t from, ProgressBar& bar) {
    const std::span<const int32_t> window = std::span(tokens_).subspan(size_t(from), size_t(window_));
    const int sequence = cache_.open();
    for (int64_t at = 0; at < window_; at += chunk()) {
      const int64_t n = std::min(chunk(), window_ - at);
      const Chunk step{sequence, window.subspan(size_t(at), size_t(n)), Chunk::Logits::all};
      const Tensor logits = session_.model().forward(std::span(&step, 1), cache_, [&](double fraction) {
        throw_if_interrupted();
        const double done = (double(score_.windows) + (double(at) + fraction * double(n)) / double(window_)) / double(planned_);
        bar.update(done, score_.scored > 0 ? fmt::format("perplexity {:.3f}", std::exp(score_.nll / double(score_.scored))) : "");
      });
      CHECK(logits.data, "the cache is full at {} of {} tokens", at, window_);
      add(session_.model().to_host(logits), window.subspan(size_t(at + 1), size_t(std::min(n, window_ - at - 1))));
      score_.tokens += n;
      score_.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
    }
    cache_.close(sequence);
  }

  // logits [n, vocab] predict `next`, token by token. The sum is formed in order, so that it does not depend on the threads.
  void add(const Tensor& logits, std::span<const int32_t> next) {
    std::vector<double> nll(next.size());
    const auto vocab = size_t(session_.config().vocab_size);
    session_.device().threads().parallel(int64_t(next.size()), [&](int64_t i, int) {
      nll[size_t(i)] = negative_log_likelihood({logits.f32() + i * logits.stride[0], vocab}, next[size_t(i)]);
    });
    for (double x : nll) score_.nll += x;
    score_.scored += int64_t(next.size());
  }

  Session& session_;
  std::vector<int32_t> tokens_;
  int64_t window_, stride_, planned_ = 0;
  LatentCache cache_;
  Score score_;
  std::chrono::steady_clock::time_point begin_;
};

std::vector<int32_t> read_tokens(const Session& session, const EvalOptions& o) {
  if (!o.ids.empty()) return read_npy_ids(o.ids);
  const Tokenizer& tokenizer = session.need_tokenizer("give token ids with --ids");
  std::vector<int32_t> tokens = tokenizer.encode(read_file(o.file), false, false);
  if (tokenizer.adds_bos()) tokens.insert(tokens.begin(), tokenizer.bos());
  return tokens;
}

void eval(const EvalOptions& o) {
  if (o.file.empty() == o.ids.empty())
    fail_input("there is {} to score; give --file TEXT or --ids IDS.npy", o.file.empty() ? "nothing" : "more than one thing");
  if (o.window < 2) fail_input("--context is {}; a window needs at least 2 tokens, the second of which is scored", o.window);
  if (o.stride < 0 || o.stride > o.window) fail_input("--stride is {}; give 1 to {}, the window", o.stride, o.window);
  if (o.windows < 0) fail_input("--windows is {}; give how many to score, or 0 for all", o.windows);
  Session session(o.model);
  std::vector<int32_t> tokens = read_tokens(session, o);
  const auto count = int64_t(tokens.size());
  if (count < 2) fail_input("the text has {} tokens; at least 2 are needed", count);
  if (count < o.window && !o.json)
    fmt::print(stderr, "mla: note: the text has {} tokens, less than a window of {}; it is one window\n", count, o.window);
  Evaluation evaluation(session, o, std::move(tokens));
  const Score score = evaluation.run();
  session.finish_dump();
  GenerateFigures work;
  work.prefill_tokens = score.tokens;
  work.prefill_seconds = score.seconds;
  const RunFigures figures(work, evaluation.cache(), session.device());
  const double nll = score.nll / double(std::max<int64_t>(score.scored, 1));
  if (o.json) {
    nlohmann::ordered_json out;
    const bool any = score.scored > 0;
    out["perplexity"] = any ? nlohmann::ordered_json(std::exp(nll)) : nlohmann::ordered_json();
    out["nll"] = any ? nlohmann::ordered_json(nll) : nlohmann::ordered_json();
    out["tokens_scored"] = score.scored;
    out["tokens"] = count;
    out["windows"] = score.windows;
    out["context"] = evaluation.window();
    out["stride"] = evaluation.stride();
    out["activations"] = o.model.activations_name;
    figures.add_to(out);
    print_json(out);
  } else if (score.scored > 0) {
    fmt::print("perplexity {:.4f}  (nll {:.5f} over {} tokens, {} window{} of {}; the text has {})\n", std::exp(nll), nll,
               grouped(score.scored), score.windows, score.windows == 1 ? "" : "s", evaluation.window(), grouped(count));
  }
  std::fflush(stdout);
  figures.print();
  if (interrupted()) give_up();
}

}  // namespace

void add_eval(CLI::App& program, Work& work) {
  auto o = std::make_shared<EvalOptions>();
  CLI::App& c = add_command(program, "eval", "measure how well a model predicts a text: perplexity",
                            "  mla eval model.gguf --file book.txt\n"
                            "  mla eval model.gguf --file book.txt --context 2048 --windows 8 --json\n"
                            "  mla eval folder --file book.txt --kv-type i8     # what an int8 cache costs");
  o->model.activations_name = "i16";  // a measurement is of the model, not of the rounding that makes it fast
  add_model_options(c, o->model, false);
  c.add_option("-f,--file", o->file, "the text; - is stdin")->option_text("FILE")->group("text");
  c.add_option("--ids", o->ids, "a .npy file with token ids instead")->option_text("FILE")->group("text");
  c.add_option("--context", o->window, "tokens of a window; all but the first are scored (default: 1024)")->option_text("N")->group("text");
  c.add_option("--stride", o->stride, "tokens from one window's start to the next (default: the window)")->option_text("N")->group("text");
  c.add_option("--windows", o->windows, "score only the first K windows")->option_text("K")->group("text");
  add_json(c, o->json);
  c.final_callback([o, &work] { work = [o] { eval(*o); }; });
}

}  // namespace mla
