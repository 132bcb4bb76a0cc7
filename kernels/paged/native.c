/* CPU ops in float32, for `native.py`, which compiles this file on the machine that runs it.
 * Layout of pages: [num_pages, kv_heads, page_size, dim]. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define INLINE static inline __attribute__((always_inline))

/* Sixteen floats anywhere in memory; compilers split them where registers are narrower. */
typedef float lanes __attribute__((vector_size(64), aligned(4)));
typedef float lanes8 __attribute__((vector_size(32)));
typedef float lanes4 __attribute__((vector_size(16)));

INLINE float sum_of(lanes x) {
    lanes8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    lanes4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    b += __builtin_shufflevector(b, b, 2, 3, 0, 1);
    b += __builtin_shufflevector(b, b, 1, 0, 3, 2);
    return b[0];
}

/* Scores of one KV head's `group` queries against slots [begin, end) of a row: scores[g * stride + i]. */
INLINE void score_slots(float *scores, int64_t stride, const float *query, const float *keys, const int64_t *table,
                        int64_t begin, int64_t end, int64_t head, int64_t kv_heads, const int64_t group, int64_t page,
                        float scale, const int64_t dim) {
    const int64_t wide = dim / 16;
    for (int64_t t = begin; t < end;) {
        int64_t stop = (t / page + 1) * page;
        if (stop > end) stop = end;
        const float *key = keys + ((table[t / page] * kv_heads + head) * page + t % page) * dim;
        const float *next = stop < end ? keys + (table[stop / page] * kv_heads + head) * page * dim : key;
        for (; t < stop; t++, key += dim, next += dim) {
            for (int64_t i = 0; i < wide; i++) __builtin_prefetch(next + 16 * i);
            for (int64_t g = 0; g < group; g++) {
                lanes part = {0};
                for (int64_t i = 0; i < wide; i++)
                    part += *(const lanes *)(query + g * dim + 16 * i) * *(const lanes *)(key + 16 * i);
                float sum = sum_of(part);
                for (int64_t d = 16 * wide; d < dim; d++) sum += query[g * dim + d] * key[d];
                scores[g * stride + t - begin] = sum * scale;
            }
        }
    }
}

/* out[g, :] = sum of weights[g, i] * value of slot i. */
INLINE void sum_values(float *out, const float *weights, int64_t stride, const float *values, const int64_t *table,
                       int64_t begin, int64_t end, int64_t head, int64_t kv_heads, const int64_t group, int64_t page,
                       const int64_t dim) {
    const int64_t wide = dim / 16;
    lanes sums[group * wide + 1];
    for (int64_t i = 0; i < group * wide; i++) sums[i] = (lanes){0};
    for (int64_t i = 0; i < group * dim; i++) out[i] = 0;
    for (int64_t t = begin; t < end;) {
        int64_t stop = (t / page + 1) * page;
        if (stop > end) stop = end;
        const float *value = values + ((table[t / page] * kv_heads + head) * page + t % page) * dim;
        const float *next = stop < end ? values + (table[stop / page] * kv_heads + head) * page * dim : value;
        for (; t < stop; t++, value += dim, next += dim) {
            for (int64_t i = 0; i < wide; i++) __builtin_prefetch(next + 16 * i);
            for (int64_t g = 0; g < group; g++) {
                const float weight = weights[g * stride + t - begin];
                for (int64_t i = 0; i < wide; i++) sums[g * wide + i] += weight * *(const lanes *)(value + 16 * i);
                for (int64_t d = 16 * wide; d < dim; d++) out[g * dim + d] += weight * value[d];
            }
        }
    }
    for (int64_t g = 0; g < group; g++)
        for (int64_t i = 0; i < wide; i++) *(lanes *)(out + g * dim + 16 * i) = sums[g * wide + i];
}

/* e^x for x <= 0, to about 2 units in the last place; in plain arithmetic, so that loops of it become vector code
 * (Cephes' expf polynomial). */
INLINE float exp_of_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    const int32_t n = (int32_t)(x * 1.44269504f - 0.5f);
    const float r = x - (float)n * 0.693147181f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t i; float f; } power = {(n + 127) << 23};
    return p * power.f;
}

/* Softmax over scores[0, n), after `softcap` (0: none); a sink, if any, takes its share of the sum. */
static void softmax(float *scores, int64_t n, float softcap, const float *sink) {
    float top = sink ? *sink : -INFINITY, sum = 0;
    if (softcap > 0)
        for (int64_t i = 0; i < n; i++) scores[i] = softcap * tanhf(scores[i] / softcap);
    for (int64_t i = 0; i < n; i++) top = scores[i] > top ? scores[i] : top;
    for (int64_t i = 0; i < n; i++) {
        const float e = exp_of_negative(scores[i] - top);
        scores[i] = e;
        sum += e;
    }
    if (sink) sum += expf(*sink - top);
    const float scale = 1 / sum;
    for (int64_t i = 0; i < n; i++) scores[i] *= scale;
}

/* One row and KV head: `group` queries over slots [begin, end). */
INLINE void attend(float *out, float *scores, int64_t stride, const float *query, const float *keys, const float *values,
                   const int64_t *table, int64_t begin, int64_t end, int64_t head, int64_t kv_heads, int64_t page,
                   float scale, float softcap, const float *sinks, const int64_t group, const int64_t dim,
                   const int64_t value_dim) {
    score_slots(scores, stride, query, keys, table, begin, end, head, kv_heads, group, page, scale, dim);
    for (int64_t g = 0; g < group; g++) softmax(scores + g * stride, end - begin, softcap, sinks ? sinks + g : 0);
    sum_values(out, scores, stride, values, table, begin, end, head, kv_heads, group, page, value_dim);
}

/* Each query by itself. query: [rows, heads, dim], rows query_line floats apart; out: [rows, heads, value_dim]; query r
 * sees the first context[r] slots of line line_of[r] of table [lines, table_width]; window 0: none. Returns 0, or 1 where memory ran out. */
int decode_attention(float *out, const float *query, int64_t query_line, const float *keys, const float *values, const int64_t *table,
                     int64_t table_width, const int64_t *line_of, const int64_t *context, int64_t rows, int64_t heads, int64_t kv_heads,
                     int64_t dim, int64_t value_dim, int64_t page, float scale, int64_t window, float softcap,
                     const float *sinks) {
    const int64_t group = heads / kv_heads;
    int64_t longest = 0;
    int failed = 0;
    for (int64_t r = 0; r < rows; r++) longest = context[r] > longest ? context[r] : longest;
    const int64_t stride = (longest + 15) / 16 * 16;
#pragma omp parallel
    {
        float *scores = malloc(sizeof(float) * (size_t)(group * stride));
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < rows * kv_heads; item++) {
            if (!scores) { failed = 1; continue; }
            const int64_t row = item / kv_heads, head = item % kv_heads, end = context[row];
            const int64_t begin = window && end > window ? end - window : 0;
            const int64_t *pages = table + line_of[row] * table_width;
            const float *q = query + row * query_line + head * group * dim;
            const float *sink = sinks ? sinks + head * group : 0;
            float *o = out + (row * heads + head * group) * value_dim;
#define ATTEND(G, D, V) \
    attend(o, scores, stride, q, keys, values, pages, begin, end, head, kv_heads, page, scale, softcap, sink, G, D, V)
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
    return failed;
}

/* out[t, :] = x[t, :] / rms(x[t, :]) * weight, over lines of `width`. */
void rms_norm(float *out, const float *x, const float *weight, float eps, int64_t lines, int64_t width) {
#pragma omp parallel for schedule(static) if (lines * width > 16384)
    for (int64_t t = 0; t < lines; t++) {
        const float *in = x + t * width;
        float sum = 0;
        for (int64_t i = 0; i < width; i++) sum += in[i] * in[i];
        const float scale = 1 / sqrtf(sum / width + eps);
        for (int64_t i = 0; i < width; i++) out[t * width + i] = in[i] * scale * weight[i];
    }
}

static void rotate(float *x, const float *cos, const float *sin, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

/* Rotates query [tokens, heads, dim] and key [tokens, kv_heads, dim] in place (cos, sin: [tokens, dim]), and stores key
 * and value [tokens, kv_heads, dim] in their slots. Tokens lie query_line, key_line and value_line floats apart. */
void rotate_and_store(float *query, float *key, const float *value, const float *cos, const float *sin, float *keys,
                      float *values, const int64_t *slots, int64_t query_line, int64_t key_line, int64_t value_line,
                      int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim, int64_t page) {
#pragma omp parallel for schedule(static) if (tokens * (heads + kv_heads) * dim > 16384)
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

/* out[t, i] = silu(x[t, i]) * x[t, width + i] for x [lines, 2 * width]. */
void silu_mul(float *out, const float *x, int64_t lines, int64_t width) {
#pragma omp parallel for schedule(static) if (lines * width > 8192)
    for (int64_t t = 0; t < lines; t++) {
        const float *gate = x + t * 2 * width, *up = gate + width;
        for (int64_t i = 0; i < width; i++) {
            const float g = gate[i], e = exp_of_negative(g < 0 ? g : -g); /* e^-|g| */
            out[t * width + i] = g * up[i] * (g < 0 ? e : 1.0f) / (1.0f + e);
        }
    }
}
