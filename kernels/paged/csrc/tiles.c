/* Products with weights that bfloat16 holds exactly, as those of a checkpoint are that was read into float32: half the memory to
 * read, and on some processors tiles are multiplied for several lines in the time of one (`amx.c`). Each sum is made in the same
 * order however many lines there are. */
#include "tiles.h"
#include <string.h>

static int amx; /* whether tiles are multiplied as such */

/* As such if that is wanted and can be. */
int tiles_by_amx(int wanted) { return amx = wanted && amx_ready(); }

int tiles_are_used(void) { return amx; }

/* Pairs of tiles that outputs are filled up to: of gates and ups, that many outputs each, a pair has one of each. */
static int64_t pairs_of(int64_t rows, int64_t gated) { return blocks_of(rows, gated ? SIDE : 2 * SIDE); }

/* Numbers of the tiles of a layer of so many outputs and inputs. */
int64_t tiled_size(int64_t rows, int64_t in, int64_t gated) { return pairs_of(rows, gated) * blocks_of(in, DEEP) * 2 * TILE; }

/* Two numbers side by side, in bfloat16; `low` gathers the bits that it does not hold. */
INLINE uint32_t pair_of(const float *weight, int64_t left, uint32_t *low) {
    uint32_t bits[2] = {0};
    memcpy(bits, weight, sizeof(float) * (size_t)(left < 2 ? left : 2));
    *low |= bits[0] | bits[1];
    return bits[0] >> 16 | (bits[1] & 0xffff0000);
}

/* `count` lines of a tile, which it begins with, of inputs [i, i + DEEP); from: the first of them. */
static void fill_tile(uint16_t *tile, const float *from, int64_t count, int64_t i, int64_t in, uint32_t *low) {
    typedef uint32_t __attribute__((may_alias)) two;
    uint32_t pairs[SIDE][DEEP / 2];
    for (int64_t l = 0; l < count; l++)
        if (i + DEEP <= in)
            for (int64_t p = 0; p < DEEP / 2; p++) pairs[l][p] = pair_of(from + l * in + i + 2 * p, 2, low);
        else
            for (int64_t p = 0; p < DEEP / 2; p++) pairs[l][p] = i + 2 * p < in ? pair_of(from + l * in + i + 2 * p, in - i - 2 * p, low) : 0;
    for (int64_t p = 0; p < DEEP / 2; p++)
        for (int64_t l = 0; l < count; l++) ((two *)tile)[p * SIDE + l] = pairs[l][p];
}

/* weight [rows, in], contiguous, becomes lines [offset, offset + rows) of tiles, which were zeros. In a tile, inputs 2i and 2i + 1
 * of all 16 outputs lie side by side. Of layers that take turns, spread is how many, and turn which. Returns 0 where a weight is
 * none of bfloat16, else 1. */
int tile_weights(uint16_t *out, const float *weight, int64_t rows, int64_t in, int64_t offset, int64_t spread, int64_t turn) {
    const int64_t deep = blocks_of(in, DEEP);
    uint32_t low = 0;
#pragma omp parallel for schedule(static) reduction(| : low) if (rows * in > 16384)
    for (int64_t block = offset / SIDE; block < blocks_of(offset + rows, SIDE); block++) {
        const int64_t at = block * spread + turn, first = block * SIDE > offset ? block * SIDE : offset;
        const int64_t end = block * SIDE + SIDE, last = end < offset + rows ? end : offset + rows;
        uint16_t *tiles = out + (at / 2 * deep * 2 + at % 2) * TILE + first % SIDE * 2;
        for (int64_t j = 0; j < deep; j++)
            fill_tile(tiles + j * 2 * TILE, weight + (first - offset) * in, last - first, j * DEEP, in, &low);
    }
    return !(low & 0xffff);
}

/* Bytes of so many lines as products take them. */
static size_t size_of_lines(int64_t lines, int64_t in) {
    const int64_t deep = blocks_of(in, DEEP);
    return amx ? sizeof(uint16_t) * (size_t)(amx_lines(lines) * deep * DEEP) : sizeof(float) * (size_t)(lines * deep * DEEP);
}

/* Every thread takes all of up to OWN lines apart for itself, up to COPIES in all: to read what another one wrote takes longer. Of many
 * threads each would write more than its products read. */
enum { OWN = 2 * SIDE, COPIES = 4 * SIDE };

/* Of so many lines that each thread has a tile about full of its own, these are shared out and not weights: all that becomes of a line
 * stays with one thread, and nobody waits for the others. To read what another one wrote takes longer than to read all weights, unless
 * there are too many of them: so many `outputs` of an input, on average over what a line goes through. */
int by_lines(int64_t lines, int64_t outputs) {
    enum { LEAST = SIDE * 3 / 4, OUTPUTS = 24 }; /* measured on two cores: models of 14M and 440M numbers */
    return omp_get_num_threads() > 1 && lines >= LEAST * omp_get_num_threads() && OUTPUTS * lines >= outputs;
}

/* Bytes that `take_apart` writes of up to so many lines, by a team of any size. */
size_t size_of_parts(int64_t lines, int64_t in) {
    const size_t shared = size_of_lines(lines + blocks_of(lines, 4), in), all = size_of_lines(1, in) * COPIES;
    const size_t each = size_of_lines(lines < OWN ? lines : OWN, in) * (size_t)omp_get_max_threads(), own = each < all ? each : all;
    return shared > own ? shared : own;
}

/* One of `lines` lines. */
static __attribute__((noinline)) void take_line(void *parts, const float *x, int64_t line, int64_t lines, int64_t in, const float *norm,
                                                float eps) {
    const int64_t filled = blocks_of(in, DEEP) * DEEP;
    const float scale = norm ? norm_scale(x, eps, in) : 1;
    if (amx) {
        amx_take_apart(parts, x, line, lines, in, scale, norm);
        return;
    }
    float *to = (float *)parts + line * filled;
    if (norm)
        for (int64_t i = 0; i < in; i++) to[i] = x[i] * scale * norm[i];
    else memcpy(to, x, sizeof(float) * (size_t)in);
    for (int64_t i = in; i < filled; i++) to[i] = 0;
}

/* Lines of x, normed if there is a norm, as `multiply_tiles` takes them; called by every thread of a team, when x is there, or its own
 * lines of it where they work `by_lines`. Returns where the caller finds them in `room`, in which up to `widest` inputs are taken apart.
 * Others may still read x: products go elsewhere. Inputs are filled up by zeros. */
void *take_apart(void *room, const float *x, int64_t x_line, int64_t lines, int64_t in, int64_t widest, int64_t outputs, const float *norm, float eps) {
    if (by_lines(lines, outputs)) {
        const share own = share_of(lines);
        void *parts = (char *)room + size_of_lines(blocks_of(lines, omp_get_num_threads()), widest) * (size_t)omp_get_thread_num();
        for (int64_t l = own.begin; l < own.end; l++) take_line(parts, x + l * x_line, l - own.begin, own.end - own.begin, in, norm, eps);
        return parts;
    }
    if (lines <= OWN && lines * omp_get_num_threads() <= COPIES) {
        void *parts = (char *)room + size_of_lines(lines, in) * (size_t)omp_get_thread_num();
        for (int64_t l = 0; l < lines; l++) take_line(parts, x + l * x_line, l, lines, in, norm, eps);
        return parts;
    }
#pragma omp for schedule(static)
    for (int64_t l = 0; l < lines; l++) take_line(room, x + l * x_line, l, lines, in, norm, eps);
    return room;
}

/* Lines at a time, whose sums registers hold beside what is added to them; and vectors of a pair of tiles at a time: where registers
 * hold both, a number of a line is read once for the two. (To read one takes as long as two products.) */
enum { MANY = REGISTERS * 3 / 4 / PAIR > 0 ? REGISTERS * 3 / 4 / PAIR : 1, ONCE = PAIR == 2 ? 2 : 1 };

/* Adds the products of two inputs of some lines, x `stride` floats apart, and ONCE vectors of outputs from vector v on. */
INLINE void add_inputs(lanes *sums, const float *x, int64_t stride, const uint16_t *weight, const int v, const int lines) {
    lanes even[ONCE], odd[ONCE];
#pragma GCC unroll 2
    for (int o = 0; o < ONCE; o++) {
        const ints both = (ints) * (const bits *)(weight + (v + o) / WIDE * TILE + (v + o) % WIDE * LANES * 2);
        even[o] = (lanes)(both << 16), odd[o] = (lanes)(both & (int32_t)0xffff0000);
        HELD(even[o]);
        HELD(odd[o]);
    }
#pragma GCC unroll 12
    for (int m = 0; m < lines; m++) {
        if (ONCE == 1) {
            sums[PAIR * m + v] += even[0] * x[m * stride];
            sums[PAIR * m + v] += odd[0] * x[m * stride + 1];
            continue;
        }
        lanes first = (lanes){0} + x[m * stride], second = (lanes){0} + x[m * stride + 1];
        HELD(first);
        HELD(second);
#pragma GCC unroll 2
        for (int o = 0; o < ONCE; o++) sums[PAIR * m + v + o] += even[o] * first;
#pragma GCC unroll 2
        for (int o = 0; o < ONCE; o++) sums[PAIR * m + v + o] += odd[o] * second;
    }
}

/* sums[PAIR * m + v]: products of line m of x with the outputs of vector v of a pair of tiles. Fetches its part of the weights that
 * come next. */
INLINE void multiply_floats(lanes *sums, const float *x, const uint16_t *weight, const uint16_t *next, int64_t deep, int64_t pass,
                            int64_t passes, const int lines) {
    lanes kept[MANY * PAIR] = {0};
    for (int64_t j = 0, turn = pass; j < deep; j++, turn = turn ? turn - 1 : passes - 1)
        for (int64_t i = 0; i < DEEP; i += 2) {
            const int64_t at_weight = j * 2 * TILE + i * SIDE;
            const uint16_t *coming = next + at_weight;
            if (!turn) __builtin_prefetch(coming, 0, 2), __builtin_prefetch(coming + TILE, 0, 2);
#pragma GCC unroll 8
            for (int v = 0; v < PAIR; v += ONCE) add_inputs(kept, x + j * DEEP + i, deep * DEEP, weight + at_weight, v, lines);
        }
    for (int i = 0; i < PAIR * lines; i++) sums[i] = kept[i];
}

/* `multiply_tiles` in float32. */
static void multiply_all(const target *t, const float *x, int64_t lines, int64_t in, const uint16_t *weight, share own,
                         const uint16_t *then) {
    /* About as many lines in each pass: of a few alone, to read weights takes longer than their products. */
    const int64_t deep = blocks_of(in, DEEP), passes = blocks_of(lines, MANY), most = lines ? blocks_of(lines, passes) : 0;
    for (int64_t pair = own.begin; pair < own.end; pair++)
        for (int64_t first = 0; first < lines; first += most) {
            const float *from = x + first * deep * DEEP;
            const uint16_t *w = weight + pair * deep * 2 * TILE, *next = pair + 1 < own.end ? w + deep * 2 * TILE : then;
            const int64_t count = lines - first < most ? lines - first : most, pass = first / most;
            lanes sums[MANY * PAIR];
#define OF(N) else if (count == N && N < MANY) multiply_floats(sums, from, w, next, deep, pass, passes, N < MANY ? N : MANY)
            if (count == MANY) multiply_floats(sums, from, w, next, deep, pass, passes, MANY);
            OF(1); OF(2); OF(3); OF(4); OF(5); OF(6); OF(7); OF(8); OF(9); OF(10); OF(11);
            for (int64_t m = 0; m < count; m++) write_line(t, sums + PAIR * m, first + m, pair);
        }
}

/* The first weights that the calling thread reads of a layer. */
const void *first_tiles(layer a, int64_t in, int gated) {
    return (const uint16_t *)a.weight + share_of(pairs_of(a.rows, gated)).begin * blocks_of(in, DEEP) * 2 * TILE;
}

/* Products of `lines` lines, see `take_apart`, with the tiles of a layer, by the threads of a team: out [lines, rows] is their sum
 * with the bias and `add`, of the shape of out, where there are such. If gated, gates and ups of a layer take turns as tiles, and out
 * is silu(gate) * up; the bias is that of all gates, then of all ups. `then`: weights that the thread reads next, in another call (AMX does
 * without). */
void multiply_tiles(float *out, const void *parts, int64_t lines, int64_t in, int64_t outputs, const float *add, layer a, int gated,
                    const void *then) {
    const int alone = by_lines(lines, outputs);
    const int64_t pairs = pairs_of(a.rows, gated);
    const share own = alone ? share_of(lines) : (share){0, lines}, weights = alone ? (share){0, pairs} : share_of(pairs);
    const target t = {out + own.begin * a.rows, a.bias, add ? add + own.begin * a.rows : 0, a.rows, gated};
    if (amx) amx_multiply(&t, parts, own.end - own.begin, in, a.weight, weights);
    else multiply_all(&t, parts, own.end - own.begin, in, a.weight, weights, then);
    if (alone) return;
#pragma omp barrier
}

/* The same of x [lines, in], lines x_line floats apart. Returns 0, or 1 where memory ran out. */
int tile_linear(float *out, const float *x, int64_t x_line, int64_t lines, int64_t in, const float *add, const uint16_t *weight,
                const float *bias, int64_t rows, int gated) {
    const layer a = {weight, bias, rows};
    if (!lines) return 0;
    void *room = whole_lines(size_of_parts(lines, in));
    if (!room) return 1;
#pragma omp parallel if (rows * in > 8192)
    multiply_tiles(out, take_apart(room, x, x_line, lines, in, in, rows, 0, 0), lines, in, rows, add, a, gated, weight);
    free(room);
    return 0;
}
