/* Decode steps one behind another, of rows whose tokens follow from their logits, parameters and noise alone: forward, draw, and on
 * to the next token, without calls from Python in between, each of which finds its code swept from the caches by the weights. */
#include "blocks.h"
#include "lanes.h"
#include <stdlib.h>

/* When a row ends: tokens that it may have yet, and ids that end it, those of row r from begin[r] to begin[r + 1]. */
typedef struct {
    const int64_t *left, *begin, *ids;
} limits;

/* Up to `steps` of them; the one in which a row ends is the last. tokens, tops [steps, rows]: as `draw_tokens` has them; seconds
 * [steps]: of each; done: how many there were. What `in`, the rows' positions and the slots that they see, `context`, say of the
 * first step is moved along; so is where a group's last slot is a row's own, `own`, null where there are no groups. Returns what `few_forward` does. */
int few_steps(int64_t *tokens, float *tops, double *seconds, int64_t *done, int64_t steps, const settings *rows, int64_t *context, int64_t *own,
              const limits *l, const ends *e, const model_block *blocks, int64_t count, const sizes *n, const inputs *in, float turn,
              float scale, float eps) {
    const int64_t lines = n->lines;
    int64_t *ids = (int64_t *)in->ids, *places = (int64_t *)in->positions, *slots = (int64_t *)in->slots;
    int64_t *drawn = (int64_t *)rows->positions;
    const size_t room = (size_of_draw(e->outputs) + 63) / 64 * 64;
    float *scores = whole_lines(sizeof(float) * (size_t)(lines * e->outputs));
    char *memory = whole_lines(room * (size_t)omp_get_max_threads());
    int failed = !scores || !memory, over = 0;
    for (*done = 0; !failed && !over && *done < steps; tokens += lines, tops += lines) {
        const double begun = seconds_now();
        failed = few_forward(scores, e, blocks, count, n, in, 0, 0, turn, scale, eps);
        if (failed) break;
#pragma omp parallel for schedule(dynamic) if (lines > 1 && lines * e->outputs > 8192)
        for (int64_t r = 0; r < lines; r++)
            tokens[r] = draw_token(memory + room * (size_t)omp_get_thread_num(), scores + r * e->outputs, e->outputs, rows, r, tops + r);
        for (int64_t r = 0; r < lines; r++) {
            const int64_t place = ++places[r], page = place / n->page;
            over |= tokens[r] < 0 || ends_row(tokens[r], *done + 1, l->left[r], l->ids + l->begin[r], l->begin[r + 1] - l->begin[r]);
            if (own && own[r] == context[r]) own[r]++;
            ids[r] = tokens[r], context[r]++, drawn[r]++;
            if (page < n->table_width) slots[r] = in->table[r * n->table_width + page] * n->page + place % n->page;
        }
        seconds[(*done)++] = seconds_now() - begun;
    }
    free(scores), free(memory);
    return failed;
}
