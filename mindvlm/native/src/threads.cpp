#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace {

// Workers sleep between jobs: the framework's own threads need the cores then.
class Pool {
 public:
  void resize(int count) {
    std::lock_guard<std::mutex> one_job(job_mutex_);
    stop();
    count_ = std::max(count, 1);
  }

  int count() const { return count_; }

  void run(int64_t count, const std::function<void(int64_t)>& task) {
    std::lock_guard<std::mutex> one_job(job_mutex_);
    if (count > 1) start();
    if (workers_.empty() || count <= 1) {
      for (int64_t i = 0; i < count; ++i) task(i);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = &task;
      last_ = count;
      next_ = 0;
      num_busy_ = static_cast<int>(workers_.size());
      ++job_;
    }
    wake_.notify_all();
    take(task, count);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return num_busy_ == 0; });
  }

  ~Pool() { stop(); }

 private:
  void take(const std::function<void(int64_t)>& task, int64_t count) {
    for (int64_t i = next_++; i < count; i = next_++) task(i);
  }

  // Starts the missing workers; with as many as the process may have if that is fewer.
  void start() {
    try {
      while (static_cast<int>(workers_.size()) + 1 < count_) workers_.emplace_back([this, job = job_] { work(job); });
    } catch (const std::system_error&) {
      count_ = static_cast<int>(workers_.size()) + 1;
    }
  }

  // Runs the jobs after `seen`.
  void work(uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] { return is_stopping_ || job_ != seen; });
      if (is_stopping_) return;
      seen = job_;
      const auto* task = task_;
      const int64_t count = last_;
      lock.unlock();
      take(*task, count);
      lock.lock();
      if (--num_busy_ == 0) done_.notify_one();
    }
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      is_stopping_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
    workers_.clear();
    is_stopping_ = false;
  }

  std::mutex job_mutex_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  const std::function<void(int64_t)>* task_ = nullptr;
  std::atomic<int64_t> next_{0};
  int64_t last_ = 0;
  uint64_t job_ = 0;
  int num_busy_ = 0, count_ = 1;
  bool is_stopping_ = false;
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
