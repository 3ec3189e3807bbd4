#ifndef MODEL_TOKENIZER_JSON_H
#define MODEL_TOKENIZER_JSON_H

#include "engine/model/json_fields.h"
#include "engine/model/tokenizer_parts.h"

#include <cjson/cJSON.h>

/* Reading tokenizer.json, for the two files that do: tokenizer_json.c has the
 * vocabulary, tokenizer_steps.c the steps around BPE.
 *
 * Every object's keys are checked against those whose meaning is known, because
 * a key that is passed over may change ids; every refusal names the key. */

struct loader {
    struct tokenizer *t;
    const char *name;         /* of the file, for sentences */
    struct error *err;
};

/* Fill the error with "file: where sentence" and return code.  ST_INVALID for
 * what no tokenizer.json may say, ST_UNSUPPORTED for what this program cannot do. */
enum status loader_refuse(const struct loader *l, enum status code, const char *where,
                          const char *fmt, ...) __attribute__((format(printf, 4, 5)));

/* o must be an object with keys out of `keys` (blanks between), none twice. */
enum status loader_check_keys(const struct loader *l, const cJSON *o, const char *where,
                              const char *keys) MUST_USE;
/* Whether the "type" of o is this one. */
bool step_has_type(const cJSON *o, const char *type);
const char *step_type(const cJSON *o);    /* for sentences; never NULL */
/* A boolean that must be there. */
enum status loader_flag(const struct loader *l, const cJSON *o, const char *where,
                        const char *key, bool *out) MUST_USE;
/* A boolean that is `want` or absent. */
enum status loader_flag_is(const struct loader *l, const cJSON *o, const char *where,
                           const char *key, bool want) MUST_USE;
/* A token id below MAX_TOKENIZER_IDS. */
bool loader_id(const cJSON *value, int32_t *out);

enum status loader_normalizer(const struct loader *l, const cJSON *step) MUST_USE;
enum status loader_pre_tokenizer(const struct loader *l, const cJSON *step) MUST_USE;
/* After the vocabulary is complete. */
enum status loader_post_processor(const struct loader *l, const cJSON *step) MUST_USE;
enum status loader_decoder(const struct loader *l, const cJSON *step) MUST_USE;

#endif
