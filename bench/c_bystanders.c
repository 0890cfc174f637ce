/* Measures what a thread's calls cost the other threads of its process, as a reference for
 * pyreserve's own figures. Shares no code with csrc, and works in another way: it counts the work of
 * a bystander over fixed windows of wall time, without a second process. Its figures without
 * bystanders come from windows in which the process has one thread, and what a bystander loses from
 * the time between its readings of the clock that is missing compared with windows without calls.
 *
 * Arguments: CALLER_CPU BYSTANDER_CPU SECONDS. Prints "NAME BYTES ALONE ADDED LOST WINDOWS" for each
 * call and length, in ns; medians over pairs of windows. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, AREA = 1024 * PAGE, NCALLS = 6, NLENGTHS = 3, MOST_PAIRS = 4000, WINDOW = 300000 };
enum { MEMBARRIER, MUNMAP, MPROTECT, DONTNEED, FREE, FIXED };
static const char *const names[NCALLS] = {"membarrier",    "munmap",    "mprotect",
                                          "MADV_DONTNEED", "MADV_FREE", "MAP_FIXED"};
static const size_t lengths[NLENGTHS] = {PAGE, 16 * PAGE, 512 * PAGE};

/* What the bystander counts: readings of the clock, and readings that came over 250 ns late. */
static _Atomic uint64_t readings, late_ns, switches, running, over;

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static uint64_t switches_of_thread(void) {
    struct rusage usage;
    getrusage(RUSAGE_THREAD, &usage);
    return (uint64_t)usage.ru_nivcsw;
}

static void bind_to(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set) != 0)
        exit(1);
}

static void *stand_by(void *cpu) {
    bind_to(*(int *)cpu);
    uint64_t n = 0, late = 0, before = switches_of_thread(), last = now();
    running = 1;
    while (!over) {
        uint64_t time = now();
        if (time - last > 250)
            late += time - last;
        last = time;
        n++;
    }
    readings = n;
    late_ns = late;
    switches = switches_of_thread() - before;
    return NULL;
}

static char *memory;

static void fill(size_t length) {
    for (size_t at = 0; at < length; at += PAGE)
        memory[at] = 1;
}

static void check(int failed) {
    if (failed) {
        perror("call");
        exit(1);
    }
}

static void map(size_t length) {
    check(mmap(memory, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
               0) != memory);
}

static void reserve(void) {
    check(mmap(memory - PAGE, AREA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
          MAP_FAILED);
}

/* Makes one call; returns its ns. */
static uint64_t make(int call, size_t length) {
    uint64_t start, end;
    if (call == MEMBARRIER) {
        start = now();
        check(syscall(SYS_membarrier, 1 << 3, 0, 0) != 0);
        return now() - start;
    }
    fill(length);
    start = now();
    switch (call) {
    case MUNMAP:
        check(munmap(memory, length));
        break;
    case MPROTECT:
        check(mprotect(memory, length, PROT_NONE));
        break;
    case DONTNEED:
        check(madvise(memory, length, MADV_DONTNEED));
        break;
    case FREE:
        check(madvise(memory, length, MADV_FREE));
        break;
    default:
        map(length);
    }
    end = now();
    if (call == MUNMAP)
        map(length);
    if (call == MPROTECT)
        check(mprotect(memory, length, PROT_READ | PROT_WRITE));
    return end - start;
}

struct window {
    double per_call; /* ns */
    double calls;
    double lost; /* ns of the bystander in late readings */
    double wall;
    int good;
};

static struct window run(int call, size_t length, int calls, int *cpu) {
    struct window window = {0};
    pthread_t thread;
    running = over = 0;
    if (cpu != NULL) {
        check(pthread_create(&thread, NULL, stand_by, cpu));
        while (!running)
            sched_yield();
    }
    uint64_t before = switches_of_thread(), start = now(), end = start, spent = 0, n = 0;
    do {
        if (calls) {
            spent += make(call, length);
            n++;
        }
        end = now();
    } while (end - start < WINDOW);
    over = 1;
    window.good = switches_of_thread() == before;
    if (cpu != NULL) {
        check(pthread_join(thread, NULL));
        window.good = window.good && switches == 0;
        window.lost = (double)late_ns;
    }
    window.wall = (double)(end - start);
    window.calls = (double)n;
    window.per_call = n ? (double)spent / (double)n : 0;
    return window;
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, size_t n) {
    qsort(values, n, sizeof *values, compare);
    return n == 0 ? 0 : n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

static double clock_ns(void) {
    double apart[101];
    for (int i = 0; i < 101; i++) {
        uint64_t first = now();
        apart[i] = (double)(now() - first);
    }
    return median(apart, 101);
}

static struct {
    double alone[MOST_PAIRS], added[MOST_PAIRS], lost[MOST_PAIRS];
    size_t nadded, nlost;
} found[NCALLS][NLENGTHS];

int main(int count, char **arguments) {
    if (count != 4)
        return 2;
    int mine = atoi(arguments[1]), theirs = atoi(arguments[2]);
    double seconds = atof(arguments[3]), clock = clock_ns();
    prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
    check(syscall(SYS_membarrier, 1 << 4, 0, 0) != 0);
    memory = mmap(NULL, AREA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(memory == MAP_FAILED);
    memory += PAGE;
    bind_to(mine);
    srandom((unsigned)getpid());
    for (uint64_t start = now(); (double)(now() - start) < seconds * 1e9;) {
        int call = (int)(random() % NCALLS), l = call == MEMBARRIER ? 0 : (int)(random() % NLENGTHS);
        size_t length = lengths[l];
        map(length);
        (void)make(call, length); /* the first MADV_FREE of a page costs more */
        (void)make(call, length);
        /* In any order: alone, with a bystander, and a bystander without calls. */
        struct window windows[3];
        int first = (int)(random() % 3);
        for (int i = 0; i < 3; i++) {
            int kind = (first + i) % 3;
            windows[kind] = run(call, length, kind != 2, kind != 0 ? &theirs : NULL);
        }
        if (windows[0].good && windows[1].good && found[call][l].nadded < MOST_PAIRS) {
            size_t i = found[call][l].nadded++;
            found[call][l].alone[i] = windows[0].per_call - clock;
            found[call][l].added[i] = windows[1].per_call - windows[0].per_call;
        }
        if (windows[1].good && windows[2].good && found[call][l].nlost < MOST_PAIRS) {
            double idle = windows[2].lost / windows[2].wall;
            found[call][l].lost[found[call][l].nlost++] =
                (windows[1].lost - idle * windows[1].wall) / windows[1].calls;
        }
        reserve(); /* nothing of this turn stays beside the next one's piece */
    }
    for (int call = 0; call < NCALLS; call++)
        for (int l = 0; l < (call == MEMBARRIER ? 1 : NLENGTHS); l++) {
            size_t n = found[call][l].nadded, nlost = found[call][l].nlost;
            printf("%s %zu %.1f %.1f %.1f %zu\n", names[call], lengths[l],
                   median(found[call][l].alone, n), median(found[call][l].added, n),
                   median(found[call][l].lost, nlost), n < nlost ? n : nlost);
        }
    return 0;
}
