#include "engine/base/log.h"
#include "engine/base/strbuf.h"
#include "engine/engine.h"
#include "server/config.h"
#include "server/devices.h"
#include "server/service.h"

#include <stdio.h>

extern char **environ;

static int print(void (*make)(struct strbuf *out, const struct config *c), const struct config *c)
{
    struct strbuf text = { 0 };

    make(&text, c);
    fputs(text.data ? text.data : "", stdout);
    strbuf_fini(&text);
    return 0;
}

static void make_help(struct strbuf *out, const struct config *c)
{
    (void)c;
    config_help(out);
}

static int calibrate(const struct config *c)
{
    struct engine_config cfg = c->engine;
    struct error err;

    cfg.backend = devices_first(&c->backends);
    if (engine_calibrate(&cfg, c->calibrate_text, &err) == ST_OK)
        return 0;
    fprintf(stderr, "asynctlsd: %s\n", err.text);
    return 1;
}

int main(int argc, char **argv)
{
    struct config cfg = { 0 };
    struct error err;
    int code = 1;

    if (config_read(&cfg, argc, argv, environ, &err) != ST_OK) {
        fprintf(stderr, "asynctlsd: %s\n", err.text);
        config_fini(&cfg);
        return code;
    }
    log_set_level(cfg.log_level);
    log_set_format(cfg.log_format);
    switch (cfg.action) {
    case CONFIG_HELP:      code = print(make_help, &cfg); break;
    case CONFIG_CHECK:     code = print(config_print, &cfg); break;
    case CONFIG_VERSION:   code = printf("asynctlsd %s\n", config_version()) < 0; break;
    case CONFIG_CALIBRATE: code = calibrate(&cfg); break;
    case CONFIG_SERVE:     code = service_run(&cfg, environ); break;
    }
    config_fini(&cfg);
    return code;
}
