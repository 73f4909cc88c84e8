// Reads memory as fast as the machine gives it: a few sequential streams for each thread, no more arithmetic than an exclusive or.
#include <cstddef>
#include <cstdint>

extern "C" uint64_t read_all(const uint64_t* words, size_t count, int threads) {
    constexpr size_t streams = 2, block = 64;
    const size_t length = count / (threads * streams);
    uint64_t total = 0;
#pragma omp parallel for num_threads(threads) reduction(^ : total) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
        const uint64_t* first = words + thread * streams * length;
        const uint64_t* second = first + length;
        uint64_t sums[block] = {};
        for (size_t start = 0; start + block <= length; start += block)
#pragma omp simd
            for (size_t i = 0; i < block; ++i) sums[i] ^= first[start + i] ^ second[start + i];
        for (uint64_t sum : sums) total ^= sum;
    }
    return total;
}
