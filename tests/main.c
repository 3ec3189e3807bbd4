/* One test program: runs the cases listed in CASES, made by the Makefile from
 * the names of the files in its folder.  CK_RUN_CASE picks one. */

#include <check.h>
#include <stdlib.h>

#define CASE(name) TCase *name##_case(void);
#include CASES
#undef CASE

int main(void)
{
    Suite *suite = suite_create(SUITE);
    SRunner *runner;
    int failed;

    /* Check's own 4 s are wall-clock time: too few under a sanitizer on a busy machine. */
    setenv("CK_DEFAULT_TIMEOUT", "30", 0);
#define CASE(name) suite_add_tcase(suite, name##_case());
#include CASES
#undef CASE
    runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
