#include "threads.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

// How long an idle worker polls before it sleeps. Waking one takes 50 us, and the operators of a decode step follow each
// other within 20 us.
constexpr auto kPolling = std::chrono::microseconds(100);
// Polls between two offers of the core to other threads.
constexpr int kPolls = 64;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Polls until is_ready() or the deadline. Other threads may have the core meanwhile.
template <class IsReady>
bool poll(const IsReady& is_ready, Clock::time_point deadline) {
  while (true) {
    for (int i = 0; i < kPolls; ++i) {
      if (is_ready()) return true;
      pause();
    }
    if (Clock::now() > deadline) return false;
    sched_yield();
  }
}

// Restores the floating-point mode of the calling thread at the end, which is that of the workers meanwhile.
//
// MindSpore's threads read subnormal numbers as 0, which small float16 weights become on their way to float32. A result
// would depend on the thread that took its task.
class DefaultFloatMode {
 public:
  DefaultFloatMode() {
    std::fegetenv(&mode_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatMode() { std::fesetenv(&mode_); }

 private:
  std::fenv_t mode_;
};

// Written at the start of every thread that runs tasks: glibc takes the memory of this library's variables of a thread when the
// first one is used, and ends the process if there is none.
thread_local volatile bool has_variables = false;

class Pool {
 public:
  void resize(int count) {
    std::lock_guard<std::mutex> one_job(job_mutex_);
    is_stopping_ = true;
    announce();
    for (auto& worker : workers_) worker.join();
    workers_.clear();
    num_started_ = 0;
    is_stopping_ = false;
    count_ = std::max(count, 1);
  }

  int count() const { return count_; }

  void run(int64_t count, const std::function<void(int64_t)>& task) {
    std::lock_guard<std::mutex> one_job(job_mutex_);
    // workers inherit it when they start
    const DefaultFloatMode mode;
    has_variables = true;
    if (count > 1) start();
    if (workers_.empty() || count <= 1) {
      for (int64_t i = 0; i < count; ++i) task(i);
      return;
    }
    task_ = &task;
    count_of_job_ = count;
    num_done_ = 0;
    num_open_.store(static_cast<uint64_t>(job_ + 1) << 32 | static_cast<uint64_t>(count));
    announce();
    take();
    // all tasks are taken; a worker that has not even woken is not waited for
    poll([&] { return num_done_.load(std::memory_order_acquire) == count; }, Clock::time_point::max());
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  // Starts the missing workers, and waits for them; with as many as the process may have if that is fewer.
  void start() {
    try {
      while (static_cast<int>(workers_.size()) + 1 < count_)
        workers_.emplace_back([this, job = job_.load()] { work(job); });
    } catch (const std::system_error&) {
      count_ = static_cast<int>(workers_.size()) + 1;
    }
    poll([&] { return num_started_ == workers_.size(); }, Clock::time_point::max());
  }

  // Tells the workers of a new job.
  void announce() {
    ++job_;
    if (num_sleeping_ > 0) syscall(SYS_futex, &job_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
  }

  // Runs tasks of the current job until all are taken.
  void take() {
    uint64_t open = num_open_.load(std::memory_order_acquire);
    while (open & UINT32_MAX) {
      // valid if the exchange succeeds: both change only after all tasks are taken, and then the job's number in `open` does
      const auto* task = task_.load(std::memory_order_relaxed);
      const int64_t index = count_of_job_.load(std::memory_order_relaxed) - static_cast<int64_t>(open & UINT32_MAX);
      if (!num_open_.compare_exchange_weak(open, open - 1, std::memory_order_acq_rel)) continue;
      try {
        (*task)(index);
      } catch (...) {
        // such as a lack of memory; `run` throws it when no worker uses the job any more
        std::lock_guard<std::mutex> one_error(error_mutex_);
        if (!error_) error_ = std::current_exception();
      }
      num_done_.fetch_add(1, std::memory_order_release);
      open = num_open_.load(std::memory_order_acquire);
    }
  }

  // Runs the jobs after `seen`.
  void work(uint32_t seen) {
    has_variables = true;
    ++num_started_;
    while (true) {
      if (!poll([&] { return job_ != seen; }, Clock::now() + kPolling)) {
        ++num_sleeping_;
        while (job_ == seen) syscall(SYS_futex, &job_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
        --num_sleeping_;
      }
      if (is_stopping_) return;
      seen = job_;
      take();
    }
  }

  std::mutex job_mutex_, error_mutex_;
  std::vector<std::thread> workers_;
  int count_ = 1;
  std::atomic<bool> is_stopping_{false};
  std::atomic<uint32_t> job_{0};  // number of the newest job, on which workers sleep
  std::atomic<int> num_sleeping_{0};
  std::atomic<size_t> num_started_{0};
  // The newest job. Its tasks that are not taken are the lower half of num_open_, its number the upper half.
  std::atomic<const std::function<void(int64_t)>*> task_{nullptr};
  std::atomic<int64_t> count_of_job_{0}, num_done_{0};
  std::atomic<uint64_t> num_open_{0};
  std::exception_ptr error_;  // the first one of the newest job
};

// Never destroyed: threads of the framework may outlive static objects.
Pool* the_pool = new Pool;

// A forked child has no workers, and locks that other threads held stay locked in it.
void replace_pool() {
  const int count = the_pool->count();
  the_pool = new Pool;
  the_pool->resize(count);
}

const int is_registered = pthread_atfork(nullptr, nullptr, replace_pool);

}  // namespace

void set_num_threads(int count) { the_pool->resize(count); }
int num_threads() { return the_pool->count(); }
void run_parallel(int64_t count, const std::function<void(int64_t)>& task) { the_pool->run(count, task); }
