/* Attention where queries share slots: each stretch of slots that many queries see is read once for all of them, and the
 * parts of a query are merged by log-sum-exp (see `groups.py`). Float32. */
#include "grouped.h"

INLINE void fetch_slots(const float *const *slots, int64_t dim) {
    for (int j = 0; j < KEYS; j++) fetch(slots[j], dim);
}

/* Where own slots lie that are computed after this chunk: a loop over what is at hand fetches a line of memory with each round, `floats`
 * in all. So memory works while the processor does. */
INLINE const float *coming(const task *a, scratch *s, int64_t floats) {
    const float *from = own_stretch(a, s, &floats);
    return from ? from : s->copy;
}

/* Products of all lines with KEYS keys that lie one after another. */
INLINE void score_keys(lanes *scores, const lanes *query, const float *keys, const float *coming, const int64_t dim,
                       const int wide) {
    lanes sums[KEYS][VECTORS] = {0};
    for (int64_t d = 0; d < dim; d++) {
        lanes held[VECTORS];
        __builtin_prefetch(coming + 16 * d, 0, 2);
#pragma GCC unroll 3
        for (int v = 0; v < wide; v++) {
            held[v] = query[wide * d + v];
            HELD(held[v]);
        }
#pragma GCC unroll 8
        for (int j = 0; j < KEYS; j++)
#pragma GCC unroll 3
            for (int v = 0; v < wide; v++) sums[j][v] += held[v] * keys[j * dim + d];
    }
#pragma GCC unroll 8
    for (int j = 0; j < KEYS; j++)
#pragma GCC unroll 3
        for (int v = 0; v < wide; v++) scores[wide * j + v] = sums[j][v];
}

/* Products of all lines with the slots of a chunk. */
INLINE void score_chunk(const task *a, scratch *s, int64_t n, const int64_t dim, const int wide) {
    for (int64_t i = 0; i < n; i += KEYS) {
        const float *keys = s->keys[i];
        fetch_slots(s->values + i, dim);
        /* Keys of one page lie one after another. Others are laid so: eight pointers would take the registers. */
        int apart = 0;
        for (int64_t j = 1; j < KEYS; j++) apart |= s->keys[i + j] != keys + j * dim;
        if (apart) {
            for (int64_t j = 0; j < KEYS; j++) memcpy(s->copy + j * dim, s->keys[i + j], sizeof(float) * dim);
            keys = s->copy;
        }
        score_keys(s->scores + wide * i, s->query, keys, coming(a, s, 16 * dim), dim, wide);
    }
}

/* Scores become weights over the largest so far; `before` scales to it what was summed before. */
INLINE void weigh_chunk(scratch *s, int64_t n, const int wide) {
    lanes top[VECTORS], sum[VECTORS] = {0};
    side_by_side *lines = &s->lines;
    for (int v = 0; v < wide; v++) top[v] = lines->top[v];
    for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 3
        for (int v = 0; v < wide; v++) top[v] = larger(s->scores[wide * i + v], top[v]);
    for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 3
        for (int v = 0; v < wide; v++) sum[v] += s->scores[wide * i + v] = exp_of_negative(s->scores[wide * i + v] - top[v]);
    for (int v = 0; v < wide; v++) {
        lines->before[v] = exp_of_negative(lines->top[v] - top[v]);
        lines->sum[v] = lines->sum[v] * lines->before[v] + sum[v];
        lines->top[v] = top[v];
    }
}

/* Adds the weighted values of a chunk, elements [d, d + width) of them. */
INLINE void add_chunk(scratch *s, int64_t n, int64_t d, const float *coming, const int width, const int wide) {
    lanes sums[KEYS][VECTORS], *out = s->out + wide * d;
    const lanes *weight = s->scores;
#pragma GCC unroll 8
    for (int j = 0; j < width; j++)
#pragma GCC unroll 3
        for (int v = 0; v < wide; v++) sums[j][v] = out[wide * j + v] * s->lines.before[v];
    for (int64_t i = 0; i < n; i++, weight += wide) {
        const float *value = s->values[i] + d;
        lanes held[VECTORS];
        __builtin_prefetch(coming + 16 * i, 0, 2);
#pragma GCC unroll 3
        for (int v = 0; v < wide; v++) {
            held[v] = weight[v];
            HELD(held[v]);
        }
#pragma GCC unroll 8
        for (int j = 0; j < width; j++)
#pragma GCC unroll 3
            for (int v = 0; v < wide; v++) sums[j][v] += held[v] * value[j];
    }
#pragma GCC unroll 8
    for (int j = 0; j < width; j++)
#pragma GCC unroll 3
        for (int v = 0; v < wide; v++) out[wide * j + v] = sums[j][v];
}

/* One segment, KV head and lines from `first` on; a line is a member's query head. parts: [members, heads, value_dim + 2]. */
INLINE void attend_lines(const task *a, scratch *s, segment g, int64_t head, int64_t first, int64_t count, const int64_t dim,
                         const int64_t value_dim, const int wide) {
    memset(s->out, 0, value_dim * wide * sizeof(lanes));
    gather_lines(&s->lines, a, g, head, first, count);
    g.end = s->lines.any_sees;
    lay_lines(s->query, s->lines.queries, a->scale, dim, wide);
    const span keys = segment_slots(a, a->keys, g, head, dim), values = segment_slots(a, a->values, g, head, value_dim);
    find_slots(s->keys, chunk_of(keys, g.begin));
    for (int64_t t = g.begin, n; t < g.end; t += CHUNK) {
        n = g.end - t < CHUNK ? g.end - t : CHUNK;
        find_slots(s->values, chunk_of(values, t));
        score_chunk(a, s, n, dim, wide);
        if (a->softcap > 0) cap_chunk(s->scores, n, a->softcap, wide);
        hide_chunk(s->scores, &s->lines, n, t, wide);
        weigh_chunk(s, n, wide);
        if (t + n < g.end) find_slots(s->keys, chunk_of(keys, t + n));
        int64_t d = 0;
        for (; d + KEYS <= value_dim; d += KEYS) { /* keys of the next chunk are on their way meanwhile */
            fetch_slots(s->keys + d * CHUNK / value_dim / KEYS * KEYS, dim);
            add_chunk(s, n, d, coming(a, s, 16 * n), KEYS, wide);
        }
        for (; d < value_dim; d++) add_chunk(s, n, d, s->copy, 1, wide);
        own_item(a, s);
    }
    write_parts(&s->lines, s->out, count, value_dim, wide);
}

INLINE void attend_segment(const task *a, scratch *s, segment g, int64_t head, int64_t first, int64_t count, const int64_t dim,
                           const int64_t value_dim) {
    if (count > 2 * LANES) attend_lines(a, s, g, head, first, count, dim, value_dim, 3);
    else if (count > LANES) attend_lines(a, s, g, head, first, count, dim, value_dim, 2);
    else attend_lines(a, s, g, head, first, count, dim, value_dim, 1);
}

/* Line `row * heads + head`: weighted values of its own slots, not normalised, are merged with its parts. */
INLINE void merge(const task *a, int64_t line, const int64_t dim) {
    const int64_t row = line / a->heads, head = line % a->heads, width = dim + 2;
    const int64_t begin = a->step->part_start[row], end = a->step->part_start[row + 1];
    const float top = a->own_tops[2 * line], sum = a->own_tops[2 * line + 1];
    float *out = a->out + line * dim, most = a->sinks && a->sinks[head] > top ? a->sinks[head] : top;
    for (int64_t p = begin; p < end; p++) {
        const float other = a->partial[(a->step->parts[p] * a->heads + head) * width + dim];
        most = other > most ? other : most;
    }
    const float own = expf(top - most);
    float all = sum * own + (a->sinks ? expf(a->sinks[head] - most) : 0);
    for (int64_t d = 0; d < dim; d++) out[d] = sum > 0 ? out[d] * own : 0; /* not written where there was no slot */
    for (int64_t p = begin; p < end; p++) {
        const float *part = a->partial + (a->step->parts[p] * a->heads + head) * width, weight = expf(part[dim] - most);
        all += part[dim + 1] * weight;
        for (int64_t d = 0; d < dim; d++) out[d] += part[d] * weight;
    }
    const float scale = 1 / all;
    for (int64_t d = 0; d < dim; d++) out[d] *= scale;
}

#define BY_DIM(CALL) \
    if (dim == 64 && value_dim == 64) { CALL(64, 64); } \
    else if (dim == 128 && value_dim == 128) { CALL(128, 128); } \
    else { CALL(dim, value_dim); }

static int by_amx(const task *a, segment g) { return a->amx_lines && tiles_pay(a, g); }

/* Lines of a segment and KV head that are an item. */
static int64_t lines_of_item(const task *a, segment g) { return by_amx(a, g) ? a->amx_lines : LINES; }

/* Item `i` of the segments; items[n] of them lie before segment n. */
static void segment_item(const task *a, scratch *s, const int64_t *items, int64_t i) {
    int64_t at = 0;
    while (items[at + 1] <= i) at++;
    /* KV heads alternate, so that a thread tends to read the same slots for its next lines. */
    const segment g = a->step->segments[at];
    const int64_t within = i - items[at], head = within % a->kv_heads, most = lines_of_item(a, g), first = within / a->kv_heads * most;
    const int64_t left = g.count * (a->heads / a->kv_heads) - first, count = left < most ? left : most;
    const int64_t dim = a->dim, value_dim = a->value_dim;
    if (by_amx(a, g)) {
        attend_blocks(a, s, g, head, first, count);
        return;
    }
#define SEGMENT(D, V) attend_segment(a, s, g, head, first, count, D, V)
    BY_DIM(SEGMENT)
}

/* One thread's part: segments, with rows' own slots after each chunk, and what is left of these. */
static int work(const task *a, const int64_t *items) {
    const int64_t lines = LINES * sizeof(float), all = a->step->rows * a->kv_heads;
    const size_t floats = KEYS * a->dim + a->heads / a->kv_heads * a->stride;
    scratch s;
    const size_t blocks = size_of_blocks(a);
    char *memory = whole_lines(blocks + lines * (a->dim + a->value_dim + CHUNK) + sizeof(float) * floats);
    if (!memory) return 1;
    s.blocks = (struct blocks *)memory;
    s.query = (lanes *)(memory + blocks);
    s.out = s.query + VECTORS * a->dim;
    s.scores = s.out + VECTORS * a->value_dim;
    s.copy = (float *)(s.scores + VECTORS * CHUNK);
    s.own_scores = s.copy + KEYS * a->dim;
    for (int i = 0; i < OWNS; i++) s.owns[i] = take_own(a);
    s.coming = s.at = 0;
    for (int64_t i; (i = __atomic_fetch_add(a->taken, 1, __ATOMIC_RELAXED)) < items[a->step->num_segments];)
        segment_item(a, &s, items, i);
    while (s.owns[0] < all) own_item(a, &s);
    free(memory);
    return 0;
}

/* What the threads of a team share, for `attend_groups`; null where memory ran out. To be freed. */
grouped_task *share_groups(float *out, const float *query, int64_t query_line, const float *keys, const float *values,
                           const step *step, int64_t heads, int64_t kv_heads, int64_t dim, int64_t value_dim, int64_t page,
                           float scale, float softcap, const float *sinks, int *failed) {
    const int64_t lines = step->rows * heads, parts = step->num_members * heads * (value_dim + 2), whole = step->num_segments + 3;
    task *a = malloc(sizeof(task) + sizeof(int64_t) * (size_t)whole + sizeof(float) * (size_t)(parts + 2 * lines));
    if (!a) return 0;
    int64_t *taken = (int64_t *)(a + 1), *items = taken + 2, longest = 0;
    float *partial = (float *)(taken + whole);
    taken[0] = taken[1] = items[0] = 0;
    for (int64_t r = 0, own; r < step->rows; r++) {
        own = step->context[r] - step->own[r];
        longest = own > longest ? own : longest;
    }
    *a = (task){step, query, keys, values, sinks, query_line, heads, kv_heads, dim, value_dim, page, scale, softcap,
                (longest + 31) / 16 * 16, taken, out, partial, partial + parts, items, 0, failed};
    a->amx_lines = amx_lines_of(a);
    for (int64_t i = 0; i < step->num_segments; i++) {
        const int64_t most = lines_of_item(a, step->segments[i]);
        items[i + 1] = items[i] + kv_heads * ((step->segments[i].count * (heads / kv_heads) + most - 1) / most);
    }
    return a;
}

/* Attention of a step by the threads of a team. */
void attend_groups(const grouped_task *a) {
    if (work(a, a->items)) *a->failed = 1;
#pragma omp barrier
    if (*a->failed) return;
#pragma omp for schedule(static) nowait
    for (int64_t line = 0; line < a->step->rows * a->heads; line++) merge(a, line, a->value_dim);
}

/* query: [rows, heads, dim], rows query_line floats apart; out: [rows, heads, value_dim]. Query r sees slots [own[r],
 * context[r]) of line line_of[r] of table, and those of the segments that it is a member of: its places among the members
 * are parts[part_start[r], part_start[r + 1]); visible and base as in `tree`. Returns 0, or 1 where memory ran out. */
int grouped_attention(float *out, const float *query, int64_t query_line, const float *keys, const float *values,
                      const step *step, int64_t heads, int64_t kv_heads, int64_t dim, int64_t value_dim, int64_t page, float scale, float softcap,
                      const float *sinks) {
    int failed = 0;
    task *a = share_groups(out, query, query_line, keys, values, step, heads, kv_heads, dim, value_dim, page, scale, softcap,
                           sinks, &failed);
    if (!a) return 1;
#pragma omp parallel
    attend_groups(a);
    free(a);
    return failed;
}
