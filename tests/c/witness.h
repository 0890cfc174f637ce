/* witness: the kernel's view of this process's memory, read without allocating any. Include
 * it under _GNU_SOURCE. */
#ifndef WITNESS_H
#define WITNESS_H

#include <dirent.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

static char witness_text[(size_t)4 << 20];

/* Reads a file of /proc whole. */
static inline const char *witness_read(const char *path) {
    size_t n = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    for (ssize_t got = 1; fd >= 0 && got > 0 && n + 1 < sizeof witness_text; n += (size_t)got) {
        got = read(fd, witness_text + n, sizeof witness_text - 1 - n);
        if (got < 0)
            break;
    }
    if (fd < 0 || close(fd) != 0 || n == 0 || n + 1 == sizeof witness_text) {
        printf("cannot read %s\n", path);
        exit(EXIT_FAILURE);
    }
    witness_text[n] = '\0';
    return witness_text;
}

/* Parses "lo-hi perms" at the start of a line of maps or smaps. */
static inline bool witness_mapping(const char *line, uintptr_t *lo, uintptr_t *hi,
                                   const char **perms) {
    char *end;
    *lo = (uintptr_t)strtoull(line, &end, 16);
    if (end == line || *end != '-')
        return false;
    line = end + 1;
    *hi = (uintptr_t)strtoull(line, &end, 16);
    *perms = end + 1;
    return end != line && *end == ' ';
}

static inline const char *witness_next_line(const char *line) {
    const char *end = strchr(line, '\n');
    return end == NULL ? line + strlen(line) : end + 1;
}

/* Writes one letter per page to `out`: '.' unmapped, '-' no access, 'w' read and write, '?' other. */
static inline const char *witness_pages(uintptr_t address, size_t length, char *out) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), n = length / page;
    memset(out, '.', n);
    out[n] = '\0';
    const char *line = witness_read("/proc/self/maps"), *perms;
    for (uintptr_t lo, hi; *line != '\0'; line = witness_next_line(line)) {
        if (!witness_mapping(line, &lo, &hi, &perms) || hi <= address || lo >= address + length)
            continue;
        size_t from = lo > address ? (lo - address) / page : 0;
        size_t to = hi < address + length ? (hi - address) / page : n;
        char letter = '?';
        if (strncmp(perms, "---p", 4) == 0)
            letter = '-';
        else if (strncmp(perms, "rw-p", 4) == 0)
            letter = 'w';
        memset(out + from, letter, to - from);
    }
    return out;
}

/* Whether every page of the range shows this letter. */
static inline bool witness_all(uintptr_t address, size_t length, char letter) {
    static char pages[1 << 16];
    size_t n = length / (size_t)sysconf(_SC_PAGESIZE);
    if (n >= sizeof pages)
        return false;
    (void)witness_pages(address, length, pages);
    return strspn(pages, (char[]){letter, '\0'}) == n;
}

/* The line of maps whose mapping holds `address`; NULL if there is none. */
static inline const char *witness_line(uintptr_t address) {
    static char copy[512];
    const char *line = witness_read("/proc/self/maps"), *perms;
    for (uintptr_t lo, hi; *line != '\0'; line = witness_next_line(line))
        if (witness_mapping(line, &lo, &hi, &perms) && lo <= address && address < hi) {
            size_t n = (size_t)(witness_next_line(line) - line);
            if (n >= sizeof copy)
                n = sizeof copy - 1;
            memcpy(copy, line, n);
            copy[n] = '\0';
            return copy;
        }
    return NULL;
}

static inline bool witness_named(uintptr_t address, const char *name) {
    const char *line = witness_line(address);
    return line != NULL && strstr(line, name) != NULL;
}

static inline size_t witness_lines(void) {
    size_t n = 0;
    for (const char *line = witness_read("/proc/self/maps"); *line != '\0'; n++)
        line = witness_next_line(line);
    return n;
}

/* The line of smaps that begins with `key`, of the mapping that holds `address`. */
static inline const char *witness_detail(uintptr_t address, const char *key) {
    bool here = false;
    const char *line = witness_read("/proc/self/smaps"), *perms;
    for (uintptr_t lo, hi; *line != '\0'; line = witness_next_line(line)) {
        if (witness_mapping(line, &lo, &hi, &perms))
            here = lo <= address && address < hi;
        else if (here && strncmp(line, key, strlen(key)) == 0)
            return line + strlen(key);
    }
    return NULL;
}

/* Whether the mapping that holds `address` has this two-letter flag: "ac" charged, "nr" never
 * charged, "dd" not dumped, "dc" not inherited, "wf" wiped on fork, "sl" sealed, ... */
static inline bool witness_flag(uintptr_t address, const char *flag) {
    const char *flags = witness_detail(address, "VmFlags:");
    if (flags == NULL)
        return false;
    for (; *flags == ' ' && flags[1] != '\n'; flags += 3)
        if (strncmp(flags + 1, flag, 2) == 0)
            return true;
    return false;
}

/* How many pages of a mapped range are backed; -1 if not all of it is mapped. */
static inline long witness_resident(uintptr_t address, size_t length) {
    static unsigned char vector[1 << 16];
    size_t n = length / (size_t)sysconf(_SC_PAGESIZE);
    if (n > sizeof vector || mincore((void *)address, length, vector) != 0)
        return -1;
    long resident = 0;
    for (size_t i = 0; i < n; i++)
        resident += vector[i] & 1;
    return resident;
}

/* A number of bytes from /proc/self/status: "VmSize:" all mappings, "VmData:" what RLIMIT_DATA
 * limits. */
static inline size_t witness_status(const char *key) {
    const char *at = strstr(witness_read("/proc/self/status"), key);
    return at == NULL ? 0 : (size_t)strtoull(at + strlen(key), NULL, 10) * 1024;
}

/* Modes 0 and 1 honour MAP_NORESERVE. */
static inline bool witness_honours_noreserve(void) {
    return witness_read("/proc/sys/vm/overcommit_memory")[0] != '2';
}

/* mlock and munlock as system calls: AddressSanitizer makes the functions do nothing. */
static inline long witness_lock(uintptr_t address, size_t length) {
    return syscall(SYS_mlock, address, length);
}

static inline long witness_unlock(uintptr_t address, size_t length) {
    return syscall(SYS_munlock, address, length);
}

/* Sets RLIMIT_DATA or RLIMIT_AS to the present use plus `more` bytes. */
static inline bool limit_to(int resource, const char *key, size_t more) {
    struct rlimit limit;
    if (getrlimit(resource, &limit) != 0)
        return false;
    limit.rlim_cur = witness_status(key) + more;
    return setrlimit(resource, &limit) == 0;
}

static inline bool limit_data(size_t more) {
    return limit_to(RLIMIT_DATA, "VmData:", more);
}

static inline bool limit_addresses(size_t more) {
    return limit_to(RLIMIT_AS, "VmSize:", more);
}

static inline bool unlimit(int resource) {
    struct rlimit limit;
    if (getrlimit(resource, &limit) != 0)
        return false;
    limit.rlim_cur = limit.rlim_max;
    return setrlimit(resource, &limit) == 0;
}

/* The number of entries of /proc/self/task: one for each thread, and two more. Unlike the rest it
 * allocates memory, for the directory. */
static inline size_t witness_tasks(void) {
    DIR *all = opendir("/proc/self/task");
    size_t n = 0;
    while (all != NULL && readdir(all) != NULL)
        n++;
    if (all != NULL)
        (void)closedir(all);
    return n;
}

/* Whether at most `before` tasks are left. A joined thread may stay in /proc for a moment. */
static inline bool witness_no_task_stays(size_t before) {
    for (int i = 0; i < 1000 && witness_tasks() > before; i++)
        (void)usleep(1000);
    return witness_tasks() <= before;
}

#endif
