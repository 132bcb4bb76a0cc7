/* As many float32 numbers as a register holds, in the vector extensions that gcc and clang share. Wider vectors would do on
 * AVX-512 alone: elsewhere compilers take comparisons of them apart number by number, and move the rest through memory. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

/* Memory that begins with a line of the cache: where rows of numbers are such lines, no vector lies in two. NULL where there is
 * none. */
INLINE void *whole_lines(size_t bytes) {
    return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

#if defined __AVX512F__
#define LANES 16
enum { REGISTERS = 32 };
#elif defined __AVX__
#define LANES 8
enum { REGISTERS = 16 };
#elif defined __aarch64__
#define LANES 4
enum { REGISTERS = 32 };
#else
#define LANES 4
enum { REGISTERS = 16 };
#endif

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4))); /* anywhere in memory */
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef int32_t bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* numbers of any kind, anywhere */

/* Keeps a vector in a register: compilers would read it from memory for every product that it takes part in. */
#if defined __AVX512F__
#define HELD(x) __asm__("" : "+v"(x))
#elif defined __AVX__
#define HELD(x) __asm__("" : "+x"(x))
#else
#define HELD(x)
#endif

/* Lanes of a where `mask` is set, else of b. (C has no ?: over vectors.) */
INLINE lanes choose(ints mask, lanes a, lanes b) { return (lanes)(((ints)a & mask) | ((ints)b & ~mask)); }

/* The larger of each two; b where one is not a number. */
INLINE lanes larger(lanes a, lanes b) {
#if defined __AVX512F__
    return (lanes)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined __AVX__
    return (lanes)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return choose(a > b, a, b);
#endif
}

INLINE float total(lanes x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

INLINE float largest(lanes x) {
    float top = x[0];
    for (int i = 1; i < LANES; i++) top = x[i] > top ? x[i] : top;
    return top;
}

/* Lanes of a where `lane & bit` is 0, else of b, each plus the lane of its partner across `bit`. */
#define FOLD(a, b, bit) (PICK(a, b, 0, bit) + PICK(a, b, bit, bit))
#define PICK(a, b, flip, bit) __builtin_shufflevector(a, b, PLACES(flip, bit))
#define AT(lane, flip, bit) (((lane) ^ (flip)) + ((lane) & (bit) ? LANES : 0))
#define FOUR(n, flip, bit) AT(n, flip, bit), AT(n + 1, flip, bit), AT(n + 2, flip, bit), AT(n + 3, flip, bit)
#if LANES == 16
#define PLACES(flip, bit) FOUR(0, flip, bit), FOUR(4, flip, bit), FOUR(8, flip, bit), FOUR(12, flip, bit)
#elif LANES == 8
#define PLACES(flip, bit) FOUR(0, flip, bit), FOUR(4, flip, bit)
#else
#define PLACES(flip, bit) FOUR(0, flip, bit)
#endif

/* Rows whose numbers differ in `bit` alone: lanes of the first that have the bit trade places with those of the second that
 * have not. */
#define TRADE(rows, bit) \
    _Pragma("GCC unroll 16") for (int j = 0; j < LANES; j++) \
        if (!(j & (bit))) { \
            const lanes a = rows[j], b = rows[j | (bit)], traded = PICK(a, b, bit, bit); \
            rows[j] = PICK(a, traded, 0, bit); \
            rows[j | (bit)] = PICK(traded, b, 0, bit); \
        }

/* LANES rows become columns. */
INLINE void transpose(lanes *rows) {
    TRADE(rows, 1)
    TRADE(rows, 2)
#if LANES > 4
    TRADE(rows, 4)
#endif
#if LANES > 8
    TRADE(rows, 8)
#endif
}

/* Lane i: the total of part[i], of LANES parts, which are lost. */
INLINE lanes totals(lanes *part) {
    for (int64_t j = 0; j < LANES; j += 2) part[j] = FOLD(part[j], part[j + 1], 1);
    for (int64_t j = 0; j < LANES; j += 4) part[j] = FOLD(part[j], part[j + 2], 2);
#if LANES > 4
    for (int64_t j = 0; j < LANES; j += 8) part[j] = FOLD(part[j], part[j + 4], 4);
#endif
#if LANES > 8
    part[0] = FOLD(part[0], part[8], 8);
#endif
    return part[0];
}

/* e^x for x <= 0, to 2e-7 of it. The polynomial of degree 5 is the nearest to e^r on |r| <= ln(2) / 2 that is 1 at 0. */
INLINE lanes exp_of_negative(lanes x) {
    x = larger((lanes){0} - 87.0f, x); /* not a number stays so: it comes second */
    const ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, ints);
    const lanes r = x - __builtin_convertvector(n, lanes) * 0.693147181f;
    lanes p = r * 8.290306665e-3f + 4.189797491e-2f;
    p = p * r + 1.666763723e-1f;
    p = p * r + 4.999915063e-1f;
    p = p * r + 9.999997020e-1f;
    p = p * r + 1.0f;
    return (lanes)((ints)p + (n << 23));
}

INLINE lanes silu(lanes x) {
    const ints negative = x < 0;
    const lanes e = exp_of_negative(choose(negative, x, -x)); /* e^-|x| */
    return x * choose(negative, e, (lanes){0} + 1.0f) / (1.0f + e);
}
