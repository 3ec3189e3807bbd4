/* engine/model/safetensors.h: what is read, and that each thing the format forbids is
 * refused with a sentence that names the file and the tensor. */

#include "engine/model/safetensors.h"

#include "engine/base/strbuf.h"
#include "tests/support/temp_folder.h"
#include "tests/support/weight_files.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static unsigned char bytes[WEIGHT_FILE_MAX];

static struct safetensors *parse(const char *header, size_t n_data)
{
    struct safetensors *st = NULL;
    struct error err = { 0 };
    size_t n = weight_file(bytes, quoted(header), n_data);

    ck_assert_msg(safetensors_parse(&st, "w", bytes, n, &err) == ST_OK, "%s", err.text);
    return st;
}

static void refuse_bytes(size_t n, const char *word)
{
    struct safetensors *st = (struct safetensors *)&bytes;
    struct error err = { 0 };

    ck_assert_int_eq(safetensors_parse(&st, "w.safetensors", bytes, n, &err), ST_INVALID);
    ck_assert_ptr_null(st);
    ck_assert_int_eq(err.code, ST_INVALID);
    ck_assert_msg(strncmp(err.text, "w.safetensors: ", 15) == 0 && strstr(err.text, word),
                  "%s: %s", word, err.text);
    ck_assert_int_eq(safetensors_parse(&st, "w.safetensors", bytes, n, NULL), ST_INVALID);
}

/* ---- what is read */

START_TEST(tensors_of_a_file)
{
    struct safetensors *st = parse(
        "{ '__metadata__' : {'format':'pt', 'a\\u00e9':''},\n\t'b': {'shape':[2,3],"
        "'data_offsets':[4,16],'dtype':'BF16'},\r'a':{'dtype':'F32','shape':[],"
        "'data_offsets':[0,4]}, 'none':{'dtype':'F32','shape':[4,0,7],'data_offsets':[16,16]}}  ",
        16);

    ck_assert_uint_eq(safetensors_count(st), 3);
    const struct tensor *a = safetensors_find(st, "a"), *b = safetensors_find(st, "b");
    const struct tensor *none = safetensors_find(st, "none");
    ck_assert(a && b && none && !safetensors_find(st, "c") && !safetensors_find(st, ""));
    ck_assert(a->type == TENSOR_F32 && a->rank == 0 && a->bytes == 4 && a->begin == 0);
    ck_assert(b->type == TENSOR_BF16 && b->rank == 2 && b->shape[0] == 2 && b->shape[1] == 3);
    ck_assert(b->bytes == 12 && b->begin == 4);
    ck_assert(none->rank == 3 && none->bytes == 0);
    ck_assert_int_eq(*(const unsigned char *)a->data, 0);
    ck_assert_int_eq(*(const unsigned char *)b->data, 4);
    ck_assert_str_eq(safetensors_file(st, b), "w");
    size_t seen = 0;
    for (size_t i = 0; i < 3; i++)
        seen += strlen(safetensors_at(st, i)->name);
    ck_assert_uint_eq(seen, 6);
    safetensors_close(st);
}
END_TEST

START_TEST(names_with_escapes)
{
    struct safetensors *st = parse(
        "{'a\\\"\\\\\\/\\b\\f\\n\\r\\t':{'dtype':'U8','shape':[1],'data_offsets':[0,1]},"
        "'\\u00e9\\u4e16\\ud83d\\ude00':{'dtype':'I8','shape':[1],'data_offsets':[1,2]},"
        "'\xc3\xa9':{'dtype':'BOOL','shape':[1],'data_offsets':[2,3]}}", 3);

    ck_assert_ptr_nonnull(safetensors_find(st, "a\"\\/\b\f\n\r\t"));
    ck_assert_ptr_nonnull(safetensors_find(st, "\xc3\xa9\xe4\xb8\x96\xf0\x9f\x98\x80"));
    ck_assert_ptr_nonnull(safetensors_find(st, "\xc3\xa9"));
    safetensors_close(st);
}
END_TEST

START_TEST(every_type_has_its_size)
{
    static const struct { const char *name; unsigned bits; } types[] = {
        { "BOOL", 8 }, { "F4", 4 }, { "F6_E2M3", 6 }, { "F6_E3M2", 6 }, { "U8", 8 },
        { "I8", 8 }, { "F8_E5M2", 8 }, { "F8_E4M3", 8 }, { "F8_E8M0", 8 },
        { "F8_E4M3FNUZ", 8 }, { "F8_E5M2FNUZ", 8 }, { "I16", 16 }, { "U16", 16 },
        { "F16", 16 }, { "BF16", 16 }, { "I32", 32 }, { "U32", 32 }, { "F32", 32 },
        { "I64", 64 }, { "U64", 64 }, { "F64", 64 }, { "C64", 64 },
    };
    char header[200];

    ck_assert_uint_eq(sizeof types / sizeof *types, N_TENSOR_TYPES);
    for (unsigned i = 0; i < N_TENSOR_TYPES; i++) {
        unsigned n = 3 * types[i].bits;          /* 24 elements */
        snprintf(header, sizeof header,
                 "{'t':{'dtype':'%s','shape':[4,6],'data_offsets':[0,%u]}}", types[i].name, n);
        struct safetensors *st = parse(header, n);
        enum tensor_type type = safetensors_find(st, "t")->type;
        ck_assert_str_eq(tensor_type_name(type), types[i].name);
        safetensors_close(st);
        snprintf(header, sizeof header,
                 "{'t':{'dtype':'%s','shape':[4,6],'data_offsets':[0,%u]}}", types[i].name,
                 n + 1);
        refuse_bytes(weight_file(bytes, quoted(header), n + 1), "tensor t ");
    }
}
END_TEST

START_TEST(no_tensors_at_all)
{
    struct safetensors *st = parse("{}", 0);

    ck_assert_uint_eq(safetensors_count(st), 0);
    ck_assert_ptr_null(safetensors_find(st, "a"));
    safetensors_close(st);
    safetensors_close(parse("{'__metadata__':{}}   ", 0));
    safetensors_close(NULL);
}
END_TEST

START_TEST(alignment_is_not_asked_for)
{
    struct safetensors *st = parse("{'a':{'dtype':'U8','shape':[1],'data_offsets':[0,1]},"
                                   "'b':{'dtype':'F64','shape':[2],'data_offsets':[1,17]}}", 17);
    const struct tensor *a = safetensors_find(st, "a"), *b = safetensors_find(st, "b");

    ck_assert_ptr_eq(b->data, (const char *)a->data + 1);
    safetensors_close(st);
}
END_TEST

START_TEST(thousands_of_names_are_found)
{
    struct strbuf header = { 0 };
    char name[20];

    for (int i = 0; i < 5000; i++)
        strbuf_printf(&header, "%c\"t%d\":{\"dtype\":\"U8\",\"shape\":[1],"
                      "\"data_offsets\":[%d,%d]}", i ? ',' : '{', i, 4999 - i, 5000 - i);
    strbuf_puts(&header, "}");
    struct safetensors *st = NULL;
    size_t n = weight_file(bytes, header.data, 5000);
    ck_assert_int_eq(safetensors_parse(&st, "w", bytes, n, NULL), ST_OK);
    for (int i = 0; i < 5000; i++) {
        snprintf(name, sizeof name, "t%d", i);
        const struct tensor *t = safetensors_find(st, name);
        ck_assert(t && t->begin == (uint64_t)(4999 - i));
    }
    ck_assert_ptr_null(safetensors_find(st, "t5000"));
    safetensors_close(st);
    strbuf_fini(&header);
}
END_TEST

/* ---- what is refused.  The word is in the sentence. */

#define A "'a':{'dtype':'U8','shape':[4],'data_offsets':[0,4]}"

static const struct refusal {
    const char *header;
    size_t n_data;
    const char *word;
} refusals[] = {
    /* JSON */
    { "", 4, "'{' was expected" },
    { " {" A "}", 4, "'{' was expected" },
    { "[" A "]", 4, "'{' was expected" },
    { "{" A, 4, "the header does not end" },
    { "{" A ",}", 4, "a string was expected" },
    { "{,}", 0, "a string was expected" },
    { "{" A "}x", 4, "only spaces" },
    { "{" A "}\n", 4, "only spaces" },
    { "{" A "}{}", 4, "only spaces" },
    { "{'a' {}}", 0, "':' was expected" },
    { "{'a", 0, "does not end" },
    { "{'a\\", 0, "does not end" },
    { "{'a\\x':{}}", 0, "unknown escape" },
    { "{'a\\u12':{}}", 0, "\\u escape" },
    { "{'a\\u12g4':{}}", 0, "\\u escape" },
    { "{'a\\u0000':{}}", 0, "\\u escape" },
    { "{'a\\udc00':{}}", 0, "\\u escape" },
    { "{'a\\ud800':{}}", 0, "surrogate" },
    { "{'a\\ud800\\u0041':{}}", 0, "surrogate" },
    { "{'a\n':{}}", 0, "control character" },
    { "{'a\xff':{}}", 0, "UTF-8" },
    { "{'a\xed\xa0\x80':{}}", 0, "UTF-8" },
    /* a tensor */
    { "{'a':7}", 0, "tensor a: header, byte 5: a tensor must be an object" },
    { "{'a':{}}", 0, "tensor a: " },
    { "{'a':{'dtype':'U8','shape':[4],'data_offsets':[0,4]", 4, "tensor a: " },
    { "{'a':{'shape':[4],'data_offsets':[0,4]}}", 4, "tensor a lacks \"dtype\"" },
    { "{'a':{'dtype':'U8','data_offsets':[0,4]}}", 4, "tensor a lacks \"shape\"" },
    { "{'a':{'dtype':'U8','shape':[4]}}", 4, "tensor a lacks \"data_offsets\"" },
    { "{'a':{'dtype':'U8','dtype':'U8','shape':[4],'data_offsets':[0,4]}}", 4,
      "tensor a has the repeated key \"dtype\"" },
    { "{'a':{'dtype':'U8','shape':[4],'data_offsets':[0,4],'strides':[1]}}", 4,
      "tensor a has the unknown key \"strides\"" },
    { "{'a':{'dtype':'U9','shape':[4],'data_offsets':[0,4]}}", 4,
      "tensor a has the unknown type \"U9\"" },
    { "{'a':{'dtype':'u8','shape':[4],'data_offsets':[0,4]}}", 4, "unknown type \"u8\"" },
    { "{'a':{'dtype':'','shape':[4],'data_offsets':[0,4]}}", 4, "unknown type" },
    { "{'a':{'dtype':3,'shape':[4],'data_offsets':[0,4]}}", 4, "tensor a: " },
    { "{'a':{'dtype':'U8','shape':4,'data_offsets':[0,4]}}", 4, "tensor a: " },
    { "{'a':{'dtype':'U8','shape':[4,],'data_offsets':[0,4]}}", 4, "whole number" },
    { "{'a':{'dtype':'U8','shape':[-4],'data_offsets':[0,4]}}", 4, "whole number" },
    { "{'a':{'dtype':'U8','shape':[4.0],'data_offsets':[0,4]}}", 4, "whole number" },
    { "{'a':{'dtype':'U8','shape':[4e0],'data_offsets':[0,4]}}", 4, "whole number" },
    { "{'a':{'dtype':'U8','shape':[04],'data_offsets':[0,4]}}", 4, "whole number" },
    { "{'a':{'dtype':'U8','shape':['4'],'data_offsets':[0,4]}}", 4, "whole number" },
    { "{'a':{'dtype':'U8','shape':[18446744073709551616],'data_offsets':[0,4]}}", 4,
      "tensor a: header, byte 47: a number is too large" },
    { "{'a':{'dtype':'U8','shape':[4,1,1,1,1,1,1,1,1],'data_offsets':[0,4]}}", 4,
      "list is too long" },
    { "{'a':{'dtype':'U8','shape':[4,'data_offsets':[0,4]}}", 4, "tensor a: " },
    /* sizes */
    { "{'a':{'dtype':'U8','shape':[3],'data_offsets':[0,4]}}", 4, "tensor a has 4 bytes" },
    { "{'a':{'dtype':'BF16','shape':[4],'data_offsets':[0,4]}}", 4, "tensor a has 4 bytes" },
    { "{'a':{'dtype':'F4','shape':[3],'data_offsets':[0,1]}}", 1, "tensor a has 1 bytes" },
    { "{'a':{'dtype':'U8','shape':[],'data_offsets':[0,0]}}", 0, "tensor a has 0 bytes" },
    { "{'a':{'dtype':'U8','shape':[0],'data_offsets':[0,4]}}", 4, "tensor a has 4 bytes" },
    { "{'a':{'dtype':'U8','shape':[4294967296,4294967296],'data_offsets':[0,4]}}", 4,
      "shape of tensor a overflows" },
    { "{'a':{'dtype':'F64','shape':[2305843009213693953],'data_offsets':[0,8]}}", 8,
      "shape of tensor a overflows" },
    { "{'a':{'dtype':'F32','shape':[4294967296,4294967296,0],'data_offsets':[0,0]}}", 0,
      "shape of tensor a overflows" },
    /* offsets */
    { "{'a':{'dtype':'U8','shape':[4],'data_offsets':[4]}}", 4, "tensor a: \"data_offsets\"" },
    { "{'a':{'dtype':'U8','shape':[4],'data_offsets':[0,4,4]}}", 4, "tensor a: " },
    { "{'a':{'dtype':'U8','shape':[4],'data_offsets':[]}}", 4, "tensor a: \"data_offsets\"" },
    { "{'a':{'dtype':'U8','shape':[4],'data_offsets':[4,0]}}", 4, "tensor a: \"data_offsets\"" },
    { "{'a':{'dtype':'U8','shape':[4],'data_offsets':[1,5]}}", 5, "tensor a begins at 1" },
    { "{" A "}", 3, "4 bytes, the file has 3" },
    { "{" A "}", 5, "4 bytes, the file has 5" },
    { "{" A ",'b':{'dtype':'U8','shape':[4],'data_offsets':[5,9]}}", 9, "tensor b begins at 5" },
    { "{" A ",'b':{'dtype':'U8','shape':[4],'data_offsets':[3,7]}}", 7, "tensor b begins at 3" },
    { "{" A ",'b':{'dtype':'U8','shape':[4],'data_offsets':[0,4]}}", 4, "begins at 0" },
    { "{" A ",'b':{'dtype':'U8','shape':[2],'data_offsets':[1,3]}}", 4, "tensor b begins at 1" },
    { "{" A ",'b':{'dtype':'U8','shape':[0],'data_offsets':[2,2]}}", 4, "tensor b begins at 2" },
    { "{" A ",'b':{'dtype':'U8','shape':[0],'data_offsets':[9,9]}}", 4, "tensor b begins at 9" },
    { "{'a':{'dtype':'U8','shape':[18446744073709551615],"
      "'data_offsets':[0,18446744073709551615]}}", 4, "tensor a" },
    { "{'a':{'dtype':'U8','shape':[4],"
      "'data_offsets':[18446744073709551611,18446744073709551615]}}", 4, "tensor a begins at" },
    { "{}", 4, "no tensors" },
    /* names */
    { "{" A ",'a':{'dtype':'U8','shape':[4],'data_offsets':[4,8]}}", 8, "tensor a is there twice" },
    { "{" A ",'\\u0061':{'dtype':'U8','shape':[4],'data_offsets':[4,8]}}", 8,
      "tensor a is there twice" },
    /* __metadata__ */
    { "{'__metadata__':{},'__metadata__':{}," A "}", 4, "__metadata__ is there twice" },
    { "{'__metadata__':[]," A "}", 4, "__metadata__ must be an object" },
    { "{'__metadata__':'x'," A "}", 4, "__metadata__ must be an object" },
    { "{'__metadata__':{'a':1}," A "}", 4, "a string was expected" },
    { "{'__metadata__':{'a':{}}," A "}", 4, "a string was expected" },
    { "{'__metadata__':{'a'}," A "}", 4, "':' was expected" },
    { "{'__metadata__':{'a':'b'", 4, "__metadata__ does not end" },
};
enum { N_REFUSALS = sizeof refusals / sizeof *refusals };

START_TEST(refused)
{
    const struct refusal *r = &refusals[_i];

    refuse_bytes(weight_file(bytes, quoted(r->header), r->n_data), r->word);
}
END_TEST

START_TEST(lengths_of_the_header)
{
    const char *good = quoted("{" A "}");
    size_t n = strlen(good);

    ck_assert_uint_eq(weight_file(bytes, good, 4), 8 + n + 4);
    for (size_t k = 0; k < 8; k++)
        refuse_bytes(k, "too short");
    for (size_t k = 8; k < 8 + n; k++)
        refuse_bytes(k, "does not fit");
    for (size_t k = 8 + n; k < 8 + n + 4; k++)
        refuse_bytes(k, "4 bytes, the file has");
    static const uint64_t lengths[] = { 100000001, UINT64_C(1) << 32, UINT64_MAX, UINT64_MAX - 7,
                                        UINT64_C(1) << 63 };
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
        refuse_bytes(weight_file_claiming(bytes, lengths[i], good, 4), "does not fit");
    refuse_bytes(weight_file_claiming(bytes, 0, good, 4), "'{' was expected");
    refuse_bytes(weight_file_claiming(bytes, n - 1, good, 4), "does not end");
    refuse_bytes(weight_file_claiming(bytes, n + 1, good, 4), "only spaces");
    refuse_bytes(weight_file_claiming(bytes, n + 4, good, 4), "only spaces");
}
END_TEST

START_TEST(a_header_over_the_limit_is_refused_for_its_length)
{
    const size_t limit = 100000000, n = 8 + limit + 1;
    unsigned char *big = calloc(n, 1);
    struct safetensors *st;
    struct error err = { 0 };

    memset(big + 8, ' ', limit + 1);
    memcpy(big + 8, "{}", 2);
    for (size_t over = 0; over < 2; over++) {
        for (int i = 0; i < 8; i++)
            big[i] = (unsigned char)((limit + over) >> 8 * i);
        enum status want = over ? ST_INVALID : ST_OK;
        ck_assert_int_eq(safetensors_parse(&st, "w", big, 8 + limit + over, &err), want);
        safetensors_close(st);
    }
    ck_assert_msg(strstr(err.text, "limit") != NULL, "%s", err.text);
    free(big);
}
END_TEST

/* Any prefix of a good file is refused.  With one byte changed a file is refused, or
 * read as two tensors that lie inside it; a change of the data is not seen. */
START_TEST(damaged_files)
{
    static unsigned char good[WEIGHT_FILE_MAX];
    const size_t n_data = 12;
    size_t n = weight_file(good, quoted("{'__metadata__':{'x':'y'}," A ",'b':{'dtype':'F32',"
                                        "'shape':[1,2],'data_offsets':[4,12]}}"), n_data);
    struct safetensors *st;
    uint64_t covered;

    for (size_t k = 0; k < n; k++) {
        memcpy(bytes, good, n);
        ck_assert_int_eq(safetensors_parse(&st, "w", bytes, k, NULL), ST_INVALID);
        for (int change = 1; change < 256; change += 2) {
            bytes[k] = (unsigned char)(good[k] ^ change);
            enum status status = safetensors_parse(&st, "w", bytes, n, NULL);
            ck_assert(status == ST_INVALID || (status == ST_OK && safetensors_count(st) == 2));
            ck_assert(status == ST_OK || k < n - n_data);
            covered = 0;
            for (size_t i = 0; status == ST_OK && i < 2; i++) {
                const struct tensor *t = safetensors_at(st, i);
                ck_assert_ptr_eq(t->data, bytes + n - n_data + t->begin);
                covered += t->bytes;
            }
            ck_assert(status != ST_OK || covered == n_data);
            safetensors_close(st);
        }
    }
}
END_TEST

/* ---- folders */

static void write_weights(const char *name, const char *header, size_t n_data)
{
    temp_file(name, bytes, weight_file(bytes, quoted(header), n_data));
}

static void write_index(const char *text)
{
    temp_file("model.safetensors.index.json", quoted(text), strlen(text));
}

static void write_shards(void)
{
    write_weights("one.safetensors", "{" A ",'b':{'dtype':'U8','shape':[2],"
                  "'data_offsets':[4,6]}}", 6);
    write_weights("two.safetensors", "{'c':{'dtype':'BF16','shape':[3],'data_offsets':[0,6]}}",
                  6);
}

static void refuse_folder(enum status code, const char *file, const char *word)
{
    struct safetensors *st = (struct safetensors *)&bytes;
    struct error err = { 0 };

    enum status got = safetensors_open(&st, temp_folder(), &err);
    ck_assert_msg(got == code && err.code == code, "%s: %s", status_name(got), err.text);
    ck_assert_ptr_null(st);
    ck_assert_msg(strstr(err.text, file) && strstr(err.text, word), "%s, %s: %s", file, word,
                  err.text);
    ck_assert_msg(strncmp(err.text, temp_folder(), strlen(temp_folder())) == 0, "%s", err.text);
}

START_TEST(one_file)
{
    struct safetensors *st = NULL;
    struct error err = { 0 };

    write_weights("model.safetensors", "{" A "}", 4);
    ck_assert_msg(safetensors_open(&st, temp_folder(), &err) == ST_OK, "%s", err.text);
    const struct tensor *a = safetensors_find(st, "a");
    ck_assert(a && memcmp(a->data, "\0\1\2\3", 4) == 0);
    ck_assert_str_eq(safetensors_file(st, a), temp_path("model.safetensors"));
    safetensors_close(st);
}
END_TEST

START_TEST(shards)
{
    struct safetensors *st = NULL;
    struct error err = { 0 };

    write_shards();
    write_index("{'metadata':{'total_size':12},'weight_map':{'c':'two.safetensors',"
                "'a':'one.safetensors','b':'one.safetensors'}}");
    /* Beside an index the plain file is not looked at. */
    temp_file("model.safetensors", "x", 1);
    ck_assert_msg(safetensors_open(&st, temp_folder(), &err) == ST_OK, "%s", err.text);
    ck_assert_uint_eq(safetensors_count(st), 3);
    const struct tensor *b = safetensors_find(st, "b"), *c = safetensors_find(st, "c");
    ck_assert(b && c && memcmp(b->data, "\4\5", 2) == 0 && memcmp(c->data, "\0\1\2", 3) == 0);
    ck_assert_str_eq(safetensors_file(st, c), temp_path("two.safetensors"));
    safetensors_close(st);
}
END_TEST

/* As in the cache of a download tool: the folder holds links to the files. */
START_TEST(links_are_followed)
{
    struct safetensors *st = NULL;

    write_weights("blob", "{" A "}", 4);
    ck_assert_int_eq(symlink("blob", temp_path("model.safetensors")), 0);
    ck_assert_int_eq(safetensors_open(&st, temp_folder(), NULL), ST_OK);
    ck_assert_uint_eq(safetensors_count(st), 1);
    safetensors_close(st);
}
END_TEST

START_TEST(no_file)
{
    struct safetensors *st;
    struct error err = { 0 };

    refuse_folder(ST_IO, "/model.safetensors:", "No such file");
    ck_assert_int_eq(safetensors_open(&st, "/nonexistent/folder", &err), ST_IO);
    ck_assert_msg(strstr(err.text, "/nonexistent/folder/model.safetensors"), "%s", err.text);
    ck_assert_int_eq(symlink("nowhere", temp_path("model.safetensors")), 0);
    refuse_folder(ST_IO, "/model.safetensors:", "No such file");
}
END_TEST

START_TEST(not_a_file)
{
    ck_assert_int_eq(mkdir(temp_path("model.safetensors"), 0700), 0);
    refuse_folder(ST_IO, "/model.safetensors:", "not a file");
    ck_assert_int_eq(rmdir(temp_path("model.safetensors")), 0);
    temp_file("model.safetensors", "", 0);
    refuse_folder(ST_IO, "/model.safetensors:", "empty");
    ck_assert_int_eq(remove(temp_path("model.safetensors")), 0);
    /* Nobody writes to the pipe: a reader that waits for one would wait for ever. */
    ck_assert_int_eq(mkfifo(temp_path("model.safetensors"), 0600), 0);
    refuse_folder(ST_IO, "/model.safetensors:", "not a file");
    ck_assert_int_eq(mkfifo(temp_path("model.safetensors.index.json"), 0600), 0);
    refuse_folder(ST_IO, "/model.safetensors.index.json:", "not a file");
}
END_TEST

START_TEST(a_damaged_file_in_a_folder)
{
    temp_file("model.safetensors", bytes, weight_file(bytes, quoted("{" A "}"), 4) - 1);
    refuse_folder(ST_INVALID, "/model.safetensors:", "4 bytes, the file has 3");
    temp_file("model.safetensors", "short", 5);
    refuse_folder(ST_INVALID, "/model.safetensors:", "too short");
}
END_TEST

#define ONE "one.safetensors"
#define TWO "two.safetensors"
#define ABC "'a':'" ONE "','b':'" ONE "','c':'" TWO "'"

static const struct bad_index {
    const char *text;
    enum status code;
    const char *file, *word;
} bad_indexes[] = {
    { "", ST_INVALID, "index.json", "not valid JSON" },
    { "[]", ST_INVALID, "index.json", "object" },
    { "{}", ST_INVALID, "index.json", "weight_map" },
    { "{'weight_map':null}", ST_INVALID, "index.json", "weight_map" },
    { "{'weight_map':['a']}", ST_INVALID, "index.json", "weight_map" },
    { "{'weight_map':{}}", ST_INVALID, "index.json", "weight_map" },
    { "{'weight_map':{" ABC "},'weight_map':{}}", ST_INVALID, "index.json", "weight_map" },
    { "{'weight_map':{'a':7}}", ST_INVALID, "index.json", "tensor a" },
    { "{'weight_map':{'a':''}}", ST_INVALID, "index.json", "tensor a" },
    { "{'weight_map':{'a':'..'}}", ST_INVALID, "index.json", "tensor a" },
    { "{'weight_map':{'a':'../" ONE "'}}", ST_INVALID, "index.json", "tensor a" },
    { "{'weight_map':{'a':'/etc/passwd'}}", ST_INVALID, "index.json", "tensor a" },
    { "{'weight_map':{" ABC ",'d':'three.safetensors'}}", ST_IO, "/three.safetensors",
      "No such file" },
    { "{'weight_map':{" ABC ",'d':'" TWO "'}}", ST_INVALID, "index.json", "tensor d" },
    { "{'weight_map':{'a':'" ONE "','b':'" TWO "','c':'" TWO "'}}", ST_INVALID, "index.json",
      "tensor b is not in " TWO },
    { "{'weight_map':{'a':'" ONE "','c':'" TWO "'}}", ST_INVALID, "index.json",
      "tensor b of" },
    { "{'weight_map':{" ABC ",'b':'" ONE "'}}", ST_INVALID, "index.json",
      "tensor b is in \"weight_map\" twice" },
    { "{'weight_map':{" ABC ",'d':'twin.safetensors'}}", ST_INVALID, ".safetensors",
      "tensor c is there twice" },
    { "{'weight_map':{" ABC ",'d':'folder'}}", ST_IO, "/folder", "not a file" },
};
enum { N_BAD_INDEXES = sizeof bad_indexes / sizeof *bad_indexes };

START_TEST(indexes_that_lie)
{
    const struct bad_index *b = &bad_indexes[_i];

    write_shards();
    write_weights("twin.safetensors", "{'c':{'dtype':'BF16','shape':[3],'data_offsets':[0,6]}}",
                  6);
    ck_assert_int_eq(mkdir(temp_path("folder"), 0700), 0);
    write_index(b->text);
    refuse_folder(b->code, b->file, b->word);
}
END_TEST

TCase *safetensors_case(void)
{
    TCase *tc = tcase_create("safetensors");

    tcase_add_checked_fixture(tc, temp_folder_create, temp_folder_remove);
    tcase_add_test(tc, tensors_of_a_file);
    tcase_add_test(tc, names_with_escapes);
    tcase_add_test(tc, every_type_has_its_size);
    tcase_add_test(tc, no_tensors_at_all);
    tcase_add_test(tc, alignment_is_not_asked_for);
    tcase_add_test(tc, thousands_of_names_are_found);
    tcase_add_loop_test(tc, refused, 0, N_REFUSALS);
    tcase_add_test(tc, lengths_of_the_header);
    tcase_add_test(tc, a_header_over_the_limit_is_refused_for_its_length);
    tcase_add_test(tc, damaged_files);
    tcase_add_test(tc, one_file);
    tcase_add_test(tc, shards);
    tcase_add_test(tc, links_are_followed);
    tcase_add_test(tc, no_file);
    tcase_add_test(tc, not_a_file);
    tcase_add_test(tc, a_damaged_file_in_a_folder);
    tcase_add_loop_test(tc, indexes_that_lie, 0, N_BAD_INDEXES);
    return tc;
}
