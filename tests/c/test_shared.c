#define _GNU_SOURCE
#include "shared.h"

#include <errno.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>

#include "check.h"
#include "region.h"
#include "vm.h"
#include "witness.h"

#ifndef SYS_memfd_create
#define SYS_memfd_create 279
#endif

static size_t page;

/* -- a kernel that refuses ----------------------------------------------------------------- */

static vm_system_call passed_on;
static long refused_call;
static uintptr_t refused_second; /* its second argument; ANY: any */
static int refusals, refusal, skipped;
#define ANY UINTPTR_MAX

static intptr_t refuse(long number, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t d, uintptr_t e,
                       uintptr_t f) {
    bool meant = number == refused_call && (refused_second == ANY || refused_second == b);
    if (meant && refusals > 0 && skipped-- <= 0) {
        refusals--;
        return -refusal;
    }
    return passed_on(number, a, b, c, d, e, f);
}

/* Lets `skip` calls pass, then refuses `times`. */
static void refuse_after(int skip, long number, uintptr_t second, int err, int times) {
    refused_call = number;
    refused_second = second;
    refusal = err;
    skipped = skip;
    refusals = times;
    passed_on = vm_replace(refuse);
}

static void refuse_no_more(void) {
    (void)vm_replace(NULL);
}

enum { ALLOCATE = 1, PUNCH = 3 }; /* modes of fallocate */

/* -- the kernel's view --------------------------------------------------------------------- */

static size_t allocated(int fd) {
    struct stat file;
    return fstat(fd, &file) == 0 ? (size_t)file.st_blocks * 512 : SIZE_MAX;
}

/* The lowest free descriptor: equal before and after where nothing leaks. */
static int next_fd(void) {
    int fd = dup(1);
    (void)close(fd);
    return fd;
}

static uintptr_t at(const struct region *region, size_t pages) {
    return (uintptr_t)region->base + pages * page;
}

static volatile unsigned char *byte(const struct region *region, size_t pages) {
    return (volatile unsigned char *)at(region, pages);
}

/* One letter per page: 's' shared, readable and writable; '-' shared without access. */
static bool shows(const struct region *region, const char *pages) {
    for (size_t i = 0; pages[i] != '\0'; i++) {
        const char *line = witness_line(at(region, i));
        const char *perms = line == NULL ? "" : strchr(line, ' ') + 1;
        if (strncmp(perms, pages[i] == 's' ? "rw-s" : "---s", 4) != 0)
            return false;
    }
    return true;
}

static struct region *opened(size_t pages, struct region_options options) {
    struct region *region = calloc(1, sizeof *region);
    REQUIRE(region != NULL);
    options.shared = !options.mirrored;
    REQUIRE(region_reserve(region, pages * page, 0, VM_NO_DUMP, &options) == 0);
    return region;
}

static struct region *shared(size_t pages) {
    return opened(pages, (struct region_options){.name = "shared"});
}

static void end(struct region *region) {
    region_end(region);
    free(region);
}

/* -- files --------------------------------------------------------------------------------- */

static void a_file_has_its_size_for_good(void) {
    int fd = -1, before = next_fd();
    struct stat file;
    REQUIRE(shared_create("for good", 3 * page, &fd) == 0);
    CHECK(fstat(fd, &file) == 0 && (size_t)file.st_size == 3 * page && allocated(fd) == 0);
    CHECK(ftruncate(fd, 0) == -1 && errno == EPERM);
    CHECK(ftruncate(fd, (off_t)page * 9) == -1 && errno == EPERM);
    CHECK(vm_file_close(fd) == 0 && next_fd() == before);
}

static void a_refused_file_leaves_no_descriptor(void) {
    int before = next_fd();
    const struct {
        long call;
        int err;
    } table[] = {{SYS_memfd_create, EMFILE}, {SYS_memfd_create, ENOSYS}, {SYS_ftruncate, EFBIG},
#ifdef SYS_fcntl64
                 {SYS_fcntl64, EPERM}};
#else
                 {SYS_fcntl, EPERM}};
#endif
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        struct region region = {0};
        struct region_options options = {.shared = true};
        refuse_after(0, table[i].call, ANY, table[i].err, 1);
        int err = region_reserve(&region, page, 0, 0, &options);
        refuse_no_more();
        CHECK(err == table[i].err && region.base == NULL && next_fd() == before);
        region_end(&region);
        CHECK(next_fd() == before);
    }
    int fd = 7;
    CHECK(shared_create("too long", SIZE_MAX / page * page, &fd) == ENOMEM && fd == 7);
}

static void old_kernels_make_files_that_can_be_executed(void) {
    int fd = -1;
    refuse_after(0, SYS_memfd_create, ANY, EINVAL, 1);
    int err = shared_create("old", page, &fd);
    refuse_no_more();
    CHECK(err == 0 && refusals == 0 && vm_file_close(fd) == 0);
}

static void the_file_size_limit_is_an_errno(void) {
    int fd = 7;
    struct rlimit limit, before;
    (void)signal(SIGXFSZ, SIG_IGN);
    REQUIRE(getrlimit(RLIMIT_FSIZE, &before) == 0);
    limit = before;
    limit.rlim_cur = page;
    REQUIRE(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    int err = shared_create("limited", 2 * page, &fd);
    int fits = shared_create("fits", page, &fd);
    REQUIRE(setrlimit(RLIMIT_FSIZE, &before) == 0);
    CHECK(err == EFBIG && fits == 0 && shared_allocate(fd, 0, page) == 0);
    CHECK(vm_file_close(fd) == 0);
    (void)signal(SIGXFSZ, SIG_DFL);
}

static void signals_only_delay_an_allocation(void) {
    int fd = -1;
    REQUIRE(shared_create("signals", 64 * page, &fd) == 0);
    refuse_after(0, SYS_fallocate, ALLOCATE, EINTR, 20);
    CHECK(shared_allocate(fd, page, 62 * page) == 0 && refusals == 0);
    refuse_no_more();
    CHECK(allocated(fd) == 62 * page && vm_file_close(fd) == 0);
}

static volatile sig_atomic_t ticks;

static void tick(int signum) {
    (void)signum;
    ticks++;
}

static void a_fast_timer_does_not_stop_an_allocation(void) {
    int fd = -1;
    size_t length = (size_t)64 << 20;
    struct sigaction action = {.sa_handler = tick};
    struct itimerval every = {{0, 500}, {0, 500}}, never = {{0, 0}, {0, 0}};
    REQUIRE(shared_create("timer", length, &fd) == 0 && sigaction(SIGALRM, &action, NULL) == 0);
    REQUIRE(setitimer(ITIMER_REAL, &every, NULL) == 0);
    int err = shared_allocate(fd, 0, length);
    REQUIRE(setitimer(ITIMER_REAL, &never, NULL) == 0);
    CHECK(err == 0 && allocated(fd) == length && vm_file_close(fd) == 0);
}

/* -- regions ------------------------------------------------------------------------------- */

static void the_verbs_of_a_shared_region(void) {
    int before = next_fd();
    struct region *region = shared(8);
    int fd = region->file;
    CHECK(shows(region, "--------") && allocated(fd) == 0);
    CHECK(witness_named(at(region, 0), "/memfd:shared (deleted)"));
    CHECK(region->reserved.total == 8 * page && region->committed.total == 0);

    CHECK(region_commit(region, 2 * page, 3 * page) == 0 && shows(region, "--sss---"));
    CHECK(allocated(fd) == 3 * page && region->committed.total == 3 * page);
    CHECK(witness_resident(at(region, 2), 3 * page) >= 0 && *byte(region, 2) == 0);
    *byte(region, 2) = *byte(region, 3) = *byte(region, 4) = 42;
    CHECK(region_commit(region, 0, 8 * page) == 0 && shows(region, "ssssssss"));
    CHECK(*byte(region, 2) == 42 && *byte(region, 4) == 42 && allocated(fd) == 8 * page);

    CHECK(region_discard(region, 2 * page, page, false) == 0 && allocated(fd) == 7 * page);
    CHECK(region_discard(region, 3 * page, page, true) == 0 && allocated(fd) == 6 * page);
    CHECK(region_populate(region, 2 * page, page) == 0 && allocated(fd) == 7 * page);
    CHECK(*byte(region, 2) == 0 && *byte(region, 3) == 0 && *byte(region, 4) == 42);
    CHECK(region->committed.total == 8 * page);

    CHECK(region_decommit(region, 4 * page, 2 * page) == 0 && shows(region, "ssss--ss"));
    CHECK(allocated(fd) == 6 * page && region->committed.total == 6 * page);
    CHECK(region_commit(region, 4 * page, page) == 0 && *byte(region, 4) == 0);
    CHECK(witness_flag(at(region, 4), "dd") && witness_flag(at(region, 5), "dd"));
    CHECK(region_release(region) == 0 && next_fd() == before && fcntl(fd, F_GETFD) == -1);
    CHECK(region_release(region) == REGION_RELEASED);
    end(region);
    CHECK(next_fd() == before);
}

static void a_strict_discard_keeps_its_pages(void) {
    struct region *region = opened(4, (struct region_options){.strict = true});
    CHECK(region_commit(region, 0, 4 * page) == 0);
    *byte(region, 1) = 42;
    CHECK(region_discard(region, 0, 4 * page, false) == 0 && allocated(region->file) == 4 * page);
    CHECK(*byte(region, 1) == 0);
    *byte(region, 1) = 42;
    refuse_after(0, SYS_fallocate, ALLOCATE, ENOSPC, 1);
    CHECK(region_discard(region, page, page, false) == ENOSPC);
    refuse_no_more();
    CHECK(region->committed.total == 4 * page && allocated(region->file) == 3 * page);
    CHECK(region_populate(region, 0, 4 * page) == 0 && allocated(region->file) == 4 * page);
    end(region);
}

static void a_refused_commit_allocates_nothing(void) {
    struct region *region = shared(16);
    static const char pages[] = "--s--s---s------";
    for (size_t i = 0; pages[i] != '\0'; i++)
        if (pages[i] == 's') {
            CHECK(region_commit(region, i * page, page) == 0);
            *byte(region, i) = 42;
        }
    for (int skip = 0; skip < 4; skip++) {
        const long calls[] = {SYS_fallocate, SYS_mprotect};
        for (size_t i = 0; i < 2; i++) {
            refuse_after(skip, calls[i], ANY, ENOMEM, 1);
            int err = region_commit(region, 0, 16 * page);
            refuse_no_more();
            CHECK(err == ENOMEM && shows(region, pages));
            CHECK(region->committed.total == 3 * page && allocated(region->file) == 3 * page);
            CHECK(*byte(region, 2) == 42 && *byte(region, 5) == 42 && *byte(region, 9) == 42);
        }
    }
    CHECK(region_commit(region, 0, 16 * page) == 0 && *byte(region, 0) == 0);
    end(region);
}

static void a_refused_decommit_keeps_access_and_contents(void) {
    struct region *region = shared(4);
    CHECK(region_commit(region, 0, page) == 0 && region_commit(region, 2 * page, page) == 0);
    *byte(region, 0) = *byte(region, 2) = 42;
    refuse_after(0, SYS_fallocate, PUNCH, EPERM, 1);
    CHECK(region_decommit(region, 0, 4 * page) == EPERM);
    refuse_no_more();
    CHECK(shows(region, "s-s-") && *byte(region, 0) == 42 && *byte(region, 2) == 42);
    refuse_after(0, SYS_mprotect, ANY, ENOMEM, 1);
    CHECK(region_decommit(region, 0, 4 * page) == ENOMEM);
    CHECK(region_discard(region, 0, page, false) == 0);
    refuse_no_more();
    CHECK(shows(region, "s-s-") && *byte(region, 0) == 0 && *byte(region, 2) == 42);
    CHECK(region->committed.total == 2 * page);
    end(region);
}

static void a_refused_mapping_leaves_nothing(void) {
    int before = next_fd();
    size_t size = witness_status("VmSize:");
#ifdef SYS_mmap2
    const long calls[] = {SYS_mmap2, SYS_madvise};
#else
    const long calls[] = {SYS_mmap, SYS_madvise};
#endif
    for (int skip = 0; skip < 3; skip++)
        for (size_t i = 0; i < (skip == 0 ? 2 : 1); i++) {
            struct region region = {0};
            struct region_options options = {.mirrored = true, .guard = page};
            refuse_after(skip, calls[i], ANY, ENOMEM, 1);
            CHECK(region_reserve(&region, 4 * page, 0, VM_NO_DUMP, &options) == ENOMEM);
            refuse_no_more();
            region_end(&region);
            CHECK(next_fd() == before && witness_status("VmSize:") == size);
        }
}

static void a_mirrored_region_shows_its_bytes_twice(void) {
    int before = next_fd();
    struct region *region = opened(8, (struct region_options){.mirrored = true, .guard = page});
    CHECK(region_commit(region, 0, page) == REGION_MIRRORED && allocated(region->file) == 0);
    CHECK(region_commit(region, 0, 8 * page) == 0 && shows(region, "ssssssss"));
    CHECK(region_commit(region, page, page) == 0);
    CHECK(allocated(region->file) == 4 * page && region->committed.total == 8 * page);
    *byte(region, 1) = 1;
    *byte(region, 7) = 7;
    CHECK(*byte(region, 5) == 1 && *byte(region, 3) == 7);
    CHECK(region_decommit(region, 0, 4 * page) == REGION_MIRRORED);
    CHECK(region_discard(region, 0, 4 * page, false) == REGION_MIRRORED && *byte(region, 1) == 1);
    CHECK(region_discard(region, 0, 8 * page, false) == 0 && allocated(region->file) == 0);
    CHECK(region_populate(region, 5 * page, page) == 0 && allocated(region->file) == 4 * page);
    CHECK(*byte(region, 1) == 0 && *byte(region, 7) == 0);
    CHECK(region_decommit(region, 0, 8 * page) == 0 && allocated(region->file) == 0);
    CHECK(shows(region, "--------") && region->committed.total == 0);
    end(region);
    CHECK(next_fd() == before);

    struct region odd = {0};
    struct region_options options = {.mirrored = true};
    CHECK(region_reserve(&odd, 3 * page, 0, 0, &options) == REGION_MISALIGNED);
    region_end(&odd);
    CHECK(next_fd() == before);
}

static void placement_holds_for_shared_regions(void) {
    struct region_options options = {.align = 64 * page, .guard = page};
    struct region *region = opened(4, options);
    CHECK((uintptr_t)region->base % (64 * page) == 0);
    CHECK(witness_all(at(region, 0) - page, page, '-') && witness_all(at(region, 4), page, '-'));
    struct region second = {0};
    options = (struct region_options){.shared = true, .address = at(region, 0), .exact = true};
    CHECK(region_reserve(&second, page, 0, 0, &options) == EEXIST);
    uintptr_t place = at(region, 0);
    CHECK(region_release(region) == 0);
    CHECK(region_reserve(&second, page, 0, 0, &options) == 0 && at(&second, 0) == place);
    region_end(&second);
    end(region);
}

static void a_child_shares_the_bytes_and_ends_alone(void) {
    struct region *region = shared(2);
    CHECK(region_commit(region, 0, page) == 0);
    *byte(region, 0) = 1;
    pid_t child = fork();
    if (child == 0) {
        bool fine = *byte(region, 0) == 1;
        *byte(region, 0) = 2;
        fine = fine && region_release(region) == 0;
        _exit(fine ? 0 : 1);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(*byte(region, 0) == 2 && allocated(region->file) == page);
    end(region);
}

/* Ends a region whose unmapping is refused, as in a child: its parent still uses the file. */
static void an_unmapping_that_is_refused_keeps_the_bytes_of_others(void) {
    int before = next_fd();
    struct region *region = shared(2);
    CHECK(region_commit(region, 0, 2 * page) == 0);
    *byte(region, 0) = 42;
    volatile unsigned char *first = byte(region, 0);
    uintptr_t address = at(region, 0);
    refuse_after(0, SYS_munmap, ANY, ENOMEM, 2);
    CHECK(region_release(region) == ENOMEM && fcntl(region->file, F_GETFD) != -1 && *first == 42);
    region_end(region);
    refuse_no_more();
    CHECK(next_fd() == before && *first == 42);
    CHECK(vm_release(address, 2 * page) == 0);
    free(region);
}

int main(void) {
    page = vm_page_size();
    end(shared(1)); /* malloc must map its heap before anything is counted */
    RUN(a_file_has_its_size_for_good);
    RUN(a_refused_file_leaves_no_descriptor);
    RUN(old_kernels_make_files_that_can_be_executed);
    RUN(the_file_size_limit_is_an_errno);
    RUN(signals_only_delay_an_allocation);
    RUN(a_fast_timer_does_not_stop_an_allocation);
    RUN(the_verbs_of_a_shared_region);
    RUN(a_strict_discard_keeps_its_pages);
    RUN(a_refused_commit_allocates_nothing);
    RUN(a_refused_decommit_keeps_access_and_contents);
    RUN(a_refused_mapping_leaves_nothing);
    RUN(a_mirrored_region_shows_its_bytes_twice);
    RUN(placement_holds_for_shared_regions);
    RUN(a_child_shares_the_bytes_and_ends_alone);
    RUN(an_unmapping_that_is_refused_keeps_the_bytes_of_others);
    return check_report("test_shared");
}
