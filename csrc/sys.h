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

/* Pages of a process that are alike, [start, end). */
struct sys_page_run {
    uint64_t start;
    uint64_t end;
    uint64_t is; /* the or-ed enum sys_page */
};

enum sys_page { SYS_PAGE_FILE = 4, SYS_PAGE_PRESENT = 8, SYS_PAGE_SWAPPED = 16, SYS_PAGE_ZERO = 32 };

/* Finds the pages of [from, end) that are in memory or in swap, through the /proc/PID/pagemap open at
 * `fd` (PAGEMAP_SCAN, Linux 6.7): up to `max` runs of them, `*found` of them, and `*next`, the address
 * to go on at. ENOTTY where the kernel has none of it. */
int sys_scan_pages(int fd, uint64_t from, uint64_t end, struct sys_page_run *runs, size_t max, size_t *found,
              uint64_t *next);

/* Reads up to `length` bytes of a file at an offset; `*got` is fewer at its end. */
int sys_read(int fd, uint64_t offset, void *bytes, size_t length, size_t *got);

/* Milliseconds of a clock that never goes back, good for a few of them; the number wraps round. */
uint32_t sys_milliseconds(void);

/* Nanoseconds of CLOCK_MONOTONIC. */
uint64_t sys_nanoseconds(void);

/* How often the kernel has taken the CPU away from this thread (ru_nivcsw of getrusage(2)). */
uint64_t sys_preemptions(void);

/* The parent's process id: what any system call costs, and nothing else. */
int sys_parent(void);

/* Ends this process when the thread of process `parent` that started it ends (Linux). ESRCH if that
 * process is gone already. */
int sys_end_with_parent(int parent);

/* Forks a child that does nothing and runs none of the caller's code. It lives until sys_reap, if the
 * thread that forked it lives as long, and ends with this process at the latest. No SIGCHLD tells of
 * its end, and no wait finds it unless it asks for __WALL or __WCLONE. sys_reap takes the id of one
 * process: 0 and negative ones are EINVAL. */
int sys_fork(int *child);
int sys_reap(int child);

/* Ask the running kernel by using a feature on this process's own files. 0: it works; an errno: it
 * was refused with that. */
int sys_try_pagemap_scan(void);
int sys_try_procmap_query(void);

#endif
