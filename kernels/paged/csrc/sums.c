/* Whether numbers are what they were: a sum over the bits of arrays, and some numbers one by one. */
#include <stdint.h>
#include <string.h>

enum {
    LINE = 16,  /* numbers of 32 bits that memory brings together */
    AHEAD = 128 /* lines that it brings meanwhile: twice as fast as what the processor fetches by itself */
};

static uint64_t sum_of(const char *at, int64_t pairs) {
    uint64_t sum = 0;
    for (int64_t i = 0; i < pairs; i++) {
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
        const int64_t lines = sizes[a] / LINE;
        uint64_t own = 0;
#pragma omp for schedule(static) nowait
        for (int64_t l = turn; l < lines; l += every) {
            __builtin_prefetch(at[a] + 4 * LINE * (l + AHEAD), 0, 2);
            own += sum_of(at[a] + 4 * LINE * l, LINE / 2);
        }
#pragma omp single nowait
        for (int64_t i = lines * LINE; i < sizes[a] && !turn; i++) {
            uint32_t bits;
            memcpy(&bits, at[a] + 4 * i, sizeof bits);
            own += bits;
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
