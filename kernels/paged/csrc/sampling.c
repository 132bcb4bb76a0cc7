/* Tokens from scores, a row by itself: temperature, top_k, top_p, min_p and the largest of score + keyed Gumbel noise, as
 * `filters.py` and `noise.py` of the engine room define them. Compiled without reassociation: what is compared has been
 * rounded as it is there. */
#include "blocks.h"
#include "lanes.h"
#include "philox.h"
#include <stdlib.h>
#include <string.h>

typedef double doubles __attribute__((vector_size(8 * LANES)));

enum { BUCKETS = 1024, CANDIDATES = 64 };
static const float PER_NAT = 64;              /* buckets a nat: they reach 16 nats below the largest score */
static const float GREEDY_BELOW = 1e-5f;      /* temperatures, as in `params.py` */
static const double UNIT = 281474976710656.0; /* probabilities are summed in units of 2^-48: no order can be seen */

typedef struct {
    float score;
    int64_t id;
} entry;

/* What is kept: scores above `score`, and of those that equal it ids from `id` on. */
typedef entry cut;

typedef struct {
    float *scores, *probs;
    entry *entries;
    int64_t *sums;
    int32_t *counts;
} scratch;

INLINE int64_t padded(int64_t vocab) { return (vocab + 31) / 32 * 32; }

INLINE int any(ints mask) {
    int found = 0;
    for (int i = 0; i < LANES; i++) found |= mask[i];
    return found;
}

/* Larger scores first; of equal ones the higher id, which transformers' sort takes for more probable. */
static int by_score(const void *a, const void *b) {
    const entry *x = a, *y = b;
    if (x->score != y->score) return x->score < y->score ? 1 : -1;
    return x->id < y->id ? 1 : -1;
}

INLINE int64_t bucket_of(float top, float score) {
    const float gap = (top - score) * PER_NAT;
    return gap < BUCKETS - 1 ? (int64_t)gap : BUCKETS - 1;
}

INLINE int kept(cut c, float score, int64_t id) { return score > c.score || (score == c.score && id >= c.id); }

/* Scores, none of them NaN, that are not below a cut, and not -infinity. */
INLINE ints from(cut c, lanes x) { return (x >= c.score) & (x > -INFINITY); }

static cut narrower(cut a, cut b) {
    if (a.score != b.score) return a.score > b.score ? a : b;
    return a.id > b.id ? a : b;
}

/* The members of a bucket that `within` keeps, sorted. */
static int64_t members(scratch *s, int64_t vocab, float top, int64_t bucket, cut within) {
    int64_t n = 0;
    for (int64_t i = 0; i < vocab; i++)
        if (bucket_of(top, s->scores[i]) == bucket && kept(within, s->scores[i], i)) s->entries[n++] = (entry){s->scores[i], i};
    qsort(s->entries, n, sizeof(entry), by_score);
    return n;
}

/* The n-th largest of the scores, and no id before the first: all that tie with it are kept. */
static cut nth(scratch *s, int64_t vocab, float top, int64_t n) {
    const cut all = {-INFINITY, INT64_MAX};
    if (n >= vocab) return all;
    int64_t bucket = 0, seen = 0;
    for (int64_t i = 0; i < BUCKETS; i++) s->counts[i] = 0;
    for (int64_t i = 0; i < vocab; i++) s->counts[bucket_of(top, s->scores[i])]++;
    while (seen + s->counts[bucket] < n) seen += s->counts[bucket++];
    /* Scores of -infinity are dropped here: where they are wanted, everything is kept. */
    const int64_t found = members(s, vocab, top, bucket, all);
    return n - seen <= found ? (cut){s->entries[n - seen - 1].score, 0} : all;
}

/* Probabilities of what `within` keeps, and 0 of all else. */
static void softmax(scratch *s, int64_t vocab, float top, cut within) {
    doubles sums = {0};
    for (int64_t i = 0; i < vocab; i += LANES) { /* scratch is padded by scores of -infinity */
        const lanes x = *(lanes *)(s->scores + i), e = exp_of_negative(x - top);
        const lanes p = choose(from(within, x), e, (lanes){0});
        *(lanes *)(s->probs + i) = p;
        sums += __builtin_convertvector(p, doubles);
    }
    double sum = 0;
    for (int i = 0; i < LANES; i++) sum += sums[i];
    for (int64_t i = 0; i < vocab; i += LANES) *(lanes *)(s->probs + i) /= (float)sum;
}

INLINE int gone(int64_t before, int64_t total, float limit) { return (float)((double)(total - before) / UNIT) <= limit; }

/* What top_p keeps: a token goes if it and all less probable ones together have at most `limit`. The first one stays. */
static cut nucleus(scratch *s, int64_t vocab, float top, float limit, cut within) {
    int64_t total = 0, before = 0, bucket = 0;
    for (int64_t i = 0; i < BUCKETS; i++) s->sums[i] = 0;
    for (int64_t i = 0; i < vocab; i++) s->sums[bucket_of(top, s->scores[i])] += (int64_t)(s->probs[i] * (float)UNIT);
    for (int64_t i = 0; i < BUCKETS; i++) total += s->sums[i];
    while (bucket + 1 < BUCKETS && !gone(before + s->sums[bucket], total, limit)) before += s->sums[bucket++];
    int64_t n = members(s, vocab, top, bucket, within), last = 0;
    while (!n && bucket) n = members(s, vocab, top, --bucket, within), last = n - 1; /* an empty bucket: all before it stay */
    for (; last + 1 < n; last++) {
        before += (int64_t)(s->probs[s->entries[last].id] * (float)UNIT);
        if (gone(before, total, limit)) break;
    }
    return (cut){s->entries[last].score, s->entries[last].id};
}

/* What min_p keeps: probabilities not below `least`. */
static cut not_below(const scratch *s, int64_t vocab, float least) {
    cut c = {INFINITY, 0};
    for (int64_t i = 0; i < vocab; i++)
        if (s->probs[i] >= least && s->scores[i] < c.score) c.score = s->scores[i];
    return c;
}

/* Scores over the temperature into scratch; returns the largest, or NaN where there is one. */
static float warm(scratch *s, const float *scores, int64_t vocab, float temperature) {
    lanes tops = (lanes){0} - INFINITY;
    ints wrong = {0};
    memcpy(s->scores, scores, sizeof(float) * vocab);
    for (int64_t i = vocab; i < padded(vocab); i++) s->scores[i] = -INFINITY;
    for (int64_t i = 0; i < vocab; i += LANES) {
        lanes x = *(lanes *)(s->scores + i);
        if (temperature != 1.0f) *(lanes *)(s->scores + i) = x = x / temperature;
        wrong |= x != x;
        tops = larger(x, tops);
    }
    return any(wrong) ? NAN : largest(tops);
}

/* What top_k, then top_p, then min_p keep. Probabilities are left in scratch where one of the last two is on. */
static cut filter(scratch *s, const settings *a, int64_t row, int64_t vocab, float top) {
    cut c = {-INFINITY, INT64_MAX};
    if (a->top_k[row] > 0) c = nth(s, vocab, top, a->top_k[row]);
    if (a->limit[row] < 0 && a->min_p[row] <= 0) return c;
    softmax(s, vocab, top, c);
    const cut whole = c;
    if (a->limit[row] >= 0) c = nucleus(s, vocab, top, a->limit[row], whole);
    if (a->min_p[row] > 0) {
        float most = 0;
        for (int64_t i = 0; i < vocab; i++) most = s->probs[i] > most ? s->probs[i] : most;
        c = narrower(c, not_below(s, vocab, a->min_p[row] * most));
    }
    return c;
}

/* The kept token with the largest score + noise; of equal ones the lowest id. */
static int64_t largest_noisy(const scratch *s, int64_t vocab, cut c, int64_t seed, int64_t position) {
    int64_t chosen = -1;
    double best = -INFINITY;
    float least = -INFINITY; /* a bound on score + noise below it, rounding included, cannot be the best */
    for (int64_t block = 0; block < vocab; block += 32) {
        const float *scores = s->scores + block;
        ints in = {0};
        for (int i = 0; i < 32; i += LANES) in |= from(c, *(lanes *)(scores + i));
        if (!any(in)) continue;
        uint32_t word[32];
        philox32(word, block / 4, seed, position);
        for (int i = 0; i < 32; i += LANES) {
            const lanes x = *(lanes *)(scores + i);
            const ints may = from(c, x) & (x + most_noise(*(words *)(word + i)) > least);
            if (!any(may)) continue;
            for (int j = i; j < i + LANES; j++) {
                if (!may[j - i] || !kept(c, scores[j], block + j)) continue;
                const double value = gumbel_of(word[j]) + (double)scores[j];
                if (value > best) best = value, chosen = block + j, least = best - 1e-6 * fabs(best) - 1e-4;
            }
        }
    }
    return chosen;
}

/* The largest of scores, or NaN where there is one. */
float largest_score(const float *scores, int64_t vocab) {
    const int64_t whole = vocab / LANES * LANES;
    lanes tops = (lanes){0} - INFINITY;
    ints wrong = {0};
    for (int64_t i = 0; i < whole; i += LANES) {
        const lanes x = *(const lanes *)(scores + i);
        wrong |= x != x;
        tops = larger(x, tops);
    }
    float top = any(wrong) ? NAN : largest(tops);
    for (int64_t i = whole; i < vocab; i++) top = scores[i] > top || scores[i] != scores[i] ? scores[i] : top;
    return top;
}

/* The first of the largest scores, which are `top`. */
static int64_t first_of_largest(const float *scores, int64_t vocab, float *top) {
    const int64_t whole = vocab / LANES * LANES;
    int64_t i = 0;
    *top = largest_score(scores, vocab);
    if (!isfinite(*top)) return -1;
    while (i < whole && !any(*(const lanes *)(scores + i) == *top)) i += LANES;
    while (scores[i] != *top) i++;
    return i;
}

static int64_t draw_row(scratch *s, const settings *a, int64_t row, int64_t vocab, const float *scores, float *top) {
    if (a->temperature[row] < GREEDY_BELOW) return first_of_largest(scores, vocab, top);
    *top = warm(s, scores, vocab, a->temperature[row]);
    if (!isfinite(*top)) return -1;
    return largest_noisy(s, vocab, filter(s, a, row, vocab, *top), a->seeds[row], a->positions[row]);
}

/* As `likely_tokens`, a greedy row: its largest scores, over the sum of all. One pass each. */
static void likely_greedy(const scratch *s, int64_t vocab, float top, int64_t *ids, float *probs, int64_t width) {
    entry *best = s->entries;
    doubles sums = {0};
    double sum = 0;
    int64_t n = 0;
    for (int64_t i = 0; i < vocab; i += LANES) { /* scratch is padded by scores of -infinity */
        const lanes x = *(lanes *)(s->scores + i);
        sums += __builtin_convertvector(exp_of_negative(x - top), doubles);
        if (n == width && !any(x >= best[n - 1].score)) continue;
        for (int64_t j = i; j < i + LANES; j++) {
            const entry one = {s->scores[j], j};
            if (one.score == -INFINITY || (n == width && by_score(&one, best + n - 1) > 0)) continue;
            int64_t at = n < width ? n++ : n - 1;
            for (; at && by_score(&one, best + at - 1) < 0; at--) best[at] = best[at - 1];
            best[at] = one;
        }
    }
    for (int i = 0; i < LANES; i++) sum += sums[i];
    for (int64_t j = 0; j < n; j++) ids[j] = best[j].id, probs[j] = exp((double)best[j].score - top) / sum;
}

/* As `likely_tokens`, a row. */
static void likely_row(scratch *s, const settings *a, int64_t row, int64_t vocab, const float *scores, int64_t *ids,
                       float *probs, int64_t width) {
    const int greedy = a->temperature[row] < GREEDY_BELOW;
    const float top = warm(s, scores, vocab, greedy ? 1.0f : a->temperature[row]);
    for (int64_t j = 0; j < width; j++) ids[j] = isfinite(top) ? -1 : 0, probs[j] = isfinite(top) ? 0 : NAN;
    if (!isfinite(top)) return;
    if (greedy) return likely_greedy(s, vocab, top, ids, probs, width);
    const cut c = narrower(nth(s, vocab, top, CANDIDATES), filter(s, a, row, vocab, top));
    int64_t n = 0;
    double sum = 0;
    for (int64_t i = 0; i < vocab; i++)
        if (kept(c, s->scores[i], i) && s->scores[i] > -INFINITY) s->entries[n++] = (entry){s->scores[i], i};
    for (int64_t i = 0; i < n; i++)
        s->entries[i].score += gumbel_of(philox_word(s->entries[i].id, a->seeds[row], a->positions[row]));
    qsort(s->entries, n, sizeof(entry), by_score);
    for (int64_t i = 0; i < n; i++) sum += exp((double)s->entries[i].score - s->entries[0].score);
    for (int64_t j = 0; j < width && j < n; j++) {
        ids[j] = s->entries[j].id;
        probs[j] = exp((double)s->entries[j].score - s->entries[0].score) / sum;
    }
}

size_t size_of_draw(int64_t vocab) {
    return (size_t)padded(vocab) * (2 * sizeof(float) + sizeof(entry)) + BUCKETS * (sizeof(int64_t) + sizeof(int32_t));
}

static int prepare(scratch *s, int64_t vocab, char *memory) {
    const int64_t size = padded(vocab);
    if (!memory) return 1;
    s->entries = (entry *)memory;
    s->sums = (int64_t *)(memory + size * sizeof(entry));
    s->scores = (float *)(s->sums + BUCKETS);
    s->probs = s->scores + size;
    s->counts = (int32_t *)(s->probs + size);
    return 0;
}

#define EACH_ROW(...) \
    int failed = 0; \
    _Pragma("omp parallel if (rows > 1 && rows * vocab > 8192)") { \
        scratch s = {0}; \
        if (prepare(&s, vocab, malloc(size_of_draw(vocab)))) failed = 1; \
        _Pragma("omp for schedule(dynamic)") for (int64_t row = 0; row < rows; row++) { \
            if (s.entries) { __VA_ARGS__; } \
        } \
        free(s.entries); \
    } \
    return failed;

/* The token of one row from its scores, and their largest, see `draw_tokens`; memory: `size_of_draw`, of 64 bytes' alignment. */
int64_t draw_token(void *memory, const float *scores, int64_t vocab, const settings *a, int64_t row, float *top) {
    scratch s = {0};
    prepare(&s, vocab, memory);
    return draw_row(&s, a, row, vocab, scores, top);
}

/* tokens[row] from scores [rows, vocab], rows `line` floats apart; tops[row]: the largest score over the temperature, of a greedy
 * row as it is. A row whose largest is not finite gets the token -1. Returns 0, or 1 where memory ran out. */
int draw_tokens(int64_t *tokens, float *tops, const float *scores, int64_t line, int64_t rows, int64_t vocab,
                const float *temperature, const float *limit, const float *min_p, const int64_t *top_k, const int64_t *seeds,
                const int64_t *positions) {
    const settings a = {temperature, limit, min_p, top_k, seeds, positions};
    EACH_ROW(tokens[row] = draw_row(&s, &a, row, vocab, scores + row * line, tops + row))
}

/* The `width` tokens [rows, width] most likely to be drawn: those with the largest score + noise of a row's likeliest ones, and
 * the softmax of these sums; of a greedy row: the largest scores, and their softmax.
 * Missing ones have the id -1; odds are NaN where the largest score is not finite. */
int likely_tokens(int64_t *ids, float *probs, int64_t width, const float *scores, int64_t line, int64_t rows, int64_t vocab,
                  const float *temperature, const float *limit, const float *min_p, const int64_t *top_k, const int64_t *seeds,
                  const int64_t *positions) {
    const settings a = {temperature, limit, min_p, top_k, seeds, positions};
    EACH_ROW(likely_row(&s, &a, row, vocab, scores + row * line, ids + row * width, probs + row * width, width))
}
