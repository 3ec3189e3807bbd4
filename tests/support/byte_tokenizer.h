#ifndef BYTE_TOKENIZER_H
#define BYTE_TOKENIZER_H

#include <stdbool.h>

struct tokenizer;

/* A tokenizer whose token b is byte b, so that a text has as many tokens as
 * bytes, with the special tokens <bos> and <end> behind.  bos: the
 * post-processor puts <bos> in front. */
enum { BYTE_BOS = 256, BYTE_END = 257, BYTE_IDS = 258 };

/* The caller closes it.  Exits with a message when it cannot be made. */
struct tokenizer *byte_tokenizer_open(bool bos);

#endif
