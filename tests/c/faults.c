/* faults: refuses system calls on demand. Preloaded (LD_PRELOAD), it stands between a process and
 * the C library's mmap, munmap, mprotect and madvise, sees those that come from pyreserve's
 * extension, and lets the k-th of them fail. Everybody else's pass untouched. One thread only.
 *
 *   cc -shared -fPIC -O1 -o faults.so faults.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { CALLS = 4096 };

struct faults_call {
    int verb;       /* 'm' mmap, 'u' munmap, 'p' mprotect, 'a' madvise */
    int how;        /* flags of mmap, access of mprotect, advice of madvise */
    uint64_t length;
    int refused;    /* by us: the errno; else 0 */
};

static bool armed;
static size_t calls, from;
static bool more;
static int with;
static struct faults_call seen[CALLS];
static int64_t mapped;

/* From now on calls are counted, and the one with number `k`, from 1 on, fails with `err`; 0: none.
 * So does, if `and_alike`, each later one that is like it, verb and how. */
void faults_arm(size_t k, int err, int and_alike) {
    calls = 0;
    from = k;
    with = err;
    more = and_alike != 0;
    armed = true;
}

/* How many calls there were. */
size_t faults_disarm(void) {
    armed = false;
    return calls;
}

const struct faults_call *faults_seen(void) {
    return seen;
}

/* Bytes of addresses that the extension has mapped and not unmapped, since the process began. */
int64_t faults_mapped(void) {
    return mapped;
}

static bool from_the_extension(const void *caller) {
    Dl_info info;
    return dladdr(caller, &info) != 0 && info.dli_fname != NULL &&
           strstr(info.dli_fname, "_native") != NULL;
}

/* Notes the call, and tells whether it shall fail; errno is set then. */
static bool refuse(const void *caller, int verb, int how, size_t length) {
    if (!armed || !from_the_extension(caller))
        return false;
    struct faults_call call = {verb, how, length, 0};
    size_t number = ++calls;
    if (from != 0 && number >= from && from <= CALLS) {
        const struct faults_call *first = &seen[from - 1];
        bool alike = number > from && first->verb == verb && first->how == how;
        call.refused = number == from || (more && alike) ? with : 0;
    }
    if (number <= CALLS)
        seen[number - 1] = call;
    if (call.refused != 0)
        errno = call.refused;
    return call.refused != 0;
}

static void *map(const void *caller, void *address, size_t length, int access, int flags, int fd,
                 off_t offset) {
    if (refuse(caller, 'm', flags & ~(MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE), length))
        return MAP_FAILED;
#ifdef SYS_mmap2
    void *got = (void *)syscall(SYS_mmap2, address, length, access, flags, fd, offset >> 12);
#else
    void *got = (void *)syscall(SYS_mmap, address, length, access, flags, fd, offset);
#endif
    if (got != MAP_FAILED && !(flags & MAP_FIXED) && from_the_extension(caller))
        mapped += (int64_t)length;
    return got;
}

void *mmap(void *address, size_t length, int access, int flags, int fd, off_t offset) {
    return map(__builtin_return_address(0), address, length, access, flags, fd, offset);
}

#ifndef mmap64 /* with large files, a name for mmap itself */
void *mmap64(void *address, size_t length, int access, int flags, int fd, off64_t offset) {
    return map(__builtin_return_address(0), address, length, access, flags, fd, (off_t)offset);
}
#endif

int munmap(void *address, size_t length) {
    const void *caller = __builtin_return_address(0);
    if (refuse(caller, 'u', 0, length))
        return -1;
    int status = (int)syscall(SYS_munmap, address, length);
    if (status == 0 && from_the_extension(caller))
        mapped -= (int64_t)length;
    return status;
}

int mprotect(void *address, size_t length, int access) {
    if (refuse(__builtin_return_address(0), 'p', access, length))
        return -1;
    return (int)syscall(SYS_mprotect, address, length, access);
}

int madvise(void *address, size_t length, int advice) {
    if (refuse(__builtin_return_address(0), 'a', advice, length))
        return -1;
    return (int)syscall(SYS_madvise, address, length, advice);
}
