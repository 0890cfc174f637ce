#include "procmaps.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "sys.h"
#include "vm.h"
#include "words.h"

#define FLAGS \
    "rdwrexshmrmwmemsgdpfdwloiosrrrdcdeacnrhtsfarwfddsdmmhgnhmgbtmtumuwuisssllfdpgu"

/* ---- reading a line -------------------------------------------------------------------------- */

/* The unread part of a line; `end` is its newline. */
struct cursor {
    const char *at;
    const char *end;
};

/* Reads the character that must follow; with 0 there is none. */
static bool expect(struct cursor *line, char after) {
    if (after == 0)
        return true;
    return line->at < line->end && *line->at++ == after;
}

/* Reads up to 16 digits and the character that must follow. */
static bool parse_hexadecimal(struct cursor *line, char after, uint64_t *value) {
    const char *start = line->at;
    uint64_t n = 0;
    for (; line->at < line->end; line->at++) {
        char c = *line->at;
        if (c >= '0' && c <= '9')
            n = n << 4 | (uint64_t)(c - '0');
        else if (c >= 'a' && c <= 'f')
            n = n << 4 | (uint64_t)(c - 'a' + 10);
        else
            break;
    }
    *value = n;
    return line->at > start && line->at - start <= 16 && expect(line, after);
}

static bool parse_decimal(struct cursor *line, char after, uint64_t *value) {
    const char *start = line->at;
    uint64_t n = 0;
    for (; line->at < line->end && *line->at >= '0' && *line->at <= '9'; line->at++) {
        if (n > (UINT64_MAX - 9) / 10)
            return false;
        n = n * 10 + (uint64_t)(*line->at - '0');
    }
    *value = n;
    return line->at > start && expect(line, after);
}

static void skip_spaces(struct cursor *line) {
    while (line->at < line->end && *line->at == ' ')
        line->at++;
}

static bool parse_permissions(struct cursor *line, uint64_t *perms) {
    static const char on[] = "rwxs", off[] = "---p";
    if (line->end - line->at < 5 || line->at[4] != ' ')
        return false;
    *perms = 0;
    for (int i = 0; i < 4; i++) {
        if (line->at[i] == on[i])
            *perms |= 1u << i;
        else if (line->at[i] != off[i])
            return false;
    }
    line->at += 5;
    return true;
}

/* ---- a line for a row ------------------------------------------------------------------------ */

static int grow(void **storage, size_t *capacity, size_t needed, size_t size, size_t first) {
    if (needed <= *capacity)
        return 0;
    size_t enough = *capacity == 0 ? first : *capacity;
    while (enough < needed) {
        if (enough > SIZE_MAX / size / 2)
            return ENOMEM;
        enough *= 2;
    }
    void *moved = realloc(*storage, enough * size);
    if (moved == NULL)
        return ENOMEM;
    *storage = moved;
    *capacity = enough;
    return 0;
}

static uint64_t *row(const struct procmaps *table, size_t i) {
    return table->rows + i * PROCMAPS_COLUMNS;
}

/* Stores a name, once for adjacent mappings of the same file. */
static int store_name(struct procmaps *table, const char *name, size_t length, uint64_t *fresh) {
    fresh[PROCMAPS_NAME_LENGTH] = length;
    if (length == 0)
        return 0;
    if (table->count > 0) {
        const uint64_t *last = row(table, table->count - 1);
        if (last[PROCMAPS_NAME_LENGTH] == length &&
            memcmp(table->names + last[PROCMAPS_NAME], name, length) == 0) {
            fresh[PROCMAPS_NAME] = last[PROCMAPS_NAME];
            return 0;
        }
    }
    void *names = table->names;
    int err = grow(&names, &table->names_capacity, table->names_length + length, 1, 4096);
    table->names = names;
    if (err != 0)
        return err;
    memcpy(table->names + table->names_length, name, length);
    fresh[PROCMAPS_NAME] = table->names_length;
    table->names_length += length;
    return 0;
}

/* Removes the rows from `start` on and cuts the one that reaches it. The kernel prints maps piece
 * by piece, and mappings may have merged in between (fs/proc/task_mmu.c, proc_get_vma). */
static void drop_replaced(struct procmaps *table, uint64_t start) {
    while (table->count > 0 && row(table, table->count - 1)[PROCMAPS_START] >= start)
        table->count--;
    if (table->count == 0)
        return;
    uint64_t *last = row(table, table->count - 1);
    if (last[PROCMAPS_END] <= start)
        return;
    last[PROCMAPS_END] = start; /* its memory below `start` is unknown: set to 0 */
    memset(last + PROCMAPS_RSS, 0, (PROCMAPS_COLUMNS - PROCMAPS_RSS) * sizeof *last);
}

/* "7f00-7f10 rw-p 0000 fe:00 12   /name", as show_vma_header_prefix in fs/proc/task_mmu.c prints
 * it. A newline in a name is printed as \012, so it does not end the line. */
static int parse_mapping(struct procmaps *table, struct cursor line) {
    uint64_t fresh[PROCMAPS_COLUMNS] = {0}, major, minor;
    if (!parse_hexadecimal(&line, '-', &fresh[PROCMAPS_START]) ||
        !parse_hexadecimal(&line, ' ', &fresh[PROCMAPS_END]) ||
        !parse_permissions(&line, &fresh[PROCMAPS_PERMS]) ||
        !parse_hexadecimal(&line, ' ', &fresh[PROCMAPS_OFFSET]) ||
        !parse_hexadecimal(&line, ':', &major) || !parse_hexadecimal(&line, ' ', &minor) ||
        !parse_decimal(&line, 0, &fresh[PROCMAPS_INODE]))
        return EINVAL;
    if (line.at < line.end && *line.at != ' ')
        return EINVAL;
    uint64_t last = table->count == 0 ? 0 : row(table, table->count - 1)[PROCMAPS_END];
    if (fresh[PROCMAPS_START] >= fresh[PROCMAPS_END] || fresh[PROCMAPS_END] <= last ||
        (fresh[PROCMAPS_START] | fresh[PROCMAPS_END]) % 4096 != 0 || (major | minor) >> 32 != 0)
        return EINVAL;
    if (fresh[PROCMAPS_START] < last)
        drop_replaced(table, fresh[PROCMAPS_START]);
    fresh[PROCMAPS_DEVICE] = major << 32 | minor;
    skip_spaces(&line);
    int err = store_name(table, line.at, (size_t)(line.end - line.at), fresh);
    if (err != 0)
        return err;
    void *rows = table->rows;
    err = grow(&rows, &table->capacity, table->count + 1, sizeof fresh, 64);
    table->rows = rows;
    if (err != 0)
        return err;
    memcpy(row(table, table->count++), fresh, sizeof fresh);
    return 0;
}

static uint64_t flag_bits(struct cursor line) {
    uint64_t bits = 0;
    while (line.end - line.at >= 2) {
        for (unsigned i = 0; i < sizeof FLAGS / 2; i++)
            if (line.at[0] == FLAGS[2 * i] && line.at[1] == FLAGS[2 * i + 1])
                bits |= UINT64_C(1) << i;
        line.at += 2;
        skip_spaces(&line);
    }
    return bits;
}

/* The lines of smaps that become columns, in the order in which the kernel prints them. */
static const struct {
    const char *name;
    size_t length;
    enum procmaps_column column;
} FIELDS[] = {
#define FIELD(name, column) {name, sizeof name - 1, column}
    FIELD("Rss", PROCMAPS_RSS),
    FIELD("Pss", PROCMAPS_PSS),
    FIELD("Shared_Clean", PROCMAPS_SHARED_CLEAN),
    FIELD("Shared_Dirty", PROCMAPS_SHARED_DIRTY),
    FIELD("Private_Clean", PROCMAPS_PRIVATE_CLEAN),
    FIELD("Private_Dirty", PROCMAPS_PRIVATE_DIRTY),
    FIELD("Anonymous", PROCMAPS_ANONYMOUS),
    FIELD("LazyFree", PROCMAPS_LAZY_FREE),
    FIELD("AnonHugePages", PROCMAPS_ANON_HUGE),
    FIELD("ShmemPmdMapped", PROCMAPS_SHMEM_HUGE),
    FIELD("FilePmdMapped", PROCMAPS_FILE_HUGE),
    FIELD("Shared_Hugetlb", PROCMAPS_SHARED_HUGETLB),
    FIELD("Private_Hugetlb", PROCMAPS_PRIVATE_HUGETLB),
    FIELD("Swap", PROCMAPS_SWAP),
    FIELD("Locked", PROCMAPS_LOCKED),
};

/* "Rss:   12 kB" or "VmFlags: rd wr"; unknown fields, as of newer kernels, are ignored. */
static int parse_field(struct procmaps *table, struct cursor line) {
    const char *colon = memchr(line.at, ':', (size_t)(line.end - line.at));
    if (table->count == 0 || colon == NULL)
        return EINVAL;
    size_t length = (size_t)(colon - line.at);
    const char *name = line.at;
    uint64_t *last = row(table, table->count - 1);
    line.at = colon + 1;
    skip_spaces(&line);
    if (length == 7 && memcmp(name, "VmFlags", 7) == 0) {
        last[PROCMAPS_FLAGS] = flag_bits(line);
        return 0;
    }
    for (size_t i = 0; i < sizeof FIELDS / sizeof *FIELDS; i++) {
        if (FIELDS[i].length != length || memcmp(FIELDS[i].name, name, length) != 0)
            continue;
        uint64_t kib;
        if (!parse_decimal(&line, ' ', &kib) || line.end - line.at != 2 ||
            memcmp(line.at, "kB", 2) != 0)
            return EINVAL;
        /* At most the size of the mapping, so that sums never wrap. */
        if (kib > (last[PROCMAPS_END] - last[PROCMAPS_START]) / 1024)
            return EINVAL;
        last[FIELDS[i].column] = kib;
        return 0;
    }
    return 0;
}

/* ---- counting pages -------------------------------------------------------------------------- */

/* Recognise [vsyscall] by its address in the upper half: any file may have that name. */
static bool is_kernel_row(const uint64_t *cells) {
    return cells[PROCMAPS_START] >> 63 != 0;
}

/* Adds a run of pages in one state to the columns of the rows that it covers, from row `*at` on. */
static void add_run(struct procmaps *table, size_t *at, const struct sys_page_run *run,
                    const int *columns) {
    while (*at < table->count && row(table, *at)[PROCMAPS_END] <= run->start)
        ++*at;
    for (size_t i = *at; i < table->count && row(table, i)[PROCMAPS_START] < run->end; i++) {
        uint64_t *cells = row(table, i);
        uint64_t start = larger(cells[PROCMAPS_START], run->start);
        uint64_t end = smaller(cells[PROCMAPS_END], run->end);
        for (const int *column = columns; *column >= 0; column++)
            cells[*column] += (end - start) / 1024;
    }
}

static const int PRIVATE_COLUMNS[] = {PROCMAPS_RSS, PROCMAPS_PRIVATE_CLEAN, -1};

/* A part of the pagemap: the entries of [start, end). */
struct window {
    uint64_t start;
    uint64_t end;
    uint64_t entries[512];
};

static int read_entries(struct window *window, uint64_t address, int fd) {
    uint64_t page = vm_page_size();
    size_t size = sizeof *window->entries, got = 0;
    int err = sys_read(fd, address / page * size, window->entries, sizeof window->entries, &got);
    if (err != 0)
        return err;
    window->start = address;
    window->end = address + got / size * page;
    return got < size ? EAGAIN : 0;
}

/* Divides a run into pages that only this process maps (bit 56 of an entry,
 * Documentation/admin-guide/ mm/pagemap.rst) and pages that others map too, and adds each to its
 * columns. */
static int add_resident(struct procmaps *table, size_t *at, const struct sys_page_run *run, int fd,
                        struct window *window) {
    static const int shared[] = {PROCMAPS_RSS, PROCMAPS_SHARED_CLEAN, -1};
    uint64_t page = vm_page_size();
    struct sys_page_run piece = {run->start, run->start, run->categories};
    while (piece.end < run->end) {
        if (piece.end < window->start || piece.end >= window->end) {
            int err = read_entries(window, piece.end, fd);
            if (err != 0)
                return err;
        }
        const uint64_t *entry = window->entries + (piece.end - window->start) / page;
        uint64_t end = smaller(run->end, window->end);
        bool alone = *entry >> 56 & 1;
        piece.start = piece.end;
        for (; piece.end < end && (*entry >> 56 & 1) == alone; entry++)
            piece.end += page;
        add_run(table, at, &piece, alone ? PRIVATE_COLUMNS : shared);
    }
    return 0;
}

static void clear_page_counts(struct procmaps *table) {
    for (size_t i = 0; i < table->count; i++) {
        uint64_t *cells = row(table, i);
        cells[PROCMAPS_RSS] = cells[PROCMAPS_SWAP] = 0;
        cells[PROCMAPS_PRIVATE_CLEAN] = cells[PROCMAPS_SHARED_CLEAN] = 0;
    }
}

int procmaps_count_pages(struct procmaps *table, int fd, int forked) {
    static const int swapped[] = {PROCMAPS_SWAP, -1};
    struct sys_page_run runs[512]; /* with more, Linux 6.18 reports a wrong end of its walk */
    struct window window = {0};
    size_t count = table->count, at = 0;
    clear_page_counts(table);
    while (count > 0 && is_kernel_row(row(table, count - 1)))
        count--;
    if (count == 0)
        return 0;
    uint64_t from = row(table, 0)[PROCMAPS_START], end = row(table, count - 1)[PROCMAPS_END];
    while (from < end) {
        size_t found = 0;
        int err = sys_scan_pages(fd, from, end, runs, 512, &found, &from);
        for (size_t i = 0; err == 0 && i < found; i++) {
            if (runs[i].categories & SYS_PAGE_SWAPPED)
                add_run(table, &at, &runs[i], swapped);
            else if (runs[i].categories & SYS_PAGE_ZERO)
                continue;
            else if (runs[i].categories & SYS_PAGE_FILE || forked)
                err = add_resident(table, &at, &runs[i], fd, &window);
            else
                add_run(table, &at, &runs[i], PRIVATE_COLUMNS);
        }
        if (err != 0)
            return err;
    }
    return 0;
}

/* ---- the public functions -------------------------------------------------------------------- */

const char *procmaps_flags(void) {
    return FLAGS;
}

int procmaps_feed(struct procmaps *table, const char *text, size_t length, size_t *used) {
    struct cursor line = {text, text};
    const char *end = text + length;
    *used = 0;
    while (line.at < end && (line.end = memchr(line.at, '\n', (size_t)(end - line.at))) != NULL) {
        table->lines++;
        /* Addresses have lower-case digits; the names of fields start with a capital letter. */
        bool is_field = line.at < line.end && *line.at >= 'A' && *line.at <= 'Z';
        int err = is_field ? parse_field(table, line) : parse_mapping(table, line);
        if (err != 0)
            return err;
        line.at = line.end + 1;
        *used = (size_t)(line.at - text);
    }
    return 0;
}

int procmaps_divide(struct procmaps *table, size_t *wrong) {
    for (size_t i = 0; i < table->count; i++) {
        uint64_t *cells = row(table, i);
        if (is_kernel_row(cells)) {
            memset(cells + PROCMAPS_RSS, 0, (PROCMAPS_COLUMNS - PROCMAPS_RSS) * sizeof *cells);
            continue;
        }
        uint64_t own = cells[PROCMAPS_PRIVATE_CLEAN] + cells[PROCMAPS_PRIVATE_DIRTY] +
                       cells[PROCMAPS_PRIVATE_HUGETLB];
        uint64_t others = cells[PROCMAPS_SHARED_CLEAN] + cells[PROCMAPS_SHARED_DIRTY] +
                          cells[PROCMAPS_SHARED_HUGETLB];
        uint64_t size = (cells[PROCMAPS_END] - cells[PROCMAPS_START]) / 1024;
        if (own + others > size) {
            *wrong = i;
            return EINVAL;
        }
        if (cells[PROCMAPS_SWAP] > size - own - others)
            cells[PROCMAPS_SWAP] = size - own - others;
        cells[PROCMAPS_SIZE] = size;
        cells[PROCMAPS_PRIVATE] = own;
        cells[PROCMAPS_SHARED_MEMORY] = others;
        cells[PROCMAPS_REST] = size - own - others - cells[PROCMAPS_SWAP];
    }
    return 0;
}

void procmaps_sum(struct procmaps *table, size_t keep, struct procmaps_sums *sums) {
    size_t done = table->count > keep ? table->count - keep : 0;
    for (size_t i = 0; i < done; i++) {
        const uint64_t *cells = row(table, i);
        /* If a mapping grew down into rows removed before, count only what they did not have. */
        uint64_t start = larger(cells[PROCMAPS_START], sums->end);
        if (is_kernel_row(cells) || cells[PROCMAPS_END] <= start)
            continue;
        uint64_t size = cells[PROCMAPS_END] - start, perms = cells[PROCMAPS_PERMS];
        sums->size += size;
        if ((perms & (PROCMAPS_READ | PROCMAPS_WRITE | PROCMAPS_EXECUTE)) == 0)
            sums->reserved += size;
        if ((perms & (PROCMAPS_WRITE | PROCMAPS_SHARED)) == PROCMAPS_WRITE)
            sums->committed += size;
        sums->count++;
        sums->end = cells[PROCMAPS_END];
    }
    if (done > 0)
        memmove(table->rows, row(table, done),
                (table->count - done) * PROCMAPS_COLUMNS * sizeof *table->rows);
    table->count -= done;
    table->names_length = 0;
    for (size_t i = 0; i < table->count; i++)
        row(table, i)[PROCMAPS_NAME_LENGTH] = 0;
}

void procmaps_free(struct procmaps *table) {
    free(table->rows);
    free(table->names);
    memset(table, 0, sizeof *table);
}
