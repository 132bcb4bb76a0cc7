/* Ops of the other files that a forward over a few lines calls one after another. */
#pragma once
#include <stdint.h>

typedef struct step step; /* of grouped.c */

void rms_norm(float *out, const float *x, const float *weight, float eps, int64_t lines, int64_t width);
void rotate_and_store(float *query, float *key, const float *value, const float *cos, const float *sin, float *keys,
                      float *values, const int64_t *slots, int64_t query_line, int64_t key_line, int64_t value_line,
                      int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim, int64_t page);
int decode_attention(float *out, const float *query, int64_t query_line, const float *keys, const float *values,
                     const int64_t *table, int64_t table_width, const int64_t *line_of, const int64_t *context, int64_t rows,
                     int64_t heads, int64_t kv_heads, int64_t dim, int64_t value_dim, int64_t page, float scale,
                     const int64_t *begin, float softcap, const float *sinks, const int64_t *visible, const int64_t *base);
int grouped_attention(float *out, const float *query, int64_t query_line, const float *keys, const float *values,
                      const step *step, int64_t heads, int64_t kv_heads, int64_t dim, int64_t value_dim, int64_t page,
                      float scale, float softcap, const float *sinks);
void few_linear(float *out, const float *x, int64_t x_line, int64_t lines, int64_t in, const float *add, const float *weight_a,
                const float *bias_a, int64_t rows_a, const float *weight_b, const float *bias_b, int64_t rows_b,
                const float *weight_c, const float *bias_c, int64_t rows_c);
void few_gated(float *out, const float *x, int64_t x_line, int64_t lines, int64_t in, const float *gate, const float *gate_bias,
               const float *up, const float *up_bias, int64_t rows);
int likely_tokens(int64_t *ids, float *probs, int64_t width, const float *scores, int64_t line, int64_t rows, int64_t vocab,
                  const float *temperature, const float *limit, const float *min_p, const int64_t *top_k, const int64_t *seeds,
                  const int64_t *positions);
