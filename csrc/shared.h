/* shared: the memory of a shared region: a file in memory (memfd) whose length is fixed, so that no
 * access within it can be beyond its end. Uses vm.
 *
 * The kernel gives a page of the file memory at the first access, and raises SIGBUS when the memory
 * would exceed the commit limit. So a page is allocated before it becomes accessible.
 *
 * Holds for every function here: 0 is success, else the errno of the refusal; any thread may call.
 */
#ifndef PYRESERVE_SHARED_H
#define PYRESERVE_SHARED_H

#include <stddef.h>

/* Creates a file of `size` bytes, none of them allocated, sealed against another size; exec closes
 * it. `name` is shown in /proc/PID/maps. ENOSYS before Linux 3.17; EMFILE; EFBIG above
 * RLIMIT_FSIZE. A refusal leaves no file. */
int shared_create(const char *name, size_t size, int *fd);

/* Allocates the pages of the range that are not allocated. Contents stay. ENOSPC or ENOMEM if there
 * is no memory: then some pages may be allocated that were not. */
int shared_allocate(int fd, size_t offset, size_t length);

#endif
