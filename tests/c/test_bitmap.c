#define _DEFAULT_SOURCE

#include "../../csrc/bitmap.c"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"

#define WORDS 48
#define BITS (WORDS * 64)

static uint64_t seed = 0x2545F4914F6CDD1D;

/* The bits between two inaccessible pages, and the same bits as an array of bool. */
static char *arena;
static size_t page;
static uint64_t *words;
static bool model[BITS];

/* Places the words next to the left or the right inaccessible page. */
static void place(bool right) {
    words = (uint64_t *)(void *)(arena + page + (right ? page - WORDS * sizeof *words : 0));
}

static void store(void) {
    memset(words, 0, WORDS * sizeof *words);
    for (size_t i = 0; i < BITS; i++)
        words[i / 64] |= (uint64_t)model[i] << (i % 64);
}

static bool stored(const bool *bits) {
    for (size_t i = 0; i < BITS; i++)
        if ((words[i / 64] >> (i % 64) & 1) != bits[i])
            return false;
    return true;
}

/* Fills the model with runs of random lengths up to `longest`, so that long ones occur. */
static void scatter(uint64_t longest) {
    bool value = random_below(&seed, 2) == 0;
    for (size_t at = 0; at < BITS; value = !value)
        for (uint64_t n = 1 + random_below(&seed, longest); n > 0 && at < BITS; n--)
            model[at++] = value;
    store();
}

static void all(bool value) {
    memset(model, value, sizeof model);
    store();
}

static uint64_t model_count(uint64_t start, uint64_t stop) {
    uint64_t n = 0;
    for (uint64_t i = start; i < stop; i++)
        n += model[i];
    return n;
}

static bool model_seek(uint64_t start, uint64_t stop, bool value, uint64_t wanted,
                       uint64_t *first) {
    for (uint64_t i = start; i < stop; i++) {
        if (model[i] != value)
            *first = i + 1;
        else if (i + 1 - *first >= wanted)
            return true;
    }
    return false;
}

static void random_range(uint64_t *start, uint64_t *stop) {
    *start = random_below(&seed, BITS);
    *stop = *start + random_below(&seed, BITS - *start + 1);
    /* Test every case at the edges of words. */
    if (random_below(&seed, 4) == 0)
        *start = *start / 64 * 64;
    if (random_below(&seed, 4) == 0)
        *stop = (*stop + 63) / 64 * 64;
    if (random_below(&seed, 4) == 0 && *start + 130 < BITS)
        *stop = *start + random_below(&seed, 130);
}

static uint64_t set_naively(uint64_t start, uint64_t stop, bool value) {
    uint64_t changed = 0;
    for (uint64_t i = start; i < stop; i++) {
        changed += model[i] != value;
        model[i] = value;
    }
    return changed;
}

static void bits_are_in_the_little_order_of_bytes(void) {
    all(false);
    CHECK(bitmap_set(words, 13, 14) == 1);
    CHECK(((unsigned char *)words)[1] == 1 << 5);
    CHECK(bitmap_test(words, 13) && !bitmap_test(words, 12) && !bitmap_test(words, 14));
    CHECK(bitmap_set(words, 127, 128) == 1);
    CHECK(((unsigned char *)words)[15] == 1 << 7);
}

static void every_range_near_word_edges_is_exact(void) {
    for (uint64_t start = 0; start <= 200; start++)
        for (uint64_t stop = start; stop <= 200; stop++) {
            bool value = (start + stop) % 2 == 0;
            all(!value);
            uint64_t n = value ? bitmap_set(words, start, stop) : bitmap_clear(words, start, stop);
            CHECK(n == stop - start);
            CHECK(bitmap_count(words, 0, 256) == (value ? n : 256 - n));
            CHECK(bitmap_count(words, start, stop) == (value ? n : 0));
            (void)set_naively(start, stop, value);
            CHECK(stored(model));
        }
}

static void an_empty_range_reads_and_changes_nothing(void) {
    uint64_t first = 5;
    /* Nothing is readable here. */
    uint64_t *nowhere = (uint64_t *)(void *)arena;
    CHECK(bitmap_set(nowhere, 64, 64) == 0);
    CHECK(bitmap_set(nowhere, 70, 70) == 0);
    CHECK(bitmap_clear(nowhere, 0, 0) == 0);
    CHECK(bitmap_count(nowhere, 70, 70) == 0);
    CHECK(bitmap_find(nowhere, 70, 70, true) == 70);
    CHECK(!bitmap_seek(nowhere, 9, 9, true, 7, &first) && first == 5);
    bitmap_combine(nowhere, nowhere, 128, 128, BITMAP_XOR);
}

static void words_outside_the_range_are_not_touched(void) {
    uint64_t first;
    for (int round = 0; round < 2000; round++) {
        uint64_t n = 1 + random_below(&seed, 4);
        uint64_t skipped = random_below(&seed, 1000), start = skipped * 64, stop = start + n * 64;
        start += random_below(&seed, 64);
        stop -= random_below(&seed, 64);
        if (start >= stop)
            continue;
        bool right = round % 2 == 0;
        uintptr_t edge = (uintptr_t)arena + page + (right ? page - n * 8 : 0);
        uint64_t *at = (uint64_t *)(edge - skipped * 8);
        memset((void *)edge, round % 3 == 0 ? 0 : -1, n * 8);
        (void)bitmap_count(at, start, stop);
        (void)bitmap_find(at, start, stop, true);
        (void)bitmap_find(at, start, stop, false);
        (void)bitmap_extract(at, start, (unsigned)(stop - start < 64 ? stop - start : 64));
        bitmap_combine(at, at, start, stop, BITMAP_OR);
        CHECK(bitmap_clear(at, start, stop) == (round % 3 == 0 ? 0 : stop - start));
        first = start;
        CHECK(!bitmap_seek(at, start, stop, true, 1, &first) && first == stop);
        CHECK(bitmap_set(at, start, stop) == stop - start);
        first = start;
        CHECK(bitmap_seek(at, start, stop, true, stop - start, &first) && first == start);
        if (stop - start <= 64)
            bitmap_deposit(at, start, (unsigned)(stop - start), 0);
    }
}

static void setting_and_clearing_agree_with_the_model(void) {
    for (int i = 0; i < 4000; i++) {
        uint64_t start, stop;
        place(i % 2 == 0);
        scatter(1 + random_below(&seed, 300));
        random_range(&start, &stop);
        CHECK(bitmap_count(words, start, stop) == model_count(start, stop));
        bool value = random_below(&seed, 2) == 0;
        uint64_t changed = set_naively(start, stop, value);
        CHECK((value ? bitmap_set(words, start, stop) : bitmap_clear(words, start, stop)) ==
              changed);
        CHECK(stored(model));
        uint64_t index = random_below(&seed, BITS);
        CHECK(bitmap_test(words, index) == model[index]);
    }
}

static void seeking_agrees_with_the_model(void) {
    uint64_t hits = 0, missed = 0;
    for (int i = 0; i < 60000; i++) {
        uint64_t start, stop, want, got;
        if (i % 10 == 0) {
            place(i % 20 == 0);
            scatter(1 + random_below(&seed, i % 3 == 0 ? 600 : 80));
        }
        random_range(&start, &stop);
        uint64_t wanted = 1 + random_below(&seed, i % 2 == 0 ? 70 : 300);
        /* Until the run is complete, the open run is shorter than `wanted`. */
        uint64_t before = random_below(&seed, wanted < start + 1 ? wanted : start + 1);
        bool value = random_below(&seed, 2) == 0;
        want = got = start - before;
        bool is_there = model_seek(start, stop, value, wanted, &want);
        CHECK(bitmap_seek(words, start, stop, value, wanted, &got) == is_there);
        CHECK(got == want);
        hits += is_there;
        missed += !is_there;

        want = start;
        CHECK(bitmap_find(words, start, stop, value) ==
              (model_seek(start, stop, value, 1, &want) ? want : stop));
    }
    CHECK(hits > 10000 && missed > 10000);
}

static void a_scan_in_pieces_finds_what_one_scan_finds(void) {
    for (int i = 0; i < 5000; i++) {
        scatter(1 + random_below(&seed, 200));
        uint64_t wanted = 1 + random_below(&seed, 250), want = 0, got = 0, at = 0;
        bool value = random_below(&seed, 2) == 0;
        bool is_there = model_seek(0, BITS, value, wanted, &want), complete = false;
        while (at < BITS && !complete) {
            uint64_t end = at + 1 + random_below(&seed, 200);
            end = end < BITS ? end : BITS;
            complete = bitmap_seek(words, at, end, value, wanted, &got);
            at = end;
        }
        CHECK(complete == is_there && got == want);
    }
}

/* Seeking finds one run [at, at + length) of `value` among opposite bits, but no run one bit longer. */
static void check_lone_run(uint64_t at, uint64_t length, bool value) {
    uint64_t first = 0;
    all(!value);
    (void)set_naively(at, at + length, value);
    store();
    CHECK(bitmap_seek(words, 0, BITS, value, length, &first) && first == at);
    first = 0;
    CHECK(!bitmap_seek(words, 0, BITS, value, length + 1, &first));
    CHECK(first == (at + length == BITS ? at : BITS));
    CHECK(bitmap_find(words, 0, BITS, value) == at);
    CHECK(bitmap_count(words, 0, BITS) == (value ? length : BITS - length));
}

static void runs_of_63_64_and_65_are_found_at_every_shift(void) {
    for (uint64_t at = 60; at <= 200; at++)
        for (uint64_t length = 63; length <= 65; length++) {
            check_lone_run(at, length, true);
            check_lone_run(at, length, false);
        }
}

static void long_runs_across_words_are_found(void) {
    static const uint64_t lengths[] = {66, 127, 128, 129, 191, 192, 500, 1024, 1500};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++)
        for (uint64_t at = 0; at < 130; at += 7) {
            check_lone_run(at, lengths[i], true);
            check_lone_run(at, lengths[i], false);
        }
}

static void runs_at_both_ends_are_found(void) {
    for (uint64_t length = 1; length < 200; length++) {
        check_lone_run(0, length, true);
        check_lone_run(BITS - length, length, true);
        check_lone_run(BITS - length, length, false);
    }
    check_lone_run(0, BITS, true);
    check_lone_run(0, BITS, false);
}

static void the_first_of_two_runs_is_found(void) {
    uint64_t first = 0;
    all(false);
    (void)set_naively(100, 163, true);
    (void)set_naively(200, 264, true);
    (void)set_naively(300, 364, true);
    store();
    CHECK(bitmap_seek(words, 0, BITS, true, 63, &first) && first == 100);
    first = 0;
    CHECK(bitmap_seek(words, 0, BITS, true, 64, &first) && first == 200);
    first = 101;
    CHECK(bitmap_seek(words, 101, BITS, true, 63, &first) && first == 200);
}

static void a_run_from_before_the_range_counts(void) {
    uint64_t first = 10;
    all(false);
    (void)set_naively(64, 70, true);
    store();
    CHECK(bitmap_seek(words, 64, 128, true, 60, &first) && first == 10);
    first = 10;
    CHECK(!bitmap_seek(words, 64, 128, true, 61, &first) && first == 128);
    first = 10;
    CHECK(!bitmap_seek(words, 64, 70, true, 61, &first) && first == 10);
}

static void extracting_and_depositing_agree_with_the_model(void) {
    for (int i = 0; i < 30000; i++) {
        if (i % 50 == 0) {
            place(i % 100 == 0);
            scatter(1 + random_below(&seed, 100));
        }
        unsigned n = 1 + (unsigned)random_below(&seed, 64);
        uint64_t index = i % 7 == 0 ? BITS - n : random_below(&seed, BITS - n + 1), want = 0;
        for (unsigned k = 0; k < n; k++)
            want |= (uint64_t)model[index + k] << k;
        CHECK(bitmap_extract(words, index, n) == want);
        uint64_t bits = random_next(&seed);
        bitmap_deposit(words, index, n, bits);
        for (unsigned k = 0; k < n; k++)
            model[index + k] = bits >> k & 1;
        CHECK(i % 10 != 0 || stored(model));
    }
    CHECK(stored(model));
}

static void combining_agrees_with_the_model(void) {
    static uint64_t other[WORDS];
    static bool want[BITS];
    for (int i = 0; i < 4000; i++) {
        uint64_t start, stop;
        enum bitmap_operation operation = (enum bitmap_operation)random_below(&seed, 4);
        scatter(1 + random_below(&seed, 100));
        memcpy(other, words, sizeof other);
        scatter(1 + random_below(&seed, 100));
        random_range(&start, &stop);
        memcpy(want, model, sizeof want);
        for (uint64_t k = start; k < stop; k++) {
            bool a = model[k], b = other[k / 64] >> (k % 64) & 1;
            want[k] = operation == BITMAP_AND   ? a && b
                      : operation == BITMAP_OR  ? a || b
                      : operation == BITMAP_XOR ? a != b
                                                : a && !b;
        }
        bitmap_combine(words, other, start, stop, operation);
        CHECK(stored(want));
    }
}

/* Several times the 31 vectors of four words that the AVX2 loop counts before it adds up. */
#define LOOPED 300

typedef uint64_t counting(const uint64_t *, size_t);
typedef uint64_t filling(uint64_t *, size_t, uint64_t);

static void check_loops(counting *count, filling *fill_with) {
    static uint64_t given[LOOPED + 1], filled[LOOPED + 1];
    for (size_t n = 0; n <= LOOPED; n++) {
        uint64_t want = 0, value = n % 2 == 0 ? 0 : ~UINT64_C(0);
        for (size_t i = 0; i <= LOOPED; i++)
            given[i] = n % 3 == 0 ? ~UINT64_C(0) : random_next(&seed);
        for (size_t i = 0; i < n * 64; i++)
            want += given[i / 64] >> (i % 64) & 1;
        memcpy(filled, given, sizeof given);
        CHECK(count(given, n) == want);
        CHECK(fill_with(filled, n, value) == want);
        bool right = filled[n] == given[n];
        for (size_t i = 0; i < n; i++)
            right = right && filled[i] == value;
        CHECK(right);
    }
}

static void the_loops_of_every_instruction_set_agree(void) {
    check_loops(count_portable, fill_portable);
#ifdef __x86_64__
    if (__builtin_cpu_supports("popcnt"))
        check_loops(count_popcnt, fill_popcnt);
    else
        SKIP("no POPCNT here");
    if (__builtin_cpu_supports("avx2"))
        check_loops(count_avx2, fill_avx2);
    else
        SKIP("no AVX2 here");
    if (__builtin_cpu_supports("avx512vpopcntdq"))
        check_loops(count_vpopcnt, fill_vpopcnt);
    else
        SKIP("no VPOPCNTDQ here");
#endif
}

int main(void) {
    page = (size_t)sysconf(_SC_PAGESIZE);
    void *mapped = mmap(NULL, 3 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED)
        return EXIT_FAILURE;
    arena = mapped;
    if (mprotect(arena + page, page, PROT_READ | PROT_WRITE) != 0)
        return EXIT_FAILURE;
    place(true);
    RUN(bits_are_in_the_little_order_of_bytes);
    RUN(every_range_near_word_edges_is_exact);
    RUN(an_empty_range_reads_and_changes_nothing);
    RUN(words_outside_the_range_are_not_touched);
    RUN(setting_and_clearing_agree_with_the_model);
    RUN(seeking_agrees_with_the_model);
    RUN(a_scan_in_pieces_finds_what_one_scan_finds);
    RUN(runs_of_63_64_and_65_are_found_at_every_shift);
    RUN(long_runs_across_words_are_found);
    RUN(runs_at_both_ends_are_found);
    RUN(the_first_of_two_runs_is_found);
    RUN(a_run_from_before_the_range_counts);
    RUN(extracting_and_depositing_agree_with_the_model);
    RUN(combining_agrees_with_the_model);
    RUN(the_loops_of_every_instruction_set_agree);
    return check_report("test_bitmap");
}
