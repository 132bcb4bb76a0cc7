/* Attention over pages in float32, as if each query were by itself, for `native.py`, which compiles this on the machine that runs it. */
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

/* Queries [begin, end) of one line of the table. */
typedef struct {
    int64_t begin, end;
} run;

/* Of one KV head the queries of a run, which read its slots together, each over those that it sees. `then`: the keys that are read
 * next. */
INLINE void attend(const rows_task *a, float *scores, int64_t stride, run r, span keys, span values, span then, const int64_t group,
                   const int64_t dim, const int64_t value_dim) {
    const tree t = {a->visible, a->base};
    const int64_t head = keys.head * group, count = r.end - r.begin, *ends = a->context + r.begin;
    keys.dim = then.dim = dim;
    values.dim = value_dim;
    score_slots(scores, stride, a->query + r.begin * a->query_line + head * dim, a->query_line, count, keys, values, group, a->scale, dim);
    for (int64_t q = 0; q < count; q++) {
        float *score = scores + q * group * stride;
        keys.end = ends[q];
        const float softcap = hide(score, stride, keys, t, r.begin + q, group, a->softcap);
        for (int64_t g = 0; g < group; g++)
            softmax(score + g * stride, keys.end - keys.begin, softcap, a->sinks ? a->sinks + head + g : 0);
    }
    sum_values(a->out + (r.begin * a->heads + head) * value_dim, a->heads * value_dim, scores, stride, count, ends, values, then, group,
               value_dim);
}

enum { RUN = 4 }; /* queries of a run at most */

/* All queries as runs, as many as let every thread have some. Returns how many. */
static int64_t split(run *runs, const rows_task *a) {
    const int64_t each = a->rows * a->kv_heads / omp_get_num_threads(), most = each < 1 ? 1 : each < RUN ? each : RUN;
    int64_t count = 0;
    for (int64_t r = 0; r < a->rows; r++) {
        const int alike = r && a->line_of[r] == a->line_of[r - 1] && (!a->begin || a->begin[r] == a->begin[r - 1]);
        if (alike && r - runs[count - 1].begin < most) runs[count - 1].end++;
        else runs[count++] = (run){r, r + 1};
    }
    return count;
}

/* Slots that queries of a run see, of one KV head. */
static span slots_of(const rows_task *a, run r, int64_t head, const float *pages, int64_t dim) {
    int64_t end = 0;
    for (int64_t q = r.begin; q < r.end; q++) end = a->context[q] > end ? a->context[q] : end;
    return (span){pages, a->table + a->line_of[r.begin] * a->table_width, a->begin ? a->begin[r.begin] : 0, end, head, a->kv_heads,
                  a->page, dim};
}

/* The next item of a thread: of its own share, whose lines are at hand, then of those of the threads `behind` it. */
static int64_t next_item(const rows_task *a, int64_t items, int64_t *behind) {
    for (const int64_t threads = omp_get_num_threads(); *behind < threads; ++*behind) {
        const int64_t of = (omp_get_thread_num() + *behind) % threads, begin = items * of / threads, end = items * (of + 1) / threads;
        const int64_t item = begin + __atomic_fetch_add(a->taken + of * COUNTER, 1, __ATOMIC_RELAXED);
        if (item < end) return item;
    }
    return items;
}

/* `decode_attention` by the threads of a team. */
void attend_rows(const rows_task *a) {
    const int64_t group = a->heads / a->kv_heads, dim = a->dim, value_dim = a->value_dim;
    int64_t longest = 0, item, after;
    for (int64_t r = 0; r < a->rows; r++) longest = a->context[r] > longest ? a->context[r] : longest;
    const int64_t stride = (longest + 31) / 16 * 16;
    run *runs = malloc(sizeof(run) * (size_t)a->rows + sizeof(float) * (size_t)(RUN * group * stride));
    float *scores = (float *)(runs + a->rows);
    if (!runs) *a->failed = 1;
    const int64_t items = runs ? split(runs, a) * a->kv_heads : 0;
    int64_t behind = 0;
    /* A thread takes its next item before it computes one, so that memory can be on its way. */
    for (item = next_item(a, items, &behind); item < items; item = after) {
        after = next_item(a, items, &behind);
        const int64_t head = item % a->kv_heads, next = after < items ? after : item;
        const run r = runs[item / a->kv_heads];
        const span k = slots_of(a, r, head, a->keys, dim), v = slots_of(a, r, head, a->values, value_dim);
        const span then = slots_of(a, runs[next / a->kv_heads], next % a->kv_heads, a->keys, dim);
#define ATTEND(G, D, V) attend(a, scores, stride, r, k, v, then, G, D, V)
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
    free(runs);
}

/* Each query as if by itself. query: [rows, heads, dim], rows query_line floats apart; out: [rows, heads, value_dim]; query r
 * sees slots [begin[r], context[r]) of line line_of[r] of table [lines, table_width], as far as visible and base (see `tree`)
 * allow; begin null: from the first. Returns 0, or 1 where memory ran out. */
int decode_attention(float *out, const float *query, int64_t query_line, const float *keys, const float *values, const int64_t *table,
                     int64_t table_width, const int64_t *line_of, const int64_t *context, int64_t rows, int64_t heads, int64_t kv_heads,
                     int64_t dim, int64_t value_dim, int64_t page, float scale, const int64_t *begin, float softcap,
                     const float *sinks, const int64_t *visible, const int64_t *base) {
    int failed = 0;
    int64_t *taken = calloc((size_t)omp_get_max_threads(), sizeof *taken * COUNTER);
    const rows_task a = {out, query, keys, values, sinks, table, line_of, context, begin, visible, base, query_line, table_width,
                         rows, heads, kv_heads, dim, value_dim, page, scale, softcap, taken, &failed};
    if (!taken) return 1;
#pragma omp parallel
    attend_rows(&a);
    free(taken);
    return failed;
}
