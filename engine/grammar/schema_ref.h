#ifndef GRAMMAR_SCHEMA_REF_H
#define GRAMMAR_SCHEMA_REF_H

struct cJSON;

/* The schema in root that the value of a $ref points to.  NULL, or what is wrong with it: the end
 * of a sentence about the $ref. */
const char *schema_ref_find(const struct cJSON *root, const struct cJSON *ref,
                            const struct cJSON **out);

#endif
