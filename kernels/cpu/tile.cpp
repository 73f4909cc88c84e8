// Between codes and tiles.
#include <algorithm>
#include <cstring>

#include <ATen/Parallel.h>

#include "bit_vectors.h"
#include "cascade.h"
#include "isa.h"
#include "tiled_linear.h"

namespace kbit {
namespace {

constexpr int64_t kGrain = 1 << 14;  // weights worth handing to another thread

// Calls f(first column, columns, quad) for all quads in order.
template <class F>
void for_quads(const TiledLayout& layout, F&& f) {
  int64_t quad = 0;
  for (int64_t group = 0; group < layout.groups; ++group) {
    const int64_t end = std::min((group + 1) * layout.group_size, layout.columns);
    for (int64_t c = group * layout.group_size; c < end; c += kQuad, ++quad) f(c, std::min<int64_t>(kQuad, end - c), quad);
  }
}

// Calls f(first column, columns, first word) for all groups, whose words are `group_words` apart.
template <class F>
void for_groups(const TiledLayout& layout, F&& f) {
  for (int64_t group = 0; group < layout.groups; ++group) {
    const int64_t first = group * layout.group_size;
    f(first, std::min(layout.group_size, layout.columns - first), group * layout.group_words);
  }
}

// Rows of a row block that exist.
int rows_in(const TiledLayout& layout, int64_t row_block) {
  return static_cast<int>(std::min<int64_t>(kTileRows, layout.rows - row_block * kTileRows));
}

template <class F>
void for_blocks(const TiledLayout& layout, F&& f) {
  const int64_t work = kTileRows * (layout.columns + 1);
  at::parallel_for(0, layout.row_blocks, kGrain / work + 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) f(block);
  });
}

// Spreads grids [rows][groups] to [groups][16], or gathers them back when `Back`.
template <bool Back, class Rows, class Tile>
void move_grids(const TiledLayout& layout, int rows, Rows* by_row, Tile* by_tile) {
  for (int row = 0; row < rows; ++row) {
    for (int64_t group = 0; group < layout.groups; ++group) {
      auto* tiled = by_tile + (group * kTileRows + row) * 2;
      if constexpr (Back) {
        std::memcpy(by_row + row * layout.groups + group, tiled, 2);
      } else {
        std::memcpy(tiled, by_row + row * layout.groups + group, 2);
      }
    }
  }
}

// 64 codes to `bits` words.
void pack_quad(const uint8_t* codes, int bits, uint8_t* words) {
  for (int i = 0; i < 8; ++i) {
    uint64_t eight = 0;  // code j in byte j on either byte order
    for (int j = 0; j < 8; ++j) eight |= static_cast<uint64_t>(codes[8 * i + j]) << (8 * j);
    for (int plane = 0; plane < bits; ++plane) {
      const uint64_t ones = (eight >> (bits - 1 - plane)) & 0x0101010101010101;
      // The product moves bit 8 j to bit 56 + j, and nothing else to the top byte.
      words[8 * plane + i] = static_cast<uint8_t>((ones * 0x0102040810204080) >> 56);
    }
  }
}

}  // namespace

void tile(const TiledLayout& layout, const uint8_t* codes, const uint16_t* scale, const uint16_t* offset, uint8_t* blocks) {
  for_blocks(layout, [&](int64_t row_block) {
    uint8_t* block = blocks + row_block * layout.block_bytes;
    const int64_t first = row_block * kTileRows;
    const int rows = rows_in(layout, row_block);
    std::memset(block, 0, layout.block_bytes);
    for (int grid = 0; grid < layout.grids(); ++grid) {
      const int64_t source = (grid * layout.rows + first) * layout.groups;
      uint8_t* target = block + grid * layout.grid_bytes;
      move_grids<false>(layout, rows, scale + source, target);
      if (offset) move_grids<false>(layout, rows, offset + source, target + layout.groups * kTileRows * 2);
    }
    uint8_t* words = block + layout.words_begin;
    if (layout.vectors) {
      return for_groups(layout, [&](int64_t column, int64_t count, int64_t word) {
        for (int row = 0; row < rows; ++row) {
          const uint8_t* source = codes + (first + row) * layout.columns + column;
          write_codes(source, count, layout.bits, row, words + word_offset(word, layout.bits, 0, 0));
        }
      });
    }
    for_quads(layout, [&](int64_t column, int64_t count, int64_t quad) {
      uint8_t quad_codes[kCodesPerQuad] = {};
      for (int row = 0; row < rows; ++row) {
        std::memcpy(quad_codes + row * kQuad, codes + (first + row) * layout.columns + column, count);
      }
      if (layout.cascade) {
        uint8_t planes[8 * 8];
        pack_quad(quad_codes, layout.bits, planes);
        for (int p = 0; p < layout.bits; ++p) std::memcpy(words + (p * layout.quads + quad) * 8, planes + 8 * p, 8);
      } else {
        pack_quad(quad_codes, layout.bits, words + quad * 8 * layout.bits);
      }
    });
  });
}

void untile(const TiledWeight& weight, uint8_t* codes, uint16_t* scale, uint16_t* offset) {
  for_blocks(weight, [&](int64_t row_block) {
    CascadeBlock cascade;
    const uint8_t* block = weight.cascade ? cascade.of(weight, row_block).data : weight.block(row_block);
    const int bits = weight.cascade ? weight.planes : weight.bits;
    const int64_t first = row_block * kTileRows;
    const int rows = rows_in(weight, row_block);
    move_grids<true>(weight, rows, scale + first * weight.groups, block);
    if (offset) move_grids<true>(weight, rows, offset + first * weight.groups, block + weight.groups * kTileRows * 2);
    const uint8_t* words = block + weight.grid_bytes;
    if (weight.vectors) {
      return for_groups(weight, [&](int64_t column, int64_t count, int64_t word) {
        for (int row = 0; row < rows; ++row) {
          uint8_t* out = codes + (first + row) * weight.columns + column;
          read_codes(words + word_offset(word, weight.bits, 0, 0), count, weight.bits, row, out);
        }
      });
    }
    for_quads(weight, [&](int64_t column, int64_t count, int64_t quad) {
      uint8_t quad_codes[kCodesPerQuad];
      isa().unpack(words + quad * 8 * bits, bits, nullptr, 1, quad_codes);
      for (int row = 0; row < rows; ++row) {
        std::memcpy(codes + (first + row) * weight.columns + column, quad_codes + row * kQuad, count);
      }
    });
  });
}

}  // namespace kbit
