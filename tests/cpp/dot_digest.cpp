// Prints a digest of what one instruction set computes, so that machines and emulators can be compared: without torch.
//
// -DKBIT_ISA_UNDER_TEST=kAvx2, for one. Scales and offsets are powers of two, so that all sums are exact, in whatever order.
#include <cstdio>
#include <random>
#include <vector>

#include "../../kernels/cpu/isa.h"

namespace {

using namespace kbit;

class Digest {
 public:
  void add(const void* data, size_t size) {  // FNV-1a
    const auto* bytes = static_cast<const unsigned char*>(data);
    for (size_t i = 0; i < size; ++i) hash_ = (hash_ ^ bytes[i]) * 0x100000001b3ull;
  }
  unsigned long long value() const { return hash_; }

 private:
  unsigned long long hash_ = 0xcbf29ce484222325ull;
};

struct Case {
  int bits;
  bool symmetric, codebook;
  int64_t columns, group_size;
  std::vector<int> rows;  // of each block of x
};

using Random = std::mt19937;

uint8_t random_byte(Random& random) { return static_cast<uint8_t>(random()); }

uint16_t power_of_two(Random& random) { return static_cast<uint16_t>((15 - random() % 2) << 10 | random() % 2 << 15); }  // float16

// A weight of one row block. Where a group has padding its codes are no zeros here, but activations are there.
struct Weight : TiledWeight {
  std::vector<uint8_t> bytes, table;

  Weight(const Case& c, Random& random) {
    static_cast<TiledLayout&>(*this) = TiledLayout(c.bits, c.symmetric, kTileRows, c.columns, c.group_size, c.codebook);
    bytes.resize(block_bytes + kTailBytes);
    for (uint8_t& byte : bytes) byte = random_byte(random);
    for (int64_t i = 0; i < grid_bytes; i += 2) {
      const uint16_t half = power_of_two(random);
      std::memcpy(bytes.data() + i, &half, 2);
    }
    data = bytes.data();
    if (!c.codebook) return;
    table.resize(codebook_bytes());
    for (uint8_t& level : table) level = random_byte(random);
    levels = table.data();
  }
};

struct Block {
  std::vector<int8_t> codes;
  std::vector<float> scale, sum;
  std::vector<int32_t> negative_sum;
  ActivationBlock view;

  Block(const TiledLayout& layout, int rows, Random& random) {
    const int64_t length = layout.quads * kQuad;
    codes.resize(length * rows);
    for (int8_t& code : codes) code = static_cast<int8_t>(random() % 8 ? random_byte(random) : 0x80 - random() % 2);
    sum.resize(layout.groups * rows);
    int64_t quad = 0;
    for (int64_t group = 0; group < layout.groups; ++group) {
      for (int64_t left = layout.quads_of(group); left > 0; left -= kSegmentQuads) {
        const int64_t end = quad + (left < kSegmentQuads ? left : kSegmentQuads);
        for (int row = 0; row < rows; ++row) {
          int32_t total = 0;
          for (int64_t q = quad; q < end; ++q) {
            for (int i = 0; i < kQuad; ++i) total += codes[(q * rows + row) * kQuad + i];
          }
          const float step = random() % 2 ? 1.0f : 0.5f;
          scale.push_back(step);
          negative_sum.push_back(-total);
          sum[group * rows + row] += step * static_cast<float>(total);
        }
        quad = end;
      }
    }
    view = {rows, codes.data(), scale.data(), negative_sum.data(), sum.data()};
  }
};

void add(const Isa& isa, const Case& c, Digest& digest) {
  Random random(c.bits * 1000003 + c.columns * 101 + c.group_size * 7 + c.symmetric * 2 + c.codebook);
  const Weight weight(c, random);
  std::vector<Block> blocks;
  std::vector<ActivationBlock> views;
  int64_t rows = 0;
  for (int count : c.rows) blocks.emplace_back(weight, count, random);
  for (Block& block : blocks) views.push_back(block.view), rows += block.view.rows;

  std::vector<float> sums(rows * kTileRows);
  isa.dot(weight, 0, views.data(), static_cast<int64_t>(views.size()), sums.data());
  digest.add(sums.data(), sums.size() * sizeof(float));
  // The same again by looking up partial sums, where the instruction set does.
  std::vector<uint8_t> memory(isa.table_bytes && views.size() == 1 ? isa.table_bytes(weight, views[0].rows) + 64 : 0);
  if (memory.size() > 64) {
    uint8_t* table = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    isa.fill_table(weight, views[0], table);
    views[0].table = table;
    isa.dot(weight, 0, views.data(), 1, sums.data());
  }
  digest.add(sums.data(), sums.size() * sizeof(float));
  std::vector<uint8_t> levels(weight.quads * kCodesPerQuad);
  isa.unpack(weight.data + weight.grid_bytes, weight.bits, weight.levels, weight.quads, levels.data());
  digest.add(levels.data(), levels.size());
}

}  // namespace

int main() {
  const Isa& isa = KBIT_ISA_UNDER_TEST;
  const std::vector<std::vector<int>> rows = {{1}, {2}, {3}, {4}, {5}, {16}, {16, 16, 7}};
  Digest digest;
  for (int bits = 1; bits <= 8; ++bits) {
    for (int codebook = 0; codebook <= (takes_codebook(bits) ? 1 : 0); ++codebook) {
      for (int symmetric = 0; symmetric <= 1; ++symmetric) {
        for (const auto& counts : rows) {
          for (const auto& [columns, group_size] : {std::pair<int64_t, int64_t>{1, 1}, {67, 20}, {128, 128}, {200, 200}}) {
            add(isa, {bits, symmetric == 1, codebook == 1, columns, group_size, counts}, digest);
          }
        }
      }
    }
  }
  std::printf("%016llx\n", digest.value());
}
