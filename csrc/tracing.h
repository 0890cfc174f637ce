/* tracing: reports committed bytes to Python's tracemalloc, in a domain of their own.
 *
 * tracemalloc keeps one trace per address: its bytes and the Python stack at that moment. Each
 * commit is therefore a piece of its own, and cutting one reports the remainder again. The books
 * here say which pieces were reported. A piece lost to stop() or clear_traces() is not reported
 * again.
 *
 * PyTraceMalloc_Track and _Untrack are looked up in the process at first use: the extension stays in
 * Python's stable ABI, and without them, as in a C program, nothing is ever reported.
 *
 * Holds for every function here:
 *  - offsets are whole bytes from `base`, lo < hi;
 *  - it may wait for the GIL, so the caller must not hold a lock that a thread may wait for with the
 *    GIL held;
 *  - no Python code runs inside it;
 *  - where there is no memory for a trace or for the books, bytes go unreported;
 *  - not synchronised: the owner of the books holds a lock. Books that are all zero bytes are empty.
 */
#ifndef PYRESERVE_TRACING_H
#define PYRESERVE_TRACING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "runs.h"

/* For tracemalloc.DomainFilter: "pyre". */
enum { TRACING_DOMAIN = 0x70797265 };

struct tracing {
    struct run *pieces; /* sorted, disjoint; neighbours may touch */
    size_t count, capacity;
};

/* Whether tracemalloc is tracing. Some nanoseconds, and the GIL is not taken. */
bool tracing_is_on(void);

/* Reports [lo, hi), of which nothing is in the books, as one piece; for when tracing_is_on(). */
void tracing_add(struct tracing *books, uintptr_t base, size_t lo, size_t hi);

/* Takes [lo, hi) out of tracemalloc and the books. */
void tracing_remove(struct tracing *books, uintptr_t base, size_t lo, size_t hi);

/* For addresses that are about to be given back, and may be another thread's before that call
 * returns: suspend takes [lo, hi) out of tracemalloc alone; then resume reports it again, or drop
 * takes it out of the books. */
void tracing_suspend(struct tracing *books, uintptr_t base, size_t lo, size_t hi);
void tracing_resume(struct tracing *books, uintptr_t base, size_t lo, size_t hi);
void tracing_drop(struct tracing *books, size_t lo, size_t hi);

/* Frees the books; what was reported stays reported. */
void tracing_clear(struct tracing *books);

#endif
