/* procmaps: the text of /proc/PID/maps and /proc/PID/smaps as a table of numbers.
 *
 * A row is one mapping, a row's columns are 64-bit words, so that a caller may read a whole column
 * with a stride. Text comes in pieces of whole lines, as it is read, and is not kept. Whatever the
 * text says, a function here either makes sense of it or refuses it with EINVAL.
 *
 * A table of zero bytes is empty. One thread at a time.
 */
#ifndef PYRESERVE_PROCMAPS_H
#define PYRESERVE_PROCMAPS_H

#include <stddef.h>
#include <stdint.h>

/* The columns. Sizes are in KiB, as the kernel prints them; all but the addresses are zero until
 * known. */
enum procmaps_column {
    PROCMAPS_START,
    PROCMAPS_END,
    PROCMAPS_PERMS, /* the or-ed enum procmaps_perms */
    PROCMAPS_OFFSET,
    PROCMAPS_DEVICE, /* major << 32 | minor */
    PROCMAPS_INODE,
    PROCMAPS_NAME, /* where in `names` it begins; the same for neighbours of one name */
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
    PROCMAPS_SIZE, /* these four by procmaps_divide */
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
    uint64_t lines; /* read so far: the last one is where EINVAL was */
};

/* The two-letter codes of VmFlags, one after the other, in the order of their bits (proc(5)). Codes
 * that are not among them are ignored. */
const char *procmaps_flags(void);

/* Takes the whole lines at the start of `text`; `*used` is how many bytes they are, the rest is the
 * start of a line whose end is yet to come. A mapping that begins before the last one ends, and ends
 * behind it, takes its place: they became one while the kernel printed. EINVAL: a line is of neither
 * file, or mappings go backwards; ENOMEM. After an error the table may only be freed. */
int procmaps_feed(struct procmaps *table, const char *text, size_t length, size_t *used);

/* Counts what is in memory and in swap of every mapping by /proc/PID/pagemap, open at `fd`: the columns
 * RSS, SWAP, and PRIVATE_CLEAN and SHARED_CLEAN, which here stand for clean and dirty alike. Memory of
 * no file is taken for private unless `forked`, where each page is asked for. Quicker than smaps where
 * there are many mappings, but not the kernel's own count: huge page pools and swapped pages of shared
 * memory are counted otherwise or not at all, so check the sums. Errors are those of sys_scan_pages and
 * sys_read. */
int procmaps_count_pages(struct procmaps *table, int fd, int forked);

/* Divides each mapping's size into what is in memory of this process alone (clean, dirty and of huge
 * page pools), in memory of others too, in swap, and the rest. EINVAL: more is in memory than there are
 * addresses; `*wrong` is that row. Swap is cut to what is left: the kernel counts that of shared memory
 * at another moment, and a page both there and in a private copy. A row in the kernel's half of the
 * addresses, [vsyscall], has no size and no memory: it is of no process and not in VmSize. */
int procmaps_divide(struct procmaps *table, size_t *wrong);

/* What a process's mappings are in sum, in bytes; `end` is where the last one ends. */
struct procmaps_sums {
    uint64_t size;
    uint64_t reserved;  /* of it, neither readable nor writable nor executable */
    uint64_t committed; /* of it, private and writable */
    uint64_t count;
    uint64_t end;
};

/* Adds up all rows but the last `keep` and drops them, and forgets the names of the others, so that a
 * file of any length takes a table of a few rows. Rows in the kernel's half are left out. Those that
 * are kept may yet lose their place, see procmaps_feed. */
void procmaps_sum(struct procmaps *table, size_t keep, struct procmaps_sums *sums);

/* Frees what the table has; it is empty again. */
void procmaps_free(struct procmaps *table);

#endif
