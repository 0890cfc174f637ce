/* Pairs of free and alloc on pagealloc in C loops: what it costs without Python. Compiled together
 * with pagealloc.c. Only the functions that any thread may call are used: each takes the lock. */
#define _GNU_SOURCE
#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "pagealloc.h"

#define SHOWN __attribute__((visibility("default")))
enum { OS_PAGES_AT_ONCE = 1 << 16 };

struct run {
    uint32_t page, length;
};

struct pages {
    struct pagealloc *all;
    size_t table_bytes;
    uint64_t seed;
    uint64_t used;    /* pages */
    size_t live;      /* runs */
    struct run *runs; /* that are live */
    uint32_t *victims, *lengths;
};

static double timed; /* nanoseconds */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

/* xorshift64 (G. Marsaglia, 2003) */
static uint64_t chance(struct pages *pages) {
    pages->seed ^= pages->seed << 13;
    pages->seed ^= pages->seed >> 7;
    return pages->seed ^= pages->seed << 17;
}

/* 0: of 1 to 128, log-uniform. */
static uint32_t draw_length(struct pages *pages, uint32_t length) {
    double u = (double)(chance(pages) >> 11) * 0x1p-53;
    return length != 0 ? length : (uint32_t)exp(u * log(129));
}

/* An allocator of `count` free pages; NULL: no memory. */
SHOWN struct pages *pages_open(uint64_t count) {
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
    pages->all = pagealloc_open(tables, count);
    (void)pagealloc_add(pages->all, 0, count);
    return pages;
}

SHOWN void pages_close(struct pages *pages) {
    pagealloc_close(pages->all);
    (void)munmap(pages->all, pages->table_bytes);
    free(pages->runs);
    free(pages->victims);
    free(pages->lengths);
    free(pages);
}

/* Takes runs until none fits, and frees runs at random until `used` pages are in use. */
static void fill(struct pages *pages, uint32_t length, uint64_t used) {
    while (pages->live > 0) {
        struct run run = pages->runs[--pages->live];
        pages->used -= run.length;
        (void)pagealloc_free(pages->all, run.page, run.length);
    }
    for (;;) {
        uint32_t n = draw_length(pages, length);
        int64_t page = pagealloc_alloc(pages->all, n, 1, 0);
        if (page < 0)
            break;
        pages->runs[pages->live++] = (struct run){(uint32_t)page, n};
        pages->used += n;
    }
    while (pages->used > used) {
        struct run *run = &pages->runs[chance(pages) % pages->live];
        (void)pagealloc_free(pages->all, run->page, run->length);
        pages->used -= run->length;
        *run = pages->runs[--pages->live];
    }
}

/* Frees a run and allocates another one, `count` times. An allocation that is refused is followed by
 * one as long as the run just freed. Returns how many were refused. Our own list of 2 MiB is fetched
 * ahead: waiting for that is no cost of the allocator. */
static int64_t replace(struct pages *pages, size_t count) {
    int64_t refused = 0;
    for (size_t i = 0; i < count; i++) {
        struct run *run = &pages->runs[pages->victims[i]];
        if (i + 8 < count)
            __builtin_prefetch(&pages->runs[pages->victims[i + 8]], 1);
        (void)pagealloc_free(pages->all, run->page, run->length);
        uint32_t length = pages->lengths[i];
        int64_t page = pagealloc_alloc(pages->all, length, 1, 0);
        if (page < 0) {
            refused++;
            length = run->length;
            page = pagealloc_alloc(pages->all, length, 1, 0);
        }
        pages->used = pages->used - run->length + length;
        *run = (struct run){(uint32_t)page, length};
    }
    return refused;
}

/* Frees a random run of `length` pages and allocates another one, `pairs` times, with `used` pages
 * in use; length 0: of 1 to 128 pages, log-uniform. First fit closes the holes after a while, and
 * then an allocation mostly gets what was freed just before. With `anew` it does not come to that:
 * when a third of the runs were replaced, holes are made anew, at random. Only the pairs count for
 * pages_clock. Returns how many allocations were refused; -1: no memory. */
SHOWN int64_t pages_pairs(struct pages *pages, uint32_t length, uint64_t used, int anew,
                          size_t pairs) {
    size_t most = pagealloc_part_pages(pages->all);
    int64_t refused = 0;
    if (pages->runs == NULL) {
        pages->runs = malloc(most * sizeof *pages->runs);
        pages->victims = malloc(most * sizeof *pages->victims);
        pages->lengths = malloc(most * sizeof *pages->lengths);
    }
    if (pages->runs == NULL || pages->victims == NULL || pages->lengths == NULL)
        return -1;
    while (pairs > 0) {
        if (anew || pages->live == 0)
            fill(pages, length, used);
        size_t n = anew ? pages->live / 3 : most;
        n = n < pairs ? n : pairs;
        for (size_t i = 0; i < n; i++) {
            pages->victims[i] = (uint32_t)(chance(pages) % pages->live);
            pages->lengths[i] = draw_length(pages, length);
        }
        double start = now();
        refused += replace(pages, n);
        timed += now() - start;
        pairs -= n;
    }
    return refused;
}

/* Seconds that the pairs of pages_pairs have taken so far. */
SHOWN double pages_clock(void) {
    return timed * 1e-9;
}

/* Takes all pages but the last `tail`, as one run or one by one. Returns 0. */
SHOWN int64_t pages_fill_front(struct pages *pages, uint64_t tail, int one_by_one) {
    uint64_t left = pagealloc_part_pages(pages->all) - tail, step = one_by_one ? 1 : left;
    for (; left > 0; left -= step)
        if (pagealloc_alloc(pages->all, step, 1, 0) < 0)
            return -1;
    return 0;
}

/* Allocates a run of `length` pages and frees it again, so many times. Returns its first page. */
SHOWN int64_t pages_last(struct pages *pages, uint64_t length, size_t pairs) {
    int64_t page = -1;
    for (size_t i = 0; i < pairs; i++) {
        page = pagealloc_alloc(pages->all, length, 1, 0);
        if (page < 0 || pagealloc_free(pages->all, (uint64_t)page, length) != 0)
            return -1;
    }
    return page;
}

/* Replays operations: i >= 0 allocates run number i, of lengths[i] pages, and ~i frees it; `first`
 * has room for each. Returns one more than the highest page that was ever in use, or -1. */
SHOWN int64_t pages_replay(struct pages *pages, const int64_t *operations, size_t count,
                           const int64_t *lengths, int64_t *first) {
    int64_t top = 0;
    for (size_t k = 0; k < count; k++) {
        int64_t i = operations[k];
        if (i < 0) {
            if (pagealloc_free(pages->all, (uint64_t)first[~i], (uint64_t)lengths[~i]) != 0)
                return -1;
            continue;
        }
        first[i] = pagealloc_alloc(pages->all, (uint64_t)lengths[i], 1, 0);
        if (first[i] < 0)
            return -1;
        top = first[i] + lengths[i] > top ? first[i] + lengths[i] : top;
    }
    return top;
}

/* Bytes of the tables that are in memory, as mincore says; -1: it does not say. */
SHOWN int64_t pages_resident(const struct pages *pages) {
    static unsigned char seen[OS_PAGES_AT_ONCE];
    size_t os_page = (size_t)sysconf(_SC_PAGESIZE);
    size_t left = (pages->table_bytes + os_page - 1) / os_page, there = 0;
    char *at = (char *)pages->all;
    while (left > 0) {
        size_t n = left < OS_PAGES_AT_ONCE ? left : OS_PAGES_AT_ONCE;
        if (mincore(at, n * os_page, seen) != 0)
            return -1;
        for (size_t i = 0; i < n; i++)
            there += seen[i] & 1;
        at += n * os_page;
        left -= n;
    }
    return (int64_t)(there * os_page);
}

/* Nanoseconds of a system call that does nothing. */
SHOWN double getppid_ns(long calls) {
    double start = now();
    for (long i = 0; i < calls; i++)
        (void)syscall(SYS_getppid);
    return (now() - start) / (double)calls;
}
