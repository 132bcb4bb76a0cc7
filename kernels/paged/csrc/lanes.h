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
    x = choose(x < -87.0f, (lanes){0} - 87.0f, x);
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
