/* Products with weights that bfloat16 holds exactly, as a checkpoint's own are after they were read into float32: half the memory
 * to read, and a processor that multiplies tiles of bfloat16 (AMX) computes them for several lines in the time of one.
 *
 * A float32 number is the sum of three bfloat16 numbers of eight bits each, so lines are taken apart into three, whose products
 * with the weights are exact in float32, where they are summed: no less accurate than products in float32. Each sum is made in
 * the same order however many lines there are. */
#include "blocks.h"
#include "lanes.h"
#include <string.h>

enum {
    SIDE = 16,       /* outputs of a tile of weights */
    DEEP = 32,       /* inputs of a tile */
    TILE = 16 * 32,  /* numbers of a tile: 1 KB */
    PARTS = 3,       /* of a number */
    TOGETHER = 5,    /* lines whose parts share a tile, of which they leave a line free */
};

static int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

/* Numbers that `tile_weights` writes for a layer of so many outputs and inputs: outputs are filled up to pairs of tiles. */
int64_t tiled_size(int64_t rows, int64_t in) { return blocks_of(rows, 2 * SIDE) * blocks_of(in, DEEP) * 2 * TILE; }

/* weight [rows, in], contiguous, becomes lines [offset, offset + rows) of tiles, which were zeros. In a tile, inputs 2i and 2i + 1
 * of all 16 outputs lie side by side. Of layers that take turns, spread is how many, and turn which. Returns 0 where a weight is
 * none of bfloat16, else 1. */
int tile_weights(uint16_t *out, const float *weight, int64_t rows, int64_t in, int64_t offset, int64_t spread, int64_t turn) {
    const int64_t deep = blocks_of(in, DEEP);
    int exact = 1;
#pragma omp parallel for schedule(static) reduction(&& : exact) if (rows * in > 16384)
    for (int64_t block = offset / SIDE; block < blocks_of(offset + rows, SIDE); block++) {
        const int64_t at = block * spread + turn;
        uint32_t low = 0;
        for (int64_t l = 0; l < SIDE; l++) {
            const int64_t r = block * SIDE + l - offset;
            uint16_t *tile = out + (at / 2 * deep * 2 + at % 2) * TILE + 2 * l;
            for (int64_t i = 0; i < in && r >= 0 && r < rows; i++) {
                uint32_t bits;
                memcpy(&bits, weight + r * in + i, sizeof bits);
                low |= bits & 0xffff;
                tile[i / DEEP * 2 * TILE + i % DEEP / 2 * DEEP + i % 2] = (uint16_t)(bits >> 16);
            }
        }
        exact = exact && !low;
    }
    return exact;
}

/* Bytes of so many lines, taken apart. */
size_t size_of_parts(int64_t lines, int64_t in) {
    return sizeof(uint16_t) * (size_t)(blocks_of(lines, TOGETHER) * blocks_of(in, DEEP) * TILE);
}

#if defined __AMX_BF16__ && defined __AVX512BW__
#include <sys/syscall.h>
#include <unistd.h>

/* Whether this process may multiply tiles: the kernel wants to be asked, since a thread's state grows by 8 KB. */
int tiles_ready(void) {
    enum { REQUEST = 0x1023, TILES = 18 };
    static int ready = -1;
    if (ready < 0) ready = syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
    return ready;
}

/* Lines of x, taken apart by the threads of a team: part p of line l is line l % TOGETHER * PARTS + p of its tiles. Inputs are
 * filled up by zeros. An infinity leaves parts that are no numbers, and so do its products. */
void take_apart(uint16_t *parts, const float *x, int64_t x_line, int64_t lines, int64_t in) {
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

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t lines[16];
} shapes;

/* Tiles 0 to 3 are sums, 4 and 5 parts of lines, 6 and 7 weights. */
static void shape_tiles(int64_t lines) {
    shapes s __attribute__((aligned(64))) = {.palette = 1};
    for (int i = 0; i < 8; i++) s.bytes[i] = 64, s.lines[i] = i < 6 && lines < TOGETHER ? (uint8_t)(PARTS * lines) : SIDE;
    _tile_loadconfig(&s);
}

/* sums[2 * a + b]: products of lines a (of one or two tiles) with weights b (of two), 16 x 16. Fetches its part of the weights
 * that come next. */
INLINE void multiply(float (*sums)[SIDE * SIDE], const uint16_t *parts, const uint16_t *weight, int64_t deep, int64_t pass,
                     int64_t passes, const int two) {
    const uint16_t *more = parts + deep * TILE;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int64_t j = 0, turn = pass; j < deep; j++, turn = turn ? turn - 1 : passes - 1) {
        const uint16_t *w = weight + j * 2 * TILE;
        if (!turn)
#pragma GCC unroll 32
            for (int i = 0; i < 2 * TILE; i += 32) __builtin_prefetch(w + deep * 2 * TILE + i, 0, 2);
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

typedef struct {
    float *out;
    const float *bias, *add;
    int64_t lines, rows;
} target;

/* The sum of a line's parts, smallest first. */
INLINE __m512 joined(const float *sums, int64_t line) {
    const float *s = sums + line * PARTS * SIDE;
    return _mm512_load_ps(s + 2 * SIDE) + _mm512_load_ps(s + SIDE) + _mm512_load_ps(s);
}

INLINE __mmask16 present(int64_t left) { return left >= SIDE ? 0xffff : left > 0 ? (1 << left) - 1 : 0; }

/* Writes outputs [row, row + 32) of the lines of one tile. */
INLINE void write_linear(const target *t, float (*sums)[SIDE * SIDE], int64_t line, int64_t row) {
    for (int64_t l = 0; l < TOGETHER && line + l < t->lines; l++)
        for (int b = 0; b < 2; b++) {
            const __mmask16 mask = present(t->rows - row - b * SIDE);
            const int64_t at = (line + l) * t->rows + row + b * SIDE;
            __m512 sum = joined(sums[b], l);
            if (t->bias) sum += _mm512_maskz_loadu_ps(mask, t->bias + row + b * SIDE);
            if (t->add) sum += _mm512_maskz_loadu_ps(mask, t->add + at);
            _mm512_mask_storeu_ps(t->out + at, mask, sum);
        }
}

/* Writes silu(gate) * up for 16 of each, which are the two tiles of a pair. bias: of all gates, then of all ups. */
INLINE void write_gated(const target *t, float (*sums)[SIDE * SIDE], int64_t line, int64_t row) {
    const __mmask16 mask = present(t->rows - row);
    for (int64_t l = 0; l < TOGETHER && line + l < t->lines; l++) {
        __m512 gate = joined(sums[0], l), up = joined(sums[1], l);
        if (t->bias) {
            gate += _mm512_maskz_loadu_ps(mask, t->bias + row);
            up += _mm512_maskz_loadu_ps(mask, t->bias + t->rows + row);
        }
        _mm512_mask_storeu_ps(t->out + (line + l) * t->rows + row, mask, (__m512)silu((lanes)gate) * up);
    }
}

/* Products of `lines` lines, taken apart, with the tiles of a layer, by the threads of a team: out [lines, rows] is their sum with
 * the bias and `add`, of the shape of out, where there are such. If gated, gates and ups of a layer take turns as tiles, and out is
 * silu(gate) * up; the bias is that of all gates, then of all ups. */
void multiply_tiles(float *out, const uint16_t *parts, int64_t lines, int64_t in, const float *add, layer a, int gated) {
    const target t = {out, a.bias, add, lines, a.rows};
    const int64_t deep = blocks_of(in, DEEP), groups = blocks_of(lines, TOGETHER), passes = (groups + 1) / 2;
    float sums[4][SIDE * SIDE] __attribute__((aligned(64)));
    shape_tiles(lines);
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < blocks_of(a.rows, gated ? SIDE : 2 * SIDE); pair++)
        for (int64_t g = 0; g < groups; g += 2) {
            const uint16_t *w = (const uint16_t *)a.weight + pair * deep * 2 * TILE, *p = parts + g * deep * TILE;
            const int two = g + 1 < groups;
            if (two) multiply(sums, p, w, deep, g / 2, passes, 1);
            else multiply(sums, p, w, deep, g / 2, passes, 0);
            for (int64_t i = 0; i <= two; i++)
                if (gated) write_gated(&t, sums + 2 * i, (g + i) * TOGETHER, pair * SIDE);
                else write_linear(&t, sums + 2 * i, (g + i) * TOGETHER, pair * 2 * SIDE);
        }
    _tile_release();
}
#else
int tiles_ready(void) { return 0; }
void take_apart(uint16_t *parts, const float *x, int64_t x_line, int64_t lines, int64_t in) {}
void multiply_tiles(float *out, const uint16_t *parts, int64_t lines, int64_t in, const float *add, layer a, int gated) {}
#endif

/* out [lines, rows]: see `multiply_tiles`, of x [lines, in], lines x_line floats apart. Returns 0, or 1 where memory ran out. */
int tile_linear(float *out, const float *x, int64_t x_line, int64_t lines, int64_t in, const float *add, const uint16_t *weight,
                const float *bias, int64_t rows, int gated) {
    const layer a = {weight, bias, rows};
    uint16_t *parts = whole_lines(size_of_parts(lines, in));
    if (!parts) return 1;
#pragma omp parallel if (rows * in > 8192)
    {
        take_apart(parts, x, x_line, lines, in);
        multiply_tiles(out, parts, lines, in, add, a, gated);
    }
    free(parts);
    return 0;
}
