#ifndef TESTS_SUPPORT_WEIGHT_FILES_H
#define TESTS_SUPPORT_WEIGHT_FILES_H

#include <stddef.h>
#include <stdint.h>

/* Making safetensors files by hand, right and wrong ones. */

/* text with ' in place of ", so that JSON in a test can be read; valid until the next
 * call but three. */
const char *quoted(const char *text);

/* A whole file in memory: the length, the header and n_data bytes 0, 1, 2, ...; at most
 * WEIGHT_FILE_MAX.  Returns the length. */
enum { WEIGHT_FILE_MAX = 1 << 20 };
size_t weight_file(unsigned char *out, const char *header, size_t n_data);

/* The same with a length field of one's choice. */
size_t weight_file_claiming(unsigned char *out, uint64_t length, const char *header,
                            size_t n_data);

#endif
