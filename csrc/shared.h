/* shared: the memory of a shared region: a file in memory (memfd) of a fixed length, so that no
 * process can shorten it and cause SIGBUS in a mapping of it. Uses vm.
 *
 * By default the kernel allocates a page of the file at its first access, and raises SIGBUS if that
 * would exceed the commit limit. So pages are allocated before they become accessible.
 *
 * Holds for every function here: 0 is success, else the errno of the refusal; any thread may call.
 */
#ifndef PYRESERVE_SHARED_H
#define PYRESERVE_SHARED_H

#include <stddef.h>

/* Creates a file of `size` bytes, allocates none of them, and seals the size. exec closes the file.
 * `name` is shown in /proc/PID/maps. ENOSYS before Linux 3.17, EMFILE, EFBIG above RLIMIT_FSIZE.
 * A refusal leaves no file. */
int shared_create(const char *name, size_t size, int *fd);

/* Allocates the pages of the range that are not allocated yet. Contents stay. ENOSPC or ENOMEM if
 * there is no memory; some of the pages may then be allocated. */
int shared_allocate(int fd, size_t offset, size_t length);

#endif
