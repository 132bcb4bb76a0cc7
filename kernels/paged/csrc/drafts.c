/* Drafts of a model of few lines: forwards and the choice of tokens behind them, without calls from Python in between. */
#include "blocks.h"
#include "lanes.h"

/* The forward, and what `likely_tokens` says of each wanted line, which stands `ahead` tokens behind the last one of its row: `rows`
 * are parameters of the rows of the table, and every block has the same sight. Returns what few_forward does. */
int few_drafts(int64_t *tokens, float *probs, int64_t width, const settings *rows, int64_t ahead, const ends *e, const model_block *blocks,
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

/* `few_drafts` of one row, whose last line alone is wanted; then behind its likeliest token, and so on: `deepest` times in all, or
 * until the odds of these tokens have a product under `least`: odds[i] where the model gives one a probability of (i to i + 1) / kinds.
 * slots: of the tokens to come. What `in` and the blocks' sight say of the first line is written over. tokens, probs [deepest, width];
 * depth: how many lines of them there are then. */
int few_chain(int64_t *tokens, float *probs, int64_t width, const settings *rows, int64_t deepest, float least, const float *odds,
              int64_t kinds, const int64_t *slots, int64_t *depth, const ends *e, const model_block *blocks, int64_t count, const sizes *n,
              const inputs *in, const float *cos, const float *sin, float turn, float scale, float eps) {
    const sight *see = blocks->sight;
    const int64_t last = in->wanted[0], position = in->positions[last], context = see->context[last];
    sizes one = *n;
    float reach = 1;
    int failed = few_drafts(tokens, probs, width, rows, 0, e, blocks, count, n, in, cos, sin, turn, scale, eps);
    one.lines = 1;
    for (*depth = 1; !failed && *depth < deepest; ++*depth) {
        const int64_t token = tokens[(*depth - 1) * width];
        const float prob = probs[(*depth - 1) * width];
        if (token < 0 || !(prob >= 0)) break; /* there is none, or numbers that are not finite */
        const int64_t kind = (int64_t)(prob * (float)kinds);
        reach *= odds[kind < kinds ? kind : kinds - 1];
        if (reach < least) break;
        const int64_t line[] = {token, position + *depth, slots[*depth - 1], see->line_of[last], context + *depth, -1, 0};
        const int64_t *const fields[] = {in->ids, in->positions, in->slots, see->line_of, see->context, see->visible, in->wanted};
        for (int f = 0; f < 7; f++) *(int64_t *)fields[f] = line[f];
        failed = few_drafts(tokens + *depth * width, probs + *depth * width, width, rows, *depth, e, blocks, count, &one, in, cos, sin,
                            turn, scale, eps);
    }
    return failed;
}
