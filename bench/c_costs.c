/* What the verbs of virtual memory take, by the plain calls of the C library: what there is to hold
 * pyreserve's own measuring against. Shares no code with csrc.
 *
 * Each line on standard input, "LENGTH ROUNDS", is a turn. A line answers it: the five times of each
 * round in turn, in nanoseconds: reserve or commit, touch, discard, decommit, release. With a length
 * beyond 1 GiB the mapping is only reserved and released; what is not timed means nothing. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

enum { PAGE = 4096, MOST = 2000, FIELDS = 5 };

static double found[MOST][FIELDS]; /* printed afterwards: printing would cool the caches */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static void need(int holds, const char *what) {
    if (!holds) {
        perror(what);
        exit(EXIT_FAILURE);
    }
}

static void touch(volatile char *at, size_t length) {
    for (volatile char *end = at + length; at != end; at += PAGE)
        *at = 1;
}

static char *reserve(size_t length) {
    char *at = mmap(NULL, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    need(at != MAP_FAILED, "mmap");
    return at;
}

static void bare(size_t length, double *ns) {
    double t0 = now();
    char *at = reserve(length);
    double t1 = now();
    int released = munmap(at, length);
    double t2 = now();
    need(released == 0, "munmap");
    ns[0] = t1 - t0;
    ns[4] = t2 - t1;
}

static void set_access(char *at, size_t length, int access) {
    need(mprotect(at, length, access) == 0, "mprotect");
}

/* The second half of a life, whose end is what the next life finds in the page allocator. */
static void live_on(char *at, size_t length) {
    need(madvise(at, length, MADV_NOHUGEPAGE) == 0, "MADV_NOHUGEPAGE");
    set_access(at, length, PROT_READ | PROT_WRITE);
    touch(at, length);
    set_access(at, length, PROT_NONE);
    set_access(at, length, PROT_READ | PROT_WRITE);
    need(madvise(at, length, MADV_DONTNEED) == 0, "MADV_DONTNEED");
    set_access(at, length, PROT_NONE);
    set_access(at, length, PROT_READ | PROT_WRITE);
}

/* The piece is the beginning of a reservation that is a page longer, as in pyreserve's programs,
 * and goes through the same states in the same order. */
static void life(size_t length, double *ns) {
    char *at = reserve(length + PAGE);
    need(madvise(at, length + PAGE, MADV_NOHUGEPAGE) == 0, "MADV_NOHUGEPAGE");
    double t0 = now();
    set_access(at, length, PROT_READ | PROT_WRITE);
    double t1 = now();
    touch(at, length);
    double t2 = now();
    touch(at, length);
    double t3 = now();
    int discarded = madvise(at, length, MADV_DONTNEED);
    double t4 = now();
    need(discarded == 0, "MADV_DONTNEED");
    touch(at, length);
    need(madvise(at, length, MADV_FREE) == 0, "MADV_FREE");
    touch(at, length);
    double t5 = now();
    char *fresh = mmap(at, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    double t6 = now();
    need(fresh == at, "MAP_FIXED");
    live_on(at, length);
    need(munmap(at, length + PAGE) == 0, "munmap");
    ns[0] = t1 - t0;
    ns[1] = t2 - t1;
    ns[2] = t4 - t3;
    ns[3] = t6 - t5;
}

int main(void) {
    size_t length;
    long rounds;
    while (scanf("%zu %ld", &length, &rounds) == 2 && rounds <= MOST) {
        for (long i = 0; i < rounds; i++)
            if (length > (size_t)1 << 30)
                bare(length, found[i]);
            else
                life(length, found[i]);
        for (long i = 0; i < rounds; i++)
            for (int field = 0; field < FIELDS; field++)
                printf("%.0f ", found[i][field]);
        putchar('\n');
        fflush(stdout);
    }
    return 0;
}
