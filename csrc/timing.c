#define _GNU_SOURCE
#include "timing.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

#include "sys.h"
#include "vm.h"
#include "words.h"

enum { CLOCK_READINGS = 255, SPINS = 1000, LINE = 64 };

/* Another thread in between takes longer than this, in ns. */
enum { UNDISTURBED = 3000 };

/* What the threads of one timing_run share. */
struct job {
    const struct timing_program *program;
    size_t threads, rounds, page;
    double *samples, clock;
    unsigned char *preempted;
    _Atomic size_t arrived, generation;
    _Atomic int err; /* the first refusal, which happened in step `failed` of round `done` */
    size_t failed, done;
};

/* The state of one thread. */
struct thread_state {
    size_t thread;
    uintptr_t base;
    int child;             /* 0: none */
    uintptr_t hole;       /* the piece that TIMING_UNMAP unmapped */
    size_t hole_length;    /* 0: none */
    uint64_t preemptions; /* when the last sample was taken */
};

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double timing_clock(void) {
    double apart[CLOCK_READINGS];
    for (size_t i = 0; i < CLOCK_READINGS; i++) {
        uint64_t before = sys_nanoseconds(), after = sys_nanoseconds();
        apart[i] = (double)(after - before);
    }
    qsort(apart, CLOCK_READINGS, sizeof apart[0], compare);
    return apart[CLOCK_READINGS / 2];
}

static void store(uintptr_t at, size_t length, size_t page) {
    for (uintptr_t end = at + length; at != end; at += page)
        *(volatile unsigned char *)at = 1;
}

/* Use the next cache line in each page: the same line of all pages maps to one set of the cache,
 * whose ways a dozen pages would exceed. */
static void store_again(uintptr_t at, size_t length, size_t page) {
    uintptr_t line = 0;
    for (uintptr_t end = at + length; at != end; at += page, line = (line + LINE) & (page - 1))
        *(volatile unsigned char *)(at + line) = 1;
}

static void load(uintptr_t at, size_t length, size_t page) {
    for (uintptr_t end = at + length; at != end; at += page)
        (void)*(volatile unsigned char *)at;
}

/* Maps `align` more than needed and unmaps what lies around the aligned piece. */
static int reserve_aligned(const struct timing_program *program, uintptr_t *base) {
    size_t total = program->length + program->align;
    uintptr_t start;
    int err = vm_map(0, total, VM_RESERVED | program->access, &start);
    if (err != 0)
        return err;
    size_t before = (size_t)((program->phase - start) & (program->align - 1));
    uintptr_t at = start + before, end = start + total;
    err = before != 0 ? vm_release(start, before) : 0;
    if (err == 0)
        start = at; /* the addresses below may belong to another thread by now */
    if (err == 0)
        err = vm_release(at + program->length, end - at - program->length);
    if (err != 0)
        (void)vm_release(start, end - start);
    else
        *base = at;
    return err;
}

static int reserve(const struct timing_program *program, uintptr_t *base) {
    if (program->align != 0)
        return reserve_aligned(program, base);
    return vm_map(0, program->length, VM_RESERVED | program->access, base);
}

static int release(const struct timing_program *program, struct thread_state *state) {
    uintptr_t base = state->base, end = base + program->length;
    uintptr_t begin = base;
    int err = 0;
    if (state->hole_length != 0) { /* only after a refusal */
        if (state->hole != base)
            err = vm_release(base, state->hole - base);
        begin = state->hole + state->hole_length;
    }
    if (err == 0 && begin != end)
        err = vm_release(begin, end - begin);
    if (err == 0)
        state->base = 0;
    return err;
}

/* The mapping has a hole until map_piece: after a refusal in between, clean_up must not unmap what
 * another thread has mapped there. */
static int unmap_piece(uintptr_t at, size_t length, struct thread_state *state) {
    int err = vm_release(at, length);
    if (err == 0) {
        state->hole = at;
        state->hole_length = length;
    }
    return err;
}

static int map_piece(const struct timing_program *program, uintptr_t at, size_t length,
                     struct thread_state *state) {
    int err = vm_map_at(at, length, VM_COMMITTED | program->access);
    if (err == 0)
        state->hole_length = 0;
    return err;
}

static int reap(struct thread_state *state) {
    int child = state->child;
    state->child = 0;
    return sys_reap(child);
}

static int discard_off(uintptr_t at, size_t length) {
    int err = vm_discard(at, length);
    return err != 0 ? err : vm_protect(at, length, VM_RESERVED);
}

static int perform(const struct job *job, const struct timing_step *step,
                   struct thread_state *state) {
    const struct timing_program *program = job->program;
    uintptr_t at = state->base + step->offset;
    size_t length = step->length;
    switch (step->verb) {
    case TIMING_RESERVE:
        return reserve(program, &state->base);
    case TIMING_RELEASE:
        return release(program, state);
    case TIMING_COMMIT:
        return vm_protect(at, length, VM_COMMITTED);
    case TIMING_COMMIT_MAP:
        return vm_renew(at, length, VM_COMMITTED | program->access);
    case TIMING_UNCOMMIT:
        return vm_protect(at, length, VM_RESERVED);
    case TIMING_DECOMMIT:
        return vm_renew(at, length, VM_RESERVED | program->access);
    case TIMING_DISCARD_OFF:
        return discard_off(at, length);
    case TIMING_UNMAP:
        return unmap_piece(at, length, state);
    case TIMING_MAP:
        return map_piece(program, at, length, state);
    case TIMING_ADVISE:
        return vm_advise(at, length, program->advice);
    case TIMING_WRITE:
        store(at, length, job->page);
        return 0;
    case TIMING_REWRITE:
        store_again(at, length, job->page);
        return 0;
    case TIMING_READ:
        load(at, length, job->page);
        return 0;
    case TIMING_POPULATE:
        return vm_populate(at, length);
    case TIMING_DISCARD:
        return vm_discard(at, length);
    case TIMING_DISCARD_LAZY:
        return vm_discard_lazy(at, length);
    case TIMING_COLLAPSE:
        return vm_collapse(at, length);
    case TIMING_HUGE_PREFER:
        return vm_advise(at, length, VM_HUGE_PREFER);
    case TIMING_GUARD:
        return vm_guard(at, length);
    case TIMING_UNGUARD:
        return vm_unguard(at, length);
    case TIMING_FORK:
        return sys_fork(&state->child);
    case TIMING_REAP:
        return reap(state);
    case TIMING_SYSTEM_CALL:
        (void)sys_parent();
        return 0;
    default:
        return EINVAL;
    }
}

static bool is_sound_mapping(const struct timing_program *program, size_t page) {
    size_t length = program->length, align = program->align;
    if (length == 0 || length % page != 0 || (program->access & ~VM_NORESERVE) != 0)
        return false;
    if (align == 0)
        return program->phase == 0;
    return is_power_of_two(align) && align % page == 0 && align <= SIZE_MAX - length &&
           program->phase % page == 0 && program->phase < align;
}

static bool is_sound_step(const struct timing_program *program, size_t i, size_t page) {
    const struct timing_step *step = &program->steps[i];
    int verb = step->verb;
    bool first = i == 0, last = i == program->nsteps - 1;
    if (verb < TIMING_RESERVE || verb > TIMING_SYSTEM_CALL || (verb == TIMING_RESERVE) != first ||
        (verb == TIMING_RELEASE) != last)
        return false;
    bool once = first || last || verb == TIMING_UNMAP || verb == TIMING_MAP ||
                verb == TIMING_FORK || verb == TIMING_REAP;
    return step->length != 0 && step->length % page == 0 && step->offset % page == 0 &&
           step->offset <= program->length && step->length <= program->length - step->offset &&
           step->repeat != 0 && (step->repeat == 1 || !once) && step->slot >= -1 &&
           (step->slot == -1 || (size_t)step->slot < program->nslots);
}

/* Whether a reap follows each fork. */
static bool reaps_each_fork(const struct timing_program *program, size_t threads) {
    bool forked = false;
    for (size_t i = 0; i < program->nsteps; i++) {
        int verb = program->steps[i].verb;
        if (verb != TIMING_FORK && verb != TIMING_REAP)
            continue;
        if (threads != 1 || forked != (verb == TIMING_REAP))
            return false;
        forked = !forked;
    }
    return !forked;
}

static bool is_sound(const struct timing_program *program, size_t threads, size_t page) {
    if (program->nsteps < 2 || !is_sound_mapping(program, page))
        return false;
    for (size_t i = 0; i < program->nsteps; i++)
        if (!is_sound_step(program, i, page))
            return false;
    return reaps_each_fork(program, threads);
}

/* A barrier for all threads of the job; false once a step of any thread was refused. */
static bool wait_for_all(struct job *job) {
    if (job->threads == 1)
        return true;
    size_t generation = atomic_load(&job->generation);
    if (atomic_fetch_add(&job->arrived, 1) + 1 == job->threads) {
        atomic_store(&job->arrived, 0);
        atomic_fetch_add(&job->generation, 1);
    }
    for (unsigned spins = 0; atomic_load(&job->generation) == generation; spins++) {
        if (atomic_load(&job->err) != 0)
            return false;
        if (spins >= SPINS)
            (void)sched_yield();
    }
    return true;
}

static void record_refusal(struct job *job, int err, size_t step, size_t round) {
    int none = 0;
    if (atomic_compare_exchange_strong(&job->err, &none, err)) {
        job->failed = step;
        job->done = round;
    }
}

static void clean_up(const struct job *job, struct thread_state *state) {
    if (state->child != 0)
        (void)reap(state);
    if (state->base != 0)
        (void)release(job->program, state);
}

static void record_sample(const struct job *job, size_t slot, size_t round,
                          struct thread_state *state, uint64_t elapsed, uint32_t repeat) {
    size_t i = (slot * job->rounds + round) * job->threads + state->thread;
    job->samples[i] = ((double)elapsed - job->clock) / repeat;
    job->preempted[i] = 0;
    if (elapsed < UNDISTURBED) /* to ask would disturb the next step */
        return;
    uint64_t preemptions = sys_preemptions();
    job->preempted[i] = preemptions != state->preemptions;
    state->preemptions = preemptions;
}

/* Runs a step together with the other threads; false if the job has ended. */
static bool run_step(struct job *job, size_t i, size_t round, struct thread_state *state) {
    const struct timing_step *step = &job->program->steps[i];
    int err = 0;
    if (!wait_for_all(job))
        return false;
    uint64_t begun = sys_nanoseconds();
    for (uint32_t n = 0; n < step->repeat && err == 0; n++)
        err = perform(job, step, state);
    uint64_t ended = sys_nanoseconds();
    if (err != 0)
        record_refusal(job, err, i, round);
    else if (step->slot >= 0)
        record_sample(job, (size_t)step->slot, round, state, ended - begun, step->repeat);
    return err == 0;
}

static void run_thread(struct job *job, size_t thread) {
    struct thread_state state = {.thread = thread, .preemptions = sys_preemptions()};
    bool goes_on = true;
    for (size_t round = 0; round < job->rounds && goes_on; round++)
        for (size_t i = 0; i < job->program->nsteps && goes_on; i++)
            goes_on = run_step(job, i, round, &state);
    clean_up(job, &state);
}

struct worker {
    struct job *job;
    size_t thread;
    pthread_t id;
};

static void *work(void *argument) {
    struct worker *worker = argument;
    run_thread(worker->job, worker->thread);
    return NULL;
}

static void run_threads(struct job *job) {
    struct worker *workers = calloc(job->threads, sizeof *workers);
    size_t made = 0;
    int err = workers == NULL ? ENOMEM : 0;
    for (; err == 0 && made + 1 < job->threads; made++) {
        workers[made] = (struct worker){.job = job, .thread = made + 1};
        err = pthread_create(&workers[made].id, NULL, work, &workers[made]);
        if (err != 0)
            break;
    }
    if (err != 0)
        record_refusal(job, err, job->program->nsteps, 0);
    else
        run_thread(job, 0);
    for (size_t i = 0; i < made; i++)
        (void)pthread_join(workers[i].id, NULL);
    free(workers);
}

int timing_run(const struct timing_program *program, size_t threads, size_t rounds, double *samples,
               unsigned char *preempted, size_t *done, size_t *failed) {
    struct job job = {.program = program, .threads = threads, .rounds = rounds,
                      .page = vm_page_size(), .samples = samples, .preempted = preempted};
    *done = *failed = 0;
    if (threads == 0 || rounds == 0 || !is_sound(program, threads, job.page))
        return EINVAL;
    job.clock = timing_clock();
    job.done = rounds;
    if (threads == 1)
        run_thread(&job, 0);
    else
        run_threads(&job);
    *done = job.done;
    *failed = job.failed;
    return atomic_load(&job.err);
}
