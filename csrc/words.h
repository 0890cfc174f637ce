/* words: arithmetic on unsigned 64-bit numbers that several modules need. */
#ifndef PYRESERVE_WORDS_H
#define PYRESERVE_WORDS_H

#include <stdbool.h>
#include <stdint.h>

/* The smallest multiple of `to` that is at least `n`; the sum must not overflow. */
static inline uint64_t round_up(uint64_t n, uint64_t to) {
    return (n + to - 1) / to * to;
}

static inline uint64_t smaller(uint64_t a, uint64_t b) {
    return a < b ? a : b;
}

static inline uint64_t larger(uint64_t a, uint64_t b) {
    return a > b ? a : b;
}

static inline bool is_power_of_two(uint64_t n) {
    return n != 0 && (n & (n - 1)) == 0;
}

#endif
