/* bitmap: operations on ranges of bits in an array of 64-bit words. Pure: no memory of its own, no
 * system call.
 *
 * Bit i is bit i % 64 of words[i / 64]; on a little-endian machine that is bit i % 8 of byte i / 8,
 * the order that bitarray calls "little". Orders of magnitude: with a bit per 4 KiB page, 1 GiB
 * has 32 KiB of words and 128 GiB has 4 MiB, which a search passes in about 0.1 ms.
 *
 * Holds for every function here: a range is half-open, start <= stop, and the words under it are
 * readable (and writable, where the function changes them); words outside it are not touched, not
 * even read; not synchronised.
 */
#ifndef PYRESERVE_BITMAP_H
#define PYRESERVE_BITMAP_H

#include <stdbool.h>
#include <stdint.h>

enum bitmap_operation { BITMAP_AND, BITMAP_OR, BITMAP_XOR, BITMAP_ANDNOT };

bool bitmap_test(const uint64_t *words, uint64_t index);

/* Set or clear every bit of the range. Return how many changed. */
uint64_t bitmap_set(uint64_t *words, uint64_t start, uint64_t stop);
uint64_t bitmap_clear(uint64_t *words, uint64_t start, uint64_t stop);

/* The number of bits that are set in the range. */
uint64_t bitmap_count(const uint64_t *words, uint64_t start, uint64_t stop);

/* Finds `wanted` > 0 consecutive bits that equal `value`. On entry `*first` is the start of the run
 * of such bits that ends at `start` (`start` if there is none), so a search can go on from another
 * range. True: the run is [*first, *first + wanted). False: `*first` is the start of the run that
 * ends at `stop`, for the search of the next range. */
bool bitmap_seek(const uint64_t *words, uint64_t start, uint64_t stop, bool value, uint64_t wanted,
                 uint64_t *first);

/* The first index in the range whose bit equals `value`; `stop` if there is none. */
uint64_t bitmap_find(const uint64_t *words, uint64_t start, uint64_t stop, bool value);

/* Read or write the `n` bits from `index` on as one number, bit `index` lowest. 0 < n <= 64. */
uint64_t bitmap_extract(const uint64_t *words, uint64_t index, unsigned n);
void bitmap_deposit(uint64_t *words, uint64_t index, unsigned n, uint64_t bits);

/* words = words OPERATION other over the range, at the same indices. */
void bitmap_combine(uint64_t *words, const uint64_t *other, uint64_t start, uint64_t stop,
                    enum bitmap_operation operation);

#endif
