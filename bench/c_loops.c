/* The system calls of pyreserve's verbs in C loops, as a reference. Shares no code with csrc.
 * Each function returns nanoseconds per iteration, or -1 if a call failed. */
#define _GNU_SOURCE
#include <stddef.h>
#include <sys/mman.h>
#include <time.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static void *reserve(size_t size) {
    return mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

/* mmap, madvise(MADV_DONTDUMP) unless `dump`, munmap. */
double reserve_release(size_t size, int dump, long iterations) {
    double start = now();
    for (long i = 0; i < iterations; i++) {
        void *at = reserve(size);
        if (at == MAP_FAILED || (!dump && madvise(at, size, MADV_DONTDUMP) != 0) ||
            munmap(at, size) != 0)
            return -1;
    }
    return (now() - start) / (double)iterations;
}

/* mprotect over one untouched piece after another. */
double commit(size_t piece, long iterations) {
    char *at = reserve(piece * (size_t)iterations);
    if (at == MAP_FAILED)
        return -1;
    (void)madvise(at, piece * (size_t)iterations, MADV_DONTDUMP);
    double start = now();
    for (long i = 0; i < iterations; i++)
        if (mprotect(at + piece * (size_t)i, piece, PROT_READ | PROT_WRITE) != 0)
            return -1;
    double spent = now() - start;
    (void)munmap(at, piece * (size_t)iterations);
    return spent / (double)iterations;
}
