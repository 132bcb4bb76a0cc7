/* Attention where queries share slots: each stretch of slots that many queries see is read once for all of them, and the
 * parts of a query are merged by log-sum-exp (see `groups.py`). Float32. */
#include "attention.h"
#include <stdlib.h>
#include <string.h>

enum { WIDE = 3, CHUNK = 64, KEYS = 8 }; /* vectors of queries side by side; slots at a time; of these, in registers */

/* Slots [begin, end) of a line of the table, which members [first, first + count) see. */
typedef struct {
    int64_t line, begin, end, first, count;
} segment;

typedef struct {
    const float *query, *keys, *values, *sinks;
    const int64_t *table, *line_of, *context, *own, *members, *part_start, *parts;
    const segment *segments;
    tree tree;
    int64_t query_line, table_width, heads, kv_heads, dim, value_dim, page;
    float scale, softcap;
} task;

typedef struct {
    lanes *query, *out, *scores, top[WIDE], sum[WIDE]; /* [dim][wide], [value_dim][wide], [CHUNK][wide] */
    float *copy;                                       /* [KEYS][dim] */
    const float *keys[CHUNK], *values[CHUNK];          /* of a chunk; past its end the last one again */
} scratch;

/* Where slots [t, t + n) of a line lie. */
INLINE void find_slots(const float **slots, const task *a, const float *pages, int64_t line, int64_t head, int64_t dim,
                       int64_t t, int64_t n) {
    for (int64_t i = 0; i < n;) {
        const int64_t at = (t + i) % a->page, page = a->table[line * a->table_width + (t + i) / a->page];
        const float *slot = pages + ((page * a->kv_heads + head) * a->page + at) * dim;
        for (int64_t end = i + a->page - at; i < end && i < n; i++, slot += dim) slots[i] = slot;
    }
    for (int64_t i = n; i < CHUNK; i++) slots[i] = slots[n - 1];
}

INLINE void fetch_slots(const float *const *slots, int64_t dim) {
    for (int j = 0; j < KEYS; j++) fetch(slots[j], dim);
}

/* Products of all lines with KEYS keys that lie one after another. */
INLINE void score_keys(lanes *scores, const lanes *query, const float *keys, const int64_t dim, const int wide) {
    lanes sums[KEYS][WIDE] = {0};
    for (int64_t d = 0; d < dim; d++)
#pragma GCC unroll 8
        for (int j = 0; j < KEYS; j++)
#pragma GCC unroll 3
            for (int v = 0; v < wide; v++) sums[j][v] += query[wide * d + v] * keys[j * dim + d];
#pragma GCC unroll 8
    for (int j = 0; j < KEYS; j++)
#pragma GCC unroll 3
        for (int v = 0; v < wide; v++) scores[wide * j + v] = sums[j][v];
}

/* Products of all lines with the slots of a chunk. */
INLINE void score_chunk(scratch *s, int64_t n, const int64_t dim, const int wide) {
    for (int64_t i = 0; i < n; i += KEYS) {
        const float *keys = s->keys[i];
        fetch_slots(s->values + i, dim);
        /* Keys of one page lie one after another. Others are laid so: eight pointers would take the registers. */
        int apart = 0;
        for (int64_t j = 1; j < KEYS; j++) apart |= s->keys[i + j] != keys + j * dim;
        if (apart) {
            for (int64_t j = 0; j < KEYS; j++) memcpy(s->copy + j * dim, s->keys[i + j], sizeof(float) * dim);
            keys = s->copy;
        }
        score_keys(s->scores + wide * i, s->query, keys, dim, wide);
    }
}

/* Scores become weights over the largest so far; what was summed before is scaled to it. */
INLINE void weigh_chunk(scratch *s, int64_t n, float softcap, const int64_t value_dim, const int wide) {
    for (int v = 0; v < wide; v++) {
        lanes *score = s->scores + v, top = s->top[v], sum = {0};
        if (softcap > 0)
            for (int64_t i = 0; i < n; i++)
                for (int l = 0; l < 16; l++) score[wide * i][l] = softcap * tanhf(score[wide * i][l] / softcap);
        for (int64_t i = 0; i < n; i++) top = choose(score[wide * i] > top, score[wide * i], top);
        const lanes before = exp_of_negative(s->top[v] - top);
        for (int64_t i = 0; i < n; i++) sum += score[wide * i] = exp_of_negative(score[wide * i] - top);
        s->sum[v] = s->sum[v] * before + sum;
        s->top[v] = top;
        for (int64_t d = 0; d < value_dim; d++) s->out[wide * d + v] *= before;
    }
}

/* Adds the weighted values of a chunk, elements [d, d + width) of them. */
INLINE void add_chunk(scratch *s, int64_t n, int64_t d, const int width, const int wide) {
    lanes sums[KEYS][WIDE], *out = s->out + wide * d;
    const lanes *weight = s->scores;
#pragma GCC unroll 8
    for (int j = 0; j < width; j++)
#pragma GCC unroll 3
        for (int v = 0; v < wide; v++) sums[j][v] = out[wide * j + v];
    for (int64_t i = 0; i < n; i++, weight += wide) {
        const float *value = s->values[i] + d;
#pragma GCC unroll 8
        for (int j = 0; j < width; j++)
#pragma GCC unroll 3
            for (int v = 0; v < wide; v++) sums[j][v] += weight[v] * value[j];
    }
#pragma GCC unroll 8
    for (int j = 0; j < width; j++)
#pragma GCC unroll 3
        for (int v = 0; v < wide; v++) out[wide * j + v] = sums[j][v];
}

/* One segment, KV head and lines from `first` on; a line is a member's query head. parts: [members, heads, value_dim + 2]. */
INLINE void attend_lines(float *parts, const task *a, scratch *s, segment g, int64_t head, int64_t first, const int64_t dim,
                         const int64_t value_dim, const int wide) {
    const int64_t group = a->heads / a->kv_heads, left = g.count * group - first, width = 16 * wide;
    const int64_t lines = left < width ? left : width;
    memset(s->query, 0, dim * wide * sizeof(lanes));
    memset(s->out, 0, value_dim * wide * sizeof(lanes));
    for (int v = 0; v < wide; v++) s->sum[v] = (lanes){0}, s->top[v] = (lanes){0} - INFINITY;
    for (int64_t l = 0; l < lines; l++) {
        const int64_t member = a->members[g.first + (first + l) / group], h = head * group + (first + l) % group;
        const float *query = a->query + member * a->query_line + h * dim;
        for (int64_t d = 0; d < dim; d++) ((float *)s->query)[d * width + l] = query[d] * a->scale;
    }
    find_slots(s->keys, a, a->keys, g.line, head, dim, g.begin, g.end - g.begin < CHUNK ? g.end - g.begin : CHUNK);
    for (int64_t t = g.begin, n, next; t < g.end; t += CHUNK) {
        n = g.end - t < CHUNK ? g.end - t : CHUNK;
        find_slots(s->values, a, a->values, g.line, head, value_dim, t, n);
        score_chunk(s, n, dim, wide);
        weigh_chunk(s, n, a->softcap, value_dim, wide);
        next = g.end - t - n < CHUNK ? g.end - t - n : CHUNK;
        if (next) find_slots(s->keys, a, a->keys, g.line, head, dim, t + n, next);
        int64_t d = 0;
        for (; d + KEYS <= value_dim; d += KEYS) { /* keys of the next chunk are on their way meanwhile */
            fetch_slots(s->keys + d * CHUNK / value_dim / KEYS * KEYS, dim);
            add_chunk(s, n, d, KEYS, wide);
        }
        for (; d < value_dim; d++) add_chunk(s, n, d, 1, wide);
    }
    for (int64_t l = 0; l < lines; l++) {
        float *part = parts + ((g.first + (first + l) / group) * a->heads + head * group + (first + l) % group) * (value_dim + 2);
        for (int64_t d = 0; d < value_dim; d++) part[d] = ((float *)s->out)[d * width + l];
        part[value_dim] = ((float *)s->top)[l];
        part[value_dim + 1] = ((float *)s->sum)[l];
    }
}

INLINE void attend_segment(float *parts, const task *a, scratch *s, segment g, int64_t head, int64_t first, const int64_t dim,
                           const int64_t value_dim) {
    const int64_t left = g.count * (a->heads / a->kv_heads) - first;
    if (left > 32) attend_lines(parts, a, s, g, head, first, dim, value_dim, 3);
    else if (left > 16) attend_lines(parts, a, s, g, head, first, dim, value_dim, 2);
    else attend_lines(parts, a, s, g, head, first, dim, value_dim, 1);
}

/* out: weighted values of one query head over its own slots, not normalised; merged with its parts. */
INLINE void merge(float *out, const float *parts, const task *a, int64_t row, int64_t head, float top, float sum) {
    const int64_t dim = a->value_dim, width = dim + 2, begin = a->part_start[row], end = a->part_start[row + 1];
    float most = a->sinks && a->sinks[head] > top ? a->sinks[head] : top, all;
    for (int64_t p = begin; p < end; p++) {
        const float other = parts[(a->parts[p] * a->heads + head) * width + dim];
        most = other > most ? other : most;
    }
    const float own = expf(top - most);
    all = sum * own + (a->sinks ? expf(a->sinks[head] - most) : 0);
    for (int64_t d = 0; d < dim; d++) out[d] *= own;
    for (int64_t p = begin; p < end; p++) {
        const float *part = parts + (a->parts[p] * a->heads + head) * width, weight = expf(part[dim] - most);
        all += part[dim + 1] * weight;
        for (int64_t d = 0; d < dim; d++) out[d] += part[d] * weight;
    }
    for (int64_t d = 0; d < dim; d++) out[d] /= all;
}

INLINE span own_slots(const task *a, const float *pages, int64_t item, int64_t dim) {
    const int64_t row = item / a->kv_heads;
    return (span){pages, a->table + a->line_of[row] * a->table_width, a->own[row], a->context[row], item % a->kv_heads,
                  a->kv_heads, a->page, dim};
}

/* Item `row * kv_heads + head`: one query and KV head over its own slots, merged with its parts. */
INLINE void attend_own(float *out, float *scores, int64_t stride, const float *parts, const task *a, int64_t item, int64_t then,
                       const int64_t group, const int64_t dim, const int64_t value_dim) {
    const int64_t row = item / a->kv_heads, head = item % a->kv_heads * group;
    const span keys = own_slots(a, a->keys, item, dim), values = own_slots(a, a->values, item, value_dim);
    float sums[group], tops[group];
    out += (row * a->heads + head) * value_dim;
    score_slots(scores, stride, a->query + row * a->query_line + head * dim, keys, values, group, a->scale, dim);
    const float softcap = hide(scores, stride, keys, a->tree, row, group, a->softcap);
    for (int64_t g = 0; g < group; g++)
        tops[g] = exponentials(scores + g * stride, keys.end - keys.begin, softcap, -INFINITY, sums + g);
    sum_values(out, scores, stride, values, own_slots(a, a->keys, then, dim), group, value_dim);
    for (int64_t g = 0; g < group; g++) merge(out + g * value_dim, parts, a, row, head + g, tops[g], sums[g]);
}

#define BY_DIM(CALL) \
    if (dim == 64 && value_dim == 64) { CALL(64, 64); } \
    else if (dim == 128 && value_dim == 128) { CALL(128, 128); } \
    else { CALL(dim, value_dim); }

/* query: [rows, heads, dim], rows query_line floats apart; out: [rows, heads, value_dim]. Query r sees slots [own[r],
 * context[r]) of line line_of[r] of table, and those of the segments that it is a member of: its places among the members
 * are parts[part_start[r], part_start[r + 1]); visible and base as in `tree`. Returns 0, or 1 where memory ran out. */
int grouped_attention(float *out, const float *query, int64_t query_line, const float *keys, const float *values,
                      const int64_t *table, int64_t table_width, const int64_t *line_of, const int64_t *context, int64_t rows,
                      int64_t heads, int64_t kv_heads, int64_t dim, int64_t value_dim, int64_t page, float scale,
                      float softcap, const float *sinks, const int64_t *own, const segment *segments, int64_t num_segments,
                      const int64_t *members, int64_t num_members, const int64_t *part_start, const int64_t *parts,
                      const int64_t *visible, const int64_t *base) {
    const task a = {query, keys, values, sinks, table, line_of, context, own, members, part_start, parts, segments, {visible, base},
                    query_line, table_width, heads, kv_heads, dim, value_dim, page, scale, softcap};
    const int64_t group = heads / kv_heads;
    float *partial = malloc(sizeof(float) * (size_t)(num_members * heads * (value_dim + 2)));
    int64_t *items = malloc(sizeof(int64_t) * (size_t)(num_segments + 1)), taken = 0, taken_own = 0, longest = 0;
    int failed = !partial || !items;
    if (!failed) items[0] = 0;
    for (int64_t i = 0; i < num_segments && !failed; i++)
        items[i + 1] = items[i] + kv_heads * ((segments[i].count * group + 16 * WIDE - 1) / (16 * WIDE));
    for (int64_t r = 0; r < rows; r++) longest = context[r] - own[r] > longest ? context[r] - own[r] : longest;
    const int64_t stride = (longest + 31) / 16 * 16;
#pragma omp parallel
    {
        scratch s;
        const size_t wide = 16 * WIDE * sizeof(float), own_floats = (size_t)(group * stride);
        char *memory = aligned_alloc(64, (wide * (dim + value_dim + CHUNK) + sizeof(float) * (KEYS * dim + own_floats) + 63) / 64 * 64);
        if (!memory) failed = 1;
        s.query = (lanes *)memory;
        s.out = (lanes *)(memory + wide * dim);
        s.scores = (lanes *)(memory + wide * (dim + value_dim));
        s.copy = (float *)(memory + wide * (dim + value_dim + CHUNK));
        float *scores = s.copy + KEYS * dim;
#pragma omp barrier
        if (!failed) {
            for (int64_t at = 0;;) {
                int64_t item;
#pragma omp atomic capture
                item = taken++;
                if (item >= items[num_segments]) break;
                while (items[at + 1] <= item) at++;
                const int64_t within = item - items[at], blocks = (items[at + 1] - items[at]) / kv_heads;
#define SEGMENT(D, V) attend_segment(partial, &a, &s, segments[at], within / blocks, within % blocks * 16 * WIDE, D, V)
                BY_DIM(SEGMENT)
            }
        }
#pragma omp barrier
        int64_t item, after;
#pragma omp atomic capture
        item = taken_own++;
        for (; !failed && item < rows * kv_heads; item = after) { /* the next item is known, so that memory is on its way */
#pragma omp atomic capture
            after = taken_own++;
            const int64_t then = after < rows * kv_heads ? after : item;
#define OWN(G, D, V) attend_own(out, scores, stride, partial, &a, item, then, G, D, V)
            if (dim == 64 && value_dim == 64 && group == 3) OWN(3, 64, 64);
            else if (dim == 64 && value_dim == 64 && group == 4) OWN(4, 64, 64);
            else if (dim == 128 && value_dim == 128 && group == 4) OWN(4, 128, 128);
            else OWN(group, dim, value_dim);
        }
        free(memory);
    }
    free(partial);
    free(items);
    return failed;
}
