#define _DEFAULT_SOURCE

#include "heap.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "check.h"
#include "vm.h"

#define THREADS 8
#define MIB ((size_t)1 << 20)
#define UNIT (64 * MIB)
#define PAGE ((size_t)8192)
#define STEP (MIB)       /* bytes of a growth of the arena */
#define GAP (3 * UNIT)   /* with an index, in front of every fourth growth */
#define HELD 40          /* blocks that a thread holds at most */
#define SHARED 16        /* blocks that any thread may free */
#define ZEROED ((int64_t)1 << HEAP_PAGE_BITS)

/* ThreadSanitizer makes each operation about ten times as slow. */
#ifdef __SANITIZE_THREAD__
#define ROUNDS 10000
#else
#define ROUNDS 60000
#endif

static struct heap heap;
static struct region region;
static struct heap_metadata metadata;
/* The lock of the region, held around every call that uses its books. */
static pthread_mutex_t region_lock;
static uintptr_t grown, limit; /* start of the next growth, and the end of the space; guarded by the lock above */
static unsigned growths;
static _Atomic int64_t shared[SHARED];
static atomic_ulong wrong, taken, freed_twice, freed_once, given_back, made_shared;
static atomic_bool done;

struct held {
    int64_t handle;
    uint64_t nbytes;
    unsigned char tag;
};

struct worker {
    pthread_t thread;
    uint64_t seed;
    struct held held[HELD];
    size_t count;
};

static void expect(bool holds) {
    if (!holds)
        atomic_fetch_add(&wrong, 1);
}

/* -- the owner's part -------------------------------------------------------------------------- */

/* Maps the metadata of [address, address + STEP) and adds the range to the heap. */
static bool grow(void) {
    if (grown + STEP > limit)
        return false;
    uintptr_t base = (uintptr_t)region.base, address = grown;
    expect(region_commit(&region, address - base, STEP) == 0);
    if (metadata.index == NULL) {
        size_t used = address + STEP - metadata.start, os_page = vm_page_size() - 1;
        size_t bitmap = (used / 16 + os_page) & ~os_page, spans = (used / 1024 + os_page) & ~os_page;
        expect(region_commit(&region, metadata.start - bitmap - base, bitmap) == 0);
        expect(region_commit(&region, (uintptr_t)metadata.spans - base, spans) == 0);
    } else if (metadata.index[address / UNIT] == 0) {
        uintptr_t own;
        expect(vm_map(0, 2 * MIB + MIB / 16, VM_COMMITTED, &own) == 0);
        metadata.index[address / UNIT] = own;
    }
    expect(heap_add(&heap, address, STEP) == 0);
    grown += STEP;
    if (metadata.index != NULL && ++growths % 4 == 0)
        grown += GAP;
    return true;
}

/* Allocates as an owner does: without may_commit, then with it, then after a growth. */
static int64_t allocate(uint64_t nbytes, bool zero) {
    int64_t handle = heap_alloc(&heap, nbytes, 1, zero, false);
    if (handle >= 0)
        return handle;
    expect(handle == HEAP_COMMIT || handle == PAGEALLOC_FULL);
    pthread_mutex_lock(&region_lock);
    do
        handle = heap_alloc(&heap, nbytes, 1, zero, true);
    while (handle == PAGEALLOC_FULL && grow());
    pthread_mutex_unlock(&region_lock);
    return handle;
}

/* -- the threads ------------------------------------------------------------------------------- */

static bool is_all(const unsigned char *bytes, uint64_t nbytes, unsigned char value) {
    return bytes[0] == value && memcmp(bytes, bytes + 1, (size_t)nbytes - 1) == 0;
}

static void hold(struct worker *me, int64_t handle, uint64_t nbytes) {
    unsigned char *bytes = (unsigned char *)heap_address(&heap, handle);
    unsigned char tag = (unsigned char)(1 + random_below(&me->seed, 255));
    if (handle & ZEROED)
        expect(is_all(bytes, nbytes, 0));
    memset(bytes, tag, (size_t)nbytes);
    me->held[me->count++] = (struct held){handle, nbytes, tag};
    atomic_fetch_add(&taken, 1);
}

static uint64_t some_size(struct worker *me) {
    uint64_t most = PAGE << random_below(&me->seed, random_below(&me->seed, 40) == 0 ? 8 : 4);
    return 2 + random_below(&me->seed, most - 1);
}

static void take(struct worker *me) {
    uint64_t nbytes = some_size(me);
    int64_t handle = allocate(nbytes, random_below(&me->seed, 3) == 0);
    if (handle >= 0)
        hold(me, handle, nbytes);
    else
        expect(handle == PAGEALLOC_FULL);
}

static void take_many(struct worker *me) {
    uint64_t sizes[10];
    int64_t handles[10], refused;
    const struct pagealloc_integers given = {.items = sizes, .width = 8};
    if (me->count + 10 > HELD)
        return;
    for (size_t i = 0; i < 10; i++)
        sizes[i] = some_size(me);
    pthread_mutex_lock(&region_lock);
    int64_t n = heap_alloc_many(&heap, &given, handles, 0, 10, true, &refused);
    pthread_mutex_unlock(&region_lock);
    expect(refused == (n == 10 ? 0 : PAGEALLOC_FULL));
    for (int64_t i = 0; i < n; i++)
        hold(me, handles[i], sizes[i]);
}

static void look_at(const struct held *held) {
    const unsigned char *bytes = (const unsigned char *)heap_address(&heap, held->handle);
    expect(is_all(bytes, held->nbytes, held->tag));
    expect(heap_nbytes(&heap, held->handle) == (int64_t)held->nbytes);
    expect(heap_find(&heap, (uintptr_t)bytes + held->nbytes - 1) == (held->handle & ~ZEROED));
}

static void give(struct worker *me) {
    size_t at = random_below(&me->seed, me->count);
    look_at(&me->held[at]);
    expect(heap_free(&heap, me->held[at].handle) == (int64_t)me->held[at].nbytes);
    expect(heap_free(&heap, me->held[at].handle) == HEAP_NO_BLOCK);
    me->held[at] = me->held[--me->count];
}

static void give_all(struct worker *me) {
    int64_t handles[HELD], nbytes = 0;
    size_t failed;
    for (size_t i = 0; i < me->count; i++) {
        look_at(&me->held[i]);
        handles[i] = me->held[i].handle;
        nbytes += (int64_t)me->held[i].nbytes;
    }
    expect(heap_free_many(&heap, handles, me->count, false, &failed) == nbytes);
    me->count = 0;
}

/* Shares a block that several threads try to free; exactly one of them succeeds. */
static void share(struct worker *me) {
    _Atomic int64_t *slot = &shared[random_below(&me->seed, SHARED)];
    int64_t handle = atomic_load(slot);
    if (handle >= 0) {
        int64_t freed = heap_free(&heap, handle), expected = handle;
        expect(freed == 100 || freed == HEAP_NO_BLOCK);
        atomic_fetch_add(freed > 0 ? &freed_once : &freed_twice, 1);
        (void)atomic_compare_exchange_strong(slot, &expected, -1);
    } else if ((handle = allocate(100, false)) >= 0) {
        int64_t nobody = -1;
        if (atomic_compare_exchange_strong(slot, &nobody, handle))
            atomic_fetch_add(&made_shared, 1);
        else
            expect(heap_free(&heap, handle) == 100);
    }
}

static void look_around(struct worker *me) {
    int64_t handles[30], last = -1;
    uint64_t from = 0;
    struct heap_stats stats;
    for (int64_t n = 1; n > 0;) {
        n = heap_blocks(&heap, &from, handles, 30);
        for (int64_t i = 0; i < n; i++) {
            int64_t page = handles[i] & (ZEROED - 1);
            expect(page > last);
            last = page;
        }
    }
    heap_measure(&heap, &stats);
    expect(stats.in_use <= stats.arena && stats.released <= stats.arena - stats.in_use);
    expect(stats.requested <= stats.in_use && stats.mallocs >= stats.frees);
    expect(heap_tail(&heap) >= 0);
    int64_t handle = heap_find(&heap, metadata.start + random_below(&me->seed, limit - metadata.start));
    expect(handle >= 0 || handle == HEAP_NO_BLOCK);
}

static void *work(void *argument) {
    struct worker *me = argument;
    for (int round = 0; round < ROUNDS; round++) {
        uint64_t choice = random_below(&me->seed, 200);
        if (choice < 2)
            look_around(me);
        else if (choice < 4)
            give_all(me);
        else if (choice < 8)
            take_many(me);
        else if (choice < 40)
            share(me);
        else if (me->count > 0 && (me->count == HELD || choice < 120))
            give(me);
        else
            take(me);
    }
    give_all(me);
    return NULL;
}

static void *give_back(void *argument) {
    uint64_t *own = argument;
    struct pagealloc_run pieces[20];
    while (!atomic_load(&done)) {
        bool lazy = random_below(own, 3) == 0;
        pthread_mutex_lock(&region_lock);
        int64_t n = heap_idle(&heap, UINT64_MAX >> 2, random_below(own, 2000), 1000, 0, lazy, pieces, 20);
        expect(n >= 0 && n <= 20);
        for (int64_t i = 0; i < n; i++) {
            int64_t nbytes = heap_give_back(&heap, &pieces[i], lazy);
            expect(nbytes >= 0);
            atomic_fetch_add(&given_back, nbytes > 0);
        }
        if (random_below(own, 20) == 0) /* look up addresses in between */
            (void)grow();
        pthread_mutex_unlock(&region_lock);
        sched_yield();
    }
    return NULL;
}

/* -- the tests --------------------------------------------------------------------------------- */

static void run(size_t before, size_t arena, uint64_t capacity) {
    static struct worker workers[THREADS];
    uintptr_t tables;
    pthread_t other;
    uint64_t own = 99;
    size_t bytes = (size_t)heap_bytes(capacity, false) + vm_page_size();
    bytes -= bytes % vm_page_size();
    REQUIRE(vm_map(0, bytes, VM_COMMITTED | VM_NORESERVE, &tables) == 0);
    heap = (struct heap){0};
    heap_open(&heap, (void *)tables, capacity, false, &region, &metadata);
    REQUIRE(pthread_mutex_init(&region_lock, NULL) == 0);
    grown = (uintptr_t)region.base + before;
    limit = grown + arena;
    wrong = taken = freed_twice = freed_once = given_back = made_shared = 0;
    done = false;
    for (size_t i = 0; i < SHARED; i++)
        shared[i] = -1;
    REQUIRE(grow());
    REQUIRE(pthread_create(&other, NULL, give_back, &own) == 0);
    for (size_t i = 0; i < THREADS; i++) {
        workers[i].seed = 0x2545F4914F6CDD1D + i;
        workers[i].count = 0;
        REQUIRE(pthread_create(&workers[i].thread, NULL, work, &workers[i]) == 0);
    }
    for (size_t i = 0; i < THREADS; i++)
        REQUIRE(pthread_join(workers[i].thread, NULL) == 0);
    done = true;
    REQUIRE(pthread_join(other, NULL) == 0);
    for (size_t i = 0; i < SHARED; i++)
        if (shared[i] >= 0)
            freed_once += heap_free(&heap, shared[i]) == 100;
    CHECK(wrong == 0);
    CHECK(taken > THREADS * ROUNDS / 10 && given_back > 10);
    CHECK(freed_once == made_shared && freed_once > 10);
    struct heap_stats stats;
    heap_measure(&heap, &stats);
    CHECK(stats.in_use == 0 && stats.requested == 0 && stats.mallocs == stats.frees);
    CHECK(stats.released <= stats.arena && stats.arena > STEP);
    int64_t handle;
    uint64_t from = 0;
    CHECK(heap_blocks(&heap, &from, &handle, 1) == 0);
    pagealloc_close(heap.pages);
    REQUIRE(vm_release(tables, bytes) == 0);
    REQUIRE(pthread_mutex_destroy(&region_lock) == 0);
}

/* Spans of 8-byte words and four bits of heap bitmap per word, next to the arena. */
static void threads_share_a_flat_heap(int accounting) {
    const size_t arena = 64 * MIB, bitmap = arena / 16, spans = arena / 1024;
    REQUIRE(region_reserve(&region, spans + bitmap + arena, accounting, 0, NULL) == 0);
    uintptr_t base = (uintptr_t)region.base;
    metadata = (struct heap_metadata){.page = PAGE, .word = 8, .bitmap_bits = 4,
                                      .start = base + spans + bitmap, .spans = (void *)base};
    run(spans + bitmap, arena, arena / PAGE);
    region_end(&region);
}

static void threads_share_a_charged_heap(void) {
    threads_share_a_flat_heap(0);
}

static void threads_share_a_heap_that_is_not_charged(void) {
    threads_share_a_flat_heap(VM_NORESERVE);
}

static void threads_share_a_heap_under_an_index(void) {
    const struct region_options wish = {.align = UNIT};
    const size_t index_bytes = ((size_t)1 << 47) / UNIT * sizeof(uintptr_t);
    uintptr_t index;
    REQUIRE(vm_map(0, index_bytes, VM_COMMITTED | VM_NORESERVE, &index) == 0);
    REQUIRE(region_reserve(&region, 30 * UNIT, 0, 0, &wish) == 0);
    metadata = (struct heap_metadata){.page = PAGE, .word = 8, .bitmap_bits = 2,
                                      .start = (uintptr_t)region.base, .index = (uintptr_t *)index,
                                      .unit = UNIT, .unit_bitmap = 2 * MIB};
    run(0, 30 * UNIT, 60 * UNIT / PAGE);
    for (size_t i = 0; i < 30; i++) {
        uintptr_t own = metadata.index[(uintptr_t)region.base / UNIT + i];
        REQUIRE(own == 0 || vm_release(own, 2 * MIB + MIB / 16) == 0);
    }
    REQUIRE(vm_release(index, index_bytes) == 0);
    region_end(&region);
}

int main(void) {
    RUN(threads_share_a_charged_heap);
    RUN(threads_share_a_heap_that_is_not_charged);
    RUN(threads_share_a_heap_under_an_index);
    return check_report("test_heap_threads");
}
