/* A forward over a few lines, from tokens to logits, through pre-norm blocks of rotary attention and gated MLP: for one request
 * alone, calls from Python take longer than what they call. */
#include "blocks.h"
#include "lanes.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

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

/* What stands before and behind the blocks. embed [vocab, width]; frequencies of the rotation [dim / 2], or null; head
 * [outputs, width]. */
typedef struct {
    const float *embed, *frequencies, *norm, *head, *head_bias;
    int64_t vocab, outputs;
} ends;

/* The packed tokens: ids, places in their texts, slots of their KV, pages of their rows, and the lines whose logits are wanted. */
typedef struct {
    const int64_t *ids, *positions, *slots, *table, *wanted;
    int64_t wanted_lines;
} inputs;

static int attend(const block *b, const sizes *n, float *out, const float *query, int64_t line, const int64_t *table, float scale) {
    const sight *s = b->sight;
    if (s->grouped)
        return grouped_attention(out, query, line, b->keys, b->values, s->grouped, n->heads, n->kv_heads, n->dim, n->dim,
                                 n->page, scale, 0, 0);
    return decode_attention(out, query, line, b->keys, b->values, table, n->table_width, s->line_of, s->context, n->lines,
                            n->heads, n->kv_heads, n->dim, n->dim, n->page, scale, s->begin, 0, 0, s->visible, s->base);
}

/* cos, sin [lines, dim], times `size`. */
static void turns(float *cos, float *sin, const int64_t *positions, const float *frequencies, float size, int64_t lines, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t l = 0; l < lines; l++)
        for (int64_t i = 0; i < half; i++) {
            const float angle = (float)positions[l] * frequencies[i];
            cos[l * dim + i] = cos[l * dim + half + i] = cosf(angle) * size;
            sin[l * dim + i] = sin[l * dim + half + i] = sinf(angle) * size;
        }
}

/* hidden [lines, width] goes through one block; KV of its tokens is stored. */
static int run_block(const block *b, const sizes *n, const inputs *in, float *hidden, float *scratch, const float *cos,
                     const float *sin, float scale, float eps) {
    const int64_t queries = n->heads * n->dim, keys = n->kv_heads * n->dim, joined = queries + 2 * keys;
    float *normed = scratch, *query = normed + n->lines * n->width, *mixed = query + n->lines * joined;
    float *key = query + queries, *opened = mixed + n->lines * queries;
    rms_norm(normed, hidden, b->norm, eps, n->lines, n->width);
    few_linear(query, normed, n->width, n->lines, n->width, 0, b->q, b->q_bias, queries, b->k, b->k_bias, keys, b->v, b->v_bias,
               keys);
    for (int64_t l = 0; l < n->lines && b->q_norm; l++) {
        rms_norm(query + l * joined, query + l * joined, b->q_norm, eps, n->heads, n->dim);
        rms_norm(key + l * joined, key + l * joined, b->k_norm, eps, n->kv_heads, n->dim);
    }
    rotate_and_store(query, key, key + keys, cos, sin, b->keys, b->values, in->slots, joined, joined, joined, n->lines, n->heads,
                     n->kv_heads, n->dim, n->page);
    const int failed = attend(b, n, mixed, query, joined, in->table, scale);
    few_linear(hidden, mixed, queries, n->lines, queries, hidden, b->o, b->o_bias, n->width, 0, 0, 0, 0, 0, 0);
    rms_norm(normed, hidden, b->mlp_norm, eps, n->lines, n->width);
    few_gated(opened, normed, n->width, n->lines, n->width, b->gate, b->gate_bias, b->up, b->up_bias, n->inner);
    few_linear(hidden, opened, n->inner, n->lines, n->inner, hidden, b->down, b->down_bias, n->width, 0, 0, 0, 0, 0, 0);
    return failed;
}

/* logits [wanted_lines, outputs] of the tokens. cos, sin: [lines, dim], read where the ends have no frequencies; `turn`: what
 * cosines and sines are multiplied by where they have; scale: of queries times keys; eps: of all norms. Returns 0, 1 where memory
 * ran out, 2 where there is no such token. */
int few_forward(float *logits, const ends *e, const block *blocks, int64_t count, const sizes *n, const inputs *in, const float *cos,
                const float *sin, float turn, float scale, float eps) {
    const int64_t most = n->width + (2 * n->heads + 2 * n->kv_heads) * n->dim + n->inner; /* floats of `run_block`, a line */
    for (int64_t l = 0; l < n->lines; l++)
        if (in->ids[l] < 0 || in->ids[l] >= e->vocab) return 2;
    float *hidden = whole_lines(sizeof(float) * (size_t)(n->lines * (n->width + 2 * n->dim + most)));
    if (!hidden) return 1;
    float *angles = hidden + n->lines * n->width, *scratch = angles + 2 * n->lines * n->dim;
    int failed = 0;
    for (int64_t l = 0; l < n->lines; l++)
        memcpy(hidden + l * n->width, e->embed + in->ids[l] * n->width, sizeof(float) * (size_t)n->width);
    if (e->frequencies) {
        turns(angles, angles + n->lines * n->dim, in->positions, e->frequencies, turn, n->lines, n->dim);
        cos = angles, sin = angles + n->lines * n->dim;
    }
    for (const block *b = blocks; b < blocks + count && !failed; b++)
        failed = run_block(b, n, in, hidden, scratch, cos, sin, scale, eps);
    for (int64_t w = 0; w < in->wanted_lines && !failed; w++)
        rms_norm(scratch + w * n->width, hidden + in->wanted[w] * n->width, e->norm, eps, 1, n->width);
    if (!failed && in->wanted_lines)
        few_linear(logits, scratch, n->width, in->wanted_lines, n->width, 0, e->head, e->head_bias, e->outputs, 0, 0, 0, 0, 0, 0);
    free(hidden);
    return failed;
}

/* Parameters of rows that draw, see sampling.c. */
typedef struct {
    const float *temperature, *limit, *min_p;
    const int64_t *top_k, *seeds, *positions;
} settings;

/* The forward, and what `likely_tokens` says of each wanted line, which stands `ahead` tokens behind the last one of its row: `rows`
 * are parameters of the rows of the table, and every block has the same sight. Returns what few_forward does. */
int few_drafts(int64_t *tokens, float *probs, int64_t width, const settings *rows, int64_t ahead, const ends *e, const block *blocks,
               int64_t count, const sizes *n, const inputs *in, const float *cos, const float *sin, float turn, float scale,
               float eps) {
    const int64_t lines = in->wanted_lines;
    const size_t logits = (size_t)(lines * e->outputs + 1) / 2 * sizeof(int64_t); /* what is behind them is of 8 bytes */
    float *scores = whole_lines(logits + (size_t)lines * (3 * sizeof(int64_t) + 3 * sizeof(float)));
    if (!scores) return 1;
    int64_t *whole = (int64_t *)((char *)scores + logits);
    float *parts = (float *)(whole + 3 * lines);
    for (int64_t w = 0; w < lines; w++) {
        const int64_t r = blocks->sight->line_of[in->wanted[w]];
        whole[w] = rows->top_k[r], whole[lines + w] = rows->seeds[r], whole[2 * lines + w] = rows->positions[r] + ahead;
        parts[w] = rows->temperature[r], parts[lines + w] = rows->limit[r], parts[2 * lines + w] = rows->min_p[r];
    }
    int failed = few_forward(scores, e, blocks, count, n, in, cos, sin, turn, scale, eps);
    if (!failed)
        failed = likely_tokens(tokens, probs, width, scores, e->outputs, lines, e->outputs, parts, parts + lines, parts + 2 * lines,
                               whole, whole + lines, whole + 2 * lines);
    free(scores);
    return failed;
}
