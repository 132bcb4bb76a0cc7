/* Attention over pages in float32, each query by itself, for `native.py`, which compiles this on the machine that runs it. */
#include "attention.h"
#include "blocks.h"
#include <stdlib.h>

/* Softmax over scores[0, n); a sink, if any, takes its share of the sum. Writes up to the next multiple of LANES. */
static void softmax(float *scores, int64_t n, float softcap, const float *sink) {
    float sum;
    const float top = exponentials(scores, n, softcap, sink ? *sink : -INFINITY, &sum);
    const float scale = 1 / (sum + (sink ? expf(*sink - top) : 0));
    for (int64_t i = 0; i < n; i += LANES) *(lanes *)(scores + i) *= scale;
}

/* One row and KV head: `group` queries over all slots of a span. `then`: the keys that are read next. */
INLINE void attend(float *out, float *scores, int64_t stride, const float *query, span keys, span values, span then,
                   float scale, float softcap, const float *sinks, tree t, int64_t row, const int64_t group, const int64_t dim,
                   const int64_t value_dim) {
    keys.dim = then.dim = dim;
    values.dim = value_dim;
    score_slots(scores, stride, query, keys, values, group, scale, dim);
    softcap = hide(scores, stride, keys, t, row, group, softcap);
    for (int64_t g = 0; g < group; g++) softmax(scores + g * stride, keys.end - keys.begin, softcap, sinks ? sinks + g : 0);
    sum_values(out, scores, stride, values, then, group, value_dim);
}

/* Each query by itself, by the threads of a team; see `decode_attention`. */
void attend_rows(const rows_task *a) {
    const int64_t group = a->heads / a->kv_heads, items = a->rows * a->kv_heads, dim = a->dim, value_dim = a->value_dim;
    const tree t = {a->visible, a->base};
    int64_t longest = 0, item, after;
    for (int64_t r = 0; r < a->rows; r++) longest = a->context[r] > longest ? a->context[r] : longest;
    const int64_t stride = (longest + 31) / 16 * 16;
    float *scores = malloc(sizeof(float) * (size_t)(group * stride));
    if (!scores) *a->failed = 1;
#define SPAN(pages, row, head, dim) \
    ((span){pages, a->table + a->line_of[row] * a->table_width, a->begin ? a->begin[row] : 0, a->context[row], head, \
            a->kv_heads, a->page, dim})
    /* A thread takes its next item before it computes one, so that memory can be on its way. */
    for (item = __atomic_fetch_add(a->taken, 1, __ATOMIC_RELAXED); scores && item < items; item = after) {
        after = __atomic_fetch_add(a->taken, 1, __ATOMIC_RELAXED);
        const int64_t row = item / a->kv_heads, head = item % a->kv_heads;
        const span k = SPAN(a->keys, row, head, dim), v = SPAN(a->values, row, head, value_dim);
        const span then = after < items ? SPAN(a->keys, after / a->kv_heads, after % a->kv_heads, dim) : k;
        const float *q = a->query + row * a->query_line + head * group * dim;
        const float *sink = a->sinks ? a->sinks + head * group : 0;
        float *o = a->out + (row * a->heads + head * group) * value_dim;
#define ATTEND(G, D, V) attend(o, scores, stride, q, k, v, then, a->scale, a->softcap, sink, t, row, G, D, V)
#define BY_GROUP(D) \
    switch (group) { \
        case 1: ATTEND(1, D, D); break; \
        case 2: ATTEND(2, D, D); break; \
        case 3: ATTEND(3, D, D); break; \
        case 4: ATTEND(4, D, D); break; \
        case 8: ATTEND(8, D, D); break; \
        default: ATTEND(group, D, D); \
    }
        /* Sizes that models have are constants to the compiler: it keeps queries and sums in registers. */
        if (dim == 64 && value_dim == 64) BY_GROUP(64)
        else if (dim == 128 && value_dim == 128) BY_GROUP(128)
        else ATTEND(group, dim, value_dim);
    }
    free(scores);
}

/* Each query by itself. query: [rows, heads, dim], rows query_line floats apart; out: [rows, heads, value_dim]; query r
 * sees slots [begin[r], context[r]) of line line_of[r] of table [lines, table_width], as far as visible and base (see `tree`)
 * allow; begin null: from the first. Returns 0, or 1 where memory ran out. */
int decode_attention(float *out, const float *query, int64_t query_line, const float *keys, const float *values, const int64_t *table,
                     int64_t table_width, const int64_t *line_of, const int64_t *context, int64_t rows, int64_t heads, int64_t kv_heads,
                     int64_t dim, int64_t value_dim, int64_t page, float scale, const int64_t *begin, float softcap,
                     const float *sinks, const int64_t *visible, const int64_t *base) {
    int64_t taken = 0;
    int failed = 0;
    const rows_task a = {out, query, keys, values, sinks, table, line_of, context, begin, visible, base, query_line, table_width,
                         rows, heads, kv_heads, dim, value_dim, page, scale, softcap, &taken, &failed};
#pragma omp parallel
    attend_rows(&a);
    return failed;
}
