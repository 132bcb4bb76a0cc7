/* Attention where queries share slots: what `grouped.c` and `grouped_amx.c` have in common. */
#pragma once
#include "attention.h"
#include "blocks.h"
#include <string.h>

/* Vectors of queries side by side; slots at a time; of these, in registers: VECTORS * KEYS sums, and what is added to them. */
enum { VECTORS = 3, CHUNK = 64, KEYS = REGISTERS / 4, LINES = LANES * VECTORS, OWNS = 3 };

typedef struct grouped_task {
    const step *step;
    const float *query, *keys, *values, *sinks;
    int64_t query_line, heads, kv_heads, dim, value_dim, page;
    float scale, softcap;
    int64_t stride; /* of the scores of a row's own slots */
    int64_t *taken; /* items that threads have taken: of segments, and of rows' own slots */
    float *out, *partial, *own_tops; /* [rows, heads, value_dim]; [members, heads, value_dim + 2]; [rows, heads, 2] */
    int64_t *items;    /* items before each segment, and in all */
    int64_t amx_lines; /* of an item whose products are those of tiles */
    int *failed;
} task;

/* Lines that are computed side by side: query heads of a segment's members, which share a KV head. */
typedef struct {
    const float *queries[LINES]; /* null: there is no such line */
    float *parts[LINES];         /* where what comes of them goes */
    lanes top[VECTORS], sum[VECTORS], before[VECTORS];
    ints limit[VECTORS];        /* slots that each sees */
    int64_t all_see, any_sees; /* slots that all of them see, and one of them at least */
} side_by_side;

typedef struct {
    lanes *query, *out, *scores; /* [dim][wide], [value_dim][wide], [CHUNK][wide] */
    side_by_side lines;
    float *copy, *own_scores;                 /* [KEYS][dim]; [group][stride] */
    int64_t owns[OWNS], coming, at;           /* own slots that come next; those that are being fetched, and how many of them are */
    const float *keys[CHUNK], *values[CHUNK]; /* of a chunk; past its end the last one again */
    struct blocks *blocks;                    /* of grouped_amx.c */
} scratch;

/* Where the slots of a chunk lie. */
INLINE void find_slots(const float **slots, span s) {
    const int64_t n = s.end - s.begin;
    for (int64_t i = 0; i < n;) {
        const float *at = slot(s, s.begin + i);
        for (int64_t end = i + s.page - (s.begin + i) % s.page; i < end && i < n; i++, at += s.dim) slots[i] = at;
    }
    for (int64_t i = n; i < CHUNK; i++) slots[i] = slots[n - 1];
}

INLINE span segment_slots(const task *a, const float *pages, segment g, int64_t head, int64_t dim) {
    return (span){pages, a->step->table + g.line * a->step->table_width, g.begin, g.end, head, a->kv_heads, a->page, dim};
}

/* Of a span the chunk from t on. */
INLINE span chunk_of(span s, int64_t t) {
    s.begin = t, s.end = t + CHUNK < s.end ? t + CHUNK : s.end;
    return s;
}

INLINE span own_slots(const task *a, const float *pages, int64_t item, int64_t dim) {
    const step *s = a->step;
    const int64_t row = item / a->kv_heads;
    return (span){pages, s->table + s->line_of[row] * s->table_width, s->own[row], s->context[row], item % a->kv_heads,
                  a->kv_heads, a->page, dim};
}

/* Where the next stretch lies of what is to be fetched of keys, then of values, of which `at` slots are on their way: `floats` of them
 * at most, and as many as lie one after another. Null where all are. */
INLINE const float *stretch(span keys, span values, int64_t *at, int64_t *floats) {
    const int64_t count = keys.end - keys.begin, in_values = *at >= count, t = keys.begin + *at - (in_values ? count : 0);
    const span of = in_values ? values : keys;
    if (t >= of.end) return 0;
    const int64_t left = of.end - t, room = of.page - t % of.page, n = room < left ? room : left, fit = *floats / of.dim;
    const int64_t taken = fit > n ? n : fit > 1 ? fit : 1;
    *at += taken;
    *floats = taken * of.dim;
    return slot(of, t);
}

/* The same of the own slots that are computed next: `floats` may have become fewer. */
INLINE const float *own_stretch(const task *a, scratch *s, int64_t *floats) {
    const int64_t all = a->step->rows * a->kv_heads;
    for (; s->coming < OWNS && s->owns[s->coming] < all; s->coming++, s->at = 0) {
        const int64_t item = s->owns[s->coming], most = *floats;
        const float *from = stretch(own_slots(a, a->keys, item, a->dim), own_slots(a, a->values, item, a->value_dim), &s->at, floats);
        if (from) return from;
        *floats = most;
    }
    return 0;
}

INLINE void cap_chunk(lanes *scores, int64_t n, float softcap, const int wide) {
    for (int64_t i = 0; i < wide * n; i++)
        for (int l = 0; l < LANES; l++) scores[i][l] = softcap * tanhf(scores[i][l] / softcap);
}

/* Slots of a chunk that begins at slot t are hidden from lines that do not see so far. */
INLINE void hide_chunk(lanes *scores, const side_by_side *lines, int64_t n, int64_t t, const int wide) {
    for (int64_t i = lines->all_see > t ? lines->all_see - t : 0; i < n; i++)
        for (int v = 0; v < wide; v++) {
            lanes *score = scores + wide * i + v;
            *score = choose(lines->limit[v] > (ints){0} + (int32_t)(t + i), *score, (lanes){0} - INFINITY);
        }
}

/* Lines of `dim` floats, null for one that is not there, side by side: [dim][wide]. */
INLINE void lay_lines(lanes *out, const float *const *lines, float scale, const int64_t dim, const int wide) {
    if (dim % LANES) {
        for (int64_t l = 0; l < LANES * wide; l++)
            for (int64_t d = 0; d < dim; d++) ((float *)out)[d * LANES * wide + l] = lines[l] ? lines[l][d] * scale : 0;
        return;
    }
    for (int v = 0; v < wide; v++)
        for (int64_t d = 0; d < dim; d += LANES) {
            lanes rows[LANES];
            for (int l = 0; l < LANES; l++)
                rows[l] = lines[LANES * v + l] ? *(const lanes *)(lines[LANES * v + l] + d) * scale : (lanes){0};
            transpose(rows);
            for (int i = 0; i < LANES; i++) out[wide * (d + i) + v] = rows[i];
        }
}

/* The same back. */
INLINE void take_lines(float *const *lines, const lanes *in, const int64_t dim, const int wide) {
    if (dim % LANES) {
        for (int64_t l = 0; l < LANES * wide; l++)
            for (int64_t d = 0; lines[l] && d < dim; d++) lines[l][d] = ((const float *)in)[d * LANES * wide + l];
        return;
    }
    for (int v = 0; v < wide; v++)
        for (int64_t d = 0; d < dim; d += LANES) {
            lanes rows[LANES];
            for (int i = 0; i < LANES; i++) rows[i] = in[wide * (d + i) + v];
            transpose(rows);
            for (int l = 0; l < LANES; l++)
                if (lines[LANES * v + l]) *(lanes *)(lines[LANES * v + l] + d) = rows[l];
        }
}


/* Query heads [first, first + count) of a segment's members and one KV head become lines. */
INLINE void gather_lines(side_by_side *lines, const task *a, segment g, int64_t head, int64_t first, int64_t count) {
    const int64_t group = a->heads / a->kv_heads;
    memset(lines, 0, sizeof *lines);
    lines->all_see = g.end, lines->any_sees = g.causal ? 0 : g.end;
    for (int v = 0; v < VECTORS; v++) lines->top[v] = (lanes){0} - INFINITY, lines->limit[v] = (ints){0} + INT32_MAX;
    for (int64_t l = 0; l < count; l++) {
        const int64_t place = g.first + (first + l) / group, member = a->step->members[place], h = head * group + (first + l) % group;
        lines->queries[l] = a->query + member * a->query_line + h * a->dim;
        lines->parts[l] = a->partial + (place * a->heads + h) * (a->value_dim + 2);
        if (!g.causal) continue;
        const int64_t sees = a->step->context[member];
        ((int32_t *)lines->limit)[l] = sees;
        lines->all_see = sees < lines->all_see ? sees : lines->all_see;
        lines->any_sees = sees > lines->any_sees ? sees : lines->any_sees;
    }
}

/* What has come of `count` lines, out [value_dim][wide], goes to their parts. */
INLINE void write_parts(const side_by_side *lines, const lanes *out, int64_t count, const int64_t value_dim, const int wide) {
    take_lines(lines->parts, out, value_dim, wide);
    for (int64_t l = 0; l < count; l++) {
        lines->parts[l][value_dim] = ((const float *)lines->top)[l];
        lines->parts[l][value_dim + 1] = ((const float *)lines->sum)[l];
    }
}

/* Of grouped_own.c: the next item of rows' own slots; and the work on the one that comes next, if any is left. */
int64_t take_own(const task *a);
void own_item(const task *a, scratch *s);

/* Whether products of tiles pay (measured on two cores): many lines share what is taken apart of many slots. */
INLINE int tiles_pay(const task *a, segment g) {
    enum { LINES_BY_DIM = 10000, SLOTS_BY_DIM = 100000 };
    const int64_t dim = a->dim + a->value_dim, lines = g.count * (a->heads / a->kv_heads);
    return lines * dim >= LINES_BY_DIM && (g.end - g.begin) * dim >= SLOTS_BY_DIM;
}

/* Of grouped_amx.c: lines of an item of a task whose segments are there, 0 where tiles do not serve; bytes that a thread needs; and
 * its work, which is that of `attend_lines`. */
int64_t amx_lines_of(const task *a);
size_t size_of_blocks(const task *a);
void attend_blocks(const task *a, scratch *s, segment g, int64_t head, int64_t first, int64_t count);
