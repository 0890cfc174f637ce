#define _GNU_SOURCE
#include "sys.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>

#include "check.h"
#include "vm.h"
#include "witness.h"

static size_t page;

/* A new mapping of `n` pages. */
static uintptr_t mapped(size_t n, int access) {
    uintptr_t address = 0;
    REQUIRE(vm_map(0, n * page, access, &address) == 0);
    return address;
}

/* Runs `body` in a child. Returns its exit status, or minus the signal that ended it. */
static int in_child(int (*body)(uintptr_t), uintptr_t address) {
    int status = 0;
    (void)fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        (void)signal(SIGSEGV, SIG_DFL);
        _exit(body(address));
    }
    if (child < 0 || waitpid(child, &status, 0) != child)
        return 1000;
    return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

static void the_clock_does_not_go_back(void) {
    struct timespec before, after;
    CHECK(clock_gettime(CLOCK_MONOTONIC, &before) == 0);
    uint64_t last = sys_nanoseconds(), first = last;
    for (int i = 0; i < 1000; i++) {
        uint64_t now = sys_nanoseconds();
        CHECK(now >= last);
        last = now;
    }
    CHECK(clock_gettime(CLOCK_MONOTONIC, &after) == 0);
    CHECK(first >= (uint64_t)before.tv_sec * 1000000000 + (uint64_t)before.tv_nsec);
    CHECK(last <= (uint64_t)after.tv_sec * 1000000000 + (uint64_t)after.tv_nsec);
}

static void the_parent_is_the_parent(void) {
    CHECK(sys_parent() == getppid());
}

/* Waits until no process holds the other end of the pipe; false after 10 s. */
static bool all_have_ended(int end) {
    struct pollfd polled = {.fd = end, .events = POLLIN};
    char byte;
    return poll(&polled, 1, 10000) == 1 && read(end, &byte, 1) == 0;
}

static int ends_with_another(uintptr_t parent) {
    return sys_end_with_parent((int)parent + 1);
}

static int ends_with(uintptr_t parent) {
    int sent = 0;
    int err = sys_end_with_parent((int)parent);
    (void)prctl(PR_GET_PDEATHSIG, &sent);
    return err != 0 ? err : sent;
}

static void a_process_ends_with_the_parent_it_names(void) {
    CHECK(in_child(ends_with, (uintptr_t)getpid()) == SIGKILL);
    CHECK(in_child(ends_with_another, (uintptr_t)getpid()) == ESRCH);
    int pipes[2];
    REQUIRE(pipe(pipes) == 0);
    pid_t child = fork();
    if (child == 0) { /* ends after its own child has reported that sys_end_with_parent worked */
        char byte = 0;
        int ready[2], parent = (int)getpid();
        if (pipe(ready) == 0 && fork() == 0) {
            int err = sys_end_with_parent(parent);
            if (err == 0 && write(ready[1], &byte, 1) == 1)
                for (;;)
                    (void)pause();
            _exit(1);
        }
        _exit(read(ready[0], &byte, 1) != 1);
    }
    int status = 1;
    CHECK(close(pipes[1]) == 0);
    CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
    CHECK(all_have_ended(pipes[0]));
    CHECK(close(pipes[0]) == 0);
}

static int handlers_run;

static void count_handler(void) {
    handlers_run++;
}

static void count_signal(int signal_number) {
    (void)signal_number;
    handlers_run++;
}

/* Whether a process has this address mapped. */
static bool has_mapped(int process, uintptr_t address) {
    char path[64];
    (void)snprintf(path, sizeof path, "/proc/%d/maps", process);
    const char *perms, *line = witness_read(path);
    for (uintptr_t lo, hi; *line != '\0'; line = witness_next_line(line))
        if (witness_mapping(line, &lo, &hi, &perms) && lo <= address && address < hi)
            return true;
    return false;
}

static void a_forked_child_lives_until_it_is_reaped(void) {
    uintptr_t kept = mapped(1, VM_COMMITTED), absent = mapped(1, VM_COMMITTED);
    int child = 0;
    REQUIRE(vm_advise(absent, page, VM_NO_FORK) == 0);
    handlers_run = 0;
    REQUIRE(pthread_atfork(count_handler, count_handler, count_handler) == 0);
    void (*was)(int) = signal(SIGCHLD, count_signal);
    REQUIRE(sys_fork(&child) == 0);
    CHECK(child > 0 && child != getpid() && kill(child, 0) == 0);
    CHECK(has_mapped(child, kept) && !has_mapped(child, absent));
    CHECK(waitpid(child, NULL, WNOHANG | __WALL) == 0);
    CHECK(sys_reap(child) == 0);
    CHECK(kill(child, 0) == -1 && errno == ESRCH);
    CHECK(waitpid(-1, NULL, WNOHANG | __WALL) == -1 && errno == ECHILD);
    CHECK(handlers_run == 0);
    (void)signal(SIGCHLD, was);
    CHECK(sys_reap(child) == ESRCH);
    CHECK(vm_release(kept, page) == 0 && vm_release(absent, page) == 0);
}

static void a_child_is_reaped_where_children_are_ignored(void) {
    void (*was)(int) = signal(SIGCHLD, SIG_IGN);
    int child = 0;
    REQUIRE(sys_fork(&child) == 0);
    CHECK(sys_reap(child) == 0);
    (void)signal(SIGCHLD, was);
}

/* In a process group of its own, so that a failure kills only this process. */
static int reap_groups(uintptr_t unused) {
    (void)unused;
    return setpgid(0, 0) == 0 && sys_reap(0) == EINVAL && sys_reap(-(int)getpid()) == EINVAL ? 0 : 1;
}

static void a_process_group_is_not_reaped(void) {
    CHECK(in_child(reap_groups, 0) == 0);
}

/* Whether a process blocks a signal: bit signal - 1 of SigBlk in its status. */
static bool blocks(int process, int signal_number) {
    char path[64];
    (void)snprintf(path, sizeof path, "/proc/%d/status", process);
    const char *set = strstr(witness_read(path), "SigBlk:");
    return set != NULL && (strtoull(set + 7, NULL, 16) >> (signal_number - 1) & 1) != 0;
}

static void a_forked_child_runs_no_handlers(void) {
    void (*was)(int) = signal(SIGINT, count_signal);
    int child = 0;
    REQUIRE(sys_fork(&child) == 0);
    /* From the first moment: a handler can never run. */
    CHECK(blocks(child, SIGINT) && !blocks((int)getpid(), SIGINT));
    CHECK(sys_reap(child) == 0);
    (void)signal(SIGINT, was);
}

static int fork_and_end(uintptr_t unused) {
    int child = 0;
    (void)unused;
    return sys_fork(&child);
}

static void a_forked_child_ends_with_its_parent_however_soon(void) {
    for (int i = 0; i < 20; i++) {
        int pipes[2];
        REQUIRE(pipe(pipes) == 0);
        CHECK(in_child(fork_and_end, 0) == 0);
        CHECK(close(pipes[1]) == 0);
        CHECK(all_have_ended(pipes[0]));
        CHECK(close(pipes[0]) == 0);
    }
}

static void write_to(void *end) {
    (void)write(*(const int *)end, "x", 1);
}

static void a_child_runs_its_life_and_ends(void) {
    int pipes[2], child = 0;
    char byte = 0;
    REQUIRE(pipe(pipes) == 0 && sys_fork_into(write_to, &pipes[1], &child) == 0);
    CHECK(read(pipes[0], &byte, 1) == 1 && byte == 'x');
    CHECK(close(pipes[1]) == 0 && all_have_ended(pipes[0]));
    CHECK(sys_reap(child) == 0 && close(pipes[0]) == 0);
}

static void a_thread_is_pinned_to_one_cpu(void) {
    cpu_set_t before, after;
    REQUIRE(sched_getaffinity(0, sizeof before, &before) == 0);
    int cpu = sched_getcpu();
    CHECK(sys_pin(-1) == EINVAL && sys_pin(8191) == EINVAL && sys_pin(1 << 30) == EINVAL);
    CHECK(sys_pin(cpu) == 0);
    CHECK(sched_getaffinity(0, sizeof after, &after) == 0 && CPU_COUNT(&after) == 1);
    CHECK(CPU_ISSET((size_t)cpu, &after));
    REQUIRE(sched_setaffinity(0, sizeof before, &before) == 0);
}

static void sleeping_takes_wall_time_and_no_cpu_time(void) {
    uint64_t wall = sys_nanoseconds(), cpu = sys_cpu_nanoseconds();
    sys_sleep(20000000);
    CHECK(sys_nanoseconds() - wall >= 20000000);
    CHECK(sys_cpu_nanoseconds() - cpu < 20000000);
}

static void an_opened_file_can_be_read(void) {
    int fd = -1;
    char byte;
    size_t got = 0;
    CHECK(sys_open("/nowhere/file", &fd) == ENOENT && fd == -1);
    REQUIRE(sys_open("/proc/self/maps", &fd) == 0);
    CHECK(sys_read(fd, 0, &byte, 1, &got) == 0 && got == 1);
    CHECK((fcntl(fd, F_GETFD) & FD_CLOEXEC) != 0 && close(fd) == 0);
}

static void a_barrier_needs_a_registration(void) {
    int err = sys_barrier();
    CHECK(err == EPERM || err == ENOSYS || err == EINVAL);
    if (sys_barrier_register() == 0)
        CHECK(sys_barrier() == 0);
    else
        SKIP("no membarrier");
}

static void trying_leaves_no_mapping_behind(void) {
    size_t before = witness_status("VmSize:");
    (void)sys_try_pagemap_scan();
    (void)sys_try_procmap_query();
    CHECK(witness_status("VmSize:") == before);
}

static void a_refused_try_is_an_errno(void) {
    int (*const tries[])(void) = {sys_try_pagemap_scan, sys_try_procmap_query};
    for (size_t i = 0; i < sizeof tries / sizeof tries[0]; i++) {
        int err = tries[i]();
        CHECK(err >= 0 && err < 4096);
        CHECK(tries[i]() == err);
    }
}

int main(void) {
    page = vm_page_size();
    RUN(the_clock_does_not_go_back);
    RUN(the_parent_is_the_parent);
    RUN(a_process_ends_with_the_parent_it_names);
    RUN(a_forked_child_lives_until_it_is_reaped);
    RUN(a_child_is_reaped_where_children_are_ignored);
    RUN(a_process_group_is_not_reaped);
    RUN(a_forked_child_runs_no_handlers);
    RUN(a_forked_child_ends_with_its_parent_however_soon);
    RUN(a_child_runs_its_life_and_ends);
    RUN(a_thread_is_pinned_to_one_cpu);
    RUN(sleeping_takes_wall_time_and_no_cpu_time);
    RUN(an_opened_file_can_be_read);
    RUN(a_barrier_needs_a_registration);
    RUN(trying_leaves_no_mapping_behind);
    RUN(a_refused_try_is_an_errno);
    return check_report("test_sys");
}
