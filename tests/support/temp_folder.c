#include "tests/support/temp_folder.h"

#include <check.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_PATH_BYTES = 400, N_PATHS = 4 };

static char folder[64];

void temp_folder_create(void)
{
    snprintf(folder, sizeof folder, "/tmp/asynctlsd-test-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(folder));
}

static int remove_entry(const char *path, const struct stat *st, int type, struct FTW *at)
{
    (void)st;
    (void)type;
    (void)at;
    return remove(path);
}

void temp_folder_remove(void)
{
    ck_assert_int_eq(nftw(folder, remove_entry, 8, FTW_DEPTH | FTW_PHYS), 0);
}

const char *temp_folder(void)
{
    return folder;
}

const char *temp_path(const char *name)
{
    static char paths[N_PATHS][MAX_PATH_BYTES];
    static int next;
    char *path = paths[next++ % N_PATHS];

    ck_assert_int_lt(snprintf(path, MAX_PATH_BYTES, "%s/%s", folder, name), MAX_PATH_BYTES);
    return path;
}

const char *temp_file(const char *name, const void *bytes, size_t n)
{
    const char *path = temp_path(name);
    FILE *out = fopen(path, "wb");

    ck_assert_msg(out != NULL, "%s cannot be written", path);
    ck_assert_uint_eq(fwrite(bytes, 1, n, out), n);
    ck_assert_int_eq(fclose(out), 0);
    return path;
}
