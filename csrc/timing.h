/* timing: measures how long the verbs of vm take, from 0.1 us for a system call to milliseconds for
 * the first touch of many pages.
 *
 * A program is a list of steps on one mapping: reserve, commit, touch, discard, ... A step with a
 * slot is timed by CLOCK_MONOTONIC. Each time it runs it gives one sample: nanoseconds minus the
 * cost of reading the clock. The other steps only bring the mapping into the state that a timed
 * step needs. Samples are neither averaged nor dropped here.
 *
 * Samples of some microseconds or more during which the thread may have been preempted (it was since
 * the previous such sample) are flagged in `preempted`.
 *
 * With several threads, each runs the program on a mapping of its own in the same address space.
 * They start each step together, so the samples include the wait for the kernel's locks.
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
    TIMING_UNMAP,       /* vm_release of the piece; TIMING_MAP of it must follow */
    TIMING_MAP,         /* vm_map_at of the piece as VM_COMMITTED */
    TIMING_ADVISE,      /* vm_advise of the program's advice; a new mapping has none */
    TIMING_WRITE,       /* stores a byte into every OS page */
    TIMING_REWRITE,     /* the same, into another cache line of each page */
    TIMING_READ,        /* loads a byte of every OS page */
    TIMING_POPULATE,
    TIMING_DISCARD,
    TIMING_DISCARD_LAZY,
    TIMING_COLLAPSE,
    TIMING_HUGE_PREFER, /* vm_advise VM_HUGE_PREFER, for pages that are collapsed later */
    TIMING_GUARD,
    TIMING_UNGUARD,
    TIMING_FORK, /* the child lives until TIMING_REAP, which must follow; one thread only */
    TIMING_REAP,
    TIMING_SYSTEM_CALL /* getppid: the cost of entering the kernel */
};

struct timing_step {
    int verb;        /* enum timing_verb */
    int slot;        /* index of its samples; -1: not timed */
    size_t offset;   /* the piece [offset, offset + length) of the mapping, whole OS pages */
    size_t length;
    uint32_t repeat; /* calls per sample, which is their mean; 1 for a verb that changes the state it
                        needs, always for RESERVE, RELEASE, UNMAP, MAP, FORK and REAP */
};

struct timing_program {
    const struct timing_step *steps;
    size_t nsteps;
    size_t nslots;
    size_t length; /* of the mapping */
    size_t align;  /* a power of two; 0: the kernel chooses the address */
    size_t phase;  /* the address modulo align; whole OS pages */
    int access;    /* VM_NORESERVE or 0 */
    int advice;    /* enum vm_advice, given by TIMING_ADVISE */
};

/* Runs a program `rounds` times on each of `threads` threads. The sample of slot s, round r, thread
 * t is samples[i], i = (s * rounds + r) * threads + t, and preempted[i] is 1 or 0.
 *
 * Returns 0 or the errno of the first step that was refused. `*failed` is its index (nsteps: a
 * thread could not be created) and `*done` the number of complete rounds, the same for all threads.
 * In every case the mappings, threads and children are gone again. EINVAL, before any step, if the
 * program is malformed; whether the memory that it writes and reads is accessible is not
 * checked. */
int timing_run(const struct timing_program *program, size_t threads, size_t rounds, double *samples,
               unsigned char *preempted, size_t *done, size_t *failed);

/* The cost of reading the clock, subtracted from every sample: the median difference of two
 * consecutive readings, ns. */
double timing_clock(void);

#endif
