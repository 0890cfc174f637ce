/* heap: blocks in the pages of an arena, and the giving back of pages that no block has.
 * pagealloc + region, and vm for the metadata.
 *
 * A heap hands out blocks: runs of whole pages of which so many bytes were asked for. What it knows
 * of them stands in memory as Go's runtime kept it:
 *  - spans, a word a page: at a block's first page its size, 2 * nbytes + 1; further on, at few of
 *    its pages, the way back there, 2 * distance. Which pages: those that the walk of a Fenwick tree
 *    (P. Fenwick, 1994) from the block's first page meets, so any page of the block finds one of
 *    them within log2 steps, and a block of 2^27 pages writes 28 words and not 2^27. Else 0;
 *  - the heap bitmap: the lowest bit of the entry of a block's first word is set. What else stands
 *    there is the user's, and is cleared when the block is freed.
 * Both are mapped as the arena grows, and both can be written by anybody who has a view of them, so
 * nothing that is read there is trusted: it can lead to a wrong answer, never to a wrong address.
 *
 * Besides, in tables of its own, a page has a note (4 bytes: the serial number of the block that
 * starts there, or when a free page was freed, in milliseconds) and two bits:
 *  - dirty: somebody had the page, so it may not read zero;
 *  - released: it was given back to the system, and is to be committed again before use.
 *
 * A block is known by its handle: page | zeroed << HEAP_PAGE_BITS | serial << (HEAP_PAGE_BITS + 1).
 * A handle of a block that was freed is told from that of the block now in its place, unless a
 * multiple of 2^28 blocks were allocated between.
 *
 * Holds for every function here:
 *  - a result that is a handle, a count or a number of bytes is not negative; a negative one is an
 *    enum heap_refusal or an enum pagealloc_refusal, or HEAP_ERRNO - errno of a refused system call,
 *    and then nothing has changed;
 *  - any thread may call: the allocator's lock is taken inside. Those that say "region" also use the
 *    region's books, so their caller holds the region's lock.
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
    HEAP_NO_BLOCK = -102,   /* no such block, or not any more */
    HEAP_EMPTY = -103,      /* a block has at least one byte */
    HEAP_COMMIT = -104,     /* the pages have to be committed first: call again with `region` */
    HEAP_SCATTERED = -105,  /* more pieces of addresses than a heap can have */
    HEAP_ERRNO = -1000
};

enum { HEAP_PAGE_BITS = 34, HEAP_SERIAL_BITS = 28, HEAP_EXTENTS = 128 };

/* Pages from `page` on lie at `address` and above. */
struct heap_extent {
    uint64_t page;
    uintptr_t address;
};

struct heap_stats {
    uint64_t arena, in_use, released; /* bytes: all pages; of blocks; given back and not taken again */
    uint64_t requested;               /* bytes asked for, of blocks that live */
    uint64_t mallocs, frees;          /* blocks, ever */
};

/* Where the layout of an arena has its metadata. */
struct heap_metadata {
    size_t page;          /* bytes: a power of two, whole OS pages */
    unsigned word;        /* bytes of a word of the layout, 4 or 8 */
    unsigned bitmap_bits; /* an entry: 4, 2, or 0 if there is no heap bitmap */
    uintptr_t start;      /* the address of word 0 and page 0 */
    void *spans;          /* of page 0; NULL: in the heap's own tables, unless there is an index */
    uintptr_t *index;     /* NULL, or the address of the metadata of each `unit` bytes of addresses */
    size_t unit;          /* with an index: a power of two */
    size_t unit_bitmap;   /* with an index: bytes of bitmap, which the spans follow */
};

struct heap {
    struct pagealloc *pages;
    struct region *region;
    struct heap_metadata meta;
    uint32_t *notes;
    uint64_t *dirty, *released;
    struct heap_extent extents[HEAP_EXTENTS];
    size_t extent_count;
    uint64_t end; /* the first page above all that were added */
    struct pagealloc_run claimed; /* free pages that are being given back just now */
    uint64_t released_pages, requested, mallocs, frees, serials;
    bool closed;
};

/* Bytes of memory for the tables of `capacity` pages, at most 2^HEAP_PAGE_BITS; with room for spans
 * if `spans`. */
uint64_t heap_bytes(uint64_t capacity, bool spans);

/* Makes an empty heap of a zeroed one, with tables in heap_bytes() zero bytes at an OS page's start,
 * where its page allocator comes first: to close that one is the end of the heap. The blocks' pages
 * lie in `region`. */
void heap_open(struct heap *heap, void *tables, uint64_t capacity, bool spans,
               struct region *region, const struct heap_metadata *metadata);

/* From now on every call is refused, or not any more. */
void heap_close(struct heap *heap, bool closed);

/* Takes in fresh committed bytes of the region, which read zero, whole pages. Returns 0. */
int64_t heap_add(struct heap *heap, uintptr_t address, size_t nbytes);

/* Bytes of the free run at the end of what was added, which a growth in place would lengthen. */
int64_t heap_tail(struct heap *heap);

/* Allocates a block at a multiple of `align` bytes, a power of two, under an index at most a unit;
 * cleared if `zero`. Without
 * `region`, pages that were given back are left alone: HEAP_COMMIT. Returns its handle. */
int64_t heap_alloc(struct heap *heap, uint64_t nbytes, uint64_t align, bool zero, bool may_commit);

/* Frees a block. Returns its size. */
int64_t heap_free(struct heap *heap, int64_t handle);

/* Gives a block the new handle `*renamed`; the old one then reads as freed. Returns 0. */
int64_t heap_rename(struct heap *heap, int64_t handle, int64_t *renamed);

/* Allocates blocks of sizes[from], ... up to sizes[count - 1] bytes until one is refused, and then
 * writes why to `*refused`, else 0. Returns how many it allocated. */
int64_t heap_alloc_many(struct heap *heap, const struct pagealloc_integers *sizes, int64_t *handles,
                        size_t from, size_t count, bool may_commit, int64_t *refused);

/* Bytes of whole pages for sizes[from], ... up to sizes[count - 1]; UINT64_MAX if they are too many
 * to be had. */
uint64_t heap_need(const struct heap *heap, const struct pagealloc_integers *sizes, size_t from,
                   size_t count);

/* Frees all blocks, or none: then `*failed` is the first that is none, or stands there twice.
 * Returns the bytes. `undo`: they were allocated by a call that failed, and count as never made. */
int64_t heap_free_many(struct heap *heap, const int64_t *handles, size_t count, bool undo,
                       size_t *failed);

/* The block that has the byte at `address`; the size of a block. */
int64_t heap_find(struct heap *heap, uintptr_t address);
int64_t heap_nbytes(struct heap *heap, int64_t handle);

/* Where a page, or a block of this handle, begins, whether or not it lives. */
uintptr_t heap_page_address(struct heap *heap, uint64_t page);
uintptr_t heap_address(struct heap *heap, int64_t handle);

/* Writes the handles of up to `max` blocks from page `*from` on, lowest first; `*from` is then where
 * to go on. Returns how many; 0: no more. */
int64_t heap_blocks(struct heap *heap, uint64_t *from, int64_t *handles, size_t max);

/* Free pages below page `below` that a call of heap_give_back may give back, highest first, as
 * pieces that are as large as they come but for `most` pages in all, and at most `longest` each;
 * freed for at least `age` milliseconds. Returns how many pieces. */
int64_t heap_idle(struct heap *heap, uint64_t below, uint64_t most, uint64_t longest, uint32_t age,
                  bool lazy, struct pagealloc_run *out, size_t max);

/* Gives a piece of free pages back to the system (region), with the metadata that only describes
 * them. Charged memory in a large piece is decommitted, as long as that leaves the region in few
 * pieces; else the contents are discarded, `lazy`: when the kernel needs the memory. Returns the
 * bytes, 0 if somebody has taken pages of it meanwhile. */
int64_t heap_give_back(struct heap *heap, const struct pagealloc_run *piece, bool lazy);

/* Writes what the heap has at this moment. */
void heap_measure(struct heap *heap, struct heap_stats *stats);

#endif
