#include "pagealloc.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "bitmap.h"
#include "pagealloc_scan.h"
#include "runs.h"
#include "words.h"

enum {
    CHUNK = SCAN_BITS,  /* pages: a cache line of bits */
    WORDS = SCAN_WORDS, /* of a chunk */
    FAN = SCAN_CODES,   /* children of a node: a cache line of codes */
    LEVELS = 7,         /* enough for pagealloc_max_pages() */
    LINE = 64,          /* bytes */
    GAP = 5 * LINE,     /* bytes between tables */
    EXACT = 1 << 15,    /* codes below this are lengths */
    CLASS_BITS = 10,    /* above, each doubling of the length has 2^10 codes */
    PATIENCE = 64       /* misaligned runs before an aligned request takes one that always fits */
};

#define NONE UINT64_MAX

/* The runs that cross the borders of a chunk. */
struct tag {
    uint64_t length; /* of the run that starts in this chunk and leaves it; 0: there is none */
    uint64_t start;  /* 1 + first page of the run that comes from below and ends here; 0: none */
};

struct pagealloc {
    pthread_mutex_t lock;
    _Atomic(const void *) forking; /* the thread that holds the lock for a fork; NULL: none */
    bool wide; /* the machine can run the wide kernels of pagealloc_scan */
    unsigned levels;
    uint64_t capacity, chunks, free;
    uint64_t count[LEVELS];  /* number of codes per level */
    uint16_t *codes[LEVELS]; /* the max tree: on level 0 the longest run of each chunk, above it the
                                largest of 32 children */
    struct tag *tags;
    uint64_t (*bits)[WORDS]; /* 1 = free; all zero in chunks between a run's first and its last */
    struct runs parts;       /* the pages that are part of the arena */
};

/* -- the max tree ------------------------------------------------------------------------------ */

/* The code of a length: itself while it is exact; above, a floating-point number of 10 bits. Codes
 * have the order of lengths, so a tree of codes finds what a tree of lengths would. */

static uint16_t code_of(uint64_t length) {
    if (length < EXACT)
        return (uint16_t)length;
    /* The power of two below the length, and the CLASS_BITS bits below its leading one. */
    unsigned octave = 63 - (unsigned)__builtin_clzll(length);
    uint64_t inside = length >> (octave - CLASS_BITS) & ((1U << CLASS_BITS) - 1);
    return (uint16_t)(EXACT + ((octave - 15) << CLASS_BITS) + inside);
}

/* The first chunk from `from` on whose code is at least `code` (> 0); NONE if there is none. */
static uint64_t chunk_from(const struct pagealloc *pages, uint64_t from, uint16_t code) {
    unsigned level = 0;
    uint64_t i = from;
    /* A search from chunk 0 starts at the root. Any other climbs from its chunk: it looks at the
     * siblings at or after `i`, then at the siblings after their parent, and so on. */
    if (from == 0)
        level = pages->levels - 1;
    for (;;) {
        if (i >= pages->count[level])
            return NONE;
        uint64_t line = i / FAN * FAN;
        uint32_t found = SCAN(pages->wide, at_least, pages->codes[level] + line, code);
        found &= ~UINT32_C(0) << (i % FAN);
        if (found != 0) {
            i = line + (unsigned)__builtin_ctz(found);
            break;
        }
        if (++level == pages->levels)
            return NONE;
        i = i / FAN + 1;
    }
    /* Descend to the lowest child that is large enough: the code of its parent guarantees one. */
    while (level-- > 0) {
        uint32_t found = SCAN(pages->wide, at_least, pages->codes[level] + i * FAN, code);
        i = i * FAN + (unsigned)__builtin_ctz(found);
    }
    return i;
}

/* The last chunk below `below` in which a run starts; NONE if there is none. */
static uint64_t chunk_below(const struct pagealloc *pages, uint64_t below) {
    uint64_t i = below;
    unsigned level = 0;
    /* Climb until a node has a child before `i` that is not zero, then descend to its last one. */
    for (;; level++) {
        if (level == pages->levels || i == 0)
            return NONE;
        uint64_t line = (i - 1) / FAN * FAN;
        uint32_t found = SCAN(pages->wide, at_least, pages->codes[level] + line, 1);
        found &= ~UINT32_C(0) >> (FAN - 1 - (i - 1) % FAN);
        if (found != 0) {
            i = line + 31 - (unsigned)__builtin_clz(found);
            break;
        }
        i = line / FAN;
    }
    while (level-- > 0) {
        uint32_t found = SCAN(pages->wide, at_least, pages->codes[level] + i * FAN, 1);
        i = i * FAN + 31 - (unsigned)__builtin_clz(found);
    }
    return i;
}

/* The largest code of a line once its element `i` is `code`. */
static uint16_t largest_after(const struct pagealloc *pages, unsigned level, uint64_t i,
                              uint16_t code) {
    const uint16_t *line = pages->codes[level] + i / FAN * FAN;
    unsigned at = (unsigned)(i % FAN);
    /* Usually no sibling is larger: one comparison shows that. */
    uint32_t above = code == UINT16_MAX
                         ? 0
                         : SCAN(pages->wide, at_least, line, (uint16_t)(code + 1));
    if ((above & ~(UINT32_C(1) << at)) == 0)
        return code;
    return SCAN(pages->wide, largest, line, at, code);
}

/* Sets the code of a chunk and updates its ancestors, up to the first one that stays the same. A
 * line is read before it is written: a 64-byte load right after a 2-byte store to it stalls. */
static void set_code(struct pagealloc *pages, uint64_t i, uint16_t code) {
    for (unsigned level = 0;; level++) {
        uint16_t *node = &pages->codes[level][i], before = *node;
        if (code == before)
            return;
        uint64_t parent = i / FAN;
        uint16_t above = code;
        /* The parent changes if the new code exceeds it, or if the old code may have been the only
         * maximum: only then are the siblings compared. */
        if (level + 1 < pages->levels) {
            above = pages->codes[level + 1][parent];
            if (code > above)
                above = code;
            else if (before == above)
                above = largest_after(pages, level, i, code);
        }
        *node = code;
        if (level + 1 == pages->levels)
            return;
        i = parent;
        code = above;
    }
}

/* Counts a run of `length` pages that now starts in a chunk; never lowers its code. */
static void raise_code(struct pagealloc *pages, uint64_t chunk, uint64_t length) {
    uint16_t code = code_of(length);
    if (code > pages->codes[0][chunk])
        set_code(pages, chunk, code);
}

/* -- runs of free pages ------------------------------------------------------------------------ */

static uint64_t chunk_of(uint64_t page) {
    return page / CHUNK;
}

/* All chunks as one bitmap: bit n is page n, except inside the chunks that are kept zero. */
static uint64_t *bits_of(const struct pagealloc *pages) {
    return pages->bits[0];
}

static bool is_set(const struct pagealloc *pages, uint64_t page) {
    return bits_of(pages)[page / 64] >> (page % 64) & 1;
}

/* The bits of the runs that start in a chunk. If a run from below ends here, its bits are removed
 * in `copy`, which is returned; otherwise the chunk itself is. */
static const uint64_t *started_here(const struct pagealloc *pages, uint64_t chunk, uint64_t *copy) {
    const uint64_t *words = pages->bits[chunk];
    if (pages->tags[chunk].start == 0)
        return words;
    memcpy(copy, words, CHUNK / 8);
    /* Clear the leading ones: whole words, then x & (x + 1), which clears the lowest row of
     * ones. */
    unsigned i = 0;
    while (i < WORDS && copy[i] == ~UINT64_C(0))
        copy[i++] = 0;
    if (i < WORDS)
        copy[i] &= copy[i] + 1;
    return copy;
}

/* Recomputes the code of a chunk from its bits and its tag. */
static void update_chunk(struct pagealloc *pages, uint64_t chunk) {
    uint64_t copy[WORDS], length = pages->tags[chunk].length;
    /* A run that leaves the chunk and is longer than one is the longest without a look at the
     * bits. */
    if (length < CHUNK) {
        const uint64_t *words = started_here(pages, chunk, copy);
        uint64_t longest = scan_longest_long(words);
        if (longest > 0 && longest < 64)
            longest = SCAN(pages->wide, longest, words);
        length = larger(longest, length);
    }
    set_code(pages, chunk, code_of(length));
}

/* The first bit at or after `at` that is zero; CHUNK if there is none. */
static unsigned ones_end(const uint64_t *words, unsigned at) {
    for (unsigned i = at / 64, shift = at % 64; i < WORDS; i++, shift = 0) {
        uint64_t zeros = ~words[i] >> shift;
        if (zeros != 0)
            return i * 64 + shift + (unsigned)__builtin_ctzll(zeros);
    }
    return CHUNK;
}

/* The start of the row of ones that ends before bit `end`; `end` if the bit below it is zero. */
static unsigned ones_begin(const uint64_t *words, unsigned end) {
    while (end > 0) {
        unsigned i = (end - 1) / 64, above = 63 - (end - 1) % 64;
        uint64_t zeros = ~words[i] << above;
        if (zeros != 0)
            return i * 64 + 64 - above - (unsigned)__builtin_clzll(zeros);
        end = i * 64;
    }
    return 0;
}

/* The end of the run that starts at `start`. */
static uint64_t stop_of(const struct pagealloc *pages, uint64_t start) {
    uint64_t chunk = chunk_of(start);
    unsigned end = ones_end(pages->bits[chunk], (unsigned)(start % CHUNK));
    /* A run that reaches the end of its chunk goes on if the tag says so. */
    if (end == CHUNK && pages->tags[chunk].length != 0)
        return start + pages->tags[chunk].length;
    return chunk * CHUNK + end;
}

/* The start of the run that contains page `end` - 1, whose bit must be set. */
static uint64_t start_of(const struct pagealloc *pages, uint64_t end) {
    uint64_t chunk = chunk_of(end - 1);
    unsigned first = ones_begin(pages->bits[chunk], (unsigned)(end - chunk * CHUNK));
    if (first == 0 && pages->tags[chunk].start != 0)
        return pages->tags[chunk].start - 1;
    return chunk * CHUNK + first;
}

/* The highest start of a run below `below`; NONE if there is none. */
static uint64_t last_start(const struct pagealloc *pages, uint64_t below) {
    uint64_t chunk = below == 0 ? 0 : chunk_of(below - 1), copy[WORDS];
    unsigned n = (unsigned)(below - chunk * CHUNK);
    /* Look at the bits of the chunk of `below`, then of the nearest chunk below in which a run
     * starts. */
    for (; chunk != NONE; chunk = chunk_below(pages, chunk), n = CHUNK) {
        const uint64_t *words = started_here(pages, chunk, copy);
        for (unsigned end = n; end > 0; end = (end - 1) / 64 * 64) {
            unsigned i = (end - 1) / 64, above = 63 - (end - 1) % 64;
            uint64_t ones = words[i] << above;
            if (ones != 0)
                return chunk * CHUNK +
                       ones_begin(words, i * 64 + 64 - above - (unsigned)__builtin_clzll(ones));
        }
    }
    return NONE;
}

/* The lowest start of a run at or above page `from`, which is not free; NONE if there is none. */
static uint64_t next_start(const struct pagealloc *pages, uint64_t from) {
    if (from >= pages->capacity)
        return NONE;
    uint64_t chunk = chunk_of(from), end = (chunk + 1) * CHUNK, copy[WORDS];
    /* First the rest of this chunk, whose ones all start at or above `from`; then the tree. */
    uint64_t found = bitmap_find(bits_of(pages), from, end, true);
    if (found < end)
        return found;
    chunk = chunk_from(pages, chunk + 1, 1);
    if (chunk == NONE)
        return NONE;
    const uint64_t *words = started_here(pages, chunk, copy);
    return chunk * CHUNK + bitmap_find(words, 0, CHUNK, true);
}

/* The words of [start, stop), at most one chunk, and masks for the first and the last of them. */
struct bit_range {
    uint64_t first, last, low, high;
};

static struct bit_range range_of(uint64_t start, uint64_t stop) {
    struct bit_range range = {start / 64, (stop - 1) / 64, ~UINT64_C(0) << (start % 64),
                              ~UINT64_C(0) >> (63 - (stop - 1) % 64)};
    if (range.first == range.last)
        range.low = range.high &= range.low;
    return range;
}

static bool any_bits(const struct pagealloc *pages, uint64_t start, uint64_t stop) {
    const uint64_t *words = bits_of(pages);
    struct bit_range range = range_of(start, stop);
    uint64_t any = (words[range.first] & range.low) | (words[range.last] & range.high);
    for (uint64_t i = range.first + 1; i < range.last; i++)
        any |= words[i];
    return any != 0;
}

static void set_bits(struct pagealloc *pages, uint64_t start, uint64_t stop) {
    uint64_t *words = bits_of(pages);
    struct bit_range range = range_of(start, stop);
    words[range.first] |= range.low;
    words[range.last] |= range.high;
    for (uint64_t i = range.first + 1; i < range.last; i++)
        words[i] = ~UINT64_C(0);
}

static void clear_bits(struct pagealloc *pages, uint64_t start, uint64_t stop) {
    uint64_t *words = bits_of(pages);
    struct bit_range range = range_of(start, stop);
    words[range.first] &= ~range.low;
    words[range.last] &= ~range.high;
    for (uint64_t i = range.first + 1; i < range.last; i++)
        words[i] = 0;
}

/* Marks [start, stop) as a free run that touches no other: bits in its first and last chunk, tags
 * if these differ, and the code of the first. The bits of the chunks in between stay zero. */
static void insert_run(struct pagealloc *pages, uint64_t start, uint64_t stop) {
    uint64_t first = chunk_of(start), last = chunk_of(stop - 1);
    if (first == last) {
        set_bits(pages, start, stop);
    } else {
        set_bits(pages, start, (first + 1) * CHUNK);
        set_bits(pages, last * CHUNK, stop);
        pages->tags[first].length = stop - start;
        pages->tags[last].start = start + 1;
    }
    raise_code(pages, first, stop - start);
}

/* Unmarks the run [start, stop). The code of its first chunk still counts it: the caller updates
 * it. */
static void erase_run(struct pagealloc *pages, uint64_t start, uint64_t stop) {
    uint64_t first = chunk_of(start), last = chunk_of(stop - 1);
    if (first == last) {
        clear_bits(pages, start, stop);
    } else {
        clear_bits(pages, start, (first + 1) * CHUNK);
        clear_bits(pages, last * CHUNK, stop);
        pages->tags[first].length = 0;
        pages->tags[last].start = 0;
    }
}

/* Whether a run of this length may be the longest of the chunk; if not, its end changes no code. */
static bool may_be_longest(const struct pagealloc *pages, uint64_t chunk, uint64_t length) {
    return pages->codes[0][chunk] == code_of(length);
}

/* Shortens a run that ends at `stop` so that it starts at `start`, in a later chunk than before; if
 * start == stop the run ends. The bits below `start` are zero already except in the last chunk. */
static void move_start(struct pagealloc *pages, uint64_t start, uint64_t stop) {
    uint64_t first = chunk_of(start), last = chunk_of(stop - 1);
    if (first < last) {
        /* `start` was in an inner chunk, whose bits were zero: it becomes the first chunk. */
        set_bits(pages, start, (first + 1) * CHUNK);
        pages->tags[first].length = stop - start;
        pages->tags[last].start = start + 1;
    } else {
        /* The rest lies in the last chunk: an ordinary run of bits, without a tag. */
        if (last * CHUNK < start)
            clear_bits(pages, last * CHUNK, start);
        pages->tags[last].start = 0;
    }
    if (start < stop)
        raise_code(pages, first, stop - start);
}

/* Allocates [page, page + n) from the free run [start, stop): splits the run, clears the bits of
 * the pages and brings the code of the first chunk up to date. */
static void take_run(struct pagealloc *pages, uint64_t start, uint64_t stop, uint64_t page,
                     uint64_t n) {
    uint64_t first = chunk_of(start), last = chunk_of(stop - 1), end = page + n;
    pages->free -= n;
    /* The usual case, a run in one chunk that may be its longest: one kernel clears the bits and
     * finds the longest run that is left. The rest behind the pages is a lower bound for it. */
    if (first == last && pages->tags[first].start == 0 &&
        may_be_longest(pages, first, stop - start)) {
        uint64_t longest = SCAN(pages->wide, longest_without, pages->bits[first],
                                (unsigned)(page - first * CHUNK), (unsigned)(end - first * CHUNK),
                                (unsigned)(stop - end));
        uint64_t leaving = pages->tags[first].length; /* another run, which leaves the chunk */
        set_code(pages, first, code_of(larger(leaving, longest)));
        return;
    }
    if (first == last) {
        clear_bits(pages, page, end);
    } else if (page == start && chunk_of(end) == first) {
        /* The front of a long run: it still starts in this chunk, only later and shorter. */
        clear_bits(pages, page, end);
        pages->tags[first].length -= n;
        pages->tags[last].start += n;
    } else if (page == start) {
        /* The front of a long run, beyond its first chunk: the rest moves to a later chunk. */
        clear_bits(pages, page, (first + 1) * CHUNK);
        pages->tags[first].length = 0;
        move_start(pages, end, stop);
    } else {
        /* The middle or the end of a long run: unmark it and mark what is left on both sides. */
        erase_run(pages, start, stop);
        if (start < page)
            insert_run(pages, start, page);
        if (end < stop)
            insert_run(pages, end, stop);
    }
    /* insert_run and move_start only raise codes, so the first chunk may still count the old
     * run. */
    if (may_be_longest(pages, first, stop - start))
        update_chunk(pages, first);
}

/* Zeros the bits and the tag of a chunk that has become an inner chunk of a run. */
static void clear_inner_chunk(struct pagealloc *pages, uint64_t chunk, uint64_t first,
                              uint64_t last) {
    if (first < chunk && chunk < last) {
        memset(pages->bits[chunk], 0, CHUNK / 8);
        pages->tags[chunk] = (struct tag){0, 0};
    }
}

/* Joins the run [start, page), the pages [page, end) and the run [end, stop) to one run that spans
 * several chunks. Each of the two runs may be empty. */
static void join_runs(struct pagealloc *pages, uint64_t start, uint64_t stop, uint64_t page,
                      uint64_t end) {
    uint64_t first = chunk_of(start), last = chunk_of(stop - 1), border = (first + 1) * CHUNK;
    /* The last chunk of the lower run and the first chunk of the upper one may now be inner
     * chunks. */
    if (start < page)
        clear_inner_chunk(pages, chunk_of(page - 1), first, last);
    if (end < stop)
        clear_inner_chunk(pages, chunk_of(end), first, last);
    /* Of the freed pages, mark those in the first and the last chunk of the joined run. */
    if (page < border)
        set_bits(pages, page, smaller(border, end));
    if (last * CHUNK < end)
        set_bits(pages, larger(page, last * CHUNK), end);
    /* Account for the run at both ends and in the tree. */
    pages->tags[first].length = stop - start;
    pages->tags[last].start = start + 1;
    raise_code(pages, first, stop - start);
}

/* Frees [page, page + n), all of it in use: finds the free runs that touch it, joins them and
 * brings the codes up to date. */
static void return_run(struct pagealloc *pages, uint64_t page, uint64_t n) {
    uint64_t end = page + n, start = page, stop = end;
    /* Free neighbours show in the bits: their end pages lie in first or last chunks, never in inner
     * ones. */
    if (page > 0 && is_set(pages, page - 1))
        start = start_of(pages, page);
    if (end < pages->capacity && is_set(pages, end))
        stop = stop_of(pages, end);
    uint64_t first = chunk_of(start), last = chunk_of(stop - 1), right = chunk_of(end);
    if (first == last || (first == right && end < stop)) {
        /* All changed bits lie in one chunk, in which the joined run starts. */
        set_bits(pages, page, end);
        if (first != last) {
            pages->tags[first].length = stop - start;
            pages->tags[last].start = start + 1;
        }
        raise_code(pages, first, stop - start);
    } else {
        /* The joined run has other first or last chunks than the two runs it is made of. */
        join_runs(pages, start, stop, page, end);
        /* The upper run started in `right` and now starts in `first`: `right` must not count it. */
        if (end < stop && right != first && may_be_longest(pages, right, stop - end))
            update_chunk(pages, right);
    }
    pages->free += n;
}

/* -- checks and searches ----------------------------------------------------------------------- */

static bool is_outside(const struct pagealloc *pages, uint64_t page, uint64_t n) {
    return n == 0 || page >= pages->capacity || n > pages->capacity - page;
}

/* Whether a chunk is an inner chunk of a free run, whose pages are free although its bits are
 * zero. */
static bool is_inner_chunk(const struct pagealloc *pages, uint64_t chunk) {
    const uint64_t *words = pages->bits[chunk];
    uint64_t any = pages->codes[0][chunk];
    for (unsigned i = 0; i < WORDS; i++)
        any |= words[i];
    if (any != 0)
        return false;
    /* Only the nearest run below can cover it. */
    uint64_t start = last_start(pages, chunk * CHUNK);
    return start != NONE && stop_of(pages, start) > chunk * CHUNK;
}

/* Whether some of [page, page + n), all below the capacity, are free: bits in the outer chunks, a
 * run that starts in a chunk between them, or a run from below that covers the first. */
static bool some_free(const struct pagealloc *pages, uint64_t page, uint64_t n) {
    uint64_t first = chunk_of(page), last = chunk_of(page + n - 1);
    uint64_t border = (first + 1) * CHUNK;
    if (any_bits(pages, page, first == last ? page + n : border))
        return true;
    if (first != last &&
        (chunk_from(pages, first + 1, 1) < last || any_bits(pages, last * CHUNK, page + n)))
        return true;
    return is_inner_chunk(pages, first);
}

/* Whether all of [page, page + n) is part of the arena. */
static bool is_part(const struct pagealloc *pages, uint64_t page, uint64_t n) {
    const struct runs *parts = &pages->parts;
    if (parts->count == 1) /* the usual case, without a call */
        return parts->items->lo <= page && page + n <= parts->items->hi;
    return runs_contain(parts, (size_t)page, (size_t)(page + n));
}

/* Sets `*page` to the lowest page of the run with the alignment; false if fewer than `n` follow. */
static bool aligned_page_in(struct pagealloc_run *run, uint64_t n, uint64_t align, uint64_t phase,
                            uint64_t *page) {
    uint64_t off = (run->start + phase) & (align - 1);
    uint64_t skip = off == 0 ? 0 : align - off;
    *page = run->start + skip;
    return run->stop - run->start >= skip && run->stop - *page >= n;
}

/* Finds the lowest run of at least `n` pages that starts in `chunk`, whose code is at least that of
 * `n`. False if there is none: above 32,768 pages a code is a class, and the run may be shorter. */
static bool run_in_chunk(const struct pagealloc *pages, uint64_t chunk, uint64_t n,
                         struct pagealloc_run *run) {
    uint64_t leaving = pages->tags[chunk].length, copy[WORDS];
    const uint64_t *words = started_here(pages, chunk, copy);
    if (n <= CHUNK) {
        /* Bits behind the chunk count as free if the run that leaves it is long enough. */
        uint64_t fill = leaving >= n ? ~UINT64_C(0) : 0;
        unsigned at = n >= 64 ? scan_find_long(words, (unsigned)n)
                              : SCAN(pages->wide, find, words, (unsigned)n, fill);
        run->start = chunk * CHUNK + at;
        unsigned end = ones_end(words, at);
        run->stop = end == CHUNK && leaving != 0 ? run->start + leaving : chunk * CHUNK + end;
        return true;
    }
    /* Only a run that leaves the chunk is longer than one. */
    run->start = chunk * CHUNK + ones_begin(words, CHUNK);
    run->stop = run->start + leaving;
    return leaving >= n;
}

/* The lowest free run of at least `n` pages in the chunks from `chunk` on. */
static bool run_from_chunk(const struct pagealloc *pages, uint64_t chunk, uint64_t n,
                           struct pagealloc_run *run) {
    uint16_t code = code_of(n);
    do {
        chunk = chunk_from(pages, chunk, code);
        if (chunk == NONE)
            return false;
    } while (!run_in_chunk(pages, chunk++, n, run));
    return true;
}

/* The next run after `run` with at least `n` pages: in the same chunk, else in a later one. */
static bool run_after(const struct pagealloc *pages, uint64_t n, struct pagealloc_run *run) {
    uint64_t chunk = chunk_of(run->start);
    /* A run that left the chunk ends the loop at once: it was the last one that starts there. */
    for (uint64_t start = run->stop; chunk_of(start) == chunk;) {
        start = bitmap_find(bits_of(pages), start, (chunk + 1) * CHUNK, true);
        if (chunk_of(start) != chunk)
            break;
        uint64_t stop = stop_of(pages, start);
        if (stop - start >= n) {
            *run = (struct pagealloc_run){start, stop};
            return true;
        }
        start = stop;
    }
    return run_from_chunk(pages, chunk + 1, n, run);
}

/* The lowest run that holds `n` pages with the alignment, and the first of these pages. Tries the
 * runs that are long enough in turn. After PATIENCE misaligned ones it takes the lowest run with
 * `align` - 1 spare pages, if there is one: that always fits, which bounds the time. */
static bool aligned_run(const struct pagealloc *pages, uint64_t n, uint64_t align, uint64_t phase,
                        struct pagealloc_run *run, uint64_t *page) {
    bool found = run_from_chunk(pages, 0, n, run);
    for (unsigned seen = 0; found; found = run_after(pages, n, run)) {
        if (aligned_page_in(run, n, align, phase, page))
            return true;
        struct pagealloc_run spare;
        if (++seen == PATIENCE && align <= pages->capacity &&
            run_from_chunk(pages, 0, n + align - 1, &spare)) {
            *run = spare;
            return aligned_page_in(run, n, align, phase, page);
        }
    }
    return false;
}

/* Allocates with the lock held: checks the request, finds a run, takes the pages from it. */
static int64_t allocate(struct pagealloc *pages, uint64_t n, uint64_t align, uint64_t phase) {
    struct pagealloc_run run;
    uint64_t page;
    if (n == 0 || n > INT64_MAX)
        return PAGEALLOC_OUTSIDE;
    if (n > pages->capacity)
        return PAGEALLOC_FULL;
    if (!is_power_of_two(align) || phase >= align)
        return PAGEALLOC_ALIGNMENT;
    if (align == 1) {
        if (!run_from_chunk(pages, 0, n, &run))
            return PAGEALLOC_FULL;
        page = run.start;
    } else if (!aligned_run(pages, n, align, phase, &run, &page)) {
        return PAGEALLOC_FULL;
    }
    take_run(pages, run.start, run.stop, page, n);
    return (int64_t)page;
}

int64_t pagealloc_alloc_at_held(struct pagealloc *pages, uint64_t page, uint64_t n) {
    if (is_outside(pages, page, n))
        return PAGEALLOC_OUTSIDE;
    if (!is_part(pages, page, n))
        return PAGEALLOC_FOREIGN;
    /* The free run that contains the page, if any, is the last one that starts at or below it. */
    uint64_t start = last_start(pages, page + 1);
    if (start == NONE)
        return PAGEALLOC_IN_USE;
    uint64_t stop = stop_of(pages, start);
    if (stop < page + n)
        return PAGEALLOC_IN_USE;
    take_run(pages, start, stop, page, n);
    return 0;
}

/* Frees with the lock held; every check precedes the first change. */
static int64_t free_run(struct pagealloc *pages, uint64_t page, uint64_t n) {
    if (is_outside(pages, page, n))
        return PAGEALLOC_OUTSIDE;
    if (!is_part(pages, page, n))
        return PAGEALLOC_FOREIGN;
    if (some_free(pages, page, n))
        return PAGEALLOC_NOT_IN_USE;
    return_run(pages, page, n);
    return 0;
}

#ifdef __x86_64__
/* The two hot functions, compiled again for the wide kernels with all callees inlined (flatten): a
 * function with another target cannot be inlined otherwise. */
#define FLAT SCAN_WIDE __attribute__((flatten)) static

FLAT int64_t allocate_wide(struct pagealloc *pages, uint64_t n, uint64_t align, uint64_t phase) {
    if (!pages->wide)
        __builtin_unreachable();
    return allocate(pages, n, align, phase);
}

FLAT int64_t free_run_wide(struct pagealloc *pages, uint64_t page, uint64_t n) {
    if (!pages->wide)
        __builtin_unreachable();
    return free_run(pages, page, n);
}
#endif

int64_t pagealloc_alloc_held(struct pagealloc *pages, uint64_t n, uint64_t align, uint64_t phase) {
#ifdef __x86_64__
    if (pages->wide)
        return allocate_wide(pages, n, align, phase);
#endif
    return allocate(pages, n, align, phase);
}

int64_t pagealloc_free_held(struct pagealloc *pages, uint64_t page, uint64_t n) {
#ifdef __x86_64__
    if (pages->wide)
        return free_run_wide(pages, page, n);
#endif
    return free_run(pages, page, n);
}

int64_t pagealloc_add_held(struct pagealloc *pages, uint64_t page, uint64_t n) {
    struct run piece;
    if (is_outside(pages, page, n))
        return PAGEALLOC_OUTSIDE;
    if (runs_next(&pages->parts, (size_t)page, (size_t)(page + n), &piece))
        return PAGEALLOC_IN_USE;
    /* Storage first: nothing after this can fail. */
    if (runs_grow(&pages->parts) != 0)
        return PAGEALLOC_NO_MEMORY;
    runs_add(&pages->parts, (size_t)page, (size_t)(page + n));
    return_run(pages, page, n);
    return 0;
}

bool pagealloc_lowest_held(const struct pagealloc *pages, uint64_t n, struct pagealloc_run *run) {
    return n > 0 && n <= pages->capacity && run_from_chunk(pages, 0, n, run);
}

bool pagealloc_in_use_held(const struct pagealloc *pages, uint64_t page, uint64_t n) {
    return !is_outside(pages, page, n) && is_part(pages, page, n) && !some_free(pages, page, n);
}

uint64_t pagealloc_free_pages_held(const struct pagealloc *pages) {
    return pages->free;
}

uint64_t pagealloc_part_pages_held(const struct pagealloc *pages) {
    return pages->parts.total;
}

bool pagealloc_run_below_held(const struct pagealloc *pages, uint64_t stop,
                              struct pagealloc_run *run) {
    stop = smaller(stop, pages->capacity);
    uint64_t start = last_start(pages, stop);
    if (start == NONE)
        return false;
    uint64_t end = stop_of(pages, start);
    *run = (struct pagealloc_run){start, smaller(end, stop)};
    return true;
}

/* The first run of free pages in [from, stop), clipped to it; false if there is none. */
static bool free_from(const struct pagealloc *pages, uint64_t from, uint64_t stop,
                      struct pagealloc_run *run) {
    if (from >= stop || from >= pages->capacity)
        return false;
    /* `from` lies in the last run that starts at or below it, or else before the next one. */
    uint64_t start = last_start(pages, from + 1), end = start == NONE ? 0 : stop_of(pages, start);
    if (end <= from) {
        start = next_start(pages, from);
        if (start == NONE || start >= stop)
            return false;
        end = stop_of(pages, start);
    }
    *run = (struct pagealloc_run){larger(start, from), smaller(end, stop)};
    return true;
}

bool pagealloc_used_from_held(const struct pagealloc *pages, uint64_t start, uint64_t stop,
                              struct pagealloc_run *run) {
    struct run part;
    struct pagealloc_run free;
    stop = smaller(stop, pages->capacity);
    /* In each part, the pages in use end where the next free run starts, or with the part. */
    while (start < stop && runs_next(&pages->parts, (size_t)start, (size_t)stop, &part)) {
        if (!free_from(pages, part.lo, part.hi, &free))
            free.start = free.stop = part.hi;
        if (free.start > part.lo) {
            *run = (struct pagealloc_run){part.lo, free.start};
            return true;
        }
        start = free.stop;
    }
    return false;
}

/* -- integers in the caller's memory ----------------------------------------------------------- */

uint64_t pagealloc_integer(const struct pagealloc_integers *from, size_t i) {
#define READ(type) ((const type *)from->items)[i]
    switch (from->width) {
    case 1: return READ(uint8_t);
    case 2: return READ(uint16_t);
    case 4: return READ(uint32_t);
    case 8: return READ(uint64_t);
    case -1: return (uint64_t)(int64_t)READ(int8_t);
    case -2: return (uint64_t)(int64_t)READ(int16_t);
    case -4: return (uint64_t)(int64_t)READ(int32_t);
    case -8: return (uint64_t)READ(int64_t);
    default: return from->constant;
    }
#undef READ
}

/* Writes an integer; false, with nothing written, if it does not fit. */
static bool write_integer(const struct pagealloc_integers *to, size_t i, uint64_t value) {
#define WRITE(type) (((type *)to->items)[i] = (type)value)
    unsigned bits = 8 * (unsigned)(to->width < 0 ? -to->width : to->width);
    unsigned usable = to->width < 0 ? bits - 1 : bits;
    if (bits == 0 || (usable < 64 && value >> usable != 0))
        return false;
    switch (bits) {
    case 8: WRITE(uint8_t); break;
    case 16: WRITE(uint16_t); break;
    case 32: WRITE(uint32_t); break;
    default: WRITE(uint64_t); break;
    }
    return true;
#undef WRITE
}

int64_t pagealloc_alloc_many(struct pagealloc *pages, const struct pagealloc_integers *lengths,
                             const struct pagealloc_integers *first, size_t count, size_t *failed) {
    int64_t page = 0;
    size_t i = 0;
    pagealloc_lock(pages);
    for (; i < count && page >= 0; i++) {
        page = pagealloc_alloc_held(pages, pagealloc_integer(lengths, i), 1, 0);
        if (page >= 0 && !write_integer(first, i, (uint64_t)page)) {
            return_run(pages, (uint64_t)page, pagealloc_integer(lengths, i));
            page = PAGEALLOC_NARROW;
        }
    }
    /* Undo: free the runs that were allocated so far. */
    if (page < 0) {
        *failed = --i;
        while (i-- > 0)
            (void)pagealloc_free_held(pages, pagealloc_integer(first, i),
                                      pagealloc_integer(lengths, i));
    }
    pagealloc_unlock(pages);
    return page < 0 ? page : 0;
}

int64_t pagealloc_free_many(struct pagealloc *pages, const struct pagealloc_integers *lengths,
                            const struct pagealloc_integers *first, size_t count, size_t *failed) {
    int64_t refused = 0;
    size_t i = 0;
    pagealloc_lock(pages);
    for (; i < count && refused == 0; i++)
        refused = pagealloc_free_held(pages, pagealloc_integer(first, i),
                                      pagealloc_integer(lengths, i));
    /* Undo: the pages are still free, since the lock is held. */
    if (refused != 0) {
        *failed = --i;
        while (i-- > 0)
            (void)pagealloc_alloc_at_held(pages, pagealloc_integer(first, i),
                                          pagealloc_integer(lengths, i));
    }
    pagealloc_unlock(pages);
    return refused;
}

/* -- creation, locking and the locked functions ------------------------------------------------ */

uint64_t pagealloc_max_pages(void) {
    uint64_t most = UINT64_C(1) << 44;
    return most < SIZE_MAX / 2 ? most : SIZE_MAX / 2;
}

/* Sets the number of levels and of codes per level. */
static void count_levels(struct pagealloc *pages, uint64_t capacity) {
    uint64_t n = (capacity + CHUNK - 1) / CHUNK;
    pages->capacity = capacity;
    pages->chunks = n;
    pages->levels = 0;
    do
        pages->count[pages->levels++] = n;
    while (n > FAN && (n = (n + FAN - 1) / FAN));
}

/* Places the tables after the struct, small and hot ones first; returns their end. Most sizes are
 * powers of two: without a gap of a few cache lines the last entries of all levels would have the
 * same offset in an OS page, and loads would wait for unrelated stores (4K aliasing). */
static uint64_t lay_out(struct pagealloc *pages, uintptr_t memory) {
    uint64_t at = round_up(sizeof *pages, LINE);
    for (unsigned level = pages->levels; level-- > 0;) {
        pages->codes[level] = (uint16_t *)(uintptr_t)(memory + at);
        at += round_up(pages->count[level] * sizeof *pages->codes[level], LINE) + GAP;
    }
    pages->tags = (struct tag *)(uintptr_t)(memory + at);
    at = round_up(at + pages->chunks * sizeof *pages->tags, LINE) + GAP;
    pages->bits = (uint64_t(*)[WORDS])(uintptr_t)(memory + at);
    return at + pages->chunks * LINE;
}

uint64_t pagealloc_bytes(uint64_t capacity) {
    struct pagealloc pages = {.levels = 0};
    count_levels(&pages, capacity);
    return lay_out(&pages, 0);
}

uint64_t pagealloc_tree_capacity(uint64_t capacity) {
    uint64_t largest = (uint64_t)CHUNK * FAN;
    while (largest < capacity)
        largest *= FAN;
    return smaller(largest, pagealloc_max_pages());
}

struct pagealloc *pagealloc_open(void *memory, uint64_t capacity) {
    struct pagealloc *pages = memory;
    count_levels(pages, capacity);
    (void)lay_out(pages, (uintptr_t)memory);
    pages->wide = scan_machine_is_wide();
    (void)pthread_mutex_init(&pages->lock, NULL);
    atomic_init(&pages->forking, NULL);
    return pages;
}

void pagealloc_close(struct pagealloc *pages) {
    runs_clear(&pages->parts);
    (void)pthread_mutex_destroy(&pages->lock);
}

/* Its address identifies a thread, and stays the same in a forked child. */
static _Thread_local char this_thread;

/* Whether this thread holds the lock for a fork. Only this thread writes the value that makes it
 * true, so relaxed order is enough. */
static bool holds_for_fork(struct pagealloc *pages) {
    const void *thread = atomic_load_explicit(&pages->forking, memory_order_relaxed);
    return thread != NULL && thread == &this_thread;
}

void pagealloc_lock(struct pagealloc *pages) {
    if (!holds_for_fork(pages))
        (void)pthread_mutex_lock(&pages->lock);
}

void pagealloc_unlock(struct pagealloc *pages) {
    if (!holds_for_fork(pages))
        (void)pthread_mutex_unlock(&pages->lock);
}

int pagealloc_trylock_fork(struct pagealloc *pages) {
    if (holds_for_fork(pages))
        return EDEADLK;
    int err = pthread_mutex_trylock(&pages->lock);
    if (err == 0)
        atomic_store_explicit(&pages->forking, &this_thread, memory_order_relaxed);
    return err;
}

void pagealloc_unlock_fork(struct pagealloc *pages) {
    atomic_store_explicit(&pages->forking, NULL, memory_order_relaxed);
    (void)pthread_mutex_unlock(&pages->lock);
}

/* Returns the result of a call that is made with the lock held. */
#define LOCKED(type, pages, call)                                                                  \
    do {                                                                                           \
        pagealloc_lock(pages);                                                                     \
        type answer_ = (call);                                                                     \
        pagealloc_unlock(pages);                                                                   \
        return answer_;                                                                            \
    } while (0)

int64_t pagealloc_add(struct pagealloc *pages, uint64_t page, uint64_t n) {
    LOCKED(int64_t, pages, pagealloc_add_held(pages, page, n));
}

int64_t pagealloc_alloc(struct pagealloc *pages, uint64_t n, uint64_t align, uint64_t phase) {
    LOCKED(int64_t, pages, pagealloc_alloc_held(pages, n, align, phase));
}

int64_t pagealloc_alloc_at(struct pagealloc *pages, uint64_t page, uint64_t n) {
    LOCKED(int64_t, pages, pagealloc_alloc_at_held(pages, page, n));
}

int64_t pagealloc_free(struct pagealloc *pages, uint64_t page, uint64_t n) {
    LOCKED(int64_t, pages, pagealloc_free_held(pages, page, n));
}

int64_t pagealloc_free_unless(struct pagealloc *pages, uint64_t page, uint64_t n,
                              const bool *veto) {
    LOCKED(int64_t, pages,
           __atomic_load_n(veto, __ATOMIC_RELAXED) ? PAGEALLOC_VETOED
                                                   : pagealloc_free_held(pages, page, n));
}

bool pagealloc_in_use(struct pagealloc *pages, uint64_t page, uint64_t n) {
    LOCKED(bool, pages, pagealloc_in_use_held(pages, page, n));
}

uint64_t pagealloc_free_pages(struct pagealloc *pages) {
    LOCKED(uint64_t, pages, pagealloc_free_pages_held(pages));
}

uint64_t pagealloc_part_pages(struct pagealloc *pages) {
    LOCKED(uint64_t, pages, pagealloc_part_pages_held(pages));
}

uint64_t pagealloc_longest(struct pagealloc *pages) {
    struct pagealloc_run run;
    uint64_t longest = 0;
    pagealloc_lock(pages);
    unsigned root = pages->levels - 1;
    uint16_t code = SCAN(pages->wide, largest, pages->codes[root], 0, pages->codes[root][0]);
    /* The root has the longest length, or its class. */
    if (code < EXACT)
        longest = code;
    else /* a class: compare the runs of all chunks that have this code */
        for (uint64_t chunk = 0; (chunk = chunk_from(pages, chunk, code)) != NONE; chunk++)
            if (run_in_chunk(pages, chunk, larger(longest, CHUNK + 1), &run))
                longest = run.stop - run.start;
    pagealloc_unlock(pages);
    return longest;
}

size_t pagealloc_runs(struct pagealloc *pages, bool free, uint64_t start, uint64_t stop,
                      struct pagealloc_run *out, size_t max) {
    size_t n = 0;
    pagealloc_lock(pages);
    for (; n < max; n++) {
        if (!(free ? free_from(pages, start, stop, &out[n])
                   : pagealloc_used_from_held(pages, start, stop, &out[n])))
            break;
        start = out[n].stop;
    }
    pagealloc_unlock(pages);
    return n;
}
