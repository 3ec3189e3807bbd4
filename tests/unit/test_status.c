/* engine/base/status.h, invariant.h, clock.h and log.h. */

#include "engine/base/status.h"

#include "engine/base/clock.h"
#include "engine/base/invariant.h"
#include "engine/base/log.h"

#include <check.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

START_TEST(codes_and_names)
{
    static const struct { enum status code; const char *name; } codes[] = {
        { ST_OK, "OK" }, { ST_INVALID, "INVALID" }, { ST_NOMEM, "NOMEM" },
        { ST_NODEVMEM, "NODEVMEM" }, { ST_IO, "IO" }, { ST_UNSUPPORTED, "UNSUPPORTED" },
        { ST_BUSY, "BUSY" }, { ST_CANCELLED, "CANCELLED" }, { ST_DEVICE, "DEVICE" },
        { ST_SHUTDOWN, "SHUTDOWN" }, { ST_QUOTA, "QUOTA" },
    };

    ck_assert_int_eq(ST_OK, 0);
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++) {
        ck_assert(i == 0 || codes[i].code < 0);
        ck_assert_str_eq(status_name(codes[i].code), codes[i].name);
        for (size_t k = 0; k < i; k++)
            ck_assert_int_ne(codes[i].code, codes[k].code);
    }
    ck_assert_str_eq(status_name((enum status)77), "UNKNOWN");
}
END_TEST

START_TEST(sentences)
{
    struct error err = { 0 };

    ck_assert_int_eq(error_set(&err, ST_IO, "%s: %d of %zu", "a file", -3, (size_t)7), ST_IO);
    ck_assert_int_eq(err.code, ST_IO);
    ck_assert_str_eq(err.text, "a file: -3 of 7");
    ck_assert_int_eq(error_set(NULL, ST_BUSY, "%s", "nobody reads this"), ST_BUSY);
    ck_assert_int_eq(error_set(&err, ST_DEVICE, "%s", ""), ST_DEVICE);
    ck_assert_str_eq(err.text, "");
}
END_TEST

START_TEST(long_sentences_are_cut)
{
    struct { struct error err; char after[16]; } guarded = { 0 };

    memset(guarded.after, 'g', sizeof guarded.after);
    for (int n = 390; n < 2000; n += 5) {
        error_set(&guarded.err, ST_INVALID, "%0*d", n, 5);
        size_t fits = sizeof guarded.err.text - 1;
        ck_assert_uint_eq(strlen(guarded.err.text), (size_t)n < fits ? (size_t)n : fits);
        for (size_t i = 0; i < sizeof guarded.after; i++)
            ck_assert_int_eq(guarded.after[i], 'g');
    }
}
END_TEST

static enum status fails_if(int n, int *steps)
{
    ++*steps;
    return n == 0 ? ST_UNSUPPORTED : ST_OK;
}

static enum status three_steps(int failing, int *steps)
{
    for (int i = 0; i < 3; i++)
        TRY(fails_if(failing - i, steps));
    return ST_OK;
}

START_TEST(try_stops_at_the_first_failure)
{
    int steps = 0;

    ck_assert_int_eq(three_steps(5, &steps), ST_OK);
    ck_assert_int_eq(steps, 3);
    steps = 0;
    ck_assert_int_eq(three_steps(1, &steps), ST_UNSUPPORTED);
    ck_assert_int_eq(steps, 2);
}
END_TEST

START_TEST(broken_invariant_aborts)
{
    ASSERT(_i == 1000);
}
END_TEST

START_TEST(clock_runs_forward)
{
    uint64_t before = clock_now_ns();

    for (int i = 0; i < 100000; i++) {
        uint64_t now = clock_now_ns();
        if (now < before)
            ck_abort_msg("back by %llu ns", (unsigned long long)(before - now));
        before = now;
    }
    usleep(20000);
    uint64_t slept = clock_now_ns() - before;
    ck_assert(slept >= 20000000u && slept < UINT64_C(60000000000));
}
END_TEST

/* ---- the log, through a pipe in the place of stderr */

static int log_end;

static void catch_log(void)
{
    int ends[2];

    ck_assert_int_eq(pipe(ends), 0);
    ck_assert_int_eq(dup2(ends[1], STDERR_FILENO), STDERR_FILENO);
    close(ends[1]);
    log_end = ends[0];
}

/* What was logged since the last call. */
static const char *logged(void)
{
    static char text[1 << 16];

    log_write(LOG_LEVEL_ERROR, "test", "~");     /* so that there is something to read */
    ssize_t n = read(log_end, text, sizeof text - 1);
    ck_assert_int_gt(n, 0);
    text[n] = '\0';
    char *last = strrchr(text, '~');             /* the mark's own line goes */
    ck_assert(last && (strcmp(last, "~\n") == 0 || strcmp(last, "~\"}\n") == 0));
    while (last > text && last[-1] != '\n')
        last--;
    *last = '\0';
    return text;
}

START_TEST(log_lines)
{
    int year, month, day, hour, minute, second, ms, end = 0;
    char level, thread[20], rest[100];

    catch_log();
    ck_assert_int_eq(pthread_setname_np(pthread_self(), "a-thread"), 0);
    log_warn("module", "%d things", 3);
    const char *line = logged();
    ck_assert_msg(sscanf(line, "%4d-%2d-%2dT%2d:%2d:%2d.%3dZ %c %19s %99[^\n]%n", &year, &month,
                         &day, &hour, &minute, &second, &ms, &level, thread, rest, &end) == 10,
                  "%s", line);
    ck_assert(year >= 2024 && level == 'W');
    ck_assert_str_eq(thread, "a-thread");
    ck_assert_str_eq(rest, "module: 3 things");
    ck_assert_str_eq(line + end, "\n");
}
END_TEST

START_TEST(log_levels)
{
    catch_log();
    for (int level = LOG_LEVEL_ERROR; level <= LOG_LEVEL_DEBUG; level++) {
        char seen[5] = "", all[] = "EWID";
        log_set_level((enum log_level)level);
        ck_assert_int_eq(log_level(), level);
        log_error("m", "E!");
        log_warn("m", "W!");
        log_info("m", "I!");
        log_debug("m", "D!");
        const char *text = logged();
        for (const char *at = text; (at = strchr(at, '!')) != NULL; at++)
            strncat(seen, at - 1, 1);
        all[level + 1] = '\0';
        ck_assert_str_eq(seen, all);
    }
}
END_TEST

/* Whatever a client sent, an event is one line of bounded length. */
START_TEST(log_is_one_line)
{
    static char text[5000];

    catch_log();
    log_error("m", "a\nb\rc\x1b[31md\te");
    const char *line = logged();
    ck_assert_msg(strstr(line, "m: a b c [31md e\n") && strchr(line, '\n')[1] == '\0', "%s",
                  line);
    memset(text, 'x', sizeof text - 1);
    for (size_t n = 900; n < sizeof text; n += 100) {
        log_error("m", "%s", text + sizeof text - 1 - n);
        line = logged();
        ck_assert(strlen(line) <= 1024 && strchr(line, '\n')[1] == '\0');
        ck_assert(strlen(line) > 900);
    }
}
END_TEST

static void log_with_fields(const char *message, const char *text)
{
    const struct log_field fields[] = {
        { .name = "word", .kind = LOG_FIELD_TEXT, .text = text },
        { .name = "count", .kind = LOG_FIELD_NUMBER, .number = 12345678901.0 },
        { .name = "ms", .kind = LOG_FIELD_NUMBER, .number = 1.25, .decimals = 1 },
        { .name = "gone", .kind = LOG_FIELD_BOOL, .yes = true },
    };

    log_event(LOG_LEVEL_WARN, "m", message, fields, sizeof fields / sizeof *fields);
}

START_TEST(log_fields)
{
    catch_log();
    ck_assert_int_eq(pthread_setname_np(pthread_self(), "t"), 0);
    log_with_fields("an event", "a\nb");
    ck_assert(strstr(logged(), " m: an event word=a b count=12345678901 ms=1.2 gone=true\n"));
    log_set_format(LOG_FORMAT_JSON);
    log_with_fields("\"an\\ event\x01\"", "\xc3\xa9\xff\xc3");
    const char *line = logged();
    ck_assert(strncmp(line, "{\"time\":\"20", 11) == 0);
    ck_assert_msg(strstr(line, "Z\",\"level\":\"warn\",\"thread\":\"t\",\"module\":\"m\","
                         "\"message\":\"\\\"an\\\\ event \\\"\","
                         "\"word\":\"\xc3\xa9\xef\xbf\xbd\xef\xbf\xbd\",\"count\":12345678901,"
                         "\"ms\":1.2,\"gone\":true}\n"), "%s", line);
    log_info("m", "%d", 5);
    ck_assert(strstr(logged(), "\"level\":\"info\",\"thread\":\"t\",\"module\":\"m\","
                     "\"message\":\"5\"}\n"));
}
END_TEST

/* What does not fit is left out as a whole; what follows is there, and the object is closed. */
START_TEST(long_json_lines_are_whole)
{
    static char text[6000];

    catch_log();
    log_set_format(LOG_FORMAT_JSON);
    for (size_t n = 3800; n < sizeof text; n++) {
        memset(text, '"', n / 2);
        text[n / 2] = '\0';
        log_with_fields("event", text);
        const char *line = logged();
        size_t length = strlen(line);
        bool fits = strstr(line, "\"word\":") != NULL;
        ck_assert(length <= 4096 && strchr(line, '\n') == line + length - 1);
        ck_assert(line[length - 2] == '}' && strstr(line, "\"message\":\"event\""));
        ck_assert(fits ? n < 4096 : strstr(line, "\"gone\":true}") != NULL);
    }
}
END_TEST

TCase *status_case(void)
{
    TCase *tc = tcase_create("status");

    tcase_add_test(tc, codes_and_names);
    tcase_add_test(tc, sentences);
    tcase_add_test(tc, long_sentences_are_cut);
    tcase_add_test(tc, try_stops_at_the_first_failure);
    tcase_add_test_raise_signal(tc, broken_invariant_aborts, SIGABRT);
    tcase_add_test(tc, clock_runs_forward);
    tcase_add_test(tc, log_lines);
    tcase_add_test(tc, log_levels);
    tcase_add_test(tc, log_is_one_line);
    tcase_add_test(tc, log_fields);
    tcase_add_test(tc, long_json_lines_are_whole);
    return tc;
}
