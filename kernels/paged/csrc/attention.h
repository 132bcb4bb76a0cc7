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

/* scores[g * stride + i]: `group` queries against the i-th slot. May write up to LANES - 1 behind a query's last. */
INLINE void score_slots(float *scores, int64_t stride, const float *query, span keys, span then, const int64_t group,
                        float scale, const int64_t dim) {
    for (int64_t t = keys.begin, n; t < keys.end; t += n) {
        const float *key = slot(keys, t), *next = ahead(keys, t, then);
        const int whole = dim % LANES == 0 && keys.page - t % keys.page >= LANES;
        float *score = scores + t - keys.begin;
        n = block(keys, t);
        for (int64_t g = 0; g < group; g++) {
            fetch(next + g * LANES / group * dim, ((g + 1) * LANES / group - g * LANES / group) * dim);
            if (whole) { /* what lies behind `end` on the page is finite, and nobody reads its score */
                *(lanes *)(score + g * stride) = dot_keys(query + g * dim, key, dim) * scale;
                continue;
            }
            for (int64_t i = 0; i < n; i++) {
                float sum = 0;
                for (int64_t d = 0; d < dim; d++) sum += query[g * dim + d] * key[i * dim + d];
                score[g * stride + i] = sum * scale;
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

/* out[g, :] += sum of weights[g, i] * values[i, :] over n lines, for `group` queries and `vectors` of their LANES elements:
 * as many as fit the registers. Lines lie `dim` apart. */
INLINE void add_lines(float *out, const float *weights, int64_t stride, const float *values, int64_t n, const float *next,
                      const int64_t group, const int64_t vectors, const int64_t dim) {
    lanes sums[FITTING] = {0};
    for (int64_t g = 0; g < group; g++)
        for (int64_t i = 0; i < vectors; i++) sums[g * vectors + i] = *(lanes *)(out + g * dim + LANES * i);
    for (int64_t t = 0; t < n; t++, values += dim, next += dim) {
        fetch(next, LANES * vectors);
        for (int64_t g = 0; g < group; g++)
            for (int64_t i = 0; i < vectors; i++)
                sums[g * vectors + i] += weights[g * stride + t] * *(const lanes *)(values + LANES * i);
    }
    for (int64_t g = 0; g < group; g++)
        for (int64_t i = 0; i < vectors; i++) *(lanes *)(out + g * dim + LANES * i) = sums[g * vectors + i];
}

/* out[g, :] = sum of weights[g, i] * value of the i-th slot. */
INLINE void sum_values(float *out, const float *weights, int64_t stride, span values, span then, const int64_t group,
                       const int64_t dim) {
    /* Queries and vectors at a time; 0 vectors: element by element. */
    const int64_t most = group < FITTING / 4 ? group : FITTING / 4, all = dim / LANES;
    const int64_t vectors = dim % LANES ? 0 : all * most <= FITTING ? all : all % 4 ? 1 : 4;
    for (int64_t i = 0; i < group * dim; i++) out[i] = 0;
    for (int64_t t = values.begin, n; t < values.end; t += n) {
        const float *value = slot(values, t), *next = ahead(values, t, then), *weight = weights + t - values.begin;
        n = block(values, t);
        if (vectors) {
            for (int64_t v = 0; v < all; v += vectors) {
                const int64_t at = LANES * v;
                int64_t g = 0;
                for (; g + most <= group; g += most)
                    add_lines(out + g * dim + at, weight + g * stride, stride, value + at, n, next + at, most, vectors, dim);
                if (group % most)
                    add_lines(out + g * dim + at, weight + g * stride, stride, value + at, n, next + at, group % most, vectors, dim);
            }
            continue;
        }
        for (int64_t g = 0; g < group; g++)
            for (int64_t i = 0; i < n; i++)
                for (int64_t d = 0; d < dim; d++) out[g * dim + d] += weight[g * stride + i] * value[i * dim + d];
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
