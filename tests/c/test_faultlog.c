#define _GNU_SOURCE
#include "faultlog.h"

#include <errno.h>
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "vm.h"

enum { PAGES = 4096, MOST = 1 << 16 };
static size_t page;
static struct faultlog_record records[MOST];

/* A log of this thread that records every fault; NULL where the kernel allows none. */
static struct faultlog *opened(size_t ring) {
    struct faultlog *log = NULL;
    int self = (int)gettid();
    int err = faultlog_open(&self, 1, 1, ring, &log);
    if (err) {
        CHECK(log == NULL);
        SKIP("page faults cannot be logged here");
    }
    return log;
}

/* Maps, touches and releases PAGES small pages; returns their address. */
static uintptr_t touched(void) {
    uintptr_t address = 0;
    REQUIRE(vm_map(0, PAGES * page, VM_COMMITTED, &address) == 0);
    REQUIRE(vm_advise(address, PAGES * page, VM_HUGE_NEVER) == 0);
    for (size_t i = 0; i < PAGES; i++)
        ((volatile char *)address)[i * page] = 1;
    REQUIRE(vm_release(address, PAGES * page) == 0);
    return address;
}

static void *touched_in_thread(void *address) {
    *(uintptr_t *)address = touched();
    return NULL;
}

static size_t faults_in(uintptr_t address, size_t n) {
    size_t faults = 0;
    for (size_t i = 0; i < n; i++)
        faults += records[i].kind == FAULTLOG_FAULT && records[i].address >= address &&
                  records[i].address < address + PAGES * page;
    return faults;
}

static void every_fault_and_mapping_is_recorded(void) {
    struct faultlog *log = opened(256 * page);
    if (log == NULL)
        return;
    uintptr_t address = touched();
    size_t n = faultlog_take(log, records, MOST), mapped = 0;
    for (size_t i = 0; i < n; i++)
        mapped += records[i].kind == FAULTLOG_ANONYMOUS && records[i].address <= address &&
                  records[i].address + records[i].length >= address + PAGES * page;
    CHECK(faults_in(address, n) == PAGES);
    CHECK(mapped >= 1);
    CHECK(faultlog_take(log, records, MOST) < n);
    faultlog_close(log);
}

static void threads_that_start_later_are_recorded(void) {
    struct faultlog *log = opened(256 * page);
    if (log == NULL)
        return;
    pthread_t thread;
    uintptr_t address = 0;
    REQUIRE(pthread_create(&thread, NULL, touched_in_thread, &address) == 0);
    REQUIRE(pthread_join(thread, NULL) == 0);
    size_t faults = faults_in(address, faultlog_take(log, records, MOST));
    CHECK(faults == PAGES || faults == 0); /* 0 before Linux 5.13 */
    faultlog_close(log);
}

static void a_full_ring_says_so(void) {
    struct faultlog *log = opened(4 * page);
    if (log == NULL)
        return;
    for (int i = 0; i < 3; i++)
        (void)touched();
    CHECK(faultlog_take(log, records, MOST) < 4 * page / 16);
    (void)touched(); /* the kernel reports the loss before the next record */
    size_t n = faultlog_take(log, records, MOST), lost = 0;
    for (size_t i = 0; i < n; i++)
        lost += records[i].kind == FAULTLOG_LOST && records[i].length > 0;
    CHECK(lost >= 1);
    faultlog_close(log);
}

/* Many turns of a ring whose size is no multiple of a record: records wrap around its end. */
static void records_wrap_around(void) {
    struct faultlog *log = opened(64 * page);
    if (log == NULL)
        return;
    for (int i = 0; i < 20; i++) {
        uintptr_t address = touched();
        CHECK(faults_in(address, faultlog_take(log, records, MOST)) == PAGES);
    }
    faultlog_close(log);
}

static void a_fork_is_recorded(void) {
    struct faultlog *log = opened(64 * page);
    if (log == NULL)
        return;
    pid_t child = fork();
    if (child == 0)
        _exit(0);
    REQUIRE(waitpid(child, NULL, 0) == child);
    size_t n = faultlog_take(log, records, MOST), forks = 0;
    for (size_t i = 0; i < n; i++)
        forks += records[i].kind == FAULTLOG_FORK;
    CHECK(forks == 1);
    faultlog_close(log);
}

/* The child does not inherit the rings, and may have other mappings at their addresses. */
static void a_child_may_close_it(void) {
    struct faultlog *log = opened(4 * page);
    if (log == NULL)
        return;
    (void)touched();
    pid_t child = fork();
    if (child == 0) {
        size_t n = faultlog_take(log, records, MOST);
        faultlog_close(log);
        _exit(n == 0 ? 0 : 1);
    }
    int status = 1;
    REQUIRE(waitpid(child, &status, 0) == child);
    CHECK(status == 0);
    CHECK(faultlog_take(log, records, MOST) > 0);
    faultlog_close(log);
}

static void few_records_are_taken_at_a_time(void) {
    struct faultlog *log = opened(256 * page);
    if (log == NULL)
        return;
    uintptr_t address = touched();
    size_t faults = 0, n;
    while ((n = faultlog_take(log, records, 7)) > 0) {
        CHECK(n <= 7);
        faults += faults_in(address, n);
    }
    CHECK(faults == PAGES);
    faultlog_close(log);
}

static void arguments_are_checked(void) {
    struct faultlog *log = NULL;
    int self = (int)gettid(), nobody = 0x3fffffff;
    CHECK(faultlog_open(&self, 0, 1, 4 * page, &log) == EINVAL);
    CHECK(faultlog_open(&self, 1, 0, 4 * page, &log) == EINVAL);
    CHECK(faultlog_open(&self, 1, 1, 3 * page, &log) == EINVAL);
    CHECK(faultlog_open(&self, 1, 1, 0, &log) == EINVAL);
    CHECK(faultlog_open(&nobody, 1, 1, 4 * page, &log) != 0);
    CHECK(log == NULL);
    faultlog_close(NULL);
}

int main(void) {
    page = vm_page_size();
    RUN(every_fault_and_mapping_is_recorded);
    RUN(threads_that_start_later_are_recorded);
    RUN(a_full_ring_says_so);
    RUN(records_wrap_around);
    RUN(a_fork_is_recorded);
    RUN(a_child_may_close_it);
    RUN(few_records_are_taken_at_a_time);
    RUN(arguments_are_checked);
    return check_report("test_faultlog");
}
