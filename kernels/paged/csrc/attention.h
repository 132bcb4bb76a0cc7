/* One row's queries against slots of pages in float32. Layout of pages: [num_pages, kv_heads, page_size, dim]. */
#pragma once
#include "lanes.h"

/* Lanes of a where `lane & bit` is 0, else of b, each plus the lane of its partner across `bit`. */
#define FOLD(a, b, bit) (PICK(a, b, 0, bit) + PICK(a, b, bit, bit))
#define PICK(a, b, flip, bit) \
    __builtin_shufflevector(a, b, AT(0, flip, bit), AT(1, flip, bit), AT(2, flip, bit), AT(3, flip, bit), AT(4, flip, bit), \
                            AT(5, flip, bit), AT(6, flip, bit), AT(7, flip, bit), AT(8, flip, bit), AT(9, flip, bit), \
                            AT(10, flip, bit), AT(11, flip, bit), AT(12, flip, bit), AT(13, flip, bit), AT(14, flip, bit), \
                            AT(15, flip, bit))
#define AT(lane, flip, bit) (((lane) ^ (flip)) + ((lane) & (bit) ? 16 : 0))

/* Products of a query with 16 keys that lie one after another: lane i is that of key i. */
INLINE lanes dot16(const float *query, const float *keys, const int64_t dim) {
    lanes part[16];
    for (int64_t j = 0; j < 16; j++) {
        part[j] = *(const lanes *)query * *(const lanes *)(keys + j * dim);
        for (int64_t i = 16; i < dim; i += 16) part[j] += *(const lanes *)(query + i) * *(const lanes *)(keys + j * dim + i);
    }
    for (int64_t j = 0; j < 16; j += 2) part[j] = FOLD(part[j], part[j + 1], 1);
    for (int64_t j = 0; j < 16; j += 4) part[j] = FOLD(part[j], part[j + 2], 2);
    for (int64_t j = 0; j < 16; j += 8) part[j] = FOLD(part[j], part[j + 4], 4);
    return FOLD(part[0], part[8], 8);
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

/* How many slots from t on lie one after another: at most 16. */
INLINE int64_t block(span s, int64_t t) {
    const int64_t room = s.page - t % s.page, left = s.end - t, n = room < left ? room : left;
    return n < 16 ? n : 16;
}

/* What will be read two blocks of 16 after slot t of s, behind which `then` is read: far enough for memory to bring it. */
INLINE const float *ahead(span s, int64_t t, span then) {
    const int64_t next = t + 32, over = then.begin + next - s.end;
    if (next < s.end) return slot(s, next);
    return slot(then, over < then.end ? over : then.begin);
}

INLINE void fetch(const float *at, int64_t floats) { /* to the second level: the first has too few places */
    for (int64_t i = 0; i < floats; i += 16) __builtin_prefetch(at + i, 0, 2);
}

/* scores[g * stride + i]: `group` queries against the i-th slot. May write up to 15 behind a query's last. */
INLINE void score_slots(float *scores, int64_t stride, const float *query, span keys, span then, const int64_t group,
                        float scale, const int64_t dim) {
    for (int64_t t = keys.begin, n; t < keys.end; t += n) {
        const float *key = slot(keys, t), *next = ahead(keys, t, then);
        const int whole = dim % 16 == 0 && keys.page - t % keys.page >= 16;
        float *score = scores + t - keys.begin;
        n = block(keys, t);
        for (int64_t g = 0; g < group; g++) {
            fetch(next + g * 16 / group * dim, ((g + 1) * 16 / group - g * 16 / group) * dim);
            if (whole) { /* what lies behind `end` on the page is finite, and nobody reads its score */
                *(lanes *)(score + g * stride) = dot16(query + g * dim, key, dim) * scale;
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

/* out[g, :] += sum of weights[g, i] * values[i, :] over n lines, for `group` queries whose sums fit the registers. */
INLINE void add_lines(float *out, const float *weights, int64_t stride, const float *values, int64_t n, const float *next,
                      const int64_t group, const int64_t dim) {
    lanes sums[16] = {0};
    for (int64_t g = 0; g < group; g++)
        for (int64_t i = 0; i < dim / 16; i++) sums[g * (dim / 16) + i] = *(lanes *)(out + g * dim + 16 * i);
    for (int64_t t = 0; t < n; t++, values += dim, next += dim) {
        fetch(next, dim);
        for (int64_t g = 0; g < group; g++)
            for (int64_t i = 0; i < dim / 16; i++)
                sums[g * (dim / 16) + i] += weights[g * stride + t] * *(const lanes *)(values + 16 * i);
    }
    for (int64_t g = 0; g < group; g++)
        for (int64_t i = 0; i < dim / 16; i++) *(lanes *)(out + g * dim + 16 * i) = sums[g * (dim / 16) + i];
}

/* out[g, :] = sum of weights[g, i] * value of the i-th slot. */
INLINE void sum_values(float *out, const float *weights, int64_t stride, span values, span then, const int64_t group,
                       const int64_t dim) {
    const int64_t fit = dim % 16 || dim > 256 ? 0 : 256 / dim; /* queries at a time */
    for (int64_t i = 0; i < group * dim; i++) out[i] = 0;
    for (int64_t t = values.begin, n; t < values.end; t += n) {
        const float *value = slot(values, t), *next = ahead(values, t, then), *weight = weights + t - values.begin;
        int64_t g = 0;
        n = block(values, t);
        for (; fit && g + fit <= group; g += fit)
            add_lines(out + g * dim, weight + g * stride, stride, value, n, next, fit, dim);
        if (fit && group % fit)
            add_lines(out + g * dim, weight + g * stride, stride, value, n, next, group % fit, dim);
        for (; !fit && g < group; g++)
            for (int64_t i = 0; i < n; i++)
                for (int64_t d = 0; d < dim; d++) out[g * dim + d] += weight[g * stride + i] * value[i * dim + d];
    }
}

/* scores[0, n) become exponentials, after `softcap` (0: none), over the largest of them and of `top`, which is returned;
 * `sum` is their sum. Writes up to the next multiple of 16. */
INLINE float exponentials(float *scores, int64_t n, float softcap, float top, float *sum) {
    lanes largest_yet = (lanes){0} + top, total_yet = {0};
    if (softcap > 0)
        for (int64_t i = 0; i < n; i++) scores[i] = softcap * tanhf(scores[i] / softcap);
    for (int64_t i = n; i % 16; i++) scores[i] = -INFINITY;
    for (int64_t i = 0; i < n; i += 16) {
        const lanes x = *(lanes *)(scores + i);
        largest_yet = larger(x, largest_yet);
    }
    top = largest(largest_yet);
    for (int64_t i = 0; i < n; i += 16) {
        const lanes e = exp_of_negative(*(lanes *)(scores + i) - top);
        *(lanes *)(scores + i) = e;
        total_yet += e;
    }
    *sum = total(total_yet);
    return top;
}
