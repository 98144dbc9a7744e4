// The PCRE2 side of Regex: translation from Oniguruma's dialect, compilation with JIT, and matching under limits.
#include "text/regex.h"

#include "core/check.h"
#include "text/unicode.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <cctype>

namespace mla {

namespace {

constexpr size_t kLongestPattern = 64 << 10;
// A search looks for a match from this many positions on before the clock is asked again.
constexpr size_t kStartsPerSearch = 64;

// What \w is to Oniguruma, as a part of a class; it counts the raised digits and fractions of Latin-1 in.
constexpr const char* kWord = R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{B2}\x{B3}\x{B9}\x{BC}-\x{BE})";

template <class T, void (*Free)(T*)>
struct Freed {
  void operator()(T* p) const { Free(p); }
};
template <class T, void (*Free)(T*)>
using Handle = std::unique_ptr<T, Freed<T, Free>>;

// What PCRE2 writes into while it matches; one a thread.
struct MatchMemory {
  Handle<pcre2_match_data, pcre2_match_data_free> data{pcre2_match_data_create(1, nullptr)};
  Handle<pcre2_match_context, pcre2_match_context_free> context{pcre2_match_context_create(nullptr)};
  Handle<pcre2_jit_stack, pcre2_jit_stack_free> stack{pcre2_jit_stack_create(32 << 10, 16 << 20, nullptr)};

  MatchMemory() {
    if (!data || !context) fail("no memory for a pattern match");
    pcre2_jit_stack_assign(context.get(), nullptr, stack.get());
    pcre2_set_heap_limit(context.get(), 64 << 10);  // KiB
  }
};

std::string message_of(int code) {
  std::array<PCRE2_UCHAR, 256> text{};
  pcre2_get_error_message(code, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

// Rewrites what Oniguruma spells or means differently, and refuses what PCRE2 would take for something else.
class Translator {
 public:
  explicit Translator(std::string_view pattern) : in_(pattern) {}

  std::string run() {
    while (at_ < in_.size()) {
      const char c = in_[at_];
      if (c == '\\') {
        escape();
      } else if (depth_ > 0) {
        in_class(c);
      } else {
        if (c == '[')
          open_class();
        else if (in_.substr(at_, 2) == "(*" || in_.substr(at_, 3) == "(?C")
          refuse("a control verb or callout");
        else
          copy(1);
      }
    }
    return std::move(out_);
  }

 private:
  [[noreturn]] void refuse(std::string_view what) const {
    fail_input("the pattern \"{}\" holds {} at byte {}, which is not supported in a pre-tokenizer", in_, what, at_);
  }
  void copy(size_t n) {
    out_ += in_.substr(at_, n);
    at_ += n;
  }
  void put(std::string_view text, size_t skip) {
    out_ += text;
    at_ += skip;
  }
  void open_class() {
    depth_ = 1;
    copy(1);
    if (at_ < in_.size() && in_[at_] == '^') copy(1);
    if (at_ < in_.size() && in_[at_] == ']') put("\\]", 1);
  }
  void in_class(char c) {
    if (c == ']') {
      depth_ = 0;
    } else if (in_.substr(at_, 2) == "[:") {
      const size_t end = in_.find(":]", at_);
      if (end == std::string_view::npos) refuse("an unfinished [:class:]");
      copy(end + 2 - at_);
      return;
    } else if (c == '[') {
      refuse("a class inside a class");
    } else if (in_.substr(at_, 2) == "&&") {
      refuse("an intersection of classes");
    }
    copy(1);
  }
  void escape() {
    if (at_ + 1 >= in_.size()) refuse("a backslash at its end");
    switch (in_[at_ + 1]) {
      case 's': put("\\p{White_Space}", 2); break;  // PCRE2's \s has U+180E too
      case 'S': put("\\P{White_Space}", 2); break;
      case 'u': unicode(); break;
      case 'w': put(depth_ > 0 ? kWord : fmt::format("[{}]", kWord), 2); break;
      case 'W':
        if (depth_ > 0) refuse("\\W in a class");
        put(fmt::format("[^{}]", kWord), 2);
        break;
      case 'b':
      case 'B':
      case 'h':
      case 'H':
      case 'K':
      case 'C':
      case 'Q':
      case 'E':
      case 'R':
      case 'X':
      case 'g': refuse(fmt::format("\\{}", in_[at_ + 1])); break;
      default: copy(2);
    }
  }
  void unicode() {
    const std::string_view digits = in_.substr(std::min(at_ + 2, in_.size()), 4);
    if (digits.size() < 4 || !std::all_of(digits.begin(), digits.end(), [](unsigned char d) { return std::isxdigit(d); }))
      refuse("\\u without four hexadecimal digits");
    put(fmt::format("\\x{{{}}}", digits), 6);
  }

  std::string_view in_;
  size_t at_ = 0;
  int depth_ = 0;
  std::string out_;
};

}  // namespace

MatchBudget::MatchBudget(size_t text_bytes)
    : deadline_(std::chrono::steady_clock::now() + std::chrono::seconds(5) + std::chrono::microseconds(5) * text_bytes) {}

bool MatchBudget::spent() { return std::chrono::steady_clock::now() > deadline_; }

bool MatchBudget::spent_now_and_then() { return ++calls_ % 64 == 0 && spent(); }

Regex::Regex(std::string_view pattern) : Regex(pattern, Translator(pattern).run(), PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C) {}

Regex Regex::literal(std::string_view text) { return Regex(text, std::string(text), PCRE2_LITERAL); }

Regex::Regex(std::string_view pattern, std::string source, unsigned options) : pattern_(pattern) {
  if (source.size() > kLongestPattern)
    fail_input("a pattern of {} bytes is longer than the {} a pre-tokenizer may have", source.size(), kLongestPattern);
  if (valid_prefix(source) != source.size()) fail_input("a pre-tokenizer's pattern is not valid UTF-8");
  Handle<pcre2_compile_context, pcre2_compile_context_free> context(pcre2_compile_context_create(nullptr));
  if (!context) fail("no memory to compile a pattern");
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  int error = 0;
  size_t offset = 0;
  pcre2_code* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(source.data()), source.size(), PCRE2_UTF | PCRE2_USE_OFFSET_LIMIT | options,
                                   &error, &offset, context.get());
  if (!code) fail_input("the pattern \"{}\" does not compile: {} (at byte {})", pattern_, message_of(error), offset);
  code_ = std::shared_ptr<void>(code, [](void* p) { pcre2_code_free(static_cast<pcre2_code*>(p)); });
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);  // without JIT pcre2_match interprets: slower, same result
}

void Regex::split(std::string_view text, MatchBudget& budget, const Sink& sink) const {
  for (size_t i = 0; i < text.size();) {
    const size_t valid = valid_prefix(text.substr(i));
    if (valid > 0) split_valid(text.substr(i, valid), i, budget, sink);
    i += valid;
    const size_t broken = invalid_prefix(text.substr(i));
    if (broken > 0) sink(i, i + broken, false);
    i += broken;
  }
}

void Regex::split_valid(std::string_view text, size_t offset, MatchBudget& budget, const Sink& sink) const {
  thread_local MatchMemory memory;
  // An honest pattern backtracks a few times over the text; one that needs more at a single position is refused.
  pcre2_set_match_limit(memory.context.get(), uint32_t(std::min<size_t>(100'000 + 16 * text.size(), 1u << 31)));
  const size_t none = std::string_view::npos;
  size_t done = 0, from = 0, last_end = none;  // [0, done) is handed out; the search goes on at from
  const auto too_long = [&] { fail_input("the pattern \"{}\" takes too long on this text; it is not fit for a pre-tokenizer", pattern_); };
  while (from <= text.size()) {
    if (budget.spent_now_and_then()) too_long();
    pcre2_set_offset_limit(memory.context.get(), from + kStartsPerSearch);
    const int found = pcre2_match(static_cast<pcre2_code*>(code_.get()), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                                  PCRE2_NO_UTF_CHECK, memory.data.get(), memory.context.get());
    if (found == PCRE2_ERROR_NOMATCH) {
      if (budget.spent()) too_long();
      from += kStartsPerSearch + 1;
      while (from < text.size() && (text[from] & 0xC0) == 0x80) from++;
      continue;
    }
    if (found < 0) fail_input("the pattern \"{}\" failed on this text: {}", pattern_, message_of(found));
    const size_t* span = pcre2_get_ovector_pointer(memory.data.get());
    const size_t begin = span[0], end = span[1];
    if (begin == end && end == last_end) {  // no empty match right behind another match
      from = end < text.size() ? end + utf8_length(text.substr(end, 4)) : end + 1;
      continue;
    }
    if (begin > done) sink(offset + done, offset + begin, false);
    sink(offset + begin, offset + end, true);
    done = from = last_end = end;
  }
  if (done < text.size()) sink(offset + done, offset + text.size(), false);
}

}  // namespace mla
