/* bitmap: ranges of bits over 64-bit words. Pure: no memory of its own, no system call.
 *
 * Bit i is bit i % 64 of words[i / 64]; on a little-endian machine that is bit i % 8 of byte i / 8,
 * the order that bitarray calls "little". Orders of magnitude: a bit per 4 KiB page makes 1 GiB
 * out of 32 KiB of words and 128 GiB out of 4 MiB; a scan goes through 4 MiB in about 0.1 ms.
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

/* Sets, or clears, every bit of the range; returns how many of them changed. */
uint64_t bitmap_set(uint64_t *words, uint64_t start, uint64_t stop);
uint64_t bitmap_clear(uint64_t *words, uint64_t start, uint64_t stop);

/* How many bits of the range are set. */
uint64_t bitmap_count(const uint64_t *words, uint64_t start, uint64_t stop);

/* Looks for `wanted` neighbours that all equal `value`. `*first` is where the run of such bits that
 * reaches `start` begins (`start` itself if there is none). True: the run is [*first, *first +
 * wanted). False: `*first` is where the run that reaches `stop` begins, ready for a scan of what
 * follows. wanted > 0. */
bool bitmap_seek(const uint64_t *words, uint64_t start, uint64_t stop, bool value, uint64_t wanted,
                 uint64_t *first);

/* The first index in the range whose bit equals `value`; `stop` if there is none. */
uint64_t bitmap_find(const uint64_t *words, uint64_t start, uint64_t stop, bool value);

/* Reads, or writes, `n` bits from `index` on as one number, bit `index` lowest. 0 < n <= 64. */
uint64_t bitmap_extract(const uint64_t *words, uint64_t index, unsigned n);
void bitmap_deposit(uint64_t *words, uint64_t index, unsigned n, uint64_t bits);

/* words = words OPERATION other over the range, at the same indices. */
void bitmap_combine(uint64_t *words, const uint64_t *other, uint64_t start, uint64_t stop,
                    enum bitmap_operation operation);

#endif
