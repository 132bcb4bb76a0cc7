/* Many float32 numbers at a time, in the vector extensions that gcc and clang share. */
#pragma once
#include <math.h>
#include <stdint.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

/* Sixteen floats anywhere in memory; compilers split them where registers are narrower. */
typedef float lanes __attribute__((vector_size(64), aligned(4)));
typedef int32_t ints __attribute__((vector_size(64)));

/* As many floats as a register holds: for loops that must keep all they work on in registers. */
#if defined __AVX512F__
enum { REG = 16, REGS = 32 };
#elif defined __AVX__
enum { REG = 8, REGS = 16 };
#elif defined __aarch64__
enum { REG = 4, REGS = 32 };
#else
enum { REG = 4, REGS = 16 };
#endif
typedef float reg __attribute__((vector_size(4 * REG), aligned(4)));
typedef int32_t reg_ints __attribute__((vector_size(4 * REG)));

/* Lanes of a where `mask` is set, else of b. (C has no ?: over vectors.) */
INLINE lanes choose(ints mask, lanes a, lanes b) { return (lanes)(((ints)a & mask) | ((ints)b & ~mask)); }

/* The larger of each two. Compilers make a comparison and a choice of it where they are not told. */
INLINE lanes larger(lanes a, lanes b) {
#ifdef __AVX512F__
    return (lanes)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose(a > b, a, b);
#endif
}

INLINE reg larger_reg(reg a, reg b) {
#if defined __AVX512F__
    return (reg)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined __AVX__
    return (reg)_mm256_max_ps((__m256)a, (__m256)b);
#else
    const reg_ints mask = a > b;
    return (reg)(((reg_ints)a & mask) | ((reg_ints)b & ~mask));
#endif
}

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

/* e^x for x <= 0, to 2e-7 of it. The polynomial of degree 5 is the nearest to e^r on |r| <= ln(2) / 2 that is 1 at 0. */
#define EXP_OF_NEGATIVE(name, floats, integers, larger) \
    INLINE floats name(floats x) { \
        x = larger((floats){0} - 87.0f, x); /* not a number stays so: it comes second */ \
        const integers n = __builtin_convertvector(x * 1.44269504f - 0.5f, integers); \
        const floats r = x - __builtin_convertvector(n, floats) * 0.693147181f; \
        floats p = r * 8.290306665e-3f + 4.189797491e-2f; \
        p = p * r + 1.666763723e-1f; \
        p = p * r + 4.999915063e-1f; \
        p = p * r + 9.999997020e-1f; \
        p = p * r + 1.0f; \
        return (floats)((integers)p + (n << 23)); \
    }
EXP_OF_NEGATIVE(exp_of_negative, lanes, ints, larger)
EXP_OF_NEGATIVE(exp_of_negative_reg, reg, reg_ints, larger_reg)
