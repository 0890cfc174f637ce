#include "region.h"

#include <errno.h>
#include <string.h>

#include "shared.h"
#include "vm.h"
#include "words.h"

static uintptr_t address_of(const struct region *region, size_t offset) {
    return (uintptr_t)region->base + offset;
}

/* Relaxed: the lock of an allocator orders it; see region_export. */
static void set_viewed(struct region *region, bool viewed) {
    __atomic_store_n(&region->viewed, viewed, __ATOMIC_RELAXED);
}

static bool is_open(const struct region *region) {
    return region->base != NULL && !region->retired;
}

/* 0, or the refusal for a range that is not whole pages owned by an open region. */
static int check_range(const struct region *region, size_t offset, size_t length) {
    if (!is_open(region))
        return REGION_RELEASED;
    if (length == 0 || offset > region->size || length > region->size - offset)
        return REGION_OUTSIDE;
    if ((offset | length) & (region->page - 1))
        return REGION_MISALIGNED;
    if (!runs_contain(&region->reserved, offset, offset + length))
        return REGION_NOT_RESERVED;
    return 0;
}

/* The bytes of memory that `length` bytes of a region show. */
static size_t memory_length(const struct region *region, size_t length) {
    return region->mirrored ? length / 2 : length;
}

/* Record [lo, hi) as committed, or as reserved again. Need runs_grow on `committed` before. */
static void record_commit(struct region *region, size_t lo, size_t hi) {
    struct run gap;
    if (tracing_is_on())
        for (size_t at = lo; runs_next_gap(&region->committed, at, hi, &gap); at = gap.hi)
            tracing_add(&region->traced, address_of(region, 0), gap.lo,
                        gap.lo + memory_length(region, gap.hi - gap.lo));
    runs_add(&region->committed, lo, hi);
}

static void record_decommit(struct region *region, size_t lo, size_t hi) {
    tracing_remove(&region->traced, address_of(region, 0), lo, hi);
    runs_remove(&region->committed, lo, hi);
}

/* Unmaps the piece [lo, hi) with its guards and removes it from the books, which must have
 * space. */
static int unmap_piece(struct region *region, size_t lo, size_t hi, size_t before, size_t after) {
    uintptr_t base = address_of(region, 0);
    tracing_suspend(&region->traced, base, lo, hi);
    int err = vm_release(base + lo - before, hi - lo + before + after);
    if (err != 0) {
        tracing_resume(&region->traced, base, lo, hi);
        return err;
    }
    tracing_drop(&region->traced, lo, hi);
    runs_remove(&region->reserved, lo, hi);
    runs_remove(&region->committed, lo, hi);
    return 0;
}

/* Gives newly mapped bytes the advice and the name of the region. */
static int apply_policy(const struct region *region, uintptr_t address, size_t length) {
    int err = region->advice ? vm_advise(address, length, region->advice) : 0;
    /* The name is only information; kernels without CONFIG_ANON_VMA_NAME refuse it. A file has it. */
    if (err == 0 && !region->shared && region->name[0] != '\0')
        (void)vm_name(address, length, region->name);
    return err;
}

static int allocate(const struct region *region, size_t offset, size_t length) {
    return shared_allocate(region->file, offset, memory_length(region, length));
}

static int punch(const struct region *region, size_t offset, size_t length) {
    return vm_file_punch(region->file, offset, memory_length(region, length));
}

/* REGION_MIRRORED for part of a mirrored region, else 0. */
static int check_whole(const struct region *region, size_t length) {
    return region->mirrored && length != region->size ? REGION_MIRRORED : 0;
}

static void close_file(struct region *region) {
    if (region->shared)
        (void)vm_file_close(region->file);
    region->shared = region->mirrored = false;
}

/* The smallest range that contains all committed bytes of [lo, hi); false if there are none. */
static bool committed_bounds(const struct region *region, size_t lo, size_t hi, struct run *all) {
    struct run piece;
    if (!runs_next(&region->committed, lo, hi, all))
        return false;
    while (runs_next(&region->committed, all->hi, hi, &piece))
        all->hi = piece.hi;
    return true;
}

/* A hint that is never free: the page of this module's own data. */
static uintptr_t occupied_hint(size_t page) {
    static const char own = 0;
    return (uintptr_t)&own & ~(uintptr_t)(page - 1);
}

/* Maps `total` bytes so that `*start` + `offset` is a multiple of `align`: at the first try if the
 * hint or the kernel happens to be right, else by mapping `align` more and unmapping both ends. */
static int map_aligned(uintptr_t hint, size_t total, size_t offset, size_t align, int access,
                       uintptr_t *start) {
    offset &= align - 1; /* keeps the sums below from wrapping around */
    int err;
    /* Without a hint the kernel aligns large mappings to huge pages, which is wrong with an offset.
     * With one that is not free, it adjoins the mapping above: right if that is a region too. */
    if (hint == 0 && offset != 0 && (total & (align - 1)) == 0)
        hint = occupied_hint(vm_page_size());
    if (hint != 0 || offset == 0) {
        err = vm_map(hint, total, access, start);
        if (err != 0 || ((*start + offset) & (align - 1)) == 0)
            return err;
        err = vm_release(*start, total);
        if (err != 0)
            return err;
    }
    /* Map more, and choose the aligned place inside. */
    if (total > SIZE_MAX - align)
        return ENOMEM;
    uintptr_t wide;
    err = vm_map(0, total + align, access, &wide);
    if (err != 0)
        return err;
    size_t below = (size_t)(round_up(wide + offset, align) - offset - wide), above = align - below;
    *start = wide + below;
    /* Unmap both ends. If that is refused, unmap all that is left. */
    if (below > 0)
        err = vm_release(wide, below);
    if (err != 0) {
        (void)vm_release(wide, total + align);
        return err;
    }
    if (above > 0)
        err = vm_release(*start + total, above);
    if (err != 0)
        (void)vm_release(*start, total + above);
    return err;
}

/* Sets all fields of a closed region except `base`, which opens it. */
static void initialise(struct region *region, size_t size, int accounting, int advice) {
    region->size = size;
    region->page = vm_page_size();
    region->guard = 0;
    region->accounting = accounting;
    region->advice = advice;
    region->sealed = region->retired = region->counted = false;
    region->cell = region->cell_guard = 0;
    set_viewed(region, false);
    region->shared = region->mirrored = region->strict = false;
    memset(region->name, 0, sizeof region->name);
}

/* Creates the file of a shared region. */
static int open_file(struct region *region, const struct region_options *options) {
    bool mirrored = options->mirrored;
    size_t length = mirrored ? region->size / 2 : region->size;
    if ((mirrored && (region->size & 1)) || (length & (region->page - 1)))
        return REGION_MISALIGNED;
    const char *name = region->name[0] != '\0' ? region->name : "pyreserve";
    int err = shared_create(name, length, &region->file);
    region->shared = err == 0;
    region->mirrored = err == 0 && mirrored;
    region->strict = options->strict;
    return err;
}

/* Maps the file at `base`, in the place of what is mapped there. */
static int map_file(const struct region *region, uintptr_t base) {
    size_t part = memory_length(region, region->size);
    int err = vm_renew_file(base, part, VM_RESERVED, region->file);
    if (err == 0 && region->mirrored)
        err = vm_renew_file(base + part, part, VM_RESERVED, region->file);
    return err;
}

/* Maps the region with its guards, `total` bytes, at `*start`. */
static int map_whole(struct region *region, size_t total, const struct region_options *options,
                     uintptr_t *start) {
    size_t guard = region->guard;
    int access = VM_RESERVED | region->accounting;
    *start = options->address > guard ? options->address - guard : options->address;
    int err;
    if (options->exact)
        err = vm_map_at(*start, total, access);
    else if (options->align > region->page)
        err = map_aligned(*start, total, guard + options->lead, options->align, access, start);
    else
        err = vm_map(*start, total, access, start);
    if (err != 0)
        return err;
    if (region->shared)
        err = map_file(region, *start + guard);
    if (err == 0)
        err = apply_policy(region, *start, total);
    if (err != 0)
        (void)vm_release(*start, total);
    return err;
}

int region_reserve(struct region *region, size_t size, int accounting, int advice,
                   const struct region_options *options) {
    static const struct region_options anywhere;
    if (options == NULL)
        options = &anywhere;
    initialise(region, size, accounting, advice);
    size_t guard = region->guard = options->guard;
    if (size == 0)
        return REGION_OUTSIDE;
    if ((size | guard | options->lead | options->address) & (region->page - 1))
        return REGION_MISALIGNED;
    int err = runs_grow(&region->reserved);
    if (err != 0)
        return err;
    if (guard > SIZE_MAX / 2 || size > SIZE_MAX - 2 * guard)
        return ENOMEM;
    if (options->exact && options->address <= guard)
        return EINVAL;
    memcpy(region->name, options->name, sizeof region->name - 1);

    if (options->shared || options->mirrored)
        err = open_file(region, options);
    uintptr_t start;
    if (err == 0)
        err = map_whole(region, size + 2 * guard, options, &start);
    if (err != 0) {
        close_file(region);
        return err;
    }
    region->base = (char *)(start + guard);
    runs_add(&region->reserved, 0, size);
    return 0;
}

int region_window(struct region *region, uintptr_t address, size_t size, int accounting,
                  int advice, const char *name) {
    initialise(region, size, accounting, advice);
    if (name != NULL)
        strncpy(region->name, name, sizeof region->name - 1);
    if (address == 0 || size == 0 || size > UINTPTR_MAX - address ||
        ((address | size) & (region->page - 1)))
        return EINVAL;
    region->base = (char *)address;
    return 0;
}

/* Allocates storage for one more piece in both sets, before any system call. */
static int grow_books(struct region *region) {
    int err = runs_grow(&region->reserved);
    return err != 0 ? err : runs_grow(&region->committed);
}

/* Records a piece that has just been mapped; unmaps it again if the policy is refused. */
static int record_claim(struct region *region, size_t offset, size_t length, int access) {
    int err = apply_policy(region, address_of(region, offset), length);
    if (err != 0) {
        (void)vm_release(address_of(region, offset), length);
        return err;
    }
    runs_add(&region->reserved, offset, offset + length);
    if (access & VM_COMMITTED)
        record_commit(region, offset, offset + length);
    return 0;
}

/* check_range, except that the range need not be owned yet: a claim makes it so. */
static int check_claim(const struct region *region, size_t offset, size_t length) {
    int wrong = check_range(region, offset, length);
    return wrong == REGION_NOT_RESERVED ? 0 : wrong;
}

int region_claim(struct region *region, size_t offset, size_t length, int access) {
    int err = check_claim(region, offset, length);
    if (err == 0)
        err = grow_books(region);
    if (err == 0)
        err = vm_map_at(address_of(region, offset), length, access | region->accounting);
    return err != 0 ? err : record_claim(region, offset, length, access);
}

int region_claim_near(struct region *region, size_t from, uintptr_t hint, size_t length, int access,
                      uintptr_t *address) {
    if (!is_open(region))
        return REGION_RELEASED;
    if (length == 0 || from > region->size)
        return REGION_OUTSIDE;
    if ((hint | length) & (region->page - 1))
        return REGION_MISALIGNED;
    int err = grow_books(region);
    if (err == 0)
        err = vm_map(hint, length, access | region->accounting, address);
    if (err != 0)
        return err;
    /* The kernel may have ignored the hint. */
    uintptr_t low = address_of(region, from), high = address_of(region, region->size);
    if (*address < low || *address > high || length > high - *address) {
        err = vm_release(*address, length);
        return err != 0 ? err : ERANGE;
    }
    return record_claim(region, *address - (uintptr_t)region->base, length, access);
}

int region_disclaim(struct region *region, size_t offset, size_t length) {
    int err = region->sealed ? REGION_SEALED : check_range(region, offset, length);
    if (err == 0)
        err = grow_books(region);
    return err != 0 ? err : unmap_piece(region, offset, offset + length, 0, 0);
}

/* Makes a gap readable and writable. */
static int open_gap(const struct region *region, const struct run *gap) {
    int err = region->shared ? allocate(region, gap->lo, gap->hi - gap->lo) : 0;
    return err != 0 ? err
                    : vm_protect(address_of(region, gap->lo), gap->hi - gap->lo, VM_COMMITTED);
}

/* Removes access from a gap that a refused commit may have opened, in full or in part. */
static int reprotect(const struct region *region, const struct run *gap) {
    uintptr_t address = address_of(region, gap->lo);
    int err = vm_protect(address, gap->hi - gap->lo, VM_RESERVED);
    if (region->shared)
        return err != 0 ? err : punch(region, gap->lo, gap->hi - gap->lo);
    /* If the gap had merged with touched memory, only a new mapping refunds its charge. */
    if (err == 0 && !(region->accounting & VM_NORESERVE) &&
        vm_renew(address, gap->hi - gap->lo, VM_RESERVED) == 0)
        (void)apply_policy(region, address, gap->hi - gap->lo);
    return err;
}

/* Removes access from the gaps of [lo, hi). A gap that the kernel refuses to close stays committed,
 * and the books record that. */
static void reprotect_gaps(struct region *region, size_t lo, size_t hi) {
    struct run gap;
    for (size_t at = lo; runs_next_gap(&region->committed, at, hi, &gap); at = gap.hi)
        if (reprotect(region, &gap) != 0 && runs_grow(&region->committed) == 0)
            record_commit(region, gap.lo, gap.hi);
}

/* Puts a new mapping in the place of [lo, hi), whose first and last page are committed. */
static int remap(struct region *region, size_t lo, size_t hi) {
    uintptr_t address = address_of(region, lo);
    int access = VM_RESERVED | region->accounting;
    int err = vm_renew(address, hi - lo, access);
    /* A full map table refuses every mmap. Committing the gaps first merges [lo, hi) into one
     * mapping, which frees entries. */
    if (err != ENOMEM || runs_contain(&region->committed, lo, hi) ||
        vm_protect(address, hi - lo, VM_COMMITTED) != 0)
        return err;
    err = vm_renew(address, hi - lo, access);
    if (err != 0)
        reprotect_gaps(region, lo, hi);
    return err;
}

/* Returns [lo, hi) to reserved in the kernel and in the books, which must have space. */
static int decommit_range(struct region *region, size_t lo, size_t hi) {
    uintptr_t address = address_of(region, lo);
    bool charged = !region->shared && !(region->accounting & VM_NORESERVE);
    /* Without a charge to refund, remove access and then drop the contents. */
    int err = charged ? 0 : vm_protect(address, hi - lo, VM_RESERVED);
    int kept = 1;
    if (!charged && err == 0)
        kept = region->shared ? punch(region, lo, hi - lo) : vm_discard(address, hi - lo);
    if (kept == 0) {
        record_decommit(region, lo, hi);
        return 0;
    }
    /* Otherwise remap: that refunds the charge and works on mlocked pages. */
    if (err == 0)
        err = region->shared ? kept : remap(region, lo, hi);
    if (err == 0) {
        record_decommit(region, lo, hi);
        return apply_policy(region, address, hi - lo);
    }
    /* On a refusal, give access back to the pieces that had it. */
    struct run piece;
    for (size_t at = lo; !charged && runs_next(&region->committed, at, hi, &piece); at = piece.hi)
        (void)vm_protect(address_of(region, piece.lo), piece.hi - piece.lo, VM_COMMITTED);
    return err;
}

int region_commit(struct region *region, size_t offset, size_t length) {
    int err = check_range(region, offset, length);
    size_t end = offset + length;
    struct run gap;
    if (err != 0 || !runs_next_gap(&region->committed, offset, end, &gap))
        return err;
    err = check_whole(region, length);
    if (err == 0)
        err = runs_grow(&region->committed);
    if (err != 0)
        return err;
    /* Open the gaps one by one; the books stay as they were until all are open. */
    for (size_t at = offset; runs_next_gap(&region->committed, at, end, &gap); at = gap.hi) {
        err = open_gap(region, &gap);
        if (err != 0)
            break;
    }
    if (err == 0) {
        record_commit(region, offset, end);
        return 0;
    }
    /* On a refusal, close the gap that may be open in part, and those before it. */
    (void)reprotect(region, &gap);
    reprotect_gaps(region, offset, gap.lo);
    return err;
}

int region_decommit(struct region *region, size_t offset, size_t length) {
    int err = check_range(region, offset, length);
    if (err == 0 && region->sealed)
        return REGION_SEALED;
    struct run all;
    if (err != 0 || !committed_bounds(region, offset, offset + length, &all))
        return err;
    err = check_whole(region, length);
    if (err == 0)
        err = runs_grow(&region->committed);
    return err != 0 ? err : decommit_range(region, all.lo, all.hi);
}

/* check_range, and every byte must be committed. */
static int check_committed(const struct region *region, size_t offset, size_t length) {
    int wrong = check_range(region, offset, length);
    if (wrong == 0 && !runs_contain(&region->committed, offset, offset + length))
        return REGION_NOT_COMMITTED;
    return wrong;
}

int region_populate(struct region *region, size_t offset, size_t length) {
    int err = check_committed(region, offset, length);
    /* Discarded pages of a file. For a mirrored region, all: the range may be in either half. */
    if (err == 0 && region->mirrored)
        err = allocate(region, 0, region->size);
    else if (err == 0 && region->shared)
        err = allocate(region, offset, length);
    return err != 0 ? err : vm_populate(address_of(region, offset), length);
}

int region_discard(struct region *region, size_t offset, size_t length, bool lazy) {
    int err = check_committed(region, offset, length);
    if (err == 0)
        err = check_whole(region, length);
    if (err != 0)
        return err;
    if (region->shared) {
        err = punch(region, offset, length);
        return err == 0 && region->strict ? allocate(region, offset, length) : err;
    }
    if (lazy) {
        err = vm_discard_lazy(address_of(region, offset), length);
        if (err != EINVAL)
            return err;
        /* No MADV_FREE before Linux 4.5: discarding at once keeps the same promise. */
    }
    return vm_discard(address_of(region, offset), length);
}

int region_slide(struct region *region, size_t *front, size_t length) {
    const size_t chunk = (size_t)2 << 20, from = *front;
    int known = region_is_committed(region, from, length);
    if (known != 1)
        return known == 0 ? REGION_NOT_COMMITTED : known;
    size_t end = (size_t)round_up(length, region->page);
    int err = region_commit(region, 0, end);
    if (err != 0)
        return err;
    /* Upwards, so that no byte is overwritten before it is copied. A page whose last byte is copied
     * can be discarded unless it is part of the destination; a refusal costs only memory. */
    for (size_t at = 0; at < length && from > 0; at += chunk) {
        size_t n = (size_t)smaller(chunk, length - at);
        memmove(region->base + at, region->base + from + at, n);
        size_t lo = (size_t)larger(end, (from + at) / region->page * region->page);
        size_t hi = (from + at + n) / region->page * region->page;
        if (lo < hi)
            (void)vm_discard(address_of(region, lo), hi - lo);
    }
    *front = 0;
    return 0;
}

int region_is_committed(const struct region *region, size_t offset, size_t length) {
    if (!is_open(region))
        return REGION_RELEASED;
    if (length == 0 || offset > region->size || length > region->size - offset)
        return 0;
    return runs_contain(&region->committed, offset, offset + length);
}

int region_export(struct region *region, size_t offset, size_t length) {
    set_viewed(region, true);
    int known = region_is_committed(region, offset, length);
    if (known != 1)
        return known == 0 ? REGION_NOT_COMMITTED : known;
    /* The range must lie in one cell, below its guard. */
    size_t usable = region->cell - region->cell_guard;
    if (region->cell != 0 &&
        (length > usable || offset % region->cell > usable - length))
        return REGION_GUARDED;
    return 1;
}

int region_set_cells(struct region *region, size_t cell, size_t guard) {
    if (!is_open(region))
        return REGION_RELEASED;
    if ((cell | guard) & (region->page - 1))
        return REGION_MISALIGNED;
    if (guard == 0 || cell <= guard)
        return REGION_OUTSIDE;
    region->cell = cell;
    region->cell_guard = guard;
    return 0;
}

int region_guard_cells(struct region *region, size_t first, size_t stop) {
    if (!is_open(region))
        return REGION_RELEASED;
    if (region->cell == 0 || first >= stop || stop > region->size / region->cell)
        return REGION_OUTSIDE;
    size_t cell = region->cell, guard = region->cell_guard;
    if (!runs_contain(&region->committed, first * cell, stop * cell))
        return REGION_NOT_COMMITTED;
    int err = 0;
    for (size_t at = first + 1; at <= stop && err == 0; at++)
        err = vm_guard(address_of(region, at * cell - guard), guard);
    return err;
}

size_t region_runs(const struct region *region, bool committed, struct run *out, size_t max) {
    const struct runs *set = committed ? &region->committed : &region->reserved;
    for (size_t i = 0; i < set->count && i < max; i++)
        out[i] = set->items[i];
    return set->count;
}

int region_load(const struct region *region, size_t offset) {
    int known = region_is_committed(region, offset, 1);
    if (known != 1)
        return known == 0 ? REGION_NOT_COMMITTED : known;
    return (unsigned char)region->base[offset];
}

int region_store(struct region *region, size_t offset, unsigned char byte) {
    int known = region_is_committed(region, offset, 1);
    if (known != 1)
        return known == 0 ? REGION_NOT_COMMITTED : known;
    ((unsigned char *)region->base)[offset] = byte;
    return 0;
}

int region_seal(struct region *region) {
    struct runs before;
    struct run gap;
    if (!is_open(region))
        return REGION_RELEASED;
    int err = runs_copy(&before, &region->committed);
    if (err != 0)
        return err;
    err = region_commit(region, 0, region->size);
    if (err == 0) {
        err = vm_seal(address_of(region, 0) - region->guard, region->size + 2 * region->guard);
        /* If the seal is refused, decommit the bytes that were not committed before. */
        for (size_t at = 0; err != 0 && runs_next_gap(&before, at, region->size, &gap); at = gap.hi)
            (void)region_decommit(region, gap.lo, gap.hi - gap.lo);
    }
    region->sealed = region->sealed || err == 0;
    runs_clear(&before);
    return err;
}

static size_t counted_bytes; /* atomic */

int region_count(struct region *region) {
    if (!is_open(region))
        return REGION_RELEASED;
    if (!region->counted)
        __atomic_fetch_add(&counted_bytes, region->size, __ATOMIC_RELAXED);
    region->counted = true;
    return 0;
}

size_t region_counted_bytes(void) {
    return __atomic_load_n(&counted_bytes, __ATOMIC_RELAXED);
}

/* Unmaps all pieces that the region owns, highest first, and closes the region. */
static int unmap(struct region *region) {
    while (region->reserved.count > 0) {
        struct run piece = region->reserved.items[region->reserved.count - 1];
        size_t before = piece.lo == 0 ? region->guard : 0;
        size_t after = piece.hi == region->size ? region->guard : 0;
        int err = unmap_piece(region, piece.lo, piece.hi, before, after);
        if (err != 0)
            return err;
    }
    if (region->counted)
        __atomic_fetch_sub(&counted_bytes, region->size, __ATOMIC_RELAXED);
    region->counted = false;
    runs_empty(&region->reserved);
    runs_empty(&region->committed);
    set_viewed(region, true);
    close_file(region);
    region->base = NULL;
    return 0;
}

int region_release(struct region *region) {
    if (!is_open(region))
        return REGION_RELEASED;
    return region->sealed ? REGION_SEALED : unmap(region);
}

void region_retire(struct region *region) {
    set_viewed(region, true);
    region->retired = true;
}

void region_end(struct region *region) {
    struct run piece;
    /* The pages of a file stay: another process may use them. */
    if (region->base != NULL && !region->sealed && unmap(region) != 0 && !region->shared)
        for (size_t at = 0; runs_next(&region->committed, at, region->size, &piece); at = piece.hi)
            (void)vm_discard(address_of(region, piece.lo), piece.hi - piece.lo);
    close_file(region);
    runs_clear(&region->reserved);
    runs_clear(&region->committed);
    runs_clear(&region->traced);
    region->base = NULL;
}
