#ifndef TESTS_SUPPORT_BACKEND_FIXTURE_H
#define TESTS_SUPPORT_BACKEND_FIXTURE_H

#include "kernels/backend.h"
#include "kernels/ops.h"

/* Back ends for tests. */

/* The CPU back end of one instruction set ("scalar", "avx2", "avx512", "auto") with
 * two threads.  Opened once and kept until the process ends; NULL where the
 * processor lacks the instructions. */
struct backend *test_backend(const char *isa);

/* Instruction sets to hold against scalar, for loop tests: index 0.. TEST_N_ISAS - 1. */
enum { TEST_N_ISAS = 2 };
const char *test_isa(int i);

#endif
