/* vm: the verbs of virtual memory, one system call each where the kernel allows it.
 *
 * Only vm and sys make system calls. vm decides nothing: which verb to call, in which order, and what
 * to do when one is refused, is up to the modules above.
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

#include <stddef.h>
#include <stdint.h>

/* What a new mapping is for, and how the kernel shall account for it. */
enum vm_access {
    VM_RESERVED = 0,  /* PROT_NONE: addresses only */
    VM_COMMITTED = 1, /* PROT_READ | PROT_WRITE */
    VM_NORESERVE = 2  /* or-ed in: MAP_NORESERVE, never charged in overcommit modes 0 and 1 */
};

/* Standing advice for a mapping. It belongs to the mapping: a later vm_renew starts without it. */
enum vm_advice {
    VM_NO_DUMP = 1,       /* MADV_DONTDUMP: leave it out of core dumps */
    VM_NO_FORK = 2,       /* MADV_DONTFORK: a child does not inherit it */
    VM_WIPE_ON_FORK = 4,  /* MADV_WIPEONFORK: a child finds zeros */
    VM_HUGE_PREFER = 8,   /* MADV_HUGEPAGE */
    VM_HUGE_NEVER = 16    /* MADV_NOHUGEPAGE */
};

/* All mapping calls made here (mmap, munmap, mprotect, madvise, mincore, mseal, and the prctl that
 * names a mapping) pass one function. It gets the kernel's own arguments: the number (SYS_munmap, ...;
 * for mmap SYS_mmap2 where there is one, whose offset counts pages) and six of them, unused ones 0.
 * It returns what the kernel returns, a result or minus an errno, and leaves errno unspecified.
 *
 * Unless replaced it is the bare system call, so that nothing that replaces the C library's mmap sees
 * a reservation; under Address-, Memory- and ThreadSanitizer it calls the C library's functions. */
typedef intptr_t (*vm_system_call)(long number, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t d,
                                   uintptr_t e, uintptr_t f);

/* Makes `call` that function from now on, in all threads; NULL: the one it was at first. Returns the
 * one it was until now, to which the new one may pass calls on. For tests: it refuses calls, or
 * counts them. */
vm_system_call vm_replace(vm_system_call call);

/* The kernel's page size in bytes (the OS page). */
size_t vm_page_size(void);

/* How many bits a user address has: mappings lie below 1 << vm_address_bits(). Reads no file. */
int vm_address_bits(void);

/* Maps `length` bytes wherever the kernel likes, near `hint` if that is free (0: no hint). */
int vm_map(uintptr_t hint, size_t length, int access, uintptr_t *address);

/* Maps exactly [address, address + length). EEXIST if any of it is taken: nothing that is mapped
 * there is ever replaced. */
int vm_map_at(uintptr_t address, size_t length, int access);

/* Like vm_map, out of the kernel's pool of huge pages (hugetlb) of `huge` bytes, of which `length` is
 * a multiple. ENOMEM if the pool has too few, EINVAL if there is none of that size. */
int vm_map_huge(size_t length, int access, size_t huge, uintptr_t *address);

/* Replaces what the caller owns at [address, address + length) by a fresh mapping. Contents,
 * commit charge, advice and name of the old one are gone. */
int vm_renew(uintptr_t address, size_t length, int access);

/* Like vm_renew, out of the pool of huge pages; both ends are multiples of `huge`. */
int vm_renew_huge(uintptr_t address, size_t length, int access, size_t huge);

/* Changes the access of what is mapped there, VM_RESERVED or VM_COMMITTED; contents stay. The
 * kernel works mapping by mapping and may stop half way. */
int vm_protect(uintptr_t address, size_t length, int access);

/* Backs a committed range with memory now. The kernel may stop half way; that loses nothing. */
int vm_populate(uintptr_t address, size_t length);

/* Drops the contents of a committed range: it reads as zero from now on. Locked pages refuse with
 * EINVAL before Linux 5.18, and the kernel then stops half way. */
int vm_discard(uintptr_t address, size_t length);

/* Lets the kernel drop the contents when it needs memory, until they are written again. */
int vm_discard_lazy(uintptr_t address, size_t length);

/* Unmaps. */
int vm_release(uintptr_t address, size_t length);

/* Gives every advice of the or-ed enum vm_advice; stops at the first that is refused. */
int vm_advise(uintptr_t address, size_t length, int advice);

/* Makes huge pages of a committed range's small ones, now (MADV_COLLAPSE, Linux 6.1). The kernel may
 * stop half way. */
int vm_collapse(uintptr_t address, size_t length);

/* Guard pages, which fault on any access and need no mapping of their own, and their removal
 * (MADV_GUARD_INSTALL and _REMOVE, Linux 6.13). Contents are gone. */
int vm_guard(uintptr_t address, size_t length);
int vm_unguard(uintptr_t address, size_t length);

/* Names an anonymous mapping for /proc/PID/maps; `name` is copied. EINVAL where the kernel was
 * built without CONFIG_ANON_VMA_NAME or does not like the characters. */
int vm_name(uintptr_t address, size_t length, const char *name);

/* How many bytes of a mapped range are in memory. */
int vm_resident(uintptr_t address, size_t length, size_t *nbytes);

/* Forbids every later change of access or address of the range, for the rest of the process's
 * life (mseal, Linux 6.10). */
int vm_seal(uintptr_t address, size_t length);

/* The vm_try functions ask the running kernel by using a feature on a mapping of their own, made
 * and removed again; on an empty range where no mapping can be made. 0: it works; an errno: it was
 * refused with that. */
int vm_try_populate(void);
int vm_try_discard_lazy(void);
int vm_try_wipe_on_fork(void);
int vm_try_guard(void);
int vm_try_seal(void);
int vm_try_name(void);

#endif
