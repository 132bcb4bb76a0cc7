/* Attention over shared slots by products of tiles (see `parts.h`). While tiles are multiplied the processor makes the weights of one
 * block of lines, or takes the next slots apart. */
#include "grouped.h"
#include "parts.h"

#ifdef TILES_MULTIPLY
enum { BLOCKS = 8, SPAN = CHUNK / DEEP, GROUPS = 6, CHUNKS = 3 };

/* Slots of a chunk in parts: of keys, lines are slots; of values, elements. */
typedef struct {
    uint16_t *keys, *values;
} chunk;

/* A block and a chunk, with the weights of its slots in parts; `before` scales to the largest score so far what was summed before. */
typedef struct {
    side_by_side *lines;
    const chunk *slots;
    uint16_t *weights;
    lanes before[2];
} turn;

/* A thread's blocks of lines, and what is under way. */
struct blocks {
    side_by_side lines[BLOCKS];
    uint16_t *queries; /* of a block each, in parts */
    lanes *out;        /* [value_dim][lines] of a block each */
    chunk chunks[CHUNKS];
    /* What weights are being made of: so many of CHUNK units of them are made. */
    turn weighing;
    const lanes *from; /* scores */
    lanes top[2], sum[2];
    int64_t n, weighed;
    /* The chunk whose slots are being taken apart: so many of `steps` are done. */
    chunk *into;
    int64_t taken, steps, steps_a_group;
    /* Stretches of memory that are being fetched; of chunks, slots of the one that is taken apart next. */
    const float *fetched, *fetch_end;
    span next_keys, next_values;
    int64_t next_at;
    lanes scores[2][CHUNK * 2] __attribute__((aligned(64))), turned[BLOCK]; /* [slots][lines] */
    uint16_t weights[2][2 * SPAN * PARTS * TILE], memory[];
};

int64_t amx_lines_of(const task *a) {
    if (!tiles_are_used() || a->dim % DEEP || a->value_dim % DEEP) return 0;
    int64_t blocks = 0;
    for (int64_t i = 0; i < a->step->num_segments; i++)
        if (tiles_pay(a, a->step->segments[i]))
            blocks += a->kv_heads * blocks_of(a->step->segments[i].count * (a->heads / a->kv_heads), BLOCK);
    const int64_t each = blocks_of(blocks, omp_get_max_threads());
    return BLOCK * (each < BLOCKS ? each : BLOCKS);
}

/* Numbers of a chunk's keys or values, and of a block's queries, in parts. */
INLINE int64_t size_of_chunk(int64_t dim) { return CHUNK * dim * PARTS; }
INLINE int64_t size_of_queries(int64_t dim) { return BLOCK * dim * PARTS; }

size_t size_of_blocks(const task *a) {
    if (!a->amx_lines) return 0;
    const int64_t chunks = CHUNKS * (size_of_chunk(a->dim) + size_of_chunk(a->value_dim)), blocks = a->amx_lines / BLOCK;
    const int64_t numbers = chunks + blocks * size_of_queries(a->dim);
    return (sizeof(struct blocks) + sizeof(uint16_t) * numbers + sizeof(float) * a->amx_lines * a->value_dim + 63) / 64 * 64;
}

/* What is fetched next: own slots that are computed next, then slots that are taken apart next. */
static __attribute__((noinline)) void fetch_on(const task *a, scratch *s) {
    struct blocks *b = s->blocks;
    int64_t floats = INT64_MAX;
    b->fetched = own_stretch(a, s, &floats);
    if (!b->fetched) b->fetched = stretch(b->next_keys, b->next_values, &b->next_at, &floats);
    if (!b->fetched) b->fetched = s->copy, floats = 1 << 12;
    b->fetch_end = b->fetched + floats;
}

/* Has memory work while the processor does. Of four lines of the cache one is asked for: what lies beside it comes with it, or soon after,
 * and products, whose tiles come from the second level, need the room in which lines are waited for. */
INLINE void fetch_lines(const task *a, scratch *s) {
    enum { STRIDE = 4 * 16, ASKED = 4 };
    struct blocks *b = s->blocks;
    if (b->fetched >= b->fetch_end) fetch_on(a, s);
#pragma GCC unroll 4
    for (int i = 0; i < ASKED; i++) __builtin_prefetch(b->fetched + STRIDE * i, 0, 2);
    b->fetched += STRIDE * ASKED;
}

/* Steps of taking a chunk apart: four slots' keys each, then what `turn_values` does. */
INLINE int64_t steps_of(int64_t value_dim) { return CHUNK / 4 + 4 * SPAN * (value_dim / SIDE); }

INLINE void part_keys(scratch *s, int64_t i, const int64_t dim) {
    for (int64_t end = i + 4; i < end; i++)
        for (int64_t d = 0; d < dim; d += DEEP) {
            uint16_t *tile = s->blocks->into->keys + (i / SIDE * dim + d) / DEEP * PARTS * TILE + i % SIDE * DEEP;
            put_pairs(tile, *(const lanes *)(s->keys[i] + d), *(const lanes *)(s->keys[i] + d + SIDE));
        }
}

/* 16 elements of 32 slots' values become lines in four steps: one half of the slots, the other, one half of the lines, the other. */
INLINE void turn_values(scratch *s, int64_t step) {
    const int64_t i = step / 4 % SPAN, d = step / 4 / SPAN, half = step % 2;
    lanes *turned = s->blocks->turned;
    if (step % 4 < 2) {
        lanes rows[SIDE];
        for (int j = 0; j < SIDE; j++) rows[j] = *(const lanes *)(s->values[DEEP * i + SIDE * half + j] + SIDE * d);
        transpose(rows);
        for (int j = 0; j < SIDE; j++) turned[SIDE * half + j] = rows[j];
        return;
    }
    uint16_t *tile = s->blocks->into->values + (d * SPAN + i) * PARTS * TILE;
    for (int64_t j = SIDE / 2 * half; j < SIDE / 2 * (half + 1); j++) put_pairs(tile + j * DEEP, turned[j], turned[SIDE + j]);
}

/* So many more steps of taking the chunk apart whose slots `s` names. */
INLINE void part_some(scratch *s, int64_t steps, const int64_t dim) {
    struct blocks *b = s->blocks;
    for (; steps && b->taken < b->steps; steps--, b->taken++)
        if (b->taken < CHUNK / 4) part_keys(s, 4 * b->taken, dim);
        else turn_values(s, b->taken - CHUNK / 4);
}

/* Groups of products of a block's scores of a chunk, and of its weighted values. */
INLINE int64_t groups_of(int64_t dim) { return GROUPS * SPAN * (dim / BLOCK); }

/* Scores become weights over the largest so far, in parts, columns of which are lines: so many more units, a vector of lines and two
 * slots each. */
INLINE void weigh_some(struct blocks *b, int64_t units) {
    for (; units && b->weighed < CHUNK; units--, b->weighed++) {
        const int64_t v = b->weighed % 2, k = b->weighed / DEEP, pair = b->weighed / 2 % SIDE, i = DEEP * k + pair;
        const lanes first = i < b->n ? exp_of_negative(b->from[2 * i + v] - b->top[v]) : (lanes){0};
        const lanes second = i + SIDE < b->n ? exp_of_negative(b->from[2 * (i + SIDE) + v] - b->top[v]) : (lanes){0};
        b->sum[v] += first;
        b->sum[v] += second;
        put_pairs(b->weighing.weights + (v * SPAN + k) * PARTS * TILE + pair * DEEP, first, second);
    }
}

/* Scores of n slots of a block are there. */
INLINE void begin_weights(struct blocks *b, side_by_side *lines, const chunk *slots, const lanes *scores, int64_t n) {
    b->weighing.lines = lines, b->weighing.slots = slots;
    b->weighing.weights = b->weights[b->weighing.weights == b->weights[0]];
    for (int v = 0; v < 2; v++) {
        lanes top = lines->top[v];
        for (int64_t i = 0; i < n; i++) top = larger(scores[2 * i + v], top);
        b->weighing.before[v] = exp_of_negative(lines->top[v] - top);
        b->top[v] = lines->top[v] = top;
        b->sum[v] = (lanes){0};
    }
    b->from = scores, b->n = n, b->weighed = 0;
}

INLINE turn end_weights(struct blocks *b) {
    const turn t = b->weighing;
    weigh_some(b, CHUNK);
    for (int v = 0; v < 2; v++) t.lines->sum[v] = t.lines->sum[v] * t.before[v] + b->sum[v];
    return t;
}

/* Scores of a block and of a chunk of n slots, beside the last third of another block's weights, and the taking apart of another chunk. */
INLINE void score_block(const task *a, scratch *s, const chunk *c, lanes *scores, const uint16_t *queries, int64_t n, const int64_t dim) {
    struct blocks *b = s->blocks;
    const int64_t deep = dim / DEEP, units = (CHUNK / 3 + groups_of(dim)) / groups_of(dim);
    for (int64_t j = 0; j < n; j += BLOCK) {
#define BESIDE_SCORES weigh_some(b, units); part_some(s, b->steps_a_group, dim); fetch_lines(a, s)
        MULTIPLY(scores + 2 * j, c->keys + j * dim * PARTS, queries, deep, BESIDE_SCORES);
    }
}

/* Weighted values of a chunk are added to what has come of a block, beside the first two thirds of another block's weights. */
INLINE void add_block(const task *a, scratch *s, const turn *t, const int64_t value_dim) {
    struct blocks *b = s->blocks;
    const int64_t units = (2 * CHUNK / 3 + groups_of(value_dim)) / groups_of(value_dim);
    lanes sums[2 * BLOCK], *out = b->out + (t->lines - b->lines) * 2 * value_dim;
    for (int64_t d = 0; d < value_dim; d += BLOCK, out += 2 * BLOCK) {
#define BESIDE_VALUES weigh_some(b, units); fetch_lines(a, s)
        MULTIPLY(sums, t->slots->values + d * CHUNK * PARTS, t->weights, SPAN, BESIDE_VALUES);
        for (int64_t j = 0; j < BLOCK; j++)
            for (int v = 0; v < 2; v++) out[2 * j + v] = out[2 * j + v] * t->before[v] + sums[2 * j + v];
    }
}

/* Chunk `index` of the slots of keys and values is to be taken apart next, if there is one. */
INLINE void begin_chunk(scratch *s, span keys, span values, int64_t index, int64_t blocks) {
    struct blocks *b = s->blocks;
    const int64_t t = keys.begin + index * CHUNK, groups = blocks * groups_of(keys.dim);
    b->into = b->chunks + index % CHUNKS;
    b->taken = 0, b->steps = t < keys.end ? steps_of(values.dim) : 0, b->steps_a_group = (b->steps + groups - 1) / groups;
    b->next_keys = chunk_of(keys, t + CHUNK), b->next_values = chunk_of(values, t + CHUNK), b->next_at = 0;
    if (!b->steps) return;
    find_slots(s->keys, chunk_of(keys, t));
    find_slots(s->values, chunk_of(values, t));
}

/* All blocks over all chunks. A block's weights are made beside the values of the block before and the scores of the one behind. */
INLINE void attend_chunks(const task *a, scratch *s, int64_t blocks, span keys, span values, const int64_t dim, const int64_t value_dim) {
    struct blocks *b = s->blocks;
    int64_t turns = 0;
    begin_chunk(s, keys, values, 0, blocks);
    for (int64_t c = 0, t = keys.begin; t < keys.end; c++, t += CHUNK) {
        const int64_t n = keys.end - t < CHUNK ? keys.end - t : CHUNK;
        const chunk *slots = b->chunks + c % CHUNKS;
        part_some(s, b->steps, dim);
        begin_chunk(s, keys, values, c + 1, blocks);
        for (int64_t i = 0; i < blocks; i++) {
            if (b->lines[i].any_sees <= t) continue;
            lanes *scores = b->scores[turns % 2];
            score_block(a, s, slots, scores, b->queries + i * size_of_queries(dim), n, dim);
            if (a->softcap > 0) cap_chunk(scores, n, a->softcap, 2);
            hide_chunk(scores, b->lines + i, n, t, 2);
            const turn last = turns ? end_weights(b) : b->weighing;
            begin_weights(b, b->lines + i, slots, scores, n);
            if (turns++) add_block(a, s, &last, value_dim);
        }
        for (int i = 0; i < 2; i++) own_item(a, s);
    }
    if (!turns) return;
    const turn last = end_weights(b);
    add_block(a, s, &last, value_dim);
}

INLINE void attend_all(const task *a, scratch *s, segment g, int64_t head, int64_t first, int64_t count, const int64_t dim,
                       const int64_t value_dim) {
    struct blocks *b = s->blocks;
    const int64_t blocks = blocks_of(count, BLOCK), keys_size = size_of_chunk(dim), size = keys_size + size_of_chunk(value_dim);
    for (int i = 0; i < CHUNKS; i++) b->chunks[i] = (chunk){b->memory + i * size, b->memory + i * size + keys_size};
    b->queries = b->memory + CHUNKS * size;
    b->out = (lanes *)(b->queries + a->amx_lines / BLOCK * size_of_queries(dim));
    b->fetched = b->fetch_end = 0;
    b->weighed = CHUNK;
    memset(b->out, 0, blocks * 2 * value_dim * sizeof(lanes));
    int64_t end = 0;
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t left = count - i * BLOCK;
        uint16_t *queries = b->queries + i * size_of_queries(dim);
        gather_lines(b->lines + i, a, g, head, first + i * BLOCK, left < BLOCK ? left : BLOCK);
        if (b->lines[i].any_sees > end) end = b->lines[i].any_sees;
        lay_lines(s->query, b->lines[i].queries, a->scale, dim, 2);
        for (int64_t d = 0; d < dim; d += d % SIDE == SIDE - 1 ? SIDE + 1 : 1)
            for (int v = 0; v < 2; v++)
                put_pairs(queries + (v * dim + d) / DEEP * PARTS * TILE + d % SIDE * DEEP, s->query[2 * d + v], s->query[2 * (d + SIDE) + v]);
    }
    g.end = end;
    shape_tiles(SIDE, 6);
    attend_chunks(a, s, blocks, segment_slots(a, a->keys, g, head, dim), segment_slots(a, a->values, g, head, value_dim), dim, value_dim);
    _tile_release();
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t left = count - i * BLOCK;
        write_parts(b->lines + i, b->out + i * 2 * value_dim, left < BLOCK ? left : BLOCK, value_dim, 2);
    }
}

void attend_blocks(const task *a, scratch *s, segment g, int64_t head, int64_t first, int64_t count) {
    if (a->dim == 64 && a->value_dim == 64) attend_all(a, s, g, head, first, count, 64, 64);
    else if (a->dim == 128 && a->value_dim == 128) attend_all(a, s, g, head, first, count, 128, 128);
    else attend_all(a, s, g, head, first, count, a->dim, a->value_dim);
}
#else
int64_t amx_lines_of(const task *a) { return 0; }
size_t size_of_blocks(const task *a) { return 0; }
void attend_blocks(const task *a, scratch *s, segment g, int64_t head, int64_t first, int64_t count) {}
#endif
