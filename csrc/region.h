/* region: one reservation and what of it is committed. vm + runs + tracing.
 *
 * A region is a span of addresses [base, base + size). Of it, `reserved` says which bytes it owns
 * and `committed` which of those are readable and writable; both are exact after every call, and
 * neither ever asks the kernel. A region from region_reserve owns its whole span. A window, from
 * region_window, owns nothing at first and claims pieces of the span one by one.
 *
 * Two ways to account, chosen once:
 *  - charged: commit by mprotect, which charges the commit limit at once; decommit by a fresh
 *    MAP_FIXED mapping, the only way that gives a touched charge back;
 *  - VM_NORESERVE: never charged (overcommit modes 0 and 1); decommit by mprotect, then DONTNEED,
 *    in this order so that no other thread can touch the pages again in between.
 *
 * Holds for every function here:
 *  - offsets and lengths are bytes, multiples of the OS page, lengths positive, checked without
 *    overflow; what is wrong with them comes back as a negative enum region_refusal;
 *  - a positive result is the errno of the system call that was refused, and the region is as it
 *    was before; 0 is success;
 *  - not synchronised: the owner holds a lock around each call.
 *
 * A region is open, retired or closed. One that is all zero bytes is closed; region_reserve and
 * region_window open a closed one, region_release closes it and keeps its storage for the next
 * time, region_end frees it. A retired region keeps its addresses and its books for views that
 * still show them, and only region_end takes them away. Calls on a region that is not open return
 * REGION_RELEASED.
 */
#ifndef PYRESERVE_REGION_H
#define PYRESERVE_REGION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "runs.h"
#include "tracing.h"

enum region_refusal {
    REGION_RELEASED = -1,
    REGION_OUTSIDE = -2,       /* not wholly inside [0, size), or the length is 0 */
    REGION_MISALIGNED = -3,    /* not whole OS pages */
    REGION_NOT_RESERVED = -4,  /* the window does not own all of it */
    REGION_NOT_COMMITTED = -5, /* some of it is not committed */
    REGION_SEALED = -6
};

struct region {
    char *base;  /* NULL once released */
    size_t size; /* guards not counted */
    size_t page; /* the OS page */
    size_t guard; /* bytes of guard at each end; never accessible */
    int accounting; /* 0 or VM_NORESERVE */
    int advice;     /* enum vm_advice, kept on every byte owned */
    bool sealed;
    bool retired;   /* open for region_end alone */
    char name[80]; /* empty: none */
    struct runs reserved, committed;
    struct tracing traced; /* pieces reported to tracemalloc */
};

/* Where a reservation shall be and what else it shall have; all zero: anywhere, nothing. */
struct region_options {
    uintptr_t address; /* near this, unless 0 */
    bool exact;        /* there or nowhere */
    size_t align;      /* the base is a multiple of this power of two; 0: of the OS page */
    size_t guard;      /* bytes of guard at each end */
    char name[80];
};

/* Opens a region of `size` bytes, reserved as `options` (NULL: anywhere) says. EEXIST if any of an
 * exact place is taken, ENOMEM also where the size does not fit the address type. */
int region_reserve(struct region *region, size_t size, int accounting, int advice,
                   const struct region_options *options);

/* Opens a window over [address, address + size) without mapping anything; EINVAL if these are not
 * whole OS pages of addresses. */
int region_window(struct region *region, uintptr_t address, size_t size, int accounting,
                  int advice);

/* Claims exactly this piece of a window with the given enum vm_access; EEXIST if any of it is taken. */
int region_claim(struct region *region, size_t offset, size_t length, int access);

/* Claims `length` bytes near the address `hint` (0: anywhere), wherever in [from, size) the kernel
 * puts them. `*address` is where that is; ERANGE if it is outside, and then the bytes have been
 * given back. `*address` is written in both cases. */
int region_claim_near(struct region *region, size_t from, uintptr_t hint, size_t length, int access,
                      uintptr_t *address);

/* Unmaps a piece that a window owns: the opposite of a claim. */
int region_disclaim(struct region *region, size_t offset, size_t length);

/* Makes the range readable and writable; what already is stays untouched. */
int region_commit(struct region *region, size_t offset, size_t length);

/* Back to reserved; what already is stays so. Should the kernel refuse to give fresh addresses
 * their advice again, that errno is returned although the bytes are decommitted. */
int region_decommit(struct region *region, size_t offset, size_t length);

/* Backs with memory, or drops the contents of, bytes that are all committed. `lazy` leaves the
 * moment to the kernel where it can. */
int region_populate(struct region *region, size_t offset, size_t length);
int region_discard(struct region *region, size_t offset, size_t length, bool lazy);

/* Whether all of the range is committed: 1, 0 or REGION_RELEASED. Any alignment; a range that
 * leaves the region is not committed. */
int region_is_committed(const struct region *region, size_t offset, size_t length);

/* Copies up to `max` runs of what is committed, or reserved, to `out`; returns how many there are. */
size_t region_runs(const struct region *region, bool committed, struct run *out, size_t max);

/* Reads, or writes, one byte, any offset: the byte or 0, REGION_NOT_COMMITTED or REGION_RELEASED. */
int region_load(const struct region *region, size_t offset);
int region_store(struct region *region, size_t offset, unsigned char byte);

/* Commits the whole region and seals it until the process ends: no decommit, no release. */
int region_seal(struct region *region);

/* Gives the addresses back. A window whose pieces are refused half way keeps, and still owns, the
 * rest. */
int region_release(struct region *region);

/* Refuses every later call but region_end. The addresses and their contents stay. */
void region_retire(struct region *region);

/* Releases what the region still has, unless it is sealed, and frees its storage. Should the kernel
 * refuse to unmap, the addresses stay taken but their memory is dropped. */
void region_end(struct region *region);

#endif
