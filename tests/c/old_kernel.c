/* old_kernel: passed to vm_replace, it refuses the advice that Linux before 4.5 does not know.
 *
 *   cc -shared -fPIC -O1 -o old_kernel.so old_kernel.c
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

intptr_t old_kernel(long number, uintptr_t a, uintptr_t b, uintptr_t advice, uintptr_t d,
                    uintptr_t e, uintptr_t f) {
    if (number == SYS_madvise && (advice == 8 || (advice > 17 && advice < 100) || advice > 101))
        return -EINVAL; /* MADV_FREE and later */
    intptr_t got = syscall(number, a, b, advice, d, e, f);
    return got == -1 ? -errno : got;
}
