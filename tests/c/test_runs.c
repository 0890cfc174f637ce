#include "runs.h"

#include <string.h>

#include "check.h"

#define UNITS 192

static void add(struct runs *set, size_t lo, size_t hi) {
    REQUIRE(runs_grow(set) == 0);
    runs_add(set, lo, hi);
}

static void take_out(struct runs *set, size_t lo, size_t hi) {
    REQUIRE(runs_grow(set) == 0);
    runs_remove(set, lo, hi);
}

/* Whether the set is exactly these runs. */
static bool is(const struct runs *set, const struct run *runs, size_t n) {
    size_t total = 0;
    bool same = set->count == n;
    for (size_t i = 0; same && i < n; i++) {
        same = set->items[i].lo == runs[i].lo && set->items[i].hi == runs[i].hi;
        total += runs[i].hi - runs[i].lo;
    }
    return same && set->total == total;
}

#define IS(set, ...)                                                                               \
    is((set), (const struct run[]){__VA_ARGS__},                                                   \
       sizeof((const struct run[]){__VA_ARGS__}) / sizeof(struct run))

static void zero_bytes_are_an_empty_set(void) {
    struct runs set;
    struct run piece = {7, 7};
    memset(&set, 0, sizeof set);
    CHECK(!runs_contain(&set, 0, 1));
    CHECK(!runs_next(&set, 0, SIZE_MAX, &piece));
    CHECK(piece.lo == 7 && piece.hi == 7);
    CHECK(runs_next_gap(&set, 3, 9, &piece) && piece.lo == 3 && piece.hi == 9);
    runs_remove(&set, 0, SIZE_MAX);
    CHECK(set.count == 0 && set.total == 0 && set.items == NULL);
    runs_clear(&set);
}

static void touching_runs_join(void) {
    struct runs set = {0};
    add(&set, 10, 20);
    add(&set, 30, 40);
    CHECK(IS(&set, {10, 20}, {30, 40}));
    add(&set, 20, 30);
    CHECK(IS(&set, {10, 40}));
    add(&set, 40, 41);
    CHECK(IS(&set, {10, 41}));
    add(&set, 9, 10);
    CHECK(IS(&set, {9, 41}));
    runs_clear(&set);
}

static void one_unit_apart_does_not_join(void) {
    struct runs set = {0};
    add(&set, 10, 20);
    add(&set, 21, 30);
    add(&set, 8, 9);
    CHECK(IS(&set, {8, 9}, {10, 20}, {21, 30}));
    runs_clear(&set);
}

static void a_wide_add_swallows_what_is_inside(void) {
    struct runs set = {0};
    for (size_t i = 0; i < 50; i++)
        add(&set, 10 * i + 5, 10 * i + 10);
    CHECK(set.count == 50 && set.total == 250);
    add(&set, 7, 492);
    CHECK(IS(&set, {5, 492}, {495, 500}));
    runs_clear(&set);
}

static void adding_twice_changes_nothing(void) {
    struct runs set = {0};
    add(&set, 10, 20);
    add(&set, 10, 20);
    add(&set, 12, 18);
    add(&set, 10, 11);
    add(&set, 19, 20);
    CHECK(IS(&set, {10, 20}));
    runs_clear(&set);
}

static void removing_splits_and_trims(void) {
    struct runs set = {0};
    add(&set, 0, 100);
    take_out(&set, 40, 60);
    CHECK(IS(&set, {0, 40}, {60, 100}));
    take_out(&set, 30, 70);
    CHECK(IS(&set, {0, 30}, {70, 100}));
    take_out(&set, 0, 10);
    take_out(&set, 90, 100);
    CHECK(IS(&set, {10, 30}, {70, 90}));
    take_out(&set, 30, 70);
    take_out(&set, 0, 10);
    take_out(&set, 90, SIZE_MAX);
    CHECK(IS(&set, {10, 30}, {70, 90}));
    take_out(&set, 10, 30);
    CHECK(IS(&set, {70, 90}));
    take_out(&set, 0, 1000);
    CHECK(set.count == 0 && set.total == 0);
    runs_clear(&set);
}

static void a_split_finds_room_in_a_full_array(void) {
    struct runs set = {0};
    add(&set, 0, 10);
    size_t lo = 20;
    while (set.count < set.capacity || runs_grow(&set) == 0) {
        if (set.count >= 1000)
            break;
        add(&set, lo, lo + 10);
        lo += 20;
    }
    size_t count = set.count, total = set.total;
    take_out(&set, 4, 6);
    CHECK(set.count == count + 1 && set.total == total - 2);
    CHECK(set.count <= set.capacity);
    CHECK(set.items[0].hi == 4 && set.items[1].lo == 6 && set.items[1].hi == 10);
    runs_clear(&set);
}

static void making_room_leaves_the_set_as_it_is(void) {
    struct runs set = {0};
    for (size_t i = 0; i < 200; i++) {
        struct runs before = set;
        REQUIRE(runs_grow(&set) == 0);
        CHECK(set.count == before.count && set.total == before.total);
        CHECK(set.count < set.capacity);
        for (size_t k = 0; k < set.count; k++)
            CHECK(set.items[k].lo == 3 * k && set.items[k].hi == 3 * k + 1);
        runs_add(&set, 3 * i, 3 * i + 1);
    }
    runs_clear(&set);
}

static void one_run_takes_one_small_array(void) {
    struct runs set = {0};
    add(&set, 0, (size_t)64 << 40);
    CHECK(set.count == 1 && set.capacity <= 4 && set.total == (size_t)64 << 40);
    runs_clear(&set);
}

static void contained_means_within_one_run(void) {
    struct runs set = {0};
    add(&set, 10, 20);
    add(&set, 21, 30);
    CHECK(runs_contain(&set, 10, 20));
    CHECK(runs_contain(&set, 19, 20));
    CHECK(!runs_contain(&set, 9, 20));
    CHECK(!runs_contain(&set, 10, 21));
    CHECK(!runs_contain(&set, 20, 21));
    CHECK(!runs_contain(&set, 10, 30));
    CHECK(runs_contain(&set, 21, 30));
    CHECK(!runs_contain(&set, 30, 31));
    runs_clear(&set);
}

static void next_clips_to_the_range_asked_for(void) {
    struct runs set = {0};
    struct run piece;
    add(&set, 10, 20);
    add(&set, 30, 40);
    CHECK(runs_next(&set, 0, 100, &piece) && piece.lo == 10 && piece.hi == 20);
    CHECK(runs_next(&set, 12, 15, &piece) && piece.lo == 12 && piece.hi == 15);
    CHECK(runs_next(&set, 20, 31, &piece) && piece.lo == 30 && piece.hi == 31);
    CHECK(!runs_next(&set, 20, 30, &piece));
    CHECK(!runs_next(&set, 40, 100, &piece));
    CHECK(runs_next_gap(&set, 0, 100, &piece) && piece.lo == 0 && piece.hi == 10);
    CHECK(runs_next_gap(&set, 10, 100, &piece) && piece.lo == 20 && piece.hi == 30);
    CHECK(runs_next_gap(&set, 25, 27, &piece) && piece.lo == 25 && piece.hi == 27);
    CHECK(runs_next_gap(&set, 35, 100, &piece) && piece.lo == 40 && piece.hi == 100);
    CHECK(!runs_next_gap(&set, 10, 20, &piece));
    CHECK(!runs_next_gap(&set, 35, 40, &piece));
    runs_clear(&set);
}

static void a_walk_may_go_on_at_the_end_of_the_range(void) {
    struct runs set = {0};
    struct run piece;
    add(&set, 10, 20);
    CHECK(!runs_next(&set, 20, 20, &piece));
    CHECK(!runs_next_gap(&set, 20, 20, &piece));
    CHECK(!runs_next_gap(&set, 15, 15, &piece));
    runs_clear(&set);
}

static void the_last_addresses_can_be_held(void) {
    struct runs set = {0};
    struct run piece;
    add(&set, SIZE_MAX - 10, SIZE_MAX);
    CHECK(runs_contain(&set, SIZE_MAX - 1, SIZE_MAX));
    CHECK(runs_next(&set, 0, SIZE_MAX, &piece) && piece.lo == SIZE_MAX - 10);
    CHECK(runs_next_gap(&set, 0, SIZE_MAX, &piece) && piece.hi == SIZE_MAX - 10);
    CHECK(!runs_next_gap(&set, SIZE_MAX - 1, SIZE_MAX, &piece));
    add(&set, 0, SIZE_MAX);
    CHECK(IS(&set, {0, SIZE_MAX}));
    take_out(&set, 1, SIZE_MAX - 1);
    CHECK(IS(&set, {0, 1}, {SIZE_MAX - 1, SIZE_MAX}));
    runs_clear(&set);
}

static void clearing_leaves_an_empty_set_ready_for_use(void) {
    struct runs set = {0};
    add(&set, 10, 20);
    runs_clear(&set);
    CHECK(set.items == NULL && set.count == 0 && set.capacity == 0 && set.total == 0);
    runs_clear(&set);
    add(&set, 30, 40);
    CHECK(IS(&set, {30, 40}));
    runs_clear(&set);
}

static void emptying_keeps_a_small_array(void) {
    struct runs set = {0};
    add(&set, 10, 20);
    add(&set, 30, 40);
    size_t capacity = set.capacity;
    runs_empty(&set);
    CHECK(set.count == 0 && set.total == 0 && set.capacity == capacity && capacity > 0);
    CHECK(!runs_contain(&set, 10, 11));
    runs_add(&set, 5, 6);
    CHECK(IS(&set, {5, 6}));
    for (size_t i = 0; i < 5000; i++)
        add(&set, 10 * i, 10 * i + 1);
    runs_empty(&set);
    CHECK(set.count == 0 && set.total == 0 && set.capacity < 5000);
    runs_clear(&set);
    runs_empty(&set);
    CHECK(set.count == 0 && set.capacity == 0);
}

/* The bounds of the first part of [lo, hi) in the model that equals `value`. */
static bool model_next(const bool *model, size_t lo, size_t hi, bool value, struct run *piece) {
    while (lo < hi && model[lo] != value)
        lo++;
    piece->lo = lo;
    while (lo < hi && model[lo] == value)
        lo++;
    piece->hi = lo;
    return piece->lo < piece->hi;
}

static bool same_as_model(const struct runs *set, const bool *model) {
    size_t n = 0, total = 0;
    struct run piece;
    for (size_t at = 0; model_next(model, at, UNITS, true, &piece); at = piece.hi, n++) {
        if (n >= set->count || set->items[n].lo != piece.lo || set->items[n].hi != piece.hi)
            return false;
        total += piece.hi - piece.lo;
    }
    return n == set->count && total == set->total && set->count <= set->capacity;
}

static void random_operations_agree_with_an_array_of_bools(void) {
    uint64_t seed = 0x9E3779B97F4A7C15;
    for (int round = 0; round < 40; round++) {
        struct runs set = {0};
        bool model[UNITS] = {false};
        /* Short ranges make many runs, long ones few. */
        size_t longest = round % 4 == 0 ? UNITS : 1 + random_below(&seed, 12);
        for (int i = 0; i < 1500; i++) {
            size_t lo = random_below(&seed, UNITS);
            size_t hi = lo + 1 + random_below(&seed, longest);
            if (hi > UNITS)
                hi = UNITS;
            bool in = random_below(&seed, 2) == 0;
            if (in)
                add(&set, lo, hi);
            else
                take_out(&set, lo, hi);
            memset(model + lo, in, hi - lo);
            CHECK(same_as_model(&set, model));

            struct run got = {0}, want = {0};
            lo = random_below(&seed, UNITS);
            hi = lo + 1 + random_below(&seed, UNITS - lo);
            bool all = !model_next(model, lo, hi, false, &want);
            CHECK(runs_contain(&set, lo, hi) == all);
            CHECK(runs_next_gap(&set, lo, hi, &got) == !all);
            CHECK(all || (got.lo == want.lo && got.hi == want.hi));
            bool any = model_next(model, lo, hi, true, &want);
            CHECK(runs_next(&set, lo, hi, &got) == any);
            CHECK(!any || (got.lo == want.lo && got.hi == want.hi));
        }
        runs_clear(&set);
    }
}

int main(void) {
    RUN(zero_bytes_are_an_empty_set);
    RUN(touching_runs_join);
    RUN(one_unit_apart_does_not_join);
    RUN(a_wide_add_swallows_what_is_inside);
    RUN(adding_twice_changes_nothing);
    RUN(removing_splits_and_trims);
    RUN(a_split_finds_room_in_a_full_array);
    RUN(making_room_leaves_the_set_as_it_is);
    RUN(one_run_takes_one_small_array);
    RUN(contained_means_within_one_run);
    RUN(next_clips_to_the_range_asked_for);
    RUN(a_walk_may_go_on_at_the_end_of_the_range);
    RUN(the_last_addresses_can_be_held);
    RUN(clearing_leaves_an_empty_set_ready_for_use);
    RUN(emptying_keeps_a_small_array);
    RUN(random_operations_agree_with_an_array_of_bools);
    return check_report("test_runs");
}
