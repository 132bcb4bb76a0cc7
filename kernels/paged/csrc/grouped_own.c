/* Attention of each query over the slots that it shares with nobody, between the chunks of those that are shared: memory brings the ones
 * while the processor computes the others. */
#include "grouped.h"

/* The next item of rows' own slots; of a row that has none it is noted that nothing is to be merged. */
int64_t take_own(const task *a) {
    const int64_t all = a->step->rows * a->kv_heads, group = a->heads / a->kv_heads;
    int64_t item;
    while ((item = __atomic_fetch_add(a->taken + 1, 1, __ATOMIC_RELAXED)) < all) {
        const int64_t row = item / a->kv_heads, line = row * a->heads + item % a->kv_heads * group;
        if (a->step->own[row] < a->step->context[row]) break;
        for (int64_t g = 0; g < group; g++) a->own_tops[2 * (line + g)] = -INFINITY, a->own_tops[2 * (line + g) + 1] = 0;
    }
    return item;
}

/* Item `row * kv_heads + head`: one query and KV head over its own slots. */
INLINE void attend_own(const task *a, float *scores, int64_t item, int64_t then, const int64_t group, const int64_t dim,
                       const int64_t value_dim) {
    const int64_t row = item / a->kv_heads, head = item % a->kv_heads * group;
    const int64_t line = row * a->heads + head, stride = a->stride;
    const span keys = own_slots(a, a->keys, item, dim), values = own_slots(a, a->values, item, value_dim);
    score_slots(scores, stride, a->query + row * a->query_line + head * dim, 0, 1, keys, values, group, a->scale, dim);
    const float softcap = hide(scores, stride, keys, a->step->tree, row, group, a->softcap);
    for (int64_t g = 0; g < group; g++) {
        float *top = a->own_tops + 2 * (line + g);
        *top = exponentials(scores + g * stride, keys.end - keys.begin, softcap, -INFINITY, top + 1);
    }
    sum_values(a->out + line * value_dim, 0, scores, stride, 1, &values.end, values, own_slots(a, a->keys, then, dim), group, value_dim);
}

/* The own slots that come next, if any are left. Those behind them are known, so that memory is on its way. */
void own_item(const task *a, scratch *s) {
    const int64_t group = a->heads / a->kv_heads, dim = a->dim, value_dim = a->value_dim;
    const int64_t item = s->owns[0], all = a->step->rows * a->kv_heads;
    if (item >= all) return;
    for (int i = 0; i + 1 < OWNS; i++) s->owns[i] = s->owns[i + 1];
    s->owns[OWNS - 1] = take_own(a);
    if (s->coming) s->coming--;
    else s->at = 0;
    const int64_t then = s->owns[0] < all ? s->owns[0] : item;
#define OWN(G, D, V) attend_own(a, s->own_scores, item, then, G, D, V)
    if (dim == 64 && value_dim == 64 && group == 3) OWN(3, 64, 64);
    else if (dim == 64 && value_dim == 64 && group == 4) OWN(4, 64, 64);
    else if (dim == 128 && value_dim == 128 && group == 4) OWN(4, 128, 128);
    else OWN(group, dim, value_dim);
}
