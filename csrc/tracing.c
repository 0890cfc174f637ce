#define _GNU_SOURCE
#include "tracing.h"

#include <dlfcn.h>
#include <pthread.h>

struct allocator { /* PyMemAllocatorEx */
    void *context, *malloc, *calloc, *realloc, *free;
};

/* Python functions, resolved at run time: all or none. */
static struct {
    int (*track)(unsigned domain, uintptr_t address, size_t nbytes);
    int (*untrack)(unsigned domain, uintptr_t address);
    void *(*traceback)(unsigned domain, uintptr_t address); /* a new reference to it or to None */
    int (*is_finalizing)(void);
    int (*take_gil)(void); /* returns an enum that leave_gil takes */
    void (*leave_gil)(int state);
    int (*stop_gc)(void); /* 1: it was on */
    int (*start_gc)(void);
    void (*decref)(void *object);
    void *none;
    /* Python 3.13 only; NULL in other versions. */
    void (*allocator)(int domain, struct allocator *allocator);
} python;

static void *symbol(const char *name) {
    return dlsym(RTLD_DEFAULT, name);
}

static void find_python(void) {
    *(void **)&python.untrack = symbol("PyTraceMalloc_Untrack");
    *(void **)&python.traceback = symbol("_PyTraceMalloc_GetTraceback");
    *(void **)&python.take_gil = symbol("PyGILState_Ensure");
    *(void **)&python.leave_gil = symbol("PyGILState_Release");
    *(void **)&python.stop_gc = symbol("PyGC_Disable");
    *(void **)&python.start_gc = symbol("PyGC_Enable");
    *(void **)&python.decref = symbol("Py_DecRef");
    python.none = symbol("_Py_NoneStruct");
    *(void **)&python.is_finalizing = symbol("Py_IsFinalizing"); /* 3.13 */
    if (python.is_finalizing == NULL)
        *(void **)&python.is_finalizing = symbol("_Py_IsFinalizing");
    if (python.untrack != NULL && python.traceback != NULL && python.take_gil != NULL &&
        python.leave_gil != NULL && python.stop_gc != NULL && python.start_gc != NULL &&
        python.decref != NULL && python.none != NULL && python.is_finalizing != NULL)
        *(void **)&python.track = symbol("PyTraceMalloc_Track");
    const unsigned long *version = symbol("Py_Version");
    if (version != NULL && *version >> 16 == 0x030d)
        *(void **)&python.allocator = symbol("PyMem_GetAllocator");
}

/* A thread that takes the GIL of a finalizing interpreter hangs. */
static bool is_usable(void) {
    return python.track != NULL && !python.is_finalizing();
}

/* Untracking an address that is not tracked tells whether tracing is on. PyTraceMalloc_Track takes
 * the GIL before it checks (3.13.2). */
static bool is_tracing(void) {
    return python.untrack(TRACING_DOMAIN, 0) == 0;
}

static void *raw_malloc(void) {
    struct allocator allocator;
    python.allocator(0, &allocator); /* PYMEM_DOMAIN_RAW */
    return allocator.malloc;
}

/* Needs the GIL and tracing on: before 3.13.2 a stop between its two steps crashes Python. */
static bool track(uintptr_t base, struct run piece) {
    return python.track(TRACING_DOMAIN, base + piece.lo, piece.hi - piece.lo) == 0;
}

static void untrack(uintptr_t base, struct run piece) {
    (void)python.untrack(TRACING_DOMAIN, base + piece.lo);
}

/* Whether tracemalloc still has the trace of a piece. Needs the GIL, and garbage collection off:
 * the call creates objects, and a collection would run finalizers inside the caller's work. */
static bool has_trace(uintptr_t base, struct run piece) {
    void *traceback = python.traceback(TRACING_DOMAIN, base + piece.lo);
    bool has = traceback != NULL && traceback != python.none;
    if (traceback != NULL)
        python.decref(traceback);
    return has;
}

struct entry {
    int gil, gc;
};

static struct entry enter_python(void) {
    struct entry entry = {.gil = python.take_gil()};
    entry.gc = python.stop_gc();
    return entry;
}

static void leave_python(struct entry entry) {
    if (entry.gc == 1)
        (void)python.start_gc();
    python.leave_gil(entry.gil);
}

/* Untracking takes 42 ns on 3.13.2 and later 3.13, as its lock is a semaphore. tracemalloc replaces
 * the raw allocator; comparing it takes 9 ns. */
static bool is_tracing_by_allocator(void) {
    static void *off;
    if (raw_malloc() == __atomic_load_n(&off, __ATOMIC_RELAXED) || !is_usable())
        return false;
    struct entry entry = enter_python(); /* holds off start and stop */
    bool tracing = is_tracing();
    if (!tracing)
        __atomic_store_n(&off, raw_malloc(), __ATOMIC_RELAXED);
    leave_python(entry);
    return tracing;
}

bool tracing_is_on(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    static bool looked;
    if (!__atomic_load_n(&looked, __ATOMIC_ACQUIRE)) {
        (void)pthread_once(&once, find_python);
        __atomic_store_n(&looked, true, __ATOMIC_RELEASE);
    }
    if (python.track == NULL)
        return false;
    return python.allocator != NULL ? is_tracing_by_allocator() : is_tracing() && is_usable();
}

/* Adds a piece that is not in the books, if tracemalloc takes it and there is storage. */
static void add_piece(struct runs *books, uintptr_t base, struct run piece) {
    size_t i = runs_search(books, piece.lo + 1);
    if (runs_grow(books) == 0 && track(base, piece))
        runs_splice(books, i, i, &piece, 1);
}

static void remove_pieces(struct runs *books, size_t from, size_t to) {
    runs_splice(books, from, to, NULL, 0);
    if (books->count == 0)
        runs_empty(books); /* gives large storage back */
}

void tracing_add(struct runs *books, uintptr_t base, size_t lo, size_t hi) {
    struct entry entry = enter_python();
    if (is_tracing())
        add_piece(books, base, (struct run){lo, hi});
    leave_python(entry);
}

/* Splits the piece that contains `offset`, if there is one, at that offset. */
static void split_at(struct runs *books, uintptr_t base, size_t offset) {
    size_t i = runs_search(books, offset + 1);
    if (i == books->count || books->items[i].lo >= offset)
        return;
    struct run whole = books->items[i];
    remove_pieces(books, i, i + 1);
    if (!has_trace(base, whole))
        return;
    untrack(base, whole);
    add_piece(books, base, (struct run){offset, whole.hi});
    add_piece(books, base, (struct run){whole.lo, offset});
}

/* Removes the pieces of [lo, hi) from tracemalloc and from the books. With `keep_books` the books
 * lose only pieces that tracemalloc no longer had. */
static void remove_range(struct runs *books, uintptr_t base, size_t lo, size_t hi,
                         bool keep_books) {
    if (books->count == 0)
        return;
    if (!is_usable()) {
        remove_pieces(books, 0, books->count);
        return;
    }
    /* Untracking needs the GIL too: tracemalloc's lock must not be held while another thread
     * forks. */
    struct entry entry = enter_python();
    if (!is_tracing())
        remove_pieces(books, 0, books->count); /* tracemalloc has dropped its traces */
    /* After a split at both ends, each piece lies inside [lo, hi) or outside. */
    split_at(books, base, lo);
    split_at(books, base, hi);
    size_t from = runs_search(books, lo + 1), to = from, kept = from;
    for (; to < books->count && books->items[to].hi <= hi; to++) {
        struct run piece = books->items[to];
        if (keep_books && has_trace(base, piece)) { /* those to remove gather in [kept, to) */
            books->items[to] = books->items[kept];
            books->items[kept++] = piece;
        }
        untrack(base, piece);
    }
    if (kept < to)
        remove_pieces(books, kept, to);
    leave_python(entry);
}

void tracing_remove(struct runs *books, uintptr_t base, size_t lo, size_t hi) {
    remove_range(books, base, lo, hi, false);
}

void tracing_suspend(struct runs *books, uintptr_t base, size_t lo, size_t hi) {
    remove_range(books, base, lo, hi, true);
}

void tracing_resume(struct runs *books, uintptr_t base, size_t lo, size_t hi) {
    size_t i = runs_search(books, lo + 1);
    if (i == books->count || !is_usable())
        return;
    struct entry entry = enter_python();
    while (i < books->count && books->items[i].lo < hi)
        if (is_tracing() && track(base, books->items[i]))
            i++;
        else
            remove_pieces(books, i, i + 1);
    leave_python(entry);
}

void tracing_drop(struct runs *books, size_t lo, size_t hi) {
    size_t from = runs_search(books, lo + 1), to = from;
    while (to < books->count && books->items[to].hi <= hi)
        to++;
    if (from < to)
        remove_pieces(books, from, to);
}
