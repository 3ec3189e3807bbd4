/* server/devices.h: lists that are taken, and sentences for those that are not. */

#include "server/config_value.h"
#include "server/devices.h"

#include <check.h>
#include <stdio.h>
#include <string.h>

static struct config_list list_of(const char *text)
{
    struct config_list list = { 0 };

    while (*text) {
        size_t n = strcspn(text, ",");
        config_list_add(&list, text, n);
        text += n + (text[n] == ',');
    }
    return list;
}

static const struct { const char *list, *says; } cases[] = {
    { "auto", NULL }, { "cpu", NULL }, { "cuda:0", NULL }, { "cuda:17", NULL },
    { "cuda:all", NULL }, { "cpu,cpu,cpu", NULL }, { "cuda:1,cuda:0,cuda:10", NULL },
    { "", "cannot be none" },
    { "gpu", "no device is called 'gpu'" },
    { "cuda", "no device is called 'cuda'" },
    { "cuda:", "no device is called 'cuda:'" },
    { "cuda:x", "no device is called 'cuda:x'" },
    { "cuda:-1", "no device is called 'cuda:-1'" },
    { "cuda:00", "no device is called 'cuda:00'" },
    { "cuda:01", "no device is called 'cuda:01'" },
    { "cuda:12345", "no device is called 'cuda:12345'" },
    { "CPU", "no device is called 'CPU'" },
    { "cuda:0,cuda:0", "lists cuda:0 twice" },
    { "cuda:2,cuda:1,cuda:2", "lists cuda:2 twice" },
    { "cuda:0,cpu", "the CPU beside GPUs" },
    { "cpu,cuda:0", "the CPU beside GPUs" },
    { "auto,cpu", "auto stands alone" },
    { "cuda:0,cuda:all", "cuda:all stands alone" },
    { "cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu", NULL },
    { "cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu",
      "lists 17 devices; 16 are the most" },
};

START_TEST(lists)
{
    struct config_list list = list_of(cases[_i].list);
    struct error err = { 0 };
    enum status st = devices_validate(&list, &err);

    ck_assert_int_eq(st, cases[_i].says ? ST_INVALID : ST_OK);
    if (cases[_i].says)
        ck_assert_msg(strstr(err.text, cases[_i].says), "%s: %s", cases[_i].list, err.text);
    config_list_fini(&list);
}
END_TEST

START_TEST(what_they_stand_for)
{
    struct config_list two = list_of("cuda:3,cuda:1"), all = list_of("cuda:all"), out = { 0 };
    struct error err = { 0 };
    char name[24];
    int n;

    ck_assert_int_eq(devices_expand(&out, &two, &err), ST_OK);
    ck_assert_int_eq(out.n, 2);
    ck_assert_str_eq(out.items[0], "cuda:3");
    ck_assert_str_eq(out.items[1], "cuda:1");
    ck_assert_str_eq(devices_first(&two), "cuda:3");
    ck_assert_str_eq(devices_first(&all), "cuda:0");
    config_list_fini(&out);
    enum status st = engine_count_gpus(&n, &err);
    ck_assert_int_eq(devices_expand(&out, &all, &err), st);
    if (st == ST_OK) {
        ck_assert_int_eq(out.n, n);
        snprintf(name, sizeof name, "cuda:%d", n - 1);
        ck_assert_str_eq(out.items[n - 1], name);
    } else {
        ck_assert_msg(strncmp(err.text, "backend cuda:all: ", 18) == 0, "%s", err.text);
    }
    config_list_fini(&two);
    config_list_fini(&all);
    config_list_fini(&out);
}
END_TEST

TCase *devices_case(void)
{
    TCase *tc = tcase_create("devices");

    tcase_add_loop_test(tc, lists, 0, sizeof cases / sizeof cases[0]);
    tcase_add_test(tc, what_they_stand_for);
    return tc;
}
