#define _GNU_SOURCE
#include "vm.h"

#include <errno.h>
#include <sys/stat.h>
#include <signal.h>
#include <sys/wait.h>

#include <sys/prctl.h>

#include "check.h"
#include "witness.h"

static size_t page;

/* A new mapping of `n` pages. */
static uintptr_t mapped(size_t n, int access) {
    uintptr_t address = 0;
    REQUIRE(vm_map(0, n * page, access, &address) == 0);
    return address;
}

/* A free address with much free space around it: the kernel places no other mapping there. */
static uintptr_t free_place(void) {
    uintptr_t address = 0;
    size_t wide = (size_t)1 << 36;
    REQUIRE(vm_map(0, wide, VM_RESERVED | VM_NORESERVE, &address) == 0);
    REQUIRE(vm_release(address, wide) == 0);
    return address + wide / 2;
}

static volatile unsigned char *bytes(uintptr_t address) {
    return (volatile unsigned char *)address;
}

/* Runs `body` in a child. Returns its exit status, or minus the signal that ended it. */
static int in_child(int (*body)(uintptr_t), uintptr_t address) {
    int status = 0;
    (void)fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        (void)signal(SIGSEGV, SIG_DFL);
        _exit(body(address));
    }
    if (child < 0 || waitpid(child, &status, 0) != child)
        return 1000;
    return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

static int read_byte(uintptr_t address) {
    return bytes(address)[0];
}

static int write_byte(uintptr_t address) {
    bytes(address)[0] = 1;
    return 0;
}

/* A mapping call that counts, and refuses with `refusal` unless that is 0. */
static vm_system_call passed_on;
static int refusal;
static size_t asked;
static long asked_number;

static intptr_t count_calls(long number, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t d,
                            uintptr_t e, uintptr_t f) {
    asked++;
    asked_number = number;
    return refusal != 0 ? -refusal : passed_on(number, a, b, c, d, e, f);
}

/* Whether exactly one mapping call was made since the last check, with this number. */
static bool asked_once(long number) {
    bool once = asked == 1 && asked_number == number;
    asked = 0;
    return once;
}

#ifdef SYS_mmap2
#define SYS_MMAP SYS_mmap2
#else
#define SYS_MMAP SYS_mmap
#endif
#ifndef SYS_mseal
#define SYS_mseal 462
#endif

#ifdef SYS_fcntl64
#define SYS_FCNTL SYS_fcntl64
#else
#define SYS_FCNTL SYS_fcntl
#endif

static void mapping_calls_pass_the_function_given(void) {
    uintptr_t at = 0;
    size_t seen = 0;
    passed_on = vm_replace(count_calls);
    asked = 0;
    CHECK(vm_map(0, 2 * page, VM_RESERVED, &at) == 0 && asked_once(SYS_MMAP));
    CHECK(vm_map_at(at, page, VM_RESERVED) == EEXIST);
    asked = 0; /* two where the kernel does not know MAP_FIXED_NOREPLACE */
    CHECK(vm_renew(at, 2 * page, VM_RESERVED) == 0 && asked_once(SYS_MMAP));
    CHECK(vm_protect(at, 2 * page, VM_COMMITTED) == 0 && asked_once(SYS_mprotect));
    CHECK(vm_discard(at, page) == 0 && asked_once(SYS_madvise));
    CHECK(vm_advise(at, page, VM_NO_DUMP) == 0 && asked_once(SYS_madvise));
    CHECK(vm_resident(at, page, &seen) == 0 && asked_once(SYS_mincore));
    (void)vm_name(at, page, "counted");
    CHECK(asked_once(SYS_prctl));
    (void)vm_try_seal();
    CHECK(asked_once(SYS_mseal));
    int fd = -1;
    CHECK(vm_file_create("counted", false, &fd) == 0 && asked_once(SYS_memfd_create));
    CHECK(vm_file_resize(fd, page) == 0 && asked_once(SYS_ftruncate));
    CHECK(vm_file_seal(fd) == 0 && asked_once(SYS_FCNTL));
    CHECK(vm_file_allocate(fd, 0, page) == 0 && asked_once(SYS_fallocate));
    CHECK(vm_file_punch(fd, 0, page) == 0 && asked_once(SYS_fallocate));
    CHECK(vm_renew_file(at, page, VM_RESERVED, fd) == 0 && asked_once(SYS_MMAP));
    CHECK(vm_file_close(fd) == 0 && asked_once(SYS_close));
    CHECK(vm_release(at, 2 * page) == 0 && asked_once(SYS_munmap));
    CHECK(vm_replace(NULL) == count_calls);
    CHECK(vm_map(0, page, VM_RESERVED, &at) == 0 && vm_release(at, page) == 0 && asked == 0);
}

static void what_the_function_refuses_is_refused(void) {
    uintptr_t at = mapped(1, VM_COMMITTED), none = 7;
    size_t seen = 7;
    passed_on = vm_replace(count_calls);
    refusal = EAGAIN;
    CHECK(vm_map(0, page, VM_RESERVED, &none) == EAGAIN && none == 7);
    CHECK(vm_map_at(at + page, page, VM_RESERVED) == EAGAIN);
    CHECK(vm_renew(at, page, VM_RESERVED) == EAGAIN && vm_protect(at, page, 0) == EAGAIN);
    CHECK(vm_populate(at, page) == EAGAIN && vm_discard(at, page) == EAGAIN);
    CHECK(vm_discard_lazy(at, page) == EAGAIN && vm_collapse(at, page) == EAGAIN);
    CHECK(vm_guard(at, page) == EAGAIN && vm_unguard(at, page) == EAGAIN);
    CHECK(vm_advise(at, page, VM_NO_DUMP) == EAGAIN && vm_name(at, page, "no") == EAGAIN);
    CHECK(vm_resident(at, page, &seen) == EAGAIN && seen == 7);
    CHECK(vm_seal(at, page) == EAGAIN && vm_release(at, page) == EAGAIN);
    int fd = 7;
    CHECK(vm_file_create("no", true, &fd) == EAGAIN && fd == 7 && vm_file_close(fd) == EAGAIN);
    CHECK(vm_file_resize(fd, page) == EAGAIN && vm_file_seal(fd) == EAGAIN);
    CHECK(vm_file_allocate(fd, 0, page) == EAGAIN && vm_file_punch(fd, 0, page) == EAGAIN);
    CHECK(vm_renew_file(at, page, VM_RESERVED, fd) == EAGAIN);
    refusal = 0;
    (void)vm_replace(NULL);
    CHECK(witness_all(at, page, 'w') && vm_release(at, page) == 0);
}

static void a_file_is_shared_by_its_mappings_and_keeps_its_length(void) {
    int fd = -1;
    uintptr_t at = mapped(4, VM_RESERVED);
    struct stat file;
    REQUIRE(vm_file_create("a file", false, &fd) == 0 && vm_file_resize(fd, 2 * page) == 0);
    CHECK(vm_file_seal(fd) == 0 && ftruncate(fd, 0) == -1 && ftruncate(fd, 1 << 20) == -1);
    CHECK(fcntl(fd, F_GETFD) == FD_CLOEXEC);
    CHECK(vm_renew_file(at, 2 * page, VM_COMMITTED, fd) == 0);
    CHECK(vm_renew_file(at + 2 * page, 2 * page, VM_RESERVED, fd) == 0);
    CHECK(vm_protect(at + 2 * page, 2 * page, VM_COMMITTED) == 0);
    CHECK(witness_named(at, "/memfd:a file (deleted)"));
    CHECK(fstat(fd, &file) == 0 && file.st_blocks == 0);
    CHECK(vm_file_allocate(fd, page, page) == 0);
    CHECK(fstat(fd, &file) == 0 && (size_t)file.st_blocks * 512 == page);
    *(volatile char *)(at + page) = 42;
    CHECK(*(volatile char *)(at + 3 * page) == 42);
    CHECK(vm_file_allocate(fd, 0, 2 * page) == 0 && *(volatile char *)(at + page) == 42);
    CHECK(vm_file_punch(fd, page, page) == 0 && *(volatile char *)(at + 3 * page) == 0);
    CHECK(vm_file_close(fd) == 0 && vm_file_close(fd) == EBADF);
    CHECK(vm_release(at, 4 * page) == 0);
}

static void the_page_size_is_the_kernels(void) {
    CHECK(vm_page_size() == (size_t)sysconf(_SC_PAGESIZE));
    CHECK((vm_page_size() & (vm_page_size() - 1)) == 0);
}

static void a_reserved_mapping_is_addresses_only(void) {
    size_t before = witness_status("VmSize:");
    uintptr_t at = mapped(8, VM_RESERVED);
    CHECK(witness_status("VmSize:") == before + 8 * page);
    CHECK(witness_all(at, 8 * page, '-'));
    CHECK(witness_resident(at, 8 * page) == 0);
    CHECK(!witness_flag(at, "ac"));
    CHECK(in_child(read_byte, at) == -SIGSEGV);
    CHECK(in_child(write_byte, at + 7 * page) == -SIGSEGV);
    CHECK(vm_release(at, 8 * page) == 0);
}

static void a_committed_mapping_is_zero_and_charged(void) {
    uintptr_t at = mapped(8, VM_COMMITTED);
    CHECK(witness_all(at, 8 * page, 'w'));
    CHECK(witness_resident(at, 8 * page) == 0);
    CHECK(witness_flag(at, "ac"));
    CHECK(bytes(at)[0] == 0 && bytes(at)[8 * page - 1] == 0);
    bytes(at)[0] = 1;
    CHECK(witness_resident(at, page) == 1);
    CHECK(vm_release(at, 8 * page) == 0);
}

static void noreserve_is_never_charged(void) {
    if (!witness_honours_noreserve()) {
        SKIP("overcommit mode 2 charges everything");
        return;
    }
    uintptr_t at = mapped(4, VM_COMMITTED | VM_NORESERVE);
    CHECK(witness_all(at, 4 * page, 'w'));
    CHECK(!witness_flag(at, "ac") && witness_flag(at, "nr"));
    uintptr_t later = mapped(4, VM_RESERVED | VM_NORESERVE);
    CHECK(vm_protect(later, 4 * page, VM_COMMITTED) == 0);
    CHECK(!witness_flag(later, "ac") && witness_flag(later, "nr"));
    CHECK(vm_release(at, 4 * page) == 0 && vm_release(later, 4 * page) == 0);
}

static void a_free_hint_is_taken(void) {
    uintptr_t place = free_place(), at = 0;
    CHECK(vm_map(place, 2 * page, VM_RESERVED, &at) == 0 && at == place);
    CHECK(vm_release(at, 2 * page) == 0);
}

static void a_taken_hint_leads_elsewhere(void) {
    uintptr_t taken = mapped(2, VM_COMMITTED), at = 0;
    bytes(taken)[0] = 42;
    CHECK(vm_map(taken, 2 * page, VM_RESERVED, &at) == 0);
    CHECK(at != taken && witness_all(at, 2 * page, '-'));
    CHECK(bytes(taken)[0] == 42);
    CHECK(vm_release(at, 2 * page) == 0 && vm_release(taken, 2 * page) == 0);
}

static void a_refused_mapping_writes_no_address(void) {
    uintptr_t at = 77;
    size_t before = witness_status("VmSize:");
    CHECK(vm_map(0, SIZE_MAX / page * page, VM_RESERVED, &at) == ENOMEM);
    CHECK(vm_map(0, 0, VM_RESERVED, &at) == EINVAL);
    CHECK(at == 77);
    CHECK(witness_status("VmSize:") == before);
}

static void an_exact_mapping_is_where_it_was_asked_for(void) {
    uintptr_t place = free_place();
    CHECK(vm_map_at(place, 3 * page, VM_COMMITTED) == 0);
    CHECK(witness_all(place, 3 * page, 'w'));
    CHECK(vm_release(place, 3 * page) == 0);
}

static void an_exact_mapping_replaces_nothing(void) {
    uintptr_t place = free_place();
    REQUIRE(vm_map_at(place + 2 * page, page, VM_COMMITTED) == 0);
    bytes(place + 2 * page)[5] = 42;
    CHECK(vm_map_at(place, 3 * page, VM_COMMITTED) == EEXIST);
    CHECK(vm_map_at(place + 2 * page, page, VM_RESERVED) == EEXIST);
    CHECK(vm_map_at(place + 2 * page, 4 * page, VM_RESERVED) == EEXIST);
    CHECK(bytes(place + 2 * page)[5] == 42);
    char pages[8];
    CHECK(strcmp(witness_pages(place, 5 * page, pages), "..w..") == 0);
    CHECK(vm_release(place + 2 * page, page) == 0);
}

static void renewing_drops_contents_charge_advice_and_name(void) {
    uintptr_t at = mapped(3, VM_COMMITTED);
    (void)vm_name(at, 3 * page, "old name");
    REQUIRE(vm_advise(at, 3 * page, VM_NO_DUMP) == 0);
    memset((void *)at, 42, 3 * page);
    CHECK(vm_renew(at + page, page, VM_RESERVED) == 0);
    char pages[8];
    CHECK(strcmp(witness_pages(at, 3 * page, pages), "w-w") == 0);
    CHECK(!witness_flag(at + page, "ac") && !witness_flag(at + page, "dd"));
    CHECK(!witness_named(at + page, "old name"));
    CHECK(witness_flag(at, "dd"));
    CHECK(bytes(at)[page - 1] == 42 && bytes(at)[2 * page] == 42);
    CHECK(vm_renew(at + page, page, VM_COMMITTED) == 0);
    CHECK(bytes(at)[page] == 0 && witness_all(at, 3 * page, 'w'));
    CHECK(vm_release(at, 3 * page) == 0);
}

static void protecting_keeps_the_contents(void) {
    uintptr_t at = mapped(4, VM_RESERVED);
    char pages[8];
    CHECK(vm_protect(at + page, 2 * page, VM_COMMITTED) == 0);
    CHECK(strcmp(witness_pages(at, 4 * page, pages), "-ww-") == 0);
    bytes(at)[page] = 42;
    CHECK(vm_protect(at + page, page, VM_RESERVED) == 0);
    CHECK(strcmp(witness_pages(at, 4 * page, pages), "--w-") == 0);
    CHECK(in_child(read_byte, at + page) == -SIGSEGV);
    CHECK(vm_protect(at, 4 * page, VM_COMMITTED) == 0);
    CHECK(bytes(at)[page] == 42);
    CHECK(vm_release(at, 4 * page) == 0);
}

static void protecting_may_stop_half_way(void) {
    uintptr_t at = mapped(3, VM_RESERVED);
    char pages[8];
    REQUIRE(vm_release(at + page, page) == 0);
    CHECK(vm_protect(at, 3 * page, VM_COMMITTED) == ENOMEM);
    CHECK(strcmp(witness_pages(at, 3 * page, pages), "w.-") == 0);
    CHECK(vm_release(at, 3 * page) == 0);
}

static void protecting_is_refused_beyond_the_data_limit(void) {
    uintptr_t at = mapped(64, VM_RESERVED);
    REQUIRE(limit_data(8 * page));
    int err = vm_protect(at, 64 * page, VM_COMMITTED);
    REQUIRE(unlimit(RLIMIT_DATA));
    CHECK(err == ENOMEM);
    CHECK(witness_all(at, 64 * page, '-'));
    CHECK(vm_release(at, 64 * page) == 0);
}

static void populating_backs_every_page_and_keeps_contents(void) {
    uintptr_t at = mapped(16, VM_COMMITTED);
    bytes(at)[3 * page] = 42;
    CHECK(witness_resident(at, 16 * page) < 16);
    CHECK(vm_populate(at, 16 * page) == 0);
    CHECK(witness_resident(at, 16 * page) == 16);
    CHECK(bytes(at)[3 * page] == 42 && bytes(at)[15 * page] == 0);
    CHECK(vm_release(at, 16 * page) == 0);
}

static void discarded_pages_read_as_zero(void) {
    uintptr_t at = mapped(4, VM_COMMITTED);
    memset((void *)at, 42, 4 * page);
    CHECK(vm_discard(at + page, 2 * page) == 0);
    CHECK(witness_resident(at, page) == 1);
    CHECK(witness_resident(at + page, 2 * page) == 0);
    CHECK(bytes(at)[page - 1] == 42 && bytes(at)[page] == 0 && bytes(at)[3 * page - 1] == 0);
    CHECK(bytes(at)[3 * page] == 42);
    CHECK(witness_all(at, 4 * page, 'w'));
    CHECK(vm_release(at, 4 * page) == 0);
}

static void locked_pages_are_discarded_too(void) {
    uintptr_t at = mapped(2, VM_COMMITTED);
    memset((void *)at, 42, 2 * page);
    if (witness_lock(at, page) != 0)
        SKIP("mlock was refused");
    int err = vm_discard(at, 2 * page);
    CHECK(err == 0 || err == EINVAL); /* EINVAL before Linux 5.18 */
    CHECK(err != 0 || (bytes(at)[0] == 0 && bytes(at)[page] == 0));
    CHECK(vm_release(at, 2 * page) == 0);
}

static void lazily_discarded_pages_wait_for_the_kernel(void) {
    uintptr_t at = mapped(4, VM_COMMITTED);
    if (vm_try_discard_lazy() != 0) {
        SKIP("no MADV_FREE here");
    } else {
        memset((void *)at, 42, 4 * page);
        CHECK(vm_discard_lazy(at, 4 * page) == 0);
        CHECK(witness_all(at, 4 * page, 'w'));
        for (size_t i = 0; i < 4; i++)
            CHECK(bytes(at)[i * page] == 42 || bytes(at)[i * page] == 0);
        bytes(at)[0] = 43;
        CHECK(bytes(at)[0] == 43);
    }
    CHECK(vm_release(at, 4 * page) == 0);
}

static void released_pages_are_unmapped(void) {
    size_t before = witness_status("VmSize:");
    uintptr_t at = mapped(4, VM_COMMITTED);
    char pages[8];
    CHECK(vm_release(at + page, 2 * page) == 0);
    CHECK(strcmp(witness_pages(at, 4 * page, pages), "w..w") == 0);
    CHECK(witness_resident(at, 4 * page) == -1);
    CHECK(vm_release(at, 4 * page) == 0);
    CHECK(witness_all(at, 4 * page, '.'));
    CHECK(witness_status("VmSize:") == before);
    CHECK(vm_release(at + 1, page) == EINVAL);
}

static void advice_shows_in_the_flags_of_the_mapping(void) {
    static const struct {
        int advice;
        const char *flag;
    } table[] = {{VM_NO_DUMP, "dd"},
                 {VM_NO_FORK, "dc"},
                 {VM_WIPE_ON_FORK, "wf"},
                 {VM_HUGE_PREFER, "hg"},
                 {VM_HUGE_NEVER, "nh"}};
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        uintptr_t at = mapped(3, VM_RESERVED);
        int err = vm_advise(at + page, page, table[i].advice);
        CHECK(err == 0 || err == EINVAL);
        CHECK(witness_flag(at + page, table[i].flag) == (err == 0));
        CHECK(!witness_flag(at, table[i].flag) && !witness_flag(at + 2 * page, table[i].flag));
        if (err != 0)
            SKIP(table[i].flag);
        CHECK(vm_release(at, 3 * page) == 0);
    }
}

static void several_pieces_of_advice_are_all_given(void) {
    uintptr_t at = mapped(1, VM_COMMITTED);
    CHECK(vm_advise(at, page, 0) == 0);
    CHECK(!witness_flag(at, "dd") && !witness_flag(at, "wf"));
    CHECK(vm_advise(at, page, VM_NO_DUMP | VM_WIPE_ON_FORK) == 0);
    CHECK(witness_flag(at, "dd") && witness_flag(at, "wf"));
    CHECK(vm_protect(at, page, VM_RESERVED) == 0);
    CHECK(witness_flag(at, "dd") && witness_flag(at, "wf"));
    CHECK(vm_release(at, page) == 0);
    CHECK(vm_advise(at, page, VM_NO_DUMP) == ENOMEM);
}

static void a_child_sees_what_the_advice_says(void) {
    uintptr_t plain = mapped(1, VM_COMMITTED), wiped = mapped(1, VM_COMMITTED);
    uintptr_t absent = mapped(1, VM_COMMITTED);
    bytes(plain)[0] = bytes(wiped)[0] = bytes(absent)[0] = 42;
    REQUIRE(vm_advise(wiped, page, VM_WIPE_ON_FORK) == 0);
    REQUIRE(vm_advise(absent, page, VM_NO_FORK) == 0);
    CHECK(in_child(read_byte, plain) == 42);
    CHECK(in_child(read_byte, wiped) == 0);
    CHECK(in_child(read_byte, absent) == -SIGSEGV);
    CHECK(bytes(wiped)[0] == 42 && bytes(absent)[0] == 42);
    CHECK(vm_release(plain, page) == 0 && vm_release(wiped, page) == 0);
    CHECK(vm_release(absent, page) == 0);
}

static void a_name_shows_in_maps(void) {
    uintptr_t at = mapped(2, VM_RESERVED);
    if (vm_try_name() != 0) {
        CHECK(vm_name(at, 2 * page, "witness") == EINVAL);
        SKIP("no CONFIG_ANON_VMA_NAME here");
    } else {
        char name[] = "witness";
        CHECK(vm_name(at, page, name) == 0);
        memset(name, 'x', sizeof name - 1);
        CHECK(witness_named(at, "[anon:witness]") && !witness_named(at + page, "witness"));
        CHECK(vm_name(at, page, "not [allowed]") == EINVAL);
        CHECK(witness_named(at, "[anon:witness]"));
    }
    CHECK(vm_release(at, 2 * page) == 0);
}

static void a_sealed_mapping_stays_as_it_is(void) {
    if (vm_try_seal() != 0) {
        SKIP("no mseal here");
        return;
    }
    uintptr_t at = mapped(2, VM_COMMITTED);
    CHECK(vm_seal(at, 2 * page) == 0);
    bytes(at)[0] = 42;
    CHECK(vm_protect(at, page, VM_RESERVED) == EPERM);
    CHECK(vm_release(at, page) == EPERM);
    CHECK(vm_renew(at + page, page, VM_COMMITTED) == EPERM);
    CHECK(witness_all(at, 2 * page, 'w') && bytes(at)[0] == 42);
    CHECK(vm_discard(at, page) == 0 && bytes(at)[0] == 0);
}

static void huge_pages_can_be_forbidden(void) {
    CHECK(vm_allow_huge(false) == 0 && prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == 1);
    CHECK(vm_allow_huge(true) == 0 && prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == 0);
}

static void collapsed_pages_are_huge_and_keep_their_contents(void) {
    size_t huge = (size_t)2 << 20;
    uintptr_t wide = mapped(2 * huge / page, VM_COMMITTED);
    uintptr_t at = (wide + huge - 1) / huge * huge;
    int err = vm_advise(at, huge, VM_HUGE_NEVER);
    for (size_t i = 0; i < huge; i += page)
        bytes(at)[i] = (unsigned char)(i / page);
    if (err == 0)
        err = vm_advise(at, huge, VM_HUGE_PREFER);
    if (err == 0)
        err = vm_collapse(at, huge);
    if (err != 0) {
        SKIP("no MADV_COLLAPSE here, or no huge page free");
    } else {
        const char *large = witness_detail(at, "AnonHugePages:");
        CHECK(large != NULL && strtoul(large, NULL, 10) == huge / 1024);
    }
    bool kept = true;
    for (size_t i = 0; i < huge; i += page)
        kept = kept && bytes(at)[i] == (unsigned char)(i / page);
    CHECK(kept);
    CHECK(vm_release(wide, 2 * huge) == 0);
    CHECK(vm_collapse(at, huge) != 0);
}

static void guarded_pages_fault_and_have_no_mapping_of_their_own(void) {
    uintptr_t at = mapped(4, VM_COMMITTED);
    memset((void *)at, 42, 4 * page);
    int err = vm_guard(at + page, 2 * page);
    CHECK(err == vm_try_guard());
    if (err != 0) {
        SKIP("no MADV_GUARD_INSTALL here");
    } else {
        CHECK(witness_all(at, 4 * page, 'w'));
        CHECK(in_child(read_byte, at + page) == -SIGSEGV);
        CHECK(in_child(write_byte, at + 2 * page) == -SIGSEGV);
        CHECK(bytes(at)[page - 1] == 42 && bytes(at)[3 * page] == 42);
        CHECK(vm_guard(at + page, page) == 0); /* again */
        CHECK(vm_unguard(at + page, page) == 0 && bytes(at)[page] == 0);
        CHECK(in_child(read_byte, at + 2 * page) == -SIGSEGV);
        CHECK(vm_unguard(at, 4 * page) == 0);
        CHECK(bytes(at)[0] == 42 && bytes(at)[3 * page - 1] == 0);
    }
    CHECK(vm_release(at, 4 * page) == 0);
}

static void trying_leaves_no_mapping_behind(void) {
    size_t before = witness_status("VmSize:");
    (void)vm_try_populate();
    (void)vm_try_discard_lazy();
    (void)vm_try_wipe_on_fork();
    (void)vm_try_guard();
    (void)vm_try_seal();
    (void)vm_try_name();
    CHECK(witness_status("VmSize:") == before);
}

static void what_was_tried_can_be_used(void) {
    uintptr_t at = mapped(1, VM_COMMITTED);
    if (vm_try_discard_lazy() == 0)
        CHECK(madvise((void *)at, page, 8 /* MADV_FREE */) == 0);
    if (vm_try_wipe_on_fork() == 0)
        CHECK(vm_advise(at, page, VM_WIPE_ON_FORK) == 0 && witness_flag(at, "wf"));
    if (vm_try_populate() == 0)
        CHECK(madvise((void *)at, page, 23 /* MADV_POPULATE_WRITE */) == 0);
    uintptr_t guarded = mapped(1, VM_COMMITTED);
    if (vm_try_guard() == 0) {
        CHECK(madvise((void *)guarded, page, 102 /* MADV_GUARD_INSTALL */) == 0);
        CHECK(in_child(read_byte, guarded) == -SIGSEGV);
    } else {
        SKIP("no MADV_GUARD_INSTALL here");
    }
    CHECK(vm_release(at, page) == 0 && vm_release(guarded, page) == 0);
}

static void a_refused_try_is_an_errno(void) {
    int (*const tries[])(void) = {vm_try_populate,      vm_try_discard_lazy, vm_try_wipe_on_fork,
                                  vm_try_guard,         vm_try_seal,         vm_try_name};
    for (size_t i = 0; i < sizeof tries / sizeof tries[0]; i++) {
        int err = tries[i]();
        CHECK(err >= 0 && err < 4096);
        CHECK(tries[i]() == err);
    }
}

static int (*const mapping_tries[])(void) = {vm_try_populate, vm_try_discard_lazy,
                                             vm_try_wipe_on_fork, vm_try_guard, vm_try_name};
enum { TRIES = sizeof mapping_tries / sizeof mapping_tries[0] };

/* Returns one bit per feature that works, in a process where no mapping can be created. */
static int try_without_mappings(uintptr_t unused) {
    (void)unused;
    struct rlimit none = {0, 0};
    uintptr_t at;
    if (setrlimit(RLIMIT_AS, &none) != 0 || vm_map(0, page, VM_COMMITTED, &at) != ENOMEM)
        return -1;
    int works = 0;
    for (int i = 0; i < TRIES; i++)
        works |= (mapping_tries[i]() == 0) << i;
    return works;
}

static void features_are_known_where_no_mapping_can_be_made(void) {
    int works = 0;
    for (int i = 0; i < TRIES; i++)
        works |= (mapping_tries[i]() == 0) << i;
    CHECK(in_child(try_without_mappings, 0) == works);
}

static void addresses_end_above_the_first_stack(void) {
    int bits = vm_address_bits();
    uint64_t here = (uintptr_t)__builtin_frame_address(0); /* ASan may move variables */
    CHECK(bits > 0 && bits <= 64);
    CHECK(here >> (bits - 1) == 1);
}

int main(void) {
    page = vm_page_size();
    RUN(mapping_calls_pass_the_function_given);
    RUN(what_the_function_refuses_is_refused);
    RUN(a_file_is_shared_by_its_mappings_and_keeps_its_length);
    RUN(the_page_size_is_the_kernels);
    RUN(addresses_end_above_the_first_stack);
    RUN(features_are_known_where_no_mapping_can_be_made);
    RUN(a_reserved_mapping_is_addresses_only);
    RUN(a_committed_mapping_is_zero_and_charged);
    RUN(noreserve_is_never_charged);
    RUN(a_free_hint_is_taken);
    RUN(a_taken_hint_leads_elsewhere);
    RUN(a_refused_mapping_writes_no_address);
    RUN(an_exact_mapping_is_where_it_was_asked_for);
    RUN(an_exact_mapping_replaces_nothing);
    RUN(renewing_drops_contents_charge_advice_and_name);
    RUN(protecting_keeps_the_contents);
    RUN(protecting_may_stop_half_way);
    RUN(protecting_is_refused_beyond_the_data_limit);
    RUN(populating_backs_every_page_and_keeps_contents);
    RUN(discarded_pages_read_as_zero);
    RUN(locked_pages_are_discarded_too);
    RUN(lazily_discarded_pages_wait_for_the_kernel);
    RUN(released_pages_are_unmapped);
    RUN(advice_shows_in_the_flags_of_the_mapping);
    RUN(several_pieces_of_advice_are_all_given);
    RUN(a_child_sees_what_the_advice_says);
    RUN(a_name_shows_in_maps);
    RUN(a_sealed_mapping_stays_as_it_is);
    RUN(huge_pages_can_be_forbidden);
    RUN(collapsed_pages_are_huge_and_keep_their_contents);
    RUN(guarded_pages_fault_and_have_no_mapping_of_their_own);
    RUN(trying_leaves_no_mapping_behind);
    RUN(what_was_tried_can_be_used);
    RUN(a_refused_try_is_an_errno);
    return check_report("test_vm");
}
