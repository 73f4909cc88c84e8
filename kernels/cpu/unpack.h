// Bit planes to codes: 64 consecutive columns of one row at a time.
//
// The only code here that knows an instruction set. Everything downstream is plain C++ which the compiler vectorizes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BW__) && !defined(KBIT_PORTABLE)
#include <immintrin.h>
#define KBIT_AVX512
#endif

namespace kbit {

inline constexpr int64_t kBlock = 64;  // columns unpacked at a time: 8 bytes of every plane

#ifdef KBIT_AVX512

// `bytes` points at 8 bytes of plane 0 (the most significant bit); the next plane is `plane_stride` bytes further on.
// Writes 64 codes. Eight bytes of a plane are an AVX-512 byte mask as they stand: one masked add per plane.
template <int Bits>
inline void unpack_block(const uint8_t* bytes, ptrdiff_t plane_stride, uint8_t* codes) {
  __m512i sum = _mm512_setzero_si512();
  for (int plane = 0; plane < Bits; ++plane) {
    uint64_t mask;
    std::memcpy(&mask, bytes + plane * plane_stride, sizeof mask);
    sum = _mm512_mask_add_epi8(sum, mask, sum, _mm512_set1_epi8(static_cast<char>(1 << (Bits - 1 - plane))));
  }
  _mm512_storeu_si512(codes, sum);
}

#else

// Entry b holds bit i of b in its byte i in memory, so that it reads the same on either byte order.
inline constexpr auto kSpread = [] {
  std::array<std::array<uint8_t, 8>, 256> table{};
  for (int value = 0; value < 256; ++value) {
    for (int bit = 0; bit < 8; ++bit) table[value][bit] = (value >> bit) & 1;
  }
  return table;
}();

// As above, with a table that spreads 8 bits to 8 bytes. Codes fit their bytes, so 64-bit shifts never cross bytes.
template <int Bits>
inline void unpack_block(const uint8_t* bytes, ptrdiff_t plane_stride, uint8_t* codes) {
  for (int i = 0; i < 8; ++i) {
    uint64_t eight = 0;
    for (int plane = 0; plane < Bits; ++plane) {
      uint64_t bits;
      std::memcpy(&bits, kSpread[bytes[plane * plane_stride + i]].data(), sizeof bits);
      eight = (eight << 1) | bits;
    }
    std::memcpy(codes + 8 * i, &eight, sizeof eight);
  }
}

#endif

// The last block of a row, of which only `count` < 8 bytes per plane exist; codes past them are zero.
template <int Bits>
inline void unpack_tail(const uint8_t* bytes, ptrdiff_t plane_stride, int64_t count, uint8_t* codes) {
  uint8_t padded[Bits][8] = {};
  for (int plane = 0; plane < Bits; ++plane) std::memcpy(padded[plane], bytes + plane * plane_stride, count);
  unpack_block<Bits>(padded[0], 8, codes);
}

}  // namespace kbit
