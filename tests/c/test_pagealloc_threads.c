#define _DEFAULT_SOURCE

#include "pagealloc.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "check.h"

#define THREADS 8
#define PAGES 40000
#define HELD 64 /* runs that a thread holds at most */

/* ThreadSanitizer makes each operation about ten times as slow. */
#ifdef __SANITIZE_THREAD__
#define ROUNDS 20000
#else
#define ROUNDS 100000
#endif

static struct pagealloc *pages;
/* The holder of each page: 0, or 1 + the number of a thread. */
static _Atomic unsigned char holders[PAGES];
static atomic_ulong overlaps, refusals, wrong, taken, full;

struct worker {
    pthread_t thread;
    unsigned char name;
    uint64_t seed;
    struct pagealloc_run held[HELD];
    size_t count;
};

static void mark(struct pagealloc_run run, unsigned char from, unsigned char to) {
    for (uint64_t page = run.start; page < run.stop; page++)
        if (atomic_exchange(&holders[page], to) != from)
            atomic_fetch_add(&overlaps, 1);
}

static void hold(struct worker *me, uint64_t page, uint64_t n) {
    struct pagealloc_run run = {page, page + n};
    mark(run, 0, me->name);
    me->held[me->count++] = run;
    atomic_fetch_add(&taken, 1);
}

static void allocate(struct worker *me) {
    uint64_t n = UINT64_C(1) << random_below(&me->seed, 11);
    n += random_below(&me->seed, n);
    unsigned shift = random_below(&me->seed, 4) == 0 ? (unsigned)random_below(&me->seed, 8) : 0;
    int64_t page = pagealloc_alloc(pages, n, UINT64_C(1) << shift, 0);
    if (page >= 0)
        hold(me, (uint64_t)page, n);
    else
        atomic_fetch_add(page == PAGEALLOC_FULL ? &full : &wrong, 1);
}

static void allocate_at(struct worker *me) {
    uint64_t page = random_below(&me->seed, PAGES - 50), n = 1 + random_below(&me->seed, 50);
    int64_t got = pagealloc_alloc_at(pages, page, n);
    if (got == 0)
        hold(me, page, n);
    else
        atomic_fetch_add(got == PAGEALLOC_IN_USE ? &refusals : &wrong, 1);
}

static void allocate_many(struct worker *me) {
    int32_t first[8];
    size_t failed;
    const struct pagealloc_integers lengths = {.constant = 1 + random_below(&me->seed, 70)};
    const struct pagealloc_integers to = {.items = first, .width = -4};
    if (me->count + 8 > HELD)
        return;
    int64_t got = pagealloc_alloc_many(pages, &lengths, &to, 8, &failed);
    if (got != 0)
        atomic_fetch_add(got == PAGEALLOC_FULL ? &full : &wrong, 1);
    for (size_t i = 0; i < 8 && got == 0; i++)
        hold(me, (uint64_t)first[i], lengths.constant);
}

/* Frees a run that the thread holds, or the end of one. */
static void release(struct worker *me) {
    size_t at = random_below(&me->seed, me->count);
    struct pagealloc_run *held = &me->held[at], run = *held;
    if (random_below(&me->seed, 3) == 0)
        run.start += random_below(&me->seed, run.stop - run.start);
    mark(run, me->name, 0);
    if (pagealloc_free(pages, run.start, run.stop - run.start) != 0)
        atomic_fetch_add(&wrong, 1);
    held->stop = run.start;
    if (held->start == held->stop)
        *held = me->held[--me->count];
}

static void release_many(struct worker *me) {
    uint64_t first[HELD], lengths[HELD];
    size_t failed;
    for (size_t i = 0; i < me->count; i++) {
        mark(me->held[i], me->name, 0);
        first[i] = me->held[i].start;
        lengths[i] = me->held[i].stop - me->held[i].start;
    }
    const struct pagealloc_integers of = {.items = lengths, .width = 8};
    const struct pagealloc_integers at = {.items = first, .width = 8};
    if (pagealloc_free_many(pages, &of, &at, me->count, &failed) != 0)
        atomic_fetch_add(&wrong, 1);
    me->count = 0;
}

/* Runs listed by one call must have existed at the same moment. */
static void look(void) {
    struct pagealloc_run runs[200];
    for (int free = 0; free < 2; free++) {
        size_t n = pagealloc_runs(pages, free != 0, 0, PAGES, runs, 200);
        for (size_t i = 0; i < n; i++)
            if (runs[i].start >= runs[i].stop || (i > 0 && runs[i].start <= runs[i - 1].stop))
                atomic_fetch_add(&wrong, 1);
    }
    if (pagealloc_longest(pages) > PAGES || pagealloc_free_pages(pages) > PAGES ||
        pagealloc_part_pages(pages) != PAGES)
        atomic_fetch_add(&wrong, 1);
}

static void *work(void *argument) {
    struct worker *me = argument;
    for (int round = 0; round < ROUNDS; round++) {
        uint64_t choice = random_below(&me->seed, 100);
        if (choice < 2)
            look();
        else if (choice < 3)
            release_many(me);
        else if (me->count > 0 && (me->count == HELD || choice < 50))
            release(me);
        else if (choice < 55)
            allocate_at(me);
        else if (choice < 58)
            allocate_many(me);
        else
            allocate(me);
    }
    release_many(me);
    return NULL;
}

static void threads_never_hold_the_same_page(void) {
    static struct worker workers[THREADS];
    void *memory;
    uint64_t bytes = pagealloc_bytes(PAGES);
    REQUIRE(posix_memalign(&memory, 64, bytes) == 0);
    memset(memory, 0, bytes);
    pages = pagealloc_open(memory, PAGES);
    REQUIRE(pagealloc_add(pages, 0, PAGES) == 0);
    for (size_t i = 0; i < THREADS; i++) {
        workers[i].name = (unsigned char)(1 + i);
        workers[i].seed = 0x2545F4914F6CDD1D + i;
        REQUIRE(pthread_create(&workers[i].thread, NULL, work, &workers[i]) == 0);
    }
    for (size_t i = 0; i < THREADS; i++)
        REQUIRE(pthread_join(workers[i].thread, NULL) == 0);
    CHECK(overlaps == 0 && wrong == 0);
    CHECK(taken > THREADS * ROUNDS / 10 && refusals > 0 && full > 0);
    struct pagealloc_run run;
    CHECK(pagealloc_free_pages(pages) == PAGES && pagealloc_part_pages(pages) == PAGES);
    CHECK(pagealloc_longest(pages) == PAGES);
    CHECK(pagealloc_runs(pages, true, 0, PAGES, &run, 1) == 1);
    CHECK(run.start == 0 && run.stop == PAGES);
    CHECK(pagealloc_runs(pages, false, 0, PAGES, &run, 1) == 0);
    pagealloc_close(pages);
    free(memory);
}

int main(void) {
    RUN(threads_never_hold_the_same_page);
    return check_report("test_pagealloc_threads");
}
