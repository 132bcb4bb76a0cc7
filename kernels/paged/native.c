/* CPU ops in float32, for `native.py`, which compiles this file on the machine that runs it.
 * Layout of pages: [num_pages, kv_heads, page_size, dim]. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define INLINE static inline __attribute__((always_inline))

/* Sixteen floats anywhere in memory; compilers split them where registers are narrower. */
typedef float lanes __attribute__((vector_size(64), aligned(4)));
typedef int32_t ints __attribute__((vector_size(64)));

/* Lanes of a where `mask` is set, else of b. (C has no ?: over vectors.) */
INLINE lanes choose(ints mask, lanes a, lanes b) { return (lanes)(((ints)a & mask) | ((ints)b & ~mask)); }

INLINE float total(lanes x) {
    float sum = 0;
    for (int i = 0; i < 16; i++) sum += x[i];
    return sum;
}

INLINE float largest(lanes x) {
    float top = x[0];
    for (int i = 1; i < 16; i++) top = x[i] > top ? x[i] : top;
    return top;
}

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

/* e^x for x <= 0, to about 2 units in the last place, sixteen at a time (Cephes' expf polynomial). */
INLINE lanes exp_of_negative(lanes x) {
    x = choose(x < -87.0f, (lanes){0} - 87.0f, x);
    const ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, ints);
    const lanes r = x - __builtin_convertvector(n, lanes) * 0.693147181f;
    lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (lanes)((n + 127) << 23);
}

INLINE lanes silu(lanes x) {
    const lanes e = exp_of_negative(choose(x < 0, x, -x)); /* e^-|x| */
    return x * choose(x < 0, e, (lanes){0} + 1.0f) / (1.0f + e);
}

/* Softmax over scores[0, n), after `softcap` (0: none); a sink, if any, takes its share of the sum. Writes up to the next
 * multiple of 16. */
static void softmax(float *scores, int64_t n, float softcap, const float *sink) {
    lanes top = (lanes){0} + (sink ? *sink : -INFINITY), sum = {0};
    if (softcap > 0)
        for (int64_t i = 0; i < n; i++) scores[i] = softcap * tanhf(scores[i] / softcap);
    for (int64_t i = n; i % 16; i++) scores[i] = -INFINITY;
    for (int64_t i = 0; i < n; i += 16) {
        const lanes x = *(lanes *)(scores + i);
        top = choose(x > top, x, top);
    }
    top = (lanes){0} + largest(top);
    for (int64_t i = 0; i < n; i += 16) {
        const lanes e = exp_of_negative(*(lanes *)(scores + i) - top);
        *(lanes *)(scores + i) = e;
        sum += e;
    }
    const float scale = 1 / (total(sum) + (sink ? expf(*sink - top[0]) : 0));
    for (int64_t i = 0; i < n; i += 16) *(lanes *)(scores + i) *= scale;
}

/* One row and KV head: `group` queries over all slots of a span. `then`: the keys that are read next. */
INLINE void attend(float *out, float *scores, int64_t stride, const float *query, span keys, span values, span then,
                   float scale, float softcap, const float *sinks, const int64_t group, const int64_t dim,
                   const int64_t value_dim) {
    keys.dim = then.dim = dim;
    values.dim = value_dim;
    score_slots(scores, stride, query, keys, values, group, scale, dim);
    for (int64_t g = 0; g < group; g++) softmax(scores + g * stride, keys.end - keys.begin, softcap, sinks ? sinks + g : 0);
    sum_values(out, scores, stride, values, then, group, value_dim);
}

/* Each query by itself. query: [rows, heads, dim], rows query_line floats apart; out: [rows, heads, value_dim]; query r
 * sees the first context[r] slots of line line_of[r] of table [lines, table_width]; window 0: none. Returns 0, or 1 where memory ran out. */
int decode_attention(float *out, const float *query, int64_t query_line, const float *keys, const float *values, const int64_t *table,
                     int64_t table_width, const int64_t *line_of, const int64_t *context, int64_t rows, int64_t heads, int64_t kv_heads,
                     int64_t dim, int64_t value_dim, int64_t page, float scale, int64_t window, float softcap,
                     const float *sinks) {
    const int64_t group = heads / kv_heads, items = rows * kv_heads;
    int64_t longest = 0, taken = 0;
    int failed = 0;
    for (int64_t r = 0; r < rows; r++) longest = context[r] > longest ? context[r] : longest;
    const int64_t stride = (longest + 31) / 16 * 16;
#define SPAN(pages, row, head, dim) \
    ((span){pages, table + line_of[row] * table_width, window && context[row] > window ? context[row] - window : 0, \
            context[row], head, kv_heads, page, dim})
#pragma omp parallel
    {
        float *scores = malloc(sizeof(float) * (size_t)(group * stride));
        int64_t item, after;
        if (!scores) failed = 1;
#pragma omp atomic capture
        item = taken++;
        /* A thread takes its next item before it computes one, so that memory can be on its way. */
        for (; scores && item < items; item = after) {
#pragma omp atomic capture
            after = taken++;
            const int64_t row = item / kv_heads, head = item % kv_heads;
            const span k = SPAN(keys, row, head, dim), v = SPAN(values, row, head, value_dim);
            const span then = after < items ? SPAN(keys, after / kv_heads, after % kv_heads, dim) : k;
            const float *q = query + row * query_line + head * group * dim;
            const float *sink = sinks ? sinks + head * group : 0;
            float *o = out + (row * heads + head * group) * value_dim;
#define ATTEND(G, D, V) attend(o, scores, stride, q, k, v, then, scale, softcap, sink, G, D, V)
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
        for (int64_t i = 0; i + 16 <= width; i += 16)
            *(lanes *)(out + t * width + i) = silu(*(const lanes *)(gate + i)) * *(const lanes *)(up + i);
        for (int64_t i = width / 16 * 16; i < width; i++) out[t * width + i] = silu((lanes){0} + gate[i])[0] * up[i];
    }
}
