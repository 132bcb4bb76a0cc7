/* Sixteen float32 numbers at a time, in the vector extensions that gcc and clang share. */
#pragma once
#include <math.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

/* Sixteen floats anywhere in memory; compilers split them where registers are narrower. */
typedef float lanes __attribute__((vector_size(64), aligned(4)));
typedef int32_t ints __attribute__((vector_size(64)));

/* Lanes of a where `mask` is set, else of b. (C has no ?: over vectors.) */
INLINE lanes choose(ints mask, lanes a, lanes b) { return (lanes)(((ints)a & mask) | ((ints)b & ~mask)); }

/* Where a is above b. Compilers take a comparison of vectors wider than the registers apart number by number: halves fit. */
INLINE ints above(lanes a, lanes b) {
#ifdef __AVX512F__
    return a > b;
#else
    typedef float half __attribute__((vector_size(32)));
    typedef int32_t marks __attribute__((vector_size(32)));
    const half a0 = __builtin_shufflevector(a, a, 0, 1, 2, 3, 4, 5, 6, 7), b0 = __builtin_shufflevector(b, b, 0, 1, 2, 3, 4, 5, 6, 7);
    const half a1 = __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15);
    const half b1 = __builtin_shufflevector(b, b, 8, 9, 10, 11, 12, 13, 14, 15);
    const marks low = a0 > b0, high = a1 > b1;
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#endif
}

/* The larger of each; b where one is NaN. */
INLINE lanes larger(lanes a, lanes b) { return choose(above(a, b), a, b); }

INLINE float total(lanes x) {
    float sum = 0;
    for (int i = 0; i < 16; i++) sum += x[i];
    return sum;
}

INLINE float largest(lanes x) {
    float top = x[0];
    for (int i = 1; i < 16; i++) top = x[i] > top ? x[i] : top;
    return top;
}

/* e^x for x <= 0, to about 2 units in the last place, sixteen at a time (Cephes' expf polynomial). */
INLINE lanes exp_of_negative(lanes x) {
    x = larger((lanes){0} - 87.0f, x); /* NaN stays */
    const ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, ints);
    const lanes r = x - __builtin_convertvector(n, lanes) * 0.693147181f;
    lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (lanes)((n + 127) << 23);
}
