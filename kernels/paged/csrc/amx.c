/* Products of tiles of bfloat16 by a processor that has them (AMX). A float32 number is the sum of three bfloat16 numbers of eight
 * bits each: lines are taken apart so, and the products of their parts with weights that bfloat16 holds exactly are exact in
 * float32, in which they are summed. That is no less accurate than products in float32. */
#include "tiles.h"
#ifdef TILES_MULTIPLY
#include <sys/syscall.h>
#include <unistd.h>

enum {
    KEPT = 1024, /* tiles of lines that stay in the second level beside weights: 1 MB */
    LINE = 32    /* numbers of a line of the cache */
};

/* Whether this process may multiply tiles. The kernel wants to be asked: a thread's state grows by 8 KB. */
int amx_ready(void) {
    enum { REQUEST = 0x1023, TILES = 18 };
    return syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
}

/* Tiles of lines have all parts of TOGETHER lines, side by side, so that few lines take few products. Of more than two such tiles, but
 * no more lines than a tile has, each has one part of them all: three products that share their weights. */
static int parts_apart(int64_t lines) { return lines > 2 * TOGETHER && lines <= SIDE; }

/* One of `lines` lines, x, taken apart. Inputs are filled up by zeros. Where there are factors, x is multiplied by scale and them. An
 * infinity leaves parts that are no numbers, and so do its products. */
void amx_take_apart(uint16_t *parts, const float *x, int64_t line, int64_t lines, int64_t in, float scale, const float *factors) {
    const int64_t deep = blocks_of(in, DEEP), apart = parts_apart(lines);
    const int64_t next = apart ? PARTS * TILE : TILE, part = apart ? TILE : DEEP; /* from one block of inputs, and one part, to the next */
    uint16_t *to = parts + (apart ? line * DEEP : line / TOGETHER * deep * TILE + line % TOGETHER * PARTS * DEEP);
    const __m512i top = _mm512_set1_epi32((int)0xffff0000);
    uint16_t upper[DEEP]; /* places of the upper halves of two vectors of float32 */
    for (int i = 0; i < DEEP; i++) upper[i] = (uint16_t)(2 * i + 1);
    const __m512i halves = _mm512_loadu_si512(upper);
    for (int64_t j = 0; j < deep; j++, to += next) {
        const int64_t at = j * DEEP, left = in - at;
        const uint32_t mask = left >= DEEP ? 0xffffffff : (1u << left) - 1;
        const __mmask16 low = (__mmask16)mask, high = (__mmask16)(mask >> 16);
        __m512 a = _mm512_maskz_loadu_ps(low, x + at), b = _mm512_maskz_loadu_ps(high, x + at + 16);
        if (factors) {
            a = a * scale * _mm512_maskz_loadu_ps(low, factors + at);
            b = b * scale * _mm512_maskz_loadu_ps(high, factors + at + 16);
        }
        for (int p = 0; p < PARTS; p++) {
            const __m512i a_top = _mm512_and_si512((__m512i)a, top), b_top = _mm512_and_si512((__m512i)b, top);
            _mm512_store_si512(to + p * part, _mm512_permutex2var_epi16(a_top, halves, b_top));
            a = _mm512_sub_ps(a, (__m512)a_top), b = _mm512_sub_ps(b, (__m512)b_top);
        }
    }
}

typedef float square[SIDE * SIDE];

/* Some lines, a pair of tiles of weights, and their products: sums[2 * a + b] of tile a of lines with weights b, or, where tiles have
 * one part each, sums[PARTS * b + p] of part p. */
typedef struct {
    const uint16_t *parts;
    int64_t line, lines, pair;
    square *sums;
} piece;

/* The sum of a line's parts, smallest first, `step` floats apart. */
INLINE lanes joined(const float *s, int64_t step) {
    return *(const lanes *)(s + 2 * step) + *(const lanes *)(s + step) + *(const lanes *)s;
}

/* What products become. Of layers without bias whose outputs fill their tiles nothing else needs to be looked at. */
typedef enum { ANY, SUMS, ADDED, GATED } kind;

static kind kind_of(const target *t) {
    if (t->bias || t->rows % (t->gated ? SIDE : 2 * SIDE) || (t->gated && t->add)) return ANY;
    return t->gated ? GATED : t->add ? ADDED : SUMS;
}

/* Writes the outputs of one line for one pair of tiles, one vector each. */
INLINE void write_pair(const target *t, const lanes first, const lanes second, int64_t line, int64_t pair, const kind k) {
    const int64_t at = line * t->rows + pair * (k == GATED ? 1 : 2) * LANES;
    lanes *out = (lanes *)(t->out + at);
    const lanes *add = (const lanes *)(t->add + at);
    if (k == ANY) write_line(t, (lanes[]){first, second}, line, pair);
    else if (k == GATED) *out = silu(first) * second;
    else out[0] = k == ADDED ? first + add[0] : first, out[1] = k == ADDED ? second + add[1] : second;
}

/* Writes lines [from, to) of a piece. */
INLINE void finish(const target *t, const piece *p, int64_t from, int64_t to, const int apart, const kind k) {
    enum { ALL = SIDE * SIDE };
    const int64_t step = apart ? ALL : SIDE, other = apart ? PARTS * ALL : ALL;
    for (int64_t i = from; i < to; i++) {
        const float *s = apart ? p->sums[0] + i * SIDE : p->sums[i / TOGETHER * 2] + i % TOGETHER * PARTS * SIDE;
        write_pair(t, joined(s, step), joined(s + other, step), p->line + i, p->pair, k);
    }
}

/* Writes lines of a piece from `done` on, a block's share of them. Returns those that are written then. */
INLINE int64_t finish_some(const target *t, const piece *p, int64_t done, int64_t deep, const int apart, const kind k) {
    const int64_t end = done + p->lines / deep + 1, to = end < p->lines ? end : p->lines;
    finish(t, p, done, to, apart, k);
    return to;
}

/* Block j of the inputs of a pair of tiles of weights, or of one of them, tile `b`. */
INLINE const uint16_t *tile_at(const uint16_t *weight, int64_t j, int64_t b) { return weight + (2 * j + b) * TILE; }

/* Of each block of the weights that come next, lines [from, to) of the cache. */
typedef struct {
    const uint16_t *weight;
    int64_t from, to;
} coming;

/* The products of a piece. The piece before, whose sums its own replace, is finished beside them: a processor that waited for its last
 * products would not get as far as the weights that come next, and nothing would fetch them. */
INLINE void multiply(const target *t, const piece *p, const piece *before, const uint16_t *weight, int64_t deep, coming next, const int two,
                     const kind k) {
    const uint16_t *parts = p->parts, *more = parts + deep * TILE;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int64_t j = 0, done = 0; j < deep; j++) {
        _tile_loadd(6, tile_at(weight, j, 0), 64);
        _tile_loadd(4, parts + j * TILE, 64); _tile_dpbf16ps(0, 4, 6);
        if (two) { _tile_loadd(5, more + j * TILE, 64); _tile_dpbf16ps(2, 5, 6); }
        _tile_loadd(7, tile_at(weight, j, 1), 64);
        _tile_dpbf16ps(1, 4, 7);
        if (two) _tile_dpbf16ps(3, 5, 7);
        for (int64_t l = next.from; l < next.to; l++) __builtin_prefetch(tile_at(next.weight, j, 0) + l * LINE, 0, 2);
        done = finish_some(t, before, done, deep, 0, k);
    }
    _tile_stored(0, p->sums[0], 64); _tile_stored(1, p->sums[1], 64);
    if (!two) return;
    _tile_stored(2, p->sums[2], 64); _tile_stored(3, p->sums[3], 64);
}

/* Block j of all lines, whose parts lie in tiles of their own, times tile b of the weights. */
#define MULTIPLY_PARTS(first, second, third, b)                                   \
    _tile_loadd(7, tile_at(weight, j, b), 64);                                    \
    _tile_loadd(6, parts + PARTS * j * TILE, 64); _tile_dpbf16ps(first, 6, 7);    \
    _tile_loadd(6, parts + (PARTS * j + 1) * TILE, 64); _tile_dpbf16ps(second, 6, 7); \
    _tile_loadd(6, parts + (PARTS * j + 2) * TILE, 64); _tile_dpbf16ps(third, 6, 7)

/* The same where tiles have one part each. Sums stay where they are while those of the next tile of weights are made, so that not even
 * their way to memory is waited for: `before` has those of its second tile there still. */
INLINE void multiply_apart(const target *t, const piece *p, const piece *before, const uint16_t *weight, int64_t deep, const kind k) {
    const uint16_t *parts = p->parts;
    _tile_zero(0); _tile_zero(1); _tile_zero(2);
    for (int64_t j = 0; j < deep; j++) {
        MULTIPLY_PARTS(0, 1, 2, 0);
        if (j == deep / 2) { _tile_stored(3, p->sums[3], 64); _tile_stored(4, p->sums[4], 64); _tile_stored(5, p->sums[5], 64); }
    }
    _tile_zero(3); _tile_zero(4); _tile_zero(5);
    for (int64_t j = 0, done = 0; j < deep; j++) {
        MULTIPLY_PARTS(3, 4, 5, 1);
        done = finish_some(t, before, done, deep, 1, k);
    }
    _tile_stored(0, p->sums[0], 64); _tile_stored(1, p->sums[1], 64); _tile_stored(2, p->sums[2], 64);
}

INLINE void multiply_all_apart(const target *t, const uint16_t *parts, int64_t lines, int64_t deep, const uint16_t *weight, share own,
                               const kind k) {
    square sums[2 * PARTS] __attribute__((aligned(64)));
    piece now = {parts, 0, 0, 0, sums};
    shape_tiles(lines, 7);
    _tile_zero(3); _tile_zero(4); _tile_zero(5);
    for (int64_t pair = own.begin; pair < own.end; pair++) {
        const piece before = now;
        now = (piece){parts, 0, lines, pair, sums};
        multiply_apart(t, &now, &before, weight + pair * deep * 2 * TILE, deep, k);
    }
    _tile_stored(3, sums[3], 64); _tile_stored(4, sums[4], 64); _tile_stored(5, sums[5], 64);
    finish(t, &now, 0, now.lines, 1, k);
}

/* As many lines at a time as stay in the second level for all weights. Beside the products of more than two tiles of lines, which read a
 * pair of weights several times, the next pair is fetched. (Beside those of fewer, prefetches only take room from loads.) */
INLINE void multiply_together(const target *t, const uint16_t *parts, int64_t lines, int64_t deep, const uint16_t *weight, share own,
                              const kind k) {
    const int64_t all = blocks_of(lines, TOGETHER), fit = KEPT / deep > 2 ? KEPT / deep / 2 * 2 : 2;
    square sums[4] __attribute__((aligned(64)));
    piece now = {0};
    shape_tiles(lines < TOGETHER ? PARTS * lines : SIDE, 6);
    for (int64_t first = 0; first < all; first += fit) {
        const int64_t end = all - first < fit ? all : first + fit, count = end - first, cached = count > 2 ? 2 * TILE / LINE : 0;
        for (int64_t pair = own.begin; pair < own.end; pair++)
            for (int64_t g = 0; g < count; g += 2) {
                const int64_t line = (first + g) * TOGETHER, left = lines - line, two = g + 1 < count, most = (1 + two) * TOGETHER;
                const uint16_t *w = weight + pair * deep * 2 * TILE;
                const coming next = {w + (pair + 1 < own.end) * deep * 2 * TILE, cached * g / count, cached * (g + 1 + two) / count};
                const piece before = now;
                now = (piece){parts + (first + g) * deep * TILE, line, left < most ? left : most, pair, sums};
                if (two) multiply(t, &now, &before, w, deep, next, 1, k);
                else multiply(t, &now, &before, w, deep, next, 0, k);
            }
    }
    finish(t, &now, 0, now.lines, 0, k);
}

INLINE void multiply_as(const target *t, const uint16_t *parts, int64_t lines, int64_t deep, const uint16_t *weight, share own, const kind k) {
    if (parts_apart(lines)) multiply_all_apart(t, parts, lines, deep, weight, own, k);
    else multiply_together(t, parts, lines, deep, weight, own, k);
}

/* `multiply_tiles` over lines that were taken apart. */
void amx_multiply(const target *t, const uint16_t *parts, int64_t lines, int64_t in, const uint16_t *weight, int64_t pairs) {
    const share own = share_of(pairs);
    const int64_t deep = blocks_of(in, DEEP);
    if (!lines) return; /* tiles have lines */
    switch (kind_of(t)) {
        case SUMS: multiply_as(t, parts, lines, deep, weight, own, SUMS); break;
        case ADDED: multiply_as(t, parts, lines, deep, weight, own, ADDED); break;
        case GATED: multiply_as(t, parts, lines, deep, weight, own, GATED); break;
        default: multiply_as(t, parts, lines, deep, weight, own, ANY);
    }
    _tile_release();
#pragma omp barrier
}
#else
int amx_ready(void) { return 0; }
void amx_take_apart(uint16_t *parts, const float *x, int64_t line, int64_t lines, int64_t in, float scale, const float *factors) {}
void amx_multiply(const target *t, const uint16_t *parts, int64_t lines, int64_t in, const uint16_t *weight, int64_t pairs) {}
#endif
