#ifndef TESTS_SUPPORT_TEMP_FOLDER_H
#define TESTS_SUPPORT_TEMP_FOLDER_H

#include <stddef.h>

/* A folder of its own for a test that reads files.  Failures are test failures. */

/* Set up before a test and removed, with all that is in it, after; as a checked
 * fixture of a test case. */
void temp_folder_create(void);
void temp_folder_remove(void);

const char *temp_folder(void);

/* The path of a file in it; valid until the next call but three. */
const char *temp_path(const char *name);

/* Write a file in it; returns its path. */
const char *temp_file(const char *name, const void *bytes, size_t n);

#endif
