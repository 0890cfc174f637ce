/* Pairs of free and alloc on pagealloc in C loops: the cost without Python. Compiled together with
 * pagealloc.c. Uses only thread-safe functions, which take the lock. */
#define _GNU_SOURCE
#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "pagealloc.h"

#define EXPORT __attribute__((visibility("default")))
enum { MINCORE_PAGES = 1 << 16 };

struct run {
    uint32_t page, length;
};

struct pages {
    struct pagealloc *alloc;
    size_t table_bytes;
    uint64_t seed;
    uint64_t used;    /* pages in use */
    size_t live;      /* number of live runs */
    struct run *runs; /* the live runs */
    uint32_t *victims, *lengths;
};

static double pairs_ns; /* time spent in replace() */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

/* xorshift64 (G. Marsaglia, 2003) */
static uint64_t next_random(struct pages *pages) {
    pages->seed ^= pages->seed << 13;
    pages->seed ^= pages->seed >> 7;
    return pages->seed ^= pages->seed << 17;
}

/* Returns `length`; if that is 0, a log-uniform length from 1 to 128. */
static uint32_t draw_length(struct pages *pages, uint32_t length) {
    double u = (double)(next_random(pages) >> 11) * 0x1p-53;
    return length != 0 ? length : (uint32_t)exp(u * log(129));
}

/* Creates an allocator of `count` free pages; NULL if memory is short. */
EXPORT struct pages *pages_open(uint64_t count) {
    struct pages *pages = calloc(1, sizeof *pages);
    if (pages == NULL)
        return NULL;
    pages->seed = 88172645463325252u;
    pages->table_bytes = pagealloc_bytes(count);
    void *tables = mmap(NULL, pages->table_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (tables == MAP_FAILED) {
        free(pages);
        return NULL;
    }
    (void)madvise(tables, pages->table_bytes, MADV_NOHUGEPAGE);
    pages->alloc = pagealloc_open(tables, count);
    (void)pagealloc_add(pages->alloc, 0, count);
    return pages;
}

EXPORT void pages_close(struct pages *pages) {
    pagealloc_close(pages->alloc);
    (void)munmap(pages->alloc, pages->table_bytes);
    free(pages->runs);
    free(pages->victims);
    free(pages->lengths);
    free(pages);
}

/* Allocates runs until none fits, then frees random runs until at most `used` pages are in use. */
static void fill(struct pages *pages, uint32_t length, uint64_t used) {
    while (pages->live > 0) {
        struct run run = pages->runs[--pages->live];
        pages->used -= run.length;
        (void)pagealloc_free(pages->alloc, run.page, run.length);
    }
    for (;;) {
        uint32_t n = draw_length(pages, length);
        int64_t page = pagealloc_alloc(pages->alloc, n, 1, 0);
        if (page < 0)
            break;
        pages->runs[pages->live++] = (struct run){(uint32_t)page, n};
        pages->used += n;
    }
    while (pages->used > used) {
        struct run *run = &pages->runs[next_random(pages) % pages->live];
        (void)pagealloc_free(pages->alloc, run->page, run->length);
        pages->used -= run->length;
        *run = pages->runs[--pages->live];
    }
}

/* Frees a run and allocates another one, `count` times. After a refused allocation it allocates the
 * length of the freed run. Returns the number of refusals. Prefetches the benchmark's own list of
 * runs (2 MiB), whose cache misses are not a cost of the allocator. */
static int64_t replace(struct pages *pages, size_t count) {
    int64_t refused = 0;
    for (size_t i = 0; i < count; i++) {
        struct run *run = &pages->runs[pages->victims[i]];
        if (i + 8 < count)
            __builtin_prefetch(&pages->runs[pages->victims[i + 8]], 1);
        (void)pagealloc_free(pages->alloc, run->page, run->length);
        uint32_t length = pages->lengths[i];
        int64_t page = pagealloc_alloc(pages->alloc, length, 1, 0);
        if (page < 0) {
            refused++;
            length = run->length;
            page = pagealloc_alloc(pages->alloc, length, 1, 0);
        }
        pages->used = pages->used - run->length + length;
        *run = (struct run){(uint32_t)page, length};
    }
    return refused;
}

/* Frees a random run of `length` pages and allocates another one, `pairs` times, with about `used`
 * pages in use; length 0: log-uniform from 1 to 128 pages. First fit fills the holes after a while,
 * and then an allocation mostly gets the run freed just before. `anew` prevents this: it creates
 * new random holes whenever a third of the runs is replaced. pages_clock counts only the pairs.
 * Returns the number of refused allocations; -1 if memory is short. */
EXPORT int64_t pages_pairs(struct pages *pages, uint32_t length, uint64_t used, int anew,
                           size_t pairs) {
    size_t max_runs = pagealloc_part_pages(pages->alloc);
    int64_t refused = 0;
    if (pages->runs == NULL) {
        pages->runs = malloc(max_runs * sizeof *pages->runs);
        pages->victims = malloc(max_runs * sizeof *pages->victims);
        pages->lengths = malloc(max_runs * sizeof *pages->lengths);
    }
    if (pages->runs == NULL || pages->victims == NULL || pages->lengths == NULL)
        return -1;
    while (pairs > 0) {
        if (anew || pages->live == 0)
            fill(pages, length, used);
        size_t n = anew ? pages->live / 3 : max_runs;
        n = n < pairs ? n : pairs;
        for (size_t i = 0; i < n; i++) {
            pages->victims[i] = (uint32_t)(next_random(pages) % pages->live);
            pages->lengths[i] = draw_length(pages, length);
        }
        double start = now();
        refused += replace(pages, n);
        pairs_ns += now() - start;
        pairs -= n;
    }
    return refused;
}

/* Total seconds of the pairs of pages_pairs so far. */
EXPORT double pages_clock(void) {
    return pairs_ns * 1e-9;
}

/* Allocates all pages but the last `tail`, as one run or one by one. Returns 0; -1 if refused. */
EXPORT int64_t pages_fill_front(struct pages *pages, uint64_t tail, int one_by_one) {
    uint64_t left = pagealloc_part_pages(pages->alloc) - tail, step = one_by_one ? 1 : left;
    for (; left > 0; left -= step)
        if (pagealloc_alloc(pages->alloc, step, 1, 0) < 0)
            return -1;
    return 0;
}

/* Allocates and frees a run of `length` pages, `pairs` times. Returns its first page, or -1. */
EXPORT int64_t pages_last(struct pages *pages, uint64_t length, size_t pairs) {
    int64_t page = -1;
    for (size_t i = 0; i < pairs; i++) {
        page = pagealloc_alloc(pages->alloc, length, 1, 0);
        if (page < 0 || pagealloc_free(pages->alloc, (uint64_t)page, length) != 0)
            return -1;
    }
    return page;
}

/* Replays operations: i >= 0 allocates run number i of lengths[i] pages, and ~i frees it. `first`
 * has an element for each run. Returns the end of the highest run ever in use, or -1. */
EXPORT int64_t pages_replay(struct pages *pages, const int64_t *operations, size_t count,
                            const int64_t *lengths, int64_t *first) {
    int64_t top = 0;
    for (size_t k = 0; k < count; k++) {
        int64_t i = operations[k];
        if (i < 0) {
            if (pagealloc_free(pages->alloc, (uint64_t)first[~i], (uint64_t)lengths[~i]) != 0)
                return -1;
            continue;
        }
        first[i] = pagealloc_alloc(pages->alloc, (uint64_t)lengths[i], 1, 0);
        if (first[i] < 0)
            return -1;
        top = first[i] + lengths[i] > top ? first[i] + lengths[i] : top;
    }
    return top;
}

/* Resident bytes of the tables (mincore), or -1. */
EXPORT int64_t pages_resident(const struct pages *pages) {
    static unsigned char state[MINCORE_PAGES];
    size_t os_page = (size_t)sysconf(_SC_PAGESIZE);
    size_t left = (pages->table_bytes + os_page - 1) / os_page, resident = 0;
    char *at = (char *)pages->alloc;
    while (left > 0) {
        size_t n = left < MINCORE_PAGES ? left : MINCORE_PAGES;
        if (mincore(at, n * os_page, state) != 0)
            return -1;
        for (size_t i = 0; i < n; i++)
            resident += state[i] & 1;
        at += n * os_page;
        left -= n;
    }
    return (int64_t)(resident * os_page);
}

/* Nanoseconds of a getppid system call. */
EXPORT double getppid_ns(long calls) {
    double start = now();
    for (long i = 0; i < calls; i++)
        (void)syscall(SYS_getppid);
    return (now() - start) / (double)calls;
}
