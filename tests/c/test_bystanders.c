#define _GNU_SOURCE
#include "../../csrc/bystanders.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/wait.h>

#include "../../csrc/sys.h"
#include "../../csrc/vm.h"
#include "check.h"
#include "witness.h"

enum { WINDOWS = 4, MOST_THREADS = 4 };
#define WINDOW UINT64_C(300000)

/* ThreadSanitizer does not work in a process created by the clone system call. */
#ifdef __SANITIZE_THREAD__
#define SECOND BYSTANDERS_NOBODY
#else
#define SECOND BYSTANDERS_CALLS
#endif

static size_t page;
static int cpus[MOST_THREADS]; /* all may be the same: on one CPU threads take turns */
static const unsigned char on[WINDOWS] = {1, 0, 0, 1};
static struct bystanders_sample samples[WINDOWS * MOST_THREADS];

static struct bystanders_setup make_setup(int call, int work, size_t n) {
    return (struct bystanders_setup){
        .call = call, .work = work, .second = SECOND, .length = 2 * page, .n = n, .cpus = cpus,
        .second_cpu = cpus[0], .bytes = 64 * page, .window = WINDOW};
}

static int run(const struct bystanders_setup *setup) {
    memset(samples, 0xff, sizeof samples);
    return bystanders_run(setup, on, WINDOWS, samples);
}

static bool is_unwritten(void) {
    for (size_t i = 0; i < sizeof samples; i++)
        if (((const unsigned char *)samples)[i] != 0xff)
            return false;
    return true;
}

static size_t mapped_before, tasks_before;

static void remember(void) {
    tasks_before = witness_tasks();
    mapped_before = witness_status("VmSize:");
}

static bool nothing_stays(void) {
    bool threadless = witness_no_task_stays(tasks_before);
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
    bool same = true; /* the sanitizers map memory at any time */
#else
    bool same = witness_status("VmSize:") == mapped_before;
#endif
    bool childless = waitpid(-1, NULL, WNOHANG | __WALL) == -1 && errno == ECHILD;
    return same && childless && threadless;
}

/* Thread stacks stay in the C library's cache: fill it before anything is compared. */
static void warm_up(void) {
    struct bystanders_setup setup = make_setup(BYSTANDERS_RELEASE, BYSTANDERS_SPIN, 3);
    REQUIRE(run(&setup) == 0);
    remember();
}

static bool is_refused(const struct bystanders_setup *setup, size_t windows) {
    remember();
    memset(samples, 0xff, sizeof samples);
    return bystanders_run(setup, on, windows, samples) == EINVAL && is_unwritten() &&
           nothing_stays();
}

static void malformed_setups_are_refused(void) {
    struct bystanders_setup sound = make_setup(BYSTANDERS_RELEASE, BYSTANDERS_READ, 1), setup = sound;
    CHECK(is_refused(&setup, 0));
    CHECK(is_refused(&setup, BYSTANDERS_MOST_WINDOWS + 1));
#define REFUSED(field, value)                                                                      \
    do {                                                                                           \
        setup = sound;                                                                             \
        setup.field = (value);                                                                     \
        CHECK(is_refused(&setup, WINDOWS));                                                        \
    } while (0)
    REFUSED(call, -1);
    REFUSED(call, BYSTANDERS_RENEW + 1);
    REFUSED(work, -1);
    REFUSED(work, BYSTANDERS_FAULT_OWN + 1);
    REFUSED(second, -1);
    REFUSED(second, BYSTANDERS_ROLLUP + 1);
    REFUSED(length, 0);
    REFUSED(length, page + 1);
    REFUSED(length, SIZE_MAX / page * page);
    REFUSED(huge, page);
    REFUSED(huge, 3 * page);
    REFUSED(huge, SIZE_MAX / 2 + 1);
    REFUSED(n, BYSTANDERS_MOST + 1);
    REFUSED(n, SIZE_MAX);
    REFUSED(bytes, 0);
    REFUSED(bytes, page / 2);
    REFUSED(bytes, SIZE_MAX / page * page);
    REFUSED(resident, 1);
    REFUSED(window, 1);
    REFUSED(window, UINT64_MAX);
#undef REFUSED
}

static void each_window_has_the_counts_of_its_threads(void) {
    for (int call = BYSTANDERS_RELEASE; call <= BYSTANDERS_RENEW; call++)
        for (int work = BYSTANDERS_SPIN; work <= BYSTANDERS_FAULT_OWN; work++)
            for (size_t n = 0; n <= 2; n++) {
                struct bystanders_setup setup = make_setup(call, work, n);
                remember();
                REQUIRE(run(&setup) == 0);
                for (size_t w = 0; w < WINDOWS; w++)
                    for (size_t t = 0; t <= n; t++) {
                        const struct bystanders_sample *sample = &samples[w * (n + 1) + t];
                        bool works = t != 0 || on[w] || SECOND == BYSTANDERS_CALLS;
                        CHECK((sample->work != 0) == works && (sample->wall != 0) == works);
                        CHECK(sample->longest <= sample->wall + WINDOW);
                        if (work >= BYSTANDERS_FAULT_SHARED && t != 0)
                            CHECK(sample->work <= 64);
                    }
                CHECK(nothing_stays());
            }
}

static void a_barrier_interrupts_nothing_else(void) {
    if (sys_barrier_register() != 0) {
        SKIP("no membarrier");
        return;
    }
    struct bystanders_setup setup = make_setup(BYSTANDERS_BARRIER, BYSTANDERS_SPIN, 1);
    remember();
    CHECK(run(&setup) == 0 && samples[0].work != 0);
    CHECK(nothing_stays());
}

static void without_calls_only_bystanders_work(void) {
    for (int work = BYSTANDERS_SPIN; work <= BYSTANDERS_FAULT_OWN; work++) {
        struct bystanders_setup setup = make_setup(BYSTANDERS_NO_CALL, work, 2);
        REQUIRE(run(&setup) == 0);
        for (size_t w = 0; w < WINDOWS; w++)
            CHECK(samples[w * 3].work == 0 && samples[w * 3 + 1].work != 0 &&
                  samples[w * 3 + 2].work != 0);
    }
}

static void a_reader_needs_no_bystanders(void) {
#ifdef __SANITIZE_THREAD__
    SKIP("ThreadSanitizer does not work in the second process");
#else
    for (int second = BYSTANDERS_MAPS; second <= BYSTANDERS_ROLLUP; second++) {
        struct bystanders_setup setup = make_setup(BYSTANDERS_RELEASE, BYSTANDERS_SPIN, 0);
        setup.second = second;
        setup.resident = 16 * page;
        remember();
        CHECK(run(&setup) == 0);
        for (size_t w = 0; w < WINDOWS; w++)
            CHECK(samples[w].work != 0);
        CHECK(nothing_stays());
    }
#endif
}

static void a_huge_page_is_one_or_is_reported(void) {
    struct bystanders_setup setup = make_setup(BYSTANDERS_DISCARD, BYSTANDERS_SPIN, 1);
    setup.huge = setup.length = (size_t)2 << 20;
    remember();
    REQUIRE(vm_allow_huge(false) == 0);
    CHECK(run(&setup) == ENODATA && is_unwritten());
    REQUIRE(vm_allow_huge(true) == 0);
    CHECK(nothing_stays());
    int err = run(&setup);
    CHECK(err == 0 || err == ENODATA);
    CHECK(nothing_stays());
}

static void a_cpu_that_is_not_there_is_refused(void) {
    int bad[] = {cpus[0], 8191};
    struct bystanders_setup setup = make_setup(BYSTANDERS_RELEASE, BYSTANDERS_SPIN, 1);
    setup.cpus = bad;
    remember();
    CHECK(run(&setup) == EINVAL && is_unwritten());
    CHECK(nothing_stays());
    bad[1] = cpus[0];
    bad[0] = -1;
    CHECK(run(&setup) == EINVAL && nothing_stays());
}

/* ---- refusals ---- */

static vm_system_call kernel;
static _Atomic long calls_left; /* munmap counts only where the caller makes it */

static intptr_t refuse(long number, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t d, uintptr_t e,
                       uintptr_t f) {
    bool counts = number != SYS_close && (number != SYS_munmap || b == 2 * page);
    if (counts && atomic_fetch_sub(&calls_left, 1) == 0)
        return -ENOMEM;
    return kernel(number, a, b, c, d, e, f);
}

static void a_refusal_at_any_call_leaves_nothing(void) {
    for (int call = BYSTANDERS_RELEASE; call <= BYSTANDERS_RENEW; call++)
        for (int work = BYSTANDERS_SPIN; work <= BYSTANDERS_FAULT_SHARED; work++)
            for (long i = 0; i < 40; i += i < 12 ? 1 : 7) {
                struct bystanders_setup setup = make_setup(call, work, 1);
                setup.resident = 4 * page;
                remember();
                atomic_store(&calls_left, i);
                kernel = vm_replace(refuse);
                int err = run(&setup);
                (void)vm_replace(NULL);
                CHECK(err == 0 || (err == ENOMEM && is_unwritten()));
                CHECK(i >= 9 || err == ENOMEM);
                CHECK(nothing_stays());
            }
}

static void the_second_process_ends_with_the_first(void) {
#ifdef __SANITIZE_THREAD__
    SKIP("ThreadSanitizer does not work in the second process");
#else
    int ends[2];
    char byte;
    REQUIRE(pipe(ends) == 0);
    pid_t first = fork();
    REQUIRE(first >= 0);
    if (first == 0) {
        struct bystanders_setup setup = make_setup(BYSTANDERS_RELEASE, BYSTANDERS_SPIN, 1);
        setup.window = UINT64_C(5000000000);
        (void)close(ends[0]);
        (void)write(ends[1], "", 1);
        (void)run(&setup);
        _exit(0);
    }
    (void)close(ends[1]);
    REQUIRE(read(ends[0], &byte, 1) == 1);
    (void)usleep(100000); /* likely inside the first window */
    REQUIRE(kill(first, SIGKILL) == 0 && waitpid(first, NULL, 0) == first);
    CHECK(read(ends[0], &byte, 1) == 0); /* no process holds the other end: all are gone */
    (void)close(ends[0]);
#endif
}

int main(void) {
    cpu_set_t set;
    page = vm_page_size();
    REQUIRE(sched_getaffinity(0, sizeof set, &set) == 0);
    size_t found = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE && found < MOST_THREADS; cpu++)
        if (CPU_ISSET((size_t)cpu, &set))
            cpus[found++] = cpu;
    for (size_t i = found; i < MOST_THREADS; i++)
        cpus[i] = cpus[i % found];
    check_test = "warm_up";
    warm_up();
    RUN(malformed_setups_are_refused);
    RUN(each_window_has_the_counts_of_its_threads);
    RUN(a_barrier_interrupts_nothing_else);
    RUN(without_calls_only_bystanders_work);
    RUN(a_reader_needs_no_bystanders);
    RUN(a_huge_page_is_one_or_is_reported);
    RUN(a_cpu_that_is_not_there_is_refused);
    RUN(a_refusal_at_any_call_leaves_nothing);
    RUN(the_second_process_ends_with_the_first);
    return check_report("test_bystanders");
}
