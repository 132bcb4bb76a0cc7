/* Weights in tiles of bfloat16: what `tiles.c` and `amx.c` share. */
#pragma once
#include "blocks.h"
#include "lanes.h"

enum {
    SIDE = 16,              /* outputs of a tile */
    DEEP = 32,              /* inputs of a tile */
    TILE = SIDE * DEEP,     /* numbers of a tile: 1 KB */
    PARTS = 3,              /* of a number */
    TOGETHER = SIDE / PARTS /* lines whose parts share a tile, of which they leave a line free */
};

INLINE int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

/* Where products go; see `multiply_tiles`. */
typedef struct {
    float *out;
    const float *bias, *add;
    int64_t rows;
    int gated;
} target;

/* Vectors of a tile's outputs, and of a pair's. */
enum { WIDE = SIDE / LANES, PAIR = 2 * WIDE };

/* One output of each lane from `row` on, of which so many are left. */
INLINE void put(const target *t, lanes sum, int64_t at, int64_t row, int64_t left) {
    for (int i = 0; i < LANES && i < left; i++) t->out[at + i] = sum[i] + (t->bias ? t->bias[row + i] : 0) + (t->add ? t->add[at + i] : 0);
}

/* Writes the outputs of one line for one pair of tiles, sums [PAIR]. */
INLINE void write_line(const target *t, const lanes *sums, int64_t line, int64_t pair) {
    if (t->gated)
        for (int64_t v = 0, row = pair * SIDE; v < WIDE && row < t->rows; v++, row += LANES) {
            const float *bias = t->bias;
            lanes gate = sums[v], up = sums[WIDE + v], out;
            if (bias && t->rows - row >= LANES) gate += *(const lanes *)(bias + row), up += *(const lanes *)(bias + t->rows + row);
            else if (bias)
                for (int i = 0; i < LANES && row + i < t->rows; i++) gate[i] += bias[row + i], up[i] += bias[t->rows + row + i];
            out = silu(gate) * up;
            if (t->rows - row >= LANES) *(lanes *)(t->out + line * t->rows + row) = out;
            else
                for (int i = 0; row + i < t->rows; i++) t->out[line * t->rows + row + i] = out[i];
        }
    else
        for (int64_t v = 0, row = pair * 2 * SIDE; v < PAIR && row < t->rows; v++, row += LANES) {
            const int64_t at = line * t->rows + row;
            if (t->rows - row < LANES) {
                put(t, sums[v], at, row, t->rows - row);
                continue;
            }
            lanes sum = sums[v];
            if (t->bias) sum += *(const lanes *)(t->bias + row);
            if (t->add) sum += *(const lanes *)(t->add + at);
            *(lanes *)(t->out + at) = sum;
        }
}

int amx_ready(void);
void amx_take_apart(uint16_t *parts, const float *x, int64_t x_line, int64_t lines, int64_t in);
void amx_multiply(const target *t, const uint16_t *parts, int64_t lines, int64_t in, const uint16_t *weight, int64_t pairs);
