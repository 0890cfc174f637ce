/* Plays the situations of `pyreserve costs` in which memory is given back, with plain C library
 * calls. Shares no code with csrc.
 *
 *     c_giveback PAGES KIND AGAIN ROUNDS WAY...
 *
 * A piece of PAGES OS pages lies in the middle of a reservation (PROT_NONE): a page before it and a
 * page behind it, huge pages if KIND is "huge". It is committed and every page is written. In each of
 * ROUNDS rounds every WAY, in a random order, plays on a piece of its own: it gives the piece back,
 * and with the probability AGAIN (0, 0.5 or 1: every second time) uses it again, that is, writes
 * every page. If it was not used again, it is brought back untimed.
 *
 * Prints a line "WAY NANOSECONDS" for each way: the median cost of a round. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

enum { MAX_WAYS = 8, MAX_ROUNDS = 20000, READ_WRITE = PROT_READ | PROT_WRITE };
static const int ANONYMOUS = MAP_PRIVATE | MAP_ANONYMOUS;

static size_t page, length;
static int huge;
static double times[MAX_WAYS][MAX_ROUNDS];

static void check(int ok, const char *call) {
    if (!ok) {
        perror(call);
        exit(EXIT_FAILURE);
    }
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static void use(char *at) {
    for (volatile char *p = at; p != at + length; p += page)
        *p = 1;
}

static void want_huge(char *at) {
    if (huge)
        check(madvise(at, length, MADV_HUGEPAGE) == 0, "MADV_HUGEPAGE");
}

static void allow(char *at) {
    check(mprotect(at, length, READ_WRITE) == 0, "mprotect");
}

static void give_free(char *at) {
    check(madvise(at, length, MADV_FREE) == 0, "MADV_FREE");
}

static void give_dontneed(char *at) {
    check(madvise(at, length, MADV_DONTNEED) == 0, "MADV_DONTNEED");
}

static void give_mprotect(char *at) {
    check(mprotect(at, length, PROT_NONE) == 0, "mprotect");
}

static void give_both(char *at) {
    give_dontneed(at);
    give_mprotect(at);
}

static void give_unmap(char *at) {
    check(munmap(at, length) == 0, "munmap");
}

static void give_fixed(char *at) {
    check(mmap(at, length, PROT_NONE, ANONYMOUS | MAP_FIXED, -1, 0) == at, "MAP_FIXED");
}

static void back_nothing(char *at) {
    (void)at;
}

static void back_map(char *at) {
    check(mmap(at, length, READ_WRITE, ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == at, "mmap");
    want_huge(at);
}

static void back_fixed(char *at) {
    want_huge(at);
    allow(at);
}

static const struct way {
    const char *name;
    void (*give)(char *);
    void (*back)(char *);
} WAYS[] = {{"MADV_FREE", give_free, back_nothing},
            {"MADV_DONTNEED", give_dontneed, back_nothing},
            {"MADV_DONTNEED + mprotect", give_both, allow},
            {"munmap", give_unmap, back_map},
            {"MAP_FIXED", give_fixed, back_fixed},
            {"mprotect", give_mprotect, allow}};

static const struct way *find(const char *name) {
    for (size_t i = 0; i < sizeof WAYS / sizeof WAYS[0]; i++)
        if (strcmp(WAYS[i].name, name) == 0)
            return &WAYS[i];
    fprintf(stderr, "unknown way: %s\n", name);
    exit(EXIT_FAILURE);
}

/* A piece in the middle of a reservation, aligned for huge pages. */
static char *piece(void) {
    size_t unit = huge ? length : page, whole = length + 2 * unit, more = huge ? length : 0;
    char *start = mmap(NULL, whole + more, PROT_NONE, ANONYMOUS, -1, 0);
    check(start != MAP_FAILED, "mmap");
    char *at = start;
    if (huge) {
        at = (char *)(((uintptr_t)start + length - 1) / length * length);
        if (at != start)
            check(munmap(start, (size_t)(at - start)) == 0, "munmap");
        size_t rest = (size_t)(start + whole + more - (at + whole));
        if (rest != 0)
            check(munmap(at + whole, rest) == 0, "munmap");
        check(madvise(at, whole, MADV_HUGEPAGE) == 0, "MADV_HUGEPAGE");
    }
    at += unit;
    allow(at);
    use(at);
    return at;
}

static double play(const struct way *way, char *at, int again) {
    double start = now();
    way->give(at);
    if (again) {
        way->back(at);
        use(at);
    }
    double end = now();
    if (!again) {
        way->back(at);
        use(at);
    }
    return end - start;
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The mean of the medians of the rounds with and without use: the expected cost of one. */
static double expected(double *values, long rounds, double again) {
    double with[MAX_ROUNDS], without[MAX_ROUNDS];
    long n = 0, m = 0;
    for (long i = 0; i < rounds; i++)
        if (again == 1 || (again > 0 && i % 2 == 0))
            with[n++] = values[i];
        else
            without[m++] = values[i];
    qsort(with, (size_t)n, sizeof with[0], compare);
    qsort(without, (size_t)m, sizeof without[0], compare);
    return (n ? again * with[n / 2] : 0) + (m ? (1 - again) * without[m / 2] : 0);
}

int main(int argc, char **argv) {
    check(argc > 5 && argc <= 5 + MAX_WAYS, "usage: c_giveback PAGES KIND AGAIN ROUNDS WAY...");
    page = (size_t)sysconf(_SC_PAGESIZE);
    length = (size_t)atol(argv[1]) * page;
    huge = strcmp(argv[2], "huge") == 0;
    double again = atof(argv[3]);
    long rounds = atol(argv[4]);
    int nways = argc - 5;
    check(length != 0 && rounds > 0 && rounds <= MAX_ROUNDS, "arguments");
    if (!huge)
        check(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0, "PR_SET_THP_DISABLE");
    const struct way *ways[MAX_WAYS];
    char *pieces[MAX_WAYS];
    int order[MAX_WAYS];
    for (int i = 0; i < nways; i++) {
        ways[i] = find(argv[5 + i]);
        pieces[i] = piece();
        order[i] = i;
    }
    for (long round = -10; round < rounds; round++) { /* the first ten warm up */
        for (int i = nways - 1; i > 0; i--) {
            int j = rand() % (i + 1), kept = order[i];
            order[i] = order[j];
            order[j] = kept;
        }
        for (int i = 0; i < nways; i++) {
            int way = order[i], used = again == 1 || (again > 0 && round % 2 == 0);
            double ns = play(ways[way], pieces[way], used);
            if (round >= 0)
                times[way][round] = ns;
        }
    }
    for (int i = 0; i < nways; i++)
        printf("%s %.0f\n", ways[i]->name, expected(times[i], rounds, again));
    return 0;
}
