/* old_kernel: preloaded (LD_PRELOAD), it refuses the advice that Linux before 4.5 does not know.
 *
 *   cc -shared -fPIC -O1 -o old_kernel.so old_kernel.c
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

int madvise(void *address, size_t length, int advice) {
    if (advice == 8 || (advice > 17 && advice < 100) || advice > 101) { /* MADV_FREE and later */
        errno = EINVAL;
        return -1;
    }
    return (int)syscall(SYS_madvise, address, length, advice);
}
