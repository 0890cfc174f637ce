#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef CLOCK_MONOTONIC_COARSE /* Linux only; a fifth of the cost */
#define CLOCK_MONOTONIC_COARSE CLOCK_MONOTONIC
#endif

/* Of <linux/membarrier.h>, which older headers lack. */
enum { BARRIER_EXPEDITED = 1 << 3, BARRIER_REGISTER = 1 << 4 };

int sys_scan_pages(int fd, uint64_t from, uint64_t end, struct sys_page_run *runs, size_t max,
                   size_t *found, uint64_t *next) {
    /* struct pm_scan_arg of <linux/fs.h>; struct sys_page_run is its struct page_region. */
    struct {
        uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
        uint64_t inverted, mask, anyof_mask, return_mask;
    } scan = {0};
    scan.size = sizeof scan;
    scan.start = from;
    scan.end = end;
    scan.vec = (uintptr_t)runs;
    scan.vec_len = max;
    scan.anyof_mask = SYS_PAGE_PRESENT | SYS_PAGE_SWAPPED;
    scan.return_mask = scan.anyof_mask | SYS_PAGE_ZERO | SYS_PAGE_FILE;
    int count = ioctl(fd, _IOWR('f', 16, scan), &scan);
    if (count < 0)
        return errno;
    if (scan.walk_end <= from) /* no progress: the caller would loop forever */
        return EIO;
    *found = (size_t)count;
    *next = scan.walk_end;
    return 0;
}

int sys_read(int fd, uint64_t offset, void *bytes, size_t length, size_t *got) {
    ssize_t read = pread(fd, bytes, length, (off_t)offset);
    if (read < 0)
        return errno;
    *got = (size_t)read;
    return 0;
}

uint32_t sys_milliseconds(void) {
    struct timespec now = {0};
    (void)clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return (uint32_t)((uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000);
}

uint64_t sys_nanoseconds(void) {
    struct timespec now = {0};
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

uint64_t sys_preemptions(void) {
    struct rusage usage = {0};
    (void)getrusage(RUSAGE_THREAD, &usage);
    return (uint64_t)usage.ru_nivcsw;
}

uint64_t sys_cpu_nanoseconds(void) {
    struct timespec used = {0};
    (void)clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
    return (uint64_t)used.tv_sec * 1000000000 + (uint64_t)used.tv_nsec;
}

void sys_sleep(uint64_t nanoseconds) {
    struct timespec length = {(time_t)(nanoseconds / 1000000000), (long)(nanoseconds % 1000000000)};
    (void)nanosleep(&length, NULL);
}

int sys_pin(int cpu) {
    enum { MOST_CPUS = 1 << 13 };
    unsigned long set[MOST_CPUS / (8 * sizeof(unsigned long))] = {0};
    if (cpu < 0 || cpu >= MOST_CPUS)
        return EINVAL;
    size_t bits = 8 * sizeof set[0];
    set[(size_t)cpu / bits] = 1UL << (size_t)cpu % bits;
    return sched_setaffinity(0, sizeof set, (const cpu_set_t *)set) == 0 ? 0 : errno;
}

int sys_open(const char *path, int *fd) {
    int opened = open(path, O_RDONLY | O_CLOEXEC);
    if (opened < 0)
        return errno;
    *fd = opened;
    return 0;
}

static int barrier(int command) {
#ifdef SYS_membarrier
    return syscall(SYS_membarrier, command, 0, 0) == 0 ? 0 : errno;
#else
    (void)command;
    return ENOSYS;
#endif
}

int sys_barrier_register(void) {
    return barrier(BARRIER_REGISTER);
}

int sys_barrier(void) {
    return barrier(BARRIER_EXPEDITED);
}

int sys_parent(void) {
    return (int)getppid();
}

int sys_end_with_parent(int parent) {
    int err = prctl(PR_SET_PDEATHSIG, SIGKILL) == 0 ? 0 : errno;
    if (err == 0 && getppid() != parent)
        err = ESRCH;
    return err;
}

static void idle(void *unused) {
    (void)unused;
    for (;;)
        (void)pause();
}

int sys_fork(int *child) {
    return sys_fork_into(idle, NULL, child);
}

int sys_fork_into(void (*life)(void *), void *argument, int *child) {
    int parent = (int)getpid();
    sigset_t every, before;
    (void)sigfillset(&every);
    (void)pthread_sigmask(SIG_SETMASK, &every, &before); /* signal handlers are the caller's code */
    /* The system call itself: the C library's fork runs at-fork handlers. No SIGCHLD: the caller
     * may handle it, or ignore it, and then there would be no child left to wait for. */
    long pid = syscall(SYS_clone, 0, 0, 0, 0, 0);
    if (pid == 0) {
        if (sys_end_with_parent(parent) == 0)
            life(argument);
        _exit(0);
    }
    int err = pid < 0 ? errno : 0;
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (err == 0)
        *child = (int)pid;
    return err;
}

int sys_reap(int child) {
    if (child <= 0)
        return EINVAL; /* kill(2) reads these as process groups */
    if (kill(child, SIGKILL) != 0)
        return errno;
    while (waitpid(child, NULL, __WALL) < 0)
        if (errno != EINTR)
            return errno;
    return 0;
}

static int try_ioctl(const char *path, unsigned long request, void *argument) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return errno;
    int err = ioctl(fd, request, argument) < 0 ? errno : 0;
    (void)close(fd);
    return err;
}

int sys_try_pagemap_scan(void) {
    struct sys_page_run run;
    size_t found;
    uint64_t next;
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return errno;
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), address = (uintptr_t)&run / page * page;
    int err = sys_scan_pages(fd, address, address + page, &run, 1, &found, &next);
    (void)close(fd);
    return err;
}

int sys_try_procmap_query(void) {
    /* struct procmap_query of <linux/fs.h>, Linux 6.11. */
    struct {
        uint64_t size, query_flags, query_addr, vma_start, vma_end, vma_flags, vma_page_size;
        uint64_t vma_offset, inode;
        uint32_t dev_major, dev_minor, vma_name_size, build_id_size;
        uint64_t vma_name_addr, build_id_addr;
    } query = {0};
    query.size = sizeof query;
    query.query_addr = (uintptr_t)&query;
    return try_ioctl("/proc/self/maps", _IOWR('f', 17, query), &query);
}
