/* Products of tiles of bfloat16 by a processor that has them (AMX). A float32 number is the sum of three bfloat16 numbers of eight
 * bits each: lines are taken apart so, and the products of their parts with weights that bfloat16 holds exactly are exact in
 * float32, in which they are summed. That is no less accurate than products in float32. */
#include "tiles.h"
#ifdef TILES_MULTIPLY
#include <sys/syscall.h>
#include <unistd.h>

enum {
    KEPT = 1024,       /* tiles of lines that stay in the second level beside weights: 1 MB */
    LINE = 32,         /* numbers of a line of the cache */
    STACKED = SIDE / 2 /* lines that are stacked */
};

/* Whether this process may multiply tiles. The kernel wants to be asked: a thread's state grows by 8 KB. */
int amx_ready(void) {
    enum { REQUEST = 0x1023, TILES = 18 };
    return syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
}

/* Up to STACKED lines lie in two tiles a block of inputs: above the second parts the first, the largest, and above the third ones zeros.
 * So one sum of tiles has all, and few tiles are read (loads of tiles, however small, fill a processor's room for loads, and it gets less
 * far ahead). More lines lie in groups of up to SIDE, all of about as many, each part in a tile. Either way first parts have one sum, and
 * the others, in turns, have another. */
static int64_t group_of(int64_t lines) { return blocks_of(lines, blocks_of(lines, SIDE)); }

/* Lines of a block that `lines` lines become, at most; never fewer than of fewer lines. */
int64_t amx_lines(int64_t lines) {
    const int64_t stacked = 4 * (lines < STACKED ? lines : STACKED), grouped = PARTS * (lines + blocks_of(lines, SIDE));
    return stacked > grouped ? stacked : grouped;
}

/* One of `lines` lines, x, taken apart. Inputs are filled up by zeros. Where there are factors, x is multiplied by scale and them. An
 * infinity leaves parts that are no numbers, and so do its products. */
void amx_take_apart(uint16_t *parts, const float *x, int64_t line, int64_t lines, int64_t in, float scale, const float *factors) {
    const int64_t deep = blocks_of(in, DEEP), group = group_of(lines), stacked = lines <= STACKED, part = group * DEEP;
    const int64_t block = (PARTS + stacked) * part;
    uint16_t *to = parts + line / group * deep * block + line % group * DEEP;
    const __m512i top = _mm512_set1_epi32((int)0xffff0000);
    uint16_t upper[DEEP]; /* places of the upper halves of two vectors of float32 */
    for (int i = 0; i < DEEP; i++) upper[i] = (uint16_t)(2 * i + 1);
    const __m512i halves = _mm512_loadu_si512(upper);
    for (int64_t j = 0; j < deep; j++, to += block) {
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
            _mm512_store_si512(to + (p < 2 ? p : p + stacked) * part, _mm512_permutex2var_epi16(a_top, halves, b_top));
            a = _mm512_sub_ps(a, (__m512)a_top), b = _mm512_sub_ps(b, (__m512)b_top);
        }
        if (stacked) _mm512_store_si512(to + 2 * part, _mm512_setzero_si512());
    }
}

typedef float square[SIDE * SIDE];

/* Some lines, one pair of tiles of weights or two, and their sums: those of first parts, and `other` floats behind them those of the
 * others. A line and a pair are a unit of what is to be written. */
typedef struct {
    const uint16_t *parts;
    int64_t line, lines, pair, units, other;
    square *sums;
} piece;

/* Both sums of a line. Held: a compiler might add something else to one of them first. */
INLINE lanes joined(const float *s, int64_t other) {
    lanes sum = *(const lanes *)(s + other) + *(const lanes *)s;
    HELD(sum);
    return sum;
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
    if (k == ANY) write_line(t, (lanes[]){first, second}, line, pair);
    else if (k == GATED) *out = silu(first) * second;
    else if (k == SUMS) out[0] = first, out[1] = second;
    else {
        const lanes *add = (const lanes *)(t->add + at);
        out[0] = first + add[0], out[1] = second + add[1];
    }
}

/* Writes units [from, to) of a piece. */
INLINE void finish(const target *t, const piece *p, int64_t from, int64_t to, const kind k) {
    for (int64_t i = from; i < to; i++) {
        const int64_t second = i >= p->lines, line = second ? i - p->lines : i;
        const float *s = p->sums[2 * second] + line * SIDE;
        write_pair(t, joined(s, p->other), joined(s + SIDE * SIDE, p->other), p->line + line, p->pair + second, k);
    }
}

/* Beside block j of `deep`, from the middle on, when sums have long been stored: writes units of a piece from `done` on, the block's share
 * of them. Returns those that are written then. */
INLINE int64_t finish_some(const target *t, const piece *p, int64_t done, int64_t j, int64_t deep, const kind k) {
    const int64_t middle = deep / 2, end = done + p->units / (deep - middle) + 1, to = end < p->units ? end : p->units;
    if (j < middle) return done;
    finish(t, p, done, to, k);
    return to;
}

/* Block j of the inputs of a pair of tiles of weights, or of one of them, tile `b`. */
INLINE const uint16_t *tile_at(const uint16_t *weight, int64_t j, int64_t b) { return weight + (2 * j + b) * TILE; }

/* Of each block of the weights that come next, lines [from, to) of the cache, of which a processor fetches two at a time. */
typedef struct {
    const uint16_t *weight;
    int64_t from, to;
} coming;

/* The products of a group with a pair of weights, where a part is so many numbers. The piece before, whose sums its own replace, is
 * finished beside them: a processor that waited for its last products would not get as far as the weights that come next, and nothing
 * would fetch them. */
INLINE void multiply_group(const target *t, const piece *p, const piece *before, const uint16_t *weight, int64_t deep, int64_t part,
                           coming next, const kind k) {
    const uint16_t *x = p->parts;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int64_t j = 0, done = 0; j < deep; j++, x += PARTS * part) {
        _tile_loadd(6, tile_at(weight, j, 0), 64);
        _tile_loadd(4, x, 64); _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, tile_at(weight, j, 1), 64); _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, x + part, 64); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(4, x + 2 * part, 64); _tile_dpbf16ps(2, 4, 6); _tile_dpbf16ps(3, 4, 7);
        for (int64_t l = next.from; l < next.to; l += 2) __builtin_prefetch(tile_at(next.weight, j, 0) + l * LINE, 0, 2);
        done = finish_some(t, before, done, j, deep, k);
    }
    _tile_stored(0, p->sums[0], 64); _tile_stored(1, p->sums[1], 64);
    _tile_stored(2, p->sums[2], 64); _tile_stored(3, p->sums[3], 64);
}

/* As many lines at a time as stay in the second level for all weights. Beside the products of several groups, which read a pair of weights
 * several times, the next pair is fetched. (Beside those of one, prefetches only take room from loads.) */
INLINE void multiply_groups(const target *t, const uint16_t *parts, int64_t lines, int64_t deep, const uint16_t *weight, share own,
                            const kind k) {
    const int64_t group = group_of(lines), all = blocks_of(lines, group), fit = KEPT / deep > PARTS ? KEPT / deep / PARTS : 1;
    square sums[4] __attribute__((aligned(64)));
    piece now = {0};
    shape_tiles(group, 6);
    for (int64_t first = 0; first < all; first += fit) {
        const int64_t count = all - first < fit ? all - first : fit, cached = count > 1 ? 2 * TILE / LINE : 0;
        for (int64_t pair = own.begin; pair < own.end; pair++)
            for (int64_t g = 0; g < count; g++) {
                const int64_t line = (first + g) * group, left = lines - line, there = left < group ? left : group;
                const uint16_t *w = weight + pair * deep * 2 * TILE;
                const coming next = {w + (pair + 1 < own.end) * deep * 2 * TILE, cached * g / count, cached * (g + 1) / count};
                const piece before = now;
                now = (piece){parts + line * deep * PARTS * DEEP, line, there, pair, there, 2 * SIDE * SIDE, sums};
                multiply_group(t, &now, &before, w, deep, group * DEEP, next, k);
            }
    }
    finish(t, &now, 0, now.units, k);
}

/* The same of stacked lines, with a pair of weights, or with two of them. */
INLINE void multiply_stack(const target *t, const piece *p, const piece *before, const uint16_t *weight, int64_t deep, const int two,
                           const kind k) {
    const uint16_t *x = p->parts, *more = weight + deep * 2 * TILE;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int64_t j = 0, done = 0; j < deep; j++, x += 4 * p->lines * DEEP) {
        _tile_loadd(4, x, 64);
        _tile_loadd(6, tile_at(weight, j, 0), 64); _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, x + 2 * p->lines * DEEP, 64); _tile_dpbf16ps(0, 5, 6);
        _tile_loadd(7, tile_at(weight, j, 1), 64); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(1, 5, 7);
        if (two) {
            _tile_loadd(6, tile_at(more, j, 0), 64); _tile_dpbf16ps(2, 4, 6); _tile_dpbf16ps(2, 5, 6);
            _tile_loadd(7, tile_at(more, j, 1), 64); _tile_dpbf16ps(3, 4, 7); _tile_dpbf16ps(3, 5, 7);
        }
        done = finish_some(t, before, done, j, deep, k);
    }
    _tile_stored(0, p->sums[0], 64); _tile_stored(1, p->sums[1], 64);
    if (!two) return;
    _tile_stored(2, p->sums[2], 64); _tile_stored(3, p->sums[3], 64);
}

INLINE void multiply_stacked(const target *t, const uint16_t *parts, int64_t lines, int64_t deep, const uint16_t *weight, share own,
                             const kind k) {
    square sums[4] __attribute__((aligned(64)));
    piece now = {0};
    shape_tiles(2 * lines, 6);
    for (int64_t pair = own.begin; pair < own.end; pair += 2) {
        const int64_t two = pair + 1 < own.end;
        const uint16_t *w = weight + pair * deep * 2 * TILE;
        const piece before = now;
        now = (piece){parts, 0, lines, pair, (1 + two) * lines, lines * SIDE, sums};
        if (two) multiply_stack(t, &now, &before, w, deep, 1, k);
        else multiply_stack(t, &now, &before, w, deep, 0, k);
    }
    finish(t, &now, 0, now.units, k);
}

INLINE void multiply_as(const target *t, const uint16_t *parts, int64_t lines, int64_t deep, const uint16_t *weight, share own, const kind k) {
    if (lines <= STACKED) multiply_stacked(t, parts, lines, deep, weight, own, k);
    else multiply_groups(t, parts, lines, deep, weight, own, k);
}

/* Products of lines that were taken apart with a thread's own pairs of tiles. */
void amx_multiply(const target *t, const uint16_t *parts, int64_t lines, int64_t in, const uint16_t *weight, share own) {
    const int64_t deep = blocks_of(in, DEEP);
    if (!lines) return; /* tiles have lines */
    switch (kind_of(t)) {
        case SUMS: multiply_as(t, parts, lines, deep, weight, own, SUMS); break;
        case ADDED: multiply_as(t, parts, lines, deep, weight, own, ADDED); break;
        case GATED: multiply_as(t, parts, lines, deep, weight, own, GATED); break;
        default: multiply_as(t, parts, lines, deep, weight, own, ANY);
    }
    _tile_release();
}
#else
int amx_ready(void) { return 0; }
int64_t amx_lines(int64_t lines) { return 0; }
void amx_take_apart(uint16_t *parts, const float *x, int64_t line, int64_t lines, int64_t in, float scale, const float *factors) {}
void amx_multiply(const target *t, const uint16_t *parts, int64_t lines, int64_t in, const uint16_t *weight, share own) {}
#endif
