/* Places in texts, chained by the tokens before them: see `speculation/suffix.py`, which has the same in Python. */
#include <stdint.h>

enum { KINDS = 3 };
static const int64_t reach[KINDS] = {1, 2, 6}; /* tokens before a place that a chain of each kind has in common */

/* tokens: those before place `end`, back to the sixth before place `begin`, or to the first. Entries count, count + 1, ... are places
 * [begin, end): an entry of a chain says which one was at its slot before. heads, before [mask + 1] of each kind. */
void chain_places(const int64_t *tokens, int64_t first, int64_t begin, int64_t end, int64_t count, int64_t mask, int64_t *const *heads,
                  int64_t *const *before) {
    for (int64_t at = begin; at < end; at++, count++) {
        const int64_t *last = tokens + at - first - 1, here = count & mask;
        uint64_t slots[KINDS];
        slots[0] = (uint64_t)last[0] * 0x9E3779B1u;
        slots[1] = at < reach[1] ? 0 : slots[0] + (uint64_t)last[-1] * 0x85EBCA77u;
        slots[2] = slots[1];
        for (int64_t i = 2; i < reach[2] && at >= reach[2]; i++) slots[2] = (slots[2] ^ (uint64_t)last[-i]) * 0x9E3779B97F4A7C15u;
        for (int k = 0; k < KINDS; k++) {
            if (at < reach[k]) {
                before[k][here] = -1;
                continue;
            }
            int64_t *head = heads[k] + ((slots[k] >> (k == 2 ? 32 : 7)) & (uint64_t)mask);
            before[k][here] = *head, *head = count;
        }
    }
}
