/* A forward over a few lines: what it is made of, what it takes from the other files, and who calls it. All functions but
 * `share_groups` and the last ones are called by every thread of a team, which share the work; they have all done theirs when one
 * returns, but for the attentions, `normalize_heads`, `take_apart`, and products `by_lines`. */
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <time.h>

/* Weights [rows, in], contiguous, or tiles of them (see `tiles.c`), and what is added to the products, or null. */
typedef struct {
    const void *weight;
    const float *bias;
    int64_t rows;
} layer;

enum { COUNTER = 8 }; /* numbers apart that threads count in, each in a line of the cache of its own */

/* See `decode_attention`. */
typedef struct {
    float *out;
    const float *query, *keys, *values, *sinks;
    const int64_t *table, *line_of, *context, *begin, *visible, *base;
    int64_t query_line, table_width, rows, heads, kv_heads, dim, value_dim, page;
    float scale, softcap;
    int64_t *taken; /* [threads][COUNTER], zeros at first: items of each thread's share that were taken */
    int *failed;
} rows_task;

/* Of the OpenMP runtime; a compiler may come without its header. */
int omp_get_max_threads(void);
int omp_get_thread_num(void);
int omp_get_num_threads(void);

static inline double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Whether a row ends with a token, its `made`th of `left` that it may have yet; stops: `count` ids that end it. */
static inline int ends_row(int64_t token, int64_t made, int64_t left, const int64_t *stops, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (stops[i] == token) return 1;
    return made >= left;
}

typedef struct step step; /* of grouped.c */
typedef struct grouped_task grouped_task;

/* Which slots the queries of a step see: `step` of grouped.c, or without one the arrays that decode_attention takes. */
typedef struct {
    const step *grouped;
    const int64_t *line_of, *context, *begin, *visible, *base;
} sight;

/* Weights [out, in], contiguous, and biases or null; norms of queries and keys or null; pages, and what attention sees. Where
 * weights are tiles, those of q, k and v are one layer, q, and gate and up are another, gate; so are their biases. */
typedef struct {
    const float *q, *q_bias, *k, *k_bias, *v, *v_bias, *o, *o_bias, *gate, *gate_bias, *up, *up_bias, *down, *down_bias;
    const float *norm, *mlp_norm, *q_norm, *k_norm;
    float *keys, *values;
    const sight *sight;
} model_block;

typedef struct {
    int64_t lines, width, inner, heads, kv_heads, dim, tiled, page, table_width;
} sizes;

/* What stands before and behind the blocks. embed [vocab, width]; frequencies of the rotation [dim / 2], or null; head
 * [outputs, width]. */
typedef struct {
    const float *embed, *frequencies, *norm, *head, *head_bias;
    int64_t vocab, outputs;
} ends;

/* The packed tokens: ids, places in their texts, slots of their KV, pages of their rows, and the lines whose logits are wanted, each
 * at most once. */
typedef struct {
    const int64_t *ids, *positions, *slots, *table, *wanted;
    int64_t wanted_lines;
} inputs;

/* Parameters of rows that draw. top_k 0, limit (1 - top_p) -1 and min_p 0: off; a temperature of 0: greedy. positions: of the tokens
 * that are drawn. */
typedef struct {
    const float *temperature, *limit, *min_p;
    const int64_t *top_k, *seeds, *positions;
} settings;

float norm_scale(const float *x, float eps, int64_t width);
void normalize(float *out, const float *x, const float *weight, float eps, int64_t lines, int64_t width);
void normalize_heads(float *x, int64_t x_line, const float *weight, float eps, int64_t lines, int64_t heads, int64_t dim);
void rotate_lines(float *query, float *key, const float *value, const float *cos, const float *sin, float *keys, float *values,
                  const int64_t *slots, int64_t query_line, int64_t key_line, int64_t value_line, int64_t tokens, int64_t heads,
                  int64_t kv_heads, int64_t dim, int64_t page);
void attend_rows(const rows_task *a);
grouped_task *share_groups(float *out, const float *query, int64_t query_line, const float *keys, const float *values,
                           const step *step, int64_t heads, int64_t kv_heads, int64_t dim, int64_t value_dim, int64_t page,
                           float scale, float softcap, const float *sinks, int *failed);
void attend_groups(const grouped_task *a);
void multiply_lines(float *out, const float *x, int64_t x_line, int64_t lines, int64_t in, const float *add, const layer *layers);
void multiply_gated(float *out, const float *x, int64_t x_line, int64_t lines, int64_t in, layer gate, layer up);
int by_lines(int64_t lines, int64_t outputs);
size_t size_of_parts(int64_t lines, int64_t in);
void *take_apart(void *room, const float *x, int64_t x_line, int64_t lines, int64_t in, int64_t widest, int64_t outputs, const float *norm,
                 float eps);
void multiply_tiles(float *out, const void *parts, int64_t lines, int64_t in, int64_t outputs, const float *add, layer a, int gated,
                    const void *then);
const void *first_tiles(layer a, int64_t in, int gated);

/* These are called by one thread. */
int few_forward(float *logits, const ends *e, const model_block *blocks, int64_t count, const sizes *n, const inputs *in, const float *cos,
                const float *sin, float turn, float scale, float eps);
int likely_tokens(int64_t *ids, float *probs, int64_t width, const float *scores, int64_t line, int64_t rows, int64_t vocab,
                  const float *temperature, const float *limit, const float *min_p, const int64_t *top_k, const int64_t *seeds,
                  const int64_t *positions);
int64_t draw_token(void *memory, const float *scores, int64_t vocab, const settings *a, int64_t row, float *top);
size_t size_of_draw(int64_t vocab);
float largest_score(const float *scores, int64_t vocab);
int few_drafts(int64_t *tokens, float *probs, int64_t width, const settings *rows, int64_t ahead, const ends *e,
               const model_block *blocks, int64_t count, const sizes *n, const inputs *in, const float *cos, const float *sin,
               float turn, float scale, float eps);
