/* Products of a few lines with weights as they lie in memory, which are read once for all lines: what a decode of one row, or
 * a verification of its drafts, spends its time on. Each sum is made in the same order however many lines there are. */
#include "lanes.h"

enum { FEW = 4 }; /* lines at a time; then a block has LANES / 4 outputs, with fewer lines more */

/* [rows, in], contiguous, and what is added to the products, or null. */
typedef struct {
    const float *weight, *bias;
    int64_t rows;
} layer;

/* sums[r * lines + m]: product of row w[r] and line x[m]; rows * lines = LANES. */
INLINE void dots(float *sums, const float *const *w, const float *const *x, int64_t in, const int rows, const int lines) {
    lanes part[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= in; i += LANES)
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const lanes weight = *(const lanes *)(w[r] + i);
            __builtin_prefetch(w[r] + i + rows * in, 0, 3); /* of the block that follows */
#pragma GCC unroll 4
            for (int m = 0; m < lines; m++) part[r * lines + m] += weight * *(const lanes *)(x[m] + i);
        }
    *(lanes *)sums = totals(part);
    for (; i < in; i++)
        for (int r = 0; r < rows; r++)
            for (int m = 0; m < lines; m++) sums[r * lines + m] += w[r][i] * x[m][i];
}

/* sums[r * lines + m] for rows [first, first + LANES / lines) of a layer (its last one again past its end) and lines of x. */
INLINE void block(float *sums, layer a, int64_t first, const float *x, int64_t x_line, int64_t given, int64_t in, const int lines) {
    const float *w[LANES], *line[FEW];
    for (int r = 0; r < LANES / lines; r++) w[r] = a.weight + (first + r < a.rows ? first + r : a.rows - 1) * in;
    for (int m = 0; m < lines; m++) line[m] = x + (m < given ? m : given - 1) * x_line;
    dots(sums, w, line, in, LANES / lines, lines);
}

static void any_block(float *sums, layer a, int64_t first, const float *x, int64_t x_line, int64_t given, int64_t in, int lines) {
    if (lines == 1) block(sums, a, first, x, x_line, given, in, 1);
    else if (lines == 2) block(sums, a, first, x, x_line, given, in, 2);
    else block(sums, a, first, x, x_line, given, in, 4);
}

/* Lines at a time, of `left`. */
INLINE int at_once(int64_t left) { return left > 2 ? FEW : (int)left; }

typedef struct {
    float *out;
    const float *x, *add;
    int64_t x_line, lines, in, width;
} task;

/* Outputs [first, first + step) of one layer, which begin at column `column` of out. */
static void linear_rows(const task *t, layer a, int64_t first, int64_t step, int64_t column) {
    float sums[LANES];
    for (int64_t begin = 0; begin < t->lines; begin += FEW) {
        const int64_t left = t->lines - begin;
        const int lines = at_once(left);
        for (int64_t r = first; r < first + step && r < a.rows; r += LANES / lines) {
            any_block(sums, a, r, t->x + begin * t->x_line, t->x_line, left, t->in, lines);
            for (int64_t i = r; i < r + LANES / lines && i < a.rows; i++)
                for (int64_t m = 0; m < lines && m < left; m++) {
                    const int64_t at = (begin + m) * t->width + column + i;
                    t->out[at] = sums[(i - r) * lines + m] + (a.bias ? a.bias[i] : 0) + (t->add ? t->add[at] : 0);
                }
        }
    }
}

/* out[:, first .. first + step) = silu(gate) * up. */
static void gated_rows(const task *t, layer gate, layer up, int64_t first, int64_t step) {
    float opened[LANES], sums[LANES];
    for (int64_t begin = 0; begin < t->lines; begin += FEW) {
        const int64_t left = t->lines - begin;
        const int lines = at_once(left);
        for (int64_t r = first; r < first + step && r < gate.rows; r += LANES / lines) {
            const float *x = t->x + begin * t->x_line;
            any_block(opened, gate, r, x, t->x_line, left, t->in, lines);
            any_block(sums, up, r, x, t->x_line, left, t->in, lines);
            for (int64_t i = r; i < r + LANES / lines && i < gate.rows; i++)
                for (int64_t m = 0; m < lines && m < left; m++) {
                    const float g = opened[(i - r) * lines + m] + (gate.bias ? gate.bias[i] : 0);
                    const float u = sums[(i - r) * lines + m] + (up.bias ? up.bias[i] : 0);
                    t->out[(begin + m) * t->width + i] = g / (1 + expf(-g)) * u;
                }
        }
    }
}

enum { STEP = 16 }; /* outputs that a thread computes for all lines before it goes on: their weights stay at hand */

/* out [lines, width]: products of x [lines, in], lines x_line floats apart, with up to three layers side by side, plus `add`
 * of the shape of out, or null. width: outputs of all layers. */
void few_linear(float *out, const float *x, int64_t x_line, int64_t lines, int64_t in, const float *add, const float *weight_a,
                const float *bias_a, int64_t rows_a, const float *weight_b, const float *bias_b, int64_t rows_b,
                const float *weight_c, const float *bias_c, int64_t rows_c) {
    const layer layers[3] = {{weight_a, bias_a, rows_a}, {weight_b, bias_b, rows_b}, {weight_c, bias_c, rows_c}};
    const int64_t width = rows_a + rows_b + rows_c;
    const task t = {out, x, add, x_line, lines, in, width};
    int64_t steps[4] = {0};
    for (int i = 0; i < 3; i++) steps[i + 1] = steps[i] + (layers[i].rows + STEP - 1) / STEP;
#pragma omp parallel for schedule(static) if (width * in > 16384)
    for (int64_t s = 0; s < steps[3]; s++) {
        const int l = (s >= steps[1]) + (s >= steps[2]);
        const int64_t column = l == 0 ? 0 : l == 1 ? rows_a : rows_a + rows_b;
        linear_rows(&t, layers[l], (s - steps[l]) * STEP, STEP, column);
    }
}

/* out [lines, rows] = silu(x gate) * (x up). */
void few_gated(float *out, const float *x, int64_t x_line, int64_t lines, int64_t in, const float *gate, const float *gate_bias,
               const float *up, const float *up_bias, int64_t rows) {
    const layer g = {gate, gate_bias, rows}, u = {up, up_bias, rows};
    const task t = {out, x, 0, x_line, lines, in, rows};
#pragma omp parallel for schedule(static) if (rows * in > 8192)
    for (int64_t s = 0; s < (rows + STEP - 1) / STEP; s++) gated_rows(&t, g, u, s * STEP, STEP);
}
