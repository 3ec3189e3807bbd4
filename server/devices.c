#include "server/devices.h"

#include "server/config_value.h"
#include "server/placement.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

static const char all_gpus[] = "cuda:all";

/* "cuda:" and a number as it is usually written, so that equal devices are equal words. */
static bool is_gpu(const char *name)
{
    const char *digits = name + strlen("cuda:");

    if (strncmp(name, "cuda:", strlen("cuda:")) != 0)
        return false;
    size_t n = strspn(digits, "0123456789");
    return n >= 1 && n <= 4 && digits[n] == '\0' && (n == 1 || digits[0] != '0');
}

static enum status validate_one(const struct config_list *list, int i, struct error *err)
{
    const char *name = list->items[i];
    bool alone = strcmp(name, "auto") == 0 || strcmp(name, all_gpus) == 0;

    if (alone && list->n > 1)
        return error_set(err, ST_INVALID, "backend %s stands alone, not in a list", name);
    if (!alone && !is_gpu(name) && strcmp(name, "cpu") != 0)
        return error_set(err, ST_INVALID, "backend: no device is called '%.80s': write auto, cpu, "
                         "cuda:N, cuda:all, or several of cuda:N separated by commas", name);
    for (int k = 0; k < i; k++) {
        if (is_gpu(name) && strcmp(list->items[k], name) == 0)
            return error_set(err, ST_INVALID, "backend lists %s twice: a GPU has one engine", name);
        if (is_gpu(name) != is_gpu(list->items[k]))
            return error_set(err, ST_INVALID, "backend lists the CPU beside GPUs: requests would "
                             "be as slow as where they happen to come");
    }
    return ST_OK;
}

enum status devices_validate(const struct config_list *backends, struct error *err)
{
    if (backends->n == 0)
        return error_set(err, ST_INVALID, "backend cannot be none");
    if (backends->n > PLACEMENT_MAX_ENGINES)
        return error_set(err, ST_INVALID, "backend lists %d devices; %d are the most", backends->n,
                         PLACEMENT_MAX_ENGINES);
    for (int i = 0; i < backends->n; i++)
        TRY(validate_one(backends, i, err));
    return ST_OK;
}

const char *devices_first(const struct config_list *backends)
{
    return strcmp(backends->items[0], all_gpus) == 0 ? "cuda:0" : backends->items[0];
}

enum status devices_expand(struct config_list *out, const struct config_list *backends,
                           struct error *err)
{
    struct error why;
    char name[24];
    int n;

    if (strcmp(backends->items[0], all_gpus) != 0) {
        for (int i = 0; i < backends->n; i++)
            config_list_add(out, backends->items[i], strlen(backends->items[i]));
        return ST_OK;
    }
    enum status st = engine_count_gpus(&n, &why);
    if (st != ST_OK)
        return error_set(err, st, "backend %s: %s", all_gpus, why.text);
    if (n > PLACEMENT_MAX_ENGINES)
        return error_set(err, ST_INVALID, "backend %s: this machine has %d GPUs; %d are the most: "
                         "name them", all_gpus, n, PLACEMENT_MAX_ENGINES);
    for (int i = 0; i < n; i++) {
        int length = snprintf(name, sizeof name, "cuda:%d", i);
        config_list_add(out, name, (size_t)length);
    }
    return ST_OK;
}
