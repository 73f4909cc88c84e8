// Between two products of few rows memory would be idle: a thread that has finished its share of one already asks for the first
// lines of its share of the next.
#include "chain.h"

#include <algorithm>
#include <optional>

#include "team.h"

namespace kbit::inline KBIT_LEVEL {
namespace {

constexpr int64_t kAhead = 8192;  // bytes
constexpr int64_t kLine = 64;

// The phases of one step, with a barrier after each.
class Phases {
 public:
  Phases(const ChainStep& step, int threads) : step_(step) {
    if (const auto* problem = std::get_if<AttentionProblem>(&step)) attention_.emplace(*problem, threads);
  }

  int count() const { return attention_ ? 2 : 1; }

  void run(int phase, int thread, int threads) {
    if (attention_) {
      const Share share(phase == 0 ? attention_->tasks() : attention_->rows(), thread, threads);
      return phase == 0 ? attention_->compute(share.begin, share.end) : attention_->combine(share.begin, share.end);
    }
    if (const auto* problem = std::get_if<AppendProblem>(&step_)) {
      const Share share(problem->tasks(), thread, threads);
      return append(*problem, share.begin, share.end);
    }
    // Each thread quantizes the activations for itself: there are few, and it spares a barrier.
    const TiledProduct product(std::get<TiledProblem>(step_));
    const Share share(product.tasks(), thread, threads);
    product.compute(share.begin, share.end);
  }

  void prefetch(int thread, int threads) const {
    const auto* problem = std::get_if<TiledProblem>(&step_);
    if (!problem) return;
    const Share share(row_blocks_of(*problem), thread, threads);
    if (share.begin == share.end) return;
    const uint8_t* bytes = row_block_of(*problem, share.begin);
    const int64_t end = std::min(kAhead, (share.end - share.begin) * problem->weights.front().block_bytes);
    for (int64_t i = 0; i < end; i += kLine) __builtin_prefetch(bytes + i, 0, 2);
  }

 private:
  const ChainStep& step_;
  std::optional<Attention> attention_;
};

}  // namespace

void run_chain(const std::vector<ChainStep>& steps) {
  std::vector<Phases> phases;
  phases.reserve(steps.size());
  for (const ChainStep& step : steps) phases.emplace_back(step, at::get_num_threads());
  with_team([&](Team& team, int thread) {
    for (size_t i = 0; i < phases.size(); ++i) {
      for (int phase = 0; phase < phases[i].count(); ++phase) {
        phases[i].run(phase, thread, team.size());
        const bool last = phase + 1 == phases[i].count();
        if (last && i + 1 == phases.size()) return;
        if (last) phases[i + 1].prefetch(thread, team.size());
        team.wait();
      }
    }
  });
}

}  // namespace kbit::inline KBIT_LEVEL
