/* pagealloc: runs of pages, address-ordered first fit, in a time that hardly depends on how many
 * pages there are or how many are asked for. runs + bitmap's order of bits. No system call.
 *
 * Pages are numbers from 0 to capacity - 1; what a page is, and where, is the caller's business.
 * A page is free, or in use, or not part of the arena yet (which allocates like one in use and
 * can't be freed). All of it lives in memory that the caller gives: all zero bytes mean that nothing
 * is part, so the tables can be demand-zero memory sized for a whole reservation.
 *
 * How it finds a run. Pages come in chunks of 512, a cache line of bits, 1 = free. A run of free
 * pages belongs to the chunk in which it starts, at its full length, however far it reaches; so a
 * chunk has one number, its longest run, and a tree of maxima over these numbers, 32 children to a
 * cache line, leads to the lowest run that is long enough: two levels for 2 GiB of 8 KiB pages, five
 * for 64 TiB. There are no junctions to compute, since no run is ever cut at a chunk's border.
 *
 * What a long run costs. A run that leaves its chunk has its length noted at its first chunk and its
 * start at its last one; the bits of the chunks between, whose pages are all free, are kept zero and
 * never looked at. So a run of 2^33 pages takes as long as one of two, and touches as much memory:
 * about ten OS pages.
 *
 * Numbers are 16 bits: exact below 32,768 pages, then classes of a 1,024th; inside the class of the
 * length asked for, runs are looked at one by one.
 *
 * Holds for every function here:
 *  - an int64_t is a page or a count, or a negative enum pagealloc_refusal, and then nothing has
 *    changed;
 *  - any thread may call: each function takes the allocator's lock, but those that end in _held,
 *    whose caller holds it. Functions on many runs hold it all along, so others see all or nothing.
 */
#ifndef PYRESERVE_PAGEALLOC_H
#define PYRESERVE_PAGEALLOC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum pagealloc_refusal {
    PAGEALLOC_FULL = -1,       /* no run of free pages is long enough */
    PAGEALLOC_OUTSIDE = -2,    /* no pages, or not all of them below the capacity */
    PAGEALLOC_NOT_IN_USE = -3, /* some of the pages are free already */
    PAGEALLOC_FOREIGN = -4,    /* some of the pages are not part of the arena */
    PAGEALLOC_IN_USE = -5,     /* some of the pages are in use, or part of the arena already */
    PAGEALLOC_NO_MEMORY = -6,  /* the list of parts could not grow */
    PAGEALLOC_ALIGNMENT = -7,  /* not a power of two, or the phase is not below it */
    PAGEALLOC_NARROW = -8      /* a page does not fit the integers it shall be written to */
};

/* Integers in memory that somebody else owns, for functions on many runs: `width` is 1, 2, 4 or 8
 * bytes, negative if they are signed; width 0 means that each is `constant`. */
struct pagealloc_integers {
    void *items;
    int width;
    uint64_t constant;
};

struct pagealloc_run {
    uint64_t start, stop;
};

struct pagealloc;

/* The most pages that tables can be made for. */
uint64_t pagealloc_max_pages(void);

/* Bytes of memory for the tables of `capacity` pages, 0 < capacity <= pagealloc_max_pages(). */
uint64_t pagealloc_bytes(uint64_t capacity);

/* The most pages that a tree as high as that for `capacity` pages can hold. */
uint64_t pagealloc_tree_capacity(uint64_t capacity);

/* Makes an allocator with no parts in pagealloc_bytes(capacity) zero bytes at a cache line's start.
 * It lives there until pagealloc_close. */
struct pagealloc *pagealloc_open(void *memory, uint64_t capacity);

/* The end of an allocator that nobody uses; the tables' memory is the caller's. */
void pagealloc_close(struct pagealloc *pages);

/* Makes [page, page + n) part of the arena, free. Returns 0. */
int64_t pagealloc_add(struct pagealloc *pages, uint64_t page, uint64_t n);

/* Takes the lowest run of `n` pages whose first page, plus `phase`, is a multiple of `align`, a
 * power of two above `phase` (1 and 0: any). Where many runs are long enough but badly placed, an
 * aligned one that is sure to fit is taken before all of them have been looked at. */
int64_t pagealloc_alloc(struct pagealloc *pages, uint64_t n, uint64_t align, uint64_t phase);

/* Takes exactly [page, page + n). Returns 0. */
int64_t pagealloc_alloc_at(struct pagealloc *pages, uint64_t page, uint64_t n);

/* Frees [page, page + n), which are all in use, whether or not they were allocated together.
 * Returns 0. */
int64_t pagealloc_free(struct pagealloc *pages, uint64_t page, uint64_t n);

/* Allocates `count` runs of lengths[i] pages and writes their first pages to first[i]; or frees such
 * runs: all, or none. On a refusal `*failed` is the index of the run that was refused, and what an
 * allocation has written to first[] means nothing. Return 0. */
int64_t pagealloc_alloc_many(struct pagealloc *pages, const struct pagealloc_integers *lengths,
                             const struct pagealloc_integers *first, size_t count, size_t *failed);
int64_t pagealloc_free_many(struct pagealloc *pages, const struct pagealloc_integers *lengths,
                            const struct pagealloc_integers *first, size_t count, size_t *failed);

/* One of them; a negative number reads as one that is larger than any capacity. */
uint64_t pagealloc_integer(const struct pagealloc_integers *from, size_t i);

/* How many pages are free, or part of the arena; how long the longest free run is. */
uint64_t pagealloc_free_pages(struct pagealloc *pages);
uint64_t pagealloc_part_pages(struct pagealloc *pages);
uint64_t pagealloc_longest(struct pagealloc *pages);

/* Writes up to `max` runs of free pages (of pages in use, if not `free`) in [start, stop) to `out`,
 * lowest first, cut at the ends; returns how many. Neighbours in use are one run, unless parts that
 * were added apart end between them. */
size_t pagealloc_runs(struct pagealloc *pages, bool free, uint64_t start, uint64_t stop,
                      struct pagealloc_run *out, size_t max);

/* The lock, for a caller that has to keep more than the pages in step. */
void pagealloc_lock(struct pagealloc *pages);
void pagealloc_unlock(struct pagealloc *pages);

/* The lock from before a fork until after it, on both sides. The thread that forks may call every
 * function, as at-fork handlers of other modules do; all other threads wait. try: 0, EBUSY, or
 * EDEADLK if this thread has it for a fork already. */
int pagealloc_trylock_fork(struct pagealloc *pages);
void pagealloc_unlock_fork(struct pagealloc *pages);

uint64_t pagealloc_free_pages_held(const struct pagealloc *pages);
uint64_t pagealloc_part_pages_held(const struct pagealloc *pages);
int64_t pagealloc_alloc_held(struct pagealloc *pages, uint64_t n, uint64_t align, uint64_t phase);
int64_t pagealloc_alloc_at_held(struct pagealloc *pages, uint64_t page, uint64_t n);
int64_t pagealloc_free_held(struct pagealloc *pages, uint64_t page, uint64_t n);
int64_t pagealloc_add_held(struct pagealloc *pages, uint64_t page, uint64_t n);

/* The lowest run of at least `n` free pages; false if there is none. */
bool pagealloc_lowest_held(const struct pagealloc *pages, uint64_t n, struct pagealloc_run *run);

/* Whether all of [page, page + n) is part of the arena and in use. */
bool pagealloc_in_use_held(const struct pagealloc *pages, uint64_t page, uint64_t n);

/* The highest run of free pages that starts below `stop`, cut there; false if there is none. */
bool pagealloc_run_below_held(const struct pagealloc *pages, uint64_t stop,
                              struct pagealloc_run *run);

/* The first run of pages in use from `start` on, below `stop`, as pagealloc_runs would give it. */
bool pagealloc_used_from_held(const struct pagealloc *pages, uint64_t start, uint64_t stop,
                              struct pagealloc_run *run);

#endif
