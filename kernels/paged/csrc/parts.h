/* Products of float32 numbers by a processor that multiplies tiles of bfloat16 (AMX). A number is the sum of three of bfloat16, of eight
 * bits each; of the nine products of two such numbers' parts the three smallest are below what float32 holds, and the others are exact.
 * They are summed in float32, small ones first, which is as accurate as products in float32. */
#pragma once
#include "tiles.h"
#ifdef TILES_MULTIPLY

/* Lines and columns of a product at a time. Of what is in parts, tile [i][k][p] holds part p of lines, or columns, [16 i, 16 i + 16) and,
 * of what is summed over, [32 k, 32 k + 32). */
enum { BLOCK = 2 * SIDE };

/* The parts of two vectors as a line of a tile, in pairs of a number of each: what is summed over is paired with what lies a vector
 * behind it, both left and right. */
INLINE void put_pairs(uint16_t *tile, lanes x, lanes y) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
    __m512 a = (__m512)x, b = (__m512)y;
#pragma GCC unroll 3
    for (int p = 0; p < PARTS; p++) {
        const __m512i halves = _mm512_srli_epi32((__m512i)a, 16);
        _mm512_store_si512(tile + p * TILE, _mm512_mask_blend_epi16(0xaaaaaaaa, halves, (__m512i)b));
        if (p + 1 == PARTS) break;
        a = _mm512_sub_ps(a, (__m512)_mm512_and_si512((__m512i)a, upper));
        b = _mm512_sub_ps(b, (__m512)_mm512_and_si512((__m512i)b, upper));
    }
}

#define LEFT(p) _tile_loadd(4, l + (p) * TILE, 64); _tile_loadd(5, l + (depth * PARTS + (p)) * TILE, 64);
#define RIGHT(p) _tile_loadd(6, r + (p) * TILE, 64); _tile_loadd(7, r + (depth * PARTS + (p)) * TILE, 64);
#define PRODUCTS _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);

/* out [32][32] becomes the products of left [2][deep] and right [2][deep], in parts. `BESIDE` is done after each of 6 * deep groups of
 * products: tiles are multiplied while the processor goes on, if what it does then takes no longer. */
#define MULTIPLY(out, left, right, deep, BESIDE) do { \
    const int64_t depth = deep; \
    const uint16_t *l = left, *r = right; \
    __asm__ volatile("" : : : "memory"); /* compilers do not know that tiles are read */ \
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); \
    for (int64_t k = 0; k < depth; k++, l += PARTS * TILE, r += PARTS * TILE) { \
        LEFT(2) RIGHT(0) PRODUCTS BESIDE; \
        LEFT(1) PRODUCTS BESIDE; \
        RIGHT(1) PRODUCTS BESIDE; \
        LEFT(0) PRODUCTS BESIDE; \
        RIGHT(2) PRODUCTS BESIDE; \
    } \
    l = left, r = right; \
    for (int64_t k = 0; k < depth; k++, l += PARTS * TILE, r += PARTS * TILE) { \
        LEFT(0) RIGHT(0) PRODUCTS BESIDE; \
    } \
    _tile_stored(0, out, BLOCK * 4); _tile_stored(1, out + 1, BLOCK * 4); \
    _tile_stored(2, out + BLOCK, BLOCK * 4); _tile_stored(3, out + BLOCK + 1, BLOCK * 4); \
} while (0)
#endif
