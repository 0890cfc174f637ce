/* forklocks: takes every lock before a fork and gives it back after it, on both sides.
 *
 * The only module that calls Python besides tracing. It is C because a signal handler may raise
 * between any two Python instructions, and CPython ignores exceptions of at-fork handlers. Here
 * such an exception is kept, the locks are taken all the same, and the exception is raised where
 * the fork was called, after it.
 *
 * Holds for every function here: called without the GIL, as cffi calls, by a thread that Python
 * knows. Objects are given as their addresses (id()) and kept for good.
 */
#ifndef PYRESERVE_FORKLOCKS_H
#define PYRESERVE_FORKLOCKS_H

#include <stdint.h>

/* Once, before all others. `registry` is an RLock; `collect()`, called while it is held, returns a
 * tuple of two lists: of RLocks, and of (owner, address of its struct pagealloc) tuples.
 * `main_thread` is the identifier of the thread that runs signal handlers. */
void forklocks_open(uintptr_t registry, uintptr_t collect, unsigned long main_thread);

/* The handlers for os.register_at_fork. From before until after, the forking thread may re-enter
 * each lock; all other threads wait. */
void forklocks_before(void);
void forklocks_after_in_parent(void);
void forklocks_after_in_child(void);

#endif
