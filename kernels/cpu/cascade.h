// Row blocks of a cascade: weights of which the first k planes are the weight of k bits.
//
// The planes of a row block lie one after the other, so reading k of them touches nothing of those behind. Before a row block is
// used, its first planes are put together in memory that stays in a cache, in the layout of tiled.h: from there on it is a weight of
// k bits like any other, to every kernel. Nested bit planes: Park et al., "Any-Precision LLM" (2024).
#pragma once

#include <cstring>
#include <vector>

#include "tiled.h"

namespace kbit {
namespace {  // compiled for several instruction sets: nothing of it may be shared between them

// out[quad][Bits] = planes[Bits][quad], in words; `plane` words from one plane to the next, `ahead` to where is read after this.
template <int Bits>
void interleave(const uint64_t* __restrict planes, int64_t plane, int64_t ahead, int64_t quads, uint64_t* __restrict out) {
  constexpr int64_t kLine = 8;  // words
  for (int64_t first = 0; first < quads; first += kLine) {
    for (int p = 0; p < Bits; ++p) __builtin_prefetch(planes + p * plane + first + ahead, 0, 2);
    const int64_t end = first + kLine < quads ? first + kLine : quads;
    for (int64_t quad = first; quad < end; ++quad) {
#pragma GCC unroll 8
      for (int p = 0; p < Bits; ++p) out[quad * Bits + p] = planes[p * plane + quad];
    }
  }
}

template <int Bits = 8>
void interleave(int bits, const uint64_t* planes, int64_t plane, int64_t ahead, int64_t quads, uint64_t* out) {
  if constexpr (Bits > 0) {
    if (bits == Bits) return interleave<Bits>(planes, plane, ahead, quads, out);
    interleave<Bits - 1>(bits, planes, plane, ahead, quads, out);
  }
}

// One row block of a cascade at a time, as a weight of as many bits as planes are read.
class CascadeBlock {
 public:
  // Block 0 of the result is block `row_block` of `weight`. It is good until the next call.
  const TiledWeight& of(const TiledWeight& weight, int64_t row_block) {
    if (weight_.bits != weight.planes || weight_.columns != weight.columns || weight_.group_size != weight.group_size ||
        weight_.symmetric != weight.symmetric || !weight_.data) {
      prepare(weight);
    }
    const uint8_t* block = weight.block(row_block);
    std::memcpy(bytes_.data() + skipped_, block + (weight.planes - 1) * weight.grid_bytes, weight.grid_bytes);
    const int64_t ahead = row_block + 1 < weight.row_blocks ? weight.block_bytes / 8 : 0;
    interleave(weight.planes, reinterpret_cast<const uint64_t*>(block + weight.words_begin), weight.quads, ahead, weight.quads,
               reinterpret_cast<uint64_t*>(bytes_.data() + skipped_ + weight.grid_bytes));
    return weight_;
  }

 private:
  void prepare(const TiledWeight& weight) {
    static_cast<TiledLayout&>(weight_) =
        TiledLayout(weight.planes, weight.symmetric, kTileRows, weight.columns, weight.group_size);
    bytes_.assign(weight_.block_bytes + kTailBytes + 63, 0);
    skipped_ = (64 - reinterpret_cast<uintptr_t>(bytes_.data()) % 64) % 64;
    weight_.data = bytes_.data() + skipped_;
  }

  TiledWeight weight_;
  std::vector<uint8_t> bytes_;
  int64_t skipped_ = 0;
};

}  // namespace
}  // namespace kbit
