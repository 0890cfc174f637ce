/* The reports to tracemalloc. This program is its own Python: the functions that
 * tracing looks up are defined here and record their arguments. */
#define _GNU_SOURCE
#include "region.h"

#include <errno.h>
#include <sys/wait.h>

#include "check.h"
#include "vm.h"
#include "witness.h"

enum { TRACES = 4096, PAGES = 64 };

static struct trace {
    uintptr_t address;
    size_t nbytes;
    int stamp; /* number of the call that made it, in place of a traceback */
} traces[TRACES];
static size_t trace_count;
static bool tracing, finalizing, gil, gc = true, short_of_memory;
static int stamp;

/* Fakes of Python's functions, exported by the linker. */
int PyTraceMalloc_Track(unsigned domain, uintptr_t address, size_t nbytes);
int PyTraceMalloc_Untrack(unsigned domain, uintptr_t address);
void *_PyTraceMalloc_GetTraceback(unsigned domain, uintptr_t address);
int Py_IsFinalizing(void);
int PyGILState_Ensure(void);
void PyGILState_Release(int state);
int PyGC_Disable(void);
int PyGC_Enable(void);
void Py_DecRef(void *object);
void PyMem_GetAllocator(int domain, void **allocator);
extern int _Py_NoneStruct;
extern unsigned long Py_Version;

int _Py_NoneStruct;
unsigned long Py_Version = 0x030d05f0; /* 3.13: the raw allocator shows whether it traces */
static unsigned long untracked;
static int references;

static struct trace *trace_at(uintptr_t address) {
    for (size_t i = 0; i < trace_count; i++)
        if (traces[i].address == address)
            return &traces[i];
    return NULL;
}

int PyTraceMalloc_Untrack(unsigned domain, uintptr_t address) {
    CHECK(domain == TRACING_DOMAIN && (!finalizing || address == 0));
    untracked++;
    struct trace *trace = trace_at(address);
    if (trace != NULL)
        *trace = traces[--trace_count];
    return tracing ? 0 : -2;
}

int PyTraceMalloc_Track(unsigned domain, uintptr_t address, size_t nbytes) {
    CHECK(domain == TRACING_DOMAIN && !finalizing && gil && tracing);
    (void)PyTraceMalloc_Untrack(domain, address);
    if (short_of_memory || trace_count == TRACES)
        return -1;
    traces[trace_count++] = (struct trace){address, nbytes, stamp};
    return 0;
}

void *_PyTraceMalloc_GetTraceback(unsigned domain, uintptr_t address) {
    CHECK(domain == TRACING_DOMAIN && gil && !gc);
    references++;
    struct trace *trace = trace_at(address);
    return trace != NULL ? (void *)trace : &_Py_NoneStruct;
}

/* tracemalloc replaces the raw allocator while it is tracing. */
void PyMem_GetAllocator(int domain, void **allocator) {
    CHECK(domain == 0);
    for (int i = 0; i < 5; i++)
        allocator[i] = tracing ? (void *)&tracing : (void *)&gil;
}

int Py_IsFinalizing(void) {
    return finalizing;
}

int PyGILState_Ensure(void) {
    CHECK(!finalizing);
    bool had = gil;
    gil = true;
    return had;
}

void PyGILState_Release(int state) {
    CHECK(gil);
    gil = state != 0;
}

int PyGC_Disable(void) {
    CHECK(gil);
    bool was = gc;
    gc = false;
    return was;
}

int PyGC_Enable(void) {
    CHECK(gil);
    gc = true;
    return 0;
}

void Py_DecRef(void *object) {
    CHECK(object != NULL && gil);
    references--;
}

/* ---- */

static size_t page;

static size_t traced(void) {
    size_t sum = 0;
    for (size_t i = 0; i < trace_count; i++)
        sum += traces[i].nbytes;
    return sum;
}

static void start(void) {
    tracing = true;
}

static void stop(void) {
    tracing = false;
    trace_count = 0;
}

static struct region opened(int accounting) {
    struct region region = {0};
    REQUIRE(region_reserve(&region, PAGES * page, accounting, 0, NULL) == 0);
    return region;
}

static int stamp_of(const struct region *region, size_t n) {
    struct trace *trace = trace_at((uintptr_t)region->base + n * page);
    return trace == NULL ? -1 : trace->stamp;
}

/* Whether every call has released what it took. */
static bool at_rest(void) {
    return !gil && gc && references == 0;
}

static void nothing_is_reported_while_tracing_is_off(void) {
    struct region region = opened(0);
    CHECK(region_commit(&region, 0, 4 * page) == 0 && region.traced.count == 0);
    unsigned long before = untracked;
    CHECK(region_commit(&region, 10 * page, page) == 0);
    CHECK(region_decommit(&region, 10 * page, page) == 0);
    CHECK(untracked - before == (Py_Version >> 16 == 0x030d ? 0 : 1));
    start();
    CHECK(traced() == 0);
    CHECK(region_commit(&region, 2 * page, 4 * page) == 0 && traced() == 2 * page);
    CHECK(region_decommit(&region, 0, 3 * page) == 0 && traced() == 2 * page);
    CHECK(region_release(&region) == 0 && traced() == 0 && at_rest());
    stop();
    region_end(&region);
}

static void each_commit_keeps_its_own_traceback(void) {
    struct region region = opened(0);
    start();
    for (stamp = 1; stamp <= 3; stamp++)
        CHECK(region_commit(&region, (size_t)stamp * page, page) == 0);
    CHECK(stamp_of(&region, 1) == 1 && stamp_of(&region, 2) == 2 && stamp_of(&region, 3) == 3);
    CHECK(region_commit(&region, 0, 6 * page) == 0); /* around them: two pieces */
    CHECK(traced() == 6 * page && trace_count == 5 && stamp_of(&region, 2) == 2);
    CHECK(stamp_of(&region, 0) == 4 && stamp_of(&region, 4) == 4);
    region_end(&region);
    CHECK(traced() == 0 && at_rest());
    stop();
}

static void the_middle_of_a_commit_can_be_taken_out(void) {
    struct region region = opened(0);
    start();
    stamp = 1;
    CHECK(region_commit(&region, 0, 10 * page) == 0);
    stamp = 2;
    CHECK(region_decommit(&region, 4 * page, 2 * page) == 0);
    CHECK(traced() == 8 * page && trace_count == 2 && at_rest());
    CHECK(trace_at((uintptr_t)region.base)->nbytes == 4 * page);
    CHECK(trace_at((uintptr_t)region.base + 6 * page)->nbytes == 4 * page);
    CHECK(region_decommit(&region, 0, PAGES * page) == 0 && traced() == 0);
    CHECK(region.traced.count == 0);
    region_end(&region);
    stop();
}

static void bytes_of_an_earlier_session_are_not_reported_again(void) {
    struct region region = opened(0);
    start();
    CHECK(region_commit(&region, 0, 10 * page) == 0);
    stop();
    start();
    CHECK(region_commit(&region, 20 * page, 10 * page) == 0);
    CHECK(region_decommit(&region, 4 * page, 2 * page) == 0 && traced() == 10 * page);
    CHECK(region_decommit(&region, 9 * page, 13 * page) == 0 && traced() == 8 * page);
    CHECK(region_release(&region) == 0 && traced() == 0 && at_rest());
    region_end(&region);
    stop();
}

/* A refused munmap of a whole range. */
static vm_system_call passed_on;
static bool refuses;

static intptr_t refuse_unmapping(long number, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t d,
                                 uintptr_t e, uintptr_t f) {
    if (refuses && number == SYS_munmap) {
        CHECK(trace_at(a) == NULL); /* gone before another thread can own the addresses */
        return -ENOMEM;
    }
    return passed_on(number, a, b, c, d, e, f);
}

static void what_is_not_unmapped_stays_reported(void) {
    struct region region = opened(0);
    start();
    CHECK(region_commit(&region, 0, 2 * page) == 0);
    trace_count = 0; /* clear_traces */
    CHECK(region_commit(&region, 5 * page, 3 * page) == 0);
    passed_on = vm_replace(refuse_unmapping);
    refuses = true;
    CHECK(region_release(&region) == ENOMEM && traced() == 3 * page && at_rest());
    CHECK(region.traced.count == 1 && region.traced.total == 3 * page);
    CHECK(region_disclaim(&region, 6 * page, page) == ENOMEM && traced() == 3 * page);
    CHECK(trace_count == 3);
    refuses = false;
    CHECK(region_disclaim(&region, 6 * page, page) == 0 && traced() == 2 * page);
    CHECK(region_release(&region) == 0 && traced() == 0 && at_rest());
    (void)vm_replace(NULL);
    region_end(&region);
    stop();
}

static void bytes_that_never_end_stay_reported(void) {
    struct region region = opened(0);
    start();
    if (region_seal(&region) != 0) {
        SKIP("no mseal here");
        CHECK(traced() == 0);
    } else {
        CHECK(traced() == PAGES * page);
        region_end(&region);
        CHECK(traced() == PAGES * page && region.traced.items == NULL);
    }
    region_end(&region);
    stop();
}

static void a_window_reports_what_it_claims_committed(void) {
    struct region outer = opened(0), window = {0};
    uintptr_t at = (uintptr_t)outer.base;
    REQUIRE(region_release(&outer) == 0);
    REQUIRE(region_window(&window, at, PAGES * page, 0, 0, NULL) == 0);
    start();
    CHECK(region_claim(&window, 0, 4 * page, VM_RESERVED) == 0 && traced() == 0);
    CHECK(region_claim(&window, 4 * page, 4 * page, VM_COMMITTED) == 0 && traced() == 4 * page);
    CHECK(region_disclaim(&window, 2 * page, 4 * page) == 0 && traced() == 2 * page);
    region_end(&window);
    CHECK(traced() == 0 && at_rest());
    region_end(&outer);
    stop();
}

static void a_dying_interpreter_is_left_alone(void) {
    struct region region = opened(0), other = opened(0);
    start();
    CHECK(region_commit(&region, 0, 4 * page) == 0);
    finalizing = true; /* the fakes check that they are not called */
    CHECK(region_commit(&region, 8 * page, page) == 0 && region_commit(&other, 0, page) == 0);
    CHECK(region_decommit(&region, page, page) == 0);
    region_end(&region);
    region_end(&other);
    finalizing = false;
    stop();
}

static void without_memory_for_traces_the_rest_is_right(void) {
    struct region region = opened(0);
    start();
    CHECK(region_commit(&region, 0, 8 * page) == 0);
    short_of_memory = true;
    CHECK(region_commit(&region, 10 * page, page) == 0 && traced() == 8 * page);
    CHECK(region_decommit(&region, 2 * page, page) == 0 && traced() == 0);
    short_of_memory = false;
    CHECK(region_commit(&region, 2 * page, page) == 0 && traced() == page);
    CHECK(region_decommit(&region, 0, PAGES * page) == 0 && traced() == 0);
    region_end(&region);
    stop();
}

/* One letter per page: 'w' committed, 't' committed and reported. */
struct model {
    char pages[PAGES + 1];
};

static void model_set(struct model *model, size_t from, size_t n, char letter, char only) {
    for (size_t i = from; i < from + n; i++)
        if (only == '*' || model->pages[i] == only)
            model->pages[i] = letter;
}

static size_t model_traced(const struct model *model) {
    size_t n = 0;
    for (size_t i = 0; i < PAGES; i++)
        n += model->pages[i] == 't';
    return n * page;
}

static void lose_traces(struct model *model) {
    trace_count = 0;
    model_set(model, 0, PAGES, 'w', 't');
}

static void totals_are_exact_whatever_happens(void) {
    uint64_t random = 20;
    for (int round = 0; round < 60; round++) {
        struct region region = opened(round % 2 == 0 ? 0 : VM_NORESERVE);
        struct model model;
        memset(&model, '-', sizeof model);
        for (int step = 0; step < 60; step++) {
            size_t from = random_below(&random, PAGES), n = 1 + random_below(&random, PAGES - from);
            switch (random_below(&random, 8)) {
            case 0:
                tracing = !tracing;
                if (!tracing)
                    lose_traces(&model);
                break;
            case 1:
                lose_traces(&model);
                break;
            case 2:
            case 3:
            case 4:
                CHECK(region_decommit(&region, from * page, n * page) == 0);
                model_set(&model, from, n, '-', '*');
                break;
            default:
                CHECK(region_commit(&region, from * page, n * page) == 0);
                model_set(&model, from, n, tracing ? 't' : 'w', '-');
            }
            if (!CHECK(traced() == model_traced(&model) && at_rest()))
                break;
        }
        region_end(&region);
        CHECK(traced() == 0);
        stop();
    }
}

static void tracing_is_seen_by_the_allocator(void) {
    for (int i = 0; i < 3; i++) {
        CHECK(!tracing_is_on());
        start();
        CHECK(tracing_is_on() && tracing_is_on());
        stop();
    }
    CHECK(at_rest());
}

static int run_all(void) {
    RUN(nothing_is_reported_while_tracing_is_off);
    RUN(tracing_is_seen_by_the_allocator);
    RUN(each_commit_keeps_its_own_traceback);
    RUN(the_middle_of_a_commit_can_be_taken_out);
    RUN(bytes_of_an_earlier_session_are_not_reported_again);
    RUN(what_is_not_unmapped_stays_reported);
    RUN(bytes_that_never_end_stay_reported);
    RUN(a_window_reports_what_it_claims_committed);
    RUN(a_dying_interpreter_is_left_alone);
    RUN(without_memory_for_traces_the_rest_is_right);
    RUN(totals_are_exact_whatever_happens);
    return check_report(Py_Version >> 16 == 0x030d ? "test_tracing" : "test_tracing, as another Python");
}

int main(void) {
    int status = 1;
    page = vm_page_size();
    pid_t child = fork();
    if (child == 0) {
        Py_Version = 0x030b07f0;
        exit(run_all());
    }
    if (child < 0 || waitpid(child, &status, 0) != child || status != 0)
        return EXIT_FAILURE;
    return run_all();
}
