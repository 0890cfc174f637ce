#define _GNU_SOURCE

/* Replaced, so that a test can refuse memory for the list of parts. */
#define runs_grow make_room
#include "../../csrc/pagealloc.c"
#undef runs_grow

#include <inttypes.h>

#include "check.h"
#include "vm.h"
#include "witness.h"

#define LENGTH(array) (sizeof(array) / sizeof((array)[0]))

#define NO_FIT UINT64_MAX
#define HUGE_CAPACITY (UINT64_C(1) << 33)
#define LARGE_CAPACITY (UINT64_C(1) << 22)

static uint64_t seed = 0x2545F4914F6CDD1D;

static bool no_memory;

int runs_grow(struct runs *set);

int make_room(struct runs *set) {
    return no_memory ? ENOMEM : runs_grow(set);
}

/* Whether allocators opened from now on use the wide kernels. */
static bool wide_kernels;

enum state { HOLE = 0, FREE = 1, USED = 2 };

struct segment {
    uint64_t start, stop;
    enum state state;
};

/* An allocator and its model: a byte per page, or only segments if there are too many pages. */
struct machine {
    struct pagealloc *pages;
    uintptr_t memory;
    size_t bytes;
    uint64_t capacity;
    unsigned char *states;
    struct segment *segments, *spare;
    size_t count, segment_capacity, spare_capacity;
    uint64_t *edges; /* ends of the parts: a run in use may end there */
    size_t edge_count, edge_capacity;
    uint64_t steps;
    unsigned often; /* steps between comparisons of all runs */
};

static struct pagealloc_run *listed;
static size_t listed_capacity;

static bool coin(void) {
    return random_below(&seed, 2) == 0;
}

/* -- the model -------------------------------------------------------------------------------- */

static void model_push(struct machine *m, uint64_t start, uint64_t stop, enum state state) {
    if (start >= stop)
        return;
    if (m->count > 0 && m->segments[m->count - 1].state == state) {
        m->segments[m->count - 1].stop = stop;
        return;
    }
    if (m->count == m->segment_capacity) {
        m->segment_capacity = 2 * m->segment_capacity + 64;
        REQUIRE((m->segments = realloc(m->segments, m->segment_capacity * sizeof *m->segments)) != NULL);
    }
    m->segments[m->count++] = (struct segment){start, stop, state};
}

static uint64_t run_end(const unsigned char *states, uint64_t at, uint64_t stop) {
    unsigned char state = states[at];
    uint64_t eight = state * UINT64_C(0x0101010101010101), seen;
    for (; at + 8 <= stop; at += 8) {
        memcpy(&seen, states + at, 8);
        if (seen != eight)
            break;
    }
    while (at < stop && states[at] == state)
        at++;
    return at;
}

static void model_scan(struct machine *m) {
    m->count = 0;
    for (uint64_t at = 0, end; at < m->capacity; at = end) {
        end = run_end(m->states, at, m->capacity);
        model_push(m, at, end, (enum state)m->states[at]);
    }
}

static void model_splice(struct machine *m, uint64_t start, uint64_t stop, enum state state) {
    struct segment *old = m->segments;
    size_t count = m->count, old_capacity = m->segment_capacity;
    m->segments = m->spare;
    m->segment_capacity = m->spare_capacity;
    m->count = 0;
    size_t i = 0;
    for (; i < count && old[i].start < start; i++)
        model_push(m, old[i].start, old[i].stop < start ? old[i].stop : start, old[i].state);
    model_push(m, start, stop, state);
    for (i = i > 0 ? i - 1 : 0; i < count; i++)
        model_push(m, old[i].start > stop ? old[i].start : stop, old[i].stop, old[i].state);
    m->spare = old;
    m->spare_capacity = old_capacity;
}

static void model_set(struct machine *m, uint64_t page, uint64_t n, enum state state) {
    if (m->states == NULL) {
        model_splice(m, page, page + n, state);
        return;
    }
    memset(m->states + page, (int)state, n);
    model_scan(m);
}

static uint64_t model_total(const struct machine *m, enum state state) {
    uint64_t n = 0;
    for (size_t i = 0; i < m->count; i++)
        if (m->segments[i].state == state)
            n += m->segments[i].stop - m->segments[i].start;
    return n;
}

static uint64_t model_longest(const struct machine *m) {
    uint64_t most = 0;
    for (size_t i = 0; i < m->count; i++) {
        uint64_t n = m->segments[i].stop - m->segments[i].start;
        if (m->segments[i].state == FREE && n > most)
            most = n;
    }
    return most;
}

/* The first page of the lowest fit, or NO_FIT; and the number of free runs that are long enough, aligned
 * or not. */
static uint64_t model_fit(const struct machine *m, uint64_t n, uint64_t align, uint64_t phase,
                          size_t *long_enough) {
    uint64_t lowest = NO_FIT;
    *long_enough = 0;
    for (size_t i = 0; i < m->count; i++) {
        const struct segment *run = &m->segments[i];
        if (run->state != FREE || run->stop - run->start < n)
            continue;
        uint64_t page = (run->start + phase + align - 1) / align * align - phase;
        ++*long_enough;
        if (lowest == NO_FIT && page <= run->stop && run->stop - page >= n)
            lowest = page;
    }
    return lowest;
}

static bool model_outside(const struct machine *m, uint64_t page, uint64_t n) {
    return n == 0 || page >= m->capacity || n > m->capacity - page;
}

/* The states that occur in [page, page + n), one bit each. */
static unsigned model_states(const struct machine *m, uint64_t page, uint64_t n) {
    unsigned bits = 0;
    for (size_t i = 0; i < m->count && m->segments[i].start < page + n; i++)
        if (m->segments[i].stop > page)
            bits |= 1U << m->segments[i].state;
    return bits;
}

#define ONLY(state) (1U << (state))
#define ANY(bits, state) (((bits) >> (state) & 1) != 0)

/* -- an allocator's life ---------------------------------------------------------------------- */

/* Exactly as many bytes as needed, so that a sanitizer detects an access beyond them. */
static struct machine machine_start(uint64_t capacity) {
    struct machine m = {.capacity = capacity, .often = 1};
    uint64_t bytes = pagealloc_bytes(capacity);
    if (capacity < LARGE_CAPACITY) {
        void *memory;
        REQUIRE(posix_memalign(&memory, 64, bytes) == 0);
        memset(memory, 0, bytes);
        m.memory = (uintptr_t)memory;
        REQUIRE((m.states = calloc(capacity, 1)) != NULL);
    } else {
        m.bytes = (bytes + vm_page_size() - 1) / vm_page_size() * vm_page_size();
        REQUIRE(vm_map(0, m.bytes, VM_COMMITTED | VM_NORESERVE, &m.memory) == 0);
        REQUIRE(vm_advise(m.memory, m.bytes, VM_HUGE_NEVER) == 0);
    }
    REQUIRE((m.pages = pagealloc_open((void *)m.memory, capacity)) != NULL);
    m.pages->wide = m.pages->wide && wide_kernels;
    model_push(&m, 0, capacity, HOLE);
    return m;
}

static void machine_end(struct machine *m) {
    pagealloc_close(m->pages);
    if (m->bytes == 0)
        free((void *)m->memory);
    else
        REQUIRE(vm_release(m->memory, m->bytes) == 0);
    free(m->states);
    free(m->segments);
    free(m->spare);
    free(m->edges);
}

/* -- comparing -------------------------------------------------------------------------------- */

static bool is_edge(const struct machine *m, uint64_t page) {
    for (size_t i = 0; i < m->edge_count; i++)
        if (m->edges[i] == page)
            return true;
    return false;
}

/* Whether `runs` are the first `n` runs of this state in [from, to), and all if n < max. */
static bool same_runs(const struct machine *m, enum state state, uint64_t from, uint64_t to,
                      const struct pagealloc_run *runs, size_t n, size_t max) {
    size_t at = 0;
    for (size_t i = 0; i < m->count && m->segments[i].start < to; i++) {
        uint64_t lo = m->segments[i].start, hi = m->segments[i].stop;
        if (m->segments[i].state != state || hi <= from)
            continue;
        lo = lo > from ? lo : from;
        hi = hi < to ? hi : to;
        while (lo < hi) {
            if (at == n)
                return n == max;
            if (runs[at].start != lo || runs[at].stop <= lo || runs[at].stop > hi)
                return false;
            if (runs[at].stop < hi && (state == FREE || !is_edge(m, runs[at].stop)))
                return false;
            lo = runs[at++].stop;
        }
    }
    return at == n;
}

static void compare_runs(struct machine *m, uint64_t from, uint64_t to, size_t max) {
    size_t needed = 2 * m->count + m->edge_count + 2;
    if (needed > listed_capacity) {
        REQUIRE((listed = realloc(listed, needed * sizeof *listed)) != NULL);
        listed_capacity = needed;
    }
    max = max < needed ? max : needed;
    for (enum state state = FREE; state <= USED; state++) {
        size_t n = pagealloc_runs(m->pages, state == FREE, from, to, listed, max);
        if (CHECK(n <= max))
            CHECK(same_runs(m, state, from, to, listed, n, max));
    }
}

/* Whether the tables describe exactly the free runs: an error in them might change a result only much
 * later. */
static void compare_tables(const struct machine *m) {
    const struct pagealloc *pages = m->pages;
    uint64_t chunks = (m->capacity + CHUNK - 1) / CHUNK, words = chunks * WORDS;
    uint16_t *codes = calloc(chunks, sizeof *codes);
    struct tag *tags = calloc(chunks, sizeof *tags);
    uint64_t *bits = calloc(words, sizeof *bits);
    REQUIRE(codes != NULL && tags != NULL && bits != NULL);
    for (size_t i = 0; i < m->count; i++) {
        uint64_t lo = m->segments[i].start, hi = m->segments[i].stop;
        uint64_t first = lo / CHUNK, last = (hi - 1) / CHUNK;
        if (m->segments[i].state != FREE)
            continue;
        if (code_of(hi - lo) > codes[first])
            codes[first] = code_of(hi - lo);
        (void)bitmap_set(bits, lo, hi);
        if (first != last) {
            tags[first].length = hi - lo;
            tags[last].start = lo + 1;
            (void)bitmap_clear(bits, (first + 1) * CHUNK, last * CHUNK);
        }
    }
    CHECK(memcmp(codes, pages->codes[0], chunks * sizeof *codes) == 0);
    CHECK(memcmp(tags, pages->tags, chunks * sizeof *tags) == 0);
    CHECK(memcmp(bits, pages->bits, words * sizeof *bits) == 0);
    for (unsigned level = 1; level < pages->levels; level++)
        for (uint64_t i = 0; i < pages->count[level]; i++) {
            uint64_t below = pages->count[level - 1] - i * FAN;
            uint16_t largest = 0;
            for (uint64_t k = 0; k < FAN && k < below; k++)
                if (pages->codes[level - 1][i * FAN + k] > largest)
                    largest = pages->codes[level - 1][i * FAN + k];
            CHECK(pages->codes[level][i] == largest);
        }
    free(codes);
    free(tags);
    free(bits);
}

static void compare_neighbours(struct machine *m, uint64_t from, uint64_t to) {
    struct pagealloc_run got = {7, 7}, want = {7, 7};
    bool exists = false;
    for (size_t i = 0; i < m->count && m->segments[i].start < to; i++)
        if (m->segments[i].state == FREE) {
            exists = true;
            want.start = m->segments[i].start;
            want.stop = m->segments[i].stop < to ? m->segments[i].stop : to;
        }
    uint64_t beyond = to == m->capacity ? random_below(&seed, 3) * 1000 : 0;
    pagealloc_lock(m->pages);
    CHECK(pagealloc_run_below_held(m->pages, to + beyond, &got) == exists);
    pagealloc_unlock(m->pages);
    CHECK(!exists || (got.start == want.start && got.stop == want.stop));

    pagealloc_lock(m->pages);
    size_t n = pagealloc_used_from_held(m->pages, from, to + beyond, &got);
    pagealloc_unlock(m->pages);
    CHECK(same_runs(m, USED, from, to, &got, n, 1));
    CHECK(pagealloc_runs(m->pages, false, from, to, &want, 1) == n);
    CHECK(n == 0 || (got.start == want.start && got.stop == want.stop));
}

static void compare_all(struct machine *m) {
    if (m->states != NULL)
        compare_tables(m);
    compare_runs(m, 0, m->capacity, SIZE_MAX);
    for (int i = 0; i < 3; i++) {
        uint64_t from = random_below(&seed, m->capacity + 1);
        uint64_t to = from + random_below(&seed, m->capacity + 1 - from);
        if (i == 1 && to > from + 700)
            to = from + random_below(&seed, 700);
        compare_runs(m, from, to, i == 2 ? 1 + random_below(&seed, 4) : SIZE_MAX);
        compare_neighbours(m, from, coin() ? to : m->capacity);
    }
}

/* After every operation: a refusal has changed nothing. */
static void settle(struct machine *m, bool refused) {
    uint64_t free_pages = model_total(m, FREE), part_pages = free_pages + model_total(m, USED);
    CHECK(pagealloc_free_pages(m->pages) == free_pages);
    CHECK(pagealloc_part_pages(m->pages) == part_pages);
    CHECK(pagealloc_longest(m->pages) == model_longest(m));
    pagealloc_lock(m->pages);
    CHECK(pagealloc_free_pages_held(m->pages) == free_pages);
    CHECK(pagealloc_part_pages_held(m->pages) == part_pages);
    pagealloc_unlock(m->pages);
    if (++m->steps % m->often == 0)
        compare_all(m);
    else if (refused)
        compare_runs(m, 0, m->capacity, SIZE_MAX);
}

/* -- operations that check themselves ---------------------------------------------------------- */

/* Calls the locking function, or the _held one under the lock. */
#define CALL(function, m, ...)                                                                     \
    (coin() ? function((m)->pages, __VA_ARGS__)                                                    \
            : (pagealloc_lock((m)->pages),                                                         \
               unlocked((m), function##_held((m)->pages, __VA_ARGS__))))

static int64_t unlocked(struct machine *m, int64_t result) {
    pagealloc_unlock(m->pages);
    return result;
}

static void note_edge(struct machine *m, uint64_t page) {
    if (m->edge_count == m->edge_capacity) {
        m->edge_capacity = 2 * m->edge_capacity + 64;
        REQUIRE((m->edges = realloc(m->edges, m->edge_capacity * sizeof *m->edges)) != NULL);
    }
    m->edges[m->edge_count++] = page;
}

static int64_t try_add(struct machine *m, uint64_t page, uint64_t n) {
    int64_t got = CALL(pagealloc_add, m, page, n);
    if (model_outside(m, page, n)) {
        CHECK(got == PAGEALLOC_OUTSIDE);
    } else if (model_states(m, page, n) != ONLY(HOLE)) {
        CHECK(got == PAGEALLOC_IN_USE);
    } else if (CHECK(got == 0)) {
        model_set(m, page, n, FREE);
        note_edge(m, page);
        note_edge(m, page + n);
    }
    settle(m, got != 0);
    return got;
}

static bool is_free_refusal(const struct machine *m, uint64_t page, uint64_t n, int64_t got) {
    if (model_outside(m, page, n))
        return got == PAGEALLOC_OUTSIDE;
    unsigned states = model_states(m, page, n);
    return (got == PAGEALLOC_NOT_IN_USE && ANY(states, FREE)) ||
           (got == PAGEALLOC_FOREIGN && ANY(states, HOLE));
}

static bool model_may_free(const struct machine *m, uint64_t page, uint64_t n) {
    return !model_outside(m, page, n) && model_states(m, page, n) == ONLY(USED);
}

static int64_t try_free(struct machine *m, uint64_t page, uint64_t n) {
    pagealloc_lock(m->pages);
    CHECK(pagealloc_in_use_held(m->pages, page, n) == model_may_free(m, page, n));
    pagealloc_unlock(m->pages);
    int64_t got = CALL(pagealloc_free, m, page, n);
    if (!model_may_free(m, page, n))
        CHECK(is_free_refusal(m, page, n, got));
    else if (CHECK(got == 0))
        model_set(m, page, n, FREE);
    settle(m, got != 0);
    return got;
}

static int64_t try_alloc_at(struct machine *m, uint64_t page, uint64_t n) {
    int64_t got = CALL(pagealloc_alloc_at, m, page, n);
    unsigned states = model_outside(m, page, n) ? 0 : model_states(m, page, n);
    if (states == 0)
        CHECK(got == PAGEALLOC_OUTSIDE);
    else if (states != ONLY(FREE))
        CHECK((got == PAGEALLOC_IN_USE && ANY(states, USED)) ||
              (got == PAGEALLOC_FOREIGN && ANY(states, HOLE)));
    else if (CHECK(got == 0))
        model_set(m, page, n, USED);
    settle(m, got != 0);
    return got;
}

/* A power of two above the phase. */
static bool is_alignment(uint64_t align, uint64_t phase) {
    return align != 0 && (align & (align - 1)) == 0 && phase < align;
}

static int64_t try_alloc_aligned(struct machine *m, uint64_t n, uint64_t align, uint64_t phase) {
    int64_t got = CALL(pagealloc_alloc, m, n, align, phase);
    size_t long_enough;
    if (n == 0 || !is_alignment(align, phase)) {
        CHECK((got == PAGEALLOC_OUTSIDE && n == 0) || (got == PAGEALLOC_FULL && n > m->capacity) ||
              (got == PAGEALLOC_ALIGNMENT && !is_alignment(align, phase)));
    } else {
        uint64_t lowest = model_fit(m, n, align, phase, &long_enough);
        if (lowest == NO_FIT)
            CHECK(got == PAGEALLOC_FULL || (got == PAGEALLOC_OUTSIDE && n > m->capacity));
        else if (CHECK(got >= 0)) {
            uint64_t page = (uint64_t)got;
            CHECK(page == lowest || (align > 1 && long_enough >= 64));
            CHECK((page + phase) % align == 0);
            if (CHECK(!model_outside(m, page, n) && model_states(m, page, n) == ONLY(FREE)))
                model_set(m, page, n, USED);
        }
    }
    settle(m, got < 0);
    return got;
}

static int64_t try_alloc(struct machine *m, uint64_t n) {
    return try_alloc_aligned(m, n, 1, 0);
}

/* -- many at once ------------------------------------------------------------------------------ */

#define MANY 40

static const int widths[] = {1, 2, 4, 8, -1, -2, -4, -8};

static size_t wide_bytes(int width) {
    return (size_t)(width < 0 ? -width : width);
}

static uint64_t widest(int width) {
    unsigned bits = 8 * (unsigned)wide_bytes(width) - (width < 0);
    return bits == 64 ? UINT64_MAX : (UINT64_C(1) << bits) - 1;
}

/* The number that the lowest bytes of `value` make. */
static uint64_t cut_to_width(int width, uint64_t value) {
    uint64_t bits = width < 0 ? 2 * widest(width) + 1 : widest(width);
    bool negative = width < 0 && (value & (widest(width) + 1)) != 0;
    return negative ? value | ~bits : value & bits;
}

static void put(const struct pagealloc_integers *to, size_t i, uint64_t value) {
    size_t bytes = wide_bytes(to->width);
    for (size_t k = 0; k < bytes; k++)
        ((unsigned char *)to->items)[i * bytes + k] = (unsigned char)(value >> 8 * k);
}

static uint64_t get(const struct pagealloc_integers *from, size_t i) {
    size_t bytes = wide_bytes(from->width);
    uint64_t value = 0;
    if (bytes == 0)
        return from->constant;
    for (size_t k = 0; k < bytes; k++)
        value |= (uint64_t)((unsigned char *)from->items)[i * bytes + k] << 8 * k;
    return cut_to_width(from->width, value);
}

/* An array whose end a sanitizer checks; the caller frees `items`. */
static struct pagealloc_integers integers(int width, size_t count) {
    struct pagealloc_integers array = {.width = width};
    if (width != 0 && count > 0)
        REQUIRE((array.items = calloc(count, wide_bytes(width))) != NULL);
    return array;
}

/* Whether this is the value of a negative integer. */
static bool is_negative(int width, uint64_t n) {
    return width < 0 && n > (uint64_t)INT64_MAX;
}

static int64_t try_alloc_many(struct machine *m, const struct pagealloc_integers *lengths,
                              const struct pagealloc_integers *first, size_t count) {
    uint64_t want[MANY];
    size_t done = 0, long_enough, failed = 12345;
    int64_t refusal = 0;
    for (; done < count; done++) {
        uint64_t n = get(lengths, done);
        if (n == 0 || is_negative(lengths->width, n)) {
            refusal = PAGEALLOC_OUTSIDE;
            break;
        }
        want[done] = model_fit(m, n, 1, 0, &long_enough);
        if (want[done] == NO_FIT || want[done] > widest(first->width)) {
            refusal = want[done] == NO_FIT ? PAGEALLOC_FULL : PAGEALLOC_NARROW;
            break;
        }
        model_set(m, want[done], n, USED);
    }
    int64_t got = pagealloc_alloc_many(m->pages, lengths, first, count, &failed);
    CHECK(got == refusal || (got == PAGEALLOC_OUTSIDE && get(lengths, done) > m->capacity));
    CHECK(failed == (refusal == 0 ? 12345 : done));
    for (size_t i = 0; i < done; i++)
        if (refusal == 0)
            CHECK(get(first, i) == want[i]);
        else
            model_set(m, want[i], get(lengths, i), FREE);
    settle(m, got != 0);
    return got;
}

static int64_t try_free_many(struct machine *m, const struct pagealloc_integers *lengths,
                             const struct pagealloc_integers *first, size_t count) {
    size_t done = 0, failed = 12345;
    for (; done < count; done++) {
        uint64_t n = get(lengths, done), page = get(first, done);
        if (!model_may_free(m, page, n))
            break;
        model_set(m, page, n, FREE);
    }
    int64_t got = pagealloc_free_many(m->pages, lengths, first, count, &failed);
    if (done == count) {
        CHECK(got == 0 && failed == 12345);
    } else {
        CHECK(failed == done);
        CHECK(is_free_refusal(m, get(first, done), get(lengths, done), got));
        for (size_t i = 0; i < done; i++)
            model_set(m, get(first, i), get(lengths, i), USED);
    }
    settle(m, got != 0);
    return got;
}

/* -- a random machine -------------------------------------------------------------------------- */

/* Lengths next to where a word, a chunk, two chunks, and the exact codes end. */
static const uint64_t edgy[] = {
    62,    63,    64,    65,    66,    127,   128,   129,   511,   512,   513,   1023, 1024, 1025,
    1535,  1536,  1537,  32766, 32767, 32768, 32769, 32800, 40000, 40001, 65535, 65536, 65537};

static uint64_t log_uniform(uint64_t most) {
    unsigned octaves = 64 - (unsigned)__builtin_clzll(most);
    uint64_t n = UINT64_C(1) << random_below(&seed, octaves);
    n += random_below(&seed, n);
    return n < most ? n : most;
}

static uint64_t some_length(uint64_t capacity) {
    switch (random_below(&seed, 4)) {
    case 0:
        return 1 + random_below(&seed, 20);
    case 1:
        return edgy[random_below(&seed, capacity < 40000 ? 15 : LENGTH(edgy))];
    case 2:
        return log_uniform(capacity < 3000 ? capacity : capacity / 16);
    default:
        return log_uniform(capacity);
    }
}

/* A piece of a segment in this state: all of it, one end, or the middle. */
static bool some_piece(const struct machine *m, enum state state, struct pagealloc_run *piece) {
    size_t n = 0, at = 0;
    for (size_t i = 0; i < m->count; i++)
        n += m->segments[i].state == state;
    if (n == 0)
        return false;
    n = random_below(&seed, n);
    while (m->segments[at].state != state || n-- > 0)
        at++;
    uint64_t lo = m->segments[at].start, length = m->segments[at].stop - lo;
    uint64_t n_pages = some_length(m->capacity);
    n_pages = n_pages < length ? n_pages : length;
    switch (random_below(&seed, 8)) {
    case 0:
        n_pages = length;
        break;
    case 1:
        break;
    case 2:
        lo += length - n_pages;
        break;
    case 3: { /* up to a chunk's end */
        uint64_t stop = (lo + random_below(&seed, length)) / CHUNK * CHUNK;
        if (stop > lo)
            n_pages = n_pages < stop - lo ? n_pages : stop - lo, lo = stop - n_pages;
        break;
    }
    case 4: { /* from a chunk's start */
        uint64_t from = (lo + random_below(&seed, length)) / CHUNK * CHUNK;
        if (from > lo)
            n_pages = n_pages < length - (from - lo) ? n_pages : length - (from - lo), lo = from;
        break;
    }
    default:
        lo += random_below(&seed, length - n_pages + 1);
    }
    *piece = (struct pagealloc_run){lo, lo + n_pages};
    return true;
}

static struct pagealloc_run some_range(const struct machine *m) {
    uint64_t lo = random_below(&seed, m->capacity + 2), n = some_length(m->capacity);
    if (random_below(&seed, 20) == 0)
        n = random_below(&seed, 3) == 0 ? 0 : UINT64_MAX - random_below(&seed, 2 * lo + 2);
    if (random_below(&seed, 40) == 0)
        lo = UINT64_MAX - random_below(&seed, 3);
    return (struct pagealloc_run){lo, lo + n};
}

static void some_many(struct machine *m) {
    size_t count = random_below(&seed, m->capacity < 5000 ? MANY : 8);
    int width = widths[random_below(&seed, LENGTH(widths))];
    struct pagealloc_integers lengths = integers(coin() ? 0 : width, count);
    struct pagealloc_integers first =
        integers(random_below(&seed, 3) == 0 ? widths[random_below(&seed, LENGTH(widths))] : -8,
                 count);
    uint64_t most = 1 + m->capacity / (8 * (count + 1));
    lengths.constant = log_uniform(most);
    bool bad = random_below(&seed, 4) == 0;
    for (size_t i = 0; i < count && lengths.width != 0; i++) {
        uint64_t n = log_uniform(most);
        put(&lengths, i, n < widest(width) ? n : 1);
    }
    if (bad && count > 0 && lengths.width != 0)
        put(&lengths, random_below(&seed, count), coin() ? 0 : UINT64_MAX);
    if (try_alloc_many(m, &lengths, &first, count) == 0 && coin()) {
        if (count > 0 && random_below(&seed, 3) == 0) /* a run twice, or another one */
            put(&first, random_below(&seed, count),
                coin() ? get(&first, 0) : random_below(&seed, m->capacity));
        (void)try_free_many(m, &lengths, &first, count);
    }
    free(lengths.items);
    free(first.items);
}

static void some_operation(struct machine *m, unsigned taking) {
    struct pagealloc_run at;
    if (random_below(&seed, 100) < 5) { /* any range, in any state */
        at = some_range(m);
        switch (random_below(&seed, 3)) {
        case 0:
            (void)try_free(m, at.start, at.stop - at.start);
            break;
        case 1:
            (void)try_alloc_at(m, at.start, at.stop - at.start);
            break;
        default:
            (void)try_add(m, at.start, at.stop - at.start);
        }
    } else if (random_below(&seed, 100) < 2) {
        if (some_piece(m, HOLE, &at))
            (void)try_add(m, at.start, at.stop - at.start);
    } else if (random_below(&seed, 100) < 6) {
        some_many(m);
    } else if (random_below(&seed, 100) < 8) {
        if (some_piece(m, FREE, &at))
            (void)try_alloc_at(m, at.start, at.stop - at.start);
    } else if (random_below(&seed, 100) < taking) {
        uint64_t n = some_length(m->capacity);
        if (random_below(&seed, 200) == 0)
            n = coin() ? 0 : m->capacity + 1 + random_below(&seed, 5);
        if (random_below(&seed, 4) != 0) {
            (void)try_alloc(m, n);
        } else {
            uint64_t align = UINT64_C(1) << random_below(&seed, 11);
            uint64_t phase = coin() ? 0 : random_below(&seed, align);
            if (random_below(&seed, 50) == 0)
                align = random_below(&seed, 9), phase = random_below(&seed, 9);
            (void)try_alloc_aligned(m, n, align, phase);
        }
    } else if (some_piece(m, USED, &at)) {
        (void)try_free(m, at.start, at.stop - at.start);
    }
}

/* Allocates all pages, then frees runs of up to `most` pages with gaps of the same lengths. */
static void scatter(struct machine *m, uint64_t most, unsigned runs) {
    (void)try_alloc(m, m->capacity);
    for (uint64_t at = random_below(&seed, most), n; runs-- > 0; at += n + 1 + log_uniform(most)) {
        n = log_uniform(most);
        if (model_outside(m, at, n))
            break;
        CHECK(pagealloc_free(m->pages, at, n) == 0);
        if (m->states != NULL)
            memset(m->states + at, FREE, n);
        else
            model_set(m, at, n, FREE);
    }
    if (m->states != NULL)
        model_scan(m);
    settle(m, true);
}

static void run_machine(uint64_t capacity, unsigned steps, unsigned often) {
    uint64_t first_seed = seed;
    unsigned long failures = check_failures;
    struct machine m = machine_start(capacity);
    m.often = often;
    if (coin()) {
        (void)try_add(&m, 0, capacity);
        if (capacity >= LARGE_CAPACITY && coin())
            scatter(&m, 100000, 300);
        else if (capacity > 100 && coin())
            scatter(&m, coin() ? 20 : 700, 10000);
    } else {
        uint64_t lo = random_below(&seed, capacity);
        (void)try_add(&m, lo, 1 + random_below(&seed, capacity - lo));
    }
    /* Between nearly all free and nearly all in use, and back. */
    for (unsigned i = 0; i < steps && check_failures == failures; i++) {
        some_operation(&m, i / (1 + steps / 6) % 2 == 0 ? 70 : 30);
        if (check_failures != failures && failures < CHECK_PRINTED)
            printf("capacity %" PRIu64 ", %s kernels, seed %" PRIx64 ", step %u\n", capacity,
                   m.pages->wide ? "wide" : "portable", first_seed, i);
    }
    compare_all(&m);
    machine_end(&m);
}

static void small_machines_agree_with_a_byte_a_page(void) {
    static const uint64_t capacities[] = {1, 2, 63, 64, 65, 511, 512, 513, 1024, 1025, 4000};
    for (size_t i = 0; i < LENGTH(capacities); i++)
        for (int round = 0; round < 16; round++)
            run_machine(capacities[i], 1500, 4);
}

static void machines_of_two_levels_agree_with_a_byte_a_page(void) {
    static const uint64_t capacities[] = {16384, 16385, 40000};
    for (size_t i = 0; i < LENGTH(capacities); i++)
        for (int round = 0; round < 10; round++)
            run_machine(capacities[i], 1500, 40);
}

static void a_machine_of_three_levels_agrees_with_a_byte_a_page(void) {
    for (int round = 0; round < 4; round++)
        run_machine(600000, 300, 60);
}

static void machines_of_many_levels_agree_with_segments(void) {
    static const uint64_t capacities[] = {LARGE_CAPACITY, LARGE_CAPACITY * 32 + 1,
                                          HUGE_CAPACITY - 777, HUGE_CAPACITY};
    for (size_t i = 0; i < LENGTH(capacities); i++)
        for (int round = 0; round < 4; round++)
            run_machine(capacities[i], 1500, 20);
}

/* -- single facts ------------------------------------------------------------------------------ */

static void zero_bytes_are_an_arena_with_no_parts(void) {
    struct machine m = machine_start(5000);
    CHECK(pagealloc_free_pages(m.pages) == 0 && pagealloc_part_pages(m.pages) == 0);
    CHECK(pagealloc_longest(m.pages) == 0);
    CHECK(try_alloc(&m, 1) == PAGEALLOC_FULL);
    CHECK(try_free(&m, 0, 1) == PAGEALLOC_FOREIGN);
    CHECK(try_alloc_at(&m, 4999, 1) == PAGEALLOC_FOREIGN);
    compare_all(&m);
    machine_end(&m);
}

static void sizes_of_tables_are_consistent(void) {
    uint64_t before = 0, most = pagealloc_max_pages();
    CHECK(most >= HUGE_CAPACITY);
    CHECK(pagealloc_tree_capacity(most) == most);
    for (uint64_t capacity = 1; capacity <= most; capacity += 1 + capacity / 3) {
        uint64_t bytes = pagealloc_bytes(capacity), rounded = pagealloc_tree_capacity(capacity);
        CHECK(bytes >= capacity / 8 && bytes >= before);
        CHECK(rounded >= capacity && rounded <= most);
        CHECK(pagealloc_tree_capacity(rounded) == rounded);
        CHECK(rounded == most || pagealloc_tree_capacity(rounded + 1) > rounded);
        before = bytes;
    }
}

static void a_part_that_cannot_be_listed_is_not_added(void) {
    struct machine m = machine_start(5000);
    (void)try_add(&m, 100, 50);
    no_memory = true;
    CHECK(pagealloc_add(m.pages, 150, 50) == PAGEALLOC_NO_MEMORY);
    no_memory = false;
    settle(&m, true);
    CHECK(try_add(&m, 150, 50) == 0);
    machine_end(&m);
}

static void the_lowest_run_that_is_long_enough_is_taken(void) {
    struct machine m = machine_start(5000);
    (void)try_add(&m, 10, 4000);
    CHECK(try_alloc(&m, 3) == 10);
    CHECK(try_alloc(&m, 600) == 13);
    CHECK(try_alloc(&m, 1) == 613);
    CHECK(try_free(&m, 10, 3) == 0);
    CHECK(try_alloc(&m, 4) == 614);
    CHECK(try_alloc(&m, 2) == 10);
    CHECK(try_alloc(&m, 1) == 12);
    CHECK(try_alloc(&m, 3392) == 618);
    CHECK(try_alloc(&m, 1) == PAGEALLOC_FULL);
    machine_end(&m);
}

static void a_run_goes_on_from_part_to_part(void) {
    struct machine m = machine_start(5000);
    (void)try_add(&m, 1000, 500);
    (void)try_add(&m, 1500, 700);
    (void)try_add(&m, 100, 900);
    CHECK(pagealloc_longest(m.pages) == 2100);
    CHECK(try_alloc(&m, 2100) == 100);
    CHECK(try_free(&m, 999, 502) == 0);
    CHECK(pagealloc_longest(m.pages) == 502);
    machine_end(&m);
}

static void every_length_at_every_place_near_chunk_edges_is_exact(void) {
    struct machine m = machine_start(2048);
    m.often = 16;
    (void)try_add(&m, 0, 2048);
    (void)try_alloc(&m, 2048);
    static const uint64_t from[] = {0, 1, 63, 64, 447, 448, 510, 511, 512, 513, 1023, 1024};
    for (size_t i = 0; i < LENGTH(from); i++)
        for (size_t k = 0; k < 17; k++) {
            if (from[i] + edgy[k] > 2048 || check_failures > 0)
                continue;
            CHECK(try_free(&m, from[i], edgy[k]) == 0);
            CHECK(try_alloc(&m, edgy[k] + 1) == PAGEALLOC_FULL);
            CHECK(try_alloc(&m, edgy[k]) == (int64_t)from[i]);
        }
    machine_end(&m);
}

static void a_run_of_three_chunks_can_be_cut_anywhere(void) {
    struct machine m = machine_start(2560);
    m.often = 64;
    (void)try_add(&m, 100, 2400);
    for (uint64_t at = 100; at < 2500 && check_failures == 0; at += at % 512 < 3 ? 1 : 7)
        for (uint64_t n = 1; n <= 1300; n = 3 * n + at % 3) {
            if (at + n > 2500)
                break;
            CHECK(try_alloc_at(&m, at, n) == 0);
            CHECK(try_free(&m, at, n) == 0);
        }
    machine_end(&m);
}

static void an_aligned_run_counts_the_phase(void) {
    struct machine m = machine_start(5000);
    (void)try_add(&m, 3, 4000);
    CHECK(try_alloc_aligned(&m, 5, 8, 0) == 8);
    CHECK(try_alloc_aligned(&m, 5, 8, 3) == 13);
    CHECK(try_alloc_aligned(&m, 5, 1024, 1) == 1023);
    CHECK(try_alloc_aligned(&m, 5, 1024, 1023) == 2049);
    CHECK(try_alloc_aligned(&m, 1, 3, 0) == PAGEALLOC_ALIGNMENT);
    CHECK(try_alloc_aligned(&m, 1, 0, 0) == PAGEALLOC_ALIGNMENT);
    CHECK(try_alloc_aligned(&m, 1, 4, 4) == PAGEALLOC_ALIGNMENT);
    CHECK(try_alloc_aligned(&m, 1, UINT64_C(1) << 63, 0) == PAGEALLOC_FULL);
    CHECK(try_alloc_aligned(&m, 1, UINT64_C(1) << 63, (UINT64_C(1) << 63) - 700) == 700);
    machine_end(&m);
}

static void the_only_aligned_run_is_found_behind_many_misplaced_ones(void) {
    struct machine m = machine_start(40000);
    m.often = 500;
    (void)try_add(&m, 0, 40000);
    (void)try_alloc(&m, 40000);
    for (uint64_t at = 1; at + 8 < 32000; at += 16)
        (void)try_free(&m, at, 8);
    CHECK(try_alloc_aligned(&m, 8, 8, 0) == PAGEALLOC_FULL);
    CHECK(try_alloc_aligned(&m, 8, 1024, 0) == PAGEALLOC_FULL);
    CHECK(try_free(&m, 35000, 8) == 0);
    CHECK(try_alloc_aligned(&m, 8, 8, 0) == 35000);
    CHECK(try_alloc_aligned(&m, 8, 8, 0) == PAGEALLOC_FULL);
    CHECK(try_alloc_aligned(&m, 8, 8, 7) == 1);
    CHECK(try_free(&m, 36000, 100) == 0);
    CHECK(try_alloc_aligned(&m, 8, 8, 0) == 36000);
    machine_end(&m);
}

/* Only the runs themselves tell lengths in one class apart. */
static void check_lengths_of_one_class(uint64_t base, unsigned order) {
    enum { N = 64 };
    struct machine m = machine_start(HUGE_CAPACITY);
    uint64_t at = 1, lengths[N];
    m.often = 16;
    (void)try_add(&m, 0, HUGE_CAPACITY);
    (void)try_alloc(&m, HUGE_CAPACITY);
    for (unsigned i = 0; i < N; i++)
        lengths[i] = base + (order == 0 ? i : order == 1 ? N - 1 - i : i * 37 % N);
    for (unsigned i = 0; i < N; i++) {
        CHECK(try_free(&m, at, lengths[i]) == 0);
        at += lengths[i] + 1 + i % 3 * 511;
    }
    CHECK(try_alloc(&m, base + N) == PAGEALLOC_FULL);
    int64_t low = try_alloc(&m, base + 10);
    CHECK(low >= 0);
    CHECK(try_free(&m, (uint64_t)low, base + 10) == 0);
    for (unsigned i = 0; i < N / 2; i++)
        (void)try_alloc(&m, base + random_below(&seed, N));
    for (unsigned i = 0; i < N && model_longest(&m) >= base; i++)
        CHECK(try_alloc(&m, model_longest(&m)) >= 0);
    CHECK(try_alloc(&m, base) == PAGEALLOC_FULL);
    machine_end(&m);
}

static void a_class_of_lengths_is_searched_for_the_lowest_fit(void) {
    static const uint64_t bases[] = {32700, 32768 - 32, 32768, 40000, 65536 - 32, 1000003,
                                     UINT64_C(1) << 26};
    for (size_t i = 0; i < LENGTH(bases); i++)
        for (unsigned order = 0; order < 3; order++)
            check_lengths_of_one_class(bases[i], order);
}

static void a_request_skips_the_short_runs_of_its_class(void) {
    struct machine m = machine_start(HUGE_CAPACITY);
    (void)try_add(&m, 0, HUGE_CAPACITY);
    (void)try_alloc(&m, HUGE_CAPACITY);
    for (uint64_t i = 0; i < 20; i++)
        (void)try_free(&m, i * 50000, 40000 + i);
    CHECK(try_alloc(&m, 40010) == 10 * 50000);
    CHECK(try_alloc(&m, 40010) == 11 * 50000);
    CHECK(try_alloc(&m, 40000) == 0);
    CHECK(try_alloc(&m, 40020) == PAGEALLOC_FULL);
    machine_end(&m);
}

static size_t resident(const struct machine *m) {
    const char *rss = witness_detail(m->memory, "Rss:");
    REQUIRE(rss != NULL);
    return (size_t)strtoull(rss, NULL, 10) * 1024;
}

static void a_run_of_2_to_the_33_pages_costs_next_to_no_memory(void) {
    struct machine m = machine_start(HUGE_CAPACITY);
    CHECK(try_add(&m, 0, HUGE_CAPACITY) == 0);
    CHECK(pagealloc_longest(m.pages) == HUGE_CAPACITY);
    CHECK(try_alloc(&m, HUGE_CAPACITY) == 0);
    CHECK(try_alloc(&m, 1) == PAGEALLOC_FULL);
    CHECK(try_free(&m, HUGE_CAPACITY - 3, 3) == 0);
    CHECK(try_alloc(&m, 1) == (int64_t)HUGE_CAPACITY - 3);
    CHECK(try_alloc(&m, 2) == (int64_t)HUGE_CAPACITY - 2);
    CHECK(try_alloc(&m, 1) == PAGEALLOC_FULL);
    CHECK(try_free(&m, 0, HUGE_CAPACITY) == 0);
    CHECK(try_alloc_at(&m, 0, HUGE_CAPACITY - 1) == 0);
    CHECK(try_alloc_aligned(&m, 1, 2, 0) == PAGEALLOC_FULL);
    CHECK(try_alloc_aligned(&m, 1, 2, 1) == (int64_t)HUGE_CAPACITY - 1);
    CHECK(try_free(&m, 1, HUGE_CAPACITY - 1) == 0);
    CHECK(resident(&m) <= 64 * 1024);
    machine_end(&m);
}

static void the_lock_is_one(void) {
    struct machine m = machine_start(100);
    pagealloc_lock(m.pages);
    CHECK(pagealloc_trylock_fork(m.pages) == EBUSY);
    pagealloc_unlock(m.pages);
    CHECK(pagealloc_trylock_fork(m.pages) == 0);
    pagealloc_unlock_fork(m.pages);
    machine_end(&m);
}

static void *try_from_another_thread(void *pages) {
    int err = pagealloc_trylock_fork(pages);
    if (err == 0)
        pagealloc_unlock_fork(pages);
    return (void *)(intptr_t)err;
}

static int tried_elsewhere(struct pagealloc *pages) {
    pthread_t thread;
    void *err;
    REQUIRE(pthread_create(&thread, NULL, try_from_another_thread, pages) == 0);
    REQUIRE(pthread_join(thread, &err) == 0);
    return (int)(intptr_t)err;
}

static void the_thread_that_forks_may_call(void) {
    struct machine m = machine_start(100);
    CHECK(pagealloc_trylock_fork(m.pages) == 0);
    CHECK(pagealloc_trylock_fork(m.pages) == EDEADLK);
    CHECK(pagealloc_alloc(m.pages, 1, 1, 0) == PAGEALLOC_FULL);
    CHECK(pagealloc_add(m.pages, 0, 100) == 0 && pagealloc_alloc(m.pages, 7, 1, 0) == 0);
    CHECK(pagealloc_free(m.pages, 0, 7) == 0 && pagealloc_free_pages(m.pages) == 100);
    pagealloc_lock(m.pages);
    pagealloc_unlock(m.pages);
    CHECK(tried_elsewhere(m.pages) == EBUSY);
    pagealloc_unlock_fork(m.pages);
    CHECK(tried_elsewhere(m.pages) == 0);
    pagealloc_lock(m.pages);
    CHECK(pagealloc_trylock_fork(m.pages) == EBUSY);
    pagealloc_unlock(m.pages);
    machine_end(&m);
}

static void many_runs_are_read_and_written_in_every_width(void) {
    for (size_t i = 0; i < LENGTH(widths); i++)
        for (size_t k = 0; k <= LENGTH(widths); k++) {
            struct machine m = machine_start(4000);
            (void)try_add(&m, 5, 3900);
            int width = k < LENGTH(widths) ? widths[k] : 0;
            struct pagealloc_integers lengths = integers(width, 9), first = integers(widths[i], 9);
            lengths.constant = 11;
            for (size_t at = 0; at < 9 && width != 0; at++)
                put(&lengths, at, 3 + at * at % 13);
            CHECK(try_alloc_many(&m, &lengths, &first, 9) == 0);
            CHECK(get(&first, 0) == 5);
            CHECK(pagealloc_integer(&first, 8) == get(&first, 8));
            CHECK(pagealloc_integer(&lengths, 8) == get(&lengths, 8));
            CHECK(try_free_many(&m, &lengths, &first, 9) == 0);
            CHECK(try_free_many(&m, &lengths, &first, 9) == PAGEALLOC_NOT_IN_USE);
            CHECK(try_alloc_many(&m, &lengths, &first, 0) == 0);
            CHECK(try_free_many(&m, &lengths, &first, 0) == 0);
            free(lengths.items);
            free(first.items);
            machine_end(&m);
        }
}

static void many_runs_are_allocated_all_or_none(void) {
    struct machine m = machine_start(4000);
    (void)try_add(&m, 0, 3000);
    (void)try_alloc(&m, 3000);
    (void)try_free(&m, 100, 10);
    (void)try_free(&m, 200, 1000);
    (void)try_free(&m, 1500, 40);
    struct pagealloc_integers lengths = integers(2, 6), first = integers(4, 6);
    static const uint64_t asked[] = {10, 40, 40, 900, 61, 1};
    for (size_t i = 0; i < 6; i++)
        put(&lengths, i, asked[i]);
    CHECK(try_alloc_many(&m, &lengths, &first, 6) == PAGEALLOC_FULL);
    CHECK(try_alloc_many(&m, &lengths, &first, 5) == PAGEALLOC_FULL);
    CHECK(try_alloc_many(&m, &lengths, &first, 4) == 0);
    for (size_t i = 0; i < 6; i++) {
        put(&lengths, 0, 1);
        put(&lengths, i, 0);
        CHECK(try_alloc_many(&m, &lengths, &first, 6) == PAGEALLOC_OUTSIDE);
        put(&lengths, i, 1);
    }
    free(lengths.items);
    free(first.items);
    machine_end(&m);
}

static void a_negative_number_is_refused(void) {
    for (size_t i = 4; i < LENGTH(widths); i++) {
        struct machine m = machine_start(1000);
        (void)try_add(&m, 0, 1000);
        struct pagealloc_integers lengths = integers(widths[i], 3);
        struct pagealloc_integers first = integers(widths[i], 3), other = integers(-8, 3);
        for (size_t k = 0; k < 3; k++)
            put(&lengths, k, 2);
        CHECK(try_alloc_many(&m, &lengths, &first, 3) == 0);
        static const uint64_t negative[] = {UINT64_MAX, UINT64_MAX - 1, UINT64_MAX - 127};
        for (size_t k = 0; k < LENGTH(negative) + 1; k++) {
            /* The last is the most negative number. */
            put(&lengths, 1, k < LENGTH(negative) ? negative[k] : widest(widths[i]) + 1);
            CHECK(pagealloc_integer(&lengths, 1) == get(&lengths, 1));
            CHECK(pagealloc_integer(&lengths, 1) > pagealloc_max_pages());
            CHECK(try_alloc_many(&m, &lengths, &other, 3) == PAGEALLOC_OUTSIDE);
            CHECK(try_free_many(&m, &lengths, &first, 3) == PAGEALLOC_OUTSIDE);
            put(&lengths, 1, 2);
            put(&first, 2, k < LENGTH(negative) ? negative[k] : widest(widths[i]) + 1);
            CHECK(try_free_many(&m, &lengths, &first, 3) == PAGEALLOC_OUTSIDE);
            put(&first, 2, 4);
        }
        CHECK(try_free_many(&m, &lengths, &first, 3) == 0);
        struct pagealloc_integers constant = {.constant = UINT64_MAX};
        CHECK(try_alloc_many(&m, &constant, &other, 3) < 0);
        free(lengths.items);
        free(first.items);
        free(other.items);
        machine_end(&m);
    }
}

static void a_page_too_high_for_its_integer_is_refused(void) {
    struct machine m = machine_start(HUGE_CAPACITY);
    (void)try_add(&m, 0, HUGE_CAPACITY);
    (void)try_alloc(&m, HUGE_CAPACITY);
    for (size_t i = 0; i < LENGTH(widths); i++) {
        uint64_t most = widest(widths[i]);
        if (most >= HUGE_CAPACITY)
            continue;
        struct pagealloc_integers lengths = {.constant = 2}, first = integers(widths[i], 3);
        (void)try_free(&m, most - 3, 9);
        CHECK(try_alloc_many(&m, &lengths, &first, 3) == PAGEALLOC_NARROW);
        CHECK(try_alloc_many(&m, &lengths, &first, 2) == 0);
        CHECK(try_alloc_many(&m, &lengths, &first, 1) == PAGEALLOC_NARROW);
        CHECK(try_free_many(&m, &lengths, &first, 2) == 0);
        (void)try_alloc_at(&m, most - 3, 9);
        (void)try_free(&m, most, 2);
        CHECK(try_alloc_many(&m, &lengths, &first, 1) == 0);
        CHECK(get(&first, 0) == most);
        free(first.items);
    }
    machine_end(&m);
}

static void a_veto_keeps_pages_in_use(void) {
    struct machine m = machine_start(2000);
    bool veto = true;
    (void)try_add(&m, 0, 2000);
    CHECK(!pagealloc_in_use(m.pages, 5, 1));
    CHECK(pagealloc_alloc(m.pages, 1000, 1, 0) == 0);
    CHECK(pagealloc_in_use(m.pages, 5, 995) && !pagealloc_in_use(m.pages, 5, 996));
    CHECK(!pagealloc_in_use(m.pages, 5, 0) && !pagealloc_in_use(m.pages, 5, UINT64_MAX));
    CHECK(pagealloc_free_unless(m.pages, 5, 10, &veto) == PAGEALLOC_VETOED);
    CHECK(pagealloc_in_use(m.pages, 0, 1000));
    veto = false;
    CHECK(pagealloc_free_unless(m.pages, 5, 10, &veto) == 0);
    CHECK(pagealloc_free_unless(m.pages, 5, 1, &veto) == PAGEALLOC_NOT_IN_USE);
    CHECK(pagealloc_free_unless(m.pages, 2000, 1, &veto) == PAGEALLOC_OUTSIDE);
    CHECK(pagealloc_in_use(m.pages, 0, 5) && !pagealloc_in_use(m.pages, 14, 1));
    CHECK(pagealloc_free_pages(m.pages) == 1010);
    CHECK(pagealloc_alloc_at(m.pages, 5, 10) == 0 && pagealloc_free(m.pages, 0, 1000) == 0);
    machine_end(&m);
}

static void freeing_many_is_undone_exactly(void) {
    struct machine m = machine_start(HUGE_CAPACITY);
    (void)try_add(&m, 0, HUGE_CAPACITY - 5);
    (void)try_alloc(&m, 3000000);
    struct pagealloc_integers lengths = integers(8, 5), first = integers(8, 5);
    static const struct pagealloc_run runs[] = {
        {5, 7}, {100000, 250000}, {2999999, 3000000}, {7, 100000}, {250000, 300000}};
    for (size_t i = 0; i < 5; i++) {
        put(&first, i, runs[i].start);
        put(&lengths, i, runs[i].stop - runs[i].start);
    }
    for (size_t i = 0; i < 5; i++) {
        put(&first, i, 2999995);
        put(&lengths, i, 6);
        CHECK(try_free_many(&m, &lengths, &first, 5) == PAGEALLOC_NOT_IN_USE);
        put(&first, i, HUGE_CAPACITY - 5);
        CHECK(try_free_many(&m, &lengths, &first, 5) == PAGEALLOC_OUTSIDE);
        put(&lengths, i, 5);
        CHECK(try_free_many(&m, &lengths, &first, 5) == PAGEALLOC_FOREIGN);
        put(&first, i, runs[i == 0 ? 4 : 0].start); /* one that is freed before or after */
        CHECK(try_free_many(&m, &lengths, &first, 5) != 0);
        put(&first, i, runs[i].start);
        put(&lengths, i, runs[i].stop - runs[i].start);
    }
    CHECK(try_free_many(&m, &lengths, &first, 5) == 0);
    free(lengths.items);
    free(first.items);
    machine_end(&m);
}

/* -- kernels ----------------------------------------------------------------------------------- */

static bool is_one(const uint64_t *words, unsigned i, uint64_t fill) {
    return ((i < CHUNK ? words[i / 64] : fill) >> (i % 64) & 1) != 0;
}

static unsigned longest_naively(const uint64_t *words) {
    unsigned most = 0, n = 0;
    for (unsigned i = 0; i < CHUNK; i++) {
        n = is_one(words, i, 0) ? n + 1 : 0;
        most = n > most ? n : most;
    }
    return most;
}

/* CHUNK if there is none. */
static unsigned find_naively(const uint64_t *words, unsigned n, uint64_t fill) {
    unsigned first = 0;
    for (unsigned i = 0; i < 2 * CHUNK && first < CHUNK; i++)
        if (!is_one(words, i, fill))
            first = i + 1;
        else if (i + 1 - first >= n)
            return first;
    return CHUNK;
}

static void check_words(const struct pagealloc *pages, const uint64_t *words) {
    CHECK(SCAN(pages->wide, longest, words) == longest_naively(words));

    _Alignas(LINE) uint64_t cleared[WORDS], want[WORDS];
    unsigned start = (unsigned)random_below(&seed, CHUNK);
    unsigned stop = start + 1 + (unsigned)random_below(&seed, CHUNK - start);
    start = coin() ? start : start / 64 * 64;
    stop = coin() ? stop : (stop + 63) / 64 * 64;
    memcpy(cleared, words, sizeof cleared);
    memcpy(want, words, sizeof want);
    for (unsigned i = start; i < stop; i++)
        want[i / 64] &= ~(UINT64_C(1) << (i % 64));
    unsigned rest = 0;
    while (stop + rest < CHUNK && is_one(want, stop + rest, 0))
        rest++;
    CHECK(SCAN(pages->wide, longest_without, cleared, start, stop, rest) == longest_naively(want));
    CHECK(memcmp(cleared, want, sizeof want) == 0);

    for (int i = 0; i < 6; i++) {
        unsigned n = i == 0 ? longest_naively(words) : 1 + (unsigned)random_below(&seed, CHUNK);
        n = i == 1 ? CHUNK : i == 2 ? 1 : i == 3 ? 1 + n % 70 : n;
        for (uint64_t fill = 0; n > 0 && fill + 2 > 1; fill--) {
            unsigned at = find_naively(words, n, fill);
            CHECK(at == CHUNK || SCAN(pages->wide, find, words, n, fill) == at);
        }
    }
}

static void kernels_agree_with_a_loop_over_bits(void) {
    struct pagealloc pages = {.wide = wide_kernels};
    _Alignas(LINE) uint64_t words[WORDS];
    for (int round = 0; round < 20000; round++) {
        uint64_t most = 1 + random_below(&seed, round % 2 == 0 ? 20 : 2 * CHUNK);
        bool bit = coin();
        memset(words, 0, sizeof words);
        for (unsigned i = 0; i < CHUNK; bit = !bit)
            for (uint64_t n = 1 + random_below(&seed, most); n > 0 && i < CHUNK; n--, i++)
                words[i / 64] |= (uint64_t)bit << (i % 64);
        if (round < 2)
            memset(words, -round, sizeof words);
        check_words(&pages, words);
    }
    /* One run at every position next to the edge of a word. */
    for (unsigned at = 0; at < CHUNK; at += at % 64 > 1 && at % 64 < 62 ? 12 : 1)
        for (unsigned n = 1; at + n <= CHUNK; n += n % 64 > 1 && n % 64 < 62 ? 20 : 1) {
            memset(words, 0, sizeof words);
            for (unsigned i = at; i < at + n; i++)
                words[i / 64] |= UINT64_C(1) << (i % 64);
            CHECK(SCAN(pages.wide, longest, words) == n);
            CHECK(SCAN(pages.wide, find, words, n, 0) == at);
            CHECK(SCAN(pages.wide, find, words, 1, 0) == at);
            if (at + n == CHUNK)
                CHECK(SCAN(pages.wide, find, words, CHUNK, ~UINT64_C(0)) == at);
        }
}

static void kernels_agree_with_a_loop_over_codes(void) {
    struct pagealloc pages = {.wide = wide_kernels};
    _Alignas(LINE) uint16_t line[FAN];
    for (int round = 0; round < 20000; round++) {
        unsigned shift = (unsigned)random_below(&seed, 17), at = (unsigned)random_below(&seed, FAN);
        for (unsigned i = 0; i < FAN; i++)
            line[i] = (uint16_t)((random_next(&seed) >> 20 & 0xffff) >> shift);
        uint16_t code = line[random_below(&seed, FAN)];
        if (coin())
            code = (uint16_t)((random_next(&seed) >> 20 & 0xffff) >> shift);
        uint16_t largest = code;
        uint32_t mask = 0;
        for (unsigned i = 0; i < FAN; i++) {
            mask |= (uint32_t)(line[i] >= code) << i;
            largest = i != at && line[i] > largest ? line[i] : largest;
        }
        CHECK(SCAN(pages.wide, at_least, line, code) == mask);
        CHECK(SCAN(pages.wide, largest, line, at, code) == largest);
    }
}

static void codes_keep_the_order_of_lengths(void) {
    for (uint64_t n = 0; n < 200000; n++) {
        CHECK(n >= EXACT || code_of(n) == n);
        CHECK(code_of(n + 1) >= code_of(n) && code_of(n + 1) - code_of(n) <= 1);
    }
    for (uint64_t n = EXACT; n <= pagealloc_max_pages() / 2; n *= 2) {
        CHECK(code_of(n) == code_of(n - 1) + 1);
        CHECK(code_of(n + n / 1024) == code_of(n) + 1);
        CHECK(code_of(n + n / 1024 - 1) == code_of(n));
    }
}

static void run_all(bool wide) {
    wide_kernels = wide;
    RUN(kernels_agree_with_a_loop_over_bits);
    RUN(kernels_agree_with_a_loop_over_codes);
    RUN(the_lowest_run_that_is_long_enough_is_taken);
    RUN(a_run_goes_on_from_part_to_part);
    RUN(every_length_at_every_place_near_chunk_edges_is_exact);
    RUN(a_run_of_three_chunks_can_be_cut_anywhere);
    RUN(an_aligned_run_counts_the_phase);
    RUN(the_only_aligned_run_is_found_behind_many_misplaced_ones);
    RUN(a_class_of_lengths_is_searched_for_the_lowest_fit);
    RUN(a_request_skips_the_short_runs_of_its_class);
    RUN(a_run_of_2_to_the_33_pages_costs_next_to_no_memory);
    RUN(many_runs_are_allocated_all_or_none);
    RUN(a_page_too_high_for_its_integer_is_refused);
    RUN(a_veto_keeps_pages_in_use);
    RUN(freeing_many_is_undone_exactly);
    RUN(small_machines_agree_with_a_byte_a_page);
    RUN(machines_of_two_levels_agree_with_a_byte_a_page);
    RUN(a_machine_of_three_levels_agrees_with_a_byte_a_page);
    RUN(machines_of_many_levels_agree_with_segments);
}

int main(void) {
    RUN(zero_bytes_are_an_arena_with_no_parts);
    RUN(sizes_of_tables_are_consistent);
    RUN(codes_keep_the_order_of_lengths);
    RUN(a_part_that_cannot_be_listed_is_not_added);
    RUN(the_lock_is_one);
    RUN(the_thread_that_forks_may_call);
    RUN(many_runs_are_read_and_written_in_every_width);
    RUN(a_negative_number_is_refused);
    run_all(false);
    if (scan_machine_is_wide())
        run_all(true);
    else
        SKIP("no 512-bit kernels here");
    free(listed);
    return check_report("test_pagealloc");
}
