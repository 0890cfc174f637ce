#include <pyconfig.h>
#ifndef Py_GIL_DISABLED /* free-threaded interpreters have no limited API before 3.15 */
#define Py_LIMITED_API 0x030a0000
#endif
#include <Python.h>

#include "forklocks.h"

#include <errno.h>
#include <stdbool.h>

#include "pagealloc.h"

/* PyErr_Fetch is deprecated from 3.12 on, where what replaces it begins. */
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"

/* Exceptions in a row after which a fork goes on without locks: it is not signals, then. */
enum { MOST_RAISED = 10000 };

static PyObject *registry, *collect;
static PyObject *acquire, *release; /* the methods' names */
static PyObject *levels;            /* of each fork under way, the innermost last: what it has taken */
static PyObject *raised;            /* exceptions to raise after the fork, the first one first */
static PyObject *caller;            /* the frame that called the fork in which they were raised */
static unsigned long main_id, forking_id;

void forklocks_open(uintptr_t registry_id, uintptr_t collect_id, unsigned long main_thread) {
    PyGILState_STATE gil = PyGILState_Ensure();
    registry = Py_NewRef((PyObject *)registry_id);
    collect = Py_NewRef((PyObject *)collect_id);
    acquire = PyUnicode_InternFromString("acquire");
    release = PyUnicode_InternFromString("release");
    levels = PyList_New(0);
    raised = PyList_New(0);
    main_id = main_thread;
    PyGILState_Release(gil);
}

/* -- exceptions that have to wait --------------------------------------------------------------- */

static void keep_exception(void) {
    PyObject *type, *value, *traceback;
    if (PyThread_get_thread_ident() != main_id) { /* no signal handler's: nobody could be told */
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

/* Whether a function that the caller of the fork has called is at work: somebody's at-fork handler,
 * in which an exception would be lost. */
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
    PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_DECREF(error);
    return -1;
}

/* -- one lock: a tuple of collect() ------------------------------------------------------------- */

static PyObject *thing_of(PyObject *entry) {
    return PyTuple_GetItem(entry, 0);
}

static struct pagealloc *tables_of(PyObject *entry) {
    return (struct pagealloc *)PyLong_AsVoidPtr(PyTuple_GetItem(entry, 1));
}

/* EBUSY: another thread has it; EDEADLK: there is nothing to take; -1: an exception is set. */
static int try_lock(PyObject *entry) {
    struct pagealloc *tables = tables_of(entry);
    if (tables != NULL)
        return pagealloc_trylock_fork(tables);
    PyObject *taken = PyObject_CallMethodObjArgs(thing_of(entry), acquire, Py_False, NULL);
    int err = taken == NULL ? -1 : taken == Py_True ? 0 : EBUSY;
    Py_XDECREF(taken);
    return err;
}

static void unlock_rlock(PyObject *lock) {
    PyObject *done = PyObject_CallMethodObjArgs(lock, release, NULL);
    if (done == NULL)
        PyErr_WriteUnraisable(lock);
    Py_XDECREF(done);
}

/* Waits, running signal handlers; false: one of them raised, and the lock is not taken. */
static bool lock_rlock(PyObject *lock) {
    PyObject *done = PyObject_CallMethodObjArgs(lock, acquire, NULL);
    Py_XDECREF(done);
    return done != NULL;
}

static void unlock(PyObject *entry) {
    struct pagealloc *tables = tables_of(entry);
    if (tables != NULL)
        pagealloc_unlock_fork(tables);
    else
        unlock_rlock(thing_of(entry));
}

/* Waits until a lock was free once; false: a signal handler raised. */
static bool wait_for(PyObject *entry) {
    struct pagealloc *tables = tables_of(entry);
    if (tables == NULL) {
        bool taken = lock_rlock(thing_of(entry));
        if (taken)
            unlock_rlock(thing_of(entry));
        return taken;
    }
    Py_BEGIN_ALLOW_THREADS
    pagealloc_lock(tables);
    pagealloc_unlock(tables);
    Py_END_ALLOW_THREADS
    return true;
}

/* -- all locks ---------------------------------------------------------------------------------- */

static void unlock_all(PyObject *taken) {
    for (Py_ssize_t i = PyList_Size(taken); i-- > 0;)
        unlock(PyList_GetItem(taken, i));
}

/* Takes all locks, for a caller that has the registry's. NULL if it has none in the end: then
 * `*blocked` is one that another thread has, or an exception is set. */
static PyObject *take_all(PyObject **blocked) {
    PyObject *all = PyObject_CallNoArgs(collect), *taken = PyList_New(0);
    bool failed = all == NULL || taken == NULL;
    for (Py_ssize_t i = 0; !failed && i < PyList_Size(all); i++) {
        PyObject *entry = PyList_GetItem(all, i);
        int err = try_lock(entry);
        if (err == 0 && PyList_Append(taken, entry) != 0) {
            unlock(entry);
            err = -1;
        }
        if (err == EBUSY)
            *blocked = Py_NewRef(entry);
        failed = err != 0 && err != EDEADLK;
    }
    /* The fork is under way from the moment when it stands here. */
    if (!failed && PyList_Append(levels, taken) != 0)
        failed = true;
    if (failed && taken != NULL) {
        unlock_all(taken);
        Py_DECREF(taken);
        taken = NULL;
    }
    Py_XDECREF(all);
    return taken;
}

void forklocks_before(void) {
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *taken = NULL;
    for (int count = 0; taken == NULL && count < MOST_RAISED;) {
        PyObject *blocked = NULL;
        bool went_well = lock_rlock(registry);
        if (went_well) {
            taken = take_all(&blocked);
            if (taken == NULL)
                unlock_rlock(registry);
            went_well = taken != NULL || (blocked != NULL && wait_for(blocked));
        }
        Py_XDECREF(blocked);
        if (!went_well) {
            keep_exception();
            count++;
        }
    }
    if (taken != NULL)
        forking_id = PyThread_get_thread_ident();
    Py_XDECREF(taken);
    PyGILState_Release(gil);
}

/* Gives back what this thread's innermost fork has taken. */
static void after(void) {
    Py_ssize_t last = PyList_Size(levels) - 1;
    if (last < 0 || forking_id != PyThread_get_thread_ident())
        return;
    PyObject *taken = Py_NewRef(PyList_GetItem(levels, last));
    (void)PySequence_DelItem(levels, last);
    unlock_all(taken);
    unlock_rlock(registry);
    Py_DECREF(taken);
}

void forklocks_after_in_parent(void) {
    PyGILState_STATE gil = PyGILState_Ensure();
    after();
    if (PyThread_get_thread_ident() == main_id)
        for (Py_ssize_t i = PyList_Size(raised); i-- > 0;)
            (void)Py_AddPendingCall(raise_first, NULL);
    PyGILState_Release(gil);
}

void forklocks_after_in_child(void) {
    PyGILState_STATE gil = PyGILState_Ensure();
    main_id = PyThread_get_thread_ident();
    after();
    /* The parent's signals are the parent's. */
    while (PyList_Size(raised) > 0)
        (void)PySequence_DelItem(raised, 0);
    PyGILState_Release(gil);
}
