/* Keyed noise as `noise.py` of the engine room defines it: Philox4x32-10 (Salmon et al., SC 2011) of the counter
 * (token / 4, position, 0, 0) under the key (low, high half of the seed) gives a token its 32 bits. */
#pragma once
#include "lanes.h"
#include <string.h>

typedef uint64_t longs __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4)));

/* The words of tokens [4 * first, 4 * first + 32): those of eight counters. */
INLINE void philox32(uint32_t out[32], uint64_t first, uint64_t seed, uint64_t position) {
    const longs low = (longs){0} + 0xFFFFFFFFu;
    longs a = ((longs){0, 1, 2, 3, 4, 5, 6, 7} + first) & low, b = (longs){0} + (position & 0xFFFFFFFFu), c = {0}, d = {0};
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        const longs x = a * 0xD2511F53u, y = c * 0xCD9E8D57u;
        a = (y >> 32) ^ b ^ (uint64_t)k0;
        b = y & low;
        c = (x >> 32) ^ d ^ (uint64_t)k1;
        d = x & low;
    }
    a |= b << 32, c |= d << 32;
    const longs low_half = __builtin_shufflevector(a, c, 0, 8, 1, 9, 2, 10, 3, 11);
    const longs high_half = __builtin_shufflevector(a, c, 4, 12, 5, 13, 6, 14, 7, 15);
    memcpy(out, &low_half, 64);
    memcpy(out + 16, &high_half, 64);
}

INLINE uint32_t philox_word(int64_t token, uint64_t seed, uint64_t position) {
    uint32_t words[32];
    philox32(words, token >> 2, seed, position);
    return words[token & 3];
}

/* Standard Gumbel noise, between -3.2 and 22.9. */
INLINE double gumbel_of(uint32_t word) { return -log(-log((word + 0.5) * 0x1p-32)); }

/* No less than `gumbel_of`, at little cost: -log u >= 1 - u, whose exponent tells its logarithm. */
INLINE lanes most_noise(words w) {
    const lanes rest = __builtin_convertvector(~w, lanes); /* 1 - u = (rest + 0.5) / 2^32 */
    const ints exponent = ((ints)larger((lanes){0} + 0.5f, rest) >> 23) - 127;
    return __builtin_convertvector(32 - exponent, lanes) * 0.693148f;
}
