#ifndef SERVER_JSON_DUMP_H
#define SERVER_JSON_DUMP_H

#include "engine/base/status.h"

#include <stddef.h>

struct cJSON;
struct strbuf;

/* JSON values as Python's json.dumps(..., ensure_ascii=False) writes them: it is how chat
 * templates put tools and arguments into a prompt, and models were trained on it.
 *
 * A tree alone does not know whether a number was 1 or 1.0, which print differently, so a
 * tree has to be prepared with the text that it was parsed from.  Nothing recurses; a tree
 * is as deep as json_scan() lets it be. */

/* Every number of the tree becomes a cJSON_Raw with Python's spelling.  An object with a key
 * twice is refused; the sentence begins with its verb.  text: the span of root alone. */
enum status json_dump_prepare(struct cJSON *root, const char *text, size_t n,
                              struct error *err) MUST_USE;

/* Append a prepared value.  indent 0: on one line, with ", " and ": ". */
void json_dump(struct strbuf *out, const struct cJSON *v, int indent);
void json_dump_string(struct strbuf *out, const char *s, size_t n);

#endif
