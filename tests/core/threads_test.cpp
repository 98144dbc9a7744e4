// The pool: every index once, exceptions in the caller, thousands of short loops, more threads than processors.
#include "core/threads.h"

#include "core/check.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

namespace mla::test {
namespace {

const int counts[] = {1, 2, 3, 16};  // 16: more than the processors of a small machine

TEST(Threads, every_index_is_called_once_by_a_thread_of_the_pool) {
  for (int count : counts) {
    Threads threads(count);
    ASSERT_EQ(threads.count(), count);
    for (int64_t n : {0, 1, 2, 1000}) {
      std::vector<std::atomic<int>> calls(static_cast<size_t>(n));
      threads.parallel(n, [&](int64_t i, int thread) {
        if (thread < 0 || thread >= count) throw std::runtime_error("a thread from elsewhere");
        ++calls[size_t(i)];
      });
      for (auto& c : calls) ASSERT_EQ(c, 1);
    }
  }
}

TEST(Threads, two_tasks_never_share_a_thread_number_at_one_time) {
  Threads threads(8);
  std::vector<std::atomic<int>> inside(8);
  threads.parallel(2000, [&](int64_t, int thread) {
    if (inside[size_t(thread)]++ != 0) throw std::runtime_error("two tasks on one thread");
    --inside[size_t(thread)];
  });
}

TEST(Threads, many_short_loops_see_each_others_writes) {
  for (int count : {2, 8}) {
    Threads threads(count);
    std::vector<int64_t> values(64, 0);
    for (int round = 0; round < 2000; ++round)
      threads.parallel(64, [&](int64_t i, int) { values[size_t(i)] += values[size_t(i)] == round ? 1 : 1000000; });
    for (int64_t v : values) ASSERT_EQ(v, 2000);
  }
}

TEST(Threads, loops_after_a_pause_wake_the_sleepers) {
  Threads threads(4);
  for (int round = 0; round < 20; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));  // longer than they stay awake
    std::atomic<int> sum{0};
    threads.parallel(100, [&](int64_t i, int) { sum += int(i); });
    ASSERT_EQ(sum, 4950);
  }
}

TEST(Threads, an_exception_of_a_task_is_raised_in_the_caller_and_the_pool_goes_on) {
  for (int count : counts) {
    Threads threads(count);
    for (int round = 0; round < 20; ++round) {
      EXPECT_THROW(threads.parallel(100,
                                    [&](int64_t i, int) {
                                      if (i == 37) throw std::out_of_range("37");
                                    }),
                   std::out_of_range);
      std::atomic<int> calls{0};
      threads.parallel(100, [&](int64_t, int) { ++calls; });
      ASSERT_EQ(calls, 100);
    }
    EXPECT_THROW(threads.parallel(100, [](int64_t, int) { throw 1; }), int);
  }
}

TEST(Threads, counts_that_make_no_sense_are_errors) {
  EXPECT_THROW(Threads(-1), Error);
  EXPECT_THROW(Threads(5000), Error);
  EXPECT_GE(Threads(0).count(), 1);
}

}  // namespace
}  // namespace mla::test
