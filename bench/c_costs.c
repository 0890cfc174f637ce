/* Times the verbs of virtual memory with plain C library calls, as a reference for pyreserve's own
 * measurements. Shares no code with csrc.
 *
 * Each input line "LENGTH ROUNDS" is a turn. The answer is a line with five times for each round,
 * in nanoseconds: reserve or commit, touch, discard, decommit, release. Above 1 GiB the mapping is
 * only reserved and released. Times that were not measured have no meaning. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

enum { PAGE = 4096, MAX_ROUNDS = 2000, FIELDS = 5 };

static double times[MAX_ROUNDS][FIELDS]; /* printed after the turn: printing evicts caches */

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

static void reserve_release(size_t length, double *ns) {
    double t0 = now();
    char *at = reserve(length);
    double t1 = now();
    int released = munmap(at, length);
    double t2 = now();
    check(released == 0, "munmap");
    ns[0] = t1 - t0;
    ns[4] = t2 - t1;
}

static void set_access(char *at, size_t length, int access) {
    check(mprotect(at, length, access) == 0, "mprotect");
}

/* The second half of a life, untimed: it leaves the kernel's page allocator in the same state as
 * pyreserve's programs do. */
static void finish_life(char *at, size_t length) {
    check(madvise(at, length, MADV_NOHUGEPAGE) == 0, "MADV_NOHUGEPAGE");
    set_access(at, length, PROT_READ | PROT_WRITE);
    touch(at, length);
    set_access(at, length, PROT_NONE);
    set_access(at, length, PROT_READ | PROT_WRITE);
    check(madvise(at, length, MADV_DONTNEED) == 0, "MADV_DONTNEED");
    set_access(at, length, PROT_NONE);
    set_access(at, length, PROT_READ | PROT_WRITE);
}

/* The piece is the beginning of a reservation one page longer and goes through the same states in
 * the same order as in pyreserve's programs. */
static void life(size_t length, double *ns) {
    char *at = reserve(length + PAGE);
    check(madvise(at, length + PAGE, MADV_NOHUGEPAGE) == 0, "MADV_NOHUGEPAGE");
    double t0 = now();
    set_access(at, length, PROT_READ | PROT_WRITE);
    double t1 = now();
    touch(at, length);
    double t2 = now();
    touch(at, length);
    double t3 = now();
    int discarded = madvise(at, length, MADV_DONTNEED);
    double t4 = now();
    check(discarded == 0, "MADV_DONTNEED");
    touch(at, length);
    check(madvise(at, length, MADV_FREE) == 0, "MADV_FREE");
    touch(at, length);
    double t5 = now();
    char *fresh = mmap(at, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    double t6 = now();
    check(fresh == at, "MAP_FIXED");
    finish_life(at, length);
    check(munmap(at, length + PAGE) == 0, "munmap");
    ns[0] = t1 - t0;
    ns[1] = t2 - t1;
    ns[2] = t4 - t3;
    ns[3] = t6 - t5;
}

int main(void) {
    size_t length;
    long rounds;
    while (scanf("%zu %ld", &length, &rounds) == 2 && rounds <= MAX_ROUNDS) {
        for (long i = 0; i < rounds; i++)
            if (length > (size_t)1 << 30)
                reserve_release(length, times[i]);
            else
                life(length, times[i]);
        for (long i = 0; i < rounds; i++)
            for (int field = 0; field < FIELDS; field++)
                printf("%.0f ", times[i][field]);
        putchar('\n');
        fflush(stdout);
    }
    return 0;
}
