#define _GNU_SOURCE
#include "lazybitmap.h"

#include <errno.h>

#include "check.h"
#include "vm.h"
#include "witness.h"

/* Bits in a commit step of 64 KiB. */
#define STEP_BYTES ((size_t)64 << 10)
#define STEP ((uint64_t)STEP_BYTES * 8)

/* Two and a half steps and an odd rest: the end of the region cuts the last step. */
#define NBITS (STEP * 5 / 2 + 13)
#define BYTES ((size_t)(NBITS + 7) / 8)

/* A bitmap and the same bits, one per byte. */
struct pair {
    struct region *bits;
    unsigned char *model;
};

static uint64_t seed = 0xE7037ED1A0B428DB;

static struct region *new_bits(uint64_t nbits, int accounting) {
    size_t page = vm_page_size(), size = (size_t)(nbits + 7) / 8;
    struct region *region = calloc(1, sizeof *region);
    REQUIRE(region != NULL);
    REQUIRE(region_reserve(region, (size + page - 1) / page * page, accounting, 0, NULL) == 0);
    return region;
}

static void end(struct region *bits) {
    region_end(bits);
    free(bits);
}

static struct pair new_pair(void) {
    struct pair pair = {new_bits(NBITS, VM_NORESERVE), calloc(NBITS, 1)};
    REQUIRE(pair.model != NULL);
    return pair;
}

static void end_pair(struct pair pair) {
    end(pair.bits);
    free(pair.model);
}

/* The bits of the range as lazybitmap_read returns them; the caller frees them. */
static unsigned char *packed(const unsigned char *model, uint64_t start, uint64_t stop) {
    unsigned char *bytes = calloc((size_t)(stop - start) / 8 + 1, 1);
    REQUIRE(bytes != NULL);
    for (uint64_t i = start; i < stop; i++)
        bytes[(i - start) / 8] |= (unsigned char)(model[i] << ((i - start) % 8));
    return bytes;
}

static bool reads_as(const struct region *bits, const unsigned char *model, uint64_t start,
                     uint64_t stop) {
    size_t n = (size_t)(stop - start + 7) / 8;
    unsigned char *want = packed(model, start, stop), *got = malloc(n + 1);
    REQUIRE(got != NULL);
    memset(got, 0xA5, n + 1);
    lazybitmap_read(bits, start, stop, got);
    bool same = memcmp(want, got, n) == 0 && got[n] == 0xA5;
    free(want);
    free(got);
    return same;
}

static bool same(struct pair pair) {
    return reads_as(pair.bits, pair.model, 0, NBITS);
}

/* Random ranges with many ends at the edges of words, of steps and of the bitmap. */
static uint64_t random_index(void) {
    static const uint64_t anchors[] = {0, 64, STEP - 64, STEP, STEP * 2, STEP * 5 / 2, NBITS};
    uint64_t n = sizeof anchors / sizeof anchors[0], at = random_below(&seed, n + 1);
    if (at == n)
        return random_below(&seed, NBITS + 1);
    at = anchors[at] + random_below(&seed, 400);
    at = at < 200 ? 0 : at - 200;
    return at < NBITS ? at : NBITS;
}

static void random_range(uint64_t *start, uint64_t *stop) {
    *start = random_index();
    *stop = random_below(&seed, 20) == 0 ? random_index() : *start + random_below(&seed, 700);
    if (*stop > NBITS)
        *stop = NBITS;
    if (*stop < *start) {
        uint64_t low = *stop;
        *stop = *start;
        *start = low;
    }
}

static uint64_t random_step(void) {
    switch (random_below(&seed, 4)) {
    case 0:
        return 1 + random_below(&seed, 10);
    case 1:
        return 1 + random_below(&seed, STEP * 2);
    default:
        return 1;
    }
}

/* Short ranges of set bits, in some of the steps: the others stay uncommitted. */
static void scatter(struct pair pair) {
    uint64_t steps = random_below(&seed, 8);
    for (int i = 0; i < 12; i++) {
        uint64_t start, stop;
        random_range(&start, &stop);
        if (stop - start > 5000)
            stop = start + 5000;
        if (start == stop || !(steps >> (start / STEP) & 1) || !(steps >> ((stop - 1) / STEP) & 1))
            continue;
        uint64_t step = 1 + random_below(&seed, 3);
        for (uint64_t k = start; k < stop; k += step)
            pair.model[k] = 1;
        (void)lazybitmap_set(pair.bits, start, stop, step);
    }
}

static bool model_find(const unsigned char *model, uint64_t start, uint64_t stop, bool value,
                       uint64_t wanted, int64_t *first) {
    uint64_t run = 0;
    *first = -1;
    for (uint64_t i = start; i < stop; i++) {
        run = model[i] == value ? run + 1 : 0;
        if (run == wanted) {
            *first = (int64_t)(i + 1 - wanted);
            return true;
        }
    }
    return false;
}

/* ---- against the model */

static void random_sets_and_clears_agree_with_a_model(void) {
    for (int round = 0; round < 6; round++) {
        struct pair pair = new_pair();
        for (int i = 0; i < 300; i++) {
            uint64_t start, stop, step = random_step(), changed = 0;
            random_range(&start, &stop);
            bool value = random_below(&seed, 3) != 0;
            size_t before = pair.bits->committed.total;
            /* Few long ranges are set, so that some steps stay uncommitted for a while. */
            if (value && i < 150 && stop - start > 5000)
                stop = start + 100;
            for (uint64_t k = start; k < stop; k += step) {
                changed += pair.model[k] != value;
                pair.model[k] = value;
            }
            int64_t got = value ? lazybitmap_set(pair.bits, start, stop, step)
                                : lazybitmap_clear(pair.bits, start, stop, step);
            CHECK(got == (int64_t)changed);
            CHECK(value || pair.bits->committed.total == before);
            uint64_t lo = start < 100 ? 0 : start - 100, hi = stop + 100 < NBITS ? stop + 100 : NBITS;
            CHECK(reads_as(pair.bits, pair.model, lo, hi));
        }
        CHECK(same(pair));
        end_pair(pair);
    }
}

static void random_questions_agree_with_a_model_and_commit_nothing(void) {
    for (int round = 0; round < 12; round++) {
        struct pair pair = new_pair();
        scatter(pair);
        size_t before = pair.bits->committed.total;
        for (int i = 0; i < 250; i++) {
            uint64_t start, stop, count = 0;
            int64_t want;
            random_range(&start, &stop);
            for (uint64_t k = start; k < stop; k++)
                count += pair.model[k];
            CHECK(lazybitmap_count(pair.bits, start, stop) == count);
            bool value = random_below(&seed, 2) == 0;
            uint64_t wanted = 1 + random_below(&seed, i % 3 == 0 ? STEP : 150);
            (void)model_find(pair.model, start, stop, value, wanted, &want);
            CHECK(lazybitmap_find(pair.bits, start, stop, value, wanted) == want);
            CHECK(start == NBITS || lazybitmap_test(pair.bits, start) == pair.model[start]);
            CHECK(reads_as(pair.bits, pair.model, start, stop));
        }
        CHECK(pair.bits->committed.total == before);
        end_pair(pair);
    }
}

static void runs_agree_with_a_model_in_portions_of_any_size(void) {
    for (int round = 0; round < 30; round++) {
        struct pair pair = new_pair();
        uint64_t start, stop, out[2 * 64 + 1];
        scatter(pair);
        random_range(&start, &stop);
        bool value = round % 2 == 0, right = true;
        size_t max = 1 + (size_t)random_below(&seed, 64), n = max;
        size_t before = pair.bits->committed.total;
        for (uint64_t at = start, from = start; n == max; from = out[2 * n - 1]) {
            out[2 * max] = 77;
            n = lazybitmap_runs(pair.bits, from, stop, value, out, max);
            right = right && n <= max && out[2 * max] == 77;
            for (size_t i = 0; i < n; i++) {
                while (at < stop && pair.model[at] != value)
                    at++;
                right = right && at < stop && out[2 * i] == at;
                while (at < stop && pair.model[at] == value)
                    at++;
                right = right && out[2 * i + 1] == at;
            }
            if (n < max) {
                while (at < stop && pair.model[at] != value)
                    at++;
                right = right && at == stop;
                break;
            }
        }
        CHECK(right);
        CHECK(pair.bits->committed.total == before);
        end_pair(pair);
    }
}

static void combining_agrees_with_a_model(void) {
    for (int round = 0; round < 48; round++) {
        struct pair a = new_pair(), b = new_pair();
        scatter(a);
        scatter(b);
        enum bitmap_operation operation = (enum bitmap_operation)(round % 4);
        uint64_t nbits = round % 3 == 0 ? NBITS : random_index();
        size_t before = a.bits->committed.total, others = b.bits->committed.total;
        for (uint64_t k = 0; k < nbits; k++) {
            unsigned x = a.model[k], y = b.model[k];
            a.model[k] = (unsigned char)(operation == BITMAP_AND   ? x & y
                                         : operation == BITMAP_OR  ? x | y
                                         : operation == BITMAP_XOR ? x ^ y
                                                                   : x & ~y);
        }
        CHECK(lazybitmap_combine(a.bits, b.bits, nbits, operation) == 0);
        CHECK(same(a) && same(b));
        CHECK(b.bits->committed.total == others);
        if (operation == BITMAP_AND || operation == BITMAP_ANDNOT)
            CHECK(a.bits->committed.total == before);
        else
            CHECK(a.bits->committed.total <= before + others);
        end_pair(a);
        end_pair(b);
    }
}

static void combining_with_itself_is_allowed(void) {
    static const enum bitmap_operation operations[] = {BITMAP_AND, BITMAP_OR, BITMAP_XOR,
                                                       BITMAP_ANDNOT};
    for (size_t i = 0; i < 4; i++) {
        struct pair a = new_pair();
        (void)lazybitmap_set(a.bits, STEP - 10, STEP + 10, 1);
        CHECK(lazybitmap_combine(a.bits, a.bits, NBITS, operations[i]) == 0);
        CHECK(lazybitmap_count(a.bits, 0, NBITS) == (i < 2 ? 20 : 0));
        end_pair(a);
    }
}

static void equal_means_the_same_bits_whatever_is_committed(void) {
    struct pair a = new_pair(), b = new_pair();
    CHECK(lazybitmap_equal(a.bits, b.bits, NBITS));
    (void)lazybitmap_set(a.bits, STEP + 5, STEP + 6, 1);
    CHECK(!lazybitmap_equal(a.bits, b.bits, NBITS) && !lazybitmap_equal(b.bits, a.bits, NBITS));
    CHECK(lazybitmap_equal(a.bits, b.bits, STEP + 5));
    CHECK(!lazybitmap_equal(a.bits, b.bits, STEP + 6));
    (void)lazybitmap_clear(a.bits, 0, NBITS, 1);
    CHECK(a.bits->committed.total == STEP_BYTES && b.bits->committed.total == 0);
    CHECK(lazybitmap_equal(a.bits, b.bits, NBITS) && lazybitmap_equal(b.bits, a.bits, NBITS));
    for (int i = 0; i < 300; i++) {
        uint64_t index = random_index(), nbits = random_index();
        if (index == NBITS)
            continue;
        (void)lazybitmap_set(i % 2 == 0 ? a.bits : b.bits, index, index + 1, 1);
        CHECK(lazybitmap_equal(a.bits, b.bits, nbits) == (nbits <= index));
        CHECK(lazybitmap_equal(b.bits, a.bits, NBITS) == false);
        (void)lazybitmap_clear(i % 2 == 0 ? a.bits : b.bits, index, index + 1, 1);
    }
    CHECK(lazybitmap_equal(a.bits, a.bits, NBITS));
    CHECK(lazybitmap_equal(a.bits, b.bits, 0));
    end_pair(a);
    end_pair(b);
}

static void copying_agrees_with_a_model_at_any_distance_up_and_down(void) {
    for (int round = 0; round < 12; round++) {
        struct pair a = new_pair(), b = new_pair();
        scatter(a);
        scatter(b);
        for (int i = 0; i < 60; i++) {
            /* Near indices up to two words apart, so that the ranges overlap; or far ones. */
            uint64_t start = random_index(), from = random_index();
            if (i % 2 == 0 && start >= 130 && start < NBITS - 130)
                from = start - 130 + random_below(&seed, 261);
            uint64_t n = random_below(&seed, 10) == 0 ? STEP : random_below(&seed, 700);
            uint64_t available = NBITS - (start > from ? start : from);
            n = n < available ? n : available;
            memcpy(a.model + start, b.model + from, n);
            CHECK(lazybitmap_copy(a.bits, start, b.bits, from, n) == 0);
            uint64_t lo = start < 100 ? 0 : start - 100;
            uint64_t hi = start + n + 100 < NBITS ? start + n + 100 : NBITS;
            CHECK(reads_as(a.bits, a.model, lo, hi));
        }
        CHECK(same(a) && same(b));
        end_pair(a);
        end_pair(b);
    }
}

static void writing_agrees_with_a_model(void) {
    for (int round = 0; round < 12; round++) {
        struct pair pair = new_pair();
        scatter(pair);
        for (int i = 0; i < 60; i++) {
            uint64_t start, stop;
            random_range(&start, &stop);
            size_t n = (size_t)(stop - start + 7) / 8;
            unsigned char *in = calloc(n + 1, 1);
            REQUIRE(in != NULL);
            for (size_t k = 0; k < n; k++)
                if (random_below(&seed, 3) == 0)
                    in[k] = (unsigned char)random_next(&seed);
            if ((stop - start) % 8 != 0)
                in[n - 1] &= (unsigned char)((1 << (stop - start) % 8) - 1);
            for (uint64_t k = start; k < stop; k++)
                pair.model[k] = in[(k - start) / 8] >> ((k - start) % 8) & 1;
            CHECK(lazybitmap_write(pair.bits, start, stop, in) == 0);
            free(in);
            uint64_t lo = start < 100 ? 0 : start - 100, hi = stop + 100 < NBITS ? stop + 100 : NBITS;
            CHECK(reads_as(pair.bits, pair.model, lo, hi));
        }
        CHECK(same(pair));
        end_pair(pair);
    }
}

/* ---- what is committed */

static void one_bit_commits_one_step(void) {
    struct pair pair = new_pair();
    CHECK(lazybitmap_set(pair.bits, STEP - 1, STEP, 1) == 1);
    CHECK(pair.bits->committed.total == STEP_BYTES);
    CHECK(lazybitmap_set(pair.bits, 0, 1, 1) == 1);
    CHECK(pair.bits->committed.total == STEP_BYTES);
    CHECK(lazybitmap_set(pair.bits, STEP, STEP + 1, 1) == 1);
    CHECK(pair.bits->committed.total == 2 * STEP_BYTES);
    CHECK(lazybitmap_set(pair.bits, NBITS - 1, NBITS, 1) == 1);
    CHECK(pair.bits->committed.total == pair.bits->size);
    end_pair(pair);
}

static void a_long_step_commits_only_where_bits_are_set(void) {
    struct region *bits = new_bits(STEP * 8, VM_NORESERVE);
    CHECK(lazybitmap_set(bits, STEP - 1, STEP * 8, STEP * 3) == 3);
    CHECK(bits->committed.total == 3 * STEP_BYTES && bits->committed.count == 3);
    CHECK(lazybitmap_test(bits, STEP - 1) && lazybitmap_test(bits, STEP * 4 - 1));
    CHECK(lazybitmap_test(bits, STEP * 7 - 1) && lazybitmap_count(bits, 0, STEP * 8) == 3);
    CHECK(lazybitmap_clear(bits, 0, STEP * 8, STEP * 3) == 0);
    CHECK(lazybitmap_clear(bits, STEP - 1, STEP * 8, STEP * 3) == 3);
    CHECK(lazybitmap_count(bits, 0, STEP * 8) == 0);
    end(bits);
}

static void a_step_lands_on_the_first_committed_bit(void) {
    static const uint64_t steps[] = {2, 64, STEP / 2, STEP};
    for (size_t i = 0; i < sizeof steps / sizeof steps[0]; i++) {
        struct region *bits = new_bits(STEP * 3, VM_NORESERVE);
        REQUIRE(lazybitmap_set(bits, STEP, STEP + 2, 1) == 2);
        CHECK(lazybitmap_clear(bits, 0, STEP * 3, steps[i]) == 1);
        CHECK(!lazybitmap_test(bits, STEP) && lazybitmap_test(bits, STEP + 1));
        CHECK(lazybitmap_clear(bits, 1, STEP * 3, steps[i]) == 1);
        CHECK(bits->committed.total == STEP_BYTES);
        end(bits);
    }
}

static void clear_bits_commit_nothing(void) {
    struct pair a = new_pair(), b = new_pair();
    unsigned char *zeros = calloc(BYTES, 1);
    REQUIRE(zeros != NULL);
    CHECK(lazybitmap_write(a.bits, 0, NBITS, zeros) == 0);
    CHECK(lazybitmap_write(a.bits, 5, 5, zeros) == 0);
    CHECK(lazybitmap_copy(a.bits, 0, b.bits, 0, NBITS) == 0);
    CHECK(lazybitmap_copy(a.bits, 0, b.bits, 3, NBITS - 3) == 0);
    CHECK(lazybitmap_copy(a.bits, 3, b.bits, 0, NBITS - 3) == 0);
    CHECK(lazybitmap_combine(a.bits, b.bits, NBITS, BITMAP_OR) == 0);
    CHECK(lazybitmap_combine(a.bits, b.bits, NBITS, BITMAP_XOR) == 0);
    CHECK(lazybitmap_combine(a.bits, b.bits, NBITS, BITMAP_AND) == 0);
    CHECK(lazybitmap_combine(a.bits, b.bits, NBITS, BITMAP_ANDNOT) == 0);
    CHECK(lazybitmap_clear(a.bits, 0, NBITS, 1) == 0);
    CHECK(lazybitmap_clear(a.bits, 3, NBITS, 5) == 0);
    CHECK(lazybitmap_set(a.bits, 9, 9, 1) == 0 && lazybitmap_set(a.bits, 9, 9, 2) == 0);
    CHECK(a.bits->committed.total == 0 && b.bits->committed.total == 0);
    free(zeros);
    end_pair(a);
    end_pair(b);
}

static void a_write_of_one_byte_commits_its_step(void) {
    struct pair pair = new_pair();
    unsigned char *in = calloc(BYTES, 1);
    REQUIRE(in != NULL);
    in[STEP_BYTES + 5] = 0x10;
    CHECK(lazybitmap_write(pair.bits, 0, NBITS, in) == 0);
    CHECK(pair.bits->committed.total == STEP_BYTES);
    CHECK(lazybitmap_find(pair.bits, 0, NBITS, true, 1) == (int64_t)(STEP + 44));
    CHECK(lazybitmap_count(pair.bits, 0, NBITS) == 1);
    free(in);
    end_pair(pair);
}

/* ---- 2^40 bits */

static void a_tebibit_is_searched_without_being_committed(void) {
    uint64_t nbits = (uint64_t)1 << 40, out[8];
    unsigned char read[9];
    size_t resident = witness_status("VmRSS:");
    struct region *bits = new_bits(nbits, VM_NORESERVE), *other = new_bits(nbits, VM_NORESERVE);
    CHECK(lazybitmap_count(bits, 0, nbits) == 0);
    CHECK(lazybitmap_find(bits, 0, nbits, true, 1) == -1);
    CHECK(lazybitmap_find(bits, 0, nbits, false, nbits) == 0);
    CHECK(lazybitmap_find(bits, 1, nbits, false, nbits) == -1);
    CHECK(lazybitmap_runs(bits, 0, nbits, true, out, 4) == 0);
    CHECK(lazybitmap_runs(bits, 0, nbits, false, out, 4) == 1 && out[0] == 0 && out[1] == nbits);
    CHECK(!lazybitmap_test(bits, nbits - 1));
    CHECK(lazybitmap_clear(bits, 0, nbits, 1) == 0 && lazybitmap_clear(bits, 5, nbits, 3) == 0);
    CHECK(lazybitmap_equal(bits, other, nbits));
    CHECK(lazybitmap_copy(bits, 0, other, 0, nbits) == 0);
    CHECK(lazybitmap_combine(bits, other, nbits, BITMAP_OR) == 0);
    lazybitmap_read(bits, nbits - 67, nbits, read);
    for (size_t i = 0; i < sizeof read; i++)
        CHECK(read[i] == 0);
    CHECK(bits->committed.total == 0 && other->committed.total == 0);

    CHECK(lazybitmap_set(bits, nbits - 1, nbits, 1) == 1);
    CHECK(lazybitmap_set(bits, nbits / 2, nbits / 2 + 100, 1) == 100);
    CHECK(bits->committed.total == 2 * STEP_BYTES);
    CHECK(lazybitmap_count(bits, 0, nbits) == 101);
    CHECK(lazybitmap_find(bits, 0, nbits, true, 1) == (int64_t)(nbits / 2));
    CHECK(lazybitmap_find(bits, 0, nbits, true, 101) == -1);
    CHECK(lazybitmap_find(bits, nbits / 2 + 100, nbits, true, 1) == (int64_t)(nbits - 1));
    CHECK(lazybitmap_find(bits, 0, nbits, false, nbits / 2) == 0);
    CHECK(lazybitmap_find(bits, 1, nbits, false, nbits / 2) == -1);
    CHECK(lazybitmap_find(bits, 1, nbits, false, nbits / 2 - 101) == 1);
    CHECK(lazybitmap_runs(bits, 0, nbits, false, out, 4) == 2);
    CHECK(out[0] == 0 && out[1] == nbits / 2 && out[2] == nbits / 2 + 100 && out[3] == nbits - 1);
    CHECK(lazybitmap_runs(bits, 0, nbits, true, out, 4) == 2);
    CHECK(!lazybitmap_equal(bits, other, nbits) && lazybitmap_equal(bits, other, nbits / 2));
    CHECK(lazybitmap_copy(other, 0, bits, 0, nbits) == 0);
    CHECK(lazybitmap_equal(bits, other, nbits));
    CHECK(lazybitmap_combine(other, bits, nbits, BITMAP_XOR) == 0);
    CHECK(lazybitmap_count(other, 0, nbits) == 0);
    CHECK(bits->committed.total == 2 * STEP_BYTES && other->committed.total == 2 * STEP_BYTES);
    CHECK(witness_status("VmRSS:") < resident + ((size_t)1 << 20));
    end(bits);
    end(other);
}

/* ---- named edges */

static void runs_of_any_length_are_found_across_a_step(void) {
    static const uint64_t lengths[] = {1, 2, 63, 64, 65, 127, 128, 129, 1000};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++)
        for (uint64_t before = 0; before <= lengths[i]; before += 1 + lengths[i] / 7) {
            struct region *bits = new_bits(NBITS, VM_NORESERVE);
            uint64_t at = STEP - before, stop = at + lengths[i];
            REQUIRE(lazybitmap_set(bits, at, stop, 1) == (int64_t)lengths[i]);
            CHECK(lazybitmap_find(bits, 0, NBITS, true, lengths[i]) == (int64_t)at);
            CHECK(lazybitmap_find(bits, 0, NBITS, true, lengths[i] + 1) == -1);
            CHECK(lazybitmap_find(bits, at + 1, NBITS, true, lengths[i]) == -1);
            CHECK(lazybitmap_find(bits, 0, stop - 1, true, lengths[i]) == -1);
            CHECK(lazybitmap_find(bits, 0, NBITS, false, at + 1) == (int64_t)stop);
            CHECK(lazybitmap_find(bits, 0, NBITS, false, NBITS - stop) == (int64_t)stop);
            end(bits);
        }
}

static void a_clear_run_joins_committed_and_uncommitted_steps(void) {
    struct region *bits = new_bits(STEP * 4, VM_NORESERVE);
    REQUIRE(lazybitmap_set(bits, STEP, STEP + 1, 1) == 1);
    REQUIRE(lazybitmap_set(bits, STEP * 4 - 1, STEP * 4, 1) == 1);
    CHECK(bits->committed.count == 2);
    uint64_t length = STEP * 3 - 2;
    CHECK(lazybitmap_find(bits, 0, STEP * 4, false, length) == (int64_t)STEP + 1);
    CHECK(lazybitmap_find(bits, 0, STEP * 4, false, length + 1) == -1);
    CHECK(lazybitmap_find(bits, STEP + 7, STEP * 4, false, length - 6) == (int64_t)STEP + 7);
    CHECK(lazybitmap_find(bits, 0, STEP * 4, false, STEP) == 0);
    end(bits);
}

static void an_empty_range_has_no_bits(void) {
    struct pair pair = new_pair();
    uint64_t out[2] = {7, 7};
    unsigned char read[1] = {7};
    (void)lazybitmap_set(pair.bits, 0, 100, 1);
    for (uint64_t at = 0; at <= NBITS; at += NBITS) {
        CHECK(lazybitmap_count(pair.bits, at, at) == 0);
        CHECK(lazybitmap_find(pair.bits, at, at, true, 1) == -1);
        CHECK(lazybitmap_find(pair.bits, at, at, false, 1) == -1);
        CHECK(lazybitmap_runs(pair.bits, at, at, true, out, 1) == 0 && out[0] == 7);
        CHECK(lazybitmap_set(pair.bits, at, at, 1) == 0);
        CHECK(lazybitmap_clear(pair.bits, at, at, 1) == 0);
        lazybitmap_read(pair.bits, at, at, read);
        CHECK(read[0] == 7);
        CHECK(lazybitmap_write(pair.bits, at, at, read) == 0);
        CHECK(lazybitmap_copy(pair.bits, at, pair.bits, 0, 0) == 0);
    }
    CHECK(lazybitmap_runs(pair.bits, 0, NBITS, true, out, 0) == 0);
    CHECK(lazybitmap_count(pair.bits, 0, NBITS) == 100);
    end_pair(pair);
}

/* ---- refused memory */

/* Whether `change`, refused because memory is short, changes neither bits nor committed ranges. */
static bool refusal_changes_nothing(int accounting, int64_t (*change)(struct region *)) {
    struct region *bits = new_bits(STEP * 8, accounting);
    unsigned char *model = calloc(STEP * 8, 1);
    REQUIRE(model != NULL);
    for (uint64_t i = STEP * 2 + 3; i < STEP * 2 + 90; i++)
        model[i] = 1;
    REQUIRE(lazybitmap_set(bits, STEP * 2 + 3, STEP * 2 + 90, 1) == 87);
    /* Two steps may be committed before the third is refused. */
    REQUIRE(limit_data(STEP_BYTES * 5 / 2));
    int64_t result = change(bits);
    REQUIRE(unlimit(RLIMIT_DATA));
    bool right = result == -ENOMEM && bits->committed.total == STEP_BYTES &&
                 bits->committed.count == 1 && bits->committed.items[0].lo == STEP_BYTES * 2 &&
                 reads_as(bits, model, 0, STEP * 8) &&
                 witness_all((uintptr_t)bits->base, STEP_BYTES * 2, '-') &&
                 witness_all((uintptr_t)bits->base + STEP_BYTES * 2, STEP_BYTES, 'w') &&
                 witness_all((uintptr_t)bits->base + STEP_BYTES * 3, STEP_BYTES * 5, '-');
    free(model);
    end(bits);
    return right;
}

/* Bits in every second step, and the same as bytes; created before memory is short. */
static struct region *plenty;
static unsigned char *plenty_bytes;

static int64_t set_all(struct region *bits) {
    return lazybitmap_set(bits, 0, STEP * 8, 1);
}

static int64_t set_with_step(struct region *bits) {
    return lazybitmap_set(bits, 7, STEP * 8, STEP);
}

static int64_t copy_all(struct region *bits) {
    return lazybitmap_copy(bits, 0, plenty, 0, STEP * 8);
}

static int64_t or_all(struct region *bits) {
    return lazybitmap_combine(bits, plenty, STEP * 8, BITMAP_OR);
}

static int64_t xor_all(struct region *bits) {
    return lazybitmap_combine(bits, plenty, STEP * 8, BITMAP_XOR);
}

static int64_t write_all(struct region *bits) {
    return lazybitmap_write(bits, 0, STEP * 8, plenty_bytes);
}

static void refused_memory_changes_no_bit(void) {
    int64_t (*const changes[])(struct region *) = {set_all, set_with_step, copy_all,
                                                   or_all, xor_all, write_all};
    plenty = new_bits(STEP * 8, VM_NORESERVE);
    plenty_bytes = malloc(STEP_BYTES * 8);
    REQUIRE(plenty_bytes != NULL);
    REQUIRE(lazybitmap_set(plenty, 0, STEP * 8, STEP * 2) == 4);
    REQUIRE(lazybitmap_set(plenty, STEP * 8 - 1, STEP * 8, 1) == 1);
    lazybitmap_read(plenty, 0, STEP * 8, plenty_bytes);
    for (size_t i = 0; i < sizeof changes / sizeof changes[0]; i++) {
        CHECK(refusal_changes_nothing(0, changes[i]));
        CHECK(refusal_changes_nothing(VM_NORESERVE, changes[i]));
    }
    free(plenty_bytes);
    end(plenty);
}

static void a_step_beyond_the_range_reaches_one_bit(void) {
    static const uint64_t steps[] = {NBITS, UINT64_C(1) << 63, UINT64_MAX - 5, UINT64_MAX};
    for (size_t i = 0; i < sizeof steps / sizeof steps[0]; i++) {
        struct pair pair = new_pair();
        CHECK(lazybitmap_set(pair.bits, 5, 10, steps[i]) == 1);
        CHECK(lazybitmap_count(pair.bits, 0, NBITS) == 1 && lazybitmap_test(pair.bits, 5));
        (void)lazybitmap_set(pair.bits, 0, 20, 1);
        CHECK(lazybitmap_clear(pair.bits, 5, 10, steps[i]) == 1);
        CHECK(lazybitmap_count(pair.bits, 0, NBITS) == 19 && !lazybitmap_test(pair.bits, 5));
        (void)fflush(stdout);
        (void)alarm(5); /* a search over uncommitted words might never end */
        CHECK(lazybitmap_clear(pair.bits, STEP + 5, NBITS, steps[i]) == 0);
        (void)alarm(0);
        end_pair(pair);
    }
}

static void clear_bytes_between_set_ones_commit_nothing(void) {
    struct region *bits = new_bits(STEP * 8, VM_NORESERVE);
    unsigned char *in = calloc(STEP_BYTES * 8, 1);
    REQUIRE(in != NULL);
    in[0] = in[STEP_BYTES * 8 - 1] = 1;
    CHECK(lazybitmap_write(bits, 0, STEP * 8, in) == 0);
    CHECK(bits->committed.total == STEP_BYTES * 2);
    free(in);
    end(bits);
}

int main(void) {
    RUN(random_sets_and_clears_agree_with_a_model);
    RUN(random_questions_agree_with_a_model_and_commit_nothing);
    RUN(runs_agree_with_a_model_in_portions_of_any_size);
    RUN(combining_agrees_with_a_model);
    RUN(combining_with_itself_is_allowed);
    RUN(equal_means_the_same_bits_whatever_is_committed);
    RUN(copying_agrees_with_a_model_at_any_distance_up_and_down);
    RUN(writing_agrees_with_a_model);
    RUN(one_bit_commits_one_step);
    RUN(a_long_step_commits_only_where_bits_are_set);
    RUN(a_step_lands_on_the_first_committed_bit);
    RUN(clear_bits_commit_nothing);
    RUN(a_write_of_one_byte_commits_its_step);
    RUN(a_tebibit_is_searched_without_being_committed);
    RUN(runs_of_any_length_are_found_across_a_step);
    RUN(a_clear_run_joins_committed_and_uncommitted_steps);
    RUN(an_empty_range_has_no_bits);
    RUN(refused_memory_changes_no_bit);
    RUN(clear_bytes_between_set_ones_commit_nothing);
    RUN(a_step_beyond_the_range_reaches_one_bit);
    return check_report("test_lazybitmap");
}
