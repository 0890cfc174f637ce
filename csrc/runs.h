/* runs: a set of offsets, stored as sorted half-open runs [lo, hi) that neither overlap nor touch.
 *
 * It holds which bytes of a reservation are committed. A run and the gap after it are at least two
 * mappings of the kernel, so max_map_count (65,530 by default) bounds the set: 16 bytes for the
 * usual single run, at most 512 KiB, and nothing for a reservation of 64 TiB without committed
 * bytes. One bit per OS page would take 2 GiB there. Lookups are binary searches.
 *
 * Holds for every function here: lo < hi unless said otherwise; no system call; not synchronised,
 * the owner holds a lock. Zero bytes are an empty set.
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
    size_t total; /* bytes in all runs */
};

/* Allocates storage for one more run, which the next runs_add or runs_remove may need. 0 or ENOMEM;
 * the set is unchanged. */
int runs_grow(struct runs *set);

/* Add [lo, hi) to the set or remove it from the set. Offsets that are in (or not in) the set
 * already are no error. runs_grow must have succeeded before each call. */
void runs_add(struct runs *set, size_t lo, size_t hi);
void runs_remove(struct runs *set, size_t lo, size_t hi);

/* Whether all of [lo, hi) is in the set. */
bool runs_contain(const struct runs *set, size_t lo, size_t hi);

/* The first piece of [lo, hi) that is in the set, or that is not in it; false if there is none.
 * [lo, hi) may be empty. */
bool runs_next(const struct runs *set, size_t lo, size_t hi, struct run *piece);
bool runs_next_gap(const struct runs *set, size_t lo, size_t hi, struct run *gap);

/* The index of the first run that ends at or after `offset`, the only one that can contain or touch
 * it; `count` if there is none. */
size_t runs_search(const struct runs *set, size_t offset);

/* Replaces the runs with index [from, to) by the `n` runs of `fresh`, which keep the order and have
 * storage. Joins nothing: for sets whose runs may touch, as in tracing. */
void runs_splice(struct runs *set, size_t from, size_t to, const struct run *fresh, size_t n);

/* Makes the uninitialised `copy` an independent set with the same runs. 0 or ENOMEM. */
int runs_copy(struct runs *copy, const struct runs *set);

/* Empties the set and keeps its storage if that is small. */
void runs_empty(struct runs *set);

/* Empties the set and frees its storage. */
void runs_clear(struct runs *set);

#endif
