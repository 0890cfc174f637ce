/* faults: refuses system calls on demand. Passed to vm_replace, faults_call forwards mapping calls to
 * the kernel and lets the k-th one fail. One thread only.
 *
 *   cc -shared -fPIC -O1 -o faults.so faults.c
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifdef SYS_mmap2
#define MMAP SYS_mmap2
#else
#define MMAP SYS_mmap
#endif
#ifndef SYS_mseal
#define SYS_mseal 462
#endif
#ifndef SYS_memfd_create
#define SYS_memfd_create (-1)
#endif

enum { CALLS = 4096 };

struct faults_call {
    int verb;       /* 'm' mmap, 'u' munmap, 'p' mprotect, 'a' madvise, 'n' prctl that names, 'r' mincore,
                       's' mseal, 'f' memfd_create, 't' ftruncate, 'l' fcntl, 'e' fallocate,
                       'c' close, '?' any other, which vm must not make */
    int argument;   /* flags of mmap, access of mprotect, advice of madvise, mode of fallocate */
    uint64_t length;
    int refused;    /* the errno of an injected refusal, else 0 */
};

static bool armed;
static size_t calls, from;
static bool more;
static int with;
static struct faults_call seen[CALLS];
static int64_t mapped;

/* Starts to count calls. Call number `k`, from 1 on, fails with `err`; with k = 0 none does. With
 * `and_alike` each later call with the same verb and `argument` fails too. */
void faults_arm(size_t k, int err, int and_alike) {
    calls = 0;
    from = k;
    with = err;
    more = and_alike != 0;
    armed = true;
}

/* Stops counting; returns the number of calls. */
size_t faults_disarm(void) {
    armed = false;
    return calls;
}

const struct faults_call *faults_seen(void) {
    return seen;
}

/* Bytes of addresses mapped minus unmapped since faults_call is in use. */
int64_t faults_mapped(void) {
    return mapped;
}

static struct faults_call call_of(long number, uintptr_t b, uintptr_t c, uintptr_t d) {
    switch (number) {
    case MMAP:
        return (struct faults_call){
            'm', (int)d & ~(MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE), b, 0};
    case SYS_munmap:
        return (struct faults_call){'u', 0, b, 0};
    case SYS_mprotect:
        return (struct faults_call){'p', (int)c, b, 0};
    case SYS_madvise:
        return (struct faults_call){'a', (int)c, b, 0};
    case SYS_prctl:
        return (struct faults_call){'n', 0, d, 0};
    case SYS_mincore:
        return (struct faults_call){'r', 0, b, 0};
    case SYS_mseal:
        return (struct faults_call){'s', 0, b, 0};
    case SYS_memfd_create:
        return (struct faults_call){'f', 0, 0, 0};
    case SYS_ftruncate:
        return (struct faults_call){'t', 0, b, 0};
    case SYS_fcntl:
        return (struct faults_call){'l', 0, 0, 0};
    case SYS_fallocate:
        return (struct faults_call){'e', (int)b, d, 0};
    case SYS_close:
        return (struct faults_call){'c', 0, 0, 0};
    default:
        return (struct faults_call){'?', (int)number, 0, 0};
    }
}

/* Records the call; returns the errno with which it must fail, or 0. */
static int refuse(struct faults_call call) {
    if (!armed)
        return 0;
    size_t number = ++calls;
    if (from != 0 && number >= from && from <= CALLS) {
        const struct faults_call *first = &seen[from - 1];
        bool alike = number > from && first->verb == call.verb && first->argument == call.argument;
        call.refused = number == from || (more && alike) ? with : 0;
    }
    if (number <= CALLS)
        seen[number - 1] = call;
    return call.refused;
}

/* A vm_system_call of csrc/vm.h. */
intptr_t faults_call(long number, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t d, uintptr_t e,
                     uintptr_t f) {
    int refused = refuse(call_of(number, b, c, d));
    if (refused != 0)
        return -refused;
    intptr_t got = syscall(number, a, b, c, d, e, f);
    if (got == -1)
        return -errno;
    if (number == MMAP && !((int)d & MAP_FIXED))
        mapped += (int64_t)b;
    else if (number == SYS_munmap)
        mapped -= (int64_t)b;
    return got;
}
