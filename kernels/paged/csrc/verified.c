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

static int ends_row(const text_row *r, int64_t made, int64_t token) {
    for (int64_t i = 0; i < r->num_stops; i++)
        if (r->stops[i] == token) return 1;
    return made >= r->left;
}

/* Draws row r's tokens along the drafts that they confirm: tokens, path, and how many of each; 2: the row has ended, 1: it goes on,
 * 0: numbers are not finite. */
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
        if (ends_row(r, *drawn, token)) return 2;
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
    if (source != 1) return;
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

static int64_t *room_for(int64_t **memory, int64_t numbers) {
    int64_t *place = *memory;
    *memory += numbers;
    return place;
}

/* Up to `steps` steps of rows of which each is to compute its last token, without pages in common; the one in which a row ends is
 * the last, or one behind which there are no slots. draft_model: null where a->chain is 0; lines: most of a forward; positions of
 * `given` are moved along. Returns 0, 1 where memory ran out, 2 where there is no such token. */
int few_verified(record *out, const model *target, const model *draft_model, text_row *rows, int64_t count, const rules *a,
                 const settings *given, const int64_t *table, int64_t steps, int64_t lines) {
    const int64_t vocab = target->ends->outputs;
    const int64_t guesses = (a->chain + 1) * a->width * count;
    const size_t numbers = (size_t)(12 * lines + 3 + (16 + 2 * NODES + 1) * count + guesses);
    int64_t *memory = calloc(numbers, sizeof *memory), *at = memory;
    draft *drafts = malloc(sizeof *drafts * (size_t)(2 * NODES * count));
    float *scores = whole_lines(sizeof *scores * (size_t)(lines * vocab));
    const size_t room = (size_of_draw(vocab) + 63) / 64 * 64;
    char *draws = whole_lines(room * (size_t)omp_get_max_threads());
    float *floats = malloc(sizeof *floats * (size_t)(guesses + count));
    int failed = !memory || !drafts || !scores || !draws || !floats, over = 0;
    work w = {.offers = drafts, .nodes = drafts + NODES * count};
    int64_t **const by_line[] = {&w.ids,  &w.positions, &w.slots,      &w.line_of, &w.context, &w.visible,
                                 &w.base, &w.own,       &w.members, &w.parts, &w.wanted};
    for (int i = 0; !failed && i < 11; i++) *by_line[i] = room_for(&at, lines);
    w.part_start = room_for(&at, lines + 1), w.segments = (segment *)room_for(&at, 6 * count);
    w.of = room_for(&at, count + 1), w.from = room_for(&at, count + 1), w.lines = room_for(&at, count), w.source = room_for(&at, count);
    w.alive = room_for(&at, count), w.depth = room_for(&at, count), w.deepest = room_for(&at, count);
    int64_t *known = room_for(&at, count); /* before the step */
    w.capacity = lines;
    w.guesses = room_for(&at, a->chain * a->width * count), w.said = room_for(&at, a->width * count);
    w.reach = floats, w.likely = floats + count, w.probs = w.likely + a->chain * a->width * count;
    int64_t *drawn = room_for(&at, count), *taken = room_for(&at, count), *paths = room_for(&at, NODES * count);
    int64_t *tokens = room_for(&at, (NODES + 1) * count);
    w.table = (int64_t *)table, w.scores = scores;
    for (out->done = out->spoilt = 0; !failed && !over && out->done < steps; out->done++) {
        double spent = 0;
        int sound = 1;
        for (int64_t r = 0; r < count; r++) over |= rows[r].slots < rows[r].length, known[r] = rows[r].known;
        if (over) break;
        failed = propose(&w, rows, count, a, draft_model, given, out->chains, &spent);
        if (failed == 3) failed = 0, out->spoilt = 1;
        if (failed || out->spoilt) break;
        target->sizes->lines = lay_out(&w, rows, count, target->sizes, a);
        *(sight *)target->blocks->sight = w.see;
        const inputs in = {w.ids, w.positions, w.slots, w.table, w.wanted, target->sizes->lines};
        const double begun = seconds_now();
        failed = few_forward(scores, target->ends, target->blocks, target->count, target->sizes, &in, 0, 0, target->factors[0],
                             target->factors[1], target->factors[2]);
        if (failed) break;
        out->seconds[0] = seconds_now() - begun, out->seconds[1] = spent;
#pragma omp parallel for schedule(dynamic) if (count > 1) reduction(& : sound) reduction(| : over)
        for (int64_t r = 0; r < count; r++) {
            const int state = follow(&w, rows + r, r, vocab, given, draws + room * (size_t)omp_get_thread_num(),
                                     tokens + (NODES + 1) * r, paths + NODES * r, drawn + r, taken + r);
            sound &= state > 0, over |= state == 2;
        }
        if (!sound) {
            out->spoilt = 1;
            break;
        }
        for (int64_t r = 0; r < count; r++) {
            const int64_t *path = paths + NODES * r, *own = tokens + (NODES + 1) * r;
            const int ended = ends_row(rows + r, drawn[r], own[drawn[r] - 1]);
            move(&w, target, r, rows[r].length - 1, path, taken[r]);
            judge(&w, rows + r, r, path, taken[r], ended, a);
            note(out, &w, rows + r, r, path, own, taken[r], drawn[r]);
        }
        out->seconds += 2, out->chains += 3;
    }
    for (int64_t r = 0; out->spoilt && r < count; r++) rows[r].known = known[r];
    free(memory), free(drafts), free(scores), free(draws), free(floats);
    return failed;
}
