/* One row's queries against slots of pages in float32. Layout of pages: [num_pages, kv_heads, page_size, dim]. */
#pragma once
#include "lanes.h"

enum { FITTING = REGISTERS == 32 ? 16 : 12 }; /* sums that registers hold, beside what is added to them */

/* Products of a query with LANES keys that lie one after another: lane i is that of key i. */
INLINE lanes dot_keys(const float *query, const float *keys, const int64_t dim) {
    lanes part[LANES];
    for (int64_t j = 0; j < LANES; j++) {
        part[j] = *(const lanes *)query * *(const lanes *)(keys + j * dim);
        for (int64_t i = LANES; i < dim; i += LANES)
            part[j] += *(const lanes *)(query + i) * *(const lanes *)(keys + j * dim + i);
    }
    return totals(part);
}

/* Slots [begin, end) of one row and KV head. */
typedef struct {
    const float *pages;
    const int64_t *table;
    int64_t begin, end, head, kv_heads, page, dim;
} span;

INLINE const float *slot(span s, int64_t t) {
    return s.pages + ((s.table[t / s.page] * s.kv_heads + s.head) * s.page + t % s.page) * s.dim;
}

/* How many slots from t on lie one after another: at most LANES. */
INLINE int64_t block(span s, int64_t t) {
    const int64_t room = s.page - t % s.page, left = s.end - t, n = room < left ? room : left;
    return n < LANES ? n : LANES;
}

/* What will be read two blocks of LANES after slot t of s, behind which `then` is read: far enough for memory to bring it. */
INLINE const float *ahead(span s, int64_t t, span then) {
    const int64_t next = t + 2 * LANES, over = then.begin + next - s.end;
    if (next < s.end) return slot(s, next);
    return slot(then, over < then.end ? over : then.begin);
}

INLINE void fetch(const float *at, int64_t floats) { /* to the second level: the first has too few places */
    for (int64_t i = 0; i < floats; i += 16) __builtin_prefetch(at + i, 0, 2);
}

/* scores[(q * group + g) * stride + i]: `group` heads of each of `count` queries, query_line floats apart, against the i-th slot. May
 * write up to LANES - 1 behind a head's last. */
INLINE void score_slots(float *scores, int64_t stride, const float *query, int64_t query_line, int64_t count, span keys, span then,
                        const int64_t group, float scale, const int64_t dim) {
    for (int64_t t = keys.begin, n; t < keys.end; t += n) {
        const float *key = slot(keys, t), *next = ahead(keys, t, then);
        const int whole = dim % LANES == 0 && keys.page - t % keys.page >= LANES;
        n = block(keys, t);
        for (int64_t q = 0; q < count; q++) {
            const float *heads = query + q * query_line;
            float *score = scores + q * group * stride + t - keys.begin;
            for (int64_t g = 0; g < group; g++) {
                if (q == 0) fetch(next + g * LANES / group * dim, ((g + 1) * LANES / group - g * LANES / group) * dim);
                if (whole) { /* nobody reads the scores of what lies behind `end` on the page */
                    *(lanes *)(score + g * stride) = dot_keys(heads + g * dim, key, dim) * scale;
                    continue;
                }
                for (int64_t i = 0; i < n; i++) {
                    float sum = 0;
                    for (int64_t d = 0; d < dim; d++) sum += heads[g * dim + d] * key[i * dim + d];
                    score[g * stride + i] = sum * scale;
                }
            }
        }
    }
}

/* Which slots a query sees where draft tokens branch: of those from `base` on, slot base + j where bit j is set. */
typedef struct {
    const int64_t *visible, *base; /* a query each; visible: null, or -1 for a query that sees all */
} tree;

/* Slots [begin, end) of a line of the table, which members [first, first + count) see; if causal, each up to its own place. */
typedef struct {
    int64_t line, begin, end, first, count, causal;
} segment;

/* What all layers of a step have in common; see `grouped_attention`. */
struct step {
    const int64_t *table, *line_of, *context, *own, *members, *part_start, *parts;
    const segment *segments;
    tree tree;
    int64_t table_width, rows, num_segments, num_members;
};

/* Scores of slots that a query may not see become -infinity; `softcap` is applied before. Returns what is left of it to apply. */
INLINE float hide(float *scores, int64_t stride, span keys, tree t, int64_t query, const int64_t group, float softcap) {
    if (!t.visible || t.visible[query] == -1) return softcap;
    const int64_t n = keys.end - keys.begin, skip = t.base[query] - keys.begin;
    for (int64_t g = 0; g < group; g++) {
        float *score = scores + g * stride;
        if (softcap > 0)
            for (int64_t i = 0; i < n; i++) score[i] = softcap * tanhf(score[i] / softcap);
        for (int64_t i = skip > 0 ? skip : 0; i < n; i++)
            if (!(t.visible[query] >> (i - skip) & 1)) score[i] = -INFINITY;
    }
    return 0;
}

/* out[g, :] += sum of weights[g, i] * values[i, :] over n lines, for `group` heads and `vectors` of their LANES elements: as many as fit
 * the registers. Lines lie `dim` apart; `next`, unless null, is fetched beside them. */
INLINE void add_lines(float *out, const float *weights, int64_t stride, const float *values, int64_t n, const float *next,
                      const int64_t group, const int64_t vectors, const int64_t dim) {
    lanes sums[FITTING] = {0};
    for (int64_t g = 0; g < group; g++)
        for (int64_t i = 0; i < vectors; i++) sums[g * vectors + i] = *(lanes *)(out + g * dim + LANES * i);
    for (int64_t t = 0; t < n; t++, values += dim) {
        if (next) fetch(next + t * dim, LANES * vectors);
        for (int64_t g = 0; g < group; g++)
            for (int64_t i = 0; i < vectors; i++)
                sums[g * vectors + i] += weights[g * stride + t] * *(const lanes *)(values + LANES * i);
    }
    for (int64_t g = 0; g < group; g++)
        for (int64_t i = 0; i < vectors; i++) *(lanes *)(out + g * dim + LANES * i) = sums[g * vectors + i];
}

/* out[g, :] += sum of weights[g, i] * values[i, :] over n lines of all `dim` elements. */
INLINE void add_slots(float *out, const float *weights, int64_t stride, const float *values, int64_t n, const float *next,
                      const int64_t group, const int64_t dim) {
    /* Heads and vectors at a time; 0 vectors: element by element. */
    const int64_t most = group < FITTING / 4 ? group : FITTING / 4, all = dim / LANES;
    const int64_t vectors = dim % LANES ? 0 : all * most <= FITTING ? all : all % 4 ? 1 : 4;
    if (!vectors)
        for (int64_t g = 0; g < group; g++)
            for (int64_t i = 0; i < n; i++)
                for (int64_t d = 0; d < dim; d++) out[g * dim + d] += weights[g * stride + i] * values[i * dim + d];
    for (int64_t v = 0; vectors && v < all; v += vectors) {
        const int64_t at = LANES * v;
        const float *coming = next ? next + at : 0;
        int64_t g = 0;
        for (; g + most <= group; g += most)
            add_lines(out + g * dim + at, weights + g * stride, stride, values + at, n, coming, most, vectors, dim);
        if (group % most)
            add_lines(out + g * dim + at, weights + g * stride, stride, values + at, n, coming, group % most, vectors, dim);
    }
}

/* out[q * out_line + g * dim, :] = sum of weights[(q * group + g) * stride + i] * value of the i-th slot, of those before ends[q], for
 * `count` queries. What lies behind is not multiplied, not even by zero: a draft may have left what is no number there. */
INLINE void sum_values(float *out, int64_t out_line, const float *weights, int64_t stride, int64_t count, const int64_t *ends,
                       span values, span then, const int64_t group, const int64_t dim) {
    for (int64_t q = 0; q < count; q++)
        for (int64_t i = 0; i < group * dim; i++) out[q * out_line + i] = 0;
    for (int64_t t = values.begin, n; t < values.end; t += n) {
        const float *value = slot(values, t), *next = ahead(values, t, then);
        n = block(values, t);
        for (int64_t q = 0; q < count; q++) {
            const int64_t sees = ends[q] - t < n ? ends[q] - t : n;
            const float *weight = weights + q * group * stride + t - values.begin;
            if (sees > 0) add_slots(out + q * out_line, weight, stride, value, sees, q ? 0 : next, group, dim);
        }
    }
}

/* scores[0, n) become exponentials, after `softcap` (0: none), over the largest of them and of `top`, which is returned;
 * `sum` is their sum. Writes up to the next multiple of LANES. */
INLINE float exponentials(float *scores, int64_t n, float softcap, float top, float *sum) {
    lanes largest_yet = (lanes){0} + top, total_yet = {0};
    if (softcap > 0)
        for (int64_t i = 0; i < n; i++) scores[i] = softcap * tanhf(scores[i] / softcap);
    for (int64_t i = n; i % LANES; i++) scores[i] = -INFINITY;
    for (int64_t i = 0; i < n; i += LANES) {
        const lanes x = *(lanes *)(scores + i);
        largest_yet = larger(x, largest_yet);
    }
    top = largest(largest_yet);
    for (int64_t i = 0; i < n; i += LANES) {
        const lanes e = exp_of_negative(*(lanes *)(scores + i) - top);
        *(lanes *)(scores + i) = e;
        total_yet += e;
    }
    *sum = total(total_yet);
    return top;
}
