/* Whether numbers are what they were: a sum over the bits of arrays, and some numbers one by one. */
#include <stdint.h>
#include <string.h>

enum {
    LINE = 16,   /* numbers of 32 bits that memory brings together */
    STREAMS = 8, /* places that are read by turns: in each the processor fetches what comes, up to the end of a page of memory, */
    AHEAD = 16   /* and beyond it these lines: a quarter faster than one place of which all is asked for */
};

/* Lines are read in steps of `every`. */
static uint64_t sum_of_line(const char *at, int64_t line, int64_t every) {
    uint64_t sum = 0;
    at += 4 * LINE * line;
    __builtin_prefetch(at + 4 * LINE * AHEAD * every, 0, 2);
    for (int64_t i = 0; i < LINE / 2; i++) {
        uint64_t bits;
        memcpy(&bits, at + 8 * i, sizeof bits);
        sum += bits;
    }
    return sum;
}

/* Of arrays of sizes[a] numbers of 32 bits, lines of 16: those whose number leaves `turn` when divided by `every`, modulo 2^64. What
 * is behind the last whole line belongs to turn 0. */
uint64_t sum_of_bits(const char *const *at, const int64_t *sizes, int64_t arrays, int64_t every, int64_t turn) {
    uint64_t sum = 0;
#pragma omp parallel reduction(+ : sum)
    for (int64_t a = 0; a < arrays; a++) {
        const int64_t lines = sizes[a] / LINE, count = lines > turn ? (lines - turn + every - 1) / every : 0, each = count / STREAMS;
        uint64_t own = 0;
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < each; i++)
            for (int64_t s = 0; s < STREAMS; s++) own += sum_of_line(at[a], turn + every * (s * each + i), every);
#pragma omp single nowait
        {
            for (int64_t i = each * STREAMS; i < count; i++) own += sum_of_line(at[a], turn + every * i, every);
            for (int64_t i = lines * LINE; i < sizes[a] && !turn; i++) {
                uint32_t bits;
                memcpy(&bits, at[a] + 4 * i, sizeof bits);
                own += bits;
            }
        }
        sum += own * (uint64_t)(2 * a + 1); /* so that two arrays cannot trade places */
    }
    return sum;
}

/* Whether numbers of sizes[i] bytes (at most 8) at at[i] are those that `kept` holds, 8 bytes each. If `keep`, they are from now on. */
int same_numbers(const char *const *at, const int64_t *sizes, uint64_t *kept, int64_t count, int keep) {
    int same = 1;
    for (int64_t i = 0; i < count; i++) {
        uint64_t bits = 0;
        memcpy(&bits, at[i], (size_t)sizes[i]);
        same &= kept[i] == bits;
        if (keep) kept[i] = bits;
    }
    return same;
}
