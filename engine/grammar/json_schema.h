#ifndef GRAMMAR_JSON_SCHEMA_H
#define GRAMMAR_JSON_SCHEMA_H

#include "engine/grammar/nfa.h"

struct cJSON;
struct grammar_pairs;

/* A JSON schema as a graph of the texts that are valid under it.
 *
 *   type            one or a list of string, integer, number, boolean, null, object, array
 *   enum, const     strings, numbers, true, false, null; beside type alone
 *   anyOf, oneOf    any of them: oneOf does not look for a second that fits as well
 *   allOf           of one schema
 *   $ref            "#", "#/$defs/x" and other pointers into the same schema; recursion is fine
 *   string          minLength, maxLength, pattern (regex.h), format
 *   integer, number minimum, maximum, exclusiveMinimum, exclusiveMaximum; of a number integers
 *   array           items, minItems, maxItems
 *   object          properties, required, additionalProperties
 *
 * Members are written in the order of properties, those that are not required or not at all; others
 * are written only where there are no properties, as additionalProperties has it.  pattern and
 * format stand alone, without lengths.  A limit beyond SCHEMA_MAX_COUNT counts as that.  Titles,
 * descriptions, defaults, examples and the like change nothing.
 *
 * All other keys are refused by name, and so is a key that does not go with the type: none is
 * ignored.  json_text.h has what is written of space and numbers. */

enum { SCHEMA_MAX_COUNT = 4096, SCHEMA_MAX_PROPERTIES = 1000 };

/* A text that is valid, then next.  The tree may be deep: it is not walked by recursion.  *places
 * is what its patterns may take, and what is left of it (automaton.h). */
enum status json_schema_emit(struct nfa *g, const struct cJSON *schema, nfa_at next, nfa_at *start,
                             size_t *places, struct error *err) MUST_USE;

/* Any object, then next. */
nfa_at json_object_emit(struct nfa *g, nfa_at next);

/* The members of an object written as pairs (grammar.h), then next, which does not go on with a
 * pair.  schema: NULL, any, or of the type object and without enum and const.  Refuses names and
 * strings that hold the marker which ends them. */
enum status json_schema_emit_pairs(struct nfa *g, const struct cJSON *schema,
                                   const struct grammar_pairs *pairs, nfa_at next, nfa_at *start,
                                   size_t *places, struct error *err) MUST_USE;

#endif
