#define _GNU_SOURCE
#include "region.h"

#include <errno.h>
#include <signal.h>
#include <sys/wait.h>

#include "check.h"
#include "vm.h"
#include "witness.h"

/* The pages of the usual region; also the length of the text that shows them. */
#define PAGES 64

static const int accountings[] = {0, VM_NORESERVE};
#define EACH_ACCOUNTING(accounting)                                                                \
    for (int i_ = 0, accounting; i_ < 2 && (accounting = accountings[i_], true); i_++)

static size_t page;
static char shown[PAGES + 1];

static uintptr_t at(const struct region *region, size_t pages) {
    return (uintptr_t)region->base + pages * page;
}

static volatile unsigned char *byte(const struct region *region, size_t pages) {
    return (volatile unsigned char *)at(region, pages);
}

/* A new region on the heap; NULL, with errno set, if `err` refused to open it. */
static struct region *opened(struct region *region, int err) {
    if (err == 0)
        return region;
    CHECK(region->base == NULL && region_commit(region, 0, page) == REGION_RELEASED);
    region_end(region);
    free(region);
    errno = err;
    return NULL;
}

static struct region *closed(void) {
    struct region *region = calloc(1, sizeof *region);
    REQUIRE(region != NULL);
    return region;
}

static struct region *reserve(size_t size, uintptr_t address, bool exact, size_t align,
                              size_t guard, int accounting, int advice, const char *name) {
    struct region_options wish = {.address = address, .exact = exact, .align = align, .guard = guard};
    struct region *region = closed();
    if (name != NULL)
        (void)snprintf(wish.name, sizeof wish.name, "%s", name);
    return opened(region, region_reserve(region, size, accounting, advice, &wish));
}

static struct region *open_window(uintptr_t address, size_t size, int accounting, int advice) {
    struct region *region = closed();
    return opened(region, region_window(region, address, size, accounting, advice, NULL));
}

static void end(struct region *region) {
    if (region != NULL)
        region_end(region);
    free(region);
}

static struct region *reserved(size_t pages, int accounting) {
    struct region *region = closed();
    REQUIRE(region_reserve(region, pages * page, accounting, 0, NULL) == 0);
    return region;
}

/* A free address with much free space around it: the kernel places no other mapping there. */
static uintptr_t free_place(void) {
    uintptr_t address = 0;
    size_t wide = (size_t)1 << 36;
    REQUIRE(vm_map(0, wide, VM_RESERVED | VM_NORESERVE, &address) == 0);
    REQUIRE(vm_release(address, wide) == 0);
    return address + wide / 2;
}

static struct region *window(size_t pages, int accounting) {
    struct region *region = open_window(free_place(), pages * page, accounting, 0);
    REQUIRE(region != NULL);
    return region;
}

static bool orderly(const struct runs *set) {
    size_t total = 0, least = 0;
    for (size_t i = 0; i < set->count; i++) {
        if (set->items[i].lo >= set->items[i].hi || (i > 0 && set->items[i].lo <= least))
            return false;
        least = set->items[i].hi;
        total += set->items[i].hi - set->items[i].lo;
    }
    return total == set->total;
}

/* Whether the books are consistent and agree with the kernel. */
static bool books_are_true(const struct region *region) {
    size_t n = region->size / page;
    if (n > PAGES || !orderly(&region->reserved) || !orderly(&region->committed))
        return false;
    (void)witness_pages((uintptr_t)region->base, region->size, shown);
    for (size_t i = 0; i < n; i++) {
        bool owned = runs_contain(&region->reserved, i * page, (i + 1) * page);
        bool open = runs_contain(&region->committed, i * page, (i + 1) * page);
        if (shown[i] != (open ? 'w' : owned ? '-' : '.'))
            return false;
    }
    return true;
}

/* Whether the kernel shows exactly these pages, and the books agree. */
static bool shows(const struct region *region, const char *pages) {
    return books_are_true(region) && strcmp(shown, pages) == 0;
}

static bool commit(struct region *region, size_t from, size_t n) {
    return region_commit(region, from * page, n * page) == 0;
}

static bool decommit(struct region *region, size_t from, size_t n) {
    return region_decommit(region, from * page, n * page) == 0;
}

/* The signal that ends a child which writes to `address`; 0 if it survives. */
static int signal_on_write(uintptr_t address) {
    int status = 0;
    (void)fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        (void)signal(SIGSEGV, SIG_DFL);
        *(volatile unsigned char *)address = 1;
        _exit(0);
    }
    REQUIRE(child > 0 && waitpid(child, &status, 0) == child);
    return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

/* ---- reserving */

static void a_new_region_owns_its_span_and_has_nothing_committed(void) {
    EACH_ACCOUNTING(accounting) {
        size_t before = witness_status("VmSize:");
        struct region *region = reserved(4, accounting);
        CHECK(region->size == 4 * page && region->page == page && region->guard == 0);
        CHECK(region->accounting == accounting && !region->sealed);
        CHECK(region->reserved.total == 4 * page && region->committed.total == 0);
        CHECK(shows(region, "----"));
        CHECK(witness_status("VmSize:") == before + 4 * page);
        CHECK(signal_on_write(at(region, 0)) == SIGSEGV);
        end(region);
        CHECK(witness_status("VmSize:") == before);
    }
}

static void a_tebibyte_is_addresses_only(void) {
    size_t size = (size_t)1 << 40;
    EACH_ACCOUNTING(accounting) {
        size_t resident = witness_status("VmRSS:");
        struct region *region = reserve(size, 0, false, 0, 0, accounting, 0, NULL);
        REQUIRE(region != NULL);
        CHECK(region_commit(region, size - page, page) == 0);
        byte(region, size / page - 1)[page - 1] = 1;
        CHECK(region->committed.total == page);
        CHECK(witness_status("VmRSS:") < resident + ((size_t)1 << 20));
        end(region);
    }
}

static void a_free_address_is_taken_as_hint_and_exactly(void) {
    uintptr_t place = free_place();
    struct region *region = reserve(2 * page, place, false, 0, 0, 0, 0, NULL);
    CHECK(region != NULL && (uintptr_t)region->base == place);
    end(region);
    region = reserve(2 * page, place, true, 0, 0, 0, 0, NULL);
    CHECK(region != NULL && (uintptr_t)region->base == place);
    end(region);
    region = reserve(2 * page, place, true, 0, page, 0, 0, NULL);
    CHECK(region != NULL && (uintptr_t)region->base == place);
    CHECK(witness_all(place - page, 4 * page, '-'));
    end(region);
    CHECK(witness_all(place - page, 4 * page, '.'));
}

static void a_taken_address_leads_elsewhere_unless_exact(void) {
    struct region *first = reserved(2, 0);
    REQUIRE(commit(first, 0, 2));
    byte(first, 0)[0] = 42;
    struct region *second =
        reserve(2 * page, (uintptr_t)first->base, false, 0, 0, 0, 0, NULL);
    CHECK(second != NULL && second->base != first->base);
    CHECK(byte(first, 0)[0] == 42 && shows(first, "ww"));
    end(second);
    end(first);
}

static void an_exact_reserve_overwrites_nothing(void) {
    uintptr_t place = free_place();
    REQUIRE(vm_map_at(place + 3 * page, page, VM_COMMITTED) == 0);
    *(volatile unsigned char *)(place + 3 * page) = 42;
    size_t before = witness_status("VmSize:");
    for (size_t first = 0; first <= 3; first++) {
        errno = 0;
        CHECK(reserve(4 * page, place + first * page, true, 0, 0, 0, 0, NULL) == NULL);
        CHECK(errno == EEXIST);
    }
    errno = 0;
    CHECK(reserve(2 * page, place + page, true, 0, page, 0, 0, NULL) == NULL);
    CHECK(errno == EEXIST);
    CHECK(witness_status("VmSize:") == before);
    CHECK(strcmp(witness_pages(place, 8 * page, shown), "...w....") == 0);
    CHECK(*(volatile unsigned char *)(place + 3 * page) == 42);
    CHECK(vm_release(place + 3 * page, page) == 0);
}

static void the_base_is_aligned_and_the_rest_given_back(void) {
    for (size_t align = 2 * page; align <= (size_t)1 << 34; align *= 2)
        for (size_t guard = 0; guard <= 3 * page; guard += 3 * page) {
            size_t before = witness_status("VmSize:");
            struct region *region = reserve(5 * page, 0, false, align, guard, 0, 0, NULL);
            REQUIRE(region != NULL);
            CHECK(((uintptr_t)region->base & (align - 1)) == 0);
            CHECK(witness_status("VmSize:") == before + 5 * page + 2 * guard);
            CHECK(witness_all((uintptr_t)region->base - guard, 5 * page + 2 * guard, '-'));
            end(region);
            CHECK(witness_status("VmSize:") == before);
        }
}

static struct region *reserve_below(size_t size, size_t align, size_t lead, size_t guard) {
    struct region_options wish = {.align = align, .lead = lead, .guard = guard};
    struct region *region = closed();
    return opened(region, region_reserve(region, size, 0, 0, &wish));
}

static void a_lead_puts_the_base_below_an_aligned_address(void) {
    const size_t guards[] = {0, page, 3 * page};
    for (size_t align = page; align <= (size_t)1 << 30; align *= 4)
        for (size_t lead = page; lead <= 16 * page; lead *= 4)
            for (size_t i = 0; i < 3; i++) {
                size_t before = witness_status("VmSize:"), guard = guards[i];
                struct region *region = reserve_below(5 * page, align, lead, guard);
                REQUIRE(region != NULL);
                CHECK((((uintptr_t)region->base + lead) & (align - 1)) == 0);
                CHECK(witness_status("VmSize:") == before + 5 * page + 2 * guard);
                CHECK(witness_all((uintptr_t)region->base - guard, 5 * page + 2 * guard, '-'));
                end(region);
                CHECK(witness_status("VmSize:") == before);
            }
}

static void a_lead_counts_modulo_the_alignment(void) {
    size_t align = 64 * page;
    struct region *region = reserve_below(page, align, (size_t)0 - page, page);
    CHECK(region != NULL && (((uintptr_t)region->base - page) & (align - 1)) == 0);
    end(region);
    region = reserve_below(page, align, align, 0);
    CHECK(region != NULL && ((uintptr_t)region->base & (align - 1)) == 0);
    end(region);
    region = reserve_below(page, 0, page, 0);
    CHECK(region != NULL);
    end(region);
    errno = 0;
    CHECK(reserve_below(page, align, page - 1, 0) == NULL && errno == REGION_MISALIGNED);
    CHECK(reserve_below(SIZE_MAX / page * page, align, page, 0) == NULL && errno == ENOMEM);
    CHECK(reserve_below(page, SIZE_MAX / 2 + 1, page, 0) == NULL && errno == ENOMEM);
}

/* Such a region is tried below the mapping above it: with and without another region there. */
static void regions_of_whole_alignments_in_a_row_are_aligned(void) {
    size_t align = (size_t)1 << 21, before = witness_status("VmSize:");
    struct region *regions[6];
    uintptr_t between[6];
    for (size_t i = 0; i < 6; i++) {
        regions[i] = reserve_below(2 * align, align, 16 * page, 0);
        REQUIRE(regions[i] != NULL);
        CHECK((((uintptr_t)regions[i]->base + 16 * page) & (align - 1)) == 0);
        CHECK(witness_all((uintptr_t)regions[i]->base, 2 * align, '-'));
        CHECK(witness_status("VmSize:") == before + (i + 1) * 2 * align + i / 2 * (align + page));
        between[i] = 0;
        if (i % 2 == 1)
            CHECK(vm_map(0, align + page, VM_RESERVED, &between[i]) == 0);
    }
    for (size_t i = 0; i < 6; i++) {
        end(regions[i]);
        if (between[i] != 0)
            CHECK(vm_release(between[i], align + page) == 0);
    }
    CHECK(witness_status("VmSize:") == before);
}

static void an_aligned_hint_is_kept(void) {
    size_t align = (size_t)1 << 21;
    uintptr_t place = free_place() & ~(align - 1);
    struct region *region = reserve(page, place, false, align, 2 * page, 0, 0, NULL);
    CHECK(region != NULL && (uintptr_t)region->base == place);
    end(region);
    region = reserve(page, place + page, false, align, 0, 0, 0, NULL);
    CHECK(region != NULL && ((uintptr_t)region->base & (align - 1)) == 0);
    end(region);
}

static void guards_are_never_accessible(void) {
    EACH_ACCOUNTING(accounting) {
        size_t before = witness_status("VmSize:");
        struct region *region = reserve(4 * page, 0, false, 0, 2 * page, accounting, 0, NULL);
        REQUIRE(region != NULL);
        CHECK(witness_status("VmSize:") == before + 8 * page);
        CHECK(commit(region, 0, 4));
        CHECK(strcmp(witness_pages(at(region, 0) - 2 * page, 8 * page, shown), "--wwww--") == 0);
        CHECK(signal_on_write(at(region, 0)) == 0);
        CHECK(signal_on_write(at(region, 0) - 1) == SIGSEGV);
        CHECK(signal_on_write(at(region, 4)) == SIGSEGV);
        CHECK(region_commit(region, 0, 5 * page) == REGION_OUTSIDE);
        CHECK(region_commit(region, (size_t)0 - page, 2 * page) == REGION_OUTSIDE);
        CHECK(decommit(region, 0, 4));
        CHECK(witness_all(at(region, 0) - 2 * page, 8 * page, '-'));
        CHECK(region_release(region) == 0);
        CHECK(witness_status("VmSize:") == before);
        end(region);
    }
}

/* Whether a reserve with these arguments is refused with `err`, and leaves no mapping. */
static bool refused(int err, size_t size, uintptr_t address, bool exact, size_t align, size_t guard) {
    size_t before = witness_status("VmSize:"), lines = witness_lines();
    errno = 0;
    return reserve(size, address, exact, align, guard, 0, 0, "refused") == NULL &&
           errno == err && witness_status("VmSize:") == before && witness_lines() == lines;
}

static void what_does_not_fit_the_addresses_is_refused_with_enomem(void) {
    size_t most = SIZE_MAX / page * page, half = SIZE_MAX / 2 / page * page;
    CHECK(refused(ENOMEM, most, 0, false, 0, 0));
    CHECK(refused(ENOMEM, half, 0, false, 0, 0));
    CHECK(refused(ENOMEM, most, 0, false, 0, page));
    CHECK(refused(ENOMEM, page, 0, false, 0, most));
    CHECK(refused(ENOMEM, page, 0, false, 0, half));
    CHECK(refused(ENOMEM, half, 0, false, 0, half));
    CHECK(refused(ENOMEM, page, 0, false, half + page, 0));
    CHECK(refused(ENOMEM, page, most, true, 0, 0));
    CHECK(refused(EINVAL, page, page, true, 0, page));
    CHECK(refused(EINVAL, page, 0, true, 0, 0));
}

static void a_refused_reserve_leaves_nothing(void) {
    /* The second round counts lines after the allocator has its memory. */
    for (int round = 0; round < 2; round++) {
        size_t lines = witness_lines(), before = witness_status("VmSize:");
        REQUIRE(limit_addresses((size_t)64 << 20));
        struct region *too_big =
            reserve((size_t)128 << 20, 0, false, 0, 0, 0, VM_NO_DUMP, "big");
        int err = errno;
        /* 48 MiB fit; 48 MiB plus the alignment do not. */
        struct region *too_aligned =
            reserve((size_t)48 << 20, 0, false, (size_t)1 << 34, page, 0, 0, "aligned");
        int second = errno;
        REQUIRE(unlimit(RLIMIT_AS));
        CHECK(too_big == NULL && err == ENOMEM);
        CHECK(too_aligned == NULL && second == ENOMEM);
        CHECK(round == 0 || witness_lines() == lines);
        CHECK(round == 0 || witness_status("VmSize:") == before);
    }
}

static void refused_advice_refuses_the_reserve(void) {
    int advice = 0;
    uintptr_t probe = 0;
    REQUIRE(vm_map(0, page, VM_RESERVED, &probe) == 0);
    if (vm_advise(probe, page, VM_HUGE_PREFER) != 0)
        advice = VM_HUGE_PREFER;
    else if (vm_advise(probe, page, VM_WIPE_ON_FORK) != 0)
        advice = VM_WIPE_ON_FORK;
    CHECK(vm_release(probe, page) == 0);
    if (advice == 0) {
        SKIP("this kernel takes every advice");
        return;
    }
    size_t before = witness_status("VmSize:");
    CHECK(reserve(page, 0, false, 0, page, 0, advice, NULL) == NULL && errno == EINVAL);
    CHECK(witness_status("VmSize:") == before);
    struct region *region = window(4, 0);
    region->advice = advice;
    CHECK(region_claim(region, 0, page, VM_COMMITTED) == EINVAL);
    CHECK(shows(region, "...."));
    end(region);
}

/* ---- committing */

static void commit_and_decommit_are_idempotent_and_exact(void) {
    EACH_ACCOUNTING(accounting) {
        struct region *region = reserved(16, accounting);
        CHECK(commit(region, 4, 4) && region->committed.total == 4 * page);
        CHECK(shows(region, "----wwww--------"));
        CHECK(commit(region, 4, 4) && region->committed.total == 4 * page);
        CHECK(commit(region, 5, 1) && region->committed.total == 4 * page);
        CHECK(commit(region, 2, 4) && region->committed.total == 6 * page);
        CHECK(commit(region, 7, 3) && region->committed.total == 8 * page);
        CHECK(shows(region, "--wwwwwwww------"));
        CHECK(decommit(region, 12, 4) && region->committed.total == 8 * page);
        CHECK(decommit(region, 4, 2) && region->committed.total == 6 * page);
        CHECK(decommit(region, 4, 2) && region->committed.total == 6 * page);
        CHECK(shows(region, "--ww--wwww------"));
        CHECK(decommit(region, 3, 4) && region->committed.total == 4 * page);
        CHECK(shows(region, "--w----www------"));
        CHECK(commit(region, 0, 16) && region->committed.total == 16 * page);
        CHECK(shows(region, "wwwwwwwwwwwwwwww"));
        CHECK(decommit(region, 0, 16) && region->committed.total == 0);
        CHECK(shows(region, "----------------"));
        CHECK(region->reserved.total == 16 * page);
        end(region);
    }
}

static void committed_again_is_zero_and_what_was_stays(void) {
    EACH_ACCOUNTING(accounting) {
        struct region *region = reserved(4, accounting);
        REQUIRE(commit(region, 0, 4));
        memset(region->base, 42, 4 * page);
        REQUIRE(decommit(region, 1, 2));
        CHECK(witness_resident(at(region, 1), 2 * page) == 0);
        CHECK(signal_on_write(at(region, 1)) == SIGSEGV);
        REQUIRE(commit(region, 0, 4));
        CHECK(byte(region, 0)[page - 1] == 42 && byte(region, 3)[0] == 42);
        CHECK(byte(region, 1)[0] == 0 && byte(region, 2)[page - 1] == 0);
        end(region);
    }
}

static void decommitting_gives_the_charge_back(void) {
    struct region *region = reserved(4, 0);
    REQUIRE(commit(region, 0, 4));
    memset(region->base, 42, 4 * page);
    CHECK(witness_flag(at(region, 1), "ac"));
    REQUIRE(decommit(region, 1, 2));
    CHECK(!witness_flag(at(region, 1), "ac") && !witness_flag(at(region, 2), "ac"));
    CHECK(witness_flag(at(region, 0), "ac") && witness_flag(at(region, 3), "ac"));
    end(region);
    if (!witness_honours_noreserve())
        return;
    region = reserved(4, VM_NORESERVE);
    REQUIRE(commit(region, 0, 4));
    CHECK(!witness_flag(at(region, 0), "ac"));
    end(region);
}

static void random_commits_agree_with_a_model_and_the_kernel(void) {
    uint64_t seed = 0xD1B54A32D192ED03;
    EACH_ACCOUNTING(accounting) {
        struct region *region = reserved(PAGES, accounting);
        unsigned char stamps[PAGES];
        char model[PAGES + 1];
        memset(model, '-', PAGES);
        memset(stamps, 0, PAGES);
        model[PAGES] = '\0';
        for (int i = 0; i < 1500; i++) {
            size_t from = random_below(&seed, PAGES);
            size_t n = 1 + random_below(&seed, i % 5 == 0 ? PAGES - from : 4);
            if (n > PAGES - from)
                n = PAGES - from;
            bool open = random_below(&seed, 2) == 0;
            CHECK(open ? commit(region, from, n) : decommit(region, from, n));
            memset(model + from, open ? 'w' : '-', n);
            if (!open)
                memset(stamps + from, 0, n);
            size_t total = 0;
            for (size_t k = 0; k < PAGES; k++)
                total += model[k] == 'w' ? page : 0;
            CHECK(region->committed.total == total);
            CHECK(shows(region, model));
            bool kept = true;
            for (size_t k = 0; k < PAGES; k++)
                kept = kept && (model[k] != 'w' || *byte(region, k) == stamps[k]);
            CHECK(kept);
            size_t k = random_below(&seed, PAGES);
            if (model[k] == 'w')
                *byte(region, k) = stamps[k] = (unsigned char)random_next(&seed);
            CHECK(region_is_committed(region, k * page, page) == (model[k] == 'w'));
        }
        end(region);
    }
}

/* Commits the pages of "w" in `pages`. */
static void commit_like(struct region *region, const char *pages) {
    for (size_t i = 0; pages[i] != '\0'; i++)
        if (pages[i] == 'w')
            REQUIRE(commit(region, i, 1));
}

static void a_refused_commit_leaves_the_region_as_it_was(void) {
    static const char pages[] = "--w--w---w------";
    EACH_ACCOUNTING(accounting) {
        struct region *region = reserved(16, accounting);
        commit_like(region, pages);
        *byte(region, 2) = *byte(region, 5) = 42;
        /* The gaps before the limit are opened, in this order, before the kernel refuses. */
        for (size_t more = 0; more < 13; more++) {
            REQUIRE(limit_data(more * page));
            int err = region_commit(region, 0, 16 * page);
            REQUIRE(unlimit(RLIMIT_DATA));
            CHECK(err == ENOMEM);
            CHECK(region->committed.total == 3 * page && region->committed.count == 3);
            CHECK(shows(region, pages));
            CHECK(*byte(region, 2) == 42 && *byte(region, 5) == 42 && *byte(region, 9) == 0);
        }
        REQUIRE(limit_data(13 * page));
        int err = region_commit(region, 0, 16 * page);
        REQUIRE(unlimit(RLIMIT_DATA));
        CHECK(err == 0 && shows(region, "wwwwwwwwwwwwwwww"));
        CHECK(*byte(region, 2) == 42 && *byte(region, 5) == 42);
        end(region);
    }
}

static void a_refused_commit_refunds_untouched_neighbours(void) {
    /* Guards keep the gaps at both ends from merging with other mappings. */
    struct region *region = reserve(16 * page, 0, false, 0, page, 0, 0, NULL);
    REQUIRE(region != NULL);
    commit_like(region, "--w--w---w------");
    REQUIRE(limit_data(3 * page));
    int err = region_commit(region, 0, 16 * page);
    REQUIRE(unlimit(RLIMIT_DATA));
    CHECK(err == ENOMEM);
    for (size_t i = 0; i < 16; i++)
        CHECK(witness_flag(at(region, i), "ac") == (i == 2 || i == 5 || i == 9));
    end(region);
}

static void a_refused_decommit_leaves_the_region_as_it_was(void) {
    if (vm_try_seal() != 0) {
        SKIP("no mseal here to refuse with");
        return;
    }
    EACH_ACCOUNTING(accounting) {
        struct region *region = reserved(8, accounting);
        REQUIRE(commit(region, 1, 2) && commit(region, 4, 3));
        memset((void *)at(region, 1), 42, 2 * page);
        REQUIRE(vm_seal(at(region, 5), page) == 0);
        CHECK(region_decommit(region, 0, 8 * page) == EPERM);
        CHECK(region->committed.total == 5 * page);
        CHECK(shows(region, "-ww-www-"));
        CHECK(*byte(region, 1) == 42 && *byte(region, 2) == 42);
        end(region);
    }
}

/* ---- refused ranges */

typedef int verb(struct region *, size_t, size_t);

static int discard(struct region *region, size_t offset, size_t length) {
    return region_discard(region, offset, length, false);
}

static int discard_lazily(struct region *region, size_t offset, size_t length) {
    return region_discard(region, offset, length, true);
}

static int claim(struct region *region, size_t offset, size_t length) {
    return region_claim(region, offset, length, VM_RESERVED);
}

static verb *const verbs[] = {region_commit, region_decommit,  region_populate, discard,
                              discard_lazily, region_disclaim, claim};
#define VERBS (sizeof verbs / sizeof verbs[0])

static void wrong_ranges_are_told_apart_without_overflow(void) {
    size_t last = SIZE_MAX / page * page;
    struct region *region = reserved(8, 0);
    REQUIRE(commit(region, 0, 8));
    for (size_t i = 0; i < VERBS; i++) {
        CHECK(verbs[i](region, 0, 0) == REGION_OUTSIDE);
        CHECK(verbs[i](region, 0, 9 * page) == REGION_OUTSIDE);
        CHECK(verbs[i](region, 8 * page, page) == REGION_OUTSIDE);
        CHECK(verbs[i](region, 7 * page, 2 * page) == REGION_OUTSIDE);
        CHECK(verbs[i](region, 9 * page, page) == REGION_OUTSIDE);
        CHECK(verbs[i](region, last, page) == REGION_OUTSIDE);
        CHECK(verbs[i](region, last, 2 * page) == REGION_OUTSIDE);
        CHECK(verbs[i](region, page, last) == REGION_OUTSIDE);
        CHECK(verbs[i](region, 0, last) == REGION_OUTSIDE);
        CHECK(verbs[i](region, SIZE_MAX, SIZE_MAX) == REGION_OUTSIDE);
        CHECK(verbs[i](region, 1, page) == REGION_MISALIGNED);
        CHECK(verbs[i](region, page, 1) == REGION_MISALIGNED);
        CHECK(verbs[i](region, page / 2, page / 2) == REGION_MISALIGNED);
    }
    CHECK(shows(region, "wwwwwwww"));
    end(region);
}

static void only_committed_bytes_are_populated_and_discarded(void) {
    EACH_ACCOUNTING(accounting) {
        struct region *region = reserved(4, accounting);
        REQUIRE(commit(region, 1, 2));
        CHECK(region_populate(region, 0, 2 * page) == REGION_NOT_COMMITTED);
        CHECK(region_populate(region, 2 * page, 2 * page) == REGION_NOT_COMMITTED);
        CHECK(region_discard(region, 0, 4 * page, false) == REGION_NOT_COMMITTED);
        CHECK(region_discard(region, 0, page, true) == REGION_NOT_COMMITTED);
        CHECK(witness_resident(at(region, 0), 4 * page) == 0);
        CHECK(region_populate(region, page, 2 * page) == 0);
        CHECK(witness_resident(at(region, 1), 2 * page) == 2);
        *byte(region, 1) = 42;
        CHECK(region_discard(region, page, 2 * page, false) == 0);
        CHECK(witness_resident(at(region, 1), 2 * page) == 0);
        CHECK(*byte(region, 1) == 0);
        *byte(region, 1) = 42;
        CHECK(region_discard(region, page, 2 * page, true) == 0);
        CHECK(*byte(region, 1) == 42 || *byte(region, 1) == 0);
        CHECK(shows(region, "-ww-") && region->committed.total == 2 * page);
        end(region);
    }
}

static void is_committed_takes_any_alignment(void) {
    struct region *region = reserved(8, 0);
    REQUIRE(commit(region, 2, 2));
    CHECK(region_is_committed(region, 2 * page, 2 * page) == 1);
    CHECK(region_is_committed(region, 2 * page + 1, 1) == 1);
    CHECK(region_is_committed(region, 4 * page - 1, 1) == 1);
    CHECK(region_is_committed(region, 4 * page - 1, 2) == 0);
    CHECK(region_is_committed(region, 2 * page - 1, 2) == 0);
    CHECK(region_is_committed(region, 2 * page, 0) == 0);
    CHECK(region_is_committed(region, 8 * page, 1) == 0);
    CHECK(region_is_committed(region, 3 * page, SIZE_MAX) == 0);
    CHECK(region_is_committed(region, SIZE_MAX, 3 * page) == 0);
    CHECK(region_is_committed(region, 0, 8 * page) == 0);
    REQUIRE(commit(region, 0, 8));
    CHECK(region_is_committed(region, 0, 8 * page) == 1);
    CHECK(region_is_committed(region, 7 * page, page + 1) == 0);
    end(region);
}

static void cells_end_with_guards_that_a_decommit_removes(void) {
    EACH_ACCOUNTING(accounting) {
        struct region *region = reserved(9, accounting);
        REQUIRE(commit(region, 0, 9));
        CHECK(region_guard_cells(region, 0, 1) == REGION_OUTSIDE);
        CHECK(region_set_cells(region, 3 * page, 1) == REGION_MISALIGNED);
        CHECK(region_set_cells(region, page, page) == REGION_OUTSIDE);
        CHECK(region_set_cells(region, 3 * page, 0) == REGION_OUTSIDE);
        CHECK(region_set_cells(region, 3 * page, page) == 0);
        CHECK(region_guard_cells(region, 1, 1) == REGION_OUTSIDE);
        CHECK(region_guard_cells(region, 0, 4) == REGION_OUTSIDE);
        *byte(region, 4) = 42;
        int err = region_guard_cells(region, 0, 3);
        CHECK(err == vm_try_guard());
        if (err == 0) {
            CHECK(shows(region, "wwwwwwwww"));
            for (size_t cell = 0; cell < 3; cell++)
                CHECK(signal_on_write(at(region, 3 * cell + 2)) == SIGSEGV);
            CHECK(region_guard_cells(region, 1, 2) == 0); /* again */
            CHECK(region_discard(region, 0, 3 * page, false) == 0);
            CHECK(signal_on_write(at(region, 2)) == SIGSEGV);
            CHECK(decommit(region, 3, 3));
            CHECK(region_guard_cells(region, 0, 3) == REGION_NOT_COMMITTED);
            CHECK(commit(region, 3, 3) && region_guard_cells(region, 1, 2) == 0);
            CHECK(signal_on_write(at(region, 5)) == SIGSEGV && *byte(region, 4) == 0);
        }
        end(region);
    }
}

static void viewed_is_set_by_an_export_and_by_the_end(void) {
    struct region *region = reserved(4, 0);
    REQUIRE(commit(region, 0, 2));
    CHECK(!region->viewed);
    CHECK(region_export(region, 3 * page, page) == REGION_NOT_COMMITTED && region->viewed);
    region->viewed = false;
    CHECK(region_export(region, 0, page) == 1 && region->viewed);
    region->viewed = false;
    CHECK(region_release(region) == 0 && region->viewed);
    CHECK(region_reserve(region, 4 * page, 0, 0, NULL) == 0 && !region->viewed);
    region_retire(region);
    CHECK(region->viewed);
    end(region);
}

static void guards_are_not_exported(void) {
    struct region *region = reserved(8, 0);
    REQUIRE(commit(region, 0, 7));
    CHECK(region_export(region, 0, 7 * page) == 1);
    CHECK(region_export(region, 0, 8 * page) == REGION_NOT_COMMITTED);
    REQUIRE(region_set_cells(region, 3 * page, page) == 0);
    CHECK(region_export(region, 0, 2 * page) == 1);
    CHECK(region_export(region, 4 * page, page) == 1);
    CHECK(region_export(region, 0, 2 * page + 1) == REGION_GUARDED);
    CHECK(region_export(region, 2 * page, 1) == REGION_GUARDED);
    CHECK(region_export(region, 3 * page - 1, 2) == REGION_GUARDED);
    CHECK(region_export(region, 0, 4 * page) == REGION_GUARDED);
    CHECK(region_release(region) == 0);
    CHECK(region_export(region, 0, page) == REGION_RELEASED);
    CHECK(region_set_cells(region, 3 * page, page) == REGION_RELEASED);
    CHECK(region_guard_cells(region, 0, 1) == REGION_RELEASED);
    end(region);
}

/* ---- sliding */

/* The byte that the tests below store `i` bytes behind the front. */
static char mark(size_t i) {
    return (char)(i * 31 + i / page * 7 + 1);
}

static void mark_from(struct region *region, size_t front, size_t length) {
    for (size_t i = 0; i < length; i++)
        region->base[front + i] = mark(i);
}

static bool is_marked(const struct region *region, size_t front, size_t length) {
    for (size_t i = 0; i < length; i++)
        if (region->base[front + i] != mark(i))
            return false;
    return true;
}

static void a_slide_moves_all_bytes_to_the_start(void) {
    size_t fronts[] = {0, 1, page - 1, page, 2 * page + 5, 9 * page};
    size_t lengths[] = {1, page - 1, page, page + 1, 5 * page + 77};
    EACH_ACCOUNTING(accounting)
        for (size_t f = 0; f < 6; f++)
            for (size_t n = 0; n < 5; n++) {
                size_t front = fronts[f], length = lengths[n];
                struct region *region = reserved(16, accounting);
                size_t first = front / page, pages = (front + length + page - 1) / page - first;
                REQUIRE(commit(region, first, pages));
                mark_from(region, front, length);
                CHECK(region_slide(region, &front, length) == 0);
                CHECK(front == 0 && is_marked(region, 0, length));
                CHECK(region_is_committed(region, 0, length) == 1);
                CHECK(region_is_committed(region, first * page, pages * page) == 1);
                end(region);
            }
}

static void a_slide_leaves_no_memory_behind(void) {
    size_t length = (size_t)8 << 20, front = length + page;
    struct region *region = closed();
    REQUIRE(region_reserve(region, 4 * length, 0, 0, NULL) == 0);
    REQUIRE(region_commit(region, front, length) == 0);
    mark_from(region, front, length);
    CHECK(region_slide(region, &front, length) == 0);
    CHECK(is_marked(region, 0, length));
    CHECK(witness_resident(at(region, 0), 4 * length) == (long)(length / page));
    end(region);
}

static void a_refused_slide_moves_nothing(void) {
    EACH_ACCOUNTING(accounting) {
        struct region *region = reserved(16, accounting);
        size_t front = 4 * page + 3, length = 6 * page;
        REQUIRE(commit(region, 4, 7));
        mark_from(region, front, length);
        REQUIRE(limit_data(3 * page));
        int err = region_slide(region, &front, length);
        REQUIRE(unlimit(RLIMIT_DATA));
        CHECK(err == ENOMEM && front == 4 * page + 3);
        CHECK(shows(region, "----wwwwwww-----") && is_marked(region, front, length));

        length += page;
        CHECK(region_slide(region, &front, length) == REGION_NOT_COMMITTED);
        CHECK(region_slide(region, &front, 0) == REGION_NOT_COMMITTED);
        CHECK(region_slide(region, &front, SIZE_MAX) == REGION_NOT_COMMITTED);
        CHECK(front == 4 * page + 3 && is_marked(region, front, 6 * page));
        region_retire(region);
        CHECK(region_slide(region, &front, page) == REGION_RELEASED);
        end(region);
    }
}

static void a_released_region_says_so(void) {
    struct region *region = reserved(4, 0);
    uintptr_t address = 7;
    REQUIRE(commit(region, 1, 2));
    CHECK(region_release(region) == 0);
    CHECK(region->base == NULL && region->reserved.total == 0 && region->committed.total == 0);
    for (size_t i = 0; i < VERBS; i++) {
        CHECK(verbs[i](region, 0, page) == REGION_RELEASED);
        CHECK(verbs[i](region, 1, 0) == REGION_RELEASED);
    }
    CHECK(region_claim_near(region, 0, 0, page, VM_RESERVED, &address) == REGION_RELEASED);
    CHECK(address == 7);
    CHECK(region_is_committed(region, 0, page) == REGION_RELEASED);
    CHECK(region_seal(region) == REGION_RELEASED);
    CHECK(region_release(region) == REGION_RELEASED);
    end(region);
}

/* ---- windows */

static void a_window_maps_and_owns_nothing(void) {
    size_t before = witness_status("VmSize:");
    struct region *region = window(8, 0);
    CHECK(region->reserved.total == 0 && region->committed.total == 0 && region->guard == 0);
    CHECK(shows(region, "........"));
    CHECK(witness_status("VmSize:") == before);
    CHECK(region_commit(region, 0, page) == REGION_NOT_RESERVED);
    CHECK(region_decommit(region, 0, 8 * page) == REGION_NOT_RESERVED);
    CHECK(region_disclaim(region, 0, page) == REGION_NOT_RESERVED);
    CHECK(region_seal(region) == REGION_NOT_RESERVED);
    CHECK(region_release(region) == 0);
    end(region);
}

static void a_window_must_be_a_range_of_addresses(void) {
    static const struct {
        uintptr_t address, size;
    } wrong[] = {{0, 1 << 20}, {1 << 20, 0}, {(1 << 20) + 1, 1 << 20}, {1 << 20, 1},
                 {UINTPTR_MAX - 0xffffff, 1 << 24}};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        errno = 0;
        CHECK(open_window(wrong[i].address, wrong[i].size, 0, 0) == NULL);
        CHECK(errno == EINVAL);
    }
}

static void a_window_claims_exact_pieces(void) {
    EACH_ACCOUNTING(accounting) {
        struct region *region = window(16, accounting);
        CHECK(region_claim(region, 2 * page, 2 * page, VM_RESERVED) == 0);
        CHECK(region_claim(region, 8 * page, 3 * page, VM_COMMITTED) == 0);
        CHECK(shows(region, "..--....www....."));
        CHECK(region->reserved.total == 5 * page && region->committed.total == 3 * page);
        CHECK(region_claim(region, 4 * page, 4 * page, VM_RESERVED) == 0);
        CHECK(region->reserved.count == 1);
        CHECK(region_commit(region, 0, 4 * page) == REGION_NOT_RESERVED);
        CHECK(region_commit(region, 10 * page, 2 * page) == REGION_NOT_RESERVED);
        CHECK(commit(region, 3, 6));
        CHECK(shows(region, "..-wwwwwwww....."));
        CHECK(decommit(region, 7, 3));
        CHECK(shows(region, "..-wwww---w....."));
        *byte(region, 10) = 42;
        CHECK(*byte(region, 10) == 42);
        end(region);
    }
}

static void a_claim_replaces_nothing(void) {
    struct region *region = window(8, 0);
    REQUIRE(region_claim(region, 2 * page, 2 * page, VM_COMMITTED) == 0);
    *byte(region, 3) = 42;
    REQUIRE(vm_map_at(at(region, 6), page, VM_COMMITTED) == 0);
    CHECK(region_claim(region, 2 * page, 2 * page, VM_RESERVED) == EEXIST);
    CHECK(region_claim(region, 3 * page, 2 * page, VM_RESERVED) == EEXIST);
    CHECK(region_claim(region, 0, 8 * page, VM_RESERVED) == EEXIST);
    CHECK(region_claim(region, 5 * page, 3 * page, VM_RESERVED) == EEXIST);
    CHECK(*byte(region, 3) == 42);
    CHECK(region->reserved.total == 2 * page && region->committed.total == 2 * page);
    CHECK(strcmp(witness_pages(at(region, 0), 8 * page, shown), "..ww..w.") == 0);
    CHECK(vm_release(at(region, 6), page) == 0);
    end(region);
}

static void releasing_a_window_leaves_strangers_alone(void) {
    struct region *region = window(8, 0);
    uintptr_t base = at(region, 0);
    REQUIRE(vm_map_at(base + 4 * page, page, VM_COMMITTED) == 0);
    REQUIRE(region_claim(region, 0, 4 * page, VM_COMMITTED) == 0);
    REQUIRE(region_claim(region, 5 * page, 3 * page, VM_RESERVED) == 0);
    CHECK(region_release(region) == 0);
    CHECK(strcmp(witness_pages(base, 8 * page, shown), "....w...") == 0);
    CHECK(vm_release(base + 4 * page, page) == 0);
    end(region);
}

static void a_claim_near_a_free_hint_lands_there(void) {
    struct region *region = window(16, 0);
    uintptr_t address = 0;
    CHECK(region_claim_near(region, 0, at(region, 3), 2 * page, VM_COMMITTED, &address) == 0);
    CHECK(address == at(region, 3));
    CHECK(region_claim_near(region, 8 * page, at(region, 8), 8 * page, VM_RESERVED, &address) == 0);
    CHECK(address == at(region, 8));
    CHECK(shows(region, "...ww...--------"));
    end(region);
}

static void a_claim_that_lands_outside_is_given_back(void) {
    struct region *region = window(16, 0);
    uintptr_t address = 0, high = at(region, 16);
    REQUIRE(region_claim(region, 4 * page, 4 * page, VM_RESERVED) == 0);
    size_t before = witness_status("VmSize:");

    /* The hint is mapped already: the kernel picks an address far from this window. */
    CHECK(region_claim_near(region, 0, at(region, 5), page, VM_COMMITTED, &address) == ERANGE);
    CHECK(address != 0 && (address < at(region, 0) || address >= high));
    CHECK(witness_all(address, page, '.'));

    /* Free, but below `from`, or across the end, or beyond it. */
    CHECK(region_claim_near(region, 2 * page, at(region, 1), page, VM_RESERVED, &address) == ERANGE);
    CHECK(address == at(region, 1));
    CHECK(region_claim_near(region, 0, at(region, 15), 2 * page, VM_RESERVED, &address) == ERANGE);
    CHECK(address == at(region, 15));
    CHECK(region_claim_near(region, 0, high, page, VM_RESERVED, &address) == ERANGE);
    CHECK(address == high);
    CHECK(region_claim_near(region, 0, 0, page, VM_RESERVED, &address) == ERANGE);
    CHECK(region_claim_near(region, 16 * page, at(region, 0), page, 0, &address) == ERANGE);

    CHECK(witness_status("VmSize:") == before);
    CHECK(shows(region, "....----........"));
    end(region);
}

static void a_wrong_claim_near_maps_nothing(void) {
    struct region *region = window(16, 0);
    uintptr_t address = 7;
    size_t before = witness_status("VmSize:"), last = SIZE_MAX / page * page;
    CHECK(region_claim_near(region, 0, 0, 0, VM_RESERVED, &address) == REGION_OUTSIDE);
    CHECK(region_claim_near(region, 17 * page, 0, page, VM_RESERVED, &address) == REGION_OUTSIDE);
    CHECK(region_claim_near(region, last, 0, page, VM_RESERVED, &address) == REGION_OUTSIDE);
    CHECK(region_claim_near(region, 0, 1, page, VM_RESERVED, &address) == REGION_MISALIGNED);
    CHECK(region_claim_near(region, 0, 0, 1, VM_RESERVED, &address) == REGION_MISALIGNED);
    CHECK(region_claim_near(region, 0, 0, last, VM_RESERVED, &address) == ENOMEM);
    CHECK(address == 7);
    CHECK(witness_status("VmSize:") == before && shows(region, "................"));
    end(region);
}

static void a_disclaimed_piece_is_unmapped_and_can_be_claimed_again(void) {
    struct region *region = window(8, 0);
    REQUIRE(region_claim(region, 0, 8 * page, VM_COMMITTED) == 0);
    *byte(region, 4) = 42;
    CHECK(region_disclaim(region, 3 * page, 2 * page) == 0);
    CHECK(shows(region, "www..www"));
    CHECK(region->reserved.total == 6 * page && region->committed.total == 6 * page);
    CHECK(region_disclaim(region, 3 * page, page) == REGION_NOT_RESERVED);
    CHECK(region_disclaim(region, 2 * page, 2 * page) == REGION_NOT_RESERVED);
    CHECK(decommit(region, 0, 2) && region_disclaim(region, page, 2 * page) == 0);
    CHECK(shows(region, "-....www"));
    CHECK(region_claim(region, page, 4 * page, VM_COMMITTED) == 0);
    CHECK(shows(region, "-wwwwwww") && *byte(region, 4) == 0);
    end(region);
}

static void random_claims_agree_with_the_kernel(void) {
    uint64_t seed = 0xA0761D6478BD642F;
    EACH_ACCOUNTING(accounting) {
        struct region *region = window(PAGES, accounting);
        char model[PAGES + 1];
        memset(model, '.', PAGES);
        model[PAGES] = '\0';
        for (int i = 0; i < 2000; i++) {
            size_t from = random_below(&seed, PAGES), n = 1 + random_below(&seed, 6);
            if (n > PAGES - from)
                n = PAGES - from;
            char last = model[from + n];
            model[from + n] = '\0';
            bool free_all = strspn(model + from, ".") == n;
            bool owned = strcspn(model + from, ".") == n;
            model[from + n] = last;
            size_t offset = from * page, length = n * page;
            uintptr_t address = 0;
            int want = owned ? 0 : REGION_NOT_RESERVED;
            char becomes = '.';
            switch (random_below(&seed, 5)) {
            case 0:
                becomes = random_below(&seed, 2) == 0 ? 'w' : '-';
                want = free_all ? 0 : EEXIST;
                CHECK(region_claim(region, offset, length,
                                   becomes == 'w' ? VM_COMMITTED : VM_RESERVED) == want);
                break;
            case 1:
                becomes = '-';
                want = free_all ? 0 : ERANGE;
                CHECK(region_claim_near(region, 0, at(region, from), length, VM_RESERVED,
                                        &address) == want);
                CHECK((address == at(region, from)) == free_all);
                break;
            case 2:
                becomes = 'w';
                CHECK(region_commit(region, offset, length) == want);
                break;
            case 3:
                becomes = '-';
                CHECK(region_decommit(region, offset, length) == want);
                break;
            default:
                CHECK(region_disclaim(region, offset, length) == want);
            }
            if (want == 0)
                memset(model + from, becomes, n);
            CHECK(shows(region, model));
        }
        uintptr_t base = at(region, 0);
        end(region);
        CHECK(witness_all(base, PAGES * page, '.'));
    }
}

/* ---- the policy of every byte */

static void advice_stays_on_every_byte(void) {
    EACH_ACCOUNTING(accounting) {
        struct region *region =
            reserve(8 * page, 0, false, 0, page, accounting, VM_NO_DUMP, NULL);
        REQUIRE(region != NULL && region->advice == VM_NO_DUMP);
        REQUIRE(commit(region, 1, 6));
        memset((void *)at(region, 1), 1, 6 * page);
        REQUIRE(decommit(region, 2, 3) && commit(region, 3, 1));
        for (size_t i = 0; i < 8; i++)
            CHECK(witness_flag(at(region, i), "dd"));
        CHECK(witness_flag(at(region, 0) - page, "dd") && witness_flag(at(region, 8), "dd"));
        end(region);
        region = open_window(free_place(), 8 * page, accounting, VM_NO_DUMP);
        REQUIRE(region != NULL);
        uintptr_t address = 0;
        CHECK(region_claim(region, 0, 4 * page, VM_COMMITTED) == 0);
        CHECK(region_claim_near(region, 0, at(region, 6), page, VM_RESERVED, &address) == 0);
        CHECK(decommit(region, 1, 1));
        CHECK(witness_flag(at(region, 0), "dd") && witness_flag(at(region, 1), "dd"));
        CHECK(witness_flag(at(region, 6), "dd"));
        end(region);
    }
}

static void a_name_stays_on_every_byte(void) {
    bool named = vm_try_name() == 0;
    char longest[80] = "";
    memset(longest, 'n', sizeof longest - 1);
    EACH_ACCOUNTING(accounting) {
        struct region *region =
            reserve(4 * page, 0, false, 0, 0, accounting, 0, "of the test");
        REQUIRE(region != NULL);
        CHECK(strcmp(region->name, "of the test") == 0);
        REQUIRE(commit(region, 0, 4) && decommit(region, 1, 2));
        for (size_t i = 0; i < 4; i++)
            CHECK(witness_named(at(region, i), "[anon:of the test]") == named);
        end(region);
        region = reserve(page, 0, false, 0, 0, accounting, 0, longest);
        REQUIRE(region != NULL);
        CHECK(strcmp(region->name, longest) == 0);
        CHECK(witness_named(at(region, 0), "[anon:nnn") == named);
        end(region);
    }
    if (!named)
        SKIP("no CONFIG_ANON_VMA_NAME here to see the names with");
}

/* ---- the end */

static void ending_gives_the_addresses_back(void) {
    size_t before = witness_status("VmSize:");
    struct region *region = reserve(4 * page, 0, false, 0, page, 0, 0, NULL);
    REQUIRE(region != NULL && commit(region, 1, 2));
    end(region);
    CHECK(witness_status("VmSize:") == before);
    region = reserved(4, 0);
    REQUIRE(region_release(region) == 0);
    end(region);
    CHECK(witness_status("VmSize:") == before);
}

static void zero_bytes_are_a_closed_region(void) {
    struct region region = {0};
    for (size_t i = 0; i < VERBS; i++)
        CHECK(verbs[i](&region, 0, page) == REGION_RELEASED);
    CHECK(region_is_committed(&region, 0, page) == REGION_RELEASED);
    CHECK(region_seal(&region) == REGION_RELEASED);
    CHECK(region_release(&region) == REGION_RELEASED);
    region_end(&region);
    region_end(&region);
    CHECK(region.base == NULL);
}

static void a_closed_region_can_be_opened_again(void) {
    struct region region = {0};
    struct region_options wish = {.guard = page, .name = "first"};
    for (int round = 0; round < 3; round++) {
        REQUIRE(region_reserve(&region, 4 * page, VM_NORESERVE, VM_NO_DUMP, &wish) == 0);
        CHECK(region.guard == page && region.reserved.total == 4 * page);
        CHECK(commit(&region, 1, 1) && commit(&region, 3, 1) && shows(&region, "-w-w"));
        if (round == 2)
            region_end(&region);
        else
            CHECK(region_release(&region) == 0);
        REQUIRE(region_window(&region, free_place(), 8 * page, 0, 0, NULL) == 0);
        CHECK(region.guard == 0 && region.accounting == 0 && region.advice == 0);
        CHECK(region.name[0] == '\0' && !region.sealed);
        CHECK(region.reserved.total == 0 && region.committed.total == 0);
        CHECK(region_claim(&region, page, 2 * page, VM_COMMITTED) == 0);
        CHECK(shows(&region, ".ww....."));
        CHECK(region_release(&region) == 0);
    }
    region_end(&region);
}

static void opening_again_after_a_refusal_works(void) {
    struct region region = {0};
    struct region_options wish = {.address = page, .exact = true, .guard = page};
    CHECK(region_reserve(&region, page, 0, 0, &wish) == EINVAL);
    CHECK(region_reserve(&region, SIZE_MAX / page * page, 0, 0, NULL) == ENOMEM);
    CHECK(region_window(&region, 1, page, 0, 0, NULL) == EINVAL);
    CHECK(region_commit(&region, 0, page) == REGION_RELEASED);
    CHECK(region_reserve(&region, page, 0, 0, NULL) == 0);
    CHECK(region.guard == 0 && shows(&region, "-"));
    region_end(&region);
}

static void a_sealed_region_that_ended_opens_unsealed(void) {
    struct region region = {0};
    if (vm_try_seal() != 0) {
        SKIP("no mseal here");
        return;
    }
    REQUIRE(region_reserve(&region, page, 0, 0, NULL) == 0 && region_seal(&region) == 0);
    region_end(&region);
    CHECK(region_release(&region) == REGION_RELEASED);
    REQUIRE(region_reserve(&region, page, 0, 0, NULL) == 0);
    CHECK(!region.sealed && shows(&region, "-"));
    CHECK(commit(&region, 0, 1) && decommit(&region, 0, 1) && region_release(&region) == 0);
    region_end(&region);
}

static void a_counted_region_counts_until_its_addresses_are_gone(void) {
    size_t before = region_counted_bytes();
    struct region *region = reserved(4, 0);
    CHECK(region_counted_bytes() == before);
    for (int i = 0; i < 2; i++)
        CHECK(region_count(region) == 0 && region_counted_bytes() == before + 4 * page);
    CHECK(region_release(region) == 0 && region_counted_bytes() == before);
    CHECK(region_count(region) == REGION_RELEASED && region_counted_bytes() == before);
    REQUIRE(region_reserve(region, page, 0, 0, NULL) == 0);
    CHECK(region_counted_bytes() == before);
    CHECK(region_count(region) == 0);
    region_retire(region);
    CHECK(region_counted_bytes() == before + page);
    end(region);
    CHECK(region_counted_bytes() == before);
}

static void a_retired_region_keeps_its_addresses(void) {
    EACH_ACCOUNTING(accounting) {
        struct region *region = reserved(4, accounting);
        uintptr_t base = at(region, 0), near;
        REQUIRE(commit(region, 1, 2));
        *byte(region, 1) = 42;
        region_retire(region);
        for (size_t i = 0; i < VERBS; i++)
            CHECK(verbs[i](region, 0, page) == REGION_RELEASED);
        CHECK(region_claim_near(region, 0, 0, page, VM_RESERVED, &near) == REGION_RELEASED);
        CHECK(region_is_committed(region, page, page) == REGION_RELEASED);
        CHECK(region_load(region, page) == REGION_RELEASED);
        CHECK(region_store(region, page, 1) == REGION_RELEASED);
        CHECK(region_seal(region) == REGION_RELEASED);
        CHECK(region_release(region) == REGION_RELEASED);
        CHECK(region->reserved.total == 4 * page && region->committed.total == 2 * page);
        CHECK(shows(region, "-ww-") && *byte(region, 1) == 42);
        region_end(region);
        CHECK(region->base == NULL && region->reserved.total == 0);
        CHECK(strcmp(witness_pages(base, 4 * page, shown), "....") == 0);
        REQUIRE(region_reserve(region, page, 0, 0, NULL) == 0);
        CHECK(commit(region, 0, 1) && shows(region, "w"));
        end(region);
    }
}

static void a_sealed_region_lasts_until_the_process_ends(void) {
    if (vm_try_seal() != 0) {
        SKIP("no mseal here");
        return;
    }
    EACH_ACCOUNTING(accounting) {
        struct region *region = reserve(4 * page, 0, false, 0, page, accounting, 0, NULL);
        REQUIRE(region != NULL && commit(region, 1, 1));
        *byte(region, 1) = 42;
        CHECK(region_seal(region) == 0 && region->sealed);
        CHECK(shows(region, "wwww") && region->committed.total == 4 * page);
        for (size_t i = 0; i < 6; i++)
            CHECK(vm_release(at(region, i) - page, page) == EPERM);
        *byte(region, 3) = 43;
        CHECK(*byte(region, 1) == 42 && *byte(region, 3) == 43);
        CHECK(region_commit(region, 0, 4 * page) == 0);
        CHECK(region_decommit(region, 0, page) == REGION_SEALED);
        CHECK(region_decommit(region, 0, 5 * page) == REGION_OUTSIDE);
        CHECK(region_release(region) == REGION_SEALED);
        CHECK(region_discard(region, 3 * page, page, false) == 0 && *byte(region, 3) == 0);
        CHECK(region_seal(region) == 0);
        CHECK(shows(region, "wwww"));
        uintptr_t base = at(region, 0);
        end(region);
        CHECK(strcmp(witness_pages(base - page, 6 * page, shown), "-wwww-") == 0);
        CHECK(*(volatile unsigned char *)(base + page) == 42);
    }
}

static void a_refused_release_drops_the_memory_in_the_end(void) {
    if (vm_try_seal() != 0) {
        SKIP("no mseal here to refuse with");
        return;
    }
    struct region *region = reserved(4, 0);
    REQUIRE(commit(region, 0, 4));
    memset(region->base, 42, 4 * page);
    REQUIRE(vm_seal(at(region, 3), page) == 0);
    CHECK(region_release(region) == EPERM);
    CHECK(shows(region, "wwww") && region->reserved.total == 4 * page);
    CHECK(*byte(region, 0) == 42);
    uintptr_t base = at(region, 0);
    end(region);
    CHECK(witness_all(base, 4 * page, 'w'));
    CHECK(witness_resident(base, 4 * page) == 0);
}

static void a_window_refused_half_way_owns_the_rest(void) {
    if (vm_try_seal() != 0) {
        SKIP("no mseal here to refuse with");
        return;
    }
    struct region *region = window(12, 0);
    for (size_t i = 0; i < 4; i++)
        REQUIRE(region_claim(region, 3 * i * page, 2 * page, VM_COMMITTED) == 0);
    REQUIRE(vm_seal(at(region, 3), page) == 0);
    CHECK(region_release(region) == EPERM);
    CHECK(region->base != NULL);
    CHECK(shows(region, "ww.ww......."));
    CHECK(region->reserved.total == 4 * page && region->committed.total == 4 * page);
    CHECK(region_disclaim(region, 3 * page, 2 * page) == EPERM);
    CHECK(shows(region, "ww.ww......."));
    end(region);
}

static void a_refused_commit_refunds_touched_neighbours(void) {
    struct region *region = reserve(16 * page, 0, false, 0, page, 0, 0, NULL);
    REQUIRE(region != NULL);
    commit_like(region, "--w--w---w------");
    /* A gap committed next to touched memory merges with its mapping, and keeps the anon_vma afterwards. */
    *byte(region, 2) = 1;
    REQUIRE(limit_data(3 * page));
    int err = region_commit(region, 0, 16 * page);
    REQUIRE(unlimit(RLIMIT_DATA));
    CHECK(err == ENOMEM);
    for (size_t i = 0; i < 16; i++)
        CHECK(witness_flag(at(region, i), "ac") == (i == 2 || i == 5 || i == 9));
    end(region);
}

static void a_refused_commit_over_a_seal_keeps_the_books_true(void) {
    if (vm_try_seal() != 0) {
        SKIP("no mseal here to refuse with");
        return;
    }
    struct region *region = reserved(8, 0);
    REQUIRE(vm_seal(at(region, 3), page) == 0);
    CHECK(region_commit(region, 0, 8 * page) == EPERM);
    CHECK(books_are_true(region));
    end(region);
}

static void a_refused_decommit_loses_no_contents(void) {
    EACH_ACCOUNTING(accounting) {
        struct region *region = reserved(4, accounting);
        REQUIRE(commit(region, 0, 4));
        memset(region->base, 42, 4 * page);
        if (witness_lock(at(region, 2), page) != 0)
            SKIP("mlock was refused");
        int err = region_decommit(region, 0, 4 * page);
        CHECK(err == 0 || (shows(region, "wwww") && *byte(region, 0) == 42));
        end(region);
    }
}

static void a_refused_seal_commits_nothing(void) {
    struct region *region = reserve(4 * page, 0, false, 0, page, 0, 0, NULL);
    REQUIRE(region != NULL && commit(region, 1, 1));
    /* A hole where the guard was, so that mseal refuses with ENOMEM (ENOSYS before Linux 6.10). */
    REQUIRE(vm_release(at(region, 0) - page, page) == 0);
    CHECK(region_seal(region) > 0 && !region->sealed);
    CHECK(region->committed.total == page && shows(region, "-w--"));
    end(region);
}

int main(void) {
    page = vm_page_size();
    end(reserved(1, 0)); /* malloc must map its heap before anything is counted */
    RUN(a_new_region_owns_its_span_and_has_nothing_committed);
    RUN(a_tebibyte_is_addresses_only);
    RUN(a_free_address_is_taken_as_hint_and_exactly);
    RUN(a_taken_address_leads_elsewhere_unless_exact);
    RUN(an_exact_reserve_overwrites_nothing);
    RUN(the_base_is_aligned_and_the_rest_given_back);
    RUN(a_lead_puts_the_base_below_an_aligned_address);
    RUN(a_lead_counts_modulo_the_alignment);
    RUN(regions_of_whole_alignments_in_a_row_are_aligned);
    RUN(an_aligned_hint_is_kept);
    RUN(guards_are_never_accessible);
    RUN(what_does_not_fit_the_addresses_is_refused_with_enomem);
    RUN(a_refused_reserve_leaves_nothing);
    RUN(refused_advice_refuses_the_reserve);
    RUN(commit_and_decommit_are_idempotent_and_exact);
    RUN(committed_again_is_zero_and_what_was_stays);
    RUN(decommitting_gives_the_charge_back);
    RUN(random_commits_agree_with_a_model_and_the_kernel);
    RUN(a_refused_commit_leaves_the_region_as_it_was);
    RUN(a_refused_commit_refunds_untouched_neighbours);
    RUN(a_refused_decommit_leaves_the_region_as_it_was);
    RUN(wrong_ranges_are_told_apart_without_overflow);
    RUN(only_committed_bytes_are_populated_and_discarded);
    RUN(is_committed_takes_any_alignment);
    RUN(cells_end_with_guards_that_a_decommit_removes);
    RUN(viewed_is_set_by_an_export_and_by_the_end);
    RUN(guards_are_not_exported);
    RUN(a_slide_moves_all_bytes_to_the_start);
    RUN(a_slide_leaves_no_memory_behind);
    RUN(a_refused_slide_moves_nothing);
    RUN(a_released_region_says_so);
    RUN(a_window_maps_and_owns_nothing);
    RUN(a_window_must_be_a_range_of_addresses);
    RUN(a_window_claims_exact_pieces);
    RUN(a_claim_replaces_nothing);
    RUN(releasing_a_window_leaves_strangers_alone);
    RUN(a_claim_near_a_free_hint_lands_there);
    RUN(a_claim_that_lands_outside_is_given_back);
    RUN(a_wrong_claim_near_maps_nothing);
    RUN(a_disclaimed_piece_is_unmapped_and_can_be_claimed_again);
    RUN(random_claims_agree_with_the_kernel);
    RUN(advice_stays_on_every_byte);
    RUN(a_name_stays_on_every_byte);
    RUN(ending_gives_the_addresses_back);
    RUN(zero_bytes_are_a_closed_region);
    RUN(a_closed_region_can_be_opened_again);
    RUN(opening_again_after_a_refusal_works);
    RUN(a_sealed_region_that_ended_opens_unsealed);
    RUN(a_counted_region_counts_until_its_addresses_are_gone);
    RUN(a_retired_region_keeps_its_addresses);
    RUN(a_sealed_region_lasts_until_the_process_ends);
    RUN(a_refused_release_drops_the_memory_in_the_end);
    RUN(a_window_refused_half_way_owns_the_rest);
    RUN(a_refused_commit_refunds_touched_neighbours);
    RUN(a_refused_commit_over_a_seal_keeps_the_books_true);
    RUN(a_refused_decommit_loses_no_contents);
    RUN(a_refused_seal_commits_nothing);
    return check_report("test_region");
}
