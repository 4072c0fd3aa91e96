// The memory traffic of kernels/host_adamw.cpp with a single addition in place of each moment's and
// master weight's update: the floor of its time. Blocks, prefetches and stores past the caches are
// the same, since they make this loop faster too.

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

static const size_t BLOCK = 64, AHEAD = 1024;

static inline void store_block(uint16_t* to, uint16_t value) {
#if defined(__SSE2__)
    const __m128i values = _mm_set1_epi16(static_cast<short>(value));
    for (size_t j = 0; j < BLOCK; j += 8)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + j), values);
#else
    for (size_t j = 0; j < BLOCK; ++j) to[j] = value;
#endif
}

// For `count` elements, in whole blocks: reads x, and reads and writes a, b and c (fp32); writes w
// (16 bits, from a multiple of 64 bytes).
extern "C" void traffic(float* __restrict a, const float* __restrict x, float* __restrict b,
                        float* __restrict c, uint16_t* __restrict w, size_t count) {
    for (size_t i = 0; i + BLOCK <= count; i += BLOCK) {
        if (i + AHEAD + BLOCK <= count) {
            for (size_t j = i + AHEAD; j < i + AHEAD + BLOCK; j += 16) {
                __builtin_prefetch(x + j);
                __builtin_prefetch(a + j, 1);
                __builtin_prefetch(b + j, 1);
                __builtin_prefetch(c + j, 1);
            }
        }
        for (size_t j = i; j < i + BLOCK; ++j) {
            a[j] += x[j];
            b[j] += x[j];
            c[j] += x[j];
        }
        store_block(w + i, static_cast<uint16_t>(i));
    }
#if defined(__SSE2__)
    _mm_sfence();
#endif
}
