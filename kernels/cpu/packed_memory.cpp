#include "packed_memory.h"

#include <memory>
#include <mutex>
#include <new>

#include <ATen/ops/from_blob.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "dtype.h"

namespace kbit {
namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kChunk = 8 * kHugePage;
constexpr int64_t kLine = 64;

struct Chunk {
  uint8_t* data;
  int64_t size, used = 0;

  explicit Chunk(int64_t bytes) : size(round_up(bytes, kHugePage)) {
    data = static_cast<uint8_t*>(::operator new(size, std::align_val_t(kHugePage)));
#if defined(__linux__)
    madvise(data, size, MADV_HUGEPAGE);  // refused where huge pages are off: then they are small ones
#endif
  }
  ~Chunk() { ::operator delete(data, std::align_val_t(kHugePage)); }
  Chunk(const Chunk&) = delete;
  Chunk& operator=(const Chunk&) = delete;
};

std::mutex mutex;
std::weak_ptr<Chunk> current;  // the chunk that still has room; weights hold it, so that it goes when they do

std::shared_ptr<Chunk> chunk_with_room(int64_t bytes) {
  std::shared_ptr<Chunk> chunk = current.lock();
  if (chunk && chunk->used + bytes <= chunk->size) return chunk;
  chunk = std::make_shared<Chunk>(std::max(bytes, kChunk));
  current = chunk;
  return chunk;
}

}  // namespace

at::Tensor allocate_packed(int64_t nbytes) {
  const int64_t bytes = round_up(std::max<int64_t>(nbytes, 1), kLine);
  const std::lock_guard<std::mutex> lock(mutex);
  const std::shared_ptr<Chunk> chunk = chunk_with_room(bytes);
  uint8_t* data = chunk->data + chunk->used;
  chunk->used += bytes;
  return at::from_blob(data, {nbytes}, [chunk](void*) {}, at::TensorOptions().dtype(at::kByte));
}

}  // namespace kbit
