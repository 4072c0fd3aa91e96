// AdamW (arXiv:1711.05101, algorithm 2) in one pass over host memory: reads gradient, master weight
// and both moments of an element once, and writes the master weight, the moments and a weight of a
// dtype of its own.
//
// The arithmetic is fp32, and consists of operations that IEEE 754 rounds correctly, in the order in
// which they stand. It is compiled without contraction (-ffp-contract=off), so that every processor
// computes the same bits, wherever the elements are cut among threads. Loops are written for the
// compiler's vectoriser. Time goes to memory traffic, so two measures serve that alone:
// - x86 stores weights past the caches; else the processor would read each line before it writes it
//   (2 bytes of 32 for bf16; 3 to 10% of the time);
// - lines are prefetched AHEAD elements before their use, with the intent to write where they are
//   written, since hardware prefetchers stop at the page of each stream (8 to 11% of the time).

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

constexpr size_t BLOCK = 64;    // elements: whole cache lines of every dtype
constexpr size_t AHEAD = 1024;  // elements: 512 to 1024 were the fastest of 256 to 4096
constexpr size_t LINE = 64;     // bytes of a cache line

// As kernels/host_adamw.py fills it.
struct Constants {
    float scale;       // of the gradient
    float lerp;        // 1 - beta1
    float beta2;
    float square;      // 1 - beta2
    float correction;  // 1 / sqrt(1 - beta2^step)
    float eps;
    float rate;        // lr / (1 - beta1^step)
    float decay;       // lr * weight_decay
};

struct Bf16 {
    uint16_t bits;
};
struct None {};

inline float to_float(float x) { return x; }

inline float to_float(Bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline void put(float& to, float x) { to = x; }

// Rounds to nearest even; NaN becomes the quiet NaN 0x7fc0.
inline void put(Bf16& to, float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    to.bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline void put(None&, float) {}

// exp_avg + w (grad - exp_avg), as torch.lerp: exact at both ends of w, and it keeps inf and NaN.
inline float lerp(float exp_avg, float grad, float w) {
    const float difference = grad - exp_avg;
    return w < 0.5f ? exp_avg + w * difference : grad - (1.0f - w) * difference;
}

template <class G, class M, class W>
inline __attribute__((always_inline)) void update(float* __restrict master,
                                                  const G* __restrict grad,
                                                  M* __restrict exp_avg,
                                                  M* __restrict exp_avg_sq,
                                                  W* __restrict weight, size_t count,
                                                  const Constants& c) {
    for (size_t i = 0; i < count; ++i) {
        const float g = to_float(grad[i]) * c.scale;
        const float m = lerp(to_float(exp_avg[i]), g, c.lerp);
        const float v = to_float(exp_avg_sq[i]) * c.beta2 + c.square * g * g;
        const float denominator = __builtin_sqrtf(v) * c.correction + c.eps;
        // decay is not multiplied in as 1 - decay, which would lose most of its digits
        const float p = master[i] - (c.decay * master[i] + c.rate * m / denominator);
        put(exp_avg[i], m);
        put(exp_avg_sq[i], v);
        master[i] = p;
        put(weight[i], p);
    }
}

template <bool written, class T>
inline void prefetch(const T* first) {
    const char* line = reinterpret_cast<const char*>(first);
    for (size_t offset = 0; offset < BLOCK * sizeof(T); offset += LINE)
        __builtin_prefetch(line + offset, written);
}

// Copies a block of weights; where `stream`, past the caches.
template <class W>
inline void copy_block(W* to, const W* from, bool stream) {
#if defined(__SSE2__)
    if (stream) {
        const __m128i* source = reinterpret_cast<const __m128i*>(from);
        __m128i* target = reinterpret_cast<__m128i*>(to);
        for (size_t j = 0; j < BLOCK * sizeof(W) / sizeof(__m128i); ++j)
            _mm_stream_si128(target + j, _mm_load_si128(source + j));
        return;
    }
#endif
    (void)stream;
    memcpy(to, from, BLOCK * sizeof(W));
}

inline void copy_block(None*, const None*, bool) {}

template <class W>
inline W* advance(W* weight, size_t i) {
    return weight + i;
}

inline None* advance(None* weight, size_t) { return weight; }

template <class G, class M, class W>
void pass(float* master, const G* grad, M* exp_avg, M* exp_avg_sq, W* weight, size_t count,
          const Constants& given) {
    const Constants c = given;
    const bool stream = reinterpret_cast<uintptr_t>(weight) % LINE == 0;
    alignas(LINE) W block[BLOCK];
    size_t i = 0;
    for (; i + BLOCK <= count; i += BLOCK) {
        if (i + AHEAD + BLOCK <= count) {
            prefetch<false>(grad + i + AHEAD);
            prefetch<true>(master + i + AHEAD);
            prefetch<true>(exp_avg + i + AHEAD);
            prefetch<true>(exp_avg_sq + i + AHEAD);
        }
        update(master + i, grad + i, exp_avg + i, exp_avg_sq + i, block, BLOCK, c);
        copy_block(advance(weight, i), block, stream);
    }
    const size_t rest = count - i;
    update(master + i, grad + i, exp_avg + i, exp_avg_sq + i, block, rest, c);
    if (rest && weight) memcpy(advance(weight, i), block, rest * sizeof(W));
#if defined(__SSE2__)
    _mm_sfence();  // before another thread is told that the weights are there
#endif
}

}  // namespace

// adamw_GRADIENT_MOMENTS_WEIGHT(master, grad, exp_avg, exp_avg_sq, weight, elements, constants)
#define EXPORT(g, G, m, M, w, W)                                                                   \
    extern "C" void adamw_##g##_##m##_##w(float* master, const G* grad, M* exp_avg, M* exp_avg_sq, \
                                          W* weight, size_t count, const Constants* constants) {   \
        pass<G, M, W>(master, grad, exp_avg, exp_avg_sq, weight, count, *constants);               \
    }
#define EXPORT_WEIGHTS(g, G, m, M)       \
    EXPORT(g, G, m, M, none, None)       \
    EXPORT(g, G, m, M, float32, float)   \
    EXPORT(g, G, m, M, bfloat16, Bf16)
#define EXPORT_MOMENTS(g, G)                 \
    EXPORT_WEIGHTS(g, G, float32, float)     \
    EXPORT_WEIGHTS(g, G, bfloat16, Bf16)
EXPORT_MOMENTS(float32, float)
EXPORT_MOMENTS(bfloat16, Bf16)
