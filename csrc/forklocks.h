/* forklocks: takes every lock before a fork and releases it afterwards in parent and child. Besides
 * tracing the only module that calls Python.
 *
 * It is written in C because a signal handler may raise between any two Python instructions, and
 * CPython ignores exceptions of at-fork handlers. This module keeps such an exception, takes the
 * locks all the same, and raises the exception after the fork, where the fork was called.
 *
 * Holds for every function here: the caller is a Python thread without the GIL, as in a cffi call.
 * Objects are passed as their addresses (id()) and never released.
 */
#ifndef PYRESERVE_FORKLOCKS_H
#define PYRESERVE_FORKLOCKS_H

#include <stdint.h>

/* Call once, before all other functions. `registry` is an RLock; `collect()`, called while it is
 * held, returns a tuple of two lists: of RLocks, and of (owner, address of its struct pagealloc)
 * tuples. `main_thread` is the identifier of the thread that runs signal handlers. */
void forklocks_open(uintptr_t registry, uintptr_t collect, unsigned long main_thread);

/* The handlers for os.register_at_fork. From `before` until `after` the forking thread can re-enter
 * each lock; all other threads wait. */
void forklocks_before(void);
void forklocks_after_in_parent(void);
void forklocks_after_in_child(void);

#endif
