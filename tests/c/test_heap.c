#define _GNU_SOURCE
#include "heap.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#include "bitmap.h"
#include "check.h"
#include "vm.h"
#include "witness.h"

#define LENGTH(array) (sizeof(array) / sizeof((array)[0]))
#define MIB ((size_t)1 << 20)
#define UNIT (64 * MIB)
#define ZEROED ((int64_t)1 << HEAP_PAGE_BITS)
#define PATIENCE 64 /* as in pagealloc: with more misaligned runs the result need not be the lowest */
#define FEW_PIECES 512
#define STALE 64

/* AddressSanitizer makes each step about three times as slow. */
#ifdef __SANITIZE_ADDRESS__
#define STEPS 1200
#else
#define STEPS 1500
#endif

static uint64_t seed = 0x2545F4914F6CDD1D;

static uint64_t below(uint64_t n) {
    return random_below(&seed, n);
}

static bool one_in(uint64_t n) {
    return below(n) == 0;
}

/* Parameters of a tested heap. */
struct kind {
    size_t page;
    unsigned word, bits;
    bool own_spans, index;
    int accounting;
    size_t pages; /* in the range of addresses */
};

struct block {
    uintptr_t address;
    uint64_t nbytes;
    int64_t handle;
    unsigned char tag, entry;
};

/* A heap and its model: a list of blocks, and flags of each page of the addresses. */
struct machine {
    struct kind kind;
    struct heap heap;
    struct region region;
    struct heap_metadata meta;
    uintptr_t tables, index, low; /* `low`: the address of page 0 of the model */
    size_t tables_bytes, index_bytes, spans_bytes, bitmap_bytes;
    uintptr_t unit_metadata[32]; /* by number of the unit in the region; with a guard at each end */
    size_t unit_bytes;
    struct block *blocks;
    size_t count, block_capacity;
    unsigned char *part, *used, *dirty, *released, *committed; /* a byte a page, 0 or 1 */
    size_t totals[5];
    size_t end; /* the page after the last one that is part */
    int64_t stale[STALE];
    size_t stale_count;
    uint64_t mallocs, frees, serials;
};

/* -- the model -------------------------------------------------------------------------------- */

static size_t pages_of(const struct machine *m, uint64_t nbytes) {
    return (size_t)((nbytes + m->kind.page - 1) / m->kind.page);
}

static size_t page_index(const struct machine *m, uintptr_t address) {
    return (address - m->low) / m->kind.page;
}

static uintptr_t page_start(const struct machine *m, size_t page) {
    return m->low + page * m->kind.page;
}

static bool is_free(const struct machine *m, size_t page) {
    return m->part[page] && !m->used[page];
}

/* The lowest fit, SIZE_MAX if there is none; and the number of runs that are long but misaligned. */
static size_t model_fit(const struct machine *m, size_t n, uint64_t align, size_t *bad) {
    *bad = 0;
    for (size_t at = 0, stop; at < m->end; at = stop + 1) {
        const unsigned char *part = memchr(m->part + at, 1, m->end - at);
        if (part == NULL)
            break;
        at = stop = (size_t)(part - m->part);
        if (m->used[at])
            continue;
        while (stop < m->end && is_free(m, stop))
            stop++;
        uint64_t most = align > m->kind.page ? align : m->kind.page;
        size_t first = page_index(m, (page_start(m, at) + most - 1) / most * most);
        if (stop - at >= n && first + n <= stop)
            return first;
        *bad += stop - at >= n;
    }
    return SIZE_MAX;
}

static bool any(const unsigned char *facts, size_t page, size_t n) {
    return memchr(facts + page, 1, n) != NULL;
}

static bool all(const unsigned char *facts, size_t page, size_t n) {
    return memchr(facts + page, 0, n) == NULL;
}

static size_t *total_of(struct machine *m, const unsigned char *facts) {
    return &m->totals[(size_t)(facts - m->part) / m->kind.pages];
}

static size_t total(struct machine *m, const unsigned char *facts) {
    return *total_of(m, facts);
}

static void mark(struct machine *m, unsigned char *facts, size_t page, size_t n, bool value) {
    for (size_t i = page; i < page + n; i++) {
        *total_of(m, facts) += (size_t)value - facts[i];
        facts[i] = value;
    }
}

static struct block *block_of(const struct machine *m, uintptr_t address) {
    for (size_t i = 0; i < m->count; i++) {
        struct block *block = &m->blocks[i];
        if (address >= block->address &&
            address - block->address < pages_of(m, block->nbytes) * m->kind.page)
            return block;
    }
    return NULL;
}

/* -- memory ----------------------------------------------------------------------------------- */

static bool reads_zero(uintptr_t address, uint64_t nbytes) {
    const unsigned char *bytes = (const unsigned char *)address;
    return nbytes == 0 || (bytes[0] == 0 && memcmp(bytes, bytes + 1, (size_t)nbytes - 1) == 0);
}

/* Every byte of a small block; one byte per OS page of a large one, at varying offsets. */
static void fill(struct block *block, size_t whole) {
    unsigned char *bytes = (unsigned char *)block->address;
    block->tag = (unsigned char)(1 + below(255));
    if (whole <= 64 << 10) {
        memset(bytes, block->tag, whole);
        return;
    }
    for (size_t at = 0; at < whole; at += 4096)
        bytes[at + block->tag] = bytes[at] = bytes[at + 4095] = block->tag;
    bytes[block->nbytes - 1] = block->tag;
}

static bool intact(const struct block *block, size_t whole) {
    const unsigned char *bytes = (const unsigned char *)block->address;
    if (whole <= 64 << 10)
        return bytes[0] == block->tag && memcmp(bytes, bytes + 1, whole - 1) == 0;
    for (size_t at = 0; at < whole; at += 4096)
        if (bytes[at + block->tag] != block->tag || bytes[at] != block->tag ||
            bytes[at + 4095] != block->tag)
            return false;
    return bytes[block->nbytes - 1] == block->tag;
}

/* The heap bitmap's byte for the word at a page's start, as the layouts describe it. */
static unsigned char *entry_of(const struct machine *m, uintptr_t address, unsigned char *mask) {
    size_t a_byte = 8 / m->kind.bits;
    *mask = m->kind.bits == 4 ? 0x0f : 0x11;
    if (m->kind.index)
        return (unsigned char *)m->meta.index[address / UNIT] +
               address % UNIT / m->kind.word / a_byte;
    return (unsigned char *)m->meta.start - 1 - (address - m->meta.start) / m->kind.word / a_byte;
}

static bool entry_is(const struct machine *m, uintptr_t address, unsigned char wanted) {
    unsigned char mask, *entry = entry_of(m, address, &mask);
    return (*entry & mask) == wanted;
}

/* -- a heap's life ---------------------------------------------------------------------------- */

static size_t whole_os_pages(size_t nbytes) {
    size_t page = vm_page_size();
    return (nbytes + page - 1) / page * page;
}

static size_t unit_spans(const struct machine *m) {
    return UNIT / m->kind.page * m->kind.word;
}

static struct machine *machine_start(const struct kind *kind, size_t capacity) {
    struct machine *m = calloc(1, sizeof *m);
    REQUIRE(m != NULL);
    m->kind = *kind;
    bool flat_spans = !kind->own_spans && !kind->index;
    m->spans_bytes = flat_spans ? whole_os_pages(kind->pages * kind->word) : 0;
    if (!kind->index)
        m->bitmap_bytes = whole_os_pages(kind->pages * kind->page * kind->bits / 8 / kind->word);
    size_t before = (m->spans_bytes + m->bitmap_bytes + kind->page - 1) / kind->page * kind->page;
    size_t size = before + kind->pages * kind->page;
    struct region_options wish = {.align = kind->index ? UNIT : kind->page};
    REQUIRE(region_reserve(&m->region, size, kind->accounting, 0, &wish) == 0);
    uintptr_t base = (uintptr_t)m->region.base;
    m->low = base + before;
    m->meta = (struct heap_metadata){.page = kind->page, .word = kind->word,
                                     .bitmap_bits = kind->bits, .start = m->low};
    if (flat_spans)
        m->meta.spans = (void *)(m->low - m->bitmap_bytes - m->spans_bytes);
    if (kind->index) {
        m->index_bytes = (((size_t)1 << 47) / UNIT) * sizeof(uintptr_t);
        REQUIRE(vm_map(0, m->index_bytes, VM_COMMITTED | VM_NORESERVE, &m->index) == 0);
        m->meta.index = (uintptr_t *)m->index;
        m->meta.unit = UNIT;
        m->meta.unit_bitmap = UNIT * kind->bits / 8 / kind->word;
        m->unit_bytes = m->meta.unit_bitmap + unit_spans(m);
    }
    m->tables_bytes = whole_os_pages((size_t)heap_bytes(capacity, kind->own_spans));
    REQUIRE(vm_map(0, m->tables_bytes, VM_COMMITTED | VM_NORESERVE, &m->tables) == 0);
    heap_open(&m->heap, (void *)m->tables, capacity, kind->own_spans, &m->region, &m->meta);
    REQUIRE((m->part = calloc(5, kind->pages)) != NULL);
    m->used = m->part + kind->pages;
    m->dirty = m->used + kind->pages;
    m->released = m->dirty + kind->pages;
    m->committed = m->released + kind->pages;
    return m;
}

static void machine_end(struct machine *m) {
    size_t guard = vm_page_size();
    pagealloc_close(m->heap.pages);
    REQUIRE(vm_release(m->tables, m->tables_bytes) == 0);
    REQUIRE(m->index == 0 || vm_release(m->index, m->index_bytes) == 0);
    for (size_t i = 0; i < LENGTH(m->unit_metadata); i++)
        if (m->unit_metadata[i] != 0)
            REQUIRE(vm_release(m->unit_metadata[i] - guard, m->unit_bytes + 2 * guard) == 0);
    region_end(&m->region);
    free(m->part);
    free(m->blocks);
    free(m);
}

static void commit(struct machine *m, uintptr_t low, uintptr_t high) {
    if (low < high)
        REQUIRE(region_commit(&m->region, low - (uintptr_t)m->region.base, high - low) == 0);
}

/* Commits pages and exactly their metadata: an access beyond it crashes. */
static void map_pages(struct machine *m, size_t page, size_t n) {
    size_t end = page + n > m->end ? page + n : m->end, guard = vm_page_size();
    commit(m, page_start(m, page), page_start(m, page + n));
    mark(m, m->committed, page, n, true);
    if (!m->kind.index) {
        size_t bitmap = whole_os_pages(end * m->kind.page * m->kind.bits / 8 / m->kind.word);
        commit(m, m->low - bitmap, m->low);
        if (m->spans_bytes > 0)
            commit(m, (uintptr_t)m->meta.spans,
                   (uintptr_t)m->meta.spans + whole_os_pages(end * m->kind.word));
        return;
    }
    for (uintptr_t at = page_start(m, page) / UNIT; at <= (page_start(m, page + n) - 1) / UNIT;
         at++) {
        size_t i = at - m->low / UNIT;
        if (m->unit_metadata[i] != 0)
            continue;
        REQUIRE(vm_map(0, m->unit_bytes + 2 * guard, VM_RESERVED, &m->unit_metadata[i]) == 0);
        m->unit_metadata[i] += guard;
        REQUIRE(vm_protect(m->unit_metadata[i], m->unit_bytes, VM_COMMITTED) == 0);
        m->meta.index[at] = m->unit_metadata[i];
    }
}

static void add(struct machine *m, size_t page, size_t n) {
    map_pages(m, page, n);
    if (!CHECK(heap_add(&m->heap, page_start(m, page), n * m->kind.page) == 0))
        return;
    mark(m, m->part, page, n, true);
    m->end = page + n > m->end ? page + n : m->end;
}

/* -- comparing -------------------------------------------------------------------------------- */

static void settle(struct machine *m) {
    struct heap_stats stats;
    uint64_t requested = 0;
    for (size_t i = 0; i < m->count; i++)
        requested += m->blocks[i].nbytes;
    heap_measure(&m->heap, &stats);
    CHECK(stats.arena == total(m, m->part) * m->kind.page);
    CHECK(stats.in_use == total(m, m->used) * m->kind.page);
    CHECK(stats.released == total(m, m->released) * m->kind.page);
    CHECK(stats.requested == requested);
    CHECK(stats.mallocs == m->mallocs && stats.frees == m->frees);
    CHECK(m->mallocs - m->frees == m->count);
    size_t tail = 0;
    while (tail < m->end && is_free(m, m->end - 1 - tail))
        tail++;
    CHECK(heap_tail(&m->heap) == (int64_t)(tail * m->kind.page));
}

/* The books of the region and the kernel's view agree with the model. */
static void compare_pages(struct machine *m) {
    static char shown[(64 << 20) / 4096 + 1];
    size_t os_page = vm_page_size(), many = 16 * MIB / os_page * os_page;
    uintptr_t base = (uintptr_t)m->region.base, stop = page_start(m, m->end);
    for (uintptr_t at = m->low; at < stop; at += many) {
        size_t length = stop - at < many ? stop - at : many;
        (void)witness_pages(at, length, shown);
        for (size_t i = 0; i < length / os_page; i++) {
            bool committed = m->committed[page_index(m, at + i * os_page)];
            if (!CHECK(shown[i] == (committed ? 'w' : '-')) ||
                !CHECK(region_is_committed(&m->region, at + i * os_page - base, os_page) ==
                       committed))
                return;
        }
    }
}

static int by_address(const void *a, const void *b) {
    uintptr_t first = ((const struct block *)a)->address, second = ((const struct block *)b)->address;
    return first < second ? -1 : first > second;
}

static void sort(struct machine *m) {
    if (m->count > 0)
        qsort(m->blocks, m->count, sizeof *m->blocks, by_address);
}

/* The walk from block number `first` on, in steps of `max` blocks. */
static void compare_walk(struct machine *m, size_t first, size_t max) {
    int64_t handles[50];
    sort(m);
    uint64_t from = first == 0 ? 0 : (uint64_t)m->blocks[first].handle & (ZEROED - 1);
    size_t at = first;
    for (int64_t n = 1; n > 0;) {
        n = heap_blocks(&m->heap, &from, handles, max);
        if (!CHECK(n >= 0 && (size_t)n <= max))
            return;
        for (int64_t i = 0; i < n; i++, at++)
            if (!CHECK(at < m->count && handles[i] == (m->blocks[at].handle & ~ZEROED)))
                return;
    }
    CHECK(at == m->count);
}

static void compare_all(struct machine *m) {
    compare_pages(m);
    for (size_t i = 0; i < m->count; i++) {
        const struct block *block = &m->blocks[i];
        CHECK(intact(block, pages_of(m, block->nbytes) * m->kind.page));
        CHECK(heap_nbytes(&m->heap, block->handle) == (int64_t)block->nbytes);
        CHECK(heap_address(&m->heap, block->handle) == block->address);
        if (m->kind.bits > 0)
            CHECK(entry_is(m, block->address, block->entry));
    }
    compare_walk(m, 0, 1 + below(50));
}

/* -- operations that check themselves ---------------------------------------------------------- */

static uint64_t random_size(const struct machine *m) {
    uint64_t most = m->kind.page << below(one_in(8) ? 9 : 5);
    return one_in(6) ? most : 1 + below(most);
}

/* Adds a new block to the model and checks it. */
static void enter(struct machine *m, int64_t handle, uint64_t nbytes, bool cleared) {
    uintptr_t address = heap_address(&m->heap, handle);
    size_t page = page_index(m, address), n = pages_of(m, nbytes);
    CHECK(((handle & ZEROED) != 0) == (cleared || !any(m->dirty, page, n)));
    m->mallocs++;
    CHECK(((uint64_t)handle >> (HEAP_PAGE_BITS + 1)) ==
          (++m->serials & ((1 << HEAP_SERIAL_BITS) - 1)));
    mark(m, m->used, page, n, true);
    mark(m, m->released, page, n, false);
    if (handle & ZEROED)
        CHECK(reads_zero(address, n * m->kind.page));
    if (m->count == m->block_capacity) {
        m->block_capacity = 2 * m->block_capacity + 64;
        REQUIRE((m->blocks = realloc(m->blocks, m->block_capacity * sizeof *m->blocks)) != NULL);
    }
    struct block *block = &m->blocks[m->count++];
    *block = (struct block){address, nbytes, handle, 0, 0};
    fill(block, n * m->kind.page);
    if (m->kind.bits > 0) {
        unsigned char mask, *entry = entry_of(m, address, &mask);
        CHECK((*entry & mask) == 1);
        *entry |= (unsigned char)below(256); /* the other bits belong to the user */
        block->entry = *entry & mask;
    }
}

/* Updates the model for the allocation of a run: released pages become committed. */
static void take_committed(struct machine *m, size_t page, size_t n) {
    if (any(m->released, page, n))
        mark(m, m->committed, page, n, true);
}

static void try_alloc(struct machine *m, uint64_t nbytes, uint64_t align, bool zero, bool region) {
    size_t n = pages_of(m, nbytes), bad;
    size_t fit = model_fit(m, n, align, &bad);
    int64_t handle = heap_alloc(&m->heap, nbytes, align, zero, region);
    if (fit == SIZE_MAX) {
        CHECK(handle == PAGEALLOC_FULL);
    } else if (handle >= 0) {
        uintptr_t address = heap_address(&m->heap, handle);
        size_t page = page_index(m, address);
        CHECK(address % align == 0 && address % m->kind.page == 0);
        CHECK(page == fit || (bad >= PATIENCE && align > m->kind.page));
        CHECK(all(m->part, page, n) && !any(m->used, page, n));
        CHECK(region || !any(m->released, page, n));
        take_committed(m, page, n);
        enter(m, handle, nbytes, zero);
    } else {
        CHECK(handle == HEAP_COMMIT && !region);
        CHECK(any(m->released, fit, n) || bad >= PATIENCE);
    }
    settle(m);
}

static void note_stale(struct machine *m, int64_t handle) {
    size_t at = m->stale_count < STALE ? m->stale_count++ : below(STALE);
    m->stale[at] = handle;
}

static void leave(struct machine *m, struct block *block) {
    size_t page = page_index(m, block->address), n = pages_of(m, block->nbytes);
    mark(m, m->used, page, n, false);
    mark(m, m->dirty, page, n, true);
    if (m->kind.bits > 0)
        CHECK(entry_is(m, block->address, 0));
    note_stale(m, block->handle);
    m->frees++;
    *block = m->blocks[--m->count];
}

static void try_free(struct machine *m, size_t i) {
    struct block *block = &m->blocks[i];
    CHECK(intact(block, pages_of(m, block->nbytes) * m->kind.page));
    int64_t handle = one_in(2) ? block->handle : block->handle & ~ZEROED;
    if (CHECK(heap_free(&m->heap, handle) == (int64_t)block->nbytes))
        leave(m, block);
    CHECK(heap_free(&m->heap, handle) == HEAP_NO_BLOCK);
    settle(m);
}

static void try_resize(struct machine *m, size_t i, uint64_t nbytes, bool region) {
    struct block *block = &m->blocks[i];
    uint64_t old = block->nbytes;
    size_t page = page_index(m, block->address), before = pages_of(m, old);
    size_t after = pages_of(m, nbytes), end = page + before;
    CHECK(intact(block, before * m->kind.page));
    int64_t handle = one_in(2) ? block->handle : block->handle & ~ZEROED;
    int64_t result = heap_resize(&m->heap, handle, nbytes, region);
    bool fits = after <= before;
    if (!fits && page + after <= m->kind.pages) {
        fits = all(m->part, end, after - before) && !any(m->used, end, after - before);
        CHECK(all(m->part, end, after - before) == (result != PAGEALLOC_FOREIGN));
    }
    if (!fits) {
        CHECK(result == PAGEALLOC_IN_USE || result == PAGEALLOC_FOREIGN ||
              result == PAGEALLOC_OUTSIDE);
    } else if (result == HEAP_COMMIT) {
        CHECK(!region && after > before && any(m->released, end, after - before));
    } else if (CHECK(result == (int64_t)old)) {
        if (after > before) {
            take_committed(m, end, after - before);
            mark(m, m->used, end, after - before, true);
            mark(m, m->released, end, after - before, false);
        } else {
            mark(m, m->used, page + after, before - after, false);
            mark(m, m->dirty, page + after, before - after, true);
        }
        block->nbytes = nbytes;
        fill(block, after * m->kind.page);
    }
    CHECK(heap_nbytes(&m->heap, handle) == (int64_t)block->nbytes);
    settle(m);
}

/* A handle of a freed block, or one that never existed. */
static void try_stale(struct machine *m) {
    int64_t handle = -1 - (int64_t)below(100);
    if (m->stale_count > 0 && !one_in(4))
        handle = m->stale[below(m->stale_count)];
    else if (one_in(2))
        handle = (int64_t)(random_next(&seed) >> 1) | (int64_t)1 << 62;
    else if (m->count > 0 && one_in(2)) /* the block's page, another block's number */
        handle = m->blocks[below(m->count)].handle ^ (int64_t)1 << (HEAP_PAGE_BITS + 20);
    CHECK(heap_free(&m->heap, handle) == HEAP_NO_BLOCK);
    CHECK(heap_nbytes(&m->heap, handle) == HEAP_NO_BLOCK);
    CHECK(heap_resize(&m->heap, handle, 1, true) == HEAP_NO_BLOCK);
    size_t failed = 77;
    CHECK(heap_free_many(&m->heap, &handle, 1, false, &failed) == HEAP_NO_BLOCK && failed == 0);
    settle(m);
}

static void try_find(struct machine *m, uintptr_t address) {
    const struct block *block = block_of(m, address);
    int64_t handle = heap_find(&m->heap, address);
    CHECK(handle == (block == NULL ? HEAP_NO_BLOCK : (block->handle & ~ZEROED)));
}

static void try_finds(struct machine *m) {
    if (m->count > 0) {
        const struct block *block = &m->blocks[below(m->count)];
        size_t whole = pages_of(m, block->nbytes) * m->kind.page;
        const size_t inside[] = {0, whole - 1, (size_t)block->nbytes - 1, (size_t)below(whole),
                                 whole / 2, whole, (size_t)0 - 1};
        for (size_t i = 0; i < LENGTH(inside); i++)
            try_find(m, block->address + inside[i]);
    }
    size_t span = m->kind.pages * m->kind.page;
    const uintptr_t anywhere[] = {0, UINTPTR_MAX, m->low - 1, m->low, m->low + span,
                                  page_start(m, m->end), page_start(m, m->end) - 1,
                                  (uintptr_t)m->region.base, m->low + below(span),
                                  m->low + below(m->end * m->kind.page + 1), (uintptr_t)m,
                                  (uintptr_t)random_next(&seed)};
    for (size_t i = 0; i < LENGTH(anywhere); i++)
        try_find(m, anywhere[i]);
}

/* Adds a piece after the last one or far above it; false if there is no space. */
static bool try_add(struct machine *m) {
    size_t gap = 0, n = 1 + below(one_in(4) ? 3000 : 200), unit = UNIT / m->kind.page;
    if (m->kind.index && one_in(3))
        gap = one_in(2) ? below(unit + 1) : unit + 1 + below(unit);
    else if (one_in(5))
        gap = below(500);
    if (gap + n > m->kind.pages - m->end)
        return false;
    add(m, m->end + gap, n);
    settle(m);
    return true;
}

static void try_bad_add(struct machine *m) {
    size_t page = below(m->end + 1), n = 1 + below(50);
    if (page == m->end || !m->part[page] || n > m->kind.pages - page)
        return;
    int64_t got = heap_add(&m->heap, page_start(m, page), n * m->kind.page);
    CHECK(got == PAGEALLOC_IN_USE || (m->kind.index && got == HEAP_SCATTERED));
    CHECK(m->kind.index ||
          heap_add(&m->heap, m->low - m->kind.page, m->kind.page) == HEAP_SCATTERED);
    settle(m);
}

/* -- many blocks ------------------------------------------------------------------------------ */

#define MANY 300

/* The sizes as integers of a width that holds them. */
static struct pagealloc_integers integers(const uint64_t *values, size_t count, void *items) {
    static const int widths[] = {1, 2, 4, 8, -1, -2, -4, -8};
    uint64_t largest = 0;
    for (size_t i = 0; i < count; i++)
        largest = values[i] > largest ? values[i] : largest;
    int width = 8;
    do
        width = widths[below(LENGTH(widths))];
    while (abs(width) < 8 && largest >> (8 * abs(width) - (width < 0)) != 0);
    for (size_t i = 0; i < count; i++)
        memcpy((char *)items + i * (size_t)abs(width), &values[i], (size_t)abs(width));
    return (struct pagealloc_integers){.items = items, .width = width};
}

/* Whether the blocks allocated from `from` on lie where single allocations would put them; and which
 * refusal has to follow. */
static int64_t follow(struct machine *m, const uint64_t *sizes, const int64_t *handles, size_t from,
                      size_t done, size_t count) {
    size_t bad;
    for (size_t i = from; i < from + done; i++) {
        size_t n = pages_of(m, sizes[i]);
        size_t fit = sizes[i] == 0 ? SIZE_MAX : model_fit(m, n, 1, &bad);
        if (!CHECK(fit != SIZE_MAX) ||
            !CHECK(heap_address(&m->heap, handles[i]) == page_start(m, fit)))
            exit(EXIT_FAILURE);
        take_committed(m, fit, n);
        enter(m, handles[i], sizes[i], false);
    }
    if (from + done == count)
        return 0;
    if (sizes[from + done] == 0)
        return HEAP_EMPTY;
    size_t n = pages_of(m, sizes[from + done]);
    return n <= m->kind.pages && model_fit(m, n, 1, &bad) != SIZE_MAX ? HEAP_COMMIT
                                                                    : PAGEALLOC_FULL;
}

static void try_alloc_many(struct machine *m) {
    static uint64_t sizes[MANY], items[MANY];
    static int64_t handles[MANY];
    size_t count = below(MANY + 1), from = one_in(3) ? below(count + 1) : 0;
    uint64_t most = m->kind.page << below(5);
    bool ascending = one_in(3), region = !one_in(4);
    for (size_t i = 0; i < count; i++) {
        sizes[i] = one_in(40) ? random_size(m) : 1 + below(most);
        if (ascending && i > 0 && sizes[i] < sizes[i - 1])
            sizes[i] = sizes[i - 1];
    }
    if (one_in(6) && count > 0)
        sizes[below(count)] = one_in(2) ? 0 : UINT64_MAX >> 1;
    struct pagealloc_integers given = integers(sizes, count, items);
    if (one_in(6)) {
        given = (struct pagealloc_integers){.constant = 1 + below(3 * m->kind.page)};
        for (size_t i = 0; i < count; i++)
            sizes[i] = given.constant;
    }
    uint64_t need = 0;
    bool huge = false;
    for (size_t i = from; i < count; i++) {
        huge = huge || sizes[i] > (uint64_t)1 << 62;
        need += huge ? 0 : pages_of(m, sizes[i]) * m->kind.page;
    }
    CHECK(heap_need(&m->heap, &given, from, count) == (huge ? UINT64_MAX : need));
    size_t at = from, first = m->count;
    uint64_t mallocs = m->mallocs;
    for (int attempt = 0; attempt < 20; attempt++) {
        int64_t refused = 1;
        int64_t done = heap_alloc_many(&m->heap, &given, handles, at, count, region, &refused);
        if (!CHECK(done >= 0 && at + (size_t)done <= count))
            return;
        int64_t wanted = follow(m, sizes, handles, at, (size_t)done, count);
        CHECK(refused == wanted && (refused != HEAP_COMMIT || !region));
        at += (size_t)done;
        settle(m);
        if (refused == HEAP_COMMIT)
            region = true;
        else if (refused != PAGEALLOC_FULL || !try_add(m))
            break;
    }
    if (!one_in(4))
        return;
    /* After an undo the counters show no trace of them. */
    uint64_t frees = m->frees;
    size_t failed;
    int64_t nbytes = 0;
    for (size_t i = first; i < m->count; i++)
        nbytes += (int64_t)m->blocks[i].nbytes;
    CHECK(heap_free_many(&m->heap, handles + from, at - from, true, &failed) == nbytes);
    while (m->count > first)
        leave(m, &m->blocks[m->count - 1]);
    m->mallocs = mallocs;
    m->frees = frees;
    m->stale_count = 0; /* their serial numbers are used again */
    settle(m);
}

static void try_free_many(struct machine *m) {
    static int64_t handles[MANY + 2];
    size_t count = below(m->count < MANY ? m->count + 1 : MANY), wrong = SIZE_MAX, failed = 77;
    if (one_in(2))
        sort(m);
    size_t first = below(m->count - count + 1);
    int64_t nbytes = 0;
    for (size_t i = 0; i < count; i++) {
        handles[i] = m->blocks[first + i].handle & (one_in(2) ? ~ZEROED : -1);
        nbytes += (int64_t)m->blocks[first + i].nbytes;
    }
    if (one_in(3) && count > 0) { /* a handle of no block, or one twice */
        wrong = 1 + below(count);
        memmove(handles + wrong + 1, handles + wrong, (count - wrong) * sizeof *handles);
        handles[wrong] = m->stale_count > 0 && one_in(2) ? m->stale[0] : handles[below(wrong)];
        count++;
    }
    int64_t got = heap_free_many(&m->heap, handles, count, false, &failed);
    if (wrong != SIZE_MAX) {
        CHECK(got == HEAP_NO_BLOCK && failed == wrong);
    } else if (CHECK(got == nbytes)) {
        while (count-- > 0)
            leave(m, &m->blocks[first + count]);
    }
    settle(m);
}

/* -- giving back ------------------------------------------------------------------------------ */

static bool may_go(const struct machine *m, size_t page, bool lazy) {
    return is_free(m, page) && m->dirty[page] && !(lazy && m->released[page]);
}

/* Whether the pieces are those that a walk downwards finds. */
static bool same_pieces(struct machine *m, const struct pagealloc_run *pieces, size_t n,
                        size_t max, uint64_t most, uint64_t longest, bool lazy) {
    size_t at = m->end, i = 0;
    for (; i < max && most > 0; i++) {
        while (at > 0 && !may_go(m, at - 1, lazy))
            at--;
        if (at == 0)
            break;
        size_t stop = at, least = (size_t)(most < longest ? most : longest);
        while (at > 0 && stop - at < least && may_go(m, at - 1, lazy))
            at--;
        if (i == n || pieces[i].stop - pieces[i].start != stop - at ||
            heap_page_address(&m->heap, pieces[i].start) != page_start(m, at))
            return false;
        most -= stop - at;
    }
    return i == n;
}

/* Updates the model for pages that were given back. */
static void gone(struct machine *m, size_t page, size_t n, size_t pieces, bool lazy) {
    mark(m, m->released, page, n, true);
    if (!lazy)
        mark(m, m->dirty, page, n, false);
    if (!lazy && !(m->kind.accounting & VM_NORESERVE) && n * m->kind.page >= MIB &&
        pieces < FEW_PIECES)
        mark(m, m->committed, page, n, false);
    /* Committed bytes read as zero; check some of them. */
    for (size_t i = page; i < page + n && !lazy; i += 1 + below(20))
        if (m->committed[i] && !CHECK(reads_zero(page_start(m, i), m->kind.page)))
            return;
}

static void try_give_back(struct machine *m) {
    struct pagealloc_run pieces[40], again;
    bool lazy = one_in(3);
    size_t max = 1 + below(LENGTH(pieces));
    uint64_t most = one_in(2) ? UINT64_MAX >> 2 : below(600);
    uint64_t longest = one_in(2) ? UNIT / m->kind.page : 1 + below(100);
    CHECK(heap_idle(&m->heap, UINT64_MAX >> 2, most, longest, 3600000, lazy, pieces, max) == 0);
    int64_t n = heap_idle(&m->heap, UINT64_MAX >> 2, most, longest, 0, lazy, pieces, max);
    if (!CHECK(n >= 0 && (size_t)n <= max) ||
        !CHECK(same_pieces(m, pieces, (size_t)n, max, most, longest, lazy)))
        return;
    if (n > 0 && one_in(3)) /* only below that block */
        CHECK(heap_idle(&m->heap, pieces[0].start, 1, 1, 0, lazy, &again, 1) <= 1 &&
              (n == 1 || again.stop == pieces[1].stop));
    if (one_in(4)) /* another thread takes them first */
        try_alloc(m, random_size(m), 1, false, true);
    for (int64_t i = 0; i < n; i++) {
        size_t page = page_index(m, heap_page_address(&m->heap, pieces[i].start));
        size_t length = (size_t)(pieces[i].stop - pieces[i].start);
        bool taken = any(m->used, page, length);
        size_t count = m->region.committed.count;
        int64_t given = heap_give_back(&m->heap, &pieces[i], lazy);
        CHECK(given == (taken ? 0 : (int64_t)(length * m->kind.page)));
        if (!taken)
            gone(m, page, length, count, lazy);
        settle(m);
    }
}

/* -- random lives ----------------------------------------------------------------------------- */

static void step(struct machine *m) {
    uint64_t choice = below(100);
    if (choice < 38)
        try_alloc(m, random_size(m), one_in(3) ? UINT64_C(1) << below(18) : 1, one_in(3),
                  !one_in(3));
    else if (choice < 70 && m->count > 0)
        try_free(m, below(m->count));
    else if (choice < 74 && m->count > 0)
        try_resize(m, below(m->count), random_size(m), !one_in(3));
    else if (choice < 76)
        try_stale(m);
    else if (choice < 80)
        try_alloc_many(m);
    else if (choice < 84)
        try_free_many(m);
    else if (choice < 90)
        try_finds(m);
    else if (choice < 95)
        try_give_back(m);
    else if (choice < 97)
        try_bad_add(m);
    else if (choice < 98 && m->count > 0)
        compare_walk(m, below(m->count), 1 + below(50));
    else if (total(m, m->used) > m->end / 2)
        (void)try_add(m);
}

static void live(const struct kind *kind, size_t capacity, int steps) {
    struct machine *m = machine_start(kind, capacity);
    if (kind->index) { /* a heap without a page */
        CHECK(heap_alloc(&m->heap, 1, 1, false, true) == PAGEALLOC_FULL);
        CHECK(heap_find(&m->heap, m->low) == HEAP_NO_BLOCK);
        settle(m);
        add(m, below(UINT64_C(2) * UNIT / kind->page), 1 + below(3000));
    }
    settle(m);
    for (int i = 0; i < steps; i++) {
        step(m);
        if (i % 100 == 99)
            compare_all(m);
        /* Now and then free nearly everything, so that there are pages to give back. */
        if (i % 400 == 399)
            while (m->count > 10)
                try_free(m, below(m->count));
    }
    compare_all(m);
    while (m->count > 0)
        try_free(m, below(m->count));
    compare_all(m);
    machine_end(m);
}

static void flat_heaps_hold_what_the_model_holds(void) {
    static const struct {
        unsigned word, bits;
        bool own;
    } ways[] = {{8, 4, false}, {8, 2, false}, {4, 4, false}, {4, 2, false}, {8, 0, false},
                {8, 0, true},  {4, 0, true},  {8, 4, true},  {4, 0, false}};
    for (size_t i = 0; i < LENGTH(ways); i++)
        for (int accounting = 0; accounting <= VM_NORESERVE; accounting += VM_NORESERVE) {
            size_t page = i % 3 == 2 && vm_page_size() == 4096 ? 4096 : 8192;
            page = page > vm_page_size() ? page : vm_page_size();
            struct kind kind = {.page = page, .word = ways[i].word, .bits = ways[i].bits,
                                .own_spans = ways[i].own, .accounting = accounting,
                                .pages = 4000 + below(8000)};
            live(&kind, kind.pages, STEPS);
        }
}

static void heaps_under_an_index_hold_what_the_model_holds(void) {
    static const unsigned bits[] = {2, 4, 0};
    for (size_t i = 0; i < LENGTH(bits); i++)
        for (int accounting = 0; accounting <= VM_NORESERVE; accounting += VM_NORESERVE) {
            struct kind kind = {.page = vm_page_size() > 8192 ? vm_page_size() : 8192, .word = 8,
                                .bits = bits[i], .index = true, .accounting = accounting};
            kind.pages = 14 * UNIT / kind.page;
            live(&kind, 40 * UNIT / kind.page, STEPS / 2);
        }
}

/* -- single facts ------------------------------------------------------------------------------ */

static const struct kind plain = {.page = 8192, .word = 8, .bits = 4, .pages = 8192};

static struct machine *small_heap(const struct kind *kind, size_t pages) {
    struct machine *m = machine_start(kind, kind->index ? 40 * UNIT / kind->page : kind->pages);
    add(m, 0, pages);
    return m;
}

static void what_makes_no_sense_is_refused(void) {
    struct machine *m = small_heap(&plain, 100);
    static const uint64_t aligns[] = {0, 3, 6, 8191, UINT64_MAX};
    CHECK(heap_alloc(&m->heap, 0, 1, true, true) == HEAP_EMPTY);
    for (size_t i = 0; i < LENGTH(aligns); i++)
        CHECK(heap_alloc(&m->heap, 1, aligns[i], true, true) == PAGEALLOC_ALIGNMENT);
    static const uint64_t sizes[] = {100 * 8192 + 1, UINT64_C(1) << 32, UINT64_C(1) << 47,
                                     UINT64_C(1) << 62, INT64_MAX, UINT64_MAX};
    for (size_t i = 0; i < LENGTH(sizes); i++)
        CHECK(heap_alloc(&m->heap, sizes[i], 1, true, true) == PAGEALLOC_FULL);
    for (unsigned i = 0; i < 64; i++)
        try_alloc(m, 1, UINT64_C(1) << i, true, true);
    size_t failed;
    CHECK(heap_free_many(&m->heap, NULL, 0, false, &failed) == 0);
    settle(m);
    machine_end(m);
}

static void a_closed_heap_refuses_everything(void) {
    struct machine *m = small_heap(&plain, 1000);
    try_alloc(m, 100, 1, false, true);
    try_alloc(m, 100, 1, false, true);
    try_free(m, 0);
    int64_t handle = m->blocks[0].handle, handles[2] = {handle, handle}, refused;
    const struct pagealloc_integers sizes = {.constant = 8192};
    struct pagealloc_run piece = {0, 1};
    uint64_t from = 0;
    size_t failed = 77;
    heap_close(&m->heap, true);
    for (int region = 0; region < 2; region++) {
        CHECK(heap_alloc(&m->heap, 1, 1, true, region != 0) == HEAP_CLOSED);
        CHECK(heap_alloc_many(&m->heap, &sizes, handles, 0, 2, region != 0, &refused) == 0);
        CHECK(refused == HEAP_CLOSED);
    }
    CHECK(heap_free(&m->heap, handle) == HEAP_CLOSED);
    CHECK(heap_free_many(&m->heap, handles, 2, false, &failed) == HEAP_CLOSED && failed == 0);
    CHECK(heap_nbytes(&m->heap, handle) == HEAP_CLOSED);
    CHECK(heap_find(&m->heap, m->blocks[0].address) == HEAP_CLOSED);
    CHECK(heap_blocks(&m->heap, &from, handles, 2) == HEAP_CLOSED);
    CHECK(heap_idle(&m->heap, 1000, 1000, 1000, 0, false, &piece, 1) == HEAP_CLOSED);
    CHECK(heap_give_back(&m->heap, &piece, false) == 0);
    CHECK(heap_give_back(&m->heap, &piece, true) == 0);
    CHECK(heap_add(&m->heap, page_start(m, 1000), 8192) == HEAP_CLOSED);
    heap_close(&m->heap, false);
    compare_all(m);
    settle(m);
    try_free(m, 0);
    machine_end(m);
}

static void a_refused_commit_changes_nothing(void) {
    const struct kind kinds[] = {plain, {.page = 8192, .word = 8, .bits = 2, .index = true,
                                         .pages = UINT64_C(2) * UNIT / 8192}};
    for (size_t i = 0; i < LENGTH(kinds); i++) {
        struct machine *m = small_heap(&kinds[i], 4096);
        const struct pagealloc_integers sizes = {.constant = 3 * MIB};
        int64_t handles[8], refused;
        try_alloc(m, 16 * MIB, 1, false, true);
        try_alloc(m, 4 * MIB, 1, false, true);
        try_free(m, 0);
        struct pagealloc_run piece;
        CHECK(heap_idle(&m->heap, 4096, 4096, 4096, 0, false, &piece, 1) == 1);
        CHECK(heap_give_back(&m->heap, &piece, false) == (int64_t)(16 * MIB));
        gone(m, (size_t)piece.start, 2048, 1, false);
        CHECK(total(m, m->committed) == 2048);
        if (!limit_data(MIB)) {
            SKIP("no RLIMIT_DATA");
        } else {
            CHECK(heap_alloc(&m->heap, 8 * MIB, 1, false, true) == HEAP_ERRNO - ENOMEM);
            CHECK(heap_alloc(&m->heap, 8 * MIB, 1, true, true) == HEAP_ERRNO - ENOMEM);
            CHECK(heap_alloc(&m->heap, 8 * MIB, 1, true, false) == HEAP_COMMIT);
            settle(m);
            compare_all(m);
            CHECK(heap_alloc_many(&m->heap, &sizes, handles, 0, 4, true, &refused) == 0);
            CHECK(refused == HEAP_ERRNO - ENOMEM);
            settle(m);
            compare_all(m);
            REQUIRE(unlimit(RLIMIT_DATA));
        }
        try_alloc(m, 8 * MIB, 1, false, true);
        CHECK(m->blocks[m->count - 1].handle & ZEROED);
        compare_all(m);
        machine_end(m);
    }
}

/* Free pages are taken from the highest on, except those younger than the age. */
static void young_pages_stay(void) {
    struct machine *m = small_heap(&plain, 1000);
    struct pagealloc_run pieces[4];
    for (int i = 0; i < 10; i++)
        try_alloc(m, 10 * 8192, 1, false, true);
    try_free(m, 3);
    const struct timespec pause = {.tv_nsec = 150000000};
    (void)nanosleep(&pause, NULL);
    size_t late = m->count - 1;
    uintptr_t address = m->blocks[late].address;
    try_free(m, late);
    int64_t n = heap_idle(&m->heap, 1000, 1000, 1000, 75, false, pieces, 4);
    CHECK(n == 1 && pieces[0].stop - pieces[0].start == 10);
    CHECK(heap_page_address(&m->heap, pieces[0].start) != address);
    CHECK(heap_idle(&m->heap, 1000, 1000, 1000, 0, false, pieces, 4) == 2);
    CHECK(heap_page_address(&m->heap, pieces[0].start) > heap_page_address(&m->heap, pieces[1].start));
    machine_end(m);
}

/* Pages are discarded instead of decommitted once the region is in many pieces. */
static void holes_are_few(void) {
    struct kind kind = plain;
    kind.pages = 1100 * 128;
    struct machine *m = small_heap(&kind, kind.pages);
    static int64_t handles[1100];
    struct pagealloc_run piece;
    for (size_t i = 0; i < 1100; i++)
        handles[i] = heap_alloc(&m->heap, MIB, 1, false, true);
    for (size_t i = 1; i < 1100; i += 2)
        CHECK(heap_free(&m->heap, handles[i]) == (int64_t)MIB);
    for (uint64_t at = kind.pages;
         heap_idle(&m->heap, at, 1000, 1000, 0, false, &piece, 1) == 1; at = piece.start) {
        size_t count = m->region.committed.count;
        CHECK(heap_give_back(&m->heap, &piece, false) == (int64_t)MIB);
        gone(m, (size_t)piece.start, 128, count, false);
    }
    CHECK(m->region.committed.count == FEW_PIECES);
    compare_pages(m);
    machine_end(m);
}

/* A refused add leaves no trace: the same or lower addresses can be added afterwards. */
static void a_refused_add_changes_nothing(void) {
    struct kind kind = {.page = 8192, .word = 8, .bits = 2, .index = true};
    kind.pages = 14 * UNIT / 8192;
    struct machine *m = machine_start(&kind, 3 * UNIT / 8192);
    add(m, 0, 100);
    int refused = 0;
    for (int i = 0; i < 2 * HEAP_EXTENTS; i++)
        refused += heap_add(&m->heap, m->low + 10 * UNIT, 3 * UNIT) == PAGEALLOC_OUTSIDE;
    CHECK(refused == 2 * HEAP_EXTENTS);
    settle(m);
    add(m, UNIT / 8192, 50);
    add(m, 5 * UNIT / 8192, 10);
    settle(m);
    try_alloc(m, 100 * 8192, 1, true, true);
    try_finds(m);
    machine_end(m);
}

static void extents_are_so_many(void) {
    struct kind kind = {.page = 8192, .word = 8, .index = true};
    kind.pages = 14 * UNIT / 8192;
    struct machine *m = machine_start(&kind, UINT64_C(1) << 22);
    uintptr_t far = m->low;
    for (int i = 0; i < HEAP_EXTENTS; i++, far += 3 * UNIT)
        CHECK(heap_add(&m->heap, far, 8192) == 0);
    CHECK(heap_add(&m->heap, far, 8192) == HEAP_SCATTERED);
    CHECK(heap_add(&m->heap, far - 3 * UNIT + 8192, 8192) == 0);
    CHECK(heap_find(&m->heap, far - 3 * UNIT) == HEAP_NO_BLOCK);
    struct heap_stats stats;
    heap_measure(&m->heap, &stats);
    CHECK(stats.arena == (HEAP_EXTENTS + 1) * 8192);
    machine_end(m);
}

static void a_renamed_block_is_freed_for_others(void) {
    struct machine *m = small_heap(&plain, 100);
    int64_t old = heap_alloc(&m->heap, 10000, 1, false, true);
    REQUIRE(old >= 0);
    int64_t renamed = -1, none = -1;
    REQUIRE(heap_rename(&m->heap, old, &renamed) == 0 && renamed >= 0 && renamed != old);
    CHECK(heap_address(&m->heap, renamed) == heap_address(&m->heap, old));
    CHECK(heap_nbytes(&m->heap, renamed) == 10000);
    CHECK(heap_nbytes(&m->heap, old) == HEAP_NO_BLOCK);
    CHECK(heap_free(&m->heap, old) == HEAP_NO_BLOCK);
    CHECK(heap_rename(&m->heap, old, &none) == HEAP_NO_BLOCK && none == -1);
    CHECK(heap_find(&m->heap, heap_address(&m->heap, renamed)) == renamed);
    struct heap_stats stats;
    heap_measure(&m->heap, &stats);
    CHECK(stats.in_use == 16384 && stats.mallocs == 1 && stats.frees == 0);
    CHECK(heap_free(&m->heap, renamed) == 10000);
    heap_close(&m->heap, true);
    CHECK(heap_rename(&m->heap, renamed, &none) == HEAP_CLOSED && none == -1);
    machine_end(m);
}

static void a_block_that_may_be_viewed_is_freed_by_its_owner_alone(void) {
    struct machine *m = small_heap(&plain, 100);
    int64_t first = heap_alloc(&m->heap, 100, 1, false, true);
    int64_t second = heap_alloc(&m->heap, 200, 1, false, true);
    CHECK(heap_free_unviewed(&m->heap, first) == 100);
    CHECK(heap_free_unviewed(&m->heap, first) == HEAP_NO_BLOCK);
    CHECK(region_export(&m->region, 0, 1) == 1 && m->region.viewed);
    CHECK(heap_free_unviewed(&m->heap, second) == HEAP_VIEWED);
    CHECK(heap_nbytes(&m->heap, second) == 200);
    CHECK(heap_free_unviewed(&m->heap, first) == HEAP_VIEWED);
    m->region.viewed = false;
    CHECK(heap_free_unviewed(&m->heap, second) == 200);
    int64_t third = heap_alloc(&m->heap, 300, 1, false, true);
    CHECK(region_export(&m->region, 0, 1) == 1);
    CHECK(heap_free(&m->heap, third) == 300);
    heap_close(&m->heap, true);
    m->region.viewed = false;
    CHECK(heap_free_unviewed(&m->heap, third) == HEAP_CLOSED);
    machine_end(m);
}

static void a_block_is_resized_where_it_lies(void) {
    struct machine *m = small_heap(&plain, 100);
    for (size_t i = 0; i < 3; i++)
        try_alloc(m, 2 * 8192, 1, false, true);
    CHECK(heap_resize(&m->heap, m->blocks[0].handle, 0, true) == HEAP_EMPTY);
    try_resize(m, 0, 2 * 8192 + 1, true); /* the next block is in the way */
    try_resize(m, 0, 8192 + 1, true);
    try_resize(m, 0, 8192, true);
    try_resize(m, 0, 2 * 8192, true);
    try_resize(m, 2, 96 * 8192, true); /* to the last page */
    try_resize(m, 2, 96 * 8192 + 1, true);
    CHECK(heap_resize(&m->heap, m->blocks[2].handle, UINT64_MAX, true) < 0);
    CHECK(heap_find(&m->heap, page_start(m, 99)) == (m->blocks[2].handle & ~ZEROED));
    try_resize(m, 2, 1, true);
    CHECK(heap_find(&m->heap, page_start(m, 5)) == HEAP_NO_BLOCK);
    compare_all(m);
    struct heap_stats stats;
    heap_measure(&m->heap, &stats);
    CHECK(stats.requested == 4 * 8192 + 1 && stats.in_use == 5 * 8192 && stats.mallocs == 3);
    heap_close(&m->heap, true);
    CHECK(heap_resize(&m->heap, m->blocks[0].handle, 1, true) == HEAP_CLOSED);
    machine_end(m);
}

/* A block that another caller allocates between an allocation and its undo has a serial number of its
 * own. */
static void an_undoing_gives_no_number_twice(void) {
    struct machine *m = small_heap(&plain, 100);
    const struct pagealloc_integers sizes = {.constant = 1};
    int64_t handles[3], refused;
    size_t failed;
    CHECK(heap_alloc_many(&m->heap, &sizes, handles, 0, 3, true, &refused) == 3);
    int64_t other = heap_alloc(&m->heap, 1, 1, false, false);
    CHECK(heap_free_many(&m->heap, handles, 3, true, &failed) == 3);
    CHECK(heap_free(&m->heap, other) == 1);
    uintptr_t address = heap_address(&m->heap, other);
    CHECK(heap_alloc(&m->heap, 1, 1, false, false) >= 0);
    CHECK(heap_alloc(&m->heap, 2 * 8192, 1, false, false) >= 0);
    CHECK(heap_address(&m->heap, heap_alloc(&m->heap, 1, 1, false, false)) == address);
    CHECK(heap_free(&m->heap, other) == HEAP_NO_BLOCK);
    machine_end(m);
}

/* -- overwritten spans -------------------------------------------------------------------------- */

/* The span words of all pages of the arena, at the addresses that the layout gives them. */
static void lie(struct machine *m, size_t page, uint64_t word) {
    uintptr_t at = (uintptr_t)m->heap.meta.spans + page * m->kind.word;
    if (m->kind.index) {
        uintptr_t address = page_start(m, page);
        if (m->meta.index[address / UNIT] == 0)
            return;
        at = m->meta.index[address / UNIT] + m->meta.unit_bitmap +
             address % UNIT / m->kind.page * m->kind.word;
    }
    memcpy((void *)at, &word, m->kind.word);
}

static uint64_t random_lie(const struct machine *m) {
    switch (below(6)) {
    case 0: return random_next(&seed);
    case 1: return 2 * (1 + below(m->kind.page * 40)) + 1; /* a size */
    case 2: return 2 * below(50); /* a distance */
    case 3: return 2 * below(m->end + 10);
    case 4: return UINT64_MAX - below(4);
    default: return random_next(&seed) >> below(64);
    }
}

static bool is_part(struct machine *m, int64_t handle) {
    uintptr_t address = heap_address(&m->heap, handle);
    return address >= m->low && address < page_start(m, m->end) &&
           m->part[page_index(m, address)];
}

static void tell_lies(struct machine *m) {
    uint64_t n = one_in(20) ? m->end : below(20);
    for (uint64_t i = 0; i < n; i++) {
        size_t page = n == m->end ? (size_t)i : below(m->end);
        if (m->part[page])
            lie(m, page, random_lie(m));
    }
}

/* Results may be wrong, but addresses must be valid and each page either free or in use. */
static void believe_nothing(const struct kind *kind, size_t capacity, int steps) {
    struct machine *m = machine_start(kind, capacity);
    static int64_t handles[1000];
    size_t count = 0;
    struct pagealloc_run pieces[8];
    add(m, 0, 500);
    for (int i = 0; i < 4; i++)
        (void)try_add(m);
    for (int i = 0; i < steps; i++) {
        uint64_t choice = below(10), from = 0;
        size_t at = count > 0 ? below(count) : 0, failed;
        if (choice == 0)
            tell_lies(m);
        if (choice < 4 && count < LENGTH(handles)) {
            uint64_t nbytes = random_size(m);
            int64_t handle = heap_alloc(&m->heap, nbytes, 1, one_in(2), true);
            CHECK(handle >= 0 || handle == PAGEALLOC_FULL);
            if (handle >= 0 && CHECK(is_part(m, handle))) {
                memset((void *)heap_address(&m->heap, handle), 1, (size_t)nbytes);
                handles[count++] = handle;
            }
        } else if (choice == 4 && count > 0) {
            int64_t nbytes = heap_nbytes(&m->heap, handles[at]);
            CHECK(nbytes > 0 || nbytes == HEAP_NO_BLOCK);
            CHECK(heap_free(&m->heap, handles[at]) == nbytes);
            handles[at] = handles[--count];
        } else if (choice == 5) {
            int64_t handle = heap_find(&m->heap, m->low + below(m->end * m->kind.page));
            CHECK(handle == HEAP_NO_BLOCK || (handle >= 0 && is_part(m, handle)));
            if (handle >= 0 && one_in(2))
                CHECK(heap_free(&m->heap, handle) != 0);
        } else if (choice == 6) {
            static int64_t walked[700];
            uint64_t pages = 0;
            for (int64_t n = 1; n > 0; pages += (uint64_t)n) {
                n = heap_blocks(&m->heap, &from, walked, 1 + below(LENGTH(walked)));
                if (!CHECK(n >= 0 && pages <= m->end))
                    break;
                for (int64_t k = 0; k < n; k++)
                    CHECK(is_part(m, walked[k]));
            }
        } else if (choice == 7 && count > 0) {
            size_t n = 1 + below(count < 20 ? count : 20);
            int64_t got = heap_free_many(&m->heap, handles + count - n, n, false, &failed);
            CHECK(got >= 0 || (got == HEAP_NO_BLOCK && failed < n));
            count -= n;
        } else if (choice == 8) {
            int64_t n = heap_idle(&m->heap, UINT64_MAX >> 2, below(1000), 1 + below(1000), 0,
                                  one_in(3), pieces, LENGTH(pieces));
            for (int64_t k = 0; k < n; k++)
                CHECK(heap_give_back(&m->heap, &pieces[k], one_in(3)) > 0);
        }
        struct heap_stats stats;
        heap_measure(&m->heap, &stats);
        CHECK(stats.arena == total(m, m->part) * m->kind.page && stats.in_use <= stats.arena);
        CHECK(stats.released <= stats.arena - stats.in_use);
    }
    machine_end(m);
}

static void spans_are_not_believed(void) {
    static const struct kind kinds[] = {
        {.page = 8192, .word = 8, .bits = 4, .pages = 9000},
        {.page = 8192, .word = 4, .bits = 2, .pages = 9000},
        {.page = 8192, .word = 8, .own_spans = true, .accounting = VM_NORESERVE, .pages = 5000},
        {.page = 8192, .word = 8, .bits = 2, .index = true, .pages = 14 * UNIT / 8192},
    };
    for (size_t i = 0; i < LENGTH(kinds); i++)
        believe_nothing(&kinds[i], kinds[i].index ? 40 * UNIT / 8192 : kinds[i].pages, 2 * STEPS);
}

/* Claimed pages can be neither found nor freed, whatever the spans contain. */
static void pages_being_given_back_are_nobodys(void) {
    struct machine *m = small_heap(&plain, 100);
    try_alloc(m, 10 * 8192, 1, false, true);
    try_alloc(m, 10 * 8192, 1, false, true);
    int64_t lower = m->blocks[0].handle;
    try_free(m, 1);
    /* As heap_give_back does before it calls the kernel. */
    struct pagealloc_run piece = {10, 20};
    CHECK(pagealloc_alloc_at(m->heap.pages, 10, 10) == 0);
    m->heap.claimed = piece;
    lie(m, 10, 2 * 8192 + 1);
    CHECK(heap_find(&m->heap, page_start(m, 10)) == HEAP_NO_BLOCK);
    lie(m, 0, 2 * (15 * 8192) + 1);
    CHECK(heap_free(&m->heap, lower) == HEAP_NO_BLOCK);
    CHECK(pagealloc_free(m->heap.pages, 10, 10) == 0);
    m->heap.claimed = (struct pagealloc_run){0, 0};
    machine_end(m);
}

int main(void) {
    RUN(what_makes_no_sense_is_refused);
    RUN(a_closed_heap_refuses_everything);
    RUN(a_refused_commit_changes_nothing);
    RUN(young_pages_stay);
    RUN(holes_are_few);
    RUN(a_refused_add_changes_nothing);
    RUN(extents_are_so_many);
    RUN(a_renamed_block_is_freed_for_others);
    RUN(a_block_that_may_be_viewed_is_freed_by_its_owner_alone);
    RUN(a_block_is_resized_where_it_lies);
    RUN(an_undoing_gives_no_number_twice);
    RUN(pages_being_given_back_are_nobodys);
    RUN(flat_heaps_hold_what_the_model_holds);
    RUN(heaps_under_an_index_hold_what_the_model_holds);
    RUN(spans_are_not_believed);
    return check_report("test_heap");
}
