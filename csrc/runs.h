/* runs: a set of offsets kept as sorted, disjoint half-open runs [lo, hi) that never touch.
 *
 * It answers "what of this reservation is committed". Each run with its gap is at least two of the
 * kernel's mappings, so the map count (65,530 by default) bounds the runs: 512 KiB of them at the
 * very most, 16 bytes for the usual one, and nothing at all for a reservation of 64 TiB that has
 * not been committed. A bit per OS page would take 2 GiB there.
 *
 * Holds for every function here: lo < hi; no system call; not synchronised, the owner holds a lock.
 * A run set that is all zero bytes is empty and ready for use.
 */
#ifndef PYRESERVE_RUNS_H
#define PYRESERVE_RUNS_H

#include <stdbool.h>
#include <stddef.h>

struct run {
    size_t lo, hi;
};

struct runs {
    struct run *items;
    size_t count, capacity;
    size_t total; /* bytes in all runs, exact at any moment */
};

/* Makes sure that the next runs_add or runs_remove finds room. 0 or ENOMEM; the set is unchanged. */
int runs_grow(struct runs *set);

/* Adds [lo, hi) or takes it out; what is in or out already stays so. Needs runs_grow before. */
void runs_add(struct runs *set, size_t lo, size_t hi);
void runs_remove(struct runs *set, size_t lo, size_t hi);

/* Whether all of [lo, hi) is in the set. */
bool runs_contain(const struct runs *set, size_t lo, size_t hi);

/* The first piece of [lo, hi), which may be empty here, that is in the set, or that is not; false if
 * there is none. */
bool runs_next(const struct runs *set, size_t lo, size_t hi, struct run *piece);
bool runs_next_gap(const struct runs *set, size_t lo, size_t hi, struct run *gap);

/* Makes `copy`, whatever it held, a set of its own with the same runs. 0 or ENOMEM. */
int runs_copy(struct runs *copy, const struct runs *set);

/* Leaves an empty set, with its storage if that is small. */
void runs_empty(struct runs *set);

/* Frees the storage and leaves an empty set. */
void runs_clear(struct runs *set);

#endif
