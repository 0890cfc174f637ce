/* bystanders: measures what a thread's calls on mappings cost the other threads of its process.
 *
 * A thread, the caller, makes one call after the other: it unmaps a used piece of memory, discards
 * it, ... Other threads of the process, the bystanders, compute, read or fault at the same time,
 * each bound to a CPU of its own. A call that makes translations of addresses invalid interrupts each CPU that
 * runs a bystander (a TLB shootdown) and waits for it, so it costs both sides.
 *
 * Time is divided into windows. In an "on" window the caller is a thread of this process. In an
 * "off" window a second process makes the same calls on the same CPU: the load of the machine is the
 * same, but the bystanders are not concerned. The difference of an on and an off window is what
 * sharing a process costs. Or the second process reads /proc files of this process (on) or of its
 * own (off) while the caller calls.
 *
 * Nothing is averaged or dropped here: each thread's counts of each window are returned, with what
 * shows that it was disturbed.
 */
#ifndef PYRESERVE_BYSTANDERS_H
#define PYRESERVE_BYSTANDERS_H

#include <stddef.h>
#include <stdint.h>

/* The call that is timed. What prepares the next one (mapping again, storing a byte into each
 * page) is not. */
enum bystanders_call {
    BYSTANDERS_NO_CALL,      /* the caller sleeps, and there is no second process */
    BYSTANDERS_BARRIER,      /* sys_barrier: a bare interrupt */
    BYSTANDERS_RELEASE,      /* vm_release */
    BYSTANDERS_PROTECT,      /* vm_protect to VM_RESERVED */
    BYSTANDERS_DISCARD,      /* vm_discard */
    BYSTANDERS_DISCARD_LAZY, /* vm_discard_lazy */
    BYSTANDERS_RENEW         /* vm_renew as VM_COMMITTED */
};

enum bystanders_work {
    BYSTANDERS_SPIN,         /* reads the clock, and adds up the gaps between two readings */
    BYSTANDERS_READ,         /* loads at random from memory of its own */
    BYSTANDERS_FAULT_SHARED, /* stores into new pages of the mapping that holds the caller's piece */
    BYSTANDERS_FAULT_OWN     /* stores into new pages of a mapping of its own */
};

enum bystanders_second {
    BYSTANDERS_NOBODY, /* there is no second process: in off windows nobody calls */
    BYSTANDERS_CALLS,  /* makes the calls in off windows */
    BYSTANDERS_MAPS,   /* reads /proc/PID/maps in all windows, and the caller calls in all windows */
    BYSTANDERS_ROLLUP  /* the same with /proc/PID/smaps_rollup */
};

struct bystanders_setup {
    int call;
    int work;
    int second;
    size_t length;    /* of the caller's piece; whole OS pages */
    size_t huge;      /* 0, or the size of a transparent huge page: the piece is one; length is equal */
    size_t n;         /* bystanders, up to BYSTANDERS_MOST */
    const int *cpus;  /* n + 1: of the caller, and of each bystander */
    int second_cpu;   /* of the second process; for BYSTANDERS_CALLS usually cpus[0] */
    size_t bytes;     /* memory of each bystander that reads or faults; whole OS pages */
    size_t resident;  /* further memory that this process has in use; whole OS pages or 0 */
    uint64_t window;  /* length of a window in ns, from 0.1 ms to 10 s */
};

enum { BYSTANDERS_MOST = 4096, BYSTANDERS_MOST_WINDOWS = 4096 };

/* A thread's counts of one window. */
struct bystanders_sample {
    uint64_t wall;        /* ns from the thread's start of the window to its end */
    uint64_t cpu;         /* ns of CPU time in between */
    uint64_t late;        /* ns by which it started late */
    uint64_t preemptions; /* in between */
    uint64_t work;        /* calls; or readings of the clock, loads, faults */
    uint64_t lost;        /* ns: a caller's time in its calls; a spinner's time in gaps */
    uint64_t longest;     /* ns: the longest call or gap */
};

/* Runs `windows` windows; on[w] is 1 or 0. The counts of window w are samples[w * (n + 1) + t], with
 * t = 0 for the caller, in an off window that of the second process, and t = 1, ... for the
 * bystanders. All are zero for a caller that does not call.
 *
 * Two calls come before the first window, since first calls may differ. A window ends for all
 * threads when the last call that began in it has ended, or early when a
 * bystander has faulted in all its pages. Windows are about 0.4 ms apart; all threads wait for each
 * other in between.
 *
 * Returns 0 or the first errno: of the kernel, ENODATA if the piece did not become a huge page,
 * ETIMEDOUT if a thread or the second process did not arrive within 20 s, EINVAL for a malformed
 * setup, before anything is done. In every case the threads, the second process and the memory are
 * gone again, and `samples` is written on success only. For small pages transparent huge pages must
 * be off (vm_allow_huge). One run at a time in a process: others would disturb it. */
int bystanders_run(const struct bystanders_setup *setup, const unsigned char *on, size_t windows,
                   struct bystanders_sample *samples);

#endif
