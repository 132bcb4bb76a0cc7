/* Products of a few lines with weights as they lie in memory, which are read once for all lines: what a decode of one row, or
 * a verification of its drafts, spends its time on. Each sum is made in the same order however many lines there are. */
#include "blocks.h"
#include "lanes.h"

enum { FEW = 4 }; /* lines at a time; then a block has LANES / 4 outputs, with fewer lines more */

/* Floats in a register: how many lines pay depends on it. */
int64_t vector_lanes(void) { return LANES; }

/* sums[r * lines + m]: product of row w[r] and line x[m]; rows * lines = LANES. Fetches what lies `ahead` of the rows, at a
 * pace of 1 / 2^slow: where several passes read the same rows, each fetches its part of those that follow. */
INLINE void dots(float *sums, const float *const *w, const float *const *x, int64_t in, int64_t ahead, int slow, const int rows,
                 const int lines) {
    lanes part[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= in; i += LANES)
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            lanes weight = *(const lanes *)(w[r] + i);
            HELD(weight);
            __builtin_prefetch(w[r] + ahead + (i >> slow), 0, 2); /* to the second level: the first has too few places */
#pragma GCC unroll 4
            for (int m = 0; m < lines; m++) part[r * lines + m] += weight * *(const lanes *)(x[m] + i);
        }
    *(lanes *)sums = totals(part);
    for (; i < in; i++)
        for (int r = 0; r < rows; r++)
            for (int m = 0; m < lines; m++) sums[r * lines + m] += w[r][i] * x[m][i];
}

/* sums[r * lines + m] for rows [first, first + LANES / lines) of a layer (its last one again past its end) and lines of x. */
INLINE void block(float *sums, layer a, int64_t first, const float *x, int64_t x_line, int64_t given, int64_t in, int64_t ahead,
                  int slow, const int lines) {
    const float *w[LANES], *line[FEW];
    for (int r = 0; r < LANES / lines; r++) w[r] = (const float *)a.weight + (first + r < a.rows ? first + r : a.rows - 1) * in;
    for (int m = 0; m < lines; m++) line[m] = x + (m < given ? m : given - 1) * x_line;
    dots(sums, w, line, in, ahead, slow, LANES / lines, lines);
}

typedef struct {
    float *out;
    const float *x, *add;
    int64_t x_line, lines, in, width;
} task;

enum { STEP = LANES }; /* outputs that a thread computes for all lines before it goes on: their weights stay at hand */

/* The block of `block` for lines [begin, begin + lines) of the task. */
static void any_block(float *sums, const task *t, layer a, int64_t first, int64_t begin, int lines) {
    const float *x = t->x + begin * t->x_line;
    const int64_t left = t->lines - begin;
    const int64_t passes = (t->lines + FEW - 1) / FEW;
    const int slow = passes > 4 ? 3 : passes > 2 ? 2 : passes > 1;
    const int64_t ahead = STEP * t->in + begin / FEW % (1 << slow) * (t->in >> slow);
    if (lines == 1) block(sums, a, first, x, t->x_line, left, t->in, ahead, slow, 1);
    else if (lines == 2) block(sums, a, first, x, t->x_line, left, t->in, ahead, slow, 2);
    else block(sums, a, first, x, t->x_line, left, t->in, ahead, slow, 4);
}

/* Lines at a time, of `left`. */
INLINE int at_once(int64_t left) { return left > 2 ? FEW : (int)left; }

/* Outputs [first, first + STEP) of one layer, which begin at column `column` of out. */
static void linear_rows(const task *t, layer a, int64_t first, int64_t column) {
    float sums[LANES];
    for (int64_t begin = 0; begin < t->lines; begin += FEW) {
        const int64_t left = t->lines - begin;
        const int lines = at_once(left);
        for (int64_t r = first; r < first + STEP && r < a.rows; r += LANES / lines) {
            any_block(sums, t, a, r, begin, lines);
            for (int64_t i = r; i < r + LANES / lines && i < a.rows; i++)
                for (int64_t m = 0; m < lines && m < left; m++) {
                    const int64_t at = (begin + m) * t->width + column + i;
                    t->out[at] = sums[(i - r) * lines + m] + (a.bias ? a.bias[i] : 0) + (t->add ? t->add[at] : 0);
                }
        }
    }
}

/* out[:, first .. first + STEP) = silu(gate) * up. */
static void gated_rows(const task *t, layer gate, layer up, int64_t first) {
    float opened[LANES], sums[LANES];
    for (int64_t begin = 0; begin < t->lines; begin += FEW) {
        const int64_t left = t->lines - begin;
        const int lines = at_once(left);
        for (int64_t r = first; r < first + STEP && r < gate.rows; r += LANES / lines) {
            any_block(opened, t, gate, r, begin, lines);
            any_block(sums, t, up, r, begin, lines);
            for (int64_t i = r; i < r + LANES / lines && i < gate.rows; i++)
                for (int64_t m = 0; m < lines && m < left; m++) {
                    const float g = opened[(i - r) * lines + m] + (gate.bias ? gate.bias[i] : 0);
                    const float u = sums[(i - r) * lines + m] + (up.bias ? up.bias[i] : 0);
                    t->out[(begin + m) * t->width + i] = g / (1 + expf(-g)) * u;
                }
        }
    }
}

/* `few_linear` by the threads of a team. */
void multiply_lines(float *out, const float *x, int64_t x_line, int64_t lines, int64_t in, const float *add, const layer *layers) {
    const int64_t width = layers[0].rows + layers[1].rows + layers[2].rows;
    const task t = {out, x, add, x_line, lines, in, width};
    int64_t steps[4] = {0};
    for (int i = 0; i < 3; i++) steps[i + 1] = steps[i] + (layers[i].rows + STEP - 1) / STEP;
#pragma omp for schedule(static)
    for (int64_t s = 0; s < steps[3]; s++) {
        const int l = (s >= steps[1]) + (s >= steps[2]);
        const int64_t column = l == 0 ? 0 : l == 1 ? layers[0].rows : layers[0].rows + layers[1].rows;
        linear_rows(&t, layers[l], (s - steps[l]) * STEP, column);
    }
}

/* `few_gated` by the threads of a team. */
void multiply_gated(float *out, const float *x, int64_t x_line, int64_t lines, int64_t in, layer gate, layer up) {
    const task t = {out, x, 0, x_line, lines, in, gate.rows};
#pragma omp for schedule(static)
    for (int64_t s = 0; s < (gate.rows + STEP - 1) / STEP; s++) gated_rows(&t, gate, up, s * STEP);
}

/* out [lines, width]: products of x [lines, in], lines x_line floats apart, with up to three layers side by side, plus `add`
 * of the shape of out, or null. width: outputs of all layers. */
void few_linear(float *out, const float *x, int64_t x_line, int64_t lines, int64_t in, const float *add, const float *weight_a,
                const float *bias_a, int64_t rows_a, const float *weight_b, const float *bias_b, int64_t rows_b,
                const float *weight_c, const float *bias_c, int64_t rows_c) {
    const layer layers[3] = {{weight_a, bias_a, rows_a}, {weight_b, bias_b, rows_b}, {weight_c, bias_c, rows_c}};
#pragma omp parallel if ((rows_a + rows_b + rows_c) * in > 16384)
    multiply_lines(out, x, x_line, lines, in, add, layers);
}

/* out [lines, rows] = silu(x gate) * (x up). */
void few_gated(float *out, const float *x, int64_t x_line, int64_t lines, int64_t in, const float *gate, const float *gate_bias,
               const float *up, const float *up_bias, int64_t rows) {
    const layer g = {gate, gate_bias, rows}, u = {up, up_bias, rows};
#pragma omp parallel if (rows * in > 8192)
    multiply_gated(out, x, x_line, lines, in, g, u);
}
