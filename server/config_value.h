#ifndef SERVER_CONFIG_VALUE_H
#define SERVER_CONFIG_VALUE_H

#include "engine/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct config_list;
struct strbuf;

/* One option of the daemon and its value as text: parsing, checking, printing.
 * The value lies at offset inside the caller's struct; the type says what is
 * there. */

enum option_type {
    OPTION_U32,    /* uint32_t */
    OPTION_INT,    /* int */
    OPTION_U64,    /* uint64_t or size_t */
    OPTION_BYTES,  /* the same, written 4096, 512mb, 16gb (units of 1024) */
    OPTION_MS,     /* uint64_t, written 500ms, 30s, 5m */
    OPTION_SHARE,  /* uint32_t, thousandths, written 0.9 */
    OPTION_BOOL,   /* bool, written yes, no */
    OPTION_CHOICE, /* an enum that counts from 0, one of choices */
    OPTION_WORD,   /* char *, one of choices */
    OPTION_TEXT,   /* char *, NULL is written none */
    OPTION_LIST    /* struct config_list, separated by commas, empty is written none */
};

struct option {
    const char *group; /* heading; not NULL in the first option of a group */
    const char *key;
    enum option_type type;
    size_t offset;
    const char *initial; /* the default, as text */
    uint64_t min, max;   /* of numbers, in their own unit */
    const char *choices; /* "one|two" */
    bool secret;         /* neither printed nor repeated in a sentence */
    const char *help;
};

/* Parse text into the option's place in base.  A refused value leaves the old
 * one.  place goes in front of the sentence: "asynctlsd.conf:12". */
enum status option_set(const struct option *o, void *base, const char *text, const char *place,
                       struct error *err) MUST_USE;
/* The value as option_set would read it; "" for a secret. */
void option_print(const struct option *o, const void *base, struct strbuf *out);
void option_fini(const struct option *o, void *base);

void config_list_add(struct config_list *list, const char *item, size_t n);
void config_list_fini(struct config_list *list);

#endif
