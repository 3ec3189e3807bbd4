#include "tests/support/weight_files.h"

#include <check.h>
#include <string.h>

enum { N_TEXTS = 4, MAX_TEXT = 1 << 16 };

const char *quoted(const char *text)
{
    static char texts[N_TEXTS][MAX_TEXT];
    static int next;
    char *out = texts[next++ % N_TEXTS];
    size_t n = strlen(text);

    ck_assert_uint_lt(n, MAX_TEXT);
    for (size_t i = 0; i <= n; i++)
        out[i] = text[i] == '\'' ? '"' : text[i];
    return out;
}

size_t weight_file_claiming(unsigned char *out, uint64_t length, const char *header,
                            size_t n_data)
{
    size_t n = strlen(header);

    ck_assert_uint_le(8 + n + n_data, WEIGHT_FILE_MAX);
    for (int i = 0; i < 8; i++)
        out[i] = (unsigned char)(length >> 8 * i);
    memcpy(out + 8, header, n);
    for (size_t i = 0; i < n_data; i++)
        out[8 + n + i] = (unsigned char)i;
    return 8 + n + n_data;
}

size_t weight_file(unsigned char *out, const char *header, size_t n_data)
{
    return weight_file_claiming(out, strlen(header), header, n_data);
}
