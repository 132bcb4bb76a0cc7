/* What a forward over a few lines takes from the other files. All functions but `share_groups` and `likely_tokens` are called by
 * every thread of a team, which share the work; they have all done theirs when one returns, but for the attentions. */
#pragma once
#include <stddef.h>
#include <stdint.h>

/* Weights [rows, in], contiguous, or tiles of them (see `tiles.c`), and what is added to the products, or null. */
typedef struct {
    const void *weight;
    const float *bias;
    int64_t rows;
} layer;

/* See `decode_attention`; `taken` begins as 0. */
typedef struct {
    float *out;
    const float *query, *keys, *values, *sinks;
    const int64_t *table, *line_of, *context, *begin, *visible, *base;
    int64_t query_line, table_width, rows, heads, kv_heads, dim, value_dim, page;
    float scale, softcap;
    int64_t *taken; /* items that threads have taken */
    int *failed;
} rows_task;

typedef struct step step; /* of grouped.c */
typedef struct grouped_task grouped_task;

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
size_t size_of_parts(int64_t lines, int64_t in);
void take_apart(void *parts, const float *x, int64_t x_line, int64_t lines, int64_t in);
void multiply_tiles(float *out, const void *parts, int64_t lines, int64_t in, const float *add, layer a, int gated, const void *then);
const void *first_tiles(layer a, int64_t in, int gated);
int likely_tokens(int64_t *ids, float *probs, int64_t width, const float *scores, int64_t line, int64_t rows, int64_t vocab,
                  const float *temperature, const float *limit, const float *min_p, const int64_t *top_k, const int64_t *seeds,
                  const int64_t *positions);
