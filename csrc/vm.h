/* vm: the verbs of virtual memory on mappings, one system call each where the kernel allows it.
 *
 * Only vm and sys make system calls. vm decides nothing: which verb to call, in which order, and
 * what to do when one is refused, is up to the modules above.
 *
 * Holds for every function here:
 *  - an address is an integer; it and every length are multiples of vm_page_size(), and every
 *    length is positive, unless the function says otherwise;
 *  - the result is 0, or the errno with which the kernel refused. A refusal leaves the mappings as
 *    they were, except where a function says that the kernel may stop half way;
 *  - out-parameters are written on success only;
 *  - any thread may call; nothing is kept between calls.
 */
#ifndef PYRESERVE_VM_H
#define PYRESERVE_VM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Access of a mapping, and how the kernel accounts for it. */
enum vm_access {
    VM_RESERVED = 0,  /* PROT_NONE: addresses only */
    VM_COMMITTED = 1, /* PROT_READ | PROT_WRITE */
    VM_NORESERVE = 2  /* added with |: MAP_NORESERVE, never charged in overcommit modes 0 and 1 */
};

/* Advice that a mapping keeps. A mapping that vm_renew puts in its place starts without it. */
enum vm_advice {
    VM_NO_DUMP = 1,       /* MADV_DONTDUMP: leave it out of core dumps */
    VM_NO_FORK = 2,       /* MADV_DONTFORK: a child does not inherit it */
    VM_WIPE_ON_FORK = 4,  /* MADV_WIPEONFORK: a child finds zeros */
    VM_HUGE_PREFER = 8,   /* MADV_HUGEPAGE */
    VM_HUGE_NEVER = 16    /* MADV_NOHUGEPAGE */
};

/* All system calls of this module (mmap, munmap, mprotect, madvise, mincore, mseal, the prctl that
 * names a mapping, and memfd_create, ftruncate, fcntl, fallocate and close for files in memory) pass
 * one function. It takes the arguments of syscall(2): the number
 * (SYS_munmap, ...; for mmap SYS_mmap2 where it exists, whose offset counts pages) and six values,
 * unused ones 0. It returns the result of the kernel or minus an errno; errno is unspecified.
 *
 * The default makes the system call directly, so that libraries that replace the C library's mmap
 * do not see a reservation. Under Address-, Memory- and ThreadSanitizer it calls the C library. */
typedef intptr_t (*vm_system_call)(long number, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t d,
                                   uintptr_t e, uintptr_t f);

/* Replaces that function in all threads; NULL restores the default. Returns the previous function,
 * to which `call` may forward. For tests that count or refuse calls. */
vm_system_call vm_replace(vm_system_call call);

/* The kernel's page size in bytes (the OS page). */
size_t vm_page_size(void);

/* The number of bits of a user address: mappings lie below 1 << vm_address_bits(). Reads no
 * file. */
int vm_address_bits(void);

/* Maps `length` bytes at an address that the kernel picks, at `hint` if that is free (0: no
 * hint). */
int vm_map(uintptr_t hint, size_t length, int access, uintptr_t *address);

/* Maps exactly [address, address + length). EEXIST if any byte is mapped already; existing mappings
 * are never replaced. */
int vm_map_at(uintptr_t address, size_t length, int access);

/* Replaces the caller's mappings in [address, address + length) by a new one. Contents, commit
 * charge, advice and name of the old ones are gone. */
int vm_renew(uintptr_t address, size_t length, int access);

/* Changes the access to VM_RESERVED or VM_COMMITTED; contents stay. The kernel works mapping by
 * mapping and may stop half way. */
int vm_protect(uintptr_t address, size_t length, int access);

/* Backs a committed range with memory now (MADV_POPULATE_WRITE, Linux 5.14; before that by touching
 * each page). Contents stay. The kernel may stop half way. */
int vm_populate(uintptr_t address, size_t length);

/* Drops the contents of a committed range, which then reads as zero. Locked pages are refused with
 * EINVAL before Linux 5.18, and the kernel then stops half way. */
int vm_discard(uintptr_t address, size_t length);

/* Allows the kernel to drop the contents when it needs memory, until a page is written again
 * (MADV_FREE, Linux 4.5). */
int vm_discard_lazy(uintptr_t address, size_t length);

/* Unmaps the range. */
int vm_release(uintptr_t address, size_t length);

/* Gives each advice of a set of enum vm_advice; stops at the first that is refused. */
int vm_advise(uintptr_t address, size_t length, int advice);

/* Allows or forbids transparent huge pages in this process and its future children, whatever the
 * advice (PR_SET_THP_DISABLE). */
int vm_allow_huge(bool allow);

/* Replaces the small pages of a committed range by huge pages now (MADV_COLLAPSE, Linux 6.1). The
 * kernel may stop half way. */
int vm_collapse(uintptr_t address, size_t length);

/* Install or remove guard pages, which fault on any access and need no mapping of their own
 * (MADV_GUARD_INSTALL and _REMOVE, Linux 6.13). Contents are lost. */
int vm_guard(uintptr_t address, size_t length);
int vm_unguard(uintptr_t address, size_t length);

/* Names an anonymous mapping in /proc/PID/maps; `name` is copied. EINVAL if the kernel was built
 * without CONFIG_ANON_VMA_NAME or refuses a character. */
int vm_name(uintptr_t address, size_t length, const char *name);

/* The number of bytes of a mapped range that are in memory. */
int vm_resident(uintptr_t address, size_t length, size_t *nbytes);

/* Forbids later changes of the range's access or address until the process ends (mseal, Linux
 * 6.10). */
int vm_seal(uintptr_t address, size_t length);

/* Files in memory (memfd), whose bytes all their mappings share. Offsets and lengths of a file are
 * whole OS pages too.
 *
 * vm_file_create makes an empty file, which exec closes and which may be sealed. `name`, at most 249
 * bytes, is shown in /proc/PID/maps. With `no_exec` the file can never be executed (EINVAL before
 * Linux 6.3). ENOSYS before Linux 3.17. */
int vm_file_create(const char *name, bool no_exec, int *fd);

/* Sets the length. EFBIG, after a SIGXFSZ, above RLIMIT_FSIZE. */
int vm_file_resize(int fd, size_t length);

/* Fixes the length and the set of seals for good. */
int vm_file_seal(int fd);

/* Gives each page of the range memory; contents stay. A refusal allocates nothing and takes nothing
 * away. EINTR if a signal arrives, ENOSPC if the memory would exceed the commit limit. */
int vm_file_allocate(int fd, size_t offset, size_t length);

/* Gives back the memory of the range, which then reads as zero in all mappings. */
int vm_file_punch(int fd, size_t offset, size_t length);

int vm_file_close(int fd);

/* Like vm_renew, with the first `length` bytes of the file. */
int vm_renew_file(uintptr_t address, size_t length, int access, int fd);

/* The vm_try functions test the running kernel: they use a feature on a temporary mapping, or on an
 * empty range where no mapping can be created. 0: it works; else the errno of the refusal. */
int vm_try_populate(void);
int vm_try_discard_lazy(void);
int vm_try_wipe_on_fork(void);
int vm_try_guard(void);
int vm_try_seal(void);
int vm_try_name(void);

#endif
