// Products that other threads compute while their caller goes on.
#include <omp.h>

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "cpu.h"
#include "gemm.h"

namespace {

// One thread, with those that help it; it takes jobs in the order in which they came.
class Background {
 public:
  // Returns the job's ticket.
  int64_t begin(int num_threads, std::function<void()> job) {
    std::lock_guard<std::mutex> hold(mutex_);
    if (num_begun_ == 0) std::thread([=] { run(num_threads); }).detach();
    jobs_.push_back(std::move(job));
    came_.notify_one();
    return ++num_begun_;
  }

  void wait(int64_t ticket) {
    std::unique_lock<std::mutex> hold(mutex_);
    ended_.wait(hold, [&] { return num_ended_ >= ticket; });
  }

 private:
  void run(int num_threads) {
#pragma omp parallel num_threads(num_threads)
    bind_thread(1 + omp_get_thread_num());
    std::unique_lock<std::mutex> hold(mutex_);
    for (;;) {
      came_.wait(hold, [&] { return !jobs_.empty(); });
      const std::function<void()> job = std::move(jobs_.front());
      jobs_.pop_front();
      hold.unlock();
      job();
      hold.lock();
      num_ended_++;
      ended_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable came_, ended_;
  std::deque<std::function<void()>> jobs_;
  int64_t num_begun_ = 0, num_ended_ = 0;
};

// Never destroyed: its thread waits for jobs until the process ends.
Background& background() {
  static Background* const only = new Background;
  return *only;
}

}  // namespace

// moray_mlp by threads that the caller does not wait for, the same number in every call; returns what moray_wait takes.
extern "C" int64_t moray_begin_mlp(const Weight* gate_up, const Weight* down, const float* x, int64_t x_stride, int num_rows,
                                   float* y, int num_threads) {
  return background().begin(num_threads, [=] { moray_mlp(gate_up, down, x, x_stride, num_rows, y, num_threads); });
}

extern "C" void moray_wait(int64_t ticket) { background().wait(ticket); }
