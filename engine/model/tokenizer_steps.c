#include "engine/model/tokenizer_json.h"

#include <stdio.h>
#include <string.h>

/* A step is one object or a Sequence of them.  This walks both: the elements of
 * the array under `key`, or the step itself.  NULL at the end. */
struct step_walk {
    const cJSON *at;
    bool alone;
};

static enum status step_walk_init(struct step_walk *w, const struct loader *l,
                                  const cJSON *step, const char *where, const char *key)
{
    char keys[64];

    *w = (struct step_walk){ step, true };
    if (!step || !step_has_type(step, "Sequence"))
        return ST_OK;
    snprintf(keys, sizeof keys, "type %s", key);
    TRY(loader_check_keys(l, step, where, keys));
    const cJSON *list = json_get(step, key);
    if (!cJSON_IsArray(list))
        return loader_refuse(l, ST_INVALID, where, "is a Sequence without an array \"%s\"",
                             key);
    *w = (struct step_walk){ list->child, false };
    return ST_OK;
}

static const cJSON *step_walk_next(struct step_walk *w)
{
    const cJSON *step = w->at;

    if (step)
        w->at = w->alone ? NULL : step->next;
    return step;
}

enum status loader_normalizer(const struct loader *l, const cJSON *step)
{
    static const char where[] = "normalizer";
    struct step_walk walk;

    TRY(step_walk_init(&walk, l, step, where, "normalizers"));
    while ((step = step_walk_next(&walk))) {
        if (!step_has_type(step, "NFC"))
            return loader_refuse(l, ST_UNSUPPORTED, where,
                                 "has type %.60s, only NFC is supported", step_type(step));
        TRY(loader_check_keys(l, step, where, "type"));
        l->t->nfc = true;
    }
    return ST_OK;
}

static enum status add_splitter(const struct loader *l, enum splitter kind)
{
    struct pretokenizer *pre = &l->t->pre;

    if (pre->n == MAX_SPLITTERS)
        return loader_refuse(l, ST_UNSUPPORTED, "pre_tokenizer", "has more than %d splitters",
                             MAX_SPLITTERS);
    pre->kinds[pre->n++] = kind;
    return ST_OK;
}

static enum status load_split(const struct loader *l, const cJSON *step)
{
    static const char where[] = "pre_tokenizer.Split";
    const cJSON *pattern = json_get(step, "pattern");
    enum splitter kind;

    TRY(loader_check_keys(l, step, where, "type pattern behavior invert"));
    TRY(loader_flag_is(l, step, where, "invert", false));
    const char *behavior = cJSON_GetStringValue(json_get(step, "behavior"));
    if (!behavior || strcmp(behavior, "Isolated") != 0)
        return loader_refuse(l, ST_UNSUPPORTED, "pre_tokenizer.Split.behavior",
                             "must be \"Isolated\"");
    const char *regex = cJSON_GetStringValue(json_get(pattern, "Regex"));
    if (!regex)
        return loader_refuse(l, ST_UNSUPPORTED, "pre_tokenizer.Split.pattern",
                             "must be an object with a string \"Regex\"");
    TRY(loader_check_keys(l, pattern, "pre_tokenizer.Split.pattern", "Regex"));
    if (!splitter_find(&kind, regex))
        return loader_refuse(l, ST_UNSUPPORTED, "pre_tokenizer.Split.pattern.Regex",
                             "is not one of the patterns of GPT-2, Qwen2 and Llama 3: %.120s",
                             regex);
    return add_splitter(l, kind);
}

static enum status load_byte_level(const struct loader *l, const cJSON *step)
{
    static const char where[] = "pre_tokenizer.ByteLevel";
    bool use_regex = true;   /* files older than the key mean yes */

    TRY(loader_check_keys(l, step, where, "type add_prefix_space trim_offsets use_regex"));
    TRY(loader_flag_is(l, step, where, "add_prefix_space", false));
    if (json_get(step, "use_regex"))
        TRY(loader_flag(l, step, where, "use_regex", &use_regex));
    return use_regex ? add_splitter(l, SPLIT_GPT2) : ST_OK;
}

enum status loader_pre_tokenizer(const struct loader *l, const cJSON *step)
{
    static const char where[] = "pre_tokenizer";
    struct step_walk walk;
    bool byte_level = false;

    TRY(step_walk_init(&walk, l, step, where, "pretokenizers"));
    while ((step = step_walk_next(&walk))) {
        if (byte_level)
            return loader_refuse(l, ST_UNSUPPORTED, where, "has steps after ByteLevel");
        if (step_has_type(step, "ByteLevel")) {
            TRY(load_byte_level(l, step));
            byte_level = true;
        } else if (step_has_type(step, "Split")) {
            TRY(load_split(l, step));
        } else if (step_has_type(step, "Digits")) {
            bool individual = false;
            TRY(loader_check_keys(l, step, "pre_tokenizer.Digits", "type individual_digits"));
            TRY(loader_flag(l, step, "pre_tokenizer.Digits", "individual_digits", &individual));
            if (!individual)
                return loader_refuse(l, ST_UNSUPPORTED,
                                     "pre_tokenizer.Digits.individual_digits", "must be true");
            TRY(add_splitter(l, SPLIT_DIGITS));
        } else {
            return loader_refuse(
                l, ST_UNSUPPORTED, where,
                "has type %.60s, only Sequence, Split, Digits and ByteLevel are supported",
                step_type(step));
        }
    }
    return byte_level ? ST_OK
                      : loader_refuse(l, ST_UNSUPPORTED, where,
                                      "has no ByteLevel, other vocabularies are not supported");
}

/* Append the ids that a template's special token stands for. */
static enum status push_template_ids(const struct loader *l, const cJSON *specials,
                                     const char *content, struct token_list *list)
{
    static const char where[] = "post_processor.special_tokens";
    const cJSON *special = content ? json_get(specials, content) : NULL;
    const cJSON *ids = json_get(special, "ids"), *item;

    if (!content || !cJSON_IsArray(ids))
        return loader_refuse(l, ST_INVALID, where, "has no \"ids\" for \"%.60s\"",
                             content ? content : "");
    cJSON_ArrayForEach(item, ids) {
        int32_t id;
        if (!loader_id(item, &id) || !vocab_has(&l->t->vocab, id))
            return loader_refuse(l, ST_INVALID, where,
                                 "has an id for \"%.60s\" that is no token", content);
        if (list->n == MAX_TEMPLATE_IDS)
            return loader_refuse(l, ST_INVALID, where, "has more than %d ids",
                                 MAX_TEMPLATE_IDS);
        token_list_push(list, id);
    }
    return ST_OK;
}

/* The ids before and after the text, from the template for one text. */
static enum status load_template(const struct loader *l, const cJSON *step)
{
    static const char where[] = "post_processor.single";
    const cJSON *single = json_get(step, "single"), *item;
    struct token_list *list = &l->t->prefix;

    TRY(loader_check_keys(l, step, "post_processor", "type single pair special_tokens"));
    if (!cJSON_IsArray(single) || cJSON_GetArraySize(single) > MAX_TEMPLATE_IDS)
        return loader_refuse(l, ST_INVALID, where, "must be an array of at most %d elements",
                             MAX_TEMPLATE_IDS);
    cJSON_ArrayForEach(item, single) {
        const cJSON *text = json_get(item, "Sequence");
        const cJSON *special = json_get(item, "SpecialToken");
        TRY(loader_check_keys(l, item, where, text ? "Sequence" : "SpecialToken"));
        const char *id = cJSON_GetStringValue(json_get(text ? text : special, "id"));
        if (!text) {
            TRY(push_template_ids(l, json_get(step, "special_tokens"), id, list));
            continue;
        }
        if (!id || strcmp(id, "A") != 0 || list == &l->t->suffix)
            return loader_refuse(l, ST_INVALID, where,
                                 "must have the sequence A once and no other");
        list = &l->t->suffix;
    }
    if (list != &l->t->suffix)
        return loader_refuse(l, ST_INVALID, where, "does not have the sequence A");
    return ST_OK;
}

enum status loader_post_processor(const struct loader *l, const cJSON *step)
{
    static const char where[] = "post_processor";
    struct step_walk walk;
    bool has_template = false;

    TRY(step_walk_init(&walk, l, step, where, "processors"));
    while ((step = step_walk_next(&walk))) {
        if (step_has_type(step, "ByteLevel"))
            continue;   /* moves offsets, adds no ids */
        if (!step_has_type(step, "TemplateProcessing"))
            return loader_refuse(
                l, ST_UNSUPPORTED, where,
                "has type %.60s, only Sequence, ByteLevel and TemplateProcessing are supported",
                step_type(step));
        if (has_template)
            return loader_refuse(l, ST_UNSUPPORTED, where,
                                 "has more than one TemplateProcessing");
        TRY(load_template(l, step));
        has_template = true;
    }
    return ST_OK;
}

enum status loader_decoder(const struct loader *l, const cJSON *step)
{
    static const char where[] = "decoder";
    struct step_walk walk;
    int n = 0;

    TRY(step_walk_init(&walk, l, step, where, "decoders"));
    while ((step = step_walk_next(&walk))) {
        if (!step_has_type(step, "ByteLevel"))
            return loader_refuse(l, ST_UNSUPPORTED, where,
                                 "has type %.60s, only ByteLevel is supported",
                                 step_type(step));
        n++;
    }
    return n == 1 ? ST_OK : loader_refuse(l, ST_UNSUPPORTED, where, "must be one ByteLevel");
}
