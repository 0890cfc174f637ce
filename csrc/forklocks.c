#include <pyconfig.h>
#ifndef Py_GIL_DISABLED /* free-threaded interpreters have no limited API before 3.15 */
#define Py_LIMITED_API 0x030a0000
#endif
#include <Python.h>

#include "forklocks.h"

#include <errno.h>
#include <stdbool.h>

#include "pagealloc.h"

/* PyErr_Fetch is deprecated since 3.12, but its replacement does not exist before. */
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"

/* After this many consecutive exceptions a fork goes on without locks: signals cannot cause as
 * many. */
enum { MOST_RAISED = 10000 };

static PyObject *registry, *collect;
static PyObject *acquire, *release; /* methods of RLock */
static PyObject *levels; /* a stack of nested forks; each entry holds the locks it took */
static PyObject *raised; /* exceptions to raise after the fork, oldest first */
static PyObject *caller; /* the frame that called the fork during which they were raised */
static unsigned long main_id, forking_id;
static int raised_in_a_row; /* since a fork began to take its locks */

void forklocks_open(uintptr_t registry_id, uintptr_t collect_id, unsigned long main_thread) {
    PyGILState_STATE gil = PyGILState_Ensure();
    registry = Py_NewRef((PyObject *)registry_id);
    collect = Py_NewRef((PyObject *)collect_id);
    acquire = PyObject_GetAttrString((PyObject *)Py_TYPE(registry), "acquire");
    release = PyObject_GetAttrString((PyObject *)Py_TYPE(registry), "release");
    levels = PyList_New(0);
    raised = PyList_New(0);
    main_id = main_thread;
    PyGILState_Release(gil);
}

/* -- exceptions kept until after the fork ------------------------------------------------------ */

/* Saves the current exception, if any, to raise it after the fork. */
static void keep_exception(void) {
    PyObject *type, *value, *traceback;
    if (PyErr_Occurred() == NULL)
        return;
    raised_in_a_row++;
    if (PyThread_get_thread_ident() != main_id) { /* not from a signal handler */
        PyErr_WriteUnraisable(NULL);
        return;
    }
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback != NULL)
        (void)PyException_SetTraceback(value, traceback);
    if (PyList_Append(raised, value) != 0)
        PyErr_WriteUnraisable(value);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    Py_XDECREF(caller);
    caller = Py_XNewRef((PyObject *)PyEval_GetFrame());
}

/* Whether an at-fork handler is running, where an exception would be lost: then the caller of the
 * fork is among the frames, but not the innermost. */
static bool in_at_fork_handler(void) {
    PyObject *frame = Py_XNewRef((PyObject *)PyEval_GetFrame());
    bool first = true, found = false;
    while (frame != NULL && frame != Py_None && !found) {
        found = !first && frame == caller;
        first = false;
        PyObject *back = PyObject_GetAttrString(frame, "f_back");
        Py_DECREF(frame);
        frame = back;
    }
    Py_XDECREF(frame);
    PyErr_Clear();
    return found;
}

/* A pending call: Python's main thread makes it soon, between two instructions. */
static int raise_first(void *unused) {
    if (PyList_Size(raised) <= 0)
        return 0;
    if (in_at_fork_handler() && Py_AddPendingCall(raise_first, unused) == 0)
        return 0;
    PyObject *error = Py_NewRef(PyList_GetItem(raised, 0));
    (void)PySequence_DelItem(raised, 0);
    if (PyList_Size(raised) > 0)
        (void)Py_AddPendingCall(raise_first, unused);
    else
        Py_CLEAR(caller);
    PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_DECREF(error);
    return -1;
}

/* -- one lock ---------------------------------------------------------------------------------- */

/* 0; EBUSY if another thread holds it; -1 if the call raised. */
static int try_rlock(PyObject *lock) {
    PyObject *taken = PyObject_CallFunctionObjArgs(acquire, lock, Py_False, NULL);
    Py_XDECREF(taken);
    keep_exception();
    return taken == NULL ? -1 : taken == Py_True ? 0 : EBUSY;
}

/* Waits, running signal handlers. False if one of them raised: then the lock is not taken. */
static bool lock_rlock(PyObject *lock) {
    PyObject *done = PyObject_CallFunctionObjArgs(acquire, lock, NULL);
    Py_XDECREF(done);
    keep_exception();
    return done != NULL;
}

static void unlock_rlock(PyObject *lock) {
    PyObject *done = PyObject_CallFunctionObjArgs(release, lock, NULL);
    if (done == NULL)
        PyErr_WriteUnraisable(lock);
    Py_XDECREF(done);
}

static struct pagealloc *tables_of(PyObject *entry) {
    return (struct pagealloc *)PyLong_AsVoidPtr(PyTuple_GetItem(entry, 1));
}

/* Waits until `blocked`, a lock or tables, was free once or a signal handler raised. */
static void wait_for(PyObject *blocked) {
    if (!PyTuple_Check(blocked)) {
        if (lock_rlock(blocked))
            unlock_rlock(blocked);
        return;
    }
    struct pagealloc *tables = tables_of(blocked);
    Py_BEGIN_ALLOW_THREADS
    pagealloc_lock(tables);
    pagealloc_unlock(tables);
    Py_END_ALLOW_THREADS
}

/* -- all locks --------------------------------------------------------------------------------- */

static void unlock_rlocks(PyObject *locks, Py_ssize_t count) {
    while (count-- > 0)
        unlock_rlock(PyList_GetItem(locks, count));
}

static void unlock_tables(PyObject *taken) {
    for (Py_ssize_t i = PyList_Size(taken); i-- > 0;)
        pagealloc_unlock_fork(tables_of(PyList_GetItem(taken, i)));
}

/* Takes all locks or none. On failure `*blocked` is a lock that another thread holds; it stays NULL
 * if a call raised. */
static bool take_rlocks(PyObject *locks, PyObject **blocked) {
    Py_ssize_t count = PyList_Size(locks), i = 0;
    int err = 0;
    while (i < count && (err = try_rlock(PyList_GetItem(locks, i))) == 0)
        i++;
    if (err == EBUSY)
        *blocked = Py_NewRef(PyList_GetItem(locks, i));
    if (err != 0)
        unlock_rlocks(locks, i);
    return err == 0;
}

/* The same for tables. Skips those that an outer fork holds. Returns the list of those taken, or
 * NULL. */
static PyObject *take_tables(PyObject *tables, PyObject **blocked) {
    PyObject *taken = PyList_New(0);
    bool failed = taken == NULL;
    for (Py_ssize_t i = 0; !failed && i < PyList_Size(tables); i++) {
        PyObject *entry = PyList_GetItem(tables, i);
        int err = pagealloc_trylock_fork(tables_of(entry));
        if (err == EBUSY) {
            *blocked = Py_NewRef(entry);
            failed = true;
        } else if (err == 0 && PyList_Append(taken, entry) != 0) {
            pagealloc_unlock_fork(tables_of(entry));
            failed = true;
        }
    }
    keep_exception();
    if (failed && taken != NULL) {
        unlock_tables(taken);
        Py_DECREF(taken);
        taken = NULL;
    }
    return taken;
}

/* Takes all locks and tables and records them as one more level. The caller holds the registry. */
static bool take_all(PyObject **blocked) {
    PyObject *all = PyObject_CallNoArgs(collect), *level = NULL;
    keep_exception();
    PyObject *locks = all == NULL ? NULL : PyTuple_GetItem(all, 0);
    if (locks != NULL && take_rlocks(locks, blocked)) {
        PyObject *tables = take_tables(PyTuple_GetItem(all, 1), blocked);
        level = tables == NULL ? NULL : PyTuple_Pack(2, locks, tables);
        if (level != NULL && PyList_Append(levels, level) != 0)
            Py_CLEAR(level);
        keep_exception();
        if (level == NULL) {
            if (tables != NULL)
                unlock_tables(tables);
            unlock_rlocks(locks, PyList_Size(locks));
        }
        Py_XDECREF(tables);
    }
    Py_XDECREF(level);
    Py_XDECREF(all);
    return level != NULL;
}

void forklocks_before(void) {
    PyGILState_STATE gil = PyGILState_Ensure();
    bool taken = false;
    for (raised_in_a_row = 0; !taken && raised_in_a_row < MOST_RAISED;) {
        PyObject *blocked = NULL;
        /* While the registry is held, no lock is registered and no other thread forks. */
        if (!lock_rlock(registry))
            continue;
        taken = take_all(&blocked);
        if (!taken)
            unlock_rlock(registry);
        /* With nothing held, wait for the lock of another thread; then try all again. */
        if (blocked != NULL)
            wait_for(blocked);
        Py_XDECREF(blocked);
    }
    if (taken)
        forking_id = PyThread_get_thread_ident();
    PyGILState_Release(gil);
}

/* Releases the locks and tables that the innermost fork of this thread has taken. */
static void release_innermost(void) {
    Py_ssize_t last = PyList_Size(levels) - 1;
    if (last < 0 || forking_id != PyThread_get_thread_ident())
        return;
    PyObject *level = Py_NewRef(PyList_GetItem(levels, last)), *locks = PyTuple_GetItem(level, 0);
    (void)PySequence_DelItem(levels, last);
    unlock_tables(PyTuple_GetItem(level, 1));
    unlock_rlocks(locks, PyList_Size(locks));
    unlock_rlock(registry);
    Py_DECREF(level);
}

void forklocks_after_in_parent(void) {
    PyGILState_STATE gil = PyGILState_Ensure();
    release_innermost();
    if (PyThread_get_thread_ident() == main_id && PyList_Size(raised) > 0)
        (void)Py_AddPendingCall(raise_first, NULL);
    PyGILState_Release(gil);
}

void forklocks_after_in_child(void) {
    PyGILState_STATE gil = PyGILState_Ensure();
    main_id = PyThread_get_thread_ident();
    release_innermost();
    /* The parent raises them, not the child. */
    while (PyList_Size(raised) > 0)
        (void)PySequence_DelItem(raised, 0);
    Py_CLEAR(caller);
    PyGILState_Release(gil);
}
