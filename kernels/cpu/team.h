// All threads of ATen's pool in one parallel region, with barriers between the phases of what they do together.
//
// Opening a region costs some microseconds, as much as a small product; a barrier a tenth of that.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include <ATen/Parallel.h>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace kbit {

class Team {
 public:
  explicit Team(int size) : size_(size) {}

  int size() const { return size_; }

  // Returns when all threads have called it.
  void wait() {
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < kSpins) {
        pause();
      } else {
        std::this_thread::yield();  // others may need this core, the one waited for among them
      }
    }
  }

 private:
  static constexpr int kSpins = 4096;

  static void pause() {
#ifdef __x86_64__
    _mm_pause();
#endif
  }

  const int size_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

// Part `index` of `count` parts of 0 .. total.
struct Share {
  int64_t begin, end;
  Share(int64_t total, int64_t index, int64_t count) : begin(total * index / count), end(total * (index + 1) / count) {}
};

// Calls work(team, index of the thread) on every thread. An exception in it ends the process: the others would wait for ever.
template <class Work>
void with_team(const Work& work) {
  const auto guarded = [&work](Team& team, int thread) noexcept { work(team, thread); };
#ifdef _OPENMP
  if (!at::in_parallel_region() && at::get_num_threads() > 1) {
    alignas(64) unsigned char memory[sizeof(Team)];
    Team* team = nullptr;
#pragma omp parallel num_threads(at::get_num_threads())
    {
#pragma omp single
      team = new (memory) Team(omp_get_num_threads());  // may be fewer than were asked for
      guarded(*team, omp_get_thread_num());
    }
    return;
  }
#endif
  Team alone(1);
  guarded(alone, 0);
}

}  // namespace kbit
