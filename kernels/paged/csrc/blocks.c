/* Pre-norm blocks of rotary attention and gated MLP, one behind another, over a few lines: for one request alone, calls from
 * Python take longer than what they call. */
#include "blocks.h"
#include <stdlib.h>

/* Which slots the queries of a step see: `step` of grouped.c, or without one the arrays that decode_attention takes. */
typedef struct {
    const step *grouped;
    const int64_t *line_of, *context, *begin, *visible, *base;
} sight;

/* Weights [out, in], contiguous, and biases or null; norms of queries and keys or null; pages, and what attention sees. */
typedef struct {
    const float *q, *q_bias, *k, *k_bias, *v, *v_bias, *o, *o_bias, *gate, *gate_bias, *up, *up_bias, *down, *down_bias;
    const float *norm, *mlp_norm, *q_norm, *k_norm;
    float *keys, *values;
    const sight *sight;
} block;

typedef struct {
    int64_t lines, width, inner, heads, kv_heads, dim, page, table_width;
} sizes;

static int attend(const block *b, const sizes *n, float *out, const float *query, int64_t line, const int64_t *table, float scale) {
    const sight *s = b->sight;
    if (s->grouped)
        return grouped_attention(out, query, line, b->keys, b->values, s->grouped, n->heads, n->kv_heads, n->dim, n->dim,
                                 n->page, scale, 0, 0);
    return decode_attention(out, query, line, b->keys, b->values, table, n->table_width, s->line_of, s->context, n->lines,
                            n->heads, n->kv_heads, n->dim, n->dim, n->page, scale, s->begin, 0, 0, s->visible, s->base);
}

/* hidden [lines, width] goes through `count` blocks; KV of its tokens goes to `slots`. cos, sin: [lines, dim]; table: pages,
 * `table_width` a line; eps: of all norms. Returns 0, or 1 where memory ran out. */
int few_blocks(float *hidden, const block *blocks, int64_t count, const sizes *n, const float *cos, const float *sin,
               const int64_t *slots, const int64_t *table, float scale, float eps) {
    const int64_t queries = n->heads * n->dim, keys = n->kv_heads * n->dim, joined = queries + 2 * keys;
    float *normed = malloc(sizeof(float) * (size_t)(n->lines * (n->width + joined + queries + n->inner)));
    if (!normed) return 1;
    float *query = normed + n->lines * n->width, *mixed = query + n->lines * joined, *opened = mixed + n->lines * queries;
    int failed = 0;
    for (const block *b = blocks; b < blocks + count && !failed; b++) {
        float *key = query + queries;
        rms_norm(normed, hidden, b->norm, eps, n->lines, n->width);
        few_linear(query, normed, n->width, n->lines, n->width, 0, b->q, b->q_bias, queries, b->k, b->k_bias, keys, b->v,
                   b->v_bias, keys);
        for (int64_t l = 0; l < n->lines && b->q_norm; l++) {
            rms_norm(query + l * joined, query + l * joined, b->q_norm, eps, n->heads, n->dim);
            rms_norm(key + l * joined, key + l * joined, b->k_norm, eps, n->kv_heads, n->dim);
        }
        rotate_and_store(query, key, key + keys, cos, sin, b->keys, b->values, slots, joined, joined, joined, n->lines, n->heads,
                         n->kv_heads, n->dim, n->page);
        failed = attend(b, n, mixed, query, joined, table, scale);
        few_linear(hidden, mixed, queries, n->lines, queries, hidden, b->o, b->o_bias, n->width, 0, 0, 0, 0, 0, 0);
        rms_norm(normed, hidden, b->mlp_norm, eps, n->lines, n->width);
        few_gated(opened, normed, n->width, n->lines, n->width, b->gate, b->gate_bias, b->up, b->up_bias, n->inner);
        few_linear(hidden, opened, n->inner, n->lines, n->inner, hidden, b->down, b->down_bias, n->width, 0, 0, 0, 0, 0, 0);
    }
    free(normed);
    return failed;
}
