/* Steps with drafts: what a step is made of, in `proposals.c` and `verified.c`. */
#pragma once
#include "attention.h"
#include "blocks.h"

enum { NODES = 62, DEPTHS = 3, LONGEST_MATCH = 32, MATCHES = 7 };
enum { LOOKED_UP, BY_MODEL, FOLLOWED, SOURCES }; /* who drafts: a row's own text, a draft model, a text that it repeats */

/* Fields of 64 bits, as in `native_verified.py`. A model, with sizes but for its lines; factors: turn, scale and eps. */
typedef struct {
    const ends *ends;
    const model_block *blocks;
    int64_t count;
    sizes *sizes;
    const float *factors;
} model;

/* A row. text: its tokens, with room for those that it may have yet; `length` are known, and KV of all but the last is stored, of
 * `known` that of the draft model. slots: that its pages have. followed: tokens [begin, end) of a text that it repeats, `behind` tokens
 * further there than here, or null; end -1: its own text. taken, expected: drafts of its text, of the model and of `followed`, which
 * decay; value: what a token of it is worth; ended: whether its last token was drawn. */
typedef struct {
    int64_t *text, length, slots, left, known;
    const int64_t *stops;
    int64_t num_stops;
    const int64_t *followed;
    int64_t begin, end, behind;
    double taken[SOURCES], expected[SOURCES], value;
    int64_t ended;
} text_row;

/* What is drafted. ngram: longest that is looked up, 0: none; deepest: drafts behind one; usual: as in `depth_behind`, or -1.
 * sure: tokens that a row and what it follows have in common at least.
 * chain: most drafts of the model behind one another, 0: none; width: beside each other; kinds: of probabilities. looked, repeated
 * [DEPTHS, MATCHES], drafted [DEPTHS, 3 * kinds]: odds by depth and kind. seconds [most + 1]: of a step by the number of its drafts; forward
 * [rows + 1]: of the draft model by that of its lines.
 * ending: rows that may end before the others do not go on.
 * together, least_slots: lines of a row, and slots that they see, from which on they are computed together, see `groups.py`. The
 * others are as in `guide.py`; plain: tokens a second without drafts; behind: odds that a draft behind another one is taken; expected: drafts that the model is expected to have taken, price: what these must be worth. */
typedef struct {
    int64_t ngram, deepest, usual, sure, chain, width, kinds;
    const float *looked, *repeated, *drafted;
    const double *seconds, *forward;
    int64_t most, together, least_slots, ending;
    double margin, cheapest, least, plain, behind, row_decay, row_trust, expected, price;
} rules;

/* What came of it, step by step: counts [steps, rows, 4], of a row its drafts, those taken, tokens drawn, and who drafted (0:
 * nobody, else one more than above); one behind another nodes [., 3], token, parent and kind of each draft, odds of each, paths,
 * the drafts taken, and tokens; seconds [steps, 2], of forwards and of drafting; chains [steps, 3], tokens that the draft model
 * took in at first, its depth, and its lines in all. done: steps; spoilt: whether a number was not finite in the one that would be next. */
typedef struct {
    int64_t *counts, *nodes, *paths, *tokens, *chains, done, spoilt;
    float *odds;
    double *seconds;
} record;

typedef struct {
    int64_t row, token, parent, kind, index; /* index: where it stands among the row's */
    float odds, reach;
    double worth;
} draft;

/* A step in the making. of: the row's drafts begin there; nodes: those to be verified; lines: the first one of each row. */
typedef struct {
    draft *offers, *nodes;
    int64_t *of, *from, *lines;
    int64_t offered, chosen, lost, capacity, *source; /* lost: rows that no longer repeat a text; capacity: lines that there is room for */
    int64_t *alive, *depth, *deepest, *guesses, *said; /* rows of which more is asked; guesses of each row [chain, width] */
    float *reach, *likely, *probs;                     /* of the likeliest tokens; of guesses; of what is said [rows, width] */
    int64_t *ids, *positions, *slots, *line_of, *context, *visible, *base, *own, *members, *part_start, *parts, *wanted, *table;
    segment *segments;
    float *scores;
    step grouped;
    sight see;
} work;

static inline int64_t slot_of(const int64_t *table, int64_t place, int64_t page) { return table[place / page] * page + place % page; }

int propose(work *w, text_row *rows, int64_t count, const rules *a, const model *draft, const settings *given, int64_t *chain,
            double *spent);
