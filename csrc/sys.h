/* sys: the system calls that are not about this process's mappings: clocks, forking, reading files
 * and other processes.
 *
 * Like vm it decides nothing. Holds for every function here:
 *  - a function that can fail returns 0, or the errno with which the kernel refused;
 *  - out-parameters are written on success only;
 *  - any thread may call; nothing is kept between calls.
 */
#ifndef PYRESERVE_SYS_H
#define PYRESERVE_SYS_H

#include <stddef.h>
#include <stdint.h>

/* Adjacent pages [start, end) of a process that are in the same state. */
struct sys_page_run {
    uint64_t start;
    uint64_t end;
    uint64_t categories; /* a set of enum sys_page */
};

enum sys_page { SYS_PAGE_FILE = 4, SYS_PAGE_PRESENT = 8, SYS_PAGE_SWAPPED = 16, SYS_PAGE_ZERO = 32 };

/* Finds the pages of [from, end) that are in memory or in swap, by the /proc/PID/pagemap open at
 * `fd` (PAGEMAP_SCAN, Linux 6.7). Writes up to `max` runs, their number to `*found` and the address
 * at which to continue to `*next`. ENOTTY where the kernel has no such call. */
int sys_scan_pages(int fd, uint64_t from, uint64_t end, struct sys_page_run *runs, size_t max,
                   size_t *found, uint64_t *next);

/* Reads up to `length` bytes of a file at an offset; `*got` is how many, fewer at the end of the
 * file. */
int sys_read(int fd, uint64_t offset, void *bytes, size_t length, size_t *got);

/* Milliseconds of a monotonic clock with a resolution of a few milliseconds; wraps around after 49
 * days. About a fifth of the price of sys_nanoseconds. */
uint32_t sys_milliseconds(void);

/* Nanoseconds of CLOCK_MONOTONIC. */
uint64_t sys_nanoseconds(void);

/* The number of times that the kernel preempted this thread (ru_nivcsw of getrusage(2)). */
uint64_t sys_preemptions(void);

/* Nanoseconds of CPU time that this thread used. */
uint64_t sys_cpu_nanoseconds(void);

/* Sleeps at least this long, or until a signal. */
void sys_sleep(uint64_t nanoseconds);

/* Binds the calling thread to one CPU. EINVAL if there is no such CPU, or the process may not use
 * it. */
int sys_pin(int cpu);

/* Opens a file for reading; exec closes it. */
int sys_open(const char *path, int *fd);

/* Interrupts each CPU that runs another thread of this process, without a TLB flush (membarrier,
 * Linux 4.14). sys_barrier_register must have succeeded in this process. ENOSYS or EINVAL where the
 * kernel has no such call. */
int sys_barrier_register(void);
int sys_barrier(void);

/* The parent's process id (getppid): the cheapest system call, for measuring its overhead. */
int sys_parent(void);

/* Has the kernel end this process when the thread of process `parent` that started it ends. ESRCH
 * if that process has ended already. */
int sys_end_with_parent(int parent);

/* sys_fork creates a child that only waits: none of the caller's code or handlers run in it. It
 * lives until sys_reap, or until the thread that forked it ends. Its end sends no SIGCHLD, and only
 * a wait with __WALL or __WCLONE finds it. sys_reap ends it; `child` is one process, 0 and below
 * are EINVAL.
 *
 * The child of sys_fork_into runs `life`, which may call only this module and vm, with all signals
 * blocked; then it ends. Like the other child it ends earlier if its parent's thread does. */
int sys_fork(int *child);
int sys_fork_into(void (*life)(void *), void *argument, int *child);
int sys_reap(int child);

/* Test the running kernel by using a feature on this process's own files. 0: it works; else the
 * errno of the refusal. */
int sys_try_pagemap_scan(void);
int sys_try_procmap_query(void);

#endif
