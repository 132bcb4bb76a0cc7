/* Weights in tiles of bfloat16: what `tiles.c` and `amx.c` share. */
#pragma once
#include "blocks.h"
#include "lanes.h"

enum {
    SIDE = 16,              /* outputs of a tile */
    DEEP = 32,              /* inputs of a tile */
    TILE = SIDE * DEEP,     /* numbers of a tile: 1 KB */
    PARTS = 3               /* of a number */
};

INLINE int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

/* What a thread does: pairs of tiles, of the same layer always the same ones, or lines. */
typedef struct {
    int64_t begin, end;
} share;

INLINE share share_of(int64_t all) {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    return (share){all * thread / threads, all * (thread + 1) / threads};
}

/* Where products go; see `multiply_tiles`. */
typedef struct {
    float *out;
    const float *bias, *add;
    int64_t rows;
    int gated;
} target;

/* Vectors of a tile's outputs, and of a pair's. */
enum { WIDE = SIDE / LANES, PAIR = 2 * WIDE };

/* Up to `left` numbers; zeros behind them. */
INLINE lanes taken(const float *from, int64_t left) {
    if (left >= LANES) return *(const lanes *)from;
    lanes x = {0};
    for (int i = 0; i < left; i++) x[i] = from[i];
    return x;
}

INLINE void put(float *to, lanes x, int64_t left) {
    if (left >= LANES) *(lanes *)to = x;
    else
        for (int i = 0; i < left; i++) to[i] = x[i];
}

/* A sum with the bias of its outputs. Held: a compiler might add up what comes later first, here and not elsewhere. */
INLINE lanes biased(lanes sum, const float *bias, int64_t row, int64_t left) {
    if (bias) sum += taken(bias + row, left);
    HELD(sum);
    return sum;
}

/* Writes the outputs of one line for one pair of tiles, sums [PAIR]. */
INLINE void write_line(const target *t, const lanes *sums, int64_t line, int64_t pair) {
    const int64_t count = t->gated ? WIDE : PAIR;
    for (int64_t v = 0, row = pair * count * LANES; v < count && row < t->rows; v++, row += LANES) {
        const int64_t at = line * t->rows + row, left = t->rows - row;
        lanes sum = biased(sums[v], t->bias, row, left);
        if (t->gated) sum = silu(sum) * biased(sums[WIDE + v], t->bias, t->rows + row, left);
        if (t->add) sum += taken(t->add + at, left);
        put(t->out + at, sum, left);
    }
}

#if defined __AMX_BF16__ && defined __AVX512BW__
#define TILES_MULTIPLY
typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t lines[16];
} shapes;

/* Tiles from `right` on are what lies on the right of a product, those before it sums and what lies on the left, of so many lines. */
INLINE void shape_tiles(int64_t lines, int64_t right) {
    shapes s __attribute__((aligned(64))) = {.palette = 1};
    for (int i = 0; i < 8; i++) s.bytes[i] = 64, s.lines[i] = i < right ? (uint8_t)lines : SIDE;
    __asm__ volatile("" : : "r"(&s) : "memory"); /* compilers know of the first 8 bytes alone that they are read */
    _tile_loadconfig(&s);
}
#endif

int tiles_are_used(void);
int amx_ready(void);
int64_t amx_lines(int64_t lines);
void amx_take_apart(uint16_t *parts, const float *x, int64_t line, int64_t lines, int64_t in, float scale, const float *factors);
void amx_multiply(const target *t, const uint16_t *parts, int64_t lines, int64_t in, const uint16_t *weight, share own);
