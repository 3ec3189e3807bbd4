#ifndef MODEL_NFC_H
#define MODEL_NFC_H

#include "engine/base/strbuf.h"

#include <stdbool.h>

/* Normalization form C, as the normalizer of Hugging Face `tokenizers` does it
 * (with combining classes of Unicode 9).  Linear but for the sorting of very
 * long runs of marks, whatever the text. */

/* True if s[0..n) is certainly in form C.  Almost all text is; false only
 * means that nfc_append has to look. */
bool nfc_is_quick(const char *s, size_t n);

/* Append form C of the valid UTF-8 s[0..n) to out. */
void nfc_append(struct strbuf *out, const char *s, size_t n);

#endif
