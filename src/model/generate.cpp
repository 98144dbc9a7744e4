// Prefill in chunks, then one token a step for every text that still runs. Where the device chooses the tokens, a step is issued before the
// host has been told those of the one before, so that the device never waits for it: a text that has ended gives the surplus token back.
#include "model/generate.h"

#include "core/check.h"
#include "core/random.h"
#include "core/threads.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace mla {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

class Writer {
 public:
  Writer(Model& model, LatentCache& cache, std::span<Generation> texts, const GenerateOptions& options, const GenerateHooks& hooks)
      : model_(model), cache_(cache), texts_(texts), options_(options), hooks_(hooks), stops_(options.stop_strings) {}

  GenerateFigures run() {
    check();
    sent_.assign(texts_.size(), 0);
    row_.assign(texts_.size(), -1);
    prefill();
    const auto begin = Clock::now();
    while (decode()) figures_.decode_seconds = seconds_since(begin);
    return figures_;
  }

 private:
  void check() const {
    check_sampling(options_.sampling, model_.config().vocab_size);
    CHECK(options_.max_tokens >= 0 && options_.prefill_chunk >= 0, "{} tokens, chunk {}", options_.max_tokens, options_.prefill_chunk);
    for (const std::string& stop : options_.stop_strings)
      if (stop.empty()) fail_input("a stop string is empty; leave it out");
    for (const Generation& text : texts_)
      if (int64_t(text.tokens.size()) <= cache_.length(text.sequence)) fail_input("a prompt has no tokens; give at least one");
  }

  // The logits of a step. Without data, the texts have been cancelled or the cache is full.
  Tensor forward(std::span<const Chunk> chunks, const Progress& progress = {}) {
    struct Cancelled {};
    try {
      return model_.forward(chunks, cache_, [&](double fraction) {
        if (hooks_.cancelled && hooks_.cancelled()) throw Cancelled();
        if (progress) progress(fraction);
      });
    } catch (const Cancelled&) {
      settle();
      finish_all(Finish::cancelled);
      return {};
    }
  }

  void finish_all(Finish why) {
    for (size_t i = 0; i < texts_.size(); ++i)
      if (texts_[i].finish == Finish::running) finish(i, why);
  }

  int64_t left(const Generation& text) const { return int64_t(text.tokens.size()) - cache_.length(text.sequence); }

  void prefill() {
    const auto begin = Clock::now();
    const int64_t step_tokens = model_.device().step_tokens;
    int64_t total = 0, done = 0;
    for (const Generation& text : texts_) total += left(text);
    while (done < total) {
      std::vector<Chunk> chunks;
      std::vector<size_t> ready;  // texts whose last prompt token is in this step
      int64_t tokens = 0;
      for (size_t i = 0; i < texts_.size(); ++i) {
        const int64_t rest = texts_[i].finish == Finish::running && texts_[i].sampled.empty() ? left(texts_[i]) : 0;
        const int64_t n = std::min(rest, options_.prefill_chunk > 0 ? options_.prefill_chunk : step_tokens);
        // Several prompts share a step as far as they fit: its memory is bounded.
        if (n == 0 || (tokens > 0 && tokens + n > step_tokens)) continue;
        const bool last = n == rest && options_.max_tokens > 0;
        chunks.push_back({texts_[i].sequence, std::span(texts_[i].tokens).last(size_t(rest)).first(size_t(n)),
                          last ? Chunk::Logits::last : Chunk::Logits::none});
        if (last) ready.push_back(i);
        tokens += n;
      }
      const Tensor logits = forward(chunks, [&](double fraction) {
        if (hooks_.on_prefill) hooks_.on_prefill((double(done) + fraction * double(tokens)) / double(total));
      });
      if (!logits.data) {
        finish_all(Finish::cache_full);
        break;
      }
      done += tokens;
      figures_.prefill_tokens += tokens;
      pick(ready, logits);
      settle();
      figures_.prefill_seconds = seconds_since(begin);
    }
    if (hooks_.on_prefill) hooks_.on_prefill(1);
    if (options_.max_tokens == 0) finish_all(Finish::length);
  }

  // One token more for every text that runs; false when none does.
  bool decode() {
    std::vector<int32_t> ids(texts_.size());
    std::vector<Chunk> chunks;
    std::vector<size_t> running;
    double rows = 0;
    for (size_t i = 0; i < texts_.size(); ++i) {
      const bool told = row_[i] < 0;
      if (texts_[i].finish != Finish::running || int64_t(texts_[i].sampled.size()) + !told >= options_.max_tokens) continue;
      ids[i] = told ? texts_[i].tokens.back() : -1 - row_[i];
      chunks.push_back({texts_[i].sequence, std::span(ids).subspan(i, 1), Chunk::Logits::last});
      running.push_back(i);
      rows += double(cache_.length(texts_[i].sequence));
    }
    if (running.empty()) return settle();
    const Tensor logits = forward(chunks);
    const bool settled = settle();
    if (!logits.data) {
      // Texts that have ended meanwhile have left room for the others.
      if (!settled) finish_all(Finish::cache_full);
      return true;
    }
    const auto go_on = std::count_if(running.begin(), running.end(), [&](size_t i) { return texts_[i].finish == Finish::running; });
    figures_.decode_tokens += go_on;
    figures_.decode_bytes += model_.step_weight_bytes(int64_t(running.size())) + rows * double(cache_.bytes_per_token());
    if (go_on > 0) pick(running, logits);
    return true;
  }

  // Samples the next token of each of these texts from the rows of logits [texts, vocab].
  void pick(std::span<const size_t> which, const Tensor& device_logits) {
    if (which.empty() || (is_plain(options_.sampling) && pick_on_device(which, device_logits))) return;
    const Tensor logits = model_.to_host(device_logits);
    const auto vocab = size_t(model_.config().vocab_size);
    std::vector<Sampled> picked(which.size());
    model_.device().threads().parallel(int64_t(which.size()), [&](int64_t row, int) {
      const Generation& text = texts_[which[size_t(row)]];
      const std::span<const float> values(logits.f32() + row * logits.stride[0], vocab);
      picked[size_t(row)] = sample(values, text.tokens, options_.sampling, int64_t(text.tokens.size()));
    });
    for (size_t row = 0; row < which.size(); ++row) take(which[row], std::move(picked[row]));
  }

  // The same on the device; `settle` will be told the tokens.
  bool pick_on_device(std::span<const size_t> which, const Tensor& logits) {
    std::vector<double> at;
    for (const size_t i : which) at.push_back(random_uniform(options_.sampling.seed, texts_[i].tokens.size()));
    if (!model_.choose(logits, options_.sampling.temperature, at)) return false;
    chosen_ = which.size();
    for (size_t row = 0; row < which.size(); ++row)
      if (texts_[which[row]].finish == Finish::running) row_[which[row]] = int32_t(row);
    return true;
  }

  // Takes the tokens that the device has chosen; false if there are none.
  bool settle() {
    if (chosen_ == 0) return false;
    std::vector<int32_t> ids(std::exchange(chosen_, 0));
    model_.device().chosen(ids);
    for (size_t i = 0; i < texts_.size(); ++i) {
      if (row_[i] < 0) continue;
      const int32_t id = ids[size_t(std::exchange(row_[i], -1))];
      if (id < 0) fail("the model's logits are not finite; is the checkpoint damaged?");
      take(i, {id, 0, {}});
    }
    return true;
  }

  void take(size_t i, Sampled token) {
    Generation& text = texts_[i];
    const int32_t id = token.token;
    text.tokens.push_back(id);
    text.sampled.push_back(std::move(token));
    if (std::find(options_.end_tokens.begin(), options_.end_tokens.end(), id) != options_.end_tokens.end())
      return end(i, Finish::end_token);
    if (hooks_.spell && stops_.append(text.text, hooks_.spell(i, id))) return end(i, Finish::stop_string);
    if (int64_t(text.sampled.size()) >= options_.max_tokens) return end(i, Finish::length);
    send(i, stops_.settled(text.text));
  }

  // The last token does not stay in the cache, where a step that was issued meanwhile has put it.
  void end(size_t i, Finish why) {
    cache_.truncate(texts_[i].sequence, int64_t(texts_[i].tokens.size()) - 1);
    finish(i, why);
  }

  void finish(size_t i, Finish why) {
    Generation& text = texts_[i];
    // Bytes of a character that was never completed may still complete a stop string.
    if (hooks_.spell && why != Finish::stop_string && stops_.append(text.text, hooks_.spell(i, std::nullopt))) why = Finish::stop_string;
    text.finish = why;
    send(i, text.text.size());
    if (hooks_.on_finish) hooks_.on_finish(i);
  }

  void send(size_t i, size_t upto) {
    if (hooks_.on_text && upto > sent_[i]) hooks_.on_text(i, std::string_view(texts_[i].text).substr(sent_[i], upto - sent_[i]));
    sent_[i] = std::max(sent_[i], upto);
  }

  Model& model_;
  LatentCache& cache_;
  std::span<Generation> texts_;
  const GenerateOptions& options_;
  const GenerateHooks& hooks_;
  StopScan stops_;
  std::vector<size_t> sent_;  // bytes of each text that on_text has had
  std::vector<int32_t> row_;  // of each text among the tokens that the device has chosen; -1: none
  size_t chosen_ = 0;         // tokens that it has chosen and not told
  GenerateFigures figures_;
};

}  // namespace

std::string_view name(Finish finish) {
  switch (finish) {
    case Finish::running: return "running";
    case Finish::length: return "length";
    case Finish::end_token: return "end_token";
    case Finish::stop_string: return "stop_string";
    case Finish::cache_full: return "cache_full";
    case Finish::cancelled: return "cancelled";
  }
  return "?";
}

void GenerateFigures::add(const GenerateFigures& other) {
  prefill_tokens += other.prefill_tokens;
  decode_tokens += other.decode_tokens;
  prefill_seconds += other.prefill_seconds;
  decode_seconds += other.decode_seconds;
  decode_bytes += other.decode_bytes;
}

bool StopScan::append(std::string& text, std::string_view piece) const {
  size_t cut = std::string::npos;
  const size_t before = text.size();
  text += piece;
  for (const std::string& stop : stops_) {
    const size_t from = before - std::min(before, stop.size() - 1);
    cut = std::min(cut, text.find(stop, from));
  }
  if (cut == std::string::npos) return false;
  text.resize(cut);
  return true;
}

size_t StopScan::settled(std::string_view text) const {
  size_t held = 0;
  for (const std::string& stop : stops_)
    for (size_t n = std::min(stop.size() - 1, text.size()); n > held; --n)
      if (text.ends_with(std::string_view(stop).substr(0, n))) held = n;
  return text.size() - held;
}

GenerateFigures generate(Model& model, LatentCache& cache, std::span<Generation> texts, const GenerateOptions& options,
                         const GenerateHooks& hooks) {
  return Writer(model, cache, texts, options, hooks).run();
}

}  // namespace mla
