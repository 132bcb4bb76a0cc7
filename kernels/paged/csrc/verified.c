/* Steps with drafts, one behind another, without calls from Python in between: the target computes drafts of `proposals.c`, and
 * tokens are drawn along those that they confirm. Which drafts are worth it is said once for all steps. */
#include "verified.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Lines of the target's forward, and what they see: of a row, its last token and its drafts; as `groups.py` has it. */
static int64_t lay_out(work *w, const text_row *rows, int64_t count, const sizes *n, const rules *a) {
    int64_t line = 0, segments = 0, members = 0;
    int branches = 0;
    for (int64_t r = 0; r < count; r++) {
        const int64_t first = line, begin = rows[r].length - 1, nodes = w->from[r + 1] - w->from[r];
        const draft *drafts = w->nodes + w->from[r];
        int tree = 0;
        w->lines[r] = line;
        if (rows[r].ended) continue;
        for (int64_t i = 0; i < nodes; i++) tree |= drafts[i].parent != i - 1;
        branches |= tree;
        for (int64_t i = 0; i <= nodes; i++, line++) {
            const int64_t parent = i ? first + drafts[i - 1].parent + 1 : 0;
            w->ids[line] = i ? drafts[i - 1].token : rows[r].text[begin];
            w->positions[line] = i ? w->positions[parent] + 1 : begin;
            w->slots[line] = slot_of(w->table + r * n->table_width, begin + i, n->page);
            w->line_of[line] = r, w->context[line] = begin + i + 1, w->wanted[line] = line;
            w->visible[line] = !tree ? -1 : i ? w->visible[parent] | (int64_t)1 << i : 1;
            w->base[line] = begin;
        }
        const int64_t end = tree ? begin : begin + nodes + 1, together = nodes + 1 >= a->together && end >= a->least_slots;
        if (together) w->segments[segments++] = (segment){r, 0, end, members, nodes + 1, !tree};
        for (int64_t l = first; l < line; l++) {
            w->own[l] = together ? tree ? begin : w->context[l] : 0;
            w->part_start[l] = members;
            if (together) w->members[members] = l, w->parts[members] = members, members++;
        }
    }
    w->part_start[line] = members;
    const int64_t *visible = branches ? w->visible : 0, *base = branches ? w->base : 0;
    w->grouped = (step){w->table, w->line_of, w->context, w->own, w->members, w->part_start, w->parts, w->segments, {visible, base},
                        n->table_width, line, segments, members};
    w->see = segments ? (sight){&w->grouped, 0, 0, 0, 0, 0} : (sight){0, w->line_of, w->context, 0, visible, base};
    return line;
}

/* Whether a token can be drawn from each of these lines. */
static int all_finite(const float *scores, int64_t lines, int64_t vocab) {
    for (int64_t l = 0; l < lines; l++)
        if (!isfinite(largest_score(scores + l * vocab, vocab))) return 0;
    return 1;
}

/* Draws row r's tokens along the drafts that they confirm: tokens, path, and how many of each; 0 where numbers are not finite. */
static int follow(const work *w, const text_row *r, int64_t row, int64_t vocab, const settings *a, void *memory, int64_t *tokens,
                  int64_t *path, int64_t *drawn, int64_t *taken) {
    const int64_t nodes = w->from[row + 1] - w->from[row];
    const draft *drafts = w->nodes + w->from[row];
    const float *scores = w->scores + w->lines[row] * vocab;
    int64_t node = -1, next;
    *drawn = *taken = 0;
    if (nodes && !all_finite(scores, nodes + 1, vocab)) return 0;
    for (;; node = next) {
        float top;
        const int64_t token = tokens[*drawn] = draw_token(memory, scores + (node + 1) * vocab, vocab, a, row, &top);
        if (token < 0) return 0;
        ++*drawn, ++((int64_t *)a->positions)[row];
        if (ends_row(token, *drawn, r->left, r->stops, r->num_stops)) return 1;
        for (next = node + 1; next < nodes; next++)
            if (drafts[next].parent == node && drafts[next].token == token) break;
        if (next >= nodes) return 1;
        path[(*taken)++] = next;
    }
}

/* KV of the drafts that were taken goes to its place. */
static void move(const work *w, const model *m, int64_t row, int64_t begin, const int64_t *path, int64_t taken) {
    const sizes *n = m->sizes;
    for (int64_t i = 0; i < taken; i++) {
        if (path[i] == i) continue;
        const int64_t *table = w->table + row * n->table_width, from = begin + 1 + path[i], to = begin + 1 + i;
        for (int64_t b = 0; b < m->count; b++)
            for (int64_t h = 0; h < n->kv_heads; h++) {
                const int64_t source = (table[from / n->page] * n->kv_heads + h) * n->page + from % n->page;
                const int64_t target = (table[to / n->page] * n->kv_heads + h) * n->page + to % n->page;
                memcpy(m->blocks[b].keys + target * n->dim, m->blocks[b].keys + source * n->dim, sizeof(float) * (size_t)n->dim);
                memcpy(m->blocks[b].values + target * n->dim, m->blocks[b].values + source * n->dim, sizeof(float) * (size_t)n->dim);
            }
    }
}

/* What became of a row's drafts: its record by source, and what the draft model knows of it. */
static void judge(const work *w, text_row *r, int64_t row, const int64_t *path, int64_t taken, int ended, const rules *a) {
    const int64_t nodes = w->from[row + 1] - w->from[row], source = w->source[row] - 1;
    const draft *drafts = w->nodes + w->from[row];
    if (!nodes) return;
    r->taken[source] *= a->row_decay, r->expected[source] *= a->row_decay;
    for (int64_t i = 0; i < nodes; i++) {
        int tested = drafts[i].parent < 0 && !(ended && !taken), good = 0;
        for (int64_t p = 0; p < taken; p++) {
            tested |= path[p] == drafts[i].parent && !(ended && p + 1 == taken);
            good |= path[p] == i;
        }
        if (tested) r->taken[source] += good, r->expected[source] += drafts[i].odds;
    }
    if (source != BY_MODEL) return;
    for (int64_t p = 0; p < taken && drafts[path[p]].index == p && p + 1 < w->depth[row]; p++) r->known++;
}

/* A step's record: what is known of a row behind it. */
static void note(record *out, const work *w, text_row *r, int64_t row, const int64_t *path, const int64_t *tokens, int64_t taken,
                 int64_t drawn) {
    const int64_t nodes = w->from[row + 1] - w->from[row], counts[] = {nodes, taken, drawn, nodes ? w->source[row] : 0};
    memcpy(out->counts, counts, sizeof counts), out->counts += 4;
    for (int64_t i = 0; i < nodes; i++) {
        const draft *d = w->nodes + w->from[row] + i;
        *out->nodes++ = d->token, *out->nodes++ = d->parent, *out->nodes++ = d->kind, *out->odds++ = d->odds;
    }
    memcpy(out->paths, path, sizeof(int64_t) * (size_t)taken), out->paths += taken;
    memcpy(out->tokens, tokens, sizeof(int64_t) * (size_t)drawn), out->tokens += drawn;
    memcpy(r->text + r->length, tokens, sizeof(int64_t) * (size_t)drawn);
    r->length += drawn, r->left -= drawn;
}

/* Memory of a call, and what it holds beside `work`: tokens known to the draft model before a step; of each row in the step, how many
 * tokens were drawn and drafts taken, and which. */
typedef struct {
    int64_t *numbers, *known, *drawn, *taken, *paths, *tokens;
    draft *drafts;
    float *scores, *floats;
    char *draws;
    size_t draw;
} memory;

static int64_t *room_for(int64_t **at, int64_t numbers) {
    int64_t *place = *at;
    *at += numbers;
    return place;
}

/* Returns whether there was as much. */
static int find_memory(memory *m, work *w, const rules *a, int64_t count, int64_t lines, int64_t vocab) {
    const int64_t guesses = (a->chain + 1) * a->width * count;
    m->draw = (size_of_draw(vocab) + 63) / 64 * 64;
    m->numbers = calloc((size_t)(12 * lines + 3 + (16 + 2 * NODES + 1) * count + guesses), sizeof *m->numbers);
    m->drafts = malloc(sizeof *m->drafts * (size_t)(2 * NODES * count));
    m->scores = whole_lines(sizeof *m->scores * (size_t)(lines * vocab));
    m->draws = whole_lines(m->draw * (size_t)omp_get_max_threads());
    m->floats = malloc(sizeof *m->floats * (size_t)(guesses + count));
    if (!m->numbers || !m->drafts || !m->scores || !m->draws || !m->floats) return 0;
    int64_t **const by_line[] = {&w->ids,  &w->positions, &w->slots,   &w->line_of, &w->context, &w->visible,
                                 &w->base, &w->own,       &w->members, &w->parts,   &w->wanted};
    int64_t **const by_row[] = {&w->lines, &w->source, &w->alive, &w->depth, &w->deepest, &m->known, &m->drawn, &m->taken};
    int64_t *at = m->numbers;
    for (int i = 0; i < 11; i++) *by_line[i] = room_for(&at, lines);
    for (int i = 0; i < 8; i++) *by_row[i] = room_for(&at, count);
    w->part_start = room_for(&at, lines + 1), w->segments = (segment *)room_for(&at, 6 * count);
    w->of = room_for(&at, count + 1), w->from = room_for(&at, count + 1);
    w->guesses = room_for(&at, a->chain * a->width * count), w->said = room_for(&at, a->width * count);
    m->paths = room_for(&at, NODES * count), m->tokens = room_for(&at, (NODES + 1) * count);
    w->offers = m->drafts, w->nodes = m->drafts + NODES * count;
    w->reach = m->floats, w->likely = m->floats + count, w->probs = w->likely + a->chain * a->width * count;
    w->capacity = lines, w->scores = m->scores;
    return 1;
}

static void free_memory(const memory *m) { free(m->numbers), free(m->drafts), free(m->scores), free(m->draws), free(m->floats); }

/* The target's forward over rows and drafts: returns what `few_forward` does. */
static int verify(work *w, const text_row *rows, int64_t count, const rules *a, const model *target, double *seconds) {
    target->sizes->lines = lay_out(w, rows, count, target->sizes, a);
    *(sight *)target->blocks->sight = w->see;
    const inputs in = {w->ids, w->positions, w->slots, w->table, w->wanted, target->sizes->lines};
    const double begun = seconds_now();
    const int failed = few_forward(w->scores, target->ends, target->blocks, target->count, target->sizes, &in, 0, 0, target->factors[0],
                                   target->factors[1], target->factors[2]);
    *seconds = seconds_now() - begun;
    return failed;
}

/* Draws all rows' tokens; 0 where a number is not finite. */
static int draw_all(const work *w, const memory *m, const text_row *rows, int64_t count, int64_t vocab, const settings *given) {
    int sound = 1;
#pragma omp parallel for schedule(dynamic) if (count > 1) reduction(& : sound)
    for (int64_t r = 0; r < count; r++) {
        if (rows[r].ended) {
            m->drawn[r] = m->taken[r] = 0;
            continue;
        }
        const int state = follow(w, rows + r, r, vocab, given, m->draws + m->draw * (size_t)omp_get_thread_num(),
                                 m->tokens + (NODES + 1) * r, m->paths + NODES * r, m->drawn + r, m->taken + r);
        sound &= state > 0;
    }
    return sound;
}

/* What a step made of a row, behind the draws. */
static void settle(const work *w, const memory *m, const model *target, text_row *r, int64_t row, const rules *a, record *out) {
    const int64_t *path = m->paths + NODES * row, *tokens = m->tokens + (NODES + 1) * row, drawn = m->drawn[row], taken = m->taken[row];
    if (!r->ended) {
        r->ended = ends_row(tokens[drawn - 1], drawn, r->left, r->stops, r->num_stops);
        move(w, target, row, r->length - 1, path, taken);
        judge(w, r, row, path, taken, (int)r->ended, a);
    }
    note(out, w, r, row, path, tokens, taken, drawn);
}

/* Whether the steps are over: so many rows have ended, or repeat no text any more, or one that goes on has no slot left. */
static int is_over(const work *w, const text_row *rows, int64_t count, const rules *a) {
    int64_t ended = w->lost;
    for (int64_t r = 0; r < count; r++) {
        if (!rows[r].ended && rows[r].slots < rows[r].length) return 1;
        ended += rows[r].ended;
    }
    return ended >= count || ended > a->ending;
}

/* Up to `steps` steps of rows of which each is to compute its last token, without pages in common; the one in which more rows end than
 * may is the last, or one behind which there are no slots. draft_model: null where a->chain is 0; lines: most of a forward; positions of
 * `given` are moved along. Returns 0, 1 where memory ran out, 2 where there is no such token. */
int few_verified(record *out, const model *target, const model *draft_model, text_row *rows, int64_t count, const rules *a,
                 const settings *given, const int64_t *table, int64_t steps, int64_t lines) {
    const int64_t vocab = target->ends->outputs;
    work w = {.table = (int64_t *)table};
    memory m;
    int failed = !find_memory(&m, &w, a, count, lines, vocab);
    for (out->done = out->spoilt = 0; !failed && out->done < steps && !is_over(&w, rows, count, a); out->done++) {
        for (int64_t r = 0; r < count; r++) m.known[r] = rows[r].known;
        out->seconds[1] = 0;
        failed = propose(&w, rows, count, a, draft_model, given, out->chains, out->seconds + 1);
        if (failed == 3) failed = 0, out->spoilt = 1;
        if (!failed && !out->spoilt) failed = verify(&w, rows, count, a, target, out->seconds);
        if (!failed && !out->spoilt) out->spoilt = !draw_all(&w, &m, rows, count, vocab, given);
        if (failed || out->spoilt) break;
        for (int64_t r = 0; r < count; r++) settle(&w, &m, target, rows + r, r, a, out);
        out->seconds += 2, out->chains += 3;
    }
    for (int64_t r = 0; out->spoilt && r < count; r++) rows[r].known = m.known[r];
    free_memory(&m);
    return failed;
}
