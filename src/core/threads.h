// A pool of threads for parallel loops. Workers stay awake for a while between loops, since a decode step has hundreds of short ones.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace mla {

class Threads {
 public:
  // The pool counts the caller: `count` = 1 starts no thread. 0 takes the processors this process may run on.
  explicit Threads(int count = 0);
  ~Threads();
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  int count() const;

  // Calls task(i, thread) for i in [0, n), each once, in unspecified order, and returns when all are done. `thread` is in
  // [0, count()) and names the worker, for its scratch. An exception in a task is raised again here. Not reentrant.
  template <class Task>
  void parallel(int64_t n, Task&& task) {
    using Plain = std::remove_reference_t<Task>;
    run(
        n, [](void* context, int64_t i, int thread) { (*static_cast<Plain*>(context))(i, thread); }, &task);
  }

 private:
  using Call = void (*)(void* context, int64_t i, int thread);
  void run(int64_t n, Call call, void* context);

  struct State;
  std::unique_ptr<State> state_;
};

int available_processors();

}  // namespace mla
