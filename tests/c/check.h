/* check: a minimal test harness. A failed CHECK is printed and counted, and the test goes on;
 * check_report prints the sum and gives the exit status. */
#ifndef CHECK_H
#define CHECK_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static unsigned long check_count, check_failures, check_tests;
static const char *check_test;

/* Print only the first failures: one in a loop of a million rounds would hide the others. */
#define CHECK_PRINTED 20

static inline bool check_that(bool holds, const char *file, int line, const char *expression) {
    check_count++;
    if (!holds && check_failures++ < CHECK_PRINTED)
        printf("%s:%d: %s: not true: %s\n", file, line, check_test, expression);
    return holds;
}

#define CHECK(expression) check_that((expression), __FILE__, __LINE__, #expression)

/* Like CHECK, but ends the program: for what the rest of the test depends on. */
#define REQUIRE(expression)                                                                        \
    do {                                                                                           \
        if (!CHECK(expression))                                                                    \
            exit(EXIT_FAILURE);                                                                    \
    } while (0)

#define RUN(test)                                                                                  \
    do {                                                                                           \
        check_test = #test;                                                                        \
        check_tests++;                                                                             \
        test();                                                                                    \
    } while (0)

#define SKIP(reason) printf("%s: skipped: %s\n", check_test, (reason))

static inline int check_report(const char *program) {
    if (check_failures == 0)
        printf("%s: %lu checks passed in %lu tests\n", program, check_count, check_tests);
    else
        printf("%s: %lu of %lu checks FAILED\n", program, check_failures, check_count);
    return check_failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

/* xorshift64*: the same numbers in every run. */
static inline uint64_t random_next(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * UINT64_C(2685821657736338717);
}

/* A number in [0, n). */
static inline uint64_t random_below(uint64_t *state, uint64_t n) {
    return (random_next(state) >> 16) % n;
}

#endif
