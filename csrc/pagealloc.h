/* pagealloc: allocates runs of pages by address-ordered first fit. Its time hardly depends on the
 * number of pages or the length of the run: a free with an allocation takes 55 to 72 ns in 1 GiB of
 * 4 KiB pages. Uses runs, the bit order of bitmap, and pagealloc_scan. No system call.
 *
 * Pages are numbers from 0 to capacity - 1; the caller knows their size and address. A page is
 * free, in use, or not yet part of the arena; the last allocates like a page in use and cannot be
 * freed. The tables lie in memory of the caller. Zero bytes mean that no page is part of the arena,
 * so the tables can be demand-zero memory sized for a whole reservation.
 *
 * Finding a run. 512 pages are a chunk: a cache line of bits, 1 = free. A run of free pages
 * belongs, at its full length, to the chunk in which it starts. A chunk therefore has one number,
 * the length of its longest run. A max tree over these numbers, 32 children per cache line, leads
 * to the lowest chunk with a run that is long enough: two levels for 2 GiB of 8 KiB pages, five for
 * 64 TiB. A run is never cut at the border of a chunk, so neighbouring chunks need not be joined in
 * a search.
 *
 * Long runs. For a run that leaves its chunk, the first chunk stores its length and the last chunk
 * its start (struct tag). The bits of the chunks in between are kept zero and never read, although
 * their pages are free. A run of 2^33 pages takes as long as a run of two and touches as much
 * memory: about ten OS pages.
 *
 * A number in the tree is a 16-bit code: exact below 32,768 pages, above that a class with a
 * resolution of 1/1024. Within the class of the requested length, runs are compared one by one.
 *
 * Holds for every function here:
 *  - an int64_t result is a page or 0, or a negative enum pagealloc_refusal; then nothing has
 *    changed;
 *  - any thread may call: each function takes the allocator's lock, except those that end in _held,
 *    whose caller holds it. Functions on many runs hold the lock throughout.
 */
#ifndef PYRESERVE_PAGEALLOC_H
#define PYRESERVE_PAGEALLOC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum pagealloc_refusal {
    PAGEALLOC_FULL = -1,       /* no run of free pages is long enough */
    PAGEALLOC_OUTSIDE = -2,    /* no pages, or some not below the capacity */
    PAGEALLOC_NOT_IN_USE = -3, /* some of the pages are free */
    PAGEALLOC_FOREIGN = -4,    /* some of the pages are not part of the arena */
    PAGEALLOC_IN_USE = -5,     /* some of the pages are in use, or part of the arena already */
    PAGEALLOC_NO_MEMORY = -6,  /* the list of parts could not grow */
    PAGEALLOC_ALIGNMENT = -7,  /* not a power of two, or the phase is not below it */
    PAGEALLOC_NARROW = -8,     /* a page number does not fit the type of the output */
    PAGEALLOC_VETOED = -9      /* the caller's flag is set */
};

/* An array of integers that no other thread changes during a call. `width` is 1, 2, 4 or 8 bytes,
 * negative if they are signed; with width 0 each is `constant`. */
struct pagealloc_integers {
    void *items;
    int width;
    uint64_t constant;
};

struct pagealloc_run {
    uint64_t start, stop;
};

struct pagealloc;

/* The largest capacity. */
uint64_t pagealloc_max_pages(void);

/* Bytes of memory for the tables of `capacity` pages, 0 < capacity <= pagealloc_max_pages(). */
uint64_t pagealloc_bytes(uint64_t capacity);

/* The largest capacity whose tree has as many levels as that of `capacity` pages. */
uint64_t pagealloc_tree_capacity(uint64_t capacity);

/* Creates an allocator without pages in pagealloc_bytes(capacity) zero bytes, aligned to a cache
 * line. It lives there until pagealloc_close. */
struct pagealloc *pagealloc_open(void *memory, uint64_t capacity);

/* Destroys an allocator that no thread uses; the memory of the tables stays with the caller. */
void pagealloc_close(struct pagealloc *pages);

/* Adds [page, page + n) to the arena as free pages. Returns 0. */
int64_t pagealloc_add(struct pagealloc *pages, uint64_t page, uint64_t n);

/* Allocates the lowest run of `n` pages whose first page plus `phase` is a multiple of `align`, a
 * power of two above `phase` (1 and 0: anywhere). Returns the first page. After 64 runs that are
 * long enough but misaligned, it prefers the lowest run with n + align - 1 pages, which always
 * fits. */
int64_t pagealloc_alloc(struct pagealloc *pages, uint64_t n, uint64_t align, uint64_t phase);

/* Allocates exactly [page, page + n). Returns 0. */
int64_t pagealloc_alloc_at(struct pagealloc *pages, uint64_t page, uint64_t n);

/* Frees [page, page + n), which must all be in use but need not have been allocated together.
 * Returns 0. */
int64_t pagealloc_free(struct pagealloc *pages, uint64_t page, uint64_t n);

/* pagealloc_free, but only while `*veto`, which is read with the lock held, is not set. */
int64_t pagealloc_free_unless(struct pagealloc *pages, uint64_t page, uint64_t n, const bool *veto);

/* Whether all of [page, page + n) is part of the arena and in use. */
bool pagealloc_in_use(struct pagealloc *pages, uint64_t page, uint64_t n);

/* Allocate `count` runs of lengths[i] pages and write their first pages to first[i], or free such
 * runs: all or none. On a refusal `*failed` is the index of the refused run, and the contents of
 * first[] after an allocation are undefined. Return 0. */
int64_t pagealloc_alloc_many(struct pagealloc *pages, const struct pagealloc_integers *lengths,
                             const struct pagealloc_integers *first, size_t count, size_t *failed);
int64_t pagealloc_free_many(struct pagealloc *pages, const struct pagealloc_integers *lengths,
                            const struct pagealloc_integers *first, size_t count, size_t *failed);

/* Element `i`; a negative one reads as a number above any capacity. */
uint64_t pagealloc_integer(const struct pagealloc_integers *from, size_t i);

/* The number of free pages; of pages in the arena; the length of the longest free run. */
uint64_t pagealloc_free_pages(struct pagealloc *pages);
uint64_t pagealloc_part_pages(struct pagealloc *pages);
uint64_t pagealloc_longest(struct pagealloc *pages);

/* Writes up to `max` runs of free pages (without `free`: of pages in use) in [start, stop) to
 * `out`, lowest first, clipped to the range; returns how many. Adjacent pages in use are one run
 * unless a gap between added parts separates them. */
size_t pagealloc_runs(struct pagealloc *pages, bool free, uint64_t start, uint64_t stop,
                      struct pagealloc_run *out, size_t max);

/* The lock, for callers that guard state of their own with it. */
void pagealloc_lock(struct pagealloc *pages);
void pagealloc_unlock(struct pagealloc *pages);

/* The lock from before a fork until after it, in parent and child. The forking thread may call
 * every function, as at-fork handlers of other modules do; all other threads wait. trylock: 0,
 * EBUSY, or EDEADLK if this thread already holds it for a fork. */
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

/* pagealloc_in_use. */
bool pagealloc_in_use_held(const struct pagealloc *pages, uint64_t page, uint64_t n);

/* The highest run of free pages that starts below `stop`, clipped there; false if there is none. */
bool pagealloc_run_below_held(const struct pagealloc *pages, uint64_t stop,
                              struct pagealloc_run *run);

/* The first run of pages in use in [start, stop), as pagealloc_runs gives it; false if there is
 * none. */
bool pagealloc_used_from_held(const struct pagealloc *pages, uint64_t start, uint64_t stop,
                              struct pagealloc_run *run);

#endif
