#ifndef MODEL_CONFIG_PARTS_H
#define MODEL_CONFIG_PARTS_H

#include "engine/model/json_fields.h"
#include "engine/model/model_config.h"

/* The parts of config.json that have a file of their own; private to model_config*.c.  Each reads
 * into *c and needs what was read before it: family and shape. */

enum {
    MAX_MLP = 1 << 20,
    MAX_POSITION = 1 << 24       /* positions are exact in float up to here */
};

/* A whole number from 1 to max that must be there. */
enum status config_required(const struct json_file *f, const char *key, int max, int *value,
                            struct error *err) MUST_USE;

/* model_config_moe.c: the experts of the families that have them. */
enum status config_read_moe(struct model_config *c, const struct json_file *f,
                            struct error *err) MUST_USE;

/* model_config_rope.c: rotary embedding, in both layouts, and the scale of the scores. */
enum status config_read_rope(struct model_config *c, const struct json_file *f,
                             struct error *err) MUST_USE;

#endif
