// AVX-512 with VNNI, VBMI and GFNI (Ice Lake, Zen 4 and later): four instructions for 64 weights, at any number of bits.
//
// vpermb spreads the bytes of the words so that each 8-byte lane holds one byte of every word; vgf2p8affineqb transposes its
// 8 x 8 bits into 8 codes; vpdpbusd multiplies them with 4 activations. Each 4-byte lane is a row, so no sum crosses lanes. With a
// codebook, one more vpermb in between turns codes into levels.
#include "isa.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__GFNI__)

#include <immintrin.h>

#include "bit_vectors.h"
#include "dot_avx512.h"

namespace kbit {
namespace {

// How vpermb spreads the words of 1 to 8 bits, and the bytes that it fills.
struct Spread {
  alignas(64) uint8_t source[9][64] = {};
  uint64_t used[9] = {};

  constexpr Spread() {
    for (int bits = 1; bits <= 8; ++bits) {
      for (int lane = 0; lane < 8; ++lane) {
        for (int plane = 0; plane < bits; ++plane) {
          const int byte = lane * 8 + 8 - bits + plane;  // as a matrix, byte 7 of a lane gives bit 0 of the codes
          source[bits][byte] = static_cast<uint8_t>(plane * 8 + lane);
          used[bits] |= uint64_t{1} << byte;
        }
      }
    }
  }
};
constexpr Spread kSpread;

class Unpacker {
 public:
  explicit Unpacker(int bits) : source_(_mm512_load_si512(kSpread.source[bits])), used_(kSpread.used[bits]) {}

  // Loads of the words alone, where a vector holds more: they cross fewer cache lines.
  template <int Bytes>
  __m512i codes(const uint8_t* words) const {
    const __m512i matrix = _mm512_maskz_permutexvar_epi8(used_, source_, load<Bytes>(words));
    return _mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64(0x8040201008040201), matrix, 0);
  }

 private:
  template <int Bytes>
  static __m512i load(const uint8_t* words) {
    if constexpr (Bytes == 8) return _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(words)));
    if constexpr (Bytes == 16) return _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words)));
    if constexpr (Bytes == 32) return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)));
    return _mm512_loadu_si512(words);
  }

  __m512i source_;
  __mmask64 used_;
};

// What turns codes into levels: nothing, or a codebook of up to 64 levels, or one of 128.
struct Uniform {
  explicit Uniform(const uint8_t*) {}
  static int bits(const TiledWeight& weight) { return weight.bits; }
  __m512i of(__m512i codes) const { return codes; }
};

class Codebook {
 public:
  explicit Codebook(const uint8_t* levels) : levels_(_mm512_loadu_si512(levels)) {}
  static int bits(const TiledWeight&) { return 8; }
  __m512i of(__m512i codes) const { return _mm512_permutexvar_epi8(codes, levels_); }

 private:
  __m512i levels_;
};

class WideCodebook {
 public:
  explicit WideCodebook(const uint8_t* levels)
      : low_(_mm512_loadu_si512(levels)), high_(_mm512_loadu_si512(levels + 64)) {}
  static int bits(const TiledWeight&) { return 8; }
  __m512i of(__m512i codes) const { return _mm512_permutex2var_epi8(low_, codes, high_); }

 private:
  __m512i low_, high_;
};

// Far ahead into the L2 cache, where there is room for many lines on their way, and from there into L1.
constexpr int64_t kFar = 8192, kNear = 768;  // bytes

template <int Bytes>
inline void prefetch(const uint8_t* words) {
  for (int line = 0; line < Bytes; line += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(words) + kFar + line, _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(words) + kNear + line, _MM_HINT_T0);
  }
}

template <class Levels>
void unpack_levels(const uint8_t* words, int bits, const Levels& levels, int64_t quads, uint8_t* out) {
  const Unpacker unpacker(bits);
  for (int64_t quad = 0; quad < quads; ++quad, words += 8 * bits) {
    prefetch<64>(words);
    _mm512_storeu_si512(out + quad * kCodesPerQuad, levels.of(unpacker.codes<64>(words)));
  }
}

// totals += w . four activations. Compilers load the four by an instruction of its own, and copy or spill the totals; here the load
// is part of the product.
inline void multiply(__m512i& totals, __m512i w, const int8_t* q) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(totals) : "v"(w), "m"(*reinterpret_cast<const int(*)[1]>(q)));
}

inline int load_quad(const int8_t* codes) {
  int quad;
  std::memcpy(&quad, codes, 4);
  return quad;
}

struct Avx512Vnni {
  static void unpack(const uint8_t* words, int bits, const uint8_t* levels, int64_t quads, uint8_t* out) {
    if (levels) return unpack_codebook(words, bits, levels, quads, out);
    unpack_levels(words, bits, Uniform(levels), quads, out);
  }

  // Not inlined, so that uniform codes have the registers to themselves.
  [[gnu::noinline]] static void unpack_codebook(const uint8_t* words, int bits, const uint8_t* levels, int64_t quads,
                                                uint8_t* out) {
    if (bits < 7) return unpack_levels(words, bits, Codebook(levels), quads, out);
    unpack_levels(words, bits, WideCodebook(levels), quads, out);
  }

  template <int Rows>
  static void accumulate(const Segment& segment, const ActivationSegment& x, float* sums) {
    __m512i totals[Rows];
#pragma GCC unroll 16
    for (int b = 0; b < Rows; ++b) totals[b] = _mm512_setzero_si512();
    const int8_t* q = x.codes;
    for (int64_t quad = 0; quad < segment.quads; ++quad, q += Rows * kQuad) {
      const __m512i w = _mm512_load_si512(segment.levels + quad * kCodesPerQuad);
#pragma GCC unroll 16
      for (int b = 0; b < Rows; ++b) {
        multiply(totals[b], w, q + b * kQuad);
      }
    }
    add_totals(totals, segment.grid->scale, segment.grid->offset, x, sums);
  }
};

// The scales of 16 rows for one group, and what their levels' middle stands for.
struct Scales {
  __m512 scale, centre;

  Scales(const TiledWeight& weight, int level_bits, const uint8_t* block, int64_t group) {
    scale = read(block + group * 32);
    if (!weight.symmetric) {
      const __m512 middle = _mm512_set1_ps(static_cast<float>(1 << (level_bits - 1)));
      centre = _mm512_fmadd_ps(scale, middle, read(block + (weight.groups + group) * 32));
    } else {
      centre = _mm512_mul_ps(scale, _mm512_set1_ps(level_bits == 1 ? 0.5f : 0.0f));
    }
  }
  static __m512 read(const uint8_t* halves) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
  }
};

// The scales and offsets of a group lie in one line of a row block's grid, or in half a one: that many lines are asked for meanwhile.
inline void prefetch_grid(const uint8_t* block, int64_t group) {
  _mm_prefetch(reinterpret_cast<const char*>(block) + kFar + group * 64, _MM_HINT_T1);
}

constexpr int kFewRows = 4;

// Few rows of x: the levels go from the unpacking straight into the products, and the sums stay in registers.
template <class Levels, int Rows, int Bytes>
void dot_few(const TiledWeight& weight, const uint8_t* block, const ActivationBlock& x, float* sums) {
  constexpr int kChains = Rows == 1 ? 2 : 1;  // more than one, since a product waits for the one before it in its chain
  constexpr int kStep = Bytes < 32 ? 4 : 2;   // quads at once: about a line of words
  const Unpacker unpacker(weight.bits);
  const Levels levels(weight.levels);
  const __m128i shift = _mm_cvtsi32_si128(Levels::bits(weight) - 1);
  const int64_t bytes = 8 * weight.bits;
  const uint8_t* words = block + weight.grid_bytes;
  const int8_t* q = x.codes;
  __m512 total[Rows];
#pragma GCC unroll 4
  for (int b = 0; b < Rows; ++b) total[b] = _mm512_setzero_ps();
  int64_t segment = 0;
  for (int64_t group = 0; group < weight.groups; ++group) {
    prefetch_grid(block, group);
    const Scales grid(weight, Levels::bits(weight), block, group);
    for (int64_t left = weight.quads_of(group); left > 0; ++segment) {
      const int64_t quads = left < kSegmentQuads ? left : kSegmentQuads;
      left -= quads;
      __m512i part[kChains][Rows];
#pragma GCC unroll 4
      for (int b = 0; b < Rows; ++b) {
        part[0][b] = _mm512_sll_epi32(_mm512_set1_epi32(x.negative_sum[segment * Rows + b]), shift);
        if constexpr (kChains == 2) part[1][b] = _mm512_setzero_si512();
      }
      int64_t quad = 0;
      for (; quad + kStep <= quads; quad += kStep) {
        prefetch<kStep * Bytes>(words);
#pragma GCC unroll 4
        for (int i = 0; i < kStep; ++i) {
          const __m512i w = levels.of(unpacker.codes<Bytes>(words));
          words += bytes;
#pragma GCC unroll 4
          for (int b = 0; b < Rows; ++b) {
            multiply(part[i % kChains][b], w, q + b * kQuad);
          }
          q += Rows * kQuad;
        }
      }
      for (; quad < quads; ++quad) {
        const __m512i w = levels.of(unpacker.codes<Bytes>(words));
        words += bytes;
#pragma GCC unroll 4
        for (int b = 0; b < Rows; ++b) {
          multiply(part[0][b], w, q + b * kQuad);
        }
        q += Rows * kQuad;
      }
#pragma GCC unroll 4
      for (int b = 0; b < Rows; ++b) {
        if constexpr (kChains == 2) part[0][b] = _mm512_add_epi32(part[0][b], part[1][b]);
        const __m512 step_size = _mm512_mul_ps(grid.scale, _mm512_set1_ps(x.scale[segment * Rows + b]));
        total[b] = _mm512_fmadd_ps(step_size, _mm512_cvtepi32_ps(part[0][b]), total[b]);
      }
    }
#pragma GCC unroll 4
    for (int b = 0; b < Rows; ++b) {
      total[b] = _mm512_fmadd_ps(grid.centre, _mm512_set1_ps(x.sum[group * Rows + b]), total[b]);
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < Rows; ++b) _mm512_storeu_ps(sums + b * kTileRows, total[b]);
}

template <int Rows>
void dot_few_levels(const TiledWeight& weight, const uint8_t* block, const ActivationBlock& x, float* sums) {
  switch (weight.bits) {
    case 2: return dot_few<Codebook, Rows, 16>(weight, block, x, sums);
    case 3:
    case 4: return dot_few<Codebook, Rows, 32>(weight, block, x, sums);
    case 7: return dot_few<WideCodebook, Rows, 64>(weight, block, x, sums);
    default: return dot_few<Codebook, Rows, 64>(weight, block, x, sums);
  }
}

template <int Rows>
void dot_few(const TiledWeight& weight, const uint8_t* block, const ActivationBlock& x, float* sums) {
  if (weight.levels) return dot_few_levels<Rows>(weight, block, x, sums);
  switch (weight.bits) {
    case 1: return dot_few<Uniform, Rows, 8>(weight, block, x, sums);
    case 2: return dot_few<Uniform, Rows, 16>(weight, block, x, sums);
    case 3:
    case 4: return dot_few<Uniform, Rows, 32>(weight, block, x, sums);
    default: return dot_few<Uniform, Rows, 64>(weight, block, x, sums);
  }
}

// More rows of x, still one block of them: unpacking hides behind the products, which leave no registers for the sums.
template <class Levels, int Rows>
void dot_block(const TiledWeight& weight, const uint8_t* block, const ActivationBlock& x, float* sums) {
  const Unpacker unpacker(weight.bits);
  const Levels levels(weight.levels);
  const __m128i shift = _mm_cvtsi32_si128(Levels::bits(weight) - 1);
  const int64_t bytes = 8 * weight.bits;
  const uint8_t* words = block + weight.grid_bytes;
  ActivationSegment part{x.codes, x.scale, x.negative_sum, nullptr};
  std::memset(sums, 0, Rows * kTileRows * sizeof(float));
  for (int64_t group = 0; group < weight.groups; ++group) {
    prefetch_grid(block, group);
    const Grid grid(weight, block, group);
    part.sum = x.sum + group * Rows;
    for (int64_t left = weight.quads_of(group); left > 0; left -= kSegmentQuads) {
      const int64_t quads = left < kSegmentQuads ? left : kSegmentQuads;
      __m512i totals[Rows];
#pragma GCC unroll 16
      for (int b = 0; b < Rows; ++b) totals[b] = _mm512_sll_epi32(_mm512_set1_epi32(part.negative_sum[b]), shift);
      for (int64_t quad = 0; quad < quads; ++quad, words += bytes, part.codes += Rows * kQuad) {
        prefetch<64>(words);
        const __m512i w = levels.of(unpacker.codes<64>(words));
#pragma GCC unroll 16
        for (int b = 0; b < Rows; ++b) multiply(totals[b], w, part.codes + b * kQuad);
      }
      add_totals(totals, grid.scale, grid.centre, part, sums);
      part.scale += Rows, part.negative_sum += Rows, part.sum = nullptr;
    }
  }
}

template <class Levels, int Rows = kActivationRows>
void dot_block_rows(const TiledWeight& weight, const uint8_t* block, const ActivationBlock& x, float* sums) {
  if constexpr (Rows > kFewRows) {
    if (x.rows == Rows) return dot_block<Levels, Rows>(weight, block, x, sums);
    dot_block_rows<Levels, Rows - 1>(weight, block, x, sums);
  }
}

void dot_block(const TiledWeight& weight, const uint8_t* block, const ActivationBlock& x, float* sums) {
  if (!weight.levels) return dot_block_rows<Uniform>(weight, block, x, sums);
  if (weight.bits < 7) return dot_block_rows<Codebook>(weight, block, x, sums);
  dot_block_rows<WideCodebook>(weight, block, x, sums);
}

// One bit, one row of x: partial sums of 4 activations are looked up by 4 weights, after T-MAC (Wei et al., 2024): 7 instructions for
// 256 weights where dot_few takes 12. At two bits it would take 14, so only one bit does this.
//
// The 16 sums of each of 4 quads are a table of 64 entries, of low bytes and of high bytes, for vpermb. The sum of the 4 looked up for
// a row is a vpdpbusd with ones.
constexpr int kLookup = 4;  // quads looked up at once
constexpr int64_t kTable = 2 * 64;  // their bytes

int64_t table_bytes(const TiledLayout& layout, int rows) {
  const bool fits = layout.bits == 1 && rows == 1 && layout.group_quads % kLookup == 0 && layout.quads % kLookup == 0;
  return fits ? layout.quads / kLookup * kTable : 0;
}

void fill_table(const TiledLayout& layout, const ActivationBlock& x, uint8_t* table) {
  alignas(64) uint8_t subsets[64];  // entry i takes activation j where bit j of i is set
  for (int i = 0; i < 64; ++i) subsets[i] = i / 4 >> i % 4 & 1;
  const __m512i taken = _mm512_load_si512(subsets);
  for (int64_t quad = 0; quad < layout.quads; ++quad) {
    const __m512i four = _mm512_set1_epi32(load_quad(x.codes + quad * kQuad));
    const __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), taken, four);
    uint8_t* out = table + quad / kLookup * kTable + quad % kLookup * 16;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(sums));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 64), _mm512_cvtepi32_epi8(_mm512_srai_epi32(sums, 8)));
  }
}

// How indices into the table are made: the bits of row r and quad q in byte 4 r + q, on top of them the number of the quad.
struct IndexBytes {
  alignas(64) uint8_t source[64] = {}, shift[64] = {}, quad[64] = {};

  constexpr IndexBytes() {
    for (int i = 0; i < 64; ++i) {
      source[i] = static_cast<uint8_t>(i % 4 * 8 + i / 8);
      shift[i] = static_cast<uint8_t>(i % 4 * 8 + i / 4 % 2 * 4);
      quad[i] = static_cast<uint8_t>(i % 4 << 4);
    }
  }
};
constexpr IndexBytes kIndexBytes;

class Indices {
 public:
  Indices()
      : source_(_mm512_load_si512(kIndexBytes.source)),
        shift_(_mm512_load_si512(kIndexBytes.shift)),
        quad_(_mm512_load_si512(kIndexBytes.quad)) {}
  __m512i of(const uint8_t* words) const {
    const __m256i four = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
    const __m512i spread = _mm512_permutexvar_epi8(source_, _mm512_castsi256_si512(four));
    const __m512i shifted = _mm512_multishift_epi64_epi8(shift_, spread);
    return _mm512_ternarylogic_epi64(shifted, _mm512_set1_epi8(15), quad_, 0xea);  // (a & b) | c
  }

 private:
  __m512i source_, shift_, quad_;
};

void dot_lookup(const TiledWeight& weight, const uint8_t* block, const ActivationBlock& x, float* sums) {
  const Indices indices;
  const __m512i ones = _mm512_set1_epi8(1);
  const uint8_t* words = block + weight.grid_bytes;
  const uint8_t* table = x.table;
  __m512 total = _mm512_setzero_ps();
  int64_t segment = 0;
  for (int64_t group = 0; group < weight.groups; ++group) {
    prefetch_grid(block, group);
    const Scales grid(weight, weight.level_bits, block, group);
    for (int64_t left = weight.quads_of(group); left > 0; ++segment) {
      const int64_t quads = left < kSegmentQuads ? left : kSegmentQuads;
      left -= quads;
      __m512i low = _mm512_set1_epi32(x.negative_sum[segment]), high = _mm512_setzero_si512();
      for (int64_t quad = 0; quad < quads; quad += kLookup, words += 8 * kLookup, table += kTable) {
        prefetch<8 * kLookup>(words);
        const __m512i index = indices.of(words);
        low = _mm512_dpbusd_epi32(low, _mm512_permutexvar_epi8(index, _mm512_load_si512(table)), ones);
        high = _mm512_dpbusd_epi32(high, ones, _mm512_permutexvar_epi8(index, _mm512_load_si512(table + 64)));
      }
      const __m512i sum = _mm512_add_epi32(low, _mm512_slli_epi32(high, 8));
      total = _mm512_fmadd_ps(_mm512_mul_ps(grid.scale, _mm512_set1_ps(x.scale[segment])), _mm512_cvtepi32_ps(sum), total);
    }
    total = _mm512_fmadd_ps(grid.centre, _mm512_set1_ps(x.sum[group]), total);
  }
  _mm512_storeu_ps(sums, total);
}

void dot_avx512vnni(const TiledWeight& weight, int64_t row_block, const ActivationBlock* blocks, int64_t count,
                    float* sums) {
  if (count == 1) {
    if (blocks->table && weight.bits == 1) return dot_lookup(weight, weight.block(row_block), *blocks, sums);
    switch (blocks->rows) {
      case 1: return dot_few<1>(weight, weight.block(row_block), *blocks, sums);
      case 2: return dot_few<2>(weight, weight.block(row_block), *blocks, sums);
      case 3: return dot_few<3>(weight, weight.block(row_block), *blocks, sums);
      case 4: return dot_few<4>(weight, weight.block(row_block), *blocks, sums);
      default: return dot_block(weight, weight.block(row_block), *blocks, sums);
    }
  }
  dot<Avx512Vnni>(weight, row_block, blocks, count, sums);
}

}  // namespace

const Isa kAvx512Vnni{"avx512vnni", dot_avx512vnni, bit_dot_avx512, Avx512Vnni::unpack, table_bytes, fill_table};

}  // namespace kbit

#endif
