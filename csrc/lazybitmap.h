/* lazybitmap: a bitmap in a region of its own, committed only where bits were set. Uses region and
 * bitmap.
 *
 * 2^40 bits are 128 GiB of words, only addresses until bits are set; setting one commits 64 KiB,
 * which is 2^19 bits. Uncommitted bits read as clear: no function commits memory to read, clear or
 * search.
 *
 * Holds for every function here:
 *  - the region holds the bits [0, nbits) and nothing else, and its owner never decommits it;
 *    ranges are half-open, start <= stop, inside it; all bits of a released region read as clear;
 *  - a negative result is the negated errno of a refused commit (EBADF: the region is released);
 *    then no bit has changed;
 *  - not synchronised: the owner holds a lock around each call.
 */
#ifndef PYRESERVE_LAZYBITMAP_H
#define PYRESERVE_LAZYBITMAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bitmap.h"
#include "region.h"

/* Set or clear the bits start, start + step, ... below stop, step > 0. Return how many changed. */
int64_t lazybitmap_set(struct region *bits, uint64_t start, uint64_t stop, uint64_t step);
int64_t lazybitmap_clear(struct region *bits, uint64_t start, uint64_t stop, uint64_t step);

bool lazybitmap_test(const struct region *bits, uint64_t index);
uint64_t lazybitmap_count(const struct region *bits, uint64_t start, uint64_t stop);

/* The first index of `wanted` (> 0) consecutive bits in the range that equal `value`; -1: none. */
int64_t lazybitmap_find(const struct region *bits, uint64_t start, uint64_t stop, bool value,
                        uint64_t wanted);

/* Writes up to `max` runs of bits that equal `value` as start, stop, start, stop, ... and returns
 * how many; fewer than `max` means that the range has no more. */
size_t lazybitmap_runs(const struct region *bits, uint64_t start, uint64_t stop, bool value,
                       uint64_t *out, size_t max);

/* bits = bits OPERATION other over [0, nbits). */
int64_t lazybitmap_combine(struct region *bits, const struct region *other, uint64_t nbits,
                           enum bitmap_operation operation);

/* Whether the bits [0, nbits) of both are equal. */
bool lazybitmap_equal(const struct region *bits, const struct region *other, uint64_t nbits);

/* Replaces the `n` bits of `bits` at `start` by those of `other` at `from`. `bits` and `other` are
 * different bitmaps. */
int64_t lazybitmap_copy(struct region *bits, uint64_t start, const struct region *other,
                        uint64_t from, uint64_t n);

/* Copies the range to `out`; bit `start` is the lowest of the first byte, and unused bits of the
 * last byte are clear. */
void lazybitmap_read(const struct region *bits, uint64_t start, uint64_t stop, unsigned char *out);

/* Replaces the range by bits in the same format. Clear bits commit nothing. */
int64_t lazybitmap_write(struct region *bits, uint64_t start, uint64_t stop,
                         const unsigned char *in);

#endif
