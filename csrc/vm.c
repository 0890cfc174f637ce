#define _GNU_SOURCE
#include "vm.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Values of the kernel's interface that older C libraries do not name. */
#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif
#ifndef MADV_FREE
#define MADV_FREE 8
#endif
#ifndef MADV_WIPEONFORK
#define MADV_WIPEONFORK 18
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#define MADV_GUARD_REMOVE 103
#endif
#ifndef MAP_HUGE_SHIFT
#define MAP_HUGE_SHIFT 26
#endif
#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41
#endif
#ifndef PR_SET_VMA_ANON_NAME
#define PR_SET_VMA_ANON_NAME 0
#endif
#ifndef SYS_mseal
#define SYS_mseal 462
#endif

#ifndef SYS_memfd_create
#if defined(__x86_64__)
#define SYS_memfd_create 319
#elif defined(__i386__)
#define SYS_memfd_create 356
#elif defined(__arm__)
#define SYS_memfd_create 385
#else
#define SYS_memfd_create 279 /* asm-generic, which aarch64 uses */
#endif
#endif
enum { CLOSE_ON_EXEC = 1, ALLOW_SEALING = 2, NO_EXEC_SEAL = 8 }; /* MFD_ */
enum { SEAL_SEAL = 1, SEAL_SHRINK = 2, SEAL_GROW = 4 };          /* F_SEAL_ */
enum { KEEP_SIZE = 1, PUNCH_HOLE = 2 };                          /* FALLOC_FL_ */
#ifndef F_ADD_SEALS
#define F_ADD_SEALS 1033
#endif

/* On 32-bit systems SYS_mmap, where there is one, takes its arguments from a structure. */
#ifdef SYS_mmap2
#define VM_SYS_MMAP SYS_mmap2
#else
#define VM_SYS_MMAP SYS_mmap
#endif

enum { MOST_ERRNO = 4095 }; /* the kernel's results from -MOST_ERRNO to -1 are errors */

/* Sanitizers observe mappings through the C library's functions, which they replace. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_HWADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(hwaddress_sanitizer) ||                      \
    __has_feature(memory_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#endif

static void *pointer(uintptr_t address) {
    return (void *)address;
}

#ifdef SANITIZED
static intptr_t library_call(long number, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t d,
                             uintptr_t e, uintptr_t f) {
    if (number == VM_SYS_MMAP)
        return (intptr_t)mmap(pointer(a), b, (int)c, (int)d, (int)e, 0);
    if (number == SYS_munmap)
        return munmap(pointer(a), b);
    if (number == SYS_mprotect)
        return mprotect(pointer(a), b, (int)c);
    if (number == SYS_madvise)
        return madvise(pointer(a), b, (int)c);
    if (number == SYS_mincore)
        return mincore(pointer(a), b, (unsigned char *)pointer(c));
    if (number == SYS_prctl)
        return prctl((int)a, b, c, d, e);
    return syscall(number, a, b, c, d, e, f);
}
#endif

static intptr_t default_call(long number, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t d,
                             uintptr_t e, uintptr_t f) {
#ifdef SANITIZED
    intptr_t got = library_call(number, a, b, c, d, e, f);
#else
    intptr_t got = syscall(number, a, b, c, d, e, f);
#endif
    return got == -1 ? -errno : got;
}

static vm_system_call mapping_call = default_call;

vm_system_call vm_replace(vm_system_call call) {
    return __atomic_exchange_n(&mapping_call, call == NULL ? default_call : call, __ATOMIC_ACQ_REL);
}

/* Makes a mapping call: 0 or the errno. `address`, unless NULL, receives the result of mmap. */
static int call_kernel(long number, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t d, uintptr_t e,
                       uintptr_t f, uintptr_t *address) {
    vm_system_call call = __atomic_load_n(&mapping_call, __ATOMIC_ACQUIRE);
    intptr_t got = call(number, a, b, c, d, e, f);
    if (got < 0 && got >= -MOST_ERRNO)
        return (int)-got;
    if (address != NULL)
        *address = (uintptr_t)got;
    return 0;
}

static int protect(uintptr_t address, size_t length, int access) {
    return call_kernel(SYS_mprotect, address, length, (uintptr_t)access, 0, 0, 0, NULL);
}

static int advise(uintptr_t address, size_t length, int advice) {
    return call_kernel(SYS_madvise, address, length, (uintptr_t)advice, 0, 0, 0, NULL);
}

static int protection(int access) {
    return (access & VM_COMMITTED) ? PROT_READ | PROT_WRITE : PROT_NONE;
}

static int map(uintptr_t hint, size_t length, int access, int fixed, uintptr_t *address) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | fixed;
    if (access & VM_NORESERVE)
        flags |= MAP_NORESERVE;
    return call_kernel(VM_SYS_MMAP, hint, length, (uintptr_t)protection(access), (uintptr_t)flags,
                       (uintptr_t)-1, 0, address);
}

size_t vm_page_size(void) {
    return (size_t)sysconf(_SC_PAGESIZE);
}

int vm_map(uintptr_t hint, size_t length, int access, uintptr_t *address) {
    return map(hint, length, access, 0, address);
}

int vm_map_at(uintptr_t address, size_t length, int access) {
    uintptr_t got = 0;
    int err = map(address, length, access, MAP_FIXED_NOREPLACE, &got);
    if (err != 0 || got == address)
        return err;
    /* Before Linux 4.17 the flag is unknown and the address is only a hint. */
    (void)vm_release(got, length);
    return EEXIST;
}

int vm_renew(uintptr_t address, size_t length, int access) {
    uintptr_t got;
    return map(address, length, access, MAP_FIXED, &got);
}

int vm_protect(uintptr_t address, size_t length, int access) {
    return protect(address, length, protection(access));
}

int vm_populate(uintptr_t address, size_t length) {
    int err = advise(address, length, MADV_POPULATE_WRITE);
    if (err != EINVAL)
        return err;
    /* Before Linux 5.14. An atomic OR with 0 dirties the page without losing a store of another
     * thread. */
    size_t step = vm_page_size();
    for (size_t offset = 0; offset < length; offset += step)
        __atomic_fetch_or((unsigned char *)pointer(address + offset), 0, __ATOMIC_RELAXED);
    return 0;
}

int vm_discard(uintptr_t address, size_t length) {
    int err = advise(address, length, MADV_DONTNEED);
    if (err == EINVAL) /* MADV_DONTNEED fails on mlocked pages; _LOCKED (5.18) does not */
        err = advise(address, length, MADV_DONTNEED_LOCKED);
    return err;
}

int vm_discard_lazy(uintptr_t address, size_t length) {
    return advise(address, length, MADV_FREE);
}

int vm_release(uintptr_t address, size_t length) {
    return call_kernel(SYS_munmap, address, length, 0, 0, 0, 0, NULL);
}

int vm_advise(uintptr_t address, size_t length, int advice) {
    static const struct {
        int ours, kernels;
    } table[] = {
        {VM_NO_DUMP, MADV_DONTDUMP},         {VM_NO_FORK, MADV_DONTFORK},
        {VM_WIPE_ON_FORK, MADV_WIPEONFORK},  {VM_HUGE_PREFER, MADV_HUGEPAGE},
        {VM_HUGE_NEVER, MADV_NOHUGEPAGE},
    };
    int err = 0;
    for (size_t i = 0; i < sizeof table / sizeof table[0] && err == 0; i++)
        if (advice & table[i].ours)
            err = advise(address, length, table[i].kernels);
    return err;
}

int vm_allow_huge(bool allow) {
    return call_kernel(SYS_prctl, PR_SET_THP_DISABLE, !allow, 0, 0, 0, 0, NULL);
}

int vm_collapse(uintptr_t address, size_t length) {
    return advise(address, length, MADV_COLLAPSE);
}

int vm_guard(uintptr_t address, size_t length) {
    return advise(address, length, MADV_GUARD_INSTALL);
}

int vm_unguard(uintptr_t address, size_t length) {
    return advise(address, length, MADV_GUARD_REMOVE);
}

int vm_name(uintptr_t address, size_t length, const char *name) {
    return call_kernel(SYS_prctl, PR_SET_VMA, PR_SET_VMA_ANON_NAME, address, length,
                       (uintptr_t)name, 0, NULL);
}

int vm_resident(uintptr_t address, size_t length, size_t *nbytes) {
    unsigned char seen[4096];
    size_t page = vm_page_size(), found = 0;
    for (size_t at = 0; at < length; at += sizeof seen * page) {
        size_t n = length - at < sizeof seen * page ? length - at : sizeof seen * page;
        int err = call_kernel(SYS_mincore, address + at, n, (uintptr_t)seen, 0, 0, 0, NULL);
        if (err != 0)
            return err;
        for (size_t i = 0; i < n / page; i++)
            found += seen[i] & 1;
    }
    *nbytes = found * page;
    return 0;
}

int vm_address_bits(void) {
    /* The random bytes are on the first stack, which the kernel puts at the end of user
     * addresses. */
    uint64_t address = getauxval(AT_RANDOM);
    int bits = 0;
    for (; address != 0; address >>= 1)
        bits++;
    return bits;
}

int vm_seal(uintptr_t address, size_t length) {
    return call_kernel(SYS_mseal, address, length, 0, 0, 0, 0, NULL);
}

int vm_file_create(const char *name, bool no_exec, int *fd) {
    uintptr_t flags = CLOSE_ON_EXEC | ALLOW_SEALING | (no_exec ? NO_EXEC_SEAL : 0), got;
    int err = call_kernel(SYS_memfd_create, (uintptr_t)name, flags, 0, 0, 0, 0, &got);
    if (err == 0)
        *fd = (int)got;
    return err;
}

int vm_file_resize(int fd, size_t length) {
    return call_kernel(SYS_ftruncate, (uintptr_t)fd, length, 0, 0, 0, 0, NULL);
}

int vm_file_seal(int fd) {
#ifdef SYS_fcntl64
    long number = SYS_fcntl64;
#else
    long number = SYS_fcntl;
#endif
    return call_kernel(number, (uintptr_t)fd, F_ADD_SEALS, SEAL_SHRINK | SEAL_GROW | SEAL_SEAL, 0,
                       0, 0, NULL);
}

static int allocate(int fd, int mode, size_t offset, size_t length) {
#if UINTPTR_MAX > UINT32_MAX
    return call_kernel(SYS_fallocate, (uintptr_t)fd, (uintptr_t)mode, offset, length, 0, 0, NULL);
#else /* the 64-bit arguments take two registers each, the low half first */
    return call_kernel(SYS_fallocate, (uintptr_t)fd, (uintptr_t)mode, offset, 0, length, 0, NULL);
#endif
}

int vm_file_allocate(int fd, size_t offset, size_t length) {
    return allocate(fd, KEEP_SIZE, offset, length);
}

int vm_file_punch(int fd, size_t offset, size_t length) {
    return allocate(fd, KEEP_SIZE | PUNCH_HOLE, offset, length);
}

int vm_file_close(int fd) {
    return call_kernel(SYS_close, (uintptr_t)fd, 0, 0, 0, 0, 0, NULL);
}

int vm_renew_file(uintptr_t address, size_t length, int access, int fd) {
    uintptr_t got;
    return call_kernel(VM_SYS_MMAP, address, length, (uintptr_t)protection(access),
                       MAP_SHARED | MAP_FIXED | MAP_NORESERVE, (uintptr_t)fd, 0, &got);
}

/* Tries a call on a committed page, or on an empty range if there is no memory or map entry for
 * one: the kernel checks the request before the range. */
static int try_on_page(int (*attempt)(uintptr_t, size_t, int), int argument) {
    uintptr_t page = 0;
    int err = vm_map(0, vm_page_size(), VM_COMMITTED, &page);
    if (err == 0) {
        err = attempt(page, vm_page_size(), argument);
        (void)vm_release(page, vm_page_size());
    }
    return err == ENOMEM || err == EAGAIN ? attempt(0, 0, argument) : err;
}

static int name_page(uintptr_t address, size_t length, int unused) {
    (void)unused;
    return vm_name(address, length, "pyreserve");
}

static int try_advice(int advice) {
    return try_on_page(advise, advice);
}

int vm_try_populate(void) {
    return try_advice(MADV_POPULATE_WRITE);
}

int vm_try_discard_lazy(void) {
    return try_advice(MADV_FREE);
}

int vm_try_wipe_on_fork(void) {
    return try_advice(MADV_WIPEONFORK);
}

int vm_try_guard(void) {
    return try_advice(MADV_GUARD_INSTALL);
}

int vm_try_seal(void) {
    /* A seal is permanent, so use an address that cannot be sealed: a kernel with mseal rejects it
     * as misaligned. */
    int err = vm_seal(1, vm_page_size());
    return err == EINVAL ? 0 : err;
}

int vm_try_name(void) {
    return try_on_page(name_page, 0);
}
