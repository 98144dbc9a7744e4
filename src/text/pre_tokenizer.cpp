// Runs the steps: each handles its piece and passes the results to the steps behind it.
#include "text/pre_tokenizer.h"

#include "text/unicode.h"

#include <algorithm>
#include <vector>

namespace mla {

namespace {

struct Span {
  size_t begin, end;
  bool matched;
};

// The spans after matches are joined with their neighbours as the behaviour asks.
std::vector<Span> join(const std::vector<Span>& spans, Behaviour behaviour) {
  std::vector<Span> out;
  bool previous = false;
  const auto forward = [&](const Span& span) {
    const bool merge = behaviour == Behaviour::contiguous ? !out.empty() && span.matched == previous : span.matched && !previous;
    previous = span.matched;
    if (merge && !out.empty())
      out.back().end = span.end;
    else
      out.push_back(span);
  };
  const auto backward = [&](const Span& span) {
    const bool merge = span.matched && !previous;
    previous = span.matched;
    if (merge && !out.empty())
      out.back().begin = span.begin;
    else
      out.push_back(span);
  };
  if (behaviour == Behaviour::merged_with_next) {
    std::for_each(spans.rbegin(), spans.rend(), backward);
    std::reverse(out.begin(), out.end());
  } else {
    std::for_each(spans.begin(), spans.end(), forward);
  }
  return out;
}

class Runner {
 public:
  Runner(std::span<const Step> steps, MatchBudget& budget, const std::function<void(Piece)>& sink)
      : steps_(steps), budget_(budget), sink_(sink) {}

  void run(size_t index, Piece piece) {
    if (piece.text.empty()) return;
    if (index == steps_.size()) return sink_(piece);
    std::visit([&](const auto& step) { apply(step, index + 1, piece); }, steps_[index]);
  }

 private:
  void apply(const ComposeStep&, size_t next, Piece piece) {
    const bool ascii = std::all_of(piece.text.begin(), piece.text.end(), [](char c) { return (c & 0x80) == 0; });
    if (ascii) return run(next, piece);
    const std::string composed = nfc(piece.text);
    run(next, {composed, piece.first});
  }

  void apply(const ReplaceStep& step, size_t next, Piece piece) {
    std::string out;
    out.reserve(piece.text.size() + piece.text.size() / 2);
    step.from.split(piece.text, budget_, [&](size_t begin, size_t end, bool matched) {
      out += matched ? std::string_view(step.to) : piece.text.substr(begin, end - begin);
    });
    run(next, {out, piece.first});
  }

  void apply(const PrefixStep& step, size_t next, Piece piece) {
    if ((step.first_only && !piece.first) || (step.unless_there && piece.text.starts_with(step.text))) return run(next, piece);
    std::string out;
    out.reserve(step.text.size() + piece.text.size());
    out.append(step.text).append(piece.text);
    run(next, {out, piece.first});
  }

  void apply(const SplitStep& step, size_t next, Piece piece) {
    const auto pass = [&](size_t begin, size_t end) { run(next, {piece.text.substr(begin, end - begin), piece.first && begin == 0}); };
    if (step.behaviour == Behaviour::isolated || step.behaviour == Behaviour::removed) {
      const bool remove = step.behaviour == Behaviour::removed;
      step.pattern.split(piece.text, budget_, [&](size_t begin, size_t end, bool matched) {
        if (!remove || matched == step.invert) pass(begin, end);
      });
      return;
    }
    std::vector<Span> spans;
    step.pattern.split(piece.text, budget_, [&](size_t begin, size_t end, bool matched) {
      spans.push_back({begin, end, matched != step.invert});
    });
    for (const Span& span : join(spans, step.behaviour)) pass(span.begin, span.end);
  }

  std::span<const Step> steps_;
  MatchBudget& budget_;
  const std::function<void(Piece)>& sink_;
};

}  // namespace

void run_steps(std::span<const Step> steps, Piece piece, MatchBudget& budget, const std::function<void(Piece)>& sink) {
  Runner(steps, budget, sink).run(0, piece);
}

}  // namespace mla
