#ifndef SERVER_CONFIG_TABLE_H
#define SERVER_CONFIG_TABLE_H

#include "server/config_value.h"

/* The table of options; offsets are inside struct config. */

size_t config_n_options(void);
const struct option *config_option(size_t i);
const struct option *config_find(const char *key, size_t n); /* NULL: no such key */

#endif
