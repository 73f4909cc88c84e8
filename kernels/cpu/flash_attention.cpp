// Softmax goes along with a run over blocks of keys, so scores are never in memory as a whole: FlashAttention-2 (Dao, 2023).
//
// A task has as many queries as two vectors have lanes, and its scores are kept transposed, [keys][queries]. So keys and values are
// read as they lie, each number once for all queries, and softmax takes no sums over the lanes of a vector.
#include "flash_attention.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include <ATen/Parallel.h>

#include "activation.h"
#include "vector.h"

namespace kbit::inline KBIT_LEVEL {
namespace {

constexpr int kFloats = sizeof(Floats) / sizeof(float);
constexpr int kQueries = std::max(kFloats, 2 * kLanes);  // of a task
constexpr int kVectors = kQueries / kLanes, kParts = kQueries / kFloats;
constexpr int kRows = (kLanes == 16 ? 16 : 8) / kVectors;  // of a product whose sums are in registers
constexpr int64_t kKeys = 64;                              // of a block
constexpr int64_t kTiles = 4;                              // of a task
constexpr float kNothing = -std::numeric_limits<float>::infinity();

// Numbers of which element (r, i) lies at data[r * row + i * step].
struct Strided {
  const float* data;
  int64_t row, step;
};

// c [Rows][kQueries] = a [Rows][depth] @ b [depth][kQueries], or added to it.
template <int Rows>
void product(const Strided& a, const float* b, int64_t depth, float* c, bool add) {
  Vector total[Rows][kVectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < kVectors; ++v) total[r][v] = add ? load(c + r * kQueries + v * kLanes) : Vector{};
  }
  for (int64_t i = 0; i < depth; ++i) {
    Vector x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = load(b + i * kQueries + v * kLanes);
    for (int r = 0; r < Rows; ++r) {
      const float factor = a.data[r * a.row + i * a.step];
      for (int v = 0; v < kVectors; ++v) total[r][v] += factor * x[v];
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < kVectors; ++v) store(c + r * kQueries + v * kLanes, total[r][v]);
  }
}

// The same of any number of rows.
void multiply(Strided a, int64_t rows, const float* b, int64_t depth, float* c, bool add) {
  for (; rows >= kRows; rows -= kRows, a.data += kRows * a.row, c += kRows * kQueries) product<kRows>(a, b, depth, c, add);
  for (; rows > 0; --rows, a.data += a.row, c += kQueries) product<1>(a, b, depth, c, add);
}

struct alignas(64) Lanes {
  Floats part[kParts];
};

Lanes filled(float value) {
  Lanes lanes;
  for (Floats& part : lanes.part) part = Floats{} + value;
  return lanes;
}

// b[c][r] = a[r][c], by squares in registers: compilers would scatter.
void transpose(const float* a, int64_t a_stride, int64_t rows, int64_t columns, float* b, int64_t b_stride) {
  using Four = VectorOf<4>::type;
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4) {
      Four x[4];
      for (int i = 0; i < 4; ++i) std::memcpy(&x[i], a + (r + i) * a_stride + c, sizeof(Four));
      for (int j = 0; j < 4; ++j) {
        const Four y = {x[0][j], x[1][j], x[2][j], x[3][j]};
        std::memcpy(b + (c + j) * b_stride + r, &y, sizeof y);
      }
    }
    for (; c < columns; ++c) {
      for (int i = 0; i < 4; ++i) b[c * b_stride + r + i] = a[(r + i) * a_stride + c];
    }
  }
  for (; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) b[c * b_stride + r] = a[r * a_stride + c];
  }
}

using Scores = std::array<float, kKeys * kQueries>;  // [kKeys][kQueries]

// What is kept of kQueries queries while the keys go by.
class Tile {
 public:
  Tile(const AttentionProblem& problem, int64_t batch, int64_t head, int64_t first)
      : p_(problem), batch_(batch), head_(head), first_(first), count_(std::min<int64_t>(kQueries, problem.queries - first)),
        end_(problem.causal ? std::min(problem.length, first + count_) : problem.length),
        queries_(problem.size * kQueries), out_(problem.value_size * kQueries) {}

  int64_t count() const { return count_; }
  int64_t end() const { return end_; }  // of the keys that any of the queries looks at

  void read(const Strided& rows) {
    transpose(rows.data, rows.row, count_, p_.size, queries_.data(), kQueries);
    for (float& query : queries_) query *= p_.scale;
  }

  // Keys begin .. begin + count - 1 and their values, in rows.
  template <class T>
  void attend(int64_t begin, int64_t count, const Strided& keys, const Strided& values, Scores& scores) {
    multiply(keys, count, queries_.data(), p_.size, scores.data(), false);
    add_mask<T>(begin, count, scores);
    const Lanes factor = exponentials(count, scores);
    for (int64_t i = 0; i < p_.value_size; ++i) scale(out_.data() + i * kQueries, factor);
    multiply({values.data, 1, values.row}, p_.value_size, scores.data(), count, out_.data(), true);
  }

  template <class T>
  void write() {
    Lanes inverse;
    for (int part = 0; part < kParts; ++part) inverse.part[part] = sum_.part[part] == 0 ? Floats{} : 1 / sum_.part[part];
    for (int64_t i = 0; i < p_.value_size; ++i) scale(out_.data() + i * kQueries, inverse);
    T* out = static_cast<T*>(p_.out) + ((batch_ * p_.queries + first_) * p_.heads + head_) * p_.value_size;
    const int64_t stride = p_.heads * p_.value_size;
    if constexpr (std::is_same_v<T, float>) {
      transpose(out_.data(), kQueries, p_.value_size, count_, out, stride);
    } else {
      for (int64_t q = 0; q < count_; ++q) {
        for (int64_t i = 0; i < p_.value_size; ++i) out[q * stride + i] = static_cast<T>(out_[i * kQueries + q]);
      }
    }
  }

 private:
  template <class T>
  void add_mask(int64_t begin, int64_t count, Scores& scores) const {
    for (int64_t j = std::max<int64_t>(0, first_ + 1 - begin); p_.causal && j < count; ++j) {
      std::fill_n(scores.data() + j * kQueries, std::min<int64_t>(begin + j - first_, kQueries), kNothing);
    }
    if (p_.mask_type == MaskType::None) return;
    for (int64_t q = 0; q < count_; ++q) {
      const int64_t offset = batch_ * p_.mask_strides.batch + head_ * p_.mask_strides.head + (first_ + q) * p_.mask_strides.row +
                             begin * p_.mask_column;
      if (p_.mask_type == MaskType::Like) {
        const T* mask = static_cast<const T*>(p_.mask) + offset;
        for (int64_t j = 0; j < count; ++j) scores[j * kQueries + q] += static_cast<float>(mask[j * p_.mask_column]);
        continue;
      }
      const bool* mask = static_cast<const bool*>(p_.mask) + offset;
      if (p_.mask_column == 1 && !std::memchr(mask, 0, count)) continue;
      for (int64_t j = 0; j < count; ++j) {
        if (!mask[j * p_.mask_column]) scores[j * kQueries + q] = kNothing;
      }
    }
  }

  // Scores of `count` keys become exponentials less the largest score so far; returns what earlier sums are to be multiplied by.
  Lanes exponentials(int64_t count, Scores& scores) {
    Lanes factor;
    for (int part = 0; part < kParts; ++part) {
      Floats largest = largest_.part[part];
      for (int64_t j = 0; j < count; ++j) {
        const Floats score = read(scores, j, part);
        largest = score > largest ? score : largest;
      }
      const Floats base = largest == kNothing ? Floats{} : largest;
      factor.part[part] = largest_.part[part] == kNothing ? Floats{} : exp(largest_.part[part] - base);
      Floats sum = sum_.part[part] * factor.part[part];
      for (int64_t j = 0; j < count; ++j) {
        const Floats score = read(scores, j, part);
        const Floats power = score == kNothing ? Floats{} : exp(score - base);
        std::memcpy(scores.data() + j * kQueries + part * kFloats, &power, sizeof power);
        sum += power;
      }
      largest_.part[part] = largest, sum_.part[part] = sum;
    }
    return factor;
  }

  static Floats read(const Scores& scores, int64_t key, int part) {
    Floats score;
    std::memcpy(&score, scores.data() + key * kQueries + part * kFloats, sizeof score);
    return score;
  }

  static void scale(float* values, const Lanes& factor) {
    for (int part = 0; part < kParts; ++part) {
      Floats v;
      std::memcpy(&v, values + part * kFloats, sizeof v);
      v *= factor.part[part];
      std::memcpy(values + part * kFloats, &v, sizeof v);
    }
  }

  const AttentionProblem& p_;
  int64_t batch_, head_, first_, count_, end_;
  std::vector<float> queries_, out_;  // [D][kQueries], [Dv][kQueries]
  Lanes largest_ = filled(kNothing), sum_ = filled(0);
};

// Up to kTiles tiles of one head, which share what is read of keys and values.
template <class T>
class Task {
 public:
  Task(const AttentionProblem& problem, int64_t batch, int64_t head) : p_(problem), batch_(batch), head_(head) {}

  void compute(int64_t first) {
    std::vector<Tile> tiles;
    for (int64_t at = first; at < std::min(first + kTiles * kQueries, p_.queries); at += kQueries) {
      Tile& tile = tiles.emplace_back(p_, batch_, head_, at);
      tile.read(rows(p_.q, p_.q_strides, head_, at, tile.count(), p_.size, keys_));
    }
    const int64_t key_head = head_ / p_.group, end = tiles.back().end();
    for (int64_t begin = 0; begin < end; begin += kKeys) {
      const int64_t count = std::min(kKeys, end - begin);
      const Strided keys = rows(p_.k, p_.k_strides, key_head, begin, count, p_.size, keys_);
      const Strided values = rows(p_.v, p_.v_strides, key_head, begin, count, p_.value_size, values_);
      for (Tile& tile : tiles) {
        if (begin < tile.end()) tile.attend<T>(begin, std::min(count, tile.end() - begin), keys, values, scores_);
      }
    }
    for (Tile& tile : tiles) tile.write<T>();
  }

 private:
  // Rows as floats that lie one behind the other: themselves, or copied into `buffer`. Rows of a head that are a power of two apart
  // would share few lines of the cache.
  Strided rows(const void* data, const HeadStrides& strides, int64_t head, int64_t first, int64_t count, int64_t size,
               std::vector<float>& buffer) const {
    const T* source = static_cast<const T*>(data) + batch_ * strides.batch + head * strides.head + first * strides.row;
    if constexpr (std::is_same_v<T, float>) {
      if (strides.row == size) return {source, size, 1};
    }
    buffer.resize(std::max<int64_t>(kKeys, kQueries) * size);
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t i = 0; i < size; ++i) buffer[j * size + i] = static_cast<float>(source[j * strides.row + i]);
    }
    return {buffer.data(), size, 1};
  }

  const AttentionProblem& p_;
  int64_t batch_, head_;
  std::vector<float> keys_, values_;
  alignas(64) Scores scores_;
};

}  // namespace

void flash_attention(const AttentionProblem& problem) {
  constexpr int64_t kBlock = kTiles * kQueries;
  const int64_t blocks = (problem.queries + kBlock - 1) / kBlock;
  with_type(problem.dtype, [&](auto* type) {
    using T = std::decay_t<decltype(*type)>;
    at::parallel_for(0, problem.batch * problem.heads * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t pair = i / blocks;
        Task<T>(problem, pair / problem.heads, pair % problem.heads).compute(i % blocks * kBlock);
      }
    });
  });
}

}  // namespace kbit::inline KBIT_LEVEL
