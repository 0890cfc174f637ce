/* A library to preload: makes the k-th memory call of pyreserve's extension fail. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

static long calls, failing; /* counted while armed; 0: none fails */
static int armed, error;

void faults_arm(long call, int with) {
    calls = 0;
    failing = call;
    error = with;
    armed = 1;
}

long faults_disarm(void) {
    armed = 0;
    return calls;
}

/* Whether the call with this return address is to fail. */
static int fails(void *caller) {
    Dl_info info;
    if (!armed || dladdr(caller, &info) == 0 || strstr(info.dli_fname, "_native") == NULL)
        return 0;
    if (++calls != failing)
        return 0;
    errno = error;
    return 1;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset) {
    if (fails(__builtin_return_address(0)))
        return MAP_FAILED;
    return NEXT(mmap)(address, length, protection, flags, fd, offset);
}

int munmap(void *address, size_t length) {
    return fails(__builtin_return_address(0)) ? -1 : NEXT(munmap)(address, length);
}

int mprotect(void *address, size_t length, int protection) {
    return fails(__builtin_return_address(0)) ? -1 : NEXT(mprotect)(address, length, protection);
}

int madvise(void *address, size_t length, int advice) {
    return fails(__builtin_return_address(0)) ? -1 : NEXT(madvise)(address, length, advice);
}
