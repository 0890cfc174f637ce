#define _GNU_SOURCE
#include "../../csrc/timing.c" /* to run single steps and see what a thread has mapped */

#include <signal.h>
#include <string.h>
#include <sys/wait.h>

#include "check.h"
#include "witness.h"

enum { PIECE = 16, ROUNDS = 3, MOST = 16, MOST_SAMPLES = 256 };
#define UNWRITTEN (-1e18)
#define ALIGN ((size_t)4 << 20)

/* ThreadSanitizer does not work in a process created by the clone system call. */
#ifdef __SANITIZE_THREAD__
#define MAY_FORK false
#else
#define MAY_FORK true
#endif

static size_t page;
static double samples[MOST_SAMPLES];
static unsigned char preempted[MOST_SAMPLES];
static size_t done, failed;

/* A program that tests modify. Lengths and offsets in pages. */
struct trial {
    struct timing_step steps[MOST];
    struct timing_program program;
};

static struct timing_step *add(struct trial *trial, int verb, size_t offset, size_t length, int slot) {
    struct timing_step *step = &trial->steps[trial->program.nsteps++];
    *step = (struct timing_step){verb, slot, offset * page, length * page, 1};
    return step;
}

static void begin(struct trial *trial) {
    *trial = (struct trial){.program = {.length = 2 * PIECE * page}};
    trial->program.steps = trial->steps;
    (void)add(trial, TIMING_RESERVE, 0, 2 * PIECE, -1);
}

static void end(struct trial *trial) {
    (void)add(trial, TIMING_RELEASE, 0, 2 * PIECE, -1);
}

/* Reserve, commit, write, discard, release; the three in the middle are timed. */
static void make_life(struct trial *trial) {
    begin(trial);
    trial->program.nslots = 3;
    (void)add(trial, TIMING_COMMIT, 0, PIECE, 0);
    (void)add(trial, TIMING_WRITE, 0, PIECE, 1);
    (void)add(trial, TIMING_DISCARD, 0, PIECE, 2);
    end(trial);
}

static int run_threads_of(const struct trial *trial, size_t threads, size_t rounds) {
    for (size_t i = 0; i < MOST_SAMPLES; i++)
        samples[i] = UNWRITTEN;
    done = failed = 99;
    return timing_run(&trial->program, threads, rounds, samples, preempted, &done, &failed);
}

static size_t written(void) {
    size_t n = 0;
    for (size_t i = 0; i < MOST_SAMPLES; i++)
        n += samples[i] != UNWRITTEN;
    return n;
}

static bool childless(void) {
    return waitpid(-1, NULL, WNOHANG | __WALL) == -1 && errno == ECHILD;
}

static size_t mapped_before, tasks_before;
static char maps_before[1 << 16];

static void remember(void) {
    tasks_before = witness_tasks();
    mapped_before = witness_status("VmSize:");
    const char *maps = witness_read("/proc/self/maps");
    REQUIRE(strlen(maps) < sizeof maps_before);
    memcpy(maps_before, maps, strlen(maps) + 1);
}

static bool no_thread_stays(void) {
    return witness_no_task_stays(tasks_before);
}

static bool nothing_stays(void) {
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
    bool same = true; /* the sanitizers map memory at any time */
#else
    bool same = witness_status("VmSize:") == mapped_before &&
                strcmp(maps_before, witness_read("/proc/self/maps")) == 0;
#endif
    return same && childless() && no_thread_stays();
}

/* Thread stacks stay in the C library's cache: fill it before anything is compared. */
static void warm_up(void) {
    struct trial trial;
    make_life(&trial);
    REQUIRE(run_threads_of(&trial, 4, 1) == 0);
    remember();
    (void)no_thread_stays();
    (void)usleep(20000);
}

/* ---- malformed programs ---- */

static bool is_refused_unrun(const struct trial *trial, size_t threads, size_t rounds) {
    remember();
    int err = run_threads_of(trial, threads, rounds);
    return err == EINVAL && done == 0 && failed == 0 && written() == 0 && nothing_stays();
}

static void no_threads_and_no_rounds_are_refused(void) {
    struct trial trial;
    make_life(&trial);
    CHECK(is_refused_unrun(&trial, 0, 1));
    CHECK(is_refused_unrun(&trial, 1, 0));
}

static void a_program_reserves_first_and_releases_last(void) {
    struct trial trial;
    make_life(&trial);
    trial.program.nsteps--;
    CHECK(is_refused_unrun(&trial, 1, 1));
    trial.program.nsteps = 1;
    CHECK(is_refused_unrun(&trial, 1, 1));
    trial.program.nsteps = 0;
    CHECK(is_refused_unrun(&trial, 1, 1));
    make_life(&trial);
    trial.program.steps++;
    trial.program.nsteps--;
    CHECK(is_refused_unrun(&trial, 1, 1));
    make_life(&trial);
    trial.steps[2].verb = TIMING_RESERVE;
    CHECK(is_refused_unrun(&trial, 1, 1));
    make_life(&trial);
    trial.steps[2].verb = TIMING_RELEASE;
    CHECK(is_refused_unrun(&trial, 1, 1));
}

static void an_unknown_verb_is_refused_before_anything_is_done(void) {
    static const int verbs[] = {-1, TIMING_SYSTEM_CALL + 1, INT32_MAX, INT32_MIN};
    for (size_t i = 0; i < sizeof verbs / sizeof verbs[0]; i++) {
        struct trial trial;
        make_life(&trial);
        trial.steps[3].verb = verbs[i];
        CHECK(is_refused_unrun(&trial, 1, 1));
    }
}

static void pieces_are_whole_pages_of_the_mapping(void) {
    const struct {
        size_t offset, length;
    } bad[] = {{1, page},
               {page / 2, page},
               {0, 0},
               {0, page - 1},
               {0, page + 1},
               {0, 2 * PIECE * page + page},
               {page, 2 * PIECE * page},
               {2 * PIECE * page, page},
               {2 * PIECE * page + page, page},
               {SIZE_MAX / page * page, page},
               {page, SIZE_MAX / page * page},
               {SIZE_MAX / page * page, 2 * page}};
    for (size_t step = 0; step < 5; step += 2)
        for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
            struct trial trial;
            make_life(&trial);
            trial.steps[step].offset = bad[i].offset;
            trial.steps[step].length = bad[i].length;
            CHECK(is_refused_unrun(&trial, 1, 1));
        }
}

static void slots_are_in_range(void) {
    static const int bad[] = {3, 4, INT32_MAX, -2, INT32_MIN};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct trial trial;
        make_life(&trial);
        trial.steps[3].slot = bad[i];
        CHECK(is_refused_unrun(&trial, 1, 1));
    }
    struct trial trial;
    make_life(&trial);
    trial.program.nslots = 0;
    CHECK(is_refused_unrun(&trial, 1, 1));
}

static void nothing_is_repeated_no_times(void) {
    for (size_t i = 0; i < 5; i++) {
        struct trial trial;
        make_life(&trial);
        trial.steps[i].repeat = 0;
        CHECK(is_refused_unrun(&trial, 1, 1));
    }
}

static void what_can_be_done_once_is_not_repeated(void) {
    struct trial trial;
    make_life(&trial);
    trial.steps[0].repeat = 2; /* the first mapping would leak */
    CHECK(is_refused_unrun(&trial, 1, 1));
    make_life(&trial);
    trial.steps[4].repeat = 2;
    CHECK(is_refused_unrun(&trial, 1, 1));
    for (size_t i = 1; i <= 2; i++) { /* a child would leak, and the second kill would hit every process */
        begin(&trial);
        (void)add(&trial, TIMING_FORK, 0, 1, -1);
        (void)add(&trial, TIMING_REAP, 0, 1, -1);
        end(&trial);
        trial.steps[i].repeat = 2;
        CHECK(is_refused_unrun(&trial, 1, 1));
    }
}

static void each_fork_has_its_reap(void) {
    static const struct {
        int verbs[4];
        size_t n;
    } bad[] = {{{TIMING_FORK}, 1},
               {{TIMING_REAP}, 1},
               {{TIMING_REAP, TIMING_FORK}, 2},
               {{TIMING_FORK, TIMING_FORK}, 2},
               {{TIMING_FORK, TIMING_FORK, TIMING_REAP, TIMING_REAP}, 4},
               {{TIMING_FORK, TIMING_REAP, TIMING_REAP}, 3},
               {{TIMING_FORK, TIMING_REAP, TIMING_FORK}, 3}};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct trial trial;
        begin(&trial);
        for (size_t k = 0; k < bad[i].n; k++)
            (void)add(&trial, bad[i].verbs[k], 0, 1, -1);
        end(&trial);
        CHECK(is_refused_unrun(&trial, 1, 1));
    }
    struct trial trial;
    begin(&trial);
    (void)add(&trial, TIMING_FORK, 0, 1, -1);
    (void)add(&trial, TIMING_REAP, 0, 1, -1);
    end(&trial);
    CHECK(is_refused_unrun(&trial, 2, 1)); /* only a single thread may fork */
}

static void the_mapping_makes_sense(void) {
    const struct {
        size_t length, align, phase;
        int access;
    } bad[] = {{0, 0, 0, 0},
               {2 * PIECE * page + 1, 0, 0, 0},
               {2 * PIECE * page, 3 * page, 0, 0},
               {2 * PIECE * page, page + 1, 0, 0},
               {2 * PIECE * page, 1, 0, 0},
               {2 * PIECE * page, page / 2, 0, 0},
               {2 * PIECE * page, ALIGN, 1, 0},
               {2 * PIECE * page, ALIGN, page / 2, 0},
               {2 * PIECE * page, 0, 0, VM_COMMITTED},
               {2 * PIECE * page, 0, 0, 4},
               /* Plus the alignment, each of these wraps around to a small number. */
               {SIZE_MAX / page * page, ALIGN, 0, 0},
               {SIZE_MAX / 2 + 1 + 2 * PIECE * page, SIZE_MAX / 2 + 1, 0, 0}};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct trial trial;
        make_life(&trial);
        trial.program.length = bad[i].length;
        trial.program.align = bad[i].align;
        trial.program.phase = bad[i].phase;
        trial.program.access = bad[i].access;
        CHECK(is_refused_unrun(&trial, 1, 1));
    }
}

/* ---- samples ---- */

static void samples_lie_by_slot_round_and_thread(void) {
    for (size_t threads = 1; threads <= 3; threads++) {
        struct trial trial;
        make_life(&trial);
        CHECK(run_threads_of(&trial, threads, ROUNDS) == 0);
        CHECK(done == ROUNDS && failed == 0);
        CHECK(written() == 3 * ROUNDS * threads);
        for (size_t i = 0; i < 3 * ROUNDS * threads; i++)
            CHECK(samples[i] != UNWRITTEN && samples[i] > -1e9 && samples[i] < 1e12);
    }
}

static void a_slot_that_no_step_has_is_not_written(void) {
    struct trial trial;
    make_life(&trial);
    trial.program.nslots = 5;
    trial.steps[1].slot = 4;
    trial.steps[2].slot = -1;
    trial.steps[3].slot = 1;
    CHECK(run_threads_of(&trial, 2, ROUNDS) == 0);
    CHECK(written() == 2 * ROUNDS * 2);
    for (size_t i = 0; i < 5 * ROUNDS * 2; i++) {
        size_t slot = i / (ROUNDS * 2);
        CHECK((samples[i] != UNWRITTEN) == (slot == 4 || slot == 1));
    }
}

static void nothing_need_be_timed(void) {
    struct trial trial;
    begin(&trial);
    end(&trial);
    CHECK(run_threads_of(&trial, 1, ROUNDS) == 0 && done == ROUNDS && written() == 0);
    CHECK(timing_run(&trial.program, 2, 1, NULL, NULL, &done, &failed) == 0 && done == 1);
}

static void all_samples_together_are_within_the_time_the_run_took(void) {
    struct trial trial;
    make_life(&trial);
    trial.program.nslots = 5;
    trial.steps[0].slot = 3;
    trial.steps[4].slot = 4;
    uint64_t begun = sys_nanoseconds();
    CHECK(run_threads_of(&trial, 1, 20) == 0);
    double wall = (double)(sys_nanoseconds() - begun), sum = 0;
    for (size_t i = 0; i < 5 * 20; i++)
        sum += samples[i];
    CHECK(sum <= wall);
}

static void a_repeated_step_gives_the_time_of_one(void) {
    struct trial trial;
    begin(&trial);
    trial.program.nslots = 1;
    add(&trial, TIMING_SYSTEM_CALL, 0, 1, 0)->repeat = 10000;
    end(&trial);
    uint64_t begun = sys_nanoseconds();
    CHECK(run_threads_of(&trial, 1, 1) == 0);
    CHECK(samples[0] * 10000 <= (double)(sys_nanoseconds() - begun) && samples[0] > 0);
}

static void reading_the_clock_takes_next_to_nothing(void) {
    double clock = timing_clock();
    CHECK(clock >= 0 && clock < 1e6);
}

/* ---- nothing is left behind ---- */

static void nothing_stays_after_success(void) {
    for (size_t threads = 1; threads <= 4; threads++)
        for (size_t align = 0; align <= ALIGN; align += ALIGN) {
            struct trial trial;
            make_life(&trial);
            trial.program.align = align;
            trial.program.phase = align != 0 ? page : 0;
            remember();
            CHECK(run_threads_of(&trial, threads, ROUNDS) == 0);
            CHECK(nothing_stays());
        }
}

/* A program in which one step is replaced by one that the kernel refuses. */
static void make_refused(struct trial *trial, size_t step) {
    begin(trial);
    trial->program.nslots = 1;
    for (size_t i = 1; i < 5; i++)
        if (i == step) /* half a huge page cannot be collapsed */
            (void)add(trial, TIMING_COLLAPSE, 1, 1, 0);
        else
            (void)add(trial, i % 2 == 1 ? TIMING_COMMIT : TIMING_WRITE, 0, PIECE, 0);
    end(trial);
}

static void nothing_stays_after_a_refusal_at_any_step(void) {
    for (size_t threads = 1; threads <= 4; threads++)
        for (size_t step = 2; step < 5; step++)
            for (size_t align = 0; align <= ALIGN; align += ALIGN) {
                struct trial trial;
                make_refused(&trial, step);
                trial.program.align = align;
                remember();
                CHECK(run_threads_of(&trial, threads, ROUNDS) == EINVAL);
                CHECK(done == 0 && failed == step);
                CHECK(nothing_stays());
            }
}

/* Runs the program in a process that cannot reserve more; returns the result of timing_run. */
static inline int run_limited(int resource, const char *key, size_t more, const struct trial *trial,
                              size_t threads) {
    REQUIRE(limit_to(resource, key, more));
    int err = run_threads_of(trial, threads, ROUNDS);
    REQUIRE(unlimit(resource));
    return err;
}

static void a_refused_reservation_leaves_nothing(void) {
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
    SKIP("the sanitizers need addresses without a limit");
#else
    for (size_t threads = 1; threads <= 3; threads++)
        for (size_t align = 0; align <= ALIGN; align += ALIGN) {
            struct trial trial;
            make_life(&trial);
            trial.program.length = trial.steps[0].length = trial.steps[4].length = (size_t)1 << 30;
            trial.program.align = align;
            remember();
            /* With space for two, only the third thread is refused. */
            size_t more = (threads - 1) * (((size_t)1 << 30) + 2 * ALIGN) + ((size_t)64 << 20);
            CHECK(run_limited(RLIMIT_AS, "VmSize:", more, &trial, threads) == ENOMEM);
            CHECK(done == 0 && failed == 0 && written() == 0);
            CHECK(nothing_stays());
        }
#endif
}

static void a_refused_commit_leaves_nothing(void) {
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
    SKIP("the sanitizers need data without a limit");
#else
    for (size_t threads = 1; threads <= 3; threads++) {
        struct trial trial;
        size_t gib = (size_t)1 << 30;
        make_life(&trial);
        trial.program.length = trial.steps[0].length = trial.steps[4].length = gib;
        trial.steps[1].length = gib;
        remember();
        size_t more = (threads - 1) * gib + ((size_t)64 << 20);
        CHECK(run_limited(RLIMIT_DATA, "VmData:", more, &trial, threads) == ENOMEM);
        CHECK(done == 0 && failed == 1 && written() < threads);
        CHECK(nothing_stays());
    }
#endif
}

static void a_thread_that_cannot_be_made_is_told_by_the_step_after_the_last(void) {
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
    SKIP("the sanitizers need addresses without a limit");
#else
    struct trial trial;
    make_life(&trial);
    remember();
    /* The cache has stacks for some threads, and no more can be mapped. */
    CHECK(run_limited(RLIMIT_AS, "VmSize:", (size_t)1 << 20, &trial, 40) == EAGAIN);
    CHECK(done == 0 && failed == trial.program.nsteps && written() == 0);
    CHECK(childless() && no_thread_stays());
    remember();
    CHECK(run_threads_of(&trial, SIZE_MAX / 2, 1) == ENOMEM);
    CHECK(done == 0 && failed == trial.program.nsteps && nothing_stays());
#endif
}

static void a_refused_second_mapping_leaves_the_hole_alone(void) {
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
    SKIP("the sanitizers need data without a limit");
#else
    size_t gib = (size_t)1 << 30;
    for (size_t hole = 0; hole < 3; hole++) {
        struct trial trial;
        begin(&trial);
        (void)add(&trial, TIMING_UNMAP, hole * gib / page, gib / page, -1);
        (void)add(&trial, TIMING_MAP, hole * gib / page, gib / page, -1);
        end(&trial);
        trial.program.length = trial.steps[0].length = trial.steps[3].length = 3 * gib;
        remember();
        CHECK(run_limited(RLIMIT_DATA, "VmData:", (size_t)64 << 20, &trial, 1) == ENOMEM);
        CHECK(done == 0 && failed == 2 && nothing_stays());
    }
#endif
}

/* A refusal in one thread stops all threads in the same round. */
static void refuse_from(struct job *job, size_t round) {
    struct thread_state stage = {0};
    size_t n = job->program->nsteps;
    for (size_t at = 0; at < round * n + 1 && wait_for_all(job); at++)
        CHECK(perform(job, &job->program->steps[at % n], &stage) == 0);
    REQUIRE(wait_for_all(job));
    record_refusal(job, E2BIG, 1, round);
    clean_up(job, &stage);
}

static void all_threads_end_when_one_is_refused_in_a_later_round(void) {
    struct trial trial;
    make_life(&trial);
    for (size_t round = 0; round < ROUNDS; round++) {
        for (size_t i = 0; i < MOST_SAMPLES; i++)
            samples[i] = UNWRITTEN;
        struct job job = {.program = &trial.program, .threads = 3, .rounds = ROUNDS, .page = page,
                          .samples = samples, .preempted = preempted, .done = ROUNDS};
        struct worker workers[2] = {{.job = &job, .thread = 1}, {.job = &job, .thread = 2}};
        remember();
        for (size_t i = 0; i < 2; i++)
            REQUIRE(pthread_create(&workers[i].id, NULL, work, &workers[i]) == 0);
        refuse_from(&job, round);
        for (size_t i = 0; i < 2; i++)
            REQUIRE(pthread_join(workers[i].id, NULL) == 0);
        CHECK(atomic_load(&job.err) == E2BIG && job.failed == 1 && job.done == round);
        CHECK(nothing_stays());
        for (size_t slot = 0; slot < 3; slot++) /* complete rounds have samples, later ones none */
            for (size_t r = 0; r < ROUNDS; r++)
                for (size_t thread = 1; thread < 3; thread++) {
                    bool is = samples[(slot * ROUNDS + r) * 3 + thread] != UNWRITTEN;
                    CHECK(r == round && slot == 0 ? true : is == (r < round));
                }
    }
}

static void threads_begin_each_step_together(void) {
    struct trial trial;
    make_life(&trial);
    struct job job = {.program = &trial.program, .threads = 2, .rounds = 1, .page = page,
                      .samples = samples, .preempted = preempted, .done = 1};
    struct worker worker = {.job = &job, .thread = 1};
    REQUIRE(pthread_create(&worker.id, NULL, work, &worker) == 0);
    for (size_t i = 0; i < trial.program.nsteps; i++) {
        for (int spins = 0; spins < 10000 && atomic_load(&job.arrived) == 0; spins++)
            (void)usleep(100);
        CHECK(atomic_load(&job.arrived) == 1 && atomic_load(&job.generation) == i);
        CHECK(wait_for_all(&job));
    }
    REQUIRE(pthread_join(worker.id, NULL) == 0);
    CHECK(atomic_load(&job.generation) == trial.program.nsteps);
}

static void no_child_stays_after_a_refusal_between_fork_and_reap(void) {
    if (!MAY_FORK) {
        SKIP("no fork under ThreadSanitizer");
        return;
    }
    struct trial trial;
    begin(&trial);
    (void)add(&trial, TIMING_COMMIT, 0, PIECE, -1);
    (void)add(&trial, TIMING_FORK, 0, PIECE, -1);
    (void)add(&trial, TIMING_COLLAPSE, 1, 1, -1);
    (void)add(&trial, TIMING_REAP, 0, PIECE, -1);
    end(&trial);
    remember();
    CHECK(run_threads_of(&trial, 1, ROUNDS) == EINVAL);
    CHECK(done == 0 && failed == 3 && nothing_stays());
    trial.steps[3].verb = TIMING_WRITE;
    CHECK(run_threads_of(&trial, 1, ROUNDS) == 0 && done == ROUNDS && nothing_stays());
}

static void forks_work_where_children_are_ignored(void) {
    if (!MAY_FORK) {
        SKIP("no fork under ThreadSanitizer");
        return;
    }
    struct trial trial;
    begin(&trial);
    trial.program.nslots = 2;
    (void)add(&trial, TIMING_FORK, 0, PIECE, 0);
    (void)add(&trial, TIMING_REAP, 0, PIECE, 1);
    end(&trial);
    void (*was)(int) = signal(SIGCHLD, SIG_IGN);
    remember();
    CHECK(run_threads_of(&trial, 1, ROUNDS) == 0);
    CHECK(written() == 2 * ROUNDS && nothing_stays());
    (void)signal(SIGCHLD, was);
}

/* ---- what each verb does ---- */

static struct trial one;
static struct job step_run;
static struct thread_state stage;

/* A mapping on which a test runs one verb after another. */
static void open_stage(int access, int advice) {
    begin(&one);
    end(&one);
    one.program.access = access;
    one.program.advice = advice;
    step_run = (struct job){.program = &one.program, .threads = 1, .rounds = 1, .page = page};
    stage = (struct thread_state){0};
    REQUIRE(perform(&step_run, &one.steps[0], &stage) == 0);
}

static int perform_on(int verb, size_t offset, size_t length) {
    struct timing_step step = {verb, -1, offset * page, length * page, 1};
    return perform(&step_run, &step, &stage);
}

static void close_stage(void) {
    uintptr_t base = stage.base;
    CHECK(perform(&step_run, &one.steps[1], &stage) == 0);
    CHECK(stage.base == 0 && witness_all(base, one.program.length, '.'));
}

/* Whether a page has a byte that is 1, as TIMING_WRITE leaves in each. */
static bool wrote(size_t n) {
    return memchr((void *)(stage.base + n * page), 1, page) != NULL;
}

static volatile unsigned char *at(size_t n) {
    return (volatile unsigned char *)(stage.base + n * page);
}

static bool looks(const char *expected) {
    char pages[2 * PIECE + 1];
    return strncmp(witness_pages(stage.base, 2 * PIECE * page, pages), expected,
                   strlen(expected)) == 0;
}

static long resident(void) {
    return witness_resident(stage.base, 2 * PIECE * page);
}

static void committing_and_uncommitting_change_the_piece_alone(void) {
    open_stage(0, 0);
    CHECK(looks("--------"));
    CHECK(perform_on(TIMING_COMMIT, 1, 4) == 0 && looks("-wwww---"));
    *at(1) = *at(2) = 42;
    CHECK(perform_on(TIMING_UNCOMMIT, 2, 2) == 0 && looks("-w--w---"));
    CHECK(perform_on(TIMING_COMMIT, 2, 2) == 0 && looks("-wwww---"));
    CHECK(*at(1) == 42 && *at(2) == 42);
    close_stage();
}

static void committing_by_mapping_and_decommitting_renew(void) {
    open_stage(0, VM_HUGE_NEVER);
    CHECK(perform_on(TIMING_COMMIT_MAP, 0, 4) == 0 && looks("wwww----"));
    *at(1) = 42;
    CHECK(witness_flag(stage.base, "ac"));
    CHECK(perform_on(TIMING_COMMIT_MAP, 1, 1) == 0 && *at(1) == 0);
    *at(1) = 42;
    CHECK(perform_on(TIMING_DECOMMIT, 1, 2) == 0 && looks("w--w----"));
    CHECK(resident() == 0 && perform_on(TIMING_COMMIT, 1, 2) == 0 && *at(1) == 0);
    close_stage();
}

static void discarding_off_gives_memory_back_and_takes_access_away(void) {
    open_stage(0, 0);
    CHECK(perform_on(TIMING_COMMIT, 0, 4) == 0 && perform_on(TIMING_WRITE, 0, 4) == 0);
    CHECK(perform_on(TIMING_DISCARD_OFF, 1, 2) == 0 && looks("w--w----"));
    CHECK(resident() == 2);
    CHECK(perform_on(TIMING_COMMIT, 1, 2) == 0 && !wrote(1) && wrote(0));
    close_stage();
}

static void unmapping_makes_a_hole_that_mapping_fills(void) {
    open_stage(0, 0);
    CHECK(perform_on(TIMING_COMMIT, 0, 4) == 0 && perform_on(TIMING_WRITE, 0, 4) == 0);
    CHECK(perform_on(TIMING_UNMAP, 1, 2) == 0 && looks("w..w----"));
    CHECK(perform_on(TIMING_MAP, 1, 2) == 0 && looks("wwww----"));
    CHECK(wrote(0) && !wrote(1) && !wrote(2) && wrote(3));
    close_stage();
}

static void touching_and_discarding_are_seen_in_memory(void) {
    open_stage(0, VM_HUGE_NEVER);
    CHECK(perform_on(TIMING_COMMIT, 0, 2 * PIECE) == 0);
    int err = perform_on(TIMING_ADVISE, 0, 2 * PIECE);
    CHECK(err == 0 || err == EINVAL);
    CHECK(witness_flag(stage.base, "nh") == (err == 0));
    CHECK(perform_on(TIMING_WRITE, 3, 5) == 0);
    CHECK(err != 0 || resident() == 5);
    CHECK(wrote(3) && wrote(7) && !wrote(2) && !wrote(8));
    CHECK(*at(3) == 1 && *at(7) == 1);
    CHECK(perform_on(TIMING_REWRITE, 3, 5) == 0);
    CHECK(at(4)[64] == 1 && at(7)[4 * 64] == 1 && at(7)[64] == 0);
    CHECK(perform_on(TIMING_READ, 0, 2 * PIECE) == 0);
    CHECK(wrote(3) && !wrote(0));
    CHECK(perform_on(TIMING_DISCARD, 4, 2) == 0);
    CHECK(wrote(3) && !wrote(4) && !wrote(5) && wrote(6));
    CHECK(perform_on(TIMING_POPULATE, 0, PIECE) == 0);
    CHECK(witness_resident(stage.base, PIECE * page) == PIECE && wrote(7));
    close_stage();
}

static void a_write_takes_a_page_each_and_a_read_none(void) {
    open_stage(0, VM_HUGE_NEVER);
    CHECK(perform_on(TIMING_COMMIT, 1, PIECE) == 0);
    (void)perform_on(TIMING_ADVISE, 1, PIECE);
    struct rusage before, between, after;
    CHECK(getrusage(RUSAGE_SELF, &before) == 0);
    CHECK(perform_on(TIMING_READ, 1, PIECE) == 0);
    CHECK(getrusage(RUSAGE_SELF, &between) == 0);
    CHECK(between.ru_minflt - before.ru_minflt >= PIECE);
    const char *private = witness_detail(stage.base + page, "Anonymous:");
    CHECK(private != NULL && strtoul(private, NULL, 10) == 0); /* the zero page does not count as private */
    CHECK(perform_on(TIMING_WRITE, 1, PIECE) == 0);
    CHECK(getrusage(RUSAGE_SELF, &after) == 0);
    CHECK(after.ru_minflt - between.ru_minflt >= PIECE);
    private = witness_detail(stage.base + page, "Anonymous:");
    CHECK(private != NULL && strtoul(private, NULL, 10) == PIECE * page / 1024);
    close_stage();
}

static void discarding_lazily_marks_pages(void) {
    open_stage(0, 0);
    /* Next to pages without access: otherwise the kernel may merge it with another mapping. */
    CHECK(perform_on(TIMING_COMMIT, 1, PIECE) == 0);
    int err = 0;
    unsigned long dirty = 1;
    /* The kernel skips a page that is busy. */
    for (int i = 0; i < 100 && err == 0 && dirty != 0; i++) {
        CHECK(perform_on(TIMING_WRITE, 1, PIECE) == 0);
        err = perform_on(TIMING_DISCARD_LAZY, 1, PIECE);
        const char *shown = witness_detail(stage.base + page, "Private_Dirty:");
        dirty = shown == NULL ? 1 : strtoul(shown, NULL, 10);
    }
    if (err != 0)
        SKIP("no MADV_FREE here");
    CHECK(err != 0 || dirty == 0);
    CHECK(*at(1) == 1 || *at(1) == 0);
    close_stage();
}

static void guarding_takes_the_contents(void) {
    open_stage(0, 0);
    CHECK(perform_on(TIMING_COMMIT, 0, 4) == 0 && perform_on(TIMING_WRITE, 0, 4) == 0);
    if (perform_on(TIMING_GUARD, 1, 2) != 0) {
        SKIP("no MADV_GUARD_INSTALL here");
    } else {
        /* A page that faults can't be read by a system call either. */
        int pipes[2];
        REQUIRE(pipe(pipes) == 0);
        CHECK(write(pipes[1], (void *)(stage.base + page), 1) == -1 && errno == EFAULT);
        CHECK(write(pipes[1], (void *)stage.base, 1) == 1);
        CHECK(perform_on(TIMING_UNGUARD, 1, 2) == 0);
        CHECK(!wrote(1) && wrote(0) && wrote(3));
        CHECK(close(pipes[0]) == 0 && close(pipes[1]) == 0);
    }
    close_stage();
}

static void collapsing_makes_huge_pages(void) {
    size_t huge = (size_t)2 << 20;
    struct trial trial;
    begin(&trial);
    trial.program.length = 2 * huge;
    trial.program.align = huge;
    trial.program.advice = VM_HUGE_NEVER;
    step_run = (struct job){.program = &trial.program, .threads = 1, .rounds = 1, .page = page};
    stage = (struct thread_state){0};
    REQUIRE(reserve(&trial.program, &stage.base) == 0);
    size_t n = huge / page;
    CHECK(perform_on(TIMING_COMMIT, 0, n) == 0);
    if (perform_on(TIMING_ADVISE, 0, n) != 0) {
        SKIP("no transparent huge pages here");
    } else {
        CHECK(perform_on(TIMING_WRITE, 0, n) == 0);
        const char *small = witness_detail(stage.base, "AnonHugePages:");
        CHECK(small != NULL && strtoul(small, NULL, 10) == 0);
        CHECK(perform_on(TIMING_HUGE_PREFER, 0, n) == 0 && witness_flag(stage.base, "hg"));
        int err = perform_on(TIMING_COLLAPSE, 0, n);
        if (err != 0)
            SKIP("the kernel collapsed nothing");
        const char *large = witness_detail(stage.base, "AnonHugePages:");
        CHECK(err != 0 || (large != NULL && strtoul(large, NULL, 10) == huge / 1024));
        CHECK(wrote(0) && wrote(n - 1));
    }
    CHECK(release(&trial.program, &stage) == 0);
}

static void forking_gives_a_child_that_reaping_takes(void) {
    if (!MAY_FORK) {
        SKIP("no fork under ThreadSanitizer");
        return;
    }
    open_stage(0, 0);
    CHECK(childless());
    REQUIRE(perform_on(TIMING_FORK, 0, 1) == 0);
    int child = stage.child;
    CHECK(child > 0 && kill(child, 0) == 0 && !childless());
    CHECK(perform_on(TIMING_REAP, 0, 1) == 0);
    CHECK(stage.child == 0 && childless() && kill(child, 0) == -1 && errno == ESRCH);
    close_stage();
}

static void the_advice_is_the_programs(void) {
    static const struct {
        int advice;
        const char *flag;
    } table[] = {{VM_NO_DUMP, "dd"}, {VM_NO_FORK, "dc"}, {VM_HUGE_PREFER, "hg"}};
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        open_stage(0, table[i].advice);
        CHECK(!witness_flag(stage.base, table[i].flag));
        int err = perform_on(TIMING_ADVISE, 0, 1);
        CHECK(witness_flag(stage.base, table[i].flag) == (err == 0));
        CHECK(!witness_flag(stage.base + page, table[i].flag));
        close_stage();
    }
}

static void a_program_without_charge_is_never_charged(void) {
    if (!witness_honours_noreserve()) {
        SKIP("overcommit mode 2 charges everything");
        return;
    }
    static const int verbs[] = {TIMING_COMMIT, TIMING_COMMIT_MAP, TIMING_DECOMMIT, TIMING_COMMIT};
    open_stage(VM_NORESERVE, 0);
    for (size_t i = 0; i < sizeof verbs / sizeof verbs[0]; i++) {
        CHECK(perform_on(verbs[i], 0, 2) == 0);
        CHECK(witness_flag(stage.base, "nr") && !witness_flag(stage.base, "ac"));
    }
    close_stage();
    open_stage(0, 0);
    CHECK(perform_on(TIMING_COMMIT, 0, 2) == 0 && witness_flag(stage.base, "ac"));
    close_stage();
}

static void mappings_lie_where_the_program_wants_them(void) {
    static const size_t aligns[] = {1, 2, 16, 512, 1024, 1 << 14};
    for (size_t i = 0; i < sizeof aligns / sizeof aligns[0]; i++)
        for (size_t phase = 0; phase < aligns[i]; phase += 1 + aligns[i] / 3)
            for (size_t length = 1; length < 3 * aligns[i]; length += 1 + aligns[i] / 2) {
                struct trial trial;
                uintptr_t base = 0;
                begin(&trial);
                trial.program.length = length * page;
                trial.program.align = aligns[i] * page;
                trial.program.phase = phase * page;
                remember();
                REQUIRE(reserve(&trial.program, &base) == 0);
                CHECK(base % (aligns[i] * page) == phase * page);
                CHECK(witness_status("VmSize:") >= mapped_before + length * page);
#if !defined __SANITIZE_ADDRESS__ && !defined __SANITIZE_THREAD__
                CHECK(witness_status("VmSize:") == mapped_before + length * page);
#endif
                CHECK(vm_release(base, length * page) == 0);
                CHECK(nothing_stays());
            }
}

int main(void) {
    page = vm_page_size();
    check_test = "warm_up";
    warm_up();
    RUN(no_threads_and_no_rounds_are_refused);
    RUN(a_program_reserves_first_and_releases_last);
    RUN(an_unknown_verb_is_refused_before_anything_is_done);
    RUN(pieces_are_whole_pages_of_the_mapping);
    RUN(slots_are_in_range);
    RUN(nothing_is_repeated_no_times);
    RUN(what_can_be_done_once_is_not_repeated);
    RUN(each_fork_has_its_reap);
    RUN(the_mapping_makes_sense);
    RUN(samples_lie_by_slot_round_and_thread);
    RUN(a_slot_that_no_step_has_is_not_written);
    RUN(nothing_need_be_timed);
    RUN(all_samples_together_are_within_the_time_the_run_took);
    RUN(a_repeated_step_gives_the_time_of_one);
    RUN(reading_the_clock_takes_next_to_nothing);
    RUN(nothing_stays_after_success);
    RUN(nothing_stays_after_a_refusal_at_any_step);
    RUN(a_refused_reservation_leaves_nothing);
    RUN(a_refused_commit_leaves_nothing);
    RUN(a_thread_that_cannot_be_made_is_told_by_the_step_after_the_last);
    RUN(a_refused_second_mapping_leaves_the_hole_alone);
    RUN(all_threads_end_when_one_is_refused_in_a_later_round);
    RUN(threads_begin_each_step_together);
    RUN(no_child_stays_after_a_refusal_between_fork_and_reap);
    RUN(forks_work_where_children_are_ignored);
    RUN(committing_and_uncommitting_change_the_piece_alone);
    RUN(committing_by_mapping_and_decommitting_renew);
    RUN(discarding_off_gives_memory_back_and_takes_access_away);
    RUN(unmapping_makes_a_hole_that_mapping_fills);
    RUN(touching_and_discarding_are_seen_in_memory);
    RUN(a_write_takes_a_page_each_and_a_read_none);
    RUN(discarding_lazily_marks_pages);
    RUN(guarding_takes_the_contents);
    RUN(collapsing_makes_huge_pages);
    RUN(forking_gives_a_child_that_reaping_takes);
    RUN(the_advice_is_the_programs);
    RUN(a_program_without_charge_is_never_charged);
    RUN(mappings_lie_where_the_program_wants_them);
    return check_report("test_timing");
}
