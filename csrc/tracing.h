/* tracing: reports committed bytes to Python's tracemalloc, in a domain of their own.
 *
 * tracemalloc keeps one trace per address: the size and the Python stack of the allocation. Each
 * commit is therefore one piece, and decommitting part of a piece reports the rest again. The books
 * record which pieces were reported. A piece that stop() or clear_traces() removed is not reported
 * again. While tracemalloc is off, a commit pays some nanoseconds to find that out.
 *
 * PyTraceMalloc_Track and _Untrack are looked up at first use: they are not in the stable ABI, and
 * in a process without Python nothing is reported.
 *
 * Holds for every function here:
 *  - offsets are whole bytes from `base`, lo < hi;
 *  - it may wait for the GIL, so the caller must not hold a lock for which another thread waits
 *    while it holds the GIL;
 *  - no Python code runs inside it;
 *  - without memory for a trace or for the books, bytes are not reported;
 *  - not synchronised: the owner of the books holds a lock. The books are the set of pieces, which
 *    may touch; runs_clear frees them, and tracemalloc keeps its traces.
 */
#ifndef PYRESERVE_TRACING_H
#define PYRESERVE_TRACING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "runs.h"

/* For tracemalloc.DomainFilter: "pyre". */
enum { TRACING_DOMAIN = 0x70797265 };

/* Whether tracemalloc is tracing. Takes some nanoseconds, and normally no GIL. */
bool tracing_is_on(void);

/* Reports [lo, hi), none of which is in the books, as one piece. Call it if tracing_is_on(). */
void tracing_add(struct runs *books, uintptr_t base, size_t lo, size_t hi);

/* Removes [lo, hi) from tracemalloc and from the books. */
void tracing_remove(struct runs *books, uintptr_t base, size_t lo, size_t hi);

/* For addresses that are about to be unmapped, which another thread may own before munmap returns:
 * suspend removes [lo, hi) from tracemalloc only. Then drop removes it from the books, or resume
 * reports it again. */
void tracing_suspend(struct runs *books, uintptr_t base, size_t lo, size_t hi);
void tracing_resume(struct runs *books, uintptr_t base, size_t lo, size_t hi);
void tracing_drop(struct runs *books, size_t lo, size_t hi);

#endif
