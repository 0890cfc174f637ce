/* timing: what the verbs of vm take, measured without anything else in the measured part.
 *
 * A program is a list of steps on one mapping: reserve, commit, touch, discard, ... A step that has
 * a slot is timed with CLOCK_MONOTONIC, and each time it runs gives one sample: nanoseconds, less
 * what reading the clock takes. All other steps only bring the mapping into the state that the
 * timed ones want. Nothing is averaged here, and no sample is left out.
 *
 * A sample into which another process's turn on the CPU fell tells of that process too; it is said of
 * which samples that may be true: the CPU was taken away since the sample before.
 *
 * With several threads each runs the program on a mapping of its own, in one address space, and
 * they begin every step together, so what a step costs then holds the price of the kernel's locks.
 */
#ifndef PYRESERVE_TIMING_H
#define PYRESERVE_TIMING_H

#include <stddef.h>
#include <stdint.h>

enum timing_verb {
    TIMING_RESERVE,     /* vm_map of the whole mapping; comes first */
    TIMING_RELEASE,     /* vm_release of the whole mapping; comes last */
    TIMING_COMMIT,      /* vm_protect to VM_COMMITTED */
    TIMING_COMMIT_MAP,  /* vm_renew as VM_COMMITTED */
    TIMING_UNCOMMIT,    /* vm_protect to VM_RESERVED */
    TIMING_DECOMMIT,    /* vm_renew as VM_RESERVED */
    TIMING_DISCARD_OFF, /* vm_discard, then vm_protect to VM_RESERVED */
    TIMING_ADVISE,      /* vm_advise of the program's advice: a fresh mapping has none */
    TIMING_WRITE,       /* stores a byte into every OS page */
    TIMING_REWRITE,     /* the same, into another cache line of each */
    TIMING_READ,        /* loads a byte of every OS page */
    TIMING_POPULATE,
    TIMING_DISCARD,
    TIMING_DISCARD_LAZY,
    TIMING_COLLAPSE,
    TIMING_HUGE_PREFER, /* vm_advise VM_HUGE_PREFER, for pages that are collapsed later */
    TIMING_GUARD,
    TIMING_UNGUARD,
    TIMING_FORK, /* the child stays until the TIMING_REAP that must follow; for one thread */
    TIMING_REAP,
    TIMING_SYSTEM_CALL /* getppid: what entering the kernel costs */
};

struct timing_step {
    int verb;        /* enum timing_verb */
    int slot;        /* which slot takes the time; -1: not timed */
    size_t offset;   /* the piece [offset, offset + length) of the mapping, whole OS pages */
    size_t length;
    uint32_t repeat; /* how many times one sample does it and is divided by; 1 unless the verb finds
                        the same state again, as RESERVE, RELEASE, FORK and REAP never do */
};

struct timing_program {
    const struct timing_step *steps;
    size_t nsteps;
    size_t nslots;
    size_t length; /* of the mapping */
    size_t align;  /* a power of two; 0: the mapping lies wherever the kernel likes */
    size_t phase;  /* its address is this much above a multiple of align, less than one; whole OS
                      pages */
    size_t huge;   /* page size of hugetlb pages; 0: ordinary memory. length is whole ones, align 0 */
    int access;    /* VM_NORESERVE or 0 */
    int advice;    /* enum vm_advice, given by TIMING_ADVISE */
};

/* Runs a program `rounds` times on each of `threads` threads. The sample of slot s, round r, thread t
 * is samples[i], i = (s * rounds + r) * threads + t, and preempted[i] is 1 or 0.
 *
 * 0, or the errno with which a step was refused; *failed is then its index (nsteps: a thread could
 * not be made), and how many rounds were whole is in *done, the same for all threads. Nothing stays
 * mapped, and no thread or child stays, whatever happens. EINVAL, with nothing done, if the program
 * makes no sense; but it has to take care itself that what it writes and reads is accessible. */
int timing_run(const struct timing_program *program, size_t threads, size_t rounds, double *samples,
               unsigned char *preempted, size_t *done, size_t *failed);

/* The median of what two readings of the clock in a row are apart, ns: taken off every sample. */
double timing_clock(void);

#endif
