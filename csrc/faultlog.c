#define _GNU_SOURCE
#include "faultlog.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "vm.h"

#ifdef SYS_perf_event_open

/* The kernel's interface, spelt out: <linux/perf_event.h> may be older than the running kernel. */
struct event_attributes { /* struct perf_event_attr, PERF_ATTR_SIZE_VER3 */
    uint32_t type, size;
    uint64_t config, sample_period, sample_type, read_format, flags;
    uint32_t wakeup_events, bp_type;
    uint64_t config1, config2, branch_sample_type, sample_regs_user;
    uint32_t sample_stack_user;
    int32_t clockid;
};
_Static_assert(sizeof(struct event_attributes) == 96, "the kernel's layout");

#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ /* flags are bit fields */
#define FLAG(i) (UINT64_C(1) << (63 - (i)))
#else
#define FLAG(i) (UINT64_C(1) << (i))
#endif

enum { TYPE_SOFTWARE = 1, PAGE_FAULTS = 2 };
enum { SAMPLE_TIME = 1 << 2, SAMPLE_ADDRESS = 1 << 3 };
enum {
    INHERIT = 1,
    EXCLUDE_KERNEL = 5,
    MMAP = 8,
    TASK = 13,
    MMAP_DATA = 17,
    SAMPLE_ID_ALL = 18,
    USE_CLOCKID = 25,
    INHERIT_THREAD = 35
};
enum { RECORD_MMAP = 1, RECORD_LOST = 2, RECORD_FORK = 7, RECORD_SAMPLE = 9 };
enum { SHORTEST = 24 }; /* bytes of a record */
enum { HEAD_OFFSET = 1024, TAIL_OFFSET = 1032 }; /* in struct perf_event_mmap_page */
enum { CLOSE_ON_EXEC = 8 };                     /* PERF_FLAG_FD_CLOEXEC */
enum { DISABLE = 0x2401, SET_OUTPUT = 0x2405 }; /* PERF_EVENT_IOC_... */
#if defined(__mips__) || defined(__powerpc__) || defined(__sparc__)
#undef SYS_perf_event_open /* other ioctl numbers */
#endif
#endif

#ifdef SYS_perf_event_open

struct ring {
    unsigned char *mapped; /* the control page, then the records */
    int fd;                /* the event that owns the mapping */
};

struct faultlog {
    struct ring *rings;
    int *fds;
    size_t nrings, nfds, size, page;
    pid_t owner; /* a forked child does not inherit the rings */
};

static int open_event(int thread, int cpu, uint64_t period, uint64_t flags) {
    struct event_attributes attributes = {
        .type = TYPE_SOFTWARE,
        .size = sizeof attributes,
        .config = PAGE_FAULTS,
        .sample_period = period,
        .sample_type = SAMPLE_TIME | SAMPLE_ADDRESS,
        .flags = flags,
        .clockid = CLOCK_MONOTONIC,
    };
    return (int)syscall(SYS_perf_event_open, &attributes, thread, cpu, -1, CLOSE_ON_EXEC);
}

/* The flags that the kernel accepts for this thread; 0 with errno set if it accepts none. Faults in
 * the kernel, such as those of read(2), need a privilege; threads that start later Linux 5.13. */
static uint64_t accepted_flags(uint64_t period) {
    const uint64_t base =
        FLAG(MMAP) | FLAG(MMAP_DATA) | FLAG(TASK) | FLAG(SAMPLE_ID_ALL) | FLAG(USE_CLOCKID);
    const uint64_t inherit = FLAG(INHERIT) | FLAG(INHERIT_THREAD);
    const uint64_t tried[] = {base | inherit, base | inherit | FLAG(EXCLUDE_KERNEL), base,
                              base | FLAG(EXCLUDE_KERNEL)};
    for (size_t i = 0; i < sizeof tried / sizeof *tried; i++) {
        int fd = open_event(0, -1, period, tried[i]);
        if (fd >= 0) {
            (void)close(fd);
            return tried[i];
        }
    }
    return 0;
}

static int map_ring(int fd, size_t length, uintptr_t *address) {
    int err = vm_map(0, length, VM_RESERVED, address);
    if (err)
        return err;
    err = vm_renew_file(*address, length, VM_COMMITTED, fd);
    if (err)
        (void)vm_release(*address, length);
    return err;
}

/* Opens the events of one CPU, which share a ring. A CPU that is offline gets none. */
static int open_cpu(struct faultlog *log, int cpu, const int *threads, size_t count,
                    uint64_t period, uint64_t flags) {
    struct ring *ring = NULL;
    for (size_t i = 0; i < count; i++) {
        int fd = open_event(threads[i], cpu, period, flags);
        if (fd < 0 && (errno == ENODEV || errno == EINVAL))
            return 0;
        if (fd < 0 && errno == ESRCH)
            continue;
        if (fd < 0)
            return errno;
        log->fds[log->nfds++] = fd;
        if (ring == NULL) {
            uintptr_t mapped;
            int err = map_ring(fd, log->page + log->size, &mapped);
            if (err)
                return err;
            ring = &log->rings[log->nrings++];
            *ring = (struct ring){(void *)mapped, fd};
        } else if (ioctl(fd, SET_OUTPUT, ring->fd)) {
            return errno;
        }
    }
    return 0;
}

int faultlog_open(const int *threads, size_t count, uint64_t period, size_t ring,
                  struct faultlog **log) {
    long cpus = sysconf(_SC_NPROCESSORS_CONF), page = sysconf(_SC_PAGESIZE);
    if (cpus < 1 || page < 1 || count == 0 || period == 0)
        return EINVAL;
    if (ring < (size_t)page || (ring & (ring - 1)))
        return EINVAL;
    uint64_t flags = accepted_flags(period);
    if (flags == 0)
        return errno;
    struct faultlog *made = calloc(1, sizeof *made);
    if (made == NULL)
        return ENOMEM;
    made->size = ring;
    made->page = (size_t)page;
    made->owner = getpid();
    made->rings = calloc((size_t)cpus, sizeof *made->rings);
    made->fds = calloc((size_t)cpus * count, sizeof *made->fds);
    int err = made->rings != NULL && made->fds != NULL ? 0 : ENOMEM;
    for (int cpu = 0; err == 0 && cpu < cpus; cpu++)
        err = open_cpu(made, cpu, threads, count, period, flags);
    if (err == 0 && made->nrings == 0)
        err = ESRCH;
    if (err) {
        faultlog_close(made);
        return err;
    }
    *log = made;
    return 0;
}

static uint64_t word(const unsigned char *bytes, size_t offset) {
    uint64_t value;
    memcpy(&value, bytes + offset, sizeof value);
    return value;
}

/* Reads a record of `size` bytes; false if it is of no interest. */
static bool read_record(const unsigned char *bytes, uint32_t type, size_t size,
                        struct faultlog_record *record) {
    uint32_t ids[2];
    switch (type) {
    case RECORD_SAMPLE: /* time, address */
        *record = (struct faultlog_record){word(bytes, 8), word(bytes, 16), 0, FAULTLOG_FAULT};
        return true;
    case RECORD_MMAP: { /* pid, tid, address, length, offset, name; time at the end */
        const char *name = (const char *)bytes + 40;
        bool anonymous = strncmp(name, "//anon", 6) == 0 || strncmp(name, "[heap]", 6) == 0;
        *record = (struct faultlog_record){word(bytes, size - 8), word(bytes, 16), word(bytes, 24),
                                           anonymous ? FAULTLOG_ANONYMOUS : FAULTLOG_OTHER};
        return true;
    }
    case RECORD_FORK: /* pid, parent's pid, tid, parent's tid; the time */
        memcpy(ids, bytes + 8, sizeof ids);
        *record = (struct faultlog_record){word(bytes, 24), 0, 0, FAULTLOG_FORK};
        return ids[0] != ids[1]; /* else a new thread */
    case RECORD_LOST: /* id, number */
        *record = (struct faultlog_record){0, 0, word(bytes, 16), FAULTLOG_LOST};
        return true;
    default:
        return false;
    }
}

static void copy_out(const struct faultlog *log, const unsigned char *data, uint64_t at,
                     unsigned char *bytes, size_t length) {
    for (size_t i = 0; i < length; i++)
        bytes[i] = data[(at + i) & (log->size - 1)];
}

size_t faultlog_take(struct faultlog *log, struct faultlog_record *records, size_t max) {
    unsigned char bytes[512];
    size_t taken = 0;
    if (log->owner != getpid())
        return 0;
    for (size_t i = 0; i < log->nrings; i++) {
        unsigned char *control = log->rings[i].mapped, *data = control + log->page;
        _Atomic uint64_t *shared_head = (_Atomic uint64_t *)(void *)(control + HEAD_OFFSET);
        _Atomic uint64_t *shared_tail = (_Atomic uint64_t *)(void *)(control + TAIL_OFFSET);
        uint64_t head = atomic_load_explicit(shared_head, memory_order_acquire);
        uint64_t tail = atomic_load_explicit(shared_tail, memory_order_relaxed);
        while (tail < head && taken < max) {
            /* A record may wrap around at the end of the ring; long names are cut. */
            struct {
                uint32_t type;
                uint16_t misc, size;
            } header;
            copy_out(log, data, tail, bytes, sizeof header);
            memcpy(&header, bytes, sizeof header);
            size_t size = header.size;
            if (size < SHORTEST || size > head - tail)
                break;
            size_t kept = size <= sizeof bytes ? size : sizeof bytes;
            copy_out(log, data, tail, bytes, kept - 8);
            copy_out(log, data, tail + size - 8, bytes + kept - 8, 8); /* the time */
            taken += read_record(bytes, header.type, kept, &records[taken]);
            tail += size;
        }
        atomic_store_explicit(shared_tail, tail, memory_order_release);
    }
    return taken;
}

void faultlog_close(struct faultlog *log) {
    if (log == NULL)
        return;
    /* In a forked child other files and mappings may have these numbers and addresses by now. */
    if (log->owner == getpid()) {
        for (size_t i = 0; i < log->nfds; i++)
            (void)ioctl(log->fds[i], DISABLE, 0); /* a child may hold it open for long */
        for (size_t i = 0; i < log->nrings; i++)
            (void)vm_release((uintptr_t)log->rings[i].mapped, log->page + log->size);
        for (size_t i = 0; i < log->nfds; i++)
            (void)close(log->fds[i]);
    }
    free(log->rings);
    free(log->fds);
    free(log);
}

#else

int faultlog_open(const int *threads, size_t count, uint64_t period, size_t ring,
                  struct faultlog **log) {
    (void)threads, (void)count, (void)period, (void)ring, (void)log;
    return ENOSYS;
}

size_t faultlog_take(struct faultlog *log, struct faultlog_record *records, size_t max) {
    (void)log, (void)records, (void)max;
    return 0;
}

void faultlog_close(struct faultlog *log) {
    (void)log;
}

#endif
