/* procmaps: parses /proc/PID/maps and /proc/PID/smaps into a table of numbers.
 *
 * A row is one mapping, and its columns are 64-bit words, so a caller can read a column with a
 * stride. Text is fed in pieces as it is read, and is not kept; a row takes 224 bytes where smaps
 * has about 800. Text that is not in the kernel's format is refused with EINVAL, never misread.
 *
 * A table of zero bytes is empty. Not synchronised.
 */
#ifndef PYRESERVE_PROCMAPS_H
#define PYRESERVE_PROCMAPS_H

#include <stddef.h>
#include <stdint.h>

/* The columns. Sizes are in KiB, as the kernel prints them, and zero until they are known. */
enum procmaps_column {
    PROCMAPS_START,
    PROCMAPS_END,
    PROCMAPS_PERMS, /* a set of enum procmaps_perms */
    PROCMAPS_OFFSET,
    PROCMAPS_DEVICE, /* major << 32 | minor */
    PROCMAPS_INODE,
    PROCMAPS_NAME, /* offset in `names`; adjacent mappings of one name share it */
    PROCMAPS_NAME_LENGTH,
    PROCMAPS_FLAGS, /* VmFlags, a bit for each of procmaps_flags() */
    PROCMAPS_RSS,
    PROCMAPS_PSS,
    PROCMAPS_SHARED_CLEAN,
    PROCMAPS_SHARED_DIRTY,
    PROCMAPS_PRIVATE_CLEAN,
    PROCMAPS_PRIVATE_DIRTY,
    PROCMAPS_SHARED_HUGETLB,
    PROCMAPS_PRIVATE_HUGETLB,
    PROCMAPS_SWAP,
    PROCMAPS_ANONYMOUS,
    PROCMAPS_LAZY_FREE,
    PROCMAPS_ANON_HUGE,
    PROCMAPS_SHMEM_HUGE,
    PROCMAPS_FILE_HUGE,
    PROCMAPS_LOCKED,
    PROCMAPS_SIZE, /* this and the next three: set by procmaps_divide */
    PROCMAPS_PRIVATE,
    PROCMAPS_SHARED_MEMORY,
    PROCMAPS_REST,
    PROCMAPS_COLUMNS
};

enum procmaps_perms { PROCMAPS_READ = 1, PROCMAPS_WRITE = 2, PROCMAPS_EXECUTE = 4, PROCMAPS_SHARED = 8 };

struct procmaps {
    uint64_t *rows; /* count * PROCMAPS_COLUMNS words */
    size_t count;
    size_t capacity;
    char *names;
    size_t names_length;
    size_t names_capacity;
    uint64_t lines; /* read so far; after EINVAL the number of the bad line */
};

/* The two-letter codes of VmFlags (proc(5)), concatenated in the order of their bits in
 * PROCMAPS_FLAGS. Other codes are ignored. */
const char *procmaps_flags(void);

/* Parses the whole lines at the start of `text` and sets `*used` to their bytes; feed the
 * incomplete line after them again with its end. A mapping that starts before the previous one
 * ends, and ends after it, replaces it: the kernel merged them while it printed. EINVAL if a line
 * belongs to neither file or mappings descend; ENOMEM. After an error the table can only be
 * freed. */
int procmaps_feed(struct procmaps *table, const char *text, size_t length, size_t *used);

/* Counts the pages of each mapping in memory and in swap by the /proc/PID/pagemap open at `fd`.
 * Sets the columns RSS, SWAP, PRIVATE_CLEAN and SHARED_CLEAN; the last two include dirty pages.
 * Anonymous memory counts as private, unless `forked`: then each page is looked up. Faster than
 * smaps for many mappings, but not the kernel's own count: pages of pools and swapped pages of
 * shared memory are counted in another way or not at all, so compare the sums. Errors are those of
 * sys_scan_pages and sys_read. */
int procmaps_count_pages(struct procmaps *table, int fd, int forked);

/* Divides the size of each mapping into private memory (clean, dirty and from pools), shared
 * memory, swap and the rest. EINVAL if a mapping has more memory than addresses; `*wrong` is its
 * row. Swap is clipped to the size that is left: the kernel counts swap of shared memory at another
 * moment, and counts a page there and in a private copy twice. A row in the kernel's half of the
 * addresses ([vsyscall]) gets no size and no memory, as VmSize leaves it out. */
int procmaps_divide(struct procmaps *table, size_t *wrong);

/* Sums over mappings, in bytes; `end` is the end of the last one. */
struct procmaps_sums {
    uint64_t size;
    uint64_t reserved;  /* part of `size` without any access */
    uint64_t committed; /* part of `size` that is private and writable */
    uint64_t count;     /* mappings */
    uint64_t end;
};

/* Adds all rows except the last `keep` to the sums and removes them, and clears the names of the
 * others: a file of any length needs a table of only a few rows. Rows in the kernel's half are
 * skipped. The rows kept may still be replaced, see procmaps_feed. */
void procmaps_sum(struct procmaps *table, size_t keep, struct procmaps_sums *sums);

/* Frees the storage of the table and empties it. */
void procmaps_free(struct procmaps *table);

#endif
