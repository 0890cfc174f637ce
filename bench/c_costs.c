/* Times the verbs of virtual memory with plain C library calls, as a reference for pyreserve's own
 * measurements. Shares no code with csrc.
 *
 * Each input line "LENGTH ROUNDS" is a turn. The answer is a line with five times for each piece of
 * each round, in nanoseconds: reserve or commit, touch, discard, decommit, release. Above 1 GiB the
 * mapping is only reserved and released. Times that were not measured have no meaning. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

enum { PAGE = 4096, MAX_TIMES = 2000, FIELDS = 5, PIECES = 8, FRESH = 128 * PAGE, TABLE = 512 * PAGE };

static double clock_ns; /* the cost of reading the clock */
static double times[MAX_TIMES][FIELDS]; /* printed after the turn: printing evicts caches */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static void check(int ok, const char *call) {
    if (!ok) {
        perror(call);
        exit(EXIT_FAILURE);
    }
}

static void touch(volatile char *at, size_t length) {
    for (volatile char *end = at + length; at != end; at += PAGE)
        *at = 1;
}

static char *reserve(size_t length) {
    char *at = mmap(NULL, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(at != MAP_FAILED, "mmap");
    return at;
}

/* A reservation whose second page is the first of a page table. */
static char *reserve_aligned(size_t length) {
    char *start = reserve(length + TABLE);
    char *at = (char *)(((uintptr_t)start + PAGE + TABLE - 1) / TABLE * TABLE - PAGE);
    check(at == start || munmap(start, (size_t)(at - start)) == 0, "munmap");
    check(munmap(at + length, (size_t)(start + TABLE - at)) == 0, "munmap");
    return at;
}

static void reserve_release(size_t length, double *ns) {
    double t0 = now();
    char *at = reserve(length);
    double t1 = now();
    int released = munmap(at, length);
    double t2 = now();
    check(released == 0, "munmap");
    ns[0] = t1 - t0 - clock_ns;
    ns[4] = t2 - t1 - clock_ns;
}

static void set_access(char *at, size_t length, int access) {
    check(mprotect(at, length, access) == 0, "mprotect");
}

static void timed(double start, double *ns) {
    *ns = now() - start - clock_ns;
}

/* Pieces of a reservation go through the same states in the same order as in pyreserve's programs,
 * each step for all pieces in turn, since the state of the kernel's page allocator depends on it.
 * `ns` is the row of times of the first piece. */
static void life(size_t length, double (*ns)[FIELDS], size_t pieces) {
    size_t stride = length + PAGE, whole = pieces * stride + PAGE;
    char *base = reserve_aligned(whole), *first = base + PAGE;
    double t0;
#define EACH(...) \
    for (size_t i = 0; i < pieces; i++) { \
        char *at = first + i * stride; \
        __VA_ARGS__ \
    }
    EACH(t0 = now(); set_access(at, length, PROT_READ | PROT_WRITE); timed(t0, &ns[i][0]);)
    EACH(t0 = now(); touch(at, length); timed(t0, &ns[i][1]);)
    for (size_t again = 0; again == 0 || again < (size_t)1024 * PAGE / length; again++)
        EACH(touch(at, length);)
    EACH(t0 = now(); int discarded = madvise(at, length, MADV_DONTNEED); timed(t0, &ns[i][2]);
         check(discarded == 0, "MADV_DONTNEED");)
    EACH(touch(at, length);)
    EACH(set_access(at, length, PROT_NONE);)
    EACH(set_access(at, length, PROT_READ | PROT_WRITE);)
    EACH(touch(at, length);)
    EACH(check(madvise(at, length, MADV_DONTNEED) == 0, "MADV_DONTNEED");
         set_access(at, length, PROT_NONE);)
    EACH(set_access(at, length, PROT_READ | PROT_WRITE);)
    EACH(touch(at, length);)
    EACH(t0 = now();
         char *fresh = mmap(at, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
         timed(t0, &ns[i][3]); check(fresh == at, "MAP_FIXED");)
    EACH(set_access(at, length, PROT_READ | PROT_WRITE);)
    EACH(touch(at, length);)
    EACH(check(munmap(at, length) == 0, "munmap");)
    EACH(check(mmap(at, length, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == at, "mmap");)
    EACH(touch(at, length);)
    EACH(check(madvise(at, length, MADV_FREE) == 0, "MADV_FREE");)
    EACH(touch(at, length);)
#undef EACH
    check(munmap(base, whole) == 0, "munmap");
}

static double clock_cost(void) {
    double least = 1e9;
    for (int i = 0; i < 1000; i++) {
        double start = now(), apart = now() - start;
        if (apart < least)
            least = apart;
    }
    return least;
}

int main(void) {
    size_t length;
    long rounds;
    clock_ns = clock_cost();
    while (scanf("%zu %ld", &length, &rounds) == 2) {
        size_t pieces = length >= FRESH ? 1 : FRESH / length < PIECES ? FRESH / length : PIECES;
        check((size_t)rounds * pieces <= MAX_TIMES, "rounds");
        for (long i = 0; i < rounds; i++)
            if (length > (size_t)1 << 30)
                reserve_release(length, times[i]);
            else
                life(length, &times[(size_t)i * pieces], pieces);
        for (size_t i = 0; i < (size_t)rounds * pieces; i++)
            for (int field = 0; field < FIELDS; field++)
                printf("%.0f ", times[i][field]);
        putchar('\n');
        fflush(stdout);
    }
    return 0;
}
