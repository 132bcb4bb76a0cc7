/* Products of tiles of bfloat16 by a processor that has them (AMX). A float32 number is the sum of three bfloat16 numbers of eight
 * bits each: lines are taken apart so, and the products of their parts with weights that bfloat16 holds exactly are exact in
 * float32, in which they are summed. That is no less accurate than products in float32. */
#include "tiles.h"
#ifdef TILES_MULTIPLY
#include <sys/syscall.h>
#include <unistd.h>

enum { KEPT = 1024 }; /* tiles of lines that stay in the second level beside weights: 1 MB */

/* Whether this process may multiply tiles. The kernel wants to be asked: a thread's state grows by 8 KB. */
int amx_ready(void) {
    enum { REQUEST = 0x1023, TILES = 18 };
    return syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
}

/* Lines of x, taken apart by the threads of a team: part p of line l is line l % TOGETHER * PARTS + p of its tiles. Inputs are
 * filled up by zeros. An infinity leaves parts that are no numbers, and so do its products. */
void amx_take_apart(uint16_t *parts, const float *x, int64_t x_line, int64_t lines, int64_t in) {
    const int64_t deep = blocks_of(in, DEEP);
    const __m512i top = _mm512_set1_epi32((int)0xffff0000);
    uint16_t upper[DEEP]; /* places of the upper halves of two vectors of float32 */
    for (int i = 0; i < DEEP; i++) upper[i] = (uint16_t)(2 * i + 1);
    const __m512i halves = _mm512_loadu_si512(upper);
#pragma omp for schedule(static)
    for (int64_t l = 0; l < lines; l++)
        for (int64_t j = 0; j < deep; j++) {
            uint16_t *to = parts + (l / TOGETHER * deep + j) * TILE + l % TOGETHER * PARTS * DEEP;
            const float *from = x + l * x_line + j * DEEP;
            const int64_t left = in - j * DEEP;
            const uint32_t mask = left >= DEEP ? 0xffffffff : (1u << left) - 1;
            __m512 a = _mm512_maskz_loadu_ps((__mmask16)mask, from), b = _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), from + 16);
            for (int p = 0; p < PARTS; p++) {
                const __m512i a_top = _mm512_and_si512((__m512i)a, top), b_top = _mm512_and_si512((__m512i)b, top);
                _mm512_store_si512(to + p * DEEP, _mm512_permutex2var_epi16(a_top, halves, b_top));
                a = _mm512_sub_ps(a, (__m512)a_top), b = _mm512_sub_ps(b, (__m512)b_top);
            }
        }
}

/* sums[2 * a + b]: products of lines a (of one or two tiles) with weights b (of two), 16 x 16. Fetches its part of the weights
 * that come next. */
INLINE void multiply(float (*sums)[SIDE * SIDE], const uint16_t *parts, const uint16_t *weight, const uint16_t *next, int64_t deep,
                     int64_t pass, int64_t passes, const int two) {
    const uint16_t *more = parts + deep * TILE;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int64_t j = 0, turn = pass; j < deep; j++, turn = turn ? turn - 1 : passes - 1) {
        const uint16_t *w = weight + j * 2 * TILE;
        if (!turn)
#pragma GCC unroll 32
            for (int i = 0; i < 2 * TILE; i += 32) __builtin_prefetch(next + j * 2 * TILE + i, 0, 2);
        _tile_loadd(6, w, 64); _tile_loadd(7, w + TILE, 64);
        _tile_loadd(4, parts + j * TILE, 64);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
        if (!two) continue;
        _tile_loadd(5, more + j * TILE, 64);
        _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums[0], 64); _tile_stored(1, sums[1], 64);
    if (!two) return;
    _tile_stored(2, sums[2], 64); _tile_stored(3, sums[3], 64);
}

/* The sum of a line's parts, smallest first. */
INLINE lanes joined(const float *sums, int64_t line) {
    const float *s = sums + line * PARTS * SIDE;
    return *(const lanes *)(s + 2 * SIDE) + *(const lanes *)(s + SIDE) + *(const lanes *)s;
}

/* Of pair `pair`, weights w, all products with `groups` tiles of lines, the first of which is tile `first` of all. */
INLINE void multiply_pair(const target *t, const uint16_t *parts, int64_t lines, int64_t deep, const uint16_t *w, const uint16_t *next,
                          int64_t pair, int64_t first, int64_t groups) {
    const int64_t passes = (groups + 1) / 2;
    float sums[4][SIDE * SIDE] __attribute__((aligned(64)));
    for (int64_t g = 0; g < groups; g += 2) {
        const uint16_t *p = parts + (first + g) * deep * TILE;
        const int64_t line = (first + g) * TOGETHER, left = lines - line;
        const int two = g + 1 < groups;
        if (two) multiply(sums, p, w, next, deep, g / 2, passes, 1);
        else multiply(sums, p, w, next, deep, g / 2, passes, 0);
        for (int64_t i = 0; i < (1 + two) * TOGETHER && i < left; i++) {
            float(*s)[SIDE * SIDE] = sums + i / TOGETHER * 2;
            const lanes both[PAIR] = {joined(s[0], i % TOGETHER), joined(s[1], i % TOGETHER)};
            write_line(t, both, line + i, pair);
        }
    }
}

/* `multiply_tiles` over lines that were taken apart: as many at a time as stay in the second level for all weights. */
void amx_multiply(const target *t, const uint16_t *parts, int64_t lines, int64_t in, const uint16_t *weight, int64_t pairs,
                  const uint16_t *then) {
    const share own = share_of(pairs);
    const int64_t deep = blocks_of(in, DEEP), all = blocks_of(lines, TOGETHER), fit = KEPT / deep > 2 ? KEPT / deep / 2 * 2 : 2;
    if (!lines) return; /* tiles have lines */
    shape_tiles(lines < TOGETHER ? PARTS * lines : SIDE);
    for (int64_t first = 0; first < all; first += fit) {
        const int64_t groups = all - first < fit ? all - first : fit;
        for (int64_t pair = own.begin; pair < own.end; pair++) {
            const uint16_t *w = weight + pair * deep * 2 * TILE, *next = pair + 1 < own.end ? w + deep * 2 * TILE : then;
            multiply_pair(t, parts, lines, deep, w, next, pair, first, groups);
        }
    }
    _tile_release();
#pragma omp barrier
}
#else
int amx_ready(void) { return 0; }
void amx_take_apart(uint16_t *parts, const float *x, int64_t x_line, int64_t lines, int64_t in) {}
void amx_multiply(const target *t, const uint16_t *parts, int64_t lines, int64_t in, const uint16_t *weight, int64_t pairs,
                  const uint16_t *then) {}
#endif
