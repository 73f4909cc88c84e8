// The layout in which the CPU kernels read a packed weight: one buffer, tiles of 16 rows.
//
// A weight [N, K] is cut into row blocks of 16 rows. In a row block, 4 columns of the 16 rows are a quad: 64 codes, stored as
// `bits` words of 8 bytes, most significant bit first; bit 4 * row + column of a word belongs to the code of that row and
// column. So a word is an AVX-512 byte mask as it stands, and 8 codes lie in one byte of each word, ready for a transposition
// of 8 x 8 bits. Groups start at quads of their own, and what lies past N, K or a group's end is zero.
//
//   header, 64 bytes
//   levels uint8 [2 ** bits], of a codebook only, to the next multiple of 64 bytes
//   row block 0: scale float16 [groups][16], offset float16 [groups][16] (not when symmetric), words [quads][bits], padding
//   row block 1: ...
//   64 bytes that loads of whole vectors may touch
//
// Or, where the header says `vectors`, the words are bit vectors along a row, for products that count bits (bit_vectors.h):
//   words uint32 [words of a row][bits][16], 32 columns of one bit of the codes each, from grid_bytes on, a multiple of 64
//
// Or, where it says `cascade`, the first k planes are the weight of k bits, with a grid of its own for every k (cascade.h):
//   row block: scale and offset of 1 bit, of 2 bits, ... of `bits`, words [bits][quads], padding
//
// A code stands for its level: for itself, or for what the codebook of the weight gives it. Levels are bytes either way, so a product
// of levels and activations is one of integers. At 1 bit two levels are a scale and an offset, and at 8 bits the 256 different bytes
// leave no choice: codebooks are of 2 to 7 bits.
//
// No include of torch or of the standard library's templates: files for other instruction sets than the machine's read this.
#pragma once

#include <cstdint>
#include <cstring>

namespace kbit {

inline constexpr int kTileRows = 16;
inline constexpr int kQuad = 4;
inline constexpr int64_t kCodesPerQuad = kTileRows * kQuad;
inline constexpr int64_t kWordColumns = 32;   // of a bit vector
inline constexpr int64_t kSegmentQuads = 32;  // 128 columns: at most so many share a scale of activations
inline constexpr int64_t kHeaderBytes = 64;
inline constexpr int64_t kTailBytes = 64;
inline constexpr uint32_t kMagic = 0x3154424b;  // "KBT1"

inline constexpr bool takes_codebook(int bits) { return bits >= 2 && bits <= 7; }

struct TiledHeader {
  uint32_t magic;
  uint8_t bits;       // 1..8
  uint8_t symmetric;  // 0 or 1
  uint8_t codebook;   // 0 or 1
  uint8_t vectors;    // 0 or 1
  float global_scale;
  uint8_t cascade;    // 0 or 1
  uint8_t limit;      // planes of a cascade that are read at most; 0 for all
  uint16_t padding;
  int64_t rows, columns, group_size;
};
static_assert(sizeof(TiledHeader) <= kHeaderBytes);

static inline int64_t ceil_div(int64_t value, int64_t divisor) { return value / divisor + (value % divisor != 0); }

// Where things lie: follows from what the header says.
struct TiledLayout {
  int bits = 1;
  bool symmetric = false, codebook = false, vectors = false, cascade = false;
  int level_bits = 1;  // of a level: `bits`, or 8 with a codebook
  int64_t rows = 0, columns = 0, group_size = 1;
  int64_t groups = 0, group_quads = 1, quads = 0, group_words = 1, words = 0;
  int64_t row_blocks = 0, grid_bytes = 0, words_begin = 0, block_bytes = 0;  // in a row block words begin at words_begin

  TiledLayout() = default;
  TiledLayout(int bits_, bool symmetric_, int64_t rows_, int64_t columns_, int64_t group_size_, bool codebook_ = false,
              bool vectors_ = false, bool cascade_ = false)
      : bits(bits_), symmetric(symmetric_), codebook(codebook_), vectors(vectors_), cascade(cascade_),
        level_bits(codebook_ ? 8 : bits_), rows(rows_), columns(columns_), group_size(group_size_) {
    groups = ceil_div(columns, group_size);
    group_quads = ceil_div(group_size, kQuad);
    group_words = ceil_div(group_size, kWordColumns);
    const int64_t last = columns - (groups - 1) * group_size;  // columns of the last group
    quads = groups ? (groups - 1) * group_quads + ceil_div(last, kQuad) : 0;
    words = groups ? (groups - 1) * group_words + ceil_div(last, kWordColumns) : 0;
    row_blocks = ceil_div(rows, kTileRows);
    grid_bytes = groups * kTileRows * 2 * (symmetric ? 1 : 2);
    if (vectors) grid_bytes = (grid_bytes + 63) / 64 * 64;
    const int64_t code_bytes = vectors ? words * kTileRows * 4 * bits : quads * 8 * bits;
    words_begin = grid_bytes * grids();
    block_bytes = (words_begin + code_bytes + 63) / 64 * 64;
  }

  int grids() const { return cascade ? bits : 1; }
  int64_t codebook_bytes() const { return codebook ? (bits == 7 ? 128 : 64) : 0; }
  int64_t nbytes() const { return kHeaderBytes + codebook_bytes() + row_blocks * block_bytes + kTailBytes; }
  int64_t quads_of(int64_t group) const {
    const int64_t left = quads - group * group_quads;
    return left < group_quads ? left : group_quads;
  }
};

// A packed weight as the kernels see it.
struct TiledWeight : TiledLayout {
  const uint8_t* data = nullptr;    // the first row block
  const uint8_t* levels = nullptr;  // of the codebook: 64 bytes, or 128 at 7 bits; null without one
  float global_scale = 1;
  int planes = 0;  // of a cascade: those that are read, at most `bits`

  const uint8_t* block(int64_t row_block) const { return data + row_block * block_bytes; }
};

// The activations of up to kActivationRows rows, quantized to 8 bits per segment: at most 128 columns of one group.
inline constexpr int kActivationRows = 16;

struct ActivationBlock {
  int rows;
  const int8_t* codes;          // [quads][rows][4], zero where the weight has padding
  const float* scale;           // [segments][rows]
  const int32_t* negative_sum;  // [segments][rows]: minus the sum of the codes
  const float* sum;             // [groups][rows]: the sum of scale * code
  const uint32_t* planes = nullptr;  // [words][rows][plane_count], their bits, where a weight is of bit vectors
  int plane_count = 0;
  const uint8_t* table = nullptr;  // partial sums to look up, where the instruction set has a use for them
};

// sums[row of x][16] = W[row block] @ x without the global scale, for the rows of `count` blocks, one after the other.
using DotKernel = void (*)(const TiledWeight& weight, int64_t row_block, const ActivationBlock* blocks, int64_t count,
                           float* sums);
// The levels of `quads` quads by a codebook, or their codes where `levels` is null: [quads][16 rows][4 columns].
using UnpackKernel = void (*)(const uint8_t* words, int bits, const uint8_t* levels, int64_t quads, uint8_t* out);

// Bytes of the table that `fill` makes of a block for weights of this layout; 0 where looking up is not faster.
using TableBytes = int64_t (*)(const TiledLayout& layout, int rows);
using FillTable = void (*)(const TiledLayout& layout, const ActivationBlock& block, uint8_t* table);

struct Isa {
  const char* name;
  DotKernel dot;
  DotKernel bit_dot;  // the same for weights of bit vectors
  UnpackKernel unpack;
  TableBytes table_bytes = nullptr;
  FillTable fill_table = nullptr;
};

}  // namespace kbit
