/* region: one reservation and its books: which of its bytes are reserved and which committed. Uses
 * vm, shared, runs and tracing.
 *
 * A region is a range of addresses [base, base + size). The set `reserved` holds the bytes that it
 * owns, `committed` those of them that are readable and writable. Both are exact after every call;
 * reading them makes no system call. region_reserve opens a region that owns its whole range.
 * region_window opens a window, which owns nothing at first and claims pieces of its range one by
 * one.
 *
 * The accounting mode is chosen once:
 *  - charged: commit by mprotect (0.75 us for 64 KiB), which charges the commit limit at once.
 *    Decommit by a new MAP_FIXED mapping: only that refunds the charge of touched memory;
 *  - VM_NORESERVE: never charged in overcommit modes 0 and 1. Decommit by mprotect, then
 *    MADV_DONTNEED, in this order so that no other thread can touch the pages in between.
 *
 * A region is private or shared. The bytes of a shared region are those of a file in memory
 * (csrc/shared.h), which a forked child shares. There:
 *  - commit allocates the pages, then makes them accessible, so that no access to committed bytes
 *    runs out of memory (SIGBUS). Newly committed bytes read as zero;
 *  - discard gives the pages back at once, also with `lazy`. Every mapping then reads zero. The next
 *    access allocates a page again, which the kernel may refuse (SIGBUS) in overcommit mode 2, and
 *    before Linux 5.2 in mode 0. With `strict`, discard itself allocates the pages again and gives
 *    no memory back. Populate allocates discarded pages, too;
 *  - decommit makes the range inaccessible and gives the pages back;
 *  - each process has its own books. Discard and decommit drop contents for all processes, and a
 *    refused commit may drop what another process wrote to the range. So a single process should
 *    commit, discard and decommit.
 * A mirrored region is a shared region that maps the file twice: its second half shows the bytes of
 * the first. It is committed, discarded and decommitted as a whole.
 *
 * Holds for every function here:
 *  - offsets and lengths are bytes and multiples of the OS page, lengths are positive; both are
 *    checked without overflow, and a wrong one returns a negative enum region_refusal;
 *  - 0 is success; a positive result is the errno of the refused system call, and the region is as
 *    it was before;
 *  - not synchronised: the owner holds a lock around each call. Only `viewed` may be read without.
 *
 * A region is open, retired or closed. A zero-initialised struct is closed. region_reserve and
 * region_window open a closed region; region_release closes it but keeps the storage of its books
 * for reuse; region_end frees that too. region_retire leaves the addresses and the books to views
 * that are still alive, until region_end. Calls on a region that is not open return
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
    REGION_NOT_RESERVED = -4,  /* the region does not own all of it */
    REGION_NOT_COMMITTED = -5, /* some of it is not committed */
    REGION_SEALED = -6,
    REGION_MIRRORED = -7,      /* a mirrored region takes this verb as a whole */
    REGION_GUARDED = -8        /* some of it is a guard */
};

struct region {
    char *base;  /* NULL once released */
    size_t size; /* without the guards */
    size_t page; /* the OS page */
    size_t guard; /* bytes of guard at each end; never accessible */
    int accounting; /* 0 or VM_NORESERVE */
    int advice;     /* enum vm_advice, kept on every byte owned */
    bool sealed;
    bool counted;   /* see region_count */
    bool retired;   /* accepts only region_end */
    bool viewed;    /* views may show bytes; also set while the region is not open */
    bool shared, mirrored, strict; /* see region_options */
    int file;       /* the descriptor of a shared region's file */
    char name[80]; /* empty: none */
    struct runs reserved, committed;
    struct runs traced; /* pieces reported to tracemalloc, which may touch */
    size_t cell, cell_guard; /* the last cell_guard bytes of each `cell` bytes are a guard; 0: none */
};

/* Placement options for region_reserve; zero-initialise for defaults. */
struct region_options {
    uintptr_t address; /* a hint; 0: anywhere */
    bool exact;        /* refuse any other address */
    size_t align;      /* base + lead is a multiple of this power of two; 0: of the OS page */
    size_t lead;       /* bytes by which the base precedes such a multiple; whole OS pages */
    size_t guard;      /* bytes of guard at each end */
    bool shared;       /* a region over a file in memory; its accounting is charged */
    bool mirrored;     /* the second half shows the bytes of the first; implies `shared` */
    bool strict;       /* discard allocates shared pages again */
    char name[80];
};

/* Opens a region of `size` bytes; `options` may be NULL. EEXIST if any byte of an exact place is
 * mapped, ENOMEM also if the size with its guards does not fit the address type. For a shared region
 * also the refusals of shared_create, and REGION_MISALIGNED unless each half of a mirrored one is
 * whole OS pages. */
int region_reserve(struct region *region, size_t size, int accounting, int advice,
                   const struct region_options *options);

/* Opens a window over [address, address + size) without mapping anything. `name`, at most 79 bytes,
 * is given to the pieces that it claims; NULL: none. EINVAL if the range is empty, wraps around or
 * is not whole OS pages. */
int region_window(struct region *region, uintptr_t address, size_t size, int accounting,
                  int advice, const char *name);

/* Maps exactly this piece of a window with the given enum vm_access; EEXIST if any byte is
 * mapped. */
int region_claim(struct region *region, size_t offset, size_t length, int access);

/* Maps `length` bytes near the address `hint` (0: anywhere) and claims them. `*address` is where
 * the kernel put them. ERANGE if that is outside [from, size) of the window: then they are unmapped
 * again, and `*address` is written all the same. */
int region_claim_near(struct region *region, size_t from, uintptr_t hint, size_t length, int access,
                      uintptr_t *address);

/* Unmaps a piece that a window owns. */
int region_disclaim(struct region *region, size_t offset, size_t length);

/* Makes the range readable and writable. Contents of bytes that are committed already stay. */
int region_commit(struct region *region, size_t offset, size_t length);

/* Returns the range to reserved and drops its contents. If the kernel refuses the advice for the
 * new mapping, that errno is returned although the bytes are decommitted. */
int region_decommit(struct region *region, size_t offset, size_t length);

/* Back a committed range with memory now, or drop its contents: at once, with `lazy` when the
 * kernel needs memory (at once before Linux 4.5). A refused discard of a strict region has dropped
 * the contents. */
int region_populate(struct region *region, size_t offset, size_t length);
int region_discard(struct region *region, size_t offset, size_t length, bool lazy);

/* Moves the `length` committed bytes at offset `*front` to offset 0 and sets `*front` to 0. Any
 * alignment. Commits the destination. The source stays committed; its bytes outside the destination
 * are undefined afterwards. Discards copied source pages every 2 MiB, so that at most 2 MiB take
 * memory twice. */
int region_slide(struct region *region, size_t *front, size_t length);

/* Whether the whole range is committed: 1, 0 or REGION_RELEASED. Any alignment; a range that is not
 * inside the region is not committed. */
int region_is_committed(const struct region *region, size_t offset, size_t length);

/* Sets `viewed`, then tells whether a view may show the range, at any alignment: 1, or a refusal if
 * the region is not open, some of the range is not committed, or it overlaps the guard of a cell.
 *
 * `viewed` allows an allocator to free bytes under its own lock, without the owner's
 * (heap_free_unviewed, pagealloc_free_unless): such a call refuses while `viewed` is set. A view is
 * made in this order: register it with the owner, set `viewed`, check its bytes under the
 * allocator's lock. So either the check finds the bytes free, or the call finds `viewed` set. The
 * owner clears `viewed` when no view is left, while it makes no new one. */
int region_export(struct region *region, size_t offset, size_t length);

/* Divides the region into cells of `cell` bytes. The last `guard` bytes of each are its guard pages,
 * which region_guard_cells installs (vm_guard). Guards count as committed. */
int region_set_cells(struct region *region, size_t cell, size_t guard);

/* Installs the guards of the cells [first, stop), which must be committed. A decommit removes
 * them. If the kernel refuses, some of them may be installed. */
int region_guard_cells(struct region *region, size_t first, size_t stop);

/* Copies up to `max` runs of committed (else reserved) bytes to `out`; returns how many exist. */
size_t region_runs(const struct region *region, bool committed, struct run *out, size_t max);

/* Read or write one byte at any offset. Return the byte or 0, REGION_NOT_COMMITTED or
 * REGION_RELEASED. */
int region_load(const struct region *region, size_t offset);
int region_store(struct region *region, size_t offset, unsigned char byte);

/* Commits the whole region and seals it (mseal, Linux 6.10): no decommit and no release until the
 * process ends. */
int region_seal(struct region *region);

/* Counts the size of an open region in region_counted_bytes() as long as it has its addresses. */
int region_count(struct region *region);

/* The bytes of all counted regions of the process. Any thread may call. */
size_t region_counted_bytes(void);

/* Unmaps the region and closes it. If the kernel refuses one piece of a window, the pieces that are
 * left stay owned and the window stays open. */
int region_release(struct region *region);

/* Refuses every later call except region_end. The addresses and their contents stay. */
void region_retire(struct region *region);

/* Unmaps what the region still owns, unless it is sealed, and frees the storage of its books. If
 * the kernel refuses to unmap, the addresses stay mapped and their contents are discarded. The file
 * of a shared region is closed; its contents stay, because a forked process may use them. */
void region_end(struct region *region);

#endif
