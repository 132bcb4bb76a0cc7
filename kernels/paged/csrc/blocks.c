/* A forward over a few lines, from tokens to logits, through pre-norm blocks of rotary attention and gated MLP: for one request
 * alone, calls from Python take longer than what they call. */
#include "blocks.h"
#include "lanes.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* cos, sin [dim] of one place, times `size`. */
static void turns(float *cos, float *sin, int64_t position, const float *frequencies, float size, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i++) {
        const float angle = (float)position * frequencies[i];
        cos[i] = cos[half + i] = cosf(angle) * size;
        sin[i] = sin[half + i] = sinf(angle) * size;
    }
}

/* What the threads of a forward share. */
typedef struct {
    const sizes *n;
    const inputs *in;
    float *hidden, *scratch, *cos, *sin; /* [lines, width]; what `run_block` needs; [lines, dim] */
    void *parts;                         /* of lines that are taken apart, see `tiles.c`, of up to `widest` inputs */
    int64_t *taken;                      /* counters for each block's attention */
    grouped_task *groups;
    int64_t widest, outputs; /* most inputs of a layer; outputs that an input of a block's layers has on average */
    float scale, eps;
    int failed;
} state;

/* The three below are for the threads of a team, which wait for each other. */
static void attend(state *s, const model_block *b, int64_t index, float *out, const float *query, int64_t line) {
    const sight *see = b->sight;
    const sizes *n = s->n;
    if (see->grouped) {
#pragma omp single
        {
            free(s->groups);
            s->groups = share_groups(out, query, line, b->keys, b->values, see->grouped, n->heads, n->kv_heads, n->dim, n->dim,
                                     n->page, s->scale, 0, 0, &s->failed);
            if (!s->groups) s->failed = 1;
        }
        if (s->groups) attend_groups(s->groups);
    } else {
        const rows_task rows = {out, query, b->keys, b->values, 0, s->in->table, see->line_of, see->context, see->begin, see->visible,
                                see->base, line, n->table_width, n->lines, n->heads, n->kv_heads, n->dim, n->dim, n->page, s->scale,
                                0, s->taken + index * COUNTER * omp_get_num_threads(), &s->failed};
        attend_rows(&rows);
    }
#pragma omp barrier
}

/* What goes through a layer: x [lines, in], normed if there is a norm; norms may be written to `spare`. */
typedef struct {
    const float *x;
    int64_t lines, in;
    const float *norm;
    float *spare;
} source;

static const float *normed(const state *s, const source *a) {
    if (!a->norm) return a->x;
    normalize(a->spare, a->x, a->norm, s->eps, a->lines, a->in);
    return a->spare;
}

static void *apart(const state *s, const source *a) {
    return take_apart(s->parts, a->x, a->in, a->lines, a->in, s->widest, s->outputs, a->norm, s->eps);
}

/* out: `a` through up to three layers side by side, plus `add`; of tiles, through the first, which is all of them. `then`: tiles that
 * the thread reads next. `out` is not what `a` reads: threads take it apart when they get there. */
static void products(const state *s, float *out, const source *a, const float *add, const layer *layers, const void *then) {
    if (s->n->tiled) multiply_tiles(out, apart(s, a), a->lines, a->in, s->outputs, add, layers[0], 0, then);
    else multiply_lines(out, normed(s, a), a->in, a->lines, a->in, add, layers);
}

static void gated(const state *s, float *out, const source *a, const model_block *b, const void *then) {
    const layer gate = {b->gate, b->gate_bias, s->n->inner}, up = {b->up, b->up_bias, s->n->inner};
    if (s->n->tiled) multiply_tiles(out, apart(s, a), a->lines, a->in, s->outputs, 0, gate, 1, then);
    else multiply_gated(out, normed(s, a), a->in, a->lines, a->in, gate, up);
}

/* The wanted lines of mixed and hidden alone. */
static void pick(const state *s, float *mixed, float *hidden, const float *from_mixed, const float *from_hidden, int64_t queries) {
#pragma omp for schedule(static)
    for (int64_t w = 0; w < s->in->wanted_lines; w++) {
        const int64_t line = s->in->wanted[w], width = s->n->width;
        memcpy(mixed + w * queries, from_mixed + line * queries, sizeof(float) * (size_t)queries);
        memcpy(hidden + w * width, from_hidden + line * width, sizeof(float) * (size_t)width);
    }
}

/* hidden [lines, width] goes through one block; KV of its tokens is stored. Returns where it is then: behind the last block, the
 * wanted lines alone. `then`: the layer behind it. */
static float *run_block(state *s, const model_block *b, int64_t index, int last, layer then) {
    const sizes *n = s->n;
    const int64_t queries = n->heads * n->dim, keys = n->kv_heads * n->dim, joined = queries + 2 * keys;
    float *hidden = s->hidden, *spare = s->scratch, *query = spare + n->lines * n->width, *mixed = query + n->lines * joined;
    float *key = query + queries, *opened = mixed + n->lines * queries;
    const layer qkv[3] = {{b->q, b->q_bias, n->tiled ? joined : queries}, {b->k, b->k_bias, keys}, {b->v, b->v_bias, keys}};
    const layer o[3] = {{b->o, b->o_bias, n->width}}, down[3] = {{b->down, b->down_bias, n->width}}, gate = {b->gate, 0, n->inner};
    int64_t count = n->lines;
    products(s, query, &(source){hidden, count, n->width, b->norm, spare}, 0, qkv, first_tiles(o[0], queries, 0));
    if (n->tiled && by_lines(count, s->outputs)) { /* lines are shared out otherwise from here on */
#pragma omp barrier
    }
    if (b->q_norm) {
        normalize_heads(query, joined, b->q_norm, s->eps, count, n->heads, n->dim);
        normalize_heads(key, joined, b->k_norm, s->eps, count, n->kv_heads, n->dim);
    }
    rotate_lines(query, key, key + keys, s->cos, s->sin, b->keys, b->values, s->in->slots, joined, joined, joined, count, n->heads,
                 n->kv_heads, n->dim, n->page);
    attend(s, b, index, mixed, query, joined);
    if (last && !s->in->wanted_lines) return hidden;
    if (last) { /* nothing reads the other lines any more: their KV is stored */
        pick(s, query, spare, mixed, hidden, queries);
        mixed = query, hidden = spare, spare = s->hidden, count = s->in->wanted_lines;
    }
    products(s, hidden, &(source){mixed, count, queries, 0, 0}, hidden, o, first_tiles(gate, n->width, 1));
    gated(s, opened, &(source){hidden, count, n->width, b->mlp_norm, spare}, b, first_tiles(down[0], n->inner, 0));
    products(s, hidden, &(source){opened, count, n->inner, 0, 0}, hidden, down, first_tiles(then, n->width, 0));
    return hidden;
}

/* The first lines of hidden, and the angles of the tokens where they are not given. */
static void begin(state *s, const ends *e, float turn) {
    const sizes *n = s->n;
#pragma omp for schedule(static)
    for (int64_t l = 0; l < n->lines; l++) {
        memcpy(s->hidden + l * n->width, e->embed + s->in->ids[l] * n->width, sizeof(float) * (size_t)n->width);
        if (e->frequencies) turns(s->cos + l * n->dim, s->sin + l * n->dim, s->in->positions[l], e->frequencies, turn, n->dim);
    }
}

/* logits [wanted_lines, outputs] of the tokens. cos, sin: [lines, dim], read where the ends have no frequencies; `turn`: what
 * cosines and sines are multiplied by where they have; scale: of queries times keys; eps: of all norms. Returns 0, 1 where memory
 * ran out, 2 where there is no such token. */
int few_forward(float *logits, const ends *e, const model_block *blocks, int64_t count, const sizes *n, const inputs *in, const float *cos,
                const float *sin, float turn, float scale, float eps) {
    const int64_t most = n->width + (2 * n->heads + 2 * n->kv_heads) * n->dim + n->inner; /* floats of `run_block`, a line */
    const int64_t wider = n->inner > n->width ? n->inner : n->width, queries = n->heads * n->dim, widest = wider > queries ? wider : queries;
    const int64_t numbers = n->width * (2 * queries + 2 * n->kv_heads * n->dim + 3 * n->inner), ins = 2 * n->width + queries + n->inner;
    const int64_t floats = n->lines * (n->width + 2 * n->dim + most), wanted = in->wanted_lines;
    for (int64_t l = 0; l < n->lines; l++)
        if (in->ids[l] < 0 || in->ids[l] >= e->vocab) return 2;
    float *hidden = whole_lines(sizeof(float) * (size_t)floats);
    void *parts = n->tiled ? whole_lines(size_of_parts(n->lines, widest)) : 0;
    int64_t *taken = calloc((size_t)count * (size_t)omp_get_max_threads(), sizeof *taken * COUNTER);
    float *angles = hidden + n->lines * n->width, *scratch = angles + 2 * n->lines * n->dim;
    state s = {n, in, hidden, scratch, e->frequencies ? angles : (float *)cos, e->frequencies ? angles + n->lines * n->dim : (float *)sin,
               parts, taken, 0, widest, numbers / ins, scale, eps, !hidden || !taken || (n->tiled && !parts)};
    const layer head[3] = {{e->head, e->head_bias, e->outputs}};
#pragma omp parallel if (count * n->width * (n->inner + queries) > 16384)
    if (!s.failed) {
        float *lines = hidden;
        begin(&s, e, turn);
        for (int64_t b = 0; b < count && !s.failed; b++) {
            const int last = b + 1 == count;
            const layer heads = {blocks[last ? 0 : b + 1].q, 0, (n->heads + 2 * n->kv_heads) * n->dim};
            lines = run_block(&s, blocks + b, b, last, last ? head[0] : heads);
        }
        if (!s.failed && wanted) {
            float *spare = lines == hidden ? scratch : hidden;
            products(&s, logits, &(source){lines, wanted, n->width, e->norm, spare}, 0, head, e->head);
        }
    }
    free(s.groups), free(taken), free(parts), free(hidden);
    return s.failed;
}
