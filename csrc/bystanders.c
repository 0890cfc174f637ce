#define _GNU_SOURCE
#include "bystanders.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bystanders_stage.h"
#include "sys.h"
#include "timing.h"
#include "vm.h"
#include "words.h"

enum {
    SHORTEST = 100000,      /* ns; windows shorter than this measure their own edges */
    NAP = 50000,            /* ns between two looks at whether all have arrived */
    LEAD = 200000,          /* ns from the last arrival to the start: longer than a nap takes */
    LOADS = 64, FAULTS = 8, /* between two readings of the clock */
    LINE = 64,
    LEAST_GAP = 200         /* ns; shorter gaps between two readings of the clock are no interrupts */
};
static const uint64_t LONGEST = 10000000000, PATIENCE = 20000000000;

/* What the threads of both processes share: in a file that both map. */
struct meeting {
    _Atomic uint32_t arrived, turn, err, over;
    uint64_t begin; /* of the window; written by the last that arrives, before it advances turn */
    struct bystanders_sample callers[]; /* of the second process, by window */
};

struct run {
    const struct bystanders_setup *setup;
    const unsigned char *on;
    size_t windows, page, meeting_bytes, parties;
    struct bystanders_sample *samples;
    struct meeting *meeting;
    struct stage stage;
    uint64_t clock; /* ns of a reading */
    int parent;
};

static bool is_second_calling(const struct run *run) {
    return run->setup->second == BYSTANDERS_CALLS;
}

static bool is_second_reading(const struct run *run) {
    return run->setup->second >= BYSTANDERS_MAPS;
}

/* ---- meeting ---- */

/* Records the first error, and ends the window for all. */
static bool fail(struct run *run, int err) {
    uint32_t none = 0;
    (void)atomic_compare_exchange_strong(&run->meeting->err, &none, (uint32_t)err);
    atomic_store(&run->meeting->over, 1);
    return false;
}

/* Waits for all threads of both processes. Sleeps: the callers of both share a CPU. */
static bool meet(struct run *run) {
    struct meeting *meeting = run->meeting;
    uint64_t deadline = sys_nanoseconds() + PATIENCE;
    uint32_t turn = atomic_load(&meeting->turn);
    if (atomic_fetch_add(&meeting->arrived, 1) + 1 == run->parties) {
        atomic_store(&meeting->arrived, 0);
        atomic_store(&meeting->over, 0);
        meeting->begin = sys_nanoseconds() + LEAD;
        atomic_fetch_add(&meeting->turn, 1);
    }
    while (atomic_load(&meeting->turn) == turn) {
        if (atomic_load(&meeting->err) != 0)
            return false;
        if (sys_nanoseconds() > deadline)
            return fail(run, ETIMEDOUT);
        sys_sleep(NAP);
    }
    return atomic_load(&meeting->err) == 0;
}

static void sleep_until(uint64_t then) {
    uint64_t now = sys_nanoseconds();
    if (now < then)
        sys_sleep(then - now);
}

static bool is_over(const struct run *run, uint64_t now, uint64_t end) {
    return now >= end || atomic_load_explicit(&run->meeting->over, memory_order_relaxed) != 0;
}

/* ---- the caller ---- */

static int prepare(const struct run *run) {
    const struct bystanders_setup *setup = run->setup;
    if (setup->call == BYSTANDERS_BARRIER)
        return 0;
    bool is_new = setup->call == BYSTANDERS_RELEASE || setup->call == BYSTANDERS_RENEW;
    if (setup->huge != 0 && is_new) { /* a new mapping has no advice */
        int err = vm_advise(run->stage.piece, setup->length, VM_HUGE_PREFER);
        if (err != 0)
            return err;
    }
    store(run->stage.piece, setup->length, setup->huge != 0 ? setup->huge : run->page);
    return 0;
}

static int call(struct run *run) {
    uintptr_t at = run->stage.piece;
    size_t length = run->setup->length;
    int err;
    switch (run->setup->call) {
    case BYSTANDERS_BARRIER:
        return sys_barrier();
    case BYSTANDERS_RELEASE:
        err = vm_release(at, length);
        run->stage.has_hole = err == 0;
        return err;
    case BYSTANDERS_PROTECT:
        return vm_protect(at, length, VM_RESERVED);
    case BYSTANDERS_DISCARD:
        return vm_discard(at, length);
    case BYSTANDERS_DISCARD_LAZY:
        return vm_discard_lazy(at, length);
    default:
        return vm_renew(at, length, VM_COMMITTED);
    }
}

static int restore(struct run *run) {
    uintptr_t at = run->stage.piece;
    size_t length = run->setup->length;
    if (run->setup->call == BYSTANDERS_PROTECT)
        return vm_protect(at, length, VM_COMMITTED);
    if (run->setup->call != BYSTANDERS_RELEASE)
        return 0;
    int err = vm_map_at(at, length, VM_COMMITTED);
    run->stage.has_hole = err != 0;
    return err;
}

static bool call_until(struct run *run, uint64_t end, struct bystanders_sample *sample) {
    uint64_t after;
    do {
        int err = prepare(run);
        uint64_t before = sys_nanoseconds();
        if (err == 0)
            err = call(run);
        after = sys_nanoseconds();
        if (err == 0)
            err = restore(run);
        if (err != 0)
            return fail(run, err);
        uint64_t taken = after - before > run->clock ? after - before - run->clock : 0;
        sample->work++;
        sample->lost += taken;
        sample->longest = larger(sample->longest, taken);
    } while (!is_over(run, after, end));
    atomic_store(&run->meeting->over, 1); /* no bystander stops during the last call */
    return true;
}

/* ---- bystanders ---- */

struct bystander {
    struct run *run;
    size_t thread; /* 0: the caller */
    uintptr_t memory;
    uint64_t random;
    pthread_t id;
};

/* Each of these works until the window is over. */

static void spin_until(struct run *run, uint64_t end, struct bystanders_sample *sample) {
    uint64_t least = larger(4 * run->clock, LEAST_GAP), last = sys_nanoseconds(), now;
    do {
        now = sys_nanoseconds();
        uint64_t gap = now - last;
        last = now;
        sample->work++;
        if (gap >= least) {
            sample->lost += gap - run->clock;
            sample->longest = larger(sample->longest, gap);
        }
    } while (!is_over(run, now, end));
}

/* xorshift64 */
static uint64_t next_random(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void read_until(struct bystander *bystander, uint64_t end, struct bystanders_sample *sample) {
    struct run *run = bystander->run;
    size_t lines = run->setup->bytes / LINE;
    do {
        for (int i = 0; i < LOADS; i++) {
            size_t line = (size_t)(next_random(&bystander->random) % lines);
            (void)*(volatile unsigned char *)(bystander->memory + line * LINE);
        }
        sample->work += LOADS;
    } while (!is_over(run, sys_nanoseconds(), end));
}

static void fault_until(struct bystander *bystander, uint64_t end,
                          struct bystanders_sample *sample) {
    struct run *run = bystander->run;
    size_t used = 0, bytes = run->setup->bytes;
    do {
        for (int i = 0; i < FAULTS && used < bytes; i++, used += run->page, sample->work++)
            *(volatile unsigned char *)(bystander->memory + used) = 1;
        if (used == bytes)
            atomic_store(&run->meeting->over, 1);
    } while (!is_over(run, sys_nanoseconds(), end));
}

static void work_until(struct bystander *bystander, uint64_t end,
                       struct bystanders_sample *sample) {
    int work = bystander->run->setup->work;
    if (work == BYSTANDERS_SPIN)
        spin_until(bystander->run, end, sample);
    else if (work == BYSTANDERS_READ)
        read_until(bystander, end, sample);
    else
        fault_until(bystander, end, sample);
}

/* ---- windows ---- */

static void start(uint64_t begin, struct bystanders_sample *sample) {
    *sample = (struct bystanders_sample){.preemptions = sys_preemptions()};
    uint64_t now = sys_nanoseconds();
    if (now + 2 * NAP < begin)
        sys_sleep(begin - now - 2 * NAP);
    while ((now = sys_nanoseconds()) < begin)
        continue;
    sample->late = now - begin;
    sample->wall = now;
    sample->cpu = sys_cpu_nanoseconds();
}

static void stop(struct bystanders_sample *sample) {
    sample->wall = sys_nanoseconds() - sample->wall;
    sample->cpu = sys_cpu_nanoseconds() - sample->cpu;
    sample->preemptions = sys_preemptions() - sample->preemptions;
}

static bool is_calling(const struct run *run, size_t window, bool is_second) {
    if (run->setup->call == BYSTANDERS_NO_CALL)
        return false;
    if (is_second_reading(run))
        return !is_second;
    return (run->on[window] == 0) == is_second;
}

/* Whether either process makes calls in the window. */
static bool is_called(const struct run *run, size_t window) {
    return is_calling(run, window, is_second_calling(run) && run->on[window] == 0);
}

/* The caller's windows, in either process. */
static void call_in_windows(struct run *run, bool is_second) {
    for (size_t w = 0; w < run->windows && meet(run); w++) {
        uint64_t begin = run->meeting->begin, end = begin + run->setup->window;
        if (!is_calling(run, w, is_second)) {
            sleep_until(end);
            continue;
        }
        struct bystanders_sample sample;
        start(begin, &sample);
        if (!call_until(run, end, &sample))
            return;
        stop(&sample);
        *(is_second ? &run->meeting->callers[w] : &run->samples[w * (run->setup->n + 1)]) = sample;
    }
    (void)meet(run);
}

static bool check_huge(struct run *run) {
    size_t resident = 0, huge = run->setup->huge;
    if (huge == 0)
        return true;
    store(run->stage.piece, huge, huge);
    int err = vm_resident(run->stage.piece, huge, &resident);
    if (err == 0 && resident != huge)
        err = ENODATA;
    return err == 0 || fail(run, err);
}

/* The first MADV_FREE of a page moves it to another list of the kernel's, so calls come before. */
static bool is_ready_to_call(struct run *run) {
    struct bystanders_sample unused = {0};
    int err = run->setup->call == BYSTANDERS_BARRIER ? sys_barrier_register() : 0;
    if (err != 0)
        return fail(run, err);
    return check_huge(run) && call_until(run, 0, &unused) && call_until(run, 0, &unused);
}

/* The bystander's windows. The caller ends them; the time is a limit, in case it is killed. */
static void attend(struct bystander *bystander) {
    struct run *run = bystander->run;
    size_t stride = run->setup->n + 1;
    bool faults = run->setup->work >= BYSTANDERS_FAULT_SHARED;
    bystander->memory = run->stage.others + (bystander->thread - 1) * run->stage.stride;
    bystander->random = UINT64_C(0x9e3779b97f4a7c15) * bystander->thread;
    if (run->setup->work == BYSTANDERS_READ)
        store(bystander->memory, run->setup->bytes, run->page);
    for (size_t w = 0; w < run->windows && meet(run); w++) {
        uint64_t begin = run->meeting->begin, end = begin + run->setup->window;
        struct bystanders_sample sample;
        start(begin, &sample);
        work_until(bystander, is_called(run, w) ? end + PATIENCE : end, &sample);
        stop(&sample);
        run->samples[w * stride + bystander->thread] = sample;
        int err = faults ? vm_discard(bystander->memory, (size_t)sample.work * run->page) : 0;
        if (err != 0) {
            (void)fail(run, err);
            return;
        }
    }
    (void)meet(run);
}

static void *work(void *argument) {
    struct bystander *bystander = argument;
    struct run *run = bystander->run;
    int err = sys_pin(run->setup->cpus[bystander->thread]);
    if (err != 0)
        (void)fail(run, err);
    else if (bystander->thread != 0)
        attend(bystander);
    else if (run->setup->call == BYSTANDERS_NO_CALL || is_ready_to_call(run))
        call_in_windows(run, false);
    return NULL;
}

/* ---- the second process ---- */

static bool read_file(struct run *run, int fd) {
    char bytes[4096];
    size_t got = 1;
    for (uint64_t offset = 0; got != 0; offset += got) {
        int err = sys_read(fd, offset, bytes, sizeof bytes, &got);
        if (err != 0)
            return fail(run, err);
    }
    return true;
}

/* Formats "/proc/PID/FILE" without the C library's state, which a fork may have left locked. */
static void name_file(char *path, int pid, const char *file) {
    char digits[16], *at = digits + sizeof digits;
    for (*--at = '\0'; pid > 0; pid /= 10)
        *--at = (char)('0' + pid % 10);
    (void)strcpy(path, "/proc/");
    (void)strcat(path, at);
    (void)strcat(path, file);
}

static void read_in_windows(struct run *run) {
    const char *file = run->setup->second == BYSTANDERS_MAPS ? "/maps" : "/smaps_rollup";
    char path[2][48];
    int fds[2], err = 0;
    name_file(path[0], (int)getpid(), file);
    name_file(path[1], run->parent, file);
    for (int i = 0; i < 2 && err == 0; i++)
        err = sys_open(path[i], &fds[i]);
    if (err != 0) {
        (void)fail(run, err);
        return;
    }
    for (size_t w = 0; w < run->windows && meet(run); w++) {
        uint64_t end = run->meeting->begin + run->setup->window;
        sleep_until(run->meeting->begin);
        while (sys_nanoseconds() < end)
            if (!read_file(run, fds[run->on[w] != 0]))
                return;
    }
    (void)meet(run);
}

static void live_as_second(void *argument) {
    struct run *run = argument;
    int err = sys_pin(run->setup->second_cpu);
    if (err == 0 && is_second_calling(run))
        err = open_stage(&run->stage, run->setup, 0, run->page);
    if (err != 0)
        (void)fail(run, err);
    else if (is_second_reading(run))
        read_in_windows(run);
    else if (is_ready_to_call(run))
        call_in_windows(run, true);
}

/* ---- the run ---- */

static int open_meeting(struct run *run) {
    size_t bytes = sizeof(struct meeting) + run->windows * sizeof(struct bystanders_sample);
    run->meeting_bytes = (size_t)round_up(bytes, run->page);
    uintptr_t at;
    int fd, err = vm_map(0, run->meeting_bytes, VM_RESERVED, &at);
    if (err != 0)
        return err;
    err = vm_file_create("bystanders", false, &fd);
    if (err == 0) {
        err = vm_file_resize(fd, run->meeting_bytes);
        if (err == 0)
            err = vm_renew_file(at, run->meeting_bytes, VM_COMMITTED, fd);
        (void)vm_file_close(fd);
    }
    if (err != 0)
        (void)vm_release(at, run->meeting_bytes);
    else
        run->meeting = (struct meeting *)at;
    return err;
}

static void run_threads(struct run *run, struct bystander *threads) {
    sigset_t every, before; /* signals are for the threads of the caller */
    size_t made = 0;
    int err = 0;
    (void)sigfillset(&every);
    (void)pthread_sigmask(SIG_SETMASK, &every, &before);
    for (; made <= run->setup->n && err == 0; made += err == 0) {
        threads[made] = (struct bystander){.run = run, .thread = made};
        err = pthread_create(&threads[made].id, NULL, work, &threads[made]);
    }
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (err != 0)
        (void)fail(run, err);
    for (size_t i = 0; i < made; i++)
        (void)pthread_join(threads[i].id, NULL);
}

/* The second process is forked first, while this one is small. */
static int run_both(struct run *run, struct bystander *threads) {
    const struct bystanders_setup *setup = run->setup;
    bool is_alone = setup->second == BYSTANDERS_NOBODY || setup->call == BYSTANDERS_NO_CALL;
    uintptr_t resident = 0;
    int child = 0, err = 0;
    run->parties = setup->n + (is_alone ? 1 : 2);
    run->parent = (int)getpid();
    if (!is_alone)
        err = sys_fork_into(live_as_second, run, &child);
    if (err == 0)
        err = open_stage(&run->stage, setup, setup->n, run->page);
    if (err == 0 && setup->resident != 0)
        err = vm_map(0, setup->resident, VM_COMMITTED, &resident);
    if (err == 0 && resident != 0)
        err = vm_populate(resident, setup->resident);
    if (err == 0)
        run_threads(run, threads);
    if (err == 0)
        err = (int)atomic_load(&run->meeting->err);
    if (child != 0)
        (void)sys_reap(child);
    if (resident != 0)
        (void)vm_release(resident, setup->resident);
    close_stage(&run->stage);
    return err;
}

static bool is_sound(const struct bystanders_setup *setup, size_t windows, size_t page) {
    size_t most = SIZE_MAX / 4, n = setup->n, bytes = has_memory(setup->work) ? setup->bytes : page;
    size_t huge = setup->huge;
    if (setup->call < BYSTANDERS_NO_CALL || setup->call > BYSTANDERS_RENEW ||
        setup->work < BYSTANDERS_SPIN || setup->work > BYSTANDERS_FAULT_OWN ||
        setup->second < BYSTANDERS_NOBODY || setup->second > BYSTANDERS_ROLLUP)
        return false;
    if (windows == 0 || windows > BYSTANDERS_MOST_WINDOWS || n > BYSTANDERS_MOST ||
        setup->window < SHORTEST || setup->window > LONGEST)
        return false;
    if (huge != 0 && (!is_power_of_two(huge) || huge % page != 0 || setup->length != huge))
        return false;
    return setup->length != 0 && setup->length % page == 0 && setup->length < most / 2 &&
           bytes != 0 && bytes % page == 0 && bytes < most && setup->resident % page == 0 && huge < most / 4 &&
           (n == 0 || bytes + page < most / n);
}

int bystanders_run(const struct bystanders_setup *setup, const unsigned char *on, size_t windows,
                   struct bystanders_sample *samples) {
    struct run run = {.setup = setup, .on = on, .windows = windows, .page = vm_page_size()};
    if (!is_sound(setup, windows, run.page))
        return EINVAL;
    size_t stride = setup->n + 1;
    struct bystander *threads = calloc(stride, sizeof *threads);
    run.samples = calloc(windows * stride, sizeof *run.samples);
    run.clock = (uint64_t)timing_clock();
    int err = threads == NULL || run.samples == NULL ? ENOMEM : open_meeting(&run);
    if (err == 0) {
        err = run_both(&run, threads);
        for (size_t w = 0; w < windows && err == 0 && is_second_calling(&run); w++)
            if (on[w] == 0)
                run.samples[w * stride] = run.meeting->callers[w];
        (void)vm_release((uintptr_t)run.meeting, run.meeting_bytes);
    }
    if (err == 0)
        memcpy(samples, run.samples, windows * stride * sizeof *samples);
    free(run.samples);
    free(threads);
    return err;
}
