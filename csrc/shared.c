#include "shared.h"

#include <errno.h>
#include <stdint.h>

#include "vm.h"

/* Bytes allocated in one system call at most; fewer after a signal. */
enum { MAX_PART = 16 << 20 };

int shared_create(const char *name, size_t size, int *fd) {
    if (size > (size_t)PTRDIFF_MAX)
        return ENOMEM;
    int file;
    int err = vm_file_create(name, true, &file);
    if (err == EINVAL) /* before Linux 6.3 every file is executable */
        err = vm_file_create(name, false, &file);
    if (err != 0)
        return err;
    err = vm_file_resize(file, size);
    if (err == 0)
        err = vm_file_seal(file);
    if (err == 0)
        *fd = file;
    else
        (void)vm_file_close(file);
    return err;
}

int shared_allocate(int fd, size_t offset, size_t length) {
    size_t most = MAX_PART, page = vm_page_size();
    while (length > 0) {
        size_t part = length < most ? length : most;
        int err = vm_file_allocate(fd, offset, part);
        if (err == 0) {
            offset += part;
            length -= part;
        } else if (err != EINTR) {
            return err;
        } else if (part > page) {
            /* An interrupted call starts over; a smaller part can finish between two signals. */
            most = part / 2 / page * page;
        }
    }
    return 0;
}
