#include "heap.h"

#include <errno.h>
#include <string.h>

#include "bitmap.h"
#include "sys.h"
#include "vm.h"
#include "words.h"

/* Decommitting also refunds the commit charge, but each hole costs two map entries. */
enum { FEW_PIECES = 512, LARGE_PIECE = 1 << 20 };
/* Limits per hold of the lock: bytes cleared, blocks allocated. */
enum { CLEAR_AT_ONCE = 1 << 18, BLOCKS_AT_ONCE = 1 << 12 };

/* Marks, in the note of its first page, a block that heap_free_many is about to free. Serial
 * numbers do not reach this bit, so the mark also makes the handle invalid. */
#define CONDEMNED (UINT32_C(1) << 31)
#define SERIAL_MASK ((UINT32_C(1) << HEAP_SERIAL_BITS) - 1)
#define PAGE_MASK ((UINT64_C(1) << HEAP_PAGE_BITS) - 1)

/* The pages of a block of `nbytes` > 0 bytes. */
static uint64_t pages_for(const struct heap *heap, uint64_t nbytes) {
    return (nbytes - 1) / heap->meta.page + 1;
}

/* -- pages and addresses ----------------------------------------------------------------------- */

/* The address of a page. Extents have ascending pages and addresses; mostly it is in the last. */
static uintptr_t address_of(const struct heap *heap, uint64_t page) {
    size_t i = heap->extent_count - 1;
    while (i > 0 && heap->extents[i].page > page)
        i--;
    return heap->extents[i].address + (uintptr_t)(page - heap->extents[i].page) * heap->meta.page;
}

/* The page that contains an address; `end` if no page of the heap does. */
static uint64_t page_at(const struct heap *heap, uintptr_t address) {
    uint64_t limit = heap->end;
    for (size_t i = heap->extent_count; i-- > 0; limit = heap->extents[i].page) {
        if (heap->extents[i].address > address)
            continue;
        uint64_t page = heap->extents[i].page +
                        (address - heap->extents[i].address) / heap->meta.page;
        return page < limit ? page : heap->end;
    }
    return heap->end;
}

/* Numbers new pages: sets `*page` to the number of the one at `address`. With an index the gaps
 * between arenas, which may be terabytes, get no numbers: addresses far above the last extent start
 * a new one. It leaves at least one number unused, so that no run joins across the gap, and keeps
 * the distance to a multiple of `unit`, so that an aligned page number is an aligned address. */
static int64_t number_pages(struct heap *heap, uintptr_t address, uint64_t *page) {
    const struct heap_metadata *meta = &heap->meta;
    if (heap->extent_count > 0) {
        const struct heap_extent *last = &heap->extents[heap->extent_count - 1];
        if (address < last->address)
            return HEAP_SCATTERED;
        /* Close to the last extent: number on, the gap included. */
        *page = last->page + (address - last->address) / meta->page;
        if (meta->index == NULL || *page <= heap->end + meta->unit / meta->page)
            return 0;
    }
    if (heap->extent_count == HEAP_EXTENTS)
        return HEAP_SCATTERED;
    /* Round up past the highest page to a multiple of the unit, then add the offset inside it. */
    uint64_t unit = meta->unit / meta->page;
    uint64_t beyond = heap->extent_count == 0 ? 0 : round_up(heap->end + 1, unit);
    *page = beyond + address % meta->unit / meta->page;
    heap->extents[heap->extent_count++] = (struct heap_extent){*page, address};
    return 0;
}

/* -- metadata in the arena: a word per page, an entry per word --------------------------------- */

/* The span word of the page at an address; NULL where no metadata is mapped. */
static unsigned char *span_at(const struct heap *heap, uintptr_t address) {
    const struct heap_metadata *meta = &heap->meta;
    if (meta->index == NULL)
        return (unsigned char *)meta->spans + (address - meta->start) / meta->page * meta->word;
    unsigned char *own = (unsigned char *)meta->index[address / meta->unit];
    if (own == NULL)
        return NULL;
    return own + meta->unit_bitmap + address % meta->unit / meta->page * meta->word;
}

/* A span word is as wide as a word of the layout. */
static uint64_t read_span(const struct heap *heap, const unsigned char *span) {
    return heap->meta.word == 4 ? *(const uint32_t *)(const void *)span
                                : *(const uint64_t *)(const void *)span;
}

static void write_span(const struct heap *heap, uintptr_t address, uint64_t value) {
    void *span = span_at(heap, address);
    if (heap->meta.word == 4)
        *(uint32_t *)span = (uint32_t)value;
    else
        *(uint64_t *)span = value;
}

/* The byte of the heap bitmap with the entry for the first word of a page; `*mask` has its bits. */
static unsigned char *entry_at(const struct heap *heap, uintptr_t address, unsigned char *mask) {
    const struct heap_metadata *meta = &heap->meta;
    *mask = meta->bitmap_bits == 4 ? 0x0f : 0x11;
    size_t a_byte = meta->word * (8 / meta->bitmap_bits); /* bytes of arena that a byte describes */
    /* With an index the bitmap of a unit grows upwards. Without, Go's bitmap grows down from
     * `start`. */
    if (meta->index != NULL)
        return (unsigned char *)meta->index[address / meta->unit] + address % meta->unit / a_byte;
    return (unsigned char *)meta->start - 1 - (address - meta->start) / a_byte;
}

/* Writes the span words of a block of `n` pages, or zeros them if `nbytes` is 0: the size at the
 * first page, then the distance back at the pages of the Fenwick update. Numbers count from 1 for
 * that, and `at & -at` is the lowest set bit. */
static void write_spans(const struct heap *heap, uintptr_t address, uint64_t n, uint64_t nbytes) {
    uint64_t first = (address - heap->meta.start) / heap->meta.page + 1;
    write_span(heap, address, nbytes == 0 ? 0 : 2 * nbytes + 1);
    for (uint64_t at = first + (first & -first); at - first < n; at += at & -at)
        write_span(heap, address + (uintptr_t)(at - first) * heap->meta.page,
                   nbytes == 0 ? 0 : 2 * (at - first));
}

/* The start of the block with the page at an address: the Fenwick query visits pages downwards
 * until one has a word. False if there is none or the word makes no sense; the caller checks the
 * rest. */
static bool block_start(const struct heap *heap, uintptr_t address, uintptr_t *start) {
    uint64_t page = (address - heap->meta.start) / heap->meta.page;
    for (uint64_t at = page + 1; at > 0; at -= at & -at) {
        uintptr_t here = heap->meta.start + (uintptr_t)(at - 1) * heap->meta.page;
        const unsigned char *span = span_at(heap, here);
        uint64_t word = span == NULL ? 0 : read_span(heap, span);
        if (span == NULL)
            return false;
        if (word == 0)
            continue;
        /* An odd word is a size: the block starts here. An even one is the distance back. */
        uint64_t back = word % 2 == 1 ? 0 : word / 2;
        *start = here - (uintptr_t)back * heap->meta.page;
        return back < at;
    }
    return false;
}

/* -- blocks ------------------------------------------------------------------------------------ */

static int64_t handle_of(uint64_t page, uint32_t serial, bool zeroed) {
    return (int64_t)(page | (uint64_t)zeroed << HEAP_PAGE_BITS |
                     (uint64_t)serial << (HEAP_PAGE_BITS + 1));
}

static uint64_t page_of(int64_t handle) {
    return (uint64_t)handle & PAGE_MASK;
}

uintptr_t heap_page_address(struct heap *heap, uint64_t page) {
    pagealloc_lock(heap->pages);
    uintptr_t address = address_of(heap, page);
    pagealloc_unlock(heap->pages);
    return address;
}

uintptr_t heap_address(struct heap *heap, int64_t handle) {
    return heap_page_address(heap, page_of(handle));
}

/* Whether [page, page + n) can belong to blocks: in use, and not by a heap_give_back. */
static bool may_be_block(const struct heap *heap, uint64_t page, uint64_t n) {
    return pagealloc_in_use_held(heap->pages, page, n) &&
           (page >= heap->claimed.stop || page + n <= heap->claimed.start);
}

/* The size of the block that starts at a page, as its span word says, if all the pages that it
 * would have are in use; else 0. */
static uint64_t size_at(const struct heap *heap, uint64_t page) {
    if (page >= heap->end || !may_be_block(heap, page, 1))
        return 0;
    const unsigned char *span = span_at(heap, address_of(heap, page));
    uint64_t word = span == NULL ? 0 : read_span(heap, span), nbytes = word % 2 * (word / 2);
    uint64_t n = nbytes == 0 ? 0 : pages_for(heap, nbytes);
    return n == 1 || (n > 1 && may_be_block(heap, page, n)) ? nbytes : 0;
}

/* The size of the block with this handle, or the refusal of the handle. */
static int64_t size_of(const struct heap *heap, int64_t handle) {
    uint64_t page = page_of(handle);
    uint32_t serial = (uint32_t)((uint64_t)handle >> (HEAP_PAGE_BITS + 1));
    if (heap->closed)
        return HEAP_CLOSED;
    if (handle < 0 || page >= heap->end || heap->notes[page] != serial)
        return HEAP_NO_BLOCK;
    uint64_t nbytes = size_at(heap, page);
    return nbytes > 0 ? (int64_t)nbytes : HEAP_NO_BLOCK;
}

/* Commits the whole gap of the arena around the offsets [lo, hi): that joins two pieces into one. A
 * commit of part of it would leave the region in as many pieces or more. */
static int commit_gap(struct heap *heap, size_t lo, size_t hi) {
    const struct runs *committed = &heap->region->committed;
    uintptr_t base = (uintptr_t)heap->region->base;
    size_t low = heap->meta.start - base, high = address_of(heap, heap->end) - base;
    /* The gap lies between the last piece that ends at or before `lo` and the next one. */
    for (size_t i = 0; i < committed->count; i++) {
        const struct run *run = &committed->items[i];
        if (run->hi <= lo && run->hi > low)
            low = run->hi;
        if (run->lo >= hi && run->lo < high)
            high = run->lo;
    }
    return region_commit(heap->region, low, high - low);
}

/* Commits pages that were given back and accounts for them. */
static int64_t recommit(struct heap *heap, uint64_t page, uint64_t n) {
    size_t offset = address_of(heap, page) - (uintptr_t)heap->region->base;
    size_t length = (size_t)n * heap->meta.page;
    /* In many pieces, close the hole; if that is refused, as by a limit, commit just these
     * pages. */
    bool many = heap->region->committed.count >= FEW_PIECES && heap->meta.index == NULL;
    int err = many && commit_gap(heap, offset, offset + length) == 0
                  ? 0
                  : region_commit(heap->region, offset, length);
    if (err != 0)
        return err < 0 ? HEAP_CLOSED : HEAP_ERRNO - err;
    heap->released_pages -= bitmap_clear(heap->released, page, page + n);
    return 0;
}

/* Makes pages that were just allocated accessible if some of them were released. On a refusal it
 * frees the pages. */
static int64_t commit_released(struct heap *heap, uint64_t page, uint64_t n, bool may_commit) {
    if (heap->released_pages == 0 ||
        bitmap_find(heap->released, page, page + n, true) == page + n)
        return 0;
    int64_t refused = may_commit ? recommit(heap, page, n) : HEAP_COMMIT;
    if (refused != 0)
        (void)pagealloc_free_held(heap->pages, page, n);
    return refused;
}

/* Records a block on accessible pages: span words, heap bitmap, counters and a new serial number.
 * Returns the handle. */
static int64_t record_block(struct heap *heap, uint64_t page, uint64_t n, uint64_t nbytes) {
    uintptr_t address = address_of(heap, page);
    write_spans(heap, address, n, nbytes);
    if (heap->meta.bitmap_bits != 0) {
        unsigned char mask, *entry = entry_at(heap, address, &mask);
        *entry |= 1;
    }
    heap->mallocs++;
    uint32_t serial = (uint32_t)++heap->serials & SERIAL_MASK;
    heap->notes[page] = serial;
    heap->requested += nbytes;
    return handle_of(page, serial, bitmap_find(heap->dirty, page, page + n, true) == page + n);
}

/* Allocates with the lock held; does not zero the block. */
static int64_t allocate_block(struct heap *heap, uint64_t nbytes, uint64_t align, bool may_commit) {
    if (heap->closed)
        return HEAP_CLOSED;
    if (nbytes == 0)
        return HEAP_EMPTY;
    if (!is_power_of_two(align) || (heap->meta.index != NULL && align > heap->meta.unit))
        return PAGEALLOC_ALIGNMENT;
    if (heap->extent_count == 0)
        return PAGEALLOC_FULL;
    /* Alignment below a page is free. Above, page numbers count from `start`, which need not be
     * aligned: `phase` shifts the search. With an index the numbers are aligned as the addresses
     * are. */
    uint64_t n = pages_for(heap, nbytes), coarse = align / heap->meta.page, phase = 0;
    if (coarse > 1 && heap->meta.index == NULL)
        phase = heap->meta.start / heap->meta.page & (coarse - 1);
    int64_t page = pagealloc_alloc_held(heap->pages, n, coarse > 1 ? coarse : 1, phase);
    int64_t refused = page < 0 ? page : commit_released(heap, (uint64_t)page, n, may_commit);
    return refused != 0 ? refused : record_block(heap, (uint64_t)page, n, nbytes);
}

/* Allocates blocks of sizes[*i] and the sizes after it in the lowest run that fits the first, until
 * the run is full. A block smaller than the first ends this, since a lower run might fit it. The
 * result is the same as allocating one by one, with one search for all. */
static int64_t allocate_in_run(struct heap *heap, const struct pagealloc_integers *sizes,
                               int64_t *handles, size_t *i, size_t stop, bool may_commit) {
    struct pagealloc_run run;
    uint64_t first = pagealloc_integer(sizes, *i), total = 0;
    if (heap->closed)
        return HEAP_CLOSED;
    if (first == 0)
        return HEAP_EMPTY;
    uint64_t least_pages = pages_for(heap, first), n = least_pages;
    if (!pagealloc_lowest_held(heap->pages, least_pages, &run))
        return PAGEALLOC_FULL;
    /* First count the blocks that fit and their pages, then take the pages at once. */
    size_t end = *i;
    while (n >= least_pages && n <= run.stop - run.start - total) {
        total += n;
        if (++end == stop)
            break;
        uint64_t nbytes = pagealloc_integer(sizes, end);
        n = nbytes == 0 ? 0 : pages_for(heap, nbytes);
    }
    (void)pagealloc_alloc_at_held(heap->pages, run.start, total);
    int64_t refused = commit_released(heap, run.start, total, may_commit);
    /* Cut the pages into blocks. */
    for (uint64_t page = run.start; refused == 0 && *i < end; page += n, ++*i) {
        uint64_t nbytes = pagealloc_integer(sizes, *i);
        n = pages_for(heap, nbytes);
        handles[*i] = record_block(heap, page, n, nbytes);
    }
    return refused;
}

/* Erases a live block from the metadata and the counters; the caller frees its pages. */
static void erase_block(struct heap *heap, uint64_t page, uint64_t nbytes, uint32_t now) {
    uint64_t n = pages_for(heap, nbytes);
    uintptr_t address = address_of(heap, page);
    write_spans(heap, address, n, 0);
    if (heap->meta.bitmap_bits != 0) {
        unsigned char mask, *entry = entry_at(heap, address, &mask);
        *entry &= (unsigned char)~mask;
    }
    /* The notes of free pages say when they were freed: heap_idle compares them with the clock. */
    for (uint64_t i = page; i < page + n; i++)
        heap->notes[i] = now;
    heap->requested -= nbytes;
    heap->frees++;
}

/* Pages of a block may hold data, so they are dirty from now on. */
static void free_pages(struct heap *heap, uint64_t page, uint64_t n) {
    (void)bitmap_set(heap->dirty, page, page + n);
    (void)pagealloc_free_held(heap->pages, page, n);
}

/* Zeros the dirty pages of a new block, a piece per hold of the lock so that other threads wait
 * less. Another thread may find the block and free it in between, so each piece checks that it is
 * live. */
static void clear_dirty(struct heap *heap, int64_t handle, uint64_t n) {
    uint64_t page = page_of(handle), end = page + n, most = CLEAR_AT_ONCE / heap->meta.page + 1;
    while (page < end) {
        pagealloc_lock(heap->pages);
        bool gone = size_of(heap, handle) < 0;
        /* The next piece: from the first dirty page on, up to a clean one or the limit. */
        uint64_t start = gone ? end : bitmap_find(heap->dirty, page, end, true);
        page = start == end ? end
                            : bitmap_find(heap->dirty, start, smaller(end, start + most), false);
        if (start < page)
            memset((void *)address_of(heap, start), 0,
                   (size_t)(page - start) * heap->meta.page);
        pagealloc_unlock(heap->pages);
    }
}

int64_t heap_alloc(struct heap *heap, uint64_t nbytes, uint64_t align, bool zero, bool may_commit) {
    const int64_t zeroed = (int64_t)1 << HEAP_PAGE_BITS;
    pagealloc_lock(heap->pages);
    int64_t handle = allocate_block(heap, nbytes, align, may_commit);
    pagealloc_unlock(heap->pages);
    if (handle >= 0 && zero && !(handle & zeroed)) {
        clear_dirty(heap, handle, pages_for(heap, nbytes));
        handle |= zeroed;
    }
    return handle;
}

static int64_t free_block(struct heap *heap, int64_t handle, bool viewed_too) {
    uint32_t now = sys_milliseconds();
    pagealloc_lock(heap->pages);
    /* Read under the lock: see region_export. */
    bool refused = !viewed_too && __atomic_load_n(&heap->region->viewed, __ATOMIC_RELAXED);
    int64_t nbytes = refused ? HEAP_VIEWED : size_of(heap, handle);
    if (nbytes > 0) {
        erase_block(heap, page_of(handle), (uint64_t)nbytes, now);
        free_pages(heap, page_of(handle), pages_for(heap, (uint64_t)nbytes));
    }
    pagealloc_unlock(heap->pages);
    return nbytes;
}

int64_t heap_free(struct heap *heap, int64_t handle) {
    return free_block(heap, handle, true);
}

int64_t heap_free_unviewed(struct heap *heap, int64_t handle) {
    return free_block(heap, handle, false);
}

int64_t heap_resize(struct heap *heap, int64_t handle, uint64_t nbytes, bool may_commit) {
    uint32_t now = sys_milliseconds();
    uint64_t page = page_of(handle);
    pagealloc_lock(heap->pages);
    int64_t result = nbytes == 0 ? HEAP_EMPTY : size_of(heap, handle);
    uint64_t before = result > 0 ? pages_for(heap, (uint64_t)result) : 0;
    uint64_t after = result > 0 ? pages_for(heap, nbytes) : 0;
    /* Take the pages after the block first: only this step can be refused. */
    int64_t refused = 0;
    if (after > before)
        refused = pagealloc_alloc_at_held(heap->pages, page + before, after - before);
    if (after > before && refused == 0)
        refused = commit_released(heap, page + before, after - before, may_commit);
    if (refused != 0)
        result = refused;
    if (result > 0) {
        uintptr_t address = address_of(heap, page);
        write_spans(heap, address, before, 0);
        write_spans(heap, address, after, nbytes);
        heap->requested += nbytes - (uint64_t)result;
        for (uint64_t i = page + after; i < page + before; i++)
            heap->notes[i] = now;
        if (after < before)
            free_pages(heap, page + after, before - after);
    }
    pagealloc_unlock(heap->pages);
    return result;
}

int64_t heap_rename(struct heap *heap, int64_t handle, int64_t *renamed) {
    pagealloc_lock(heap->pages);
    int64_t nbytes = size_of(heap, handle);
    if (nbytes > 0) {
        uint32_t serial = (uint32_t)++heap->serials & SERIAL_MASK;
        heap->notes[page_of(handle)] = serial;
        *renamed = handle_of(page_of(handle), serial, false);
    }
    pagealloc_unlock(heap->pages);
    return nbytes > 0 ? 0 : nbytes;
}

int64_t heap_alloc_many(struct heap *heap, const struct pagealloc_integers *sizes, int64_t *handles,
                        size_t from, size_t count, bool may_commit, int64_t *refused) {
    size_t i = from;
    *refused = 0;
    while (i < count && *refused == 0) {
        size_t stop = (size_t)smaller(count, i + BLOCKS_AT_ONCE);
        pagealloc_lock(heap->pages);
        while (i < stop && *refused == 0)
            *refused = allocate_in_run(heap, sizes, handles, &i, stop, may_commit);
        pagealloc_unlock(heap->pages);
    }
    return (int64_t)(i - from);
}

uint64_t heap_need(const struct heap *heap, const struct pagealloc_integers *sizes, size_t from,
                   size_t count) {
    const uint64_t most = (UINT64_C(1) << 62) / heap->meta.page; /* the sum cannot overflow */
    uint64_t pages = 0;
    for (size_t i = from; i < count && pages <= most; i++) {
        uint64_t nbytes = pagealloc_integer(sizes, i);
        pages += nbytes == 0 ? 0 : pages_for(heap, nbytes);
    }
    return pages > most ? UINT64_MAX : pages * heap->meta.page;
}

int64_t heap_free_many(struct heap *heap, const int64_t *handles, size_t count, bool undo,
                       size_t *failed) {
    uint32_t now = sys_milliseconds();
    int64_t result = 0;
    size_t i = 0;
    pagealloc_lock(heap->pages);
    /* First pass: check every handle and mark its block, which makes a second occurrence
     * invalid. */
    for (; i < count && result == 0; i++) {
        int64_t nbytes = size_of(heap, handles[i]);
        if (nbytes < 0)
            result = nbytes;
        else
            heap->notes[page_of(handles[i])] |= CONDEMNED;
    }
    /* On a refusal take the marks off again: nothing is freed. */
    if (result != 0) {
        *failed = --i;
        while (i-- > 0)
            heap->notes[page_of(handles[i])] &= ~CONDEMNED;
        count = 0;
    }
    /* Second pass: erase the blocks. Adjacent ones are collected in `run` and freed together. */
    struct pagealloc_run run = {0, 0};
    for (i = 0; i < count; i++) {
        uint64_t page = page_of(handles[i]), nbytes = size_at(heap, page);
        if (nbytes == 0) /* another thread has overwritten the span since */
            continue;
        if (page != run.stop && run.start < run.stop) /* not adjacent: free what was collected */
            free_pages(heap, run.start, run.stop - run.start);
        if (page != run.stop)
            run.start = page;
        run.stop = page + pages_for(heap, nbytes);
        erase_block(heap, page, nbytes, now);
        result += (int64_t)nbytes;
    }
    if (run.start < run.stop)
        free_pages(heap, run.start, run.stop - run.start);
    /* Blocks of a failed call never existed for the statistics. */
    if (undo) {
        heap->mallocs -= count;
        heap->frees -= count;
    }
    pagealloc_unlock(heap->pages);
    return result;
}

int64_t heap_find(struct heap *heap, uintptr_t address) {
    int64_t found = HEAP_NO_BLOCK;
    uintptr_t start;
    pagealloc_lock(heap->pages);
    uint64_t page = page_at(heap, address);
    if (heap->closed) {
        found = HEAP_CLOSED;
    } else if (page < heap->end && may_be_block(heap, page, 1) &&
               block_start(heap, address, &start)) {
        /* The span words are not trusted: the block they give must contain the page. */
        uint64_t first = page_at(heap, start), nbytes = size_at(heap, first);
        if (nbytes > 0 && first <= page && page - first < pages_for(heap, nbytes))
            found = handle_of(first, heap->notes[first] & SERIAL_MASK, false);
    }
    pagealloc_unlock(heap->pages);
    return found;
}

int64_t heap_nbytes(struct heap *heap, int64_t handle) {
    pagealloc_lock(heap->pages);
    int64_t nbytes = size_of(heap, handle);
    pagealloc_unlock(heap->pages);
    return nbytes;
}

int64_t heap_blocks(struct heap *heap, uint64_t *from, int64_t *handles, size_t max) {
    struct pagealloc_run used;
    size_t n = 0;
    pagealloc_lock(heap->pages);
    uint64_t page = *from;
    while (n < max && !heap->closed &&
           pagealloc_used_from_held(heap->pages, page, heap->end, &used)) {
        /* In each run of pages in use, step from block to block by their sizes. */
        for (page = used.start; page < used.stop && n < max;) {
            uint64_t nbytes = size_at(heap, page);
            if (nbytes > 0) {
                handles[n++] = handle_of(page, heap->notes[page] & SERIAL_MASK, false);
                page += pages_for(heap, nbytes);
            } else { /* in use without a block: claimed, or its span was overwritten */
                page = page < heap->claimed.stop && page >= heap->claimed.start
                           ? heap->claimed.stop
                           : page + 1;
            }
        }
    }
    *from = page;
    int64_t result = heap->closed ? HEAP_CLOSED : (int64_t)n;
    pagealloc_unlock(heap->pages);
    return result;
}

/* -- giving pages back to the kernel ----------------------------------------------------------- */

/* A bit for each of the 64 pages of word `i` that is worth giving back if it is free: dirty, old
 * enough and, with `lazy`, not released. */
static uint64_t eligible_pages(const struct heap *heap, uint64_t i, uint32_t age, uint32_t now,
                               bool lazy) {
    uint64_t pages = heap->dirty[i] & (lazy ? ~heap->released[i] : ~UINT64_C(0));
    for (uint64_t rest = age > 0 ? pages : 0; rest != 0; rest &= rest - 1) {
        unsigned bit = (unsigned)__builtin_ctzll(rest);
        if (now - heap->notes[i * 64 + bit] < age)
            pages &= ~(UINT64_C(1) << bit);
    }
    return pages;
}

/* 1 + the highest page of [start, stop) whose eligibility is `wanted`; `start` if there is none. */
static uint64_t end_of_last(const struct heap *heap, uint64_t start, uint64_t stop, bool wanted,
                            uint32_t age, uint32_t now, bool lazy) {
    while (stop > start) {
        uint64_t i = (stop - 1) / 64, low = larger(i * 64, start);
        /* Select the bits that match, and mask the ends of the range. */
        uint64_t pages = eligible_pages(heap, i, age, now, lazy) ^ (wanted ? 0 : ~UINT64_C(0));
        pages &= (~UINT64_C(0) >> (63 - (stop - 1) % 64)) & (~UINT64_C(0) << (low % 64));
        if (pages != 0)
            return i * 64 + 64 - (unsigned)__builtin_clzll(pages);
        stop = low;
    }
    return start;
}

int64_t heap_idle(struct heap *heap, uint64_t below, uint64_t most, uint64_t longest, uint32_t age,
                  bool lazy, struct pagealloc_run *out, size_t max) {
    uint32_t now = sys_milliseconds();
    struct pagealloc_run run;
    size_t n = 0;
    pagealloc_lock(heap->pages);
    while (n < max && most > 0 && pagealloc_run_below_held(heap->pages, below, &run)) {
        /* In each free run from the top: the highest eligible page ends a piece, and the next page
         * below that is not eligible, or a limit, starts it. */
        uint64_t stop = end_of_last(heap, run.start, run.stop, true, age, now, lazy);
        below = run.start;
        if (stop == run.start)
            continue;
        uint64_t length = smaller(smaller(most, longest), stop - run.start);
        below = end_of_last(heap, stop - length, stop, false, age, now, lazy);
        out[n++] = (struct pagealloc_run){below, stop};
        most -= stop - below;
    }
    int64_t result = heap->closed ? HEAP_CLOSED : (int64_t)n;
    pagealloc_unlock(heap->pages);
    return result;
}

/* Discards the whole OS pages in [low, high). A refusal is harmless: they keep their memory. */
static void discard_inside(const struct heap *heap, uintptr_t low, uintptr_t high) {
    low = (uintptr_t)round_up(low, heap->region->page);
    high -= high % heap->region->page;
    if (low < high)
        (void)vm_discard(low, high - low);
}

/* Discards the metadata of free pages: span words and bitmap entries are zero, notes have no
 * use. */
static void discard_metadata(const struct heap *heap, uint64_t start, uint64_t stop) {
    const struct heap_metadata *meta = &heap->meta;
    uintptr_t low = address_of(heap, start);
    uintptr_t high = low + (uintptr_t)(stop - start) * meta->page;
    discard_inside(heap, (uintptr_t)(heap->notes + start), (uintptr_t)(heap->notes + stop));
    /* With an index, one unit at a time: metadata of two units is not adjacent. */
    while (low < high) {
        uintptr_t end = meta->index == NULL ? high : (low / meta->unit + 1) * meta->unit;
        uintptr_t last = (end < high ? end : high) - meta->page;
        discard_inside(heap, (uintptr_t)span_at(heap, low),
                       (uintptr_t)span_at(heap, last) + meta->word);
        if (meta->bitmap_bits != 0) {
            unsigned char mask, *first = entry_at(heap, low, &mask);
            size_t nbytes = (last + meta->page - low) / (meta->word * (8 / meta->bitmap_bits));
            uintptr_t begin = (uintptr_t)first;
            if (meta->index == NULL) /* the bitmap grows down: `first` is its highest byte */
                begin = begin + 1 - nbytes;
            discard_inside(heap, begin, begin + nbytes);
        }
        low = last + meta->page;
    }
}

/* Decommits a large piece of charged memory, or discards its contents. A refused decommit may have
 * left the bytes reserved, which is as good. */
static int return_memory(struct region *region, size_t offset, size_t length, bool lazy) {
    bool charged = !(region->accounting & VM_NORESERVE);
    if (!lazy && charged && length >= LARGE_PIECE && region->committed.count < FEW_PIECES &&
        (region_decommit(region, offset, length) == 0 ||
         region_is_committed(region, offset, length) != 1))
        return 0;
    return region_discard(region, offset, length, lazy);
}

int64_t heap_give_back(struct heap *heap, const struct pagealloc_run *piece, bool lazy) {
    uint64_t start = piece->start, n = piece->stop - piece->start;
    /* Claim the pages: allocate them, so that no thread uses them while the lock is not held. */
    pagealloc_lock(heap->pages);
    bool taken = heap->closed || pagealloc_alloc_at_held(heap->pages, start, n) != 0;
    if (!taken)
        heap->claimed = *piece;
    pagealloc_unlock(heap->pages);
    if (taken)
        return 0;
    /* The system calls run without the lock. */
    size_t offset = address_of(heap, start) - (uintptr_t)heap->region->base;
    size_t nbytes = (size_t)n * heap->meta.page;
    int err = return_memory(heap->region, offset, nbytes, lazy);
    if (err == 0 && !lazy)
        discard_metadata(heap, start, piece->stop);
    /* Free them again and account: released, and zero unless the kernel may still have the
     * contents. */
    pagealloc_lock(heap->pages);
    (void)pagealloc_free_held(heap->pages, start, n);
    heap->claimed = (struct pagealloc_run){0, 0};
    if (err == 0) {
        heap->released_pages += bitmap_set(heap->released, start, piece->stop);
        if (!lazy)
            (void)bitmap_clear(heap->dirty, start, piece->stop);
    }
    pagealloc_unlock(heap->pages);
    return err == 0 ? (int64_t)nbytes : HEAP_ERRNO - err;
}

/* -- opening, growing, closing ----------------------------------------------------------------- */

int64_t heap_add(struct heap *heap, uintptr_t address, size_t nbytes) {
    uint64_t page;
    pagealloc_lock(heap->pages);
    /* number_pages may add an extent, which a refusal takes back. */
    size_t extents = heap->extent_count;
    int64_t result = heap->closed ? HEAP_CLOSED : number_pages(heap, address, &page);
    if (result == 0)
        result = pagealloc_add_held(heap->pages, page, nbytes / heap->meta.page);
    if (result != 0)
        heap->extent_count = extents;
    else if (page + nbytes / heap->meta.page > heap->end)
        heap->end = page + nbytes / heap->meta.page;
    pagealloc_unlock(heap->pages);
    return result;
}

int64_t heap_tail(struct heap *heap) {
    struct pagealloc_run run = {0, 0};
    pagealloc_lock(heap->pages);
    bool found = pagealloc_run_below_held(heap->pages, heap->end, &run) && run.stop == heap->end;
    int64_t nbytes = found ? (int64_t)((run.stop - run.start) * heap->meta.page) : 0;
    pagealloc_unlock(heap->pages);
    return nbytes;
}

void heap_measure(struct heap *heap, struct heap_stats *stats) {
    pagealloc_lock(heap->pages);
    uint64_t all = pagealloc_part_pages_held(heap->pages);
    /* Claimed pages are in use for the allocator but belong to no block. */
    uint64_t claimed = heap->claimed.stop - heap->claimed.start;
    uint64_t idle = pagealloc_free_pages_held(heap->pages) + claimed;
    *stats = (struct heap_stats){
        .arena = all * heap->meta.page,
        .in_use = (all - idle) * heap->meta.page,
        .released = heap->released_pages * heap->meta.page,
        .requested = heap->requested,
        .mallocs = heap->mallocs,
        .frees = heap->frees,
    };
    pagealloc_unlock(heap->pages);
}

/* Places the tables from `memory` on: page allocator, notes, the two bitmaps, spans. Each starts
 * on an OS page. Returns their bytes. */
static uint64_t lay_out(struct heap *heap, uintptr_t memory, uint64_t capacity, bool spans) {
    size_t page = vm_page_size();
    uint64_t bits = round_up((capacity + 63) / 64 * 8, page);
    uint64_t at = round_up(pagealloc_bytes(capacity), page);
    heap->notes = (uint32_t *)(uintptr_t)(memory + at);
    at += round_up(capacity * sizeof *heap->notes, page);
    heap->dirty = (uint64_t *)(uintptr_t)(memory + at);
    heap->released = (uint64_t *)(uintptr_t)(memory + at + bits);
    at += 2 * bits;
    if (spans) {
        heap->meta.spans = (void *)(uintptr_t)(memory + at);
        at += round_up(capacity * sizeof(uint64_t), page);
    }
    return at;
}

uint64_t heap_bytes(uint64_t capacity, bool spans) {
    struct heap heap;
    return lay_out(&heap, 0, capacity, spans);
}

void heap_open(struct heap *heap, void *tables, uint64_t capacity, bool spans,
               struct region *region, const struct heap_metadata *metadata) {
    heap->meta = *metadata;
    heap->region = region;
    (void)lay_out(heap, (uintptr_t)tables, capacity, spans);
    heap->pages = pagealloc_open(tables, capacity);
    if (metadata->index == NULL)
        heap->extents[heap->extent_count++] = (struct heap_extent){0, metadata->start};
}

void heap_close(struct heap *heap, bool closed) {
    pagealloc_lock(heap->pages);
    heap->closed = closed;
    pagealloc_unlock(heap->pages);
}
