#include "lazybitmap.h"

#include <errno.h>
#include <string.h>

#include "words.h"

/* Steps of 64 KiB save a system call per page for a bitmap that fills up. Memory itself is still
 * backed page by page at first touch. */
#define COMMIT_STEP ((uint64_t)64 << 10)

static uint64_t *words_of(const struct region *bits) {
    return (uint64_t *)(void *)bits->base;
}

/* Whether the bits from `at` on are committed; up to `*end`, at most `stop`, they are in one
 * state. */
static bool committed_segment(const struct region *bits, uint64_t at, uint64_t stop,
                              uint64_t *end) {
    struct run piece;
    size_t lo = (size_t)(at / 8), hi = (size_t)(stop / 8 + (stop % 8 != 0));
    *end = stop;
    if (!runs_next(&bits->committed, lo, hi, &piece))
        return false;
    bool committed = piece.lo <= lo;
    *end = smaller(stop, (uint64_t)(committed ? piece.hi : piece.lo) * 8);
    return committed;
}

/* Commits the words under [start, stop), in whole commit steps, and adds the bytes that were not
 * committed before to `fresh`. 0 or an errno, EBADF for a released region. */
static int commit_words(struct region *bits, uint64_t start, uint64_t stop, struct runs *fresh) {
    if (bits->base == NULL)
        return EBADF;
    uint64_t step = larger(COMMIT_STEP, bits->page);
    size_t lo = (size_t)(start / 8 / step * step);
    size_t hi = (size_t)smaller(bits->size, round_up((stop + 7) / 8, step));
    struct run gap;
    bool gaps = false;
    for (size_t at = lo; runs_next_gap(&bits->committed, at, hi, &gap); at = gap.hi) {
        int err = runs_grow(fresh);
        if (err != 0)
            return err;
        runs_add(fresh, gap.lo, gap.hi); /* even if refused: the gap may have stayed accessible */
        gaps = true;
    }
    /* One commit of the whole: a commit for each gap would insert each into the books. */
    return gaps ? region_commit(bits, lo, hi - lo) : 0;
}

/* Ends the commits of a change: if one was refused (`err`), decommits all of `fresh`. Frees `fresh`
 * and returns `err`. */
static int end_commits(struct region *bits, struct runs *fresh, int err) {
    for (size_t i = 0; err != 0 && i < fresh->count; i++)
        (void)region_decommit(bits, fresh->items[i].lo, fresh->items[i].hi - fresh->items[i].lo);
    runs_clear(fresh);
    return err;
}

/* Limits a step to the length of the range, so that adding it cannot overflow. */
static uint64_t clamp_step(uint64_t start, uint64_t stop, uint64_t step) {
    return stop > start ? smaller(step, stop - start) : 1;
}

int64_t lazybitmap_set(struct region *bits, uint64_t start, uint64_t stop, uint64_t step) {
    if (start >= stop)
        return 0;
    step = clamp_step(start, stop, step);
    struct runs fresh = {0};
    int err = 0;
    if (step <= COMMIT_STEP * 8) /* every commit step is needed */
        err = commit_words(bits, start, stop, &fresh);
    else
        for (uint64_t i = start; i < stop && err == 0; i += step)
            err = commit_words(bits, i, i + 1, &fresh);
    if (end_commits(bits, &fresh, err) != 0)
        return -err;
    if (step == 1)
        return (int64_t)bitmap_set(words_of(bits), start, stop);
    uint64_t changed = 0;
    for (uint64_t i = start; i < stop; i += step)
        changed += bitmap_set(words_of(bits), i, i + 1);
    return (int64_t)changed;
}

int64_t lazybitmap_clear(struct region *bits, uint64_t start, uint64_t stop, uint64_t step) {
    uint64_t changed = 0;
    step = clamp_step(start, stop, step);
    for (uint64_t at = start, end; at < stop;) {
        if (!committed_segment(bits, at, stop, &end)) {
            at += (end - at + step - 1) / step * step;
        } else if (step == 1) {
            changed += bitmap_clear(words_of(bits), at, end);
            at = end;
        } else {
            for (; at < end; at += step)
                changed += bitmap_clear(words_of(bits), at, at + 1);
        }
    }
    return (int64_t)changed;
}

bool lazybitmap_test(const struct region *bits, uint64_t index) {
    uint64_t end;
    return committed_segment(bits, index, index + 1, &end) && bitmap_test(words_of(bits), index);
}

uint64_t lazybitmap_count(const struct region *bits, uint64_t start, uint64_t stop) {
    uint64_t count = 0;
    for (uint64_t at = start, end; at < stop; at = end)
        if (committed_segment(bits, at, stop, &end))
            count += bitmap_count(words_of(bits), at, end);
    return count;
}

int64_t lazybitmap_find(const struct region *bits, uint64_t start, uint64_t stop, bool value,
                        uint64_t wanted) {
    uint64_t first = start;
    for (uint64_t at = start, end; at < stop; at = end) {
        if (committed_segment(bits, at, stop, &end)) {
            if (bitmap_seek(words_of(bits), at, end, value, wanted, &first))
                return (int64_t)first;
        } else if (value) {
            first = end;
        } else if (end - first >= wanted) {
            return (int64_t)first;
        }
    }
    return -1;
}

size_t lazybitmap_runs(const struct region *bits, uint64_t start, uint64_t stop, bool value,
                       uint64_t *out, size_t max) {
    size_t n = 0;
    for (uint64_t at = start; n < max; n++) {
        int64_t first = lazybitmap_find(bits, at, stop, value, 1);
        if (first < 0)
            break;
        int64_t after = lazybitmap_find(bits, (uint64_t)first, stop, !value, 1);
        at = after < 0 ? stop : (uint64_t)after;
        out[2 * n] = (uint64_t)first;
        out[2 * n + 1] = at;
    }
    return n;
}

/* Commits, for the `n` bits of `bits` at `start`, the words of those whose counterparts in `other`,
 * from `from` on, are committed. All or none. */
static int commit_same_words(struct region *bits, uint64_t start, const struct region *other,
                             uint64_t from, uint64_t n) {
    struct runs fresh = {0};
    int err = 0;
    for (uint64_t at = from, stop = from + n, end; at < stop && err == 0; at = end)
        if (committed_segment(other, at, stop, &end))
            err = commit_words(bits, start + at - from, start + end - from, &fresh);
    return end_commits(bits, &fresh, err);
}

int64_t lazybitmap_combine(struct region *bits, const struct region *other, uint64_t nbits,
                           enum bitmap_operation operation) {
    if (operation == BITMAP_OR || operation == BITMAP_XOR) {
        int err = commit_same_words(bits, 0, other, 0, nbits);
        if (err != 0)
            return -err;
    }
    for (uint64_t at = 0, end; at < nbits; at = end) {
        if (!committed_segment(bits, at, nbits, &end))
            continue;
        bool both = committed_segment(other, at, end, &end);
        if (both)
            bitmap_combine(words_of(bits), words_of(other), at, end, operation);
        else if (operation == BITMAP_AND)
            (void)bitmap_clear(words_of(bits), at, end);
    }
    return 0;
}

bool lazybitmap_equal(const struct region *bits, const struct region *other, uint64_t nbits) {
    for (uint64_t at = 0, end; at < nbits; at = end) {
        bool here = committed_segment(bits, at, nbits, &end);
        bool there = committed_segment(other, at, end, &end);
        if (here && there) {
            const uint64_t *a = words_of(bits), *b = words_of(other);
            if (memcmp(a + at / 64, b + at / 64, (size_t)((end - at) / 64 * 8)) != 0)
                return false;
            uint64_t tail = end / 64 * 64;
            unsigned n = (unsigned)(end - tail);
            if (n > 0 && bitmap_extract(a, tail, n) != bitmap_extract(b, tail, n))
                return false;
        } else if (here || there) {
            if (lazybitmap_find(here ? bits : other, at, end, true, 1) >= 0)
                return false;
        }
    }
    return true;
}

/* Copies the bits [at, end) of a committed segment of `other` to `to`. */
static void copy_segment(struct region *bits, uint64_t to, const struct region *other,
                             uint64_t at, uint64_t end) {
    while (at < end) {
        unsigned n = (unsigned)smaller(64, end - at);
        bitmap_deposit(words_of(bits), to, n, bitmap_extract(words_of(other), at, n));
        at += n;
        to += n;
    }
}

int64_t lazybitmap_copy(struct region *bits, uint64_t start, const struct region *other,
                        uint64_t from, uint64_t n) {
    int err = commit_same_words(bits, start, other, from, n);
    if (err != 0)
        return -err;
    (void)lazybitmap_clear(bits, start, start + n, 1);
    for (uint64_t at = from, stop = from + n, end; at < stop; at = end)
        if (committed_segment(other, at, stop, &end))
            copy_segment(bits, start + at - from, other, at, end);
    return 0;
}

void lazybitmap_read(const struct region *bits, uint64_t start, uint64_t stop, unsigned char *out) {
    memset(out, 0, (size_t)((stop - start + 7) / 8));
    for (uint64_t at = start, end; at < stop; at = end) {
        if (!committed_segment(bits, at, stop, &end))
            continue;
        for (uint64_t i = at; i < end;) {
            /* Bits up to the next byte of `out`, then 64 bits at a time. */
            uint64_t to = i - start;
            unsigned n = (unsigned)smaller(to % 8 != 0 ? 8 - to % 8 : 64, end - i);
            uint64_t word = bitmap_extract(words_of(bits), i, n);
            if (to % 8 != 0)
                out[to / 8] = (unsigned char)(out[to / 8] | word << (to % 8));
            else
                memcpy(out + to / 8, &word, (n + 7) / 8);
            i += n;
        }
    }
}

/* The next `*count` <= 64 bits of `in`, from bit i of n on. */
static uint64_t input_word(const unsigned char *in, uint64_t i, uint64_t n, unsigned *count) {
    uint64_t word = 0;
    *count = (unsigned)smaller(64, n - i);
    memcpy(&word, in + i / 8, (*count + 7) / 8);
    return *count < 64 ? word & ((UINT64_C(1) << *count) - 1) : word;
}

int64_t lazybitmap_write(struct region *bits, uint64_t start, uint64_t stop,
                         const unsigned char *in) {
    uint64_t n = stop - start;
    unsigned count;
    struct runs fresh = {0};
    int err = 0;
    for (uint64_t i = 0; i < n && err == 0; i += 64)
        if (input_word(in, i, n, &count) != 0)
            err = commit_words(bits, start + i, start + i + count, &fresh);
    if (end_commits(bits, &fresh, err) != 0)
        return -err;
    (void)lazybitmap_clear(bits, start, stop, 1);
    for (uint64_t i = 0; i < n; i += 64) {
        uint64_t word = input_word(in, i, n, &count);
        if (word != 0)
            bitmap_deposit(words_of(bits), start + i, count, word);
    }
    return 0;
}
