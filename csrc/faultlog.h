/* faultlog: a sample of this process's page faults with their addresses, and its new mappings, by
 * perf_event_open(2). One fault of `period` is recorded.
 *
 * The kernel writes into one ring for each CPU. A full ring loses the records that follow. A fault
 * in a thread costs about 5 % more while a log that has the thread is open.
 *
 * A log is used by one thread at a time. In a forked child it has no records.
 */
#ifndef PYRESERVE_FAULTLOG_H
#define PYRESERVE_FAULTLOG_H

#include <stddef.h>
#include <stdint.h>

struct faultlog;

enum faultlog_kind {
    FAULTLOG_FAULT,     /* a page fault at `address` */
    FAULTLOG_ANONYMOUS, /* [address, address + length) is a new or changed mapping, private and
                           anonymous */
    FAULTLOG_OTHER,     /* the same, any other mapping */
    FAULTLOG_FORK,      /* this process forked */
    FAULTLOG_LOST       /* a full ring lost `length` records */
};

struct faultlog_record {
    uint64_t time; /* ns of CLOCK_MONOTONIC; 0 for FAULTLOG_LOST */
    uint64_t address;
    uint64_t length;
    uint64_t kind; /* enum faultlog_kind */
};

/* Starts a log of the threads with these numbers, and of threads that they start from now on
 * (Linux 5.13; before, of the given ones only). Threads that have ended are skipped. `ring` is a
 * power of two of bytes, whole OS pages.
 *
 * Returns 0 or an errno: EACCES, EPERM where it is not allowed (kernel.perf_event_paranoid,
 * seccomp, the limit on locked memory), ENOSYS, ENOENT where the kernel cannot, EMFILE. */
int faultlog_open(const int *threads, size_t count, uint64_t period, size_t ring,
                  struct faultlog **log);

/* Moves up to `max` records out of the rings; returns their number. Those of one CPU are in order
 * of time. */
size_t faultlog_take(struct faultlog *log, struct faultlog_record *records, size_t max);

/* Stops and frees it; in a forked child only frees its memory. NULL is allowed. */
void faultlog_close(struct faultlog *log);

#endif
