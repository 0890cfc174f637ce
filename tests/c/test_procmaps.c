#define _GNU_SOURCE
#include "procmaps.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"

#define LINE "7f0000001000-7f0000003000 rw-p 00000000 fe:01 12                         /tmp/a b \n"

static uint64_t at(const struct procmaps *table, size_t i, enum procmaps_column column) {
    REQUIRE(i < table->count);
    return table->rows[i * PROCMAPS_COLUMNS + column];
}

static int feed(struct procmaps *table, const char *text) {
    size_t used = 0;
    return procmaps_feed(table, text, strlen(text), &used);
}

static void a_line_is_a_row(void) {
    struct procmaps table = {0};
    CHECK(feed(&table, LINE) == 0);
    CHECK(at(&table, 0, PROCMAPS_START) == 0x7f0000001000 && at(&table, 0, PROCMAPS_END) == 0x7f0000003000);
    CHECK(at(&table, 0, PROCMAPS_PERMS) == (PROCMAPS_READ | PROCMAPS_WRITE));
    CHECK(at(&table, 0, PROCMAPS_DEVICE) == (UINT64_C(0xfe) << 32 | 1));
    CHECK(at(&table, 0, PROCMAPS_INODE) == 12 && at(&table, 0, PROCMAPS_NAME_LENGTH) == 9);
    CHECK(memcmp(table.names + at(&table, 0, PROCMAPS_NAME), "/tmp/a b ", 9) == 0);
    procmaps_free(&table);
    CHECK(table.count == 0 && table.rows == NULL && table.names == NULL);
}

static void half_a_line_waits_for_its_end(void) {
    size_t used = 99;
    struct procmaps table = {0};
    for (size_t cut = 0; cut < strlen(LINE); cut++) {
        CHECK(procmaps_feed(&table, LINE, cut, &used) == 0);
        CHECK(used == 0 && table.count == 0);
    }
    CHECK(procmaps_feed(&table, LINE "7f0000003000-", strlen(LINE) + 13, &used) == 0);
    CHECK(used == strlen(LINE) && table.count == 1);
    procmaps_free(&table);
}

static void fields_belong_to_the_last_row(void) {
    struct procmaps table = {0};
    CHECK(feed(&table, LINE "Size:   8 kB\nRss:    4 kB\nSwap:   4 kB\nNew:  x\nVmFlags: rd nr zz \n") == 0);
    CHECK(at(&table, 0, PROCMAPS_RSS) == 4 && at(&table, 0, PROCMAPS_SWAP) == 4);
    const char *flags = procmaps_flags();
    for (unsigned i = 0; i < strlen(flags) / 2; i++) {
        bool named = memcmp(flags + 2 * i, "rd", 2) == 0 || memcmp(flags + 2 * i, "nr", 2) == 0;
        CHECK((at(&table, 0, PROCMAPS_FLAGS) >> i & 1) == named);
    }
    procmaps_free(&table);
}

static void what_is_neither_file_is_refused(void) {
    const char *const wrong[] = {
        "\n",
        "Rss: 4 kB\n",
        "1000-2000\n",
        "1000-2000 rw-p 0 0:0\n",
        "1000-2000 rwzp 0 0:0 0\n",
        "1000-2000 rw-p 0 0:0 0x\n",
        "2000-1000 rw-p 0 0:0 0\n",
        "1000-1000 rw-p 0 0:0 0\n",
        "1000-2001 rw-p 0 0:0 0\n",
        "11111111111111111000-2000 rw-p 0 0:0 0\n",
        "1000-2000 rw-p 0 100000000:0 0\n",
        "1000-2000 rw-p 0 0:0 99999999999999999999\n",
        "2000-4000 rw-p 0 0:0 0\n1000-3000 rw-p 0 0:0 0\n",
        "2000-4000 rw-p 0 0:0 0\n3000-4000 rw-p 0 0:0 0\n",
        "4000-5000 rw-p 0 0:0 0\n2000-3000 rw-p 0 0:0 0\n",
        "1000-2000 rw-p 0 0:0 0\nRss: 5 kB\n",
        "1000-2000 rw-p 0 0:0 0\nRss: 4\n",
        "1000-2000 rw-p 0 0:0 0\nRss: 4 MB\n",
        "1000-2000 rw-p 0 0:0 0\nRss 4 kB\n",
        "1000-2000 rw-p 0 0:0 0\nRss: -4 kB\n",
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        struct procmaps table = {0};
        CHECK(feed(&table, wrong[i]) == EINVAL);
        procmaps_free(&table);
    }
}

/* Mappings that merge between two pieces of the kernel's text are printed before and after the merge. */
static void what_became_one_meanwhile_is_one_row(void) {
    struct procmaps table = {0};
    CHECK(feed(&table, "1000-2000 rw-p 0 0:0 0\n3000-5000 rw-p 0 0:0 0 [a]\nRss: 8 kB\n"
                       "5000-6000 r--p 0 0:0 0 [a]\n") == 0);
    CHECK(feed(&table, "5000-7000 rw-p 0 0:0 0 [a]\n") == 0);
    CHECK(table.count == 3 && at(&table, 2, PROCMAPS_END) == 0x7000);
    CHECK(feed(&table, "3000-8000 rw-p 0 0:0 0\nRss: 20 kB\n") == 0);
    CHECK(table.count == 2 && at(&table, 1, PROCMAPS_START) == 0x3000);
    CHECK(at(&table, 1, PROCMAPS_END) == 0x8000 && at(&table, 1, PROCMAPS_RSS) == 20);
    CHECK(feed(&table, "4000-9000 rw-p 0 0:0 0\n") == 0); /* the first part stays a row of its own */
    CHECK(table.count == 3 && at(&table, 1, PROCMAPS_END) == 0x4000 && at(&table, 1, PROCMAPS_RSS) == 0);
    CHECK(at(&table, 2, PROCMAPS_START) == 0x4000 && at(&table, 2, PROCMAPS_END) == 0x9000);
    procmaps_free(&table);
}

static void swap_is_what_memory_leaves(void) {
    struct procmaps table = {0};
    size_t wrong = 99;
    CHECK(feed(&table, LINE "Private_Dirty: 4 kB\nSwap: 8 kB\n") == 0);
    CHECK(procmaps_divide(&table, &wrong) == 0 && wrong == 99);
    CHECK(at(&table, 0, PROCMAPS_SWAP) == 4 && at(&table, 0, PROCMAPS_REST) == 0);
    procmaps_free(&table);
}

/* Random text of a small alphabet, so that many lines are almost valid. For the sanitizers. */
static void noise_does_no_harm(void) {
    const char alphabet[] = "0123456789abcdef- rwxsp:\n/[]RskBVmFlagnz";
    uint64_t state = 1;
    for (int round = 0; round < 20000; round++) {
        char text[256];
        size_t length = (size_t)snprintf(text, sizeof text, "%s", round % 2 ? LINE "Rss: 4 kB\n" : "");
        for (; length < sizeof text && random_below(&state, 97) != 0; length++)
            text[length] = alphabet[random_below(&state, sizeof alphabet - 1)];
        struct procmaps table = {0};
        size_t used = 0;
        int err = procmaps_feed(&table, text, length, &used);
        CHECK((err == 0 || err == EINVAL) && used <= length);
        procmaps_free(&table);
    }
}

static void read_file(struct procmaps *table, const char *path) {
    char text[4096];
    size_t left = 0, used = 0;
    int fd = open(path, O_RDONLY);
    REQUIRE(fd >= 0);
    for (ssize_t n; (n = read(fd, text + left, sizeof text - left)) > 0; left -= used) {
        left += (size_t)n;
        REQUIRE(procmaps_feed(table, text, left, &used) == 0);
        memmove(text, text + used, left - used);
    }
    REQUIRE(left == 0);
    (void)close(fd);
}

static void pages_are_counted_where_they_are(void) {
    int fd = open("/proc/self/pagemap", O_RDONLY);
    size_t page = (size_t)sysconf(_SC_PAGESIZE), n = 3000;
    char *mine = mmap(NULL, n * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REQUIRE(mine != MAP_FAILED);
    (void)madvise(mine, n * page, MADV_NOHUGEPAGE);
    for (size_t i = 0; i < n; i += 3)
        mine[i * page] = 1;
    char reads = mine[page]; /* the zero page does not count as memory of the process */
    REQUIRE(mprotect(mine, page * (n / 2), PROT_NONE) == 0);
    struct procmaps table = {0};
    read_file(&table, "/proc/self/maps");
    int err = fd < 0 ? errno : procmaps_count_pages(&table, fd, 1);
    if (err == 0)
        err = procmaps_count_pages(&table, fd, 0); /* replaces the earlier counts */
    if (err != 0) {
        SKIP("no PAGEMAP_SCAN here");
    } else {
        uint64_t rss = 0, own = 0;
        for (size_t i = 0; i < table.count; i++)
            if (at(&table, i, PROCMAPS_START) >= (uintptr_t)mine &&
                at(&table, i, PROCMAPS_END) <= (uintptr_t)mine + n * page) {
                rss += at(&table, i, PROCMAPS_RSS);
                own += at(&table, i, PROCMAPS_PRIVATE_CLEAN);
            }
        CHECK(rss == n / 3 * page / 1024 && own == rss && reads == 0);
    }
    procmaps_free(&table);
    CHECK(procmaps_count_pages(&table, -1, 0) == 0);
    (void)munmap(mine, n * page);
    (void)close(fd);
}

/* Any file may have its name, so the address decides. */
static void the_kernels_half_is_of_no_process(void) {
    struct procmaps table = {0};
    size_t wrong = 99;
    CHECK(feed(&table, "1000-2000 rw-p 0 0:0 0 [vsyscall]\nPrivate_Dirty: 4 kB\n"
                       "ffffffffff600000-ffffffffff601000 --xp 0 0:0 0\nRss: 4 kB\nPrivate_Dirty: 4 kB\n") == 0);
    CHECK(procmaps_divide(&table, &wrong) == 0);
    CHECK(at(&table, 0, PROCMAPS_SIZE) == 4 && at(&table, 0, PROCMAPS_PRIVATE) == 4);
    for (int column = PROCMAPS_RSS; column < PROCMAPS_COLUMNS; column++)
        CHECK(at(&table, 1, (enum procmaps_column)column) == 0);
    procmaps_free(&table);
}

static void rows_are_added_up_and_dropped(void) {
    struct procmaps table = {0};
    struct procmaps_sums sums = {0};
    CHECK(feed(&table, "1000-3000 rw-p 0 0:0 0 /a\n3000-4000 ---p 0 0:0 0 /a\n5000-6000 rw-s 0 0:0 0 /b\n") == 0);
    procmaps_sum(&table, 1, &sums);
    CHECK(table.count == 1 && at(&table, 0, PROCMAPS_START) == 0x5000 && table.names_length == 0);
    CHECK(sums.size == 0x3000 && sums.reserved == 0x1000 && sums.committed == 0x2000 && sums.count == 2);
    procmaps_sum(&table, 9, &sums);
    CHECK(table.count == 1 && sums.count == 2);
    /* It grew into a row that was removed before, so only the rest of it counts. */
    CHECK(feed(&table, "3000-8000 r--p 0 0:0 0 /b\nffffffffff600000-ffffffffff601000 --xp 0 0:0 0\n") == 0);
    procmaps_sum(&table, 0, &sums);
    CHECK(table.count == 0 && sums.size == 0x7000 && sums.count == 3 && sums.end == 0x8000);
    CHECK(sums.reserved == 0x1000 && sums.committed == 0x2000);
    procmaps_free(&table);
}

int main(void) {
    RUN(a_line_is_a_row);
    RUN(half_a_line_waits_for_its_end);
    RUN(fields_belong_to_the_last_row);
    RUN(what_is_neither_file_is_refused);
    RUN(what_became_one_meanwhile_is_one_row);
    RUN(swap_is_what_memory_leaves);
    RUN(the_kernels_half_is_of_no_process);
    RUN(rows_are_added_up_and_dropped);
    RUN(noise_does_no_harm);
    RUN(pages_are_counted_where_they_are);
    return check_report("test_procmaps");
}
