/* heap: allocates blocks from the pages of an arena and returns idle pages to the kernel. Uses
 * pagealloc and region, and vm for the metadata.
 *
 * A block is a run of whole pages; its size in bytes is what the caller asked for. Two tables
 * inside the arena describe blocks, in the form of Go's runtime:
 *  - spans, one word per page. The first page of a block holds its size as 2 * nbytes + 1. A few of
 *    its other pages hold the distance back to the first page as 2 * distance. They are the pages
 *    that an update of a Fenwick tree (P. Fenwick, 1994) visits from the first page on, so a lookup
 *    from any page meets one of them within log2 steps: a block of 2^27 pages writes 28 words
 *    instead of 2^27. All other words are 0;
 *  - the heap bitmap. The lowest bit of the entry for the first word of a block is set. All other
 *    bits belong to the user; freeing the block clears its first entry.
 * Both tables grow with the arena. Anyone with a view of them can write to them, so their contents
 * are not trusted: a wrong word can give a wrong answer, never a wrong address.
 *
 * Tables outside the arena hold per page a note of 4 bytes (the serial number of the block that
 * starts there; for a free page the time at which it was freed, in milliseconds) and two bits:
 *  - dirty: the page has been in use since it was last zero, so it may hold data;
 *  - released: the page was given back to the kernel and must be committed again before use.
 *
 * A handle names a block: page | zeroed << HEAP_PAGE_BITS | serial << (HEAP_PAGE_BITS + 1). The
 * serial number tells a freed block from the block now in its place, unless a multiple of 2^28
 * blocks were allocated in between.
 *
 * Orders of magnitude: 1 GiB of 8 KiB pages has 512 KiB of notes and 32 KiB of bits, and 64 TiB has
 * 2^16 times as much: demand-zero memory, backed only where pages were used.
 *
 * Holds for every function here:
 *  - a result that is a handle, a count or a number of bytes is not negative. A negative result is
 *    an enum heap_refusal, an enum pagealloc_refusal, or HEAP_ERRNO - errno of a refused system
 *    call; then nothing has changed;
 *  - any thread may call: the functions take the page allocator's lock. heap_give_back, and the
 *    allocating functions with `may_commit`, also change the region's books: their caller holds the
 *    region's lock.
 */
#ifndef PYRESERVE_HEAP_H
#define PYRESERVE_HEAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pagealloc.h"
#include "region.h"

enum heap_refusal {
    HEAP_CLOSED = -101,     /* the heap was closed */
    HEAP_NO_BLOCK = -102,   /* the handle or address belongs to no live block */
    HEAP_EMPTY = -103,      /* a block of 0 bytes was requested */
    HEAP_COMMIT = -104,     /* released pages must be committed first: call with `may_commit` */
    HEAP_SCATTERED = -105,  /* below earlier addresses, or more than HEAP_EXTENTS ranges of them */
    HEAP_VIEWED = -106,     /* views may show bytes of the region */
    HEAP_ERRNO = -1000
};

enum { HEAP_PAGE_BITS = 34, HEAP_SERIAL_BITS = 28, HEAP_EXTENTS = 128 };

/* A range of consecutive addresses: page number `page` lies at `address`, the next ones above
 * it. */
struct heap_extent {
    uint64_t page;
    uintptr_t address;
};

struct heap_stats {
    uint64_t arena, in_use, released; /* bytes: all pages; pages of blocks; pages given back */
    uint64_t requested;               /* bytes requested for live blocks */
    uint64_t mallocs, frees;          /* blocks since the heap was opened */
};

/* Where a layout keeps its metadata. */
struct heap_metadata {
    size_t page;          /* bytes: a power of two, whole OS pages */
    unsigned word;        /* bytes of a word of the layout, 4 or 8 */
    unsigned bitmap_bits; /* an entry: 4, 2, or 0 if there is no heap bitmap */
    uintptr_t start;      /* the address of word 0 and page 0 */
    void *spans;          /* word of page 0; NULL without an index: the heap's own tables */
    uintptr_t *index;     /* NULL, or per `unit` bytes of addresses the address of their metadata */
    size_t unit;          /* with an index: a power of two */
    size_t unit_bitmap;   /* with an index: bytes of bitmap in front of a unit's spans */
};

struct heap {
    struct pagealloc *pages;
    struct region *region;
    struct heap_metadata meta;
    uint32_t *notes;
    uint64_t *dirty, *released;
    struct heap_extent extents[HEAP_EXTENTS];
    size_t extent_count;
    uint64_t end; /* 1 + the highest page added */
    struct pagealloc_run claimed; /* free pages that a heap_give_back is working on */
    uint64_t released_pages, requested, mallocs, frees, serials;
    bool closed;
};

/* Bytes of memory for the tables of `capacity` pages, at most 2^HEAP_PAGE_BITS; with `spans` they
 * include the spans. */
uint64_t heap_bytes(uint64_t capacity, bool spans);

/* Opens the zeroed `*heap` as an empty heap whose pages lie in `region`. `tables` is heap_bytes()
 * zero bytes, aligned to an OS page. They begin with the page allocator; pagealloc_close on it
 * frees what the heap holds. */
void heap_open(struct heap *heap, void *tables, uint64_t capacity, bool spans,
               struct region *region, const struct heap_metadata *metadata);

/* Refuses (`closed`) or accepts all later calls. */
void heap_close(struct heap *heap, bool closed);

/* Adds whole pages of committed bytes of the region that read as zero. Returns 0. */
int64_t heap_add(struct heap *heap, uintptr_t address, size_t nbytes);

/* Bytes of the free run that ends with the highest page: growth in place lengthens it. */
int64_t heap_tail(struct heap *heap);

/* Allocates a block at a multiple of `align` bytes, a power of two, with an index at most `unit`.
 * With `zero` its bytes are zero. Where the block would need released pages, `may_commit` commits
 * them; otherwise the result is HEAP_COMMIT. Returns the handle. */
int64_t heap_alloc(struct heap *heap, uint64_t nbytes, uint64_t align, bool zero, bool may_commit);

/* Frees a block and returns its size. heap_free_unviewed refuses (HEAP_VIEWED) while the region's
 * `viewed` is set; see region_export. */
int64_t heap_free(struct heap *heap, int64_t handle);
int64_t heap_free_unviewed(struct heap *heap, int64_t handle);

/* Changes the size of a block in place and returns its former size. Its handle stays, and so do its
 * contents up to the smaller size. Growing takes the pages after the block, with undefined
 * contents; `may_commit` is as for heap_alloc. If they are not free, the result is a refusal of
 * pagealloc_alloc_at. Shrinking frees the pages that are no longer needed. */
int64_t heap_resize(struct heap *heap, int64_t handle, uint64_t nbytes, bool may_commit);

/* Replaces the handle of a block by `*renamed`; the old handle is invalid from then on. Returns
 * 0. */
int64_t heap_rename(struct heap *heap, int64_t handle, int64_t *renamed);

/* Allocates blocks of sizes[from] to sizes[count - 1] bytes until one is refused. `*refused` is the
 * refusal, or 0. Returns the number of blocks allocated; they stay allocated. */
int64_t heap_alloc_many(struct heap *heap, const struct pagealloc_integers *sizes, int64_t *handles,
                        size_t from, size_t count, bool may_commit, int64_t *refused);

/* Bytes of the whole pages for sizes[from] to sizes[count - 1]; UINT64_MAX above 2^62. */
uint64_t heap_need(const struct heap *heap, const struct pagealloc_integers *sizes, size_t from,
                   size_t count);

/* Frees all blocks or none: `*failed` is then the index of the first handle that names no live
 * block or occurs twice. Returns the bytes freed. `undo` removes the blocks from `mallocs` instead
 * of counting `frees`: for blocks of an allocation that failed later. */
int64_t heap_free_many(struct heap *heap, const int64_t *handles, size_t count, bool undo,
                       size_t *failed);

/* The handle of the block that contains `address`; the size of a block in bytes. */
int64_t heap_find(struct heap *heap, uintptr_t address);
int64_t heap_nbytes(struct heap *heap, int64_t handle);

/* The address of a page, or of the first page of a handle, live or not. */
uintptr_t heap_page_address(struct heap *heap, uint64_t page);
uintptr_t heap_address(struct heap *heap, int64_t handle);

/* Writes the handles of up to `max` blocks from page `*from` on, lowest first, and sets `*from` to
 * the page at which to continue. Returns how many; 0: no more. */
int64_t heap_blocks(struct heap *heap, uint64_t *from, int64_t *handles, size_t max);

/* Finds free pages below page `below` that are worth giving back: dirty, free for at least `age`
 * milliseconds, and with `lazy` not released already. Writes up to `max` runs for heap_give_back,
 * highest first, with at most `longest` pages each and `most` in all. Returns how many runs. */
int64_t heap_idle(struct heap *heap, uint64_t below, uint64_t most, uint64_t longest, uint32_t age,
                  bool lazy, struct pagealloc_run *out, size_t max);

/* Gives a run of free pages back to the kernel, with the metadata that describes only them. Charged
 * memory is decommitted if the run is large and the region is in few pieces; otherwise its contents
 * are discarded, with `lazy` when the kernel needs memory. Returns the bytes; 0 if some of the
 * pages are in use by now. */
int64_t heap_give_back(struct heap *heap, const struct pagealloc_run *piece, bool lazy);

/* Writes the statistics of one moment. */
void heap_measure(struct heap *heap, struct heap_stats *stats);

#endif
