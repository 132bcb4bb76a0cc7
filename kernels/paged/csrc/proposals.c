/* Drafts for the steps of `verified.c`: what followed the same tokens in a row's own text, what comes next in a text that it repeats, or
 * what a draft model says; and which of them are worth to be verified. */
#include "verified.h"
#include <stdlib.h>
#include <string.h>

static int64_t kind_of_match(int64_t length) {
    static const int64_t bounds[] = {1, 2, 3, 5, 8, 15};
    int64_t kind = 0;
    for (int i = 0; i < 6; i++) kind += length > bounds[i];
    return kind;
}

static double ratio_of(const text_row *r, int source, const rules *a) {
    return (r->taken[source] + a->row_trust) / (r->expected[source] + a->row_trust);
}

static float clamped(double odds) { return odds < 0.01 ? 0.01f : odds > 0.985 ? 0.985f : (float)odds; }

/* How many tokens before place a of one text and place b of another agree, up to `most`. */
static int64_t agreement(const int64_t *one, int64_t a, const int64_t *other, int64_t b, int64_t most) {
    int64_t n = 0;
    while (n < most && n < a && n < b && one[a - 1 - n] == other[b - 1 - n]) n++;
    return n;
}

/* Where the longest n-gram that ends the text ended before, the latest of them; 0: nowhere. */
static int64_t find_match(const text_row *r, int64_t ngram, int64_t *length) {
    const int64_t end = r->length, last = r->text[end - 1];
    int64_t best = 0, at = 0;
    for (int64_t stop = end - 1; stop > 0 && best < ngram; stop--) {
        if (r->text[stop - 1] != last) continue;
        const int64_t n = agreement(r->text, stop, r->text, end, ngram);
        if (n > best) best = n, at = stop;
    }
    if (at) *length = agreement(r->text, at, r->text, end, LONGEST_MATCH);
    return at;
}

static void offer(work *w, int64_t row, int64_t token, int64_t parent, int64_t kind, float odds, float before, double value) {
    const int64_t index = w->offered - w->of[row];
    w->offers[w->offered++] = (draft){row, token, parent, kind, index, odds, before * odds, before * odds * value};
}

/* Drafts behind a match of so many tokens: `period` tokens from `next` on, over and over. odds: by depth and kind. Returns how much is
 * expected of them. */
static double offer_text(work *w, const text_row *r, int64_t row, int source, const int64_t *next, int64_t period, int64_t length,
                         int64_t most, const float *odds, const rules *a) {
    const int64_t kind = kind_of_match(length), behind = a->usual > length ? a->usual : length;
    const int64_t deep = a->deepest < most ? a->deepest : most, depth = a->usual >= 0 && behind < deep ? behind : deep;
    const double ratio = ratio_of(r, source, a);
    double sum = 0;
    float reach = 1;
    if (clamped(odds[kind] * ratio) * r->value < a->cheapest) return 0;
    w->source[row] = source + 1;
    for (int64_t i = 0; i < depth; i++) {
        const float one = clamped(odds[(i < DEPTHS ? i : DEPTHS - 1) * MATCHES + kind] * ratio);
        offer(w, row, next[i % period], i - 1, kind, one, reach, r->value);
        sum += reach *= one;
    }
    return sum;
}

/* What followed the end of a row's text before. */
static double look_up(work *w, const text_row *r, int64_t row, int64_t most, const rules *a) {
    int64_t length = 0, at = a->ngram && most > 0 ? find_match(r, a->ngram, &length) : 0;
    return at ? offer_text(w, r, row, LOOKED_UP, r->text + at, r->length - at, length, most, a->looked, a) : 0;
}

/* What comes next in the text that a row repeats, as long as it does. */
static double follow_on(work *w, const text_row *r, int64_t row, int64_t most, const rules *a) {
    const int64_t end = r->end < 0 ? r->length : r->end, at = r->length + r->behind;
    if (!r->followed || most <= 0) return 0;
    const int inside = r->begin < at && at < end;
    const int64_t length = inside ? agreement(r->followed, at - r->begin, r->text, r->length, LONGEST_MATCH) : 0;
    if (length < a->sure) {
        w->lost++;
        return 0;
    }
    return offer_text(w, r, row, FOLLOWED, r->followed + at - r->begin, end - at, length, most, a->repeated, a);
}

/* A line of the draft model's forward: the token at a place of a row's text, or behind it of its guesses. */
static void lay_guess(work *w, const text_row *r, int64_t row, int64_t place, int64_t line, const rules *a, const sizes *n) {
    const int64_t *guesses = w->guesses + row * a->chain * a->width, behind = place - r->length;
    w->ids[line] = behind < 0 ? r->text[place] : guesses[behind * a->width];
    w->positions[line] = place, w->slots[line] = slot_of(w->table + row * n->table_width, place, n->page);
    w->line_of[line] = row, w->context[line] = place + 1, w->visible[line] = -1, w->base[line] = 0;
}

static int64_t kind_of_guess(float prob, int64_t rank, int64_t kinds) {
    const int64_t kind = (int64_t)(prob * (float)kinds);
    return (kind < kinds ? kind : kinds - 1) + kinds * (rank < 2 ? rank : 2);
}

static const float *odds_at(const rules *a, int64_t depth) { return a->drafted + (depth < DEPTHS ? depth : DEPTHS - 1) * 3 * a->kinds; }

/* What a draft model says of the rows that are `alive`: their likeliest tokens one behind another, a forward a depth, as long as they
 * are reached often enough. Returns what few_forward does, and 3 where it says NaN. tell: tokens that it took in at first, its depth,
 * and lines in all. */
static int ask_model(work *w, text_row *rows, int64_t asked, const rules *a, const model *m, const settings *given, int64_t *tell) {
    inputs in = {w->ids, w->positions, w->slots, w->table, w->wanted, 0};
    const sight see = {0, w->line_of, w->context, 0, w->visible, w->base};
    memcpy((sight *)m->blocks->sight, &see, sizeof see);
    for (int64_t d = 0, going; asked; d++, asked = going) {
        int64_t lines = 0;
        for (int64_t i = 0; i < asked; i++) {
            const text_row *r = rows + w->alive[i];
            for (int64_t place = d ? r->length + d - 1 : r->known, end = r->length + d; place < end; place++)
                lay_guess(w, r, w->alive[i], place, lines++, a, m->sizes);
            w->wanted[i] = lines - 1;
        }
        m->sizes->lines = lines, in.wanted_lines = asked;
        const int failed = few_drafts(w->said, w->probs, a->width, given, d, m->ends, m->blocks, m->count, m->sizes, &in, 0, 0,
                                      m->factors[0], m->factors[1], m->factors[2]);
        if (failed) return failed;
        if (!d) tell[0] = lines;
        tell[1] = d + 1, tell[2] += lines, going = 0;
        const double another = (a->least + a->forward[asked] * a->plain / (double)asked) / a->behind;
        for (int64_t i = 0; i < asked; i++) {
            const int64_t row = w->alive[i], at = (row * a->chain + d) * a->width;
            text_row *r = rows + row;
            const float prob = w->probs[i * a->width];
            r->known = d ? r->known : r->length;
            if (prob != prob) return 3;
            if (w->said[i * a->width] < 0) continue; /* no token is allowed there */
            memcpy(w->guesses + at, w->said + i * a->width, sizeof(int64_t) * (size_t)a->width);
            memcpy(w->likely + at, w->probs + i * a->width, sizeof(float) * (size_t)a->width);
            w->depth[row] = d + 1;
            w->reach[row] *= clamped(odds_at(a, d)[kind_of_guess(prob, 0, a->kinds)] * ratio_of(r, BY_MODEL, a));
            if (d + 1 < w->deepest[row] && w->reach[row] * r->value >= another) w->alive[going++] = row;
        }
    }
    return 0;
}

/* A row's guesses as offers: the likeliest tokens, then those beside them that are reached often enough. */
static void offer_guesses(work *w, const text_row *r, int64_t row, const rules *a) {
    const int64_t room = r->slots - r->length < NODES ? r->slots - r->length : NODES;
    const double ratio = ratio_of(r, BY_MODEL, a);
    w->source[row] = BY_MODEL + 1, w->of[row] = w->offered;
    for (int beside = 0; beside < 2; beside++) {
        float reach = 1;
        for (int64_t d = 0; d < w->depth[row]; d++) {
            const int64_t at = (row * a->chain + d) * a->width;
            const float before = reach;
            for (int64_t rank = 0; rank < a->width && w->guesses[at + rank] >= 0; rank++) {
                const int64_t kind = kind_of_guess(w->likely[at + rank], rank, a->kinds);
                const float odds = clamped(odds_at(a, d)[kind] * ratio);
                if (!rank) reach *= odds;
                if (w->offered - w->of[row] < room && (beside ? rank && before * odds >= a->least : !rank))
                    offer(w, row, w->guesses[at + rank], d - 1, kind, odds, before, r->value);
            }
        }
    }
}

static int by_worth(const void *a, const void *b) {
    const draft *x = a, *y = b;
    if (x->worth != y->worth) return x->worth < y->worth ? 1 : -1;
    return x->index != y->index ? (x->index < y->index ? -1 : 1) : (x->row < y->row ? -1 : x->row > y->row);
}

static int by_place(const void *a, const void *b) {
    const draft *x = a, *y = b;
    return x->row != y->row ? (x->row < y->row ? -1 : 1) : (x->index < y->index ? -1 : x->index > y->index);
}

/* The offers that are worth their place, over all rows, in the order of rows, see `Ledger.best`. going: rows that have not ended. */
static void choose_drafts(work *w, int64_t rows, int64_t going, const rules *a, double spent) {
    double total = (double)going, best = a->margin * total / (a->seconds[0] + spent);
    const int64_t most = w->offered < a->most ? w->offered : a->most;
    w->chosen = 0;
    qsort(w->offers, (size_t)w->offered, sizeof(draft), by_worth);
    for (int64_t n = 1; n <= most; n++) {
        total += w->offers[n - 1].worth;
        if (n > 16 && n % 4 && n < most) continue;
        const double rate = total / (a->seconds[n] + spent);
        if (rate > best) best = rate, w->chosen = n;
    }
    qsort(w->offers, (size_t)w->chosen, sizeof(draft), by_place);
    int64_t place[NODES]; /* of a row's offers among its chosen ones */
    for (int64_t i = 0, first = 0; i < w->chosen; i++) {
        draft d = w->offers[i];
        if (i && d.row != w->offers[i - 1].row) first = i;
        place[d.index] = i - first;
        if (d.parent >= 0) d.parent = place[d.parent];
        w->nodes[i] = d;
    }
    for (int64_t r = 0, i = 0; r <= rows; r++) {
        while (i < w->chosen && w->nodes[i].row < r) i++;
        w->from[r] = i;
    }
}

/* Drafts of all rows, those that are worth it. Returns what ask_model does. */
int propose(work *w, text_row *rows, int64_t count, const rules *a, const model *draft, const settings *given, int64_t *tell,
            double *spent) {
    const double begun = seconds_now();
    int64_t asked = 0, lag = 0, going = 0;
    w->offered = w->lost = tell[0] = tell[1] = tell[2] = 0;
    for (int64_t r = 0; r < count; r++) {
        const int64_t room = rows[r].slots - rows[r].length, left = rows[r].left - 1, free = room < left ? room : left;
        const int64_t most = free < NODES ? free : NODES;
        w->of[r] = w->offered, w->source[r] = w->depth[r] = 0;
        if (rows[r].ended) continue;
        going++;
        const double repeated = follow_on(w, rows + r, r, most, a);
        const double found = w->source[r] ? repeated : look_up(w, rows + r, r, most, a);
        if (!a->chain || most <= 0 || (w->source[r] && (a->expected - found) * rows[r].value <= a->price)) continue;
        if (lag + rows[r].length - rows[r].known > w->capacity) continue; /* it has fallen behind */
        lag += rows[r].length - rows[r].known;
        w->offered = w->of[r], w->deepest[r] = a->chain < most ? a->chain : most, w->reach[r] = 1;
        w->alive[asked++] = r;
    }
    if (asked) {
        const int failed = ask_model(w, rows, asked, a, draft, given, tell);
        if (failed) return failed;
        for (int64_t r = 0; r < count; r++)
            if (w->depth[r]) offer_guesses(w, rows + r, r, a);
        *spent = seconds_now() - begun;
    }
    choose_drafts(w, count, going, a, *spent);
    return 0;
}
