/* What stands between the products of a forward, in float32, for `native.py`. */
#include "blocks.h"
#include "lanes.h"

/* What x is multiplied by to have a mean square of 1: the same bits for all who ask, so no part of them. */
__attribute__((noinline)) float norm_scale(const float *x, float eps, int64_t width) {
    enum { SUMS = 4 }; /* at once: each waits for its last addition */
    lanes sums[SUMS] = {0};
    int64_t i = 0;
    for (; i + SUMS * LANES <= width; i += SUMS * LANES)
        for (int v = 0; v < SUMS; v++) {
            const lanes y = *(const lanes *)(x + i + v * LANES);
            sums[v] += y * y;
        }
    float sum = total((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < width; i++) sum += x[i] * x[i];
    return 1 / sqrtf(sum / width + eps);
}

INLINE void normalize_line(float *out, const float *x, const float *weight, float eps, int64_t width) {
    const float scale = norm_scale(x, eps, width);
    for (int64_t i = 0; i < width; i++) out[i] = x[i] * scale * weight[i];
}

/* `rms_norm` by the threads of a team. */
void normalize(float *out, const float *x, const float *weight, float eps, int64_t lines, int64_t width) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < lines; t++) normalize_line(out + t * width, x + t * width, weight, eps, width);
}

/* The same in place for each head of lines [heads, dim], which lie x_line floats apart. */
void normalize_heads(float *x, int64_t x_line, const float *weight, float eps, int64_t lines, int64_t heads, int64_t dim) {
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < lines; t++)
        for (int64_t h = 0; h < heads; h++) {
            float *head = x + t * x_line + h * dim;
            normalize_line(head, head, weight, eps, dim);
        }
}

/* out[t, :] = x[t, :] / rms(x[t, :]) * weight, over lines of `width`. */
void rms_norm(float *out, const float *x, const float *weight, float eps, int64_t lines, int64_t width) {
#pragma omp parallel if (lines * width > 16384)
    normalize(out, x, weight, eps, lines, width);
}

static void rotate(float *x, const float *cos, const float *sin, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

/* `rotate_and_store` by the threads of a team. */
void rotate_lines(float *query, float *key, const float *value, const float *cos, const float *sin, float *keys, float *values,
                  const int64_t *slots, int64_t query_line, int64_t key_line, int64_t value_line, int64_t tokens, int64_t heads,
                  int64_t kv_heads, int64_t dim, int64_t page) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        for (int64_t h = 0; h < heads; h++) rotate(query + t * query_line + h * dim, cos + t * dim, sin + t * dim, dim);
        for (int64_t h = 0; h < kv_heads; h++) {
            float *k = key + t * key_line + h * dim;
            const float *v = value + t * value_line + h * dim;
            const int64_t line = ((slots[t] / page * kv_heads + h) * page + slots[t] % page) * dim;
            rotate(k, cos + t * dim, sin + t * dim, dim);
            for (int64_t i = 0; i < dim; i++) keys[line + i] = k[i], values[line + i] = v[i];
        }
    }
}

/* Rotates query [tokens, heads, dim] and key [tokens, kv_heads, dim] in place (cos, sin: [tokens, dim]), and stores key
 * and value [tokens, kv_heads, dim] in their slots. Tokens lie query_line, key_line and value_line floats apart. */
void rotate_and_store(float *query, float *key, const float *value, const float *cos, const float *sin, float *keys,
                      float *values, const int64_t *slots, int64_t query_line, int64_t key_line, int64_t value_line,
                      int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim, int64_t page) {
#pragma omp parallel if (tokens * (heads + kv_heads) * dim > 16384)
    rotate_lines(query, key, value, cos, sin, keys, values, slots, query_line, key_line, value_line, tokens, heads, kv_heads, dim,
                 page);
}

/* out[t, i] = silu(x[t, i]) * x[t, width + i] for x [lines, 2 * width]. */
void silu_mul(float *out, const float *x, int64_t lines, int64_t width) {
#pragma omp parallel for schedule(static) if (lines * width > 8192)
    for (int64_t t = 0; t < lines; t++) {
        const float *gate = x + t * 2 * width, *up = gate + width;
        for (int64_t i = 0; i + LANES <= width; i += LANES)
            *(lanes *)(out + t * width + i) = silu(*(const lanes *)(gate + i)) * *(const lanes *)(up + i);
        for (int64_t i = width / LANES * LANES; i < width; i++) out[t * width + i] = silu((lanes){0} + gate[i])[0] * up[i];
    }
}
