// One exception type for the whole library, and the macro that raises it with the offending values in the message.
#pragma once

#include <fmt/core.h>

#include <stdexcept>
#include <string>

namespace mla {

// What went wrong decides the program's exit code: bad input or usage is 2, work that failed is 1, Ctrl-C is 130.
enum class ErrorKind { input, failed, interrupted };

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

// Bad input: says what was wrong, with which value, and what to do.
template <class... Args>
[[noreturn]] void fail_input(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(ErrorKind::input, fmt::format(format, std::forward<Args>(args)...));
}

// The work failed although the input was fine (disk full, out of memory, internal shape error).
template <class... Args>
[[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(ErrorKind::failed, fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace mla

// Checks a precondition inside the program (shapes, states). Input from outside is checked with fail_input and a sentence.
#define CHECK(condition, ...)                                                        \
  do {                                                                               \
    if (!(condition)) ::mla::fail("{}: {}", #condition, ::fmt::format(__VA_ARGS__)); \
  } while (false)
