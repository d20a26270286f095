/* What kernels.c and sampling.c share: vectors of 16 lanes, loads and stores in fp32 and bf16, exp and log.
 *
 * Vectors are GCC's own (also clang's), so that one source serves AVX-512, AVX2 and NEON. Numbers are fp32 inside;
 * `bf16` says how tensors are stored. All tensors are contiguous, row-major.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define LANES 16
#define INLINE static inline __attribute__((always_inline))
typedef float vf __attribute__((vector_size(64), aligned(4)));
typedef int32_t vi __attribute__((vector_size(64), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(64), aligned(4)));
typedef uint16_t vh __attribute__((vector_size(32), aligned(2)));
typedef uint8_t vb __attribute__((vector_size(16), aligned(1)));

/* Smallest amount of work, in numbers touched, that is worth waking a second thread for: waking costs microseconds. */
enum { PARALLEL_NUMBERS = 1 << 16 };

INLINE vf splat(float x) { return (vf){0} + x; }

INLINE vf load(const void *base, long at, int bf16) {
    if (!bf16) return *(const vf *)((const float *)base + at);
    vu wide = __builtin_convertvector(*(const vh *)((const uint16_t *)base + at), vu);
    return (vf)(wide << 16);
}

/* Round to nearest, ties to even, as torch does. */
INLINE void store(void *base, long at, vf x, int bf16) {
    if (!bf16) {
        *(vf *)((float *)base + at) = x;
        return;
    }
    vu bits = (vu)x;
    bits = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    *(vh *)((uint16_t *)base + at) = __builtin_convertvector(bits, vh);
}

INLINE float load1(const void *base, long at, int bf16) {
    if (!bf16) return ((const float *)base)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)base)[at] << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE void store1(void *base, long at, float x, int bf16) {
    if (!bf16) {
        ((float *)base)[at] = x;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &x, 4);
    ((uint16_t *)base)[at] = (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

/* The last lanes of a row whose length is no multiple of 16 are zero. */
INLINE vf load_tail(const void *base, long at, long count, int bf16) {
    vf x = {0};
    for (long i = 0; i < count; i++) x[i] = load1(base, at + i, bf16);
    return x;
}

INLINE float sum(vf x) {
    float s[LANES];
    memcpy(s, &x, sizeof s);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) s[i] += s[i + half];
    return s[0];
}

INLINE vf pick(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

INLINE vf maximum(vf a, vf b) { return pick(a > b, a, b); }

INLINE float largest(vf x) {
    float best = x[0];
    for (int i = 1; i < LANES; i++) best = x[i] > best ? x[i] : best;
    return best;
}

/* exp, relative error below 2e-7; 0 below -87. Source: Cephes (S. Moshier), expf. */
INLINE vf exp_(vf x) {
    vi tiny = x < -87.0f;
    x = pick(x > 88.0f, splat(88.0f), pick(tiny, splat(-87.0f), x));
    vf scaled = x * 1.44269504088896341f;
    vi n = __builtin_convertvector(scaled + pick(scaled < 0, splat(-0.5f), splat(0.5f)), vi);
    vf k = __builtin_convertvector(n, vf);
    x = x - k * 0.693359375f;
    x = x - k * -2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * x + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    p = p * x * x + x + 1.0f;
    p = p * (vf)((n + 127) << 23);
    return pick(tiny, splat(0.0f), p);
}

/* log of positive normal numbers, relative error below 2e-7. Source: Cephes, logf. */
INLINE vf log_(vf x) {
    vi bits = (vi)x;
    vi e = (bits >> 23) - 126;
    vf m = (vf)((bits & 0x007FFFFF) | 0x3F000000); /* [0.5, 1) */
    vi low = m < 0.707106781186547524f;
    e = e + low; /* true is -1 */
    m = m + pick(low, m, splat(0.0f)) - 1.0f;
    vf k = __builtin_convertvector(e, vf), z = m * m;
    vf p = splat(7.0376836292e-2f);
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    p = p * m * z + k * -2.12194440e-4f - 0.5f * z;
    return m + p + k * 0.693359375f;
}

/* Row `row` of an array of `width` numbers a row. */
INLINE char *row_of(const void *base, long row, long width, int bf16) {
    return (char *)base + row * width * (bf16 ? 2 : 4);
}
