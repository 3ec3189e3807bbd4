/* The reader of PTX texts: declarations, scopes, labels and operands.  What an operation is called
 * only ptx_names.c and those it asks understand. */

#include "tests/emulator/ptx_ops.h"

#include <ctype.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_NAME = 512 };

/* Registers of a scope: name itself, or name0 .. name(count - 1). */
struct registers {
    char name[MOST_NAME];
    int first, count, scope;    /* count 0: name itself */
    bool wide;                  /* 64 bits */
};

struct variable {
    char name[MOST_NAME];
    enum ptx_symbol_kind kind;
    int at, bytes, align, scope;
};

struct label {
    char name[MOST_NAME];
    int at, scope;
};

struct jump {                   /* to a label that is not known yet */
    char name[MOST_NAME];
    int instruction, scope;
};

struct reader {
    const char *at, *end;
    int line;
    char token[MOST_NAME];      /* the current one; empty: the end */
    struct ptx_module *module;
    struct ptx_function *f;     /* being read */
    struct registers *registers;
    struct variable *variables;
    struct label *labels;
    struct jump *jumps;
    int n_registers, n_variables, n_labels, n_jumps, scope;
    int n_module_variables;     /* in front of those of functions */
    bool asks_time;             /* the instruction being read */
};

/* Room for one more of n at the end of an array. */
#define ADD(array, n) \
    (grow((void **)&(array), (n)++, sizeof *(array)), &(array)[(n) - 1])

static void grow(void **array, int n, size_t element)
{
    if (n == 0 || (n >= 16 && (n & (n - 1)) == 0)) {
        size_t most = n < 16 ? 16 : 2 * (size_t)n;
        *array = ptx_more(*array, most, element);
    }
    memset((char *)*array + (size_t)n * element, 0, element);
}

static _Noreturn void refuse(const struct reader *r, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

static _Noreturn void refuse(const struct reader *r, const char *format, ...)
{
    va_list args;

    fprintf(stderr, "PTX, line %d, %s: ", r->line, r->f ? r->f->name : "outside of functions");
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, "\n");
    abort();
}

/* ---- tokens */

static void skip_blank(struct reader *r)
{
    while (r->at < r->end) {
        if (r->end - r->at >= 2 && r->at[0] == '/' && r->at[1] == '/') {
            while (r->at < r->end && *r->at != '\n')
                r->at++;
        } else if (isspace((unsigned char)*r->at)) {
            r->line += *r->at++ == '\n';
        } else {
            return;
        }
    }
}

static bool in_word(const struct reader *r, const char *p)
{
    return p < r->end && (isalnum((unsigned char)*p) || *p == '_' || *p == '.' || *p == '$' ||
                          *p == '%');
}

/* A word, which may have :: inside, a string, or one character. */
static void next(struct reader *r)
{
    skip_blank(r);
    const char *from = r->at;
    if (r->at < r->end && *r->at == '"') {
        do
            r->at++;
        while (r->at < r->end && *r->at != '"');
        r->at++;
    } else if (in_word(r, r->at)) {
        while (in_word(r, r->at) ||
               (r->end - r->at > 2 && r->at[0] == ':' && r->at[1] == ':' && in_word(r, r->at + 2)))
            r->at += *r->at == ':' ? 2 : 1;
    } else if (r->at < r->end) {
        r->at++;
    }
    size_t n = (size_t)(r->at - from);
    if (n >= MOST_NAME)
        refuse(r, "a name of more than %d characters", MOST_NAME - 1);
    memcpy(r->token, from, n);
    r->token[n] = '\0';
}

static bool is(const struct reader *r, const char *token)
{
    return strcmp(r->token, token) == 0;
}

static bool take(struct reader *r, const char *token)
{
    if (!is(r, token))
        return false;
    next(r);
    return true;
}

static void expect(struct reader *r, const char *token)
{
    if (!take(r, token))
        refuse(r, "'%s' where '%s' is expected", r->token, token);
}

static int64_t number(struct reader *r)
{
    bool minus = take(r, "-");
    char *end;
    uint64_t v = strtoull(r->token, &end, 0);

    if (end == r->token || (*end && strcmp(end, "U") != 0))
        refuse(r, "'%s' where a number is expected", r->token);
    next(r);
    return minus ? -(int64_t)v : (int64_t)v;
}

/* ---- declarations */

/* Of a register or variable; a predicate takes a word. */
static int type_bytes(const struct reader *r, const char *type)
{
    enum ptx_type t = type[0] == '.' ? ptx_type_named(type + 1) : PTX_NONE;

    if (t == PTX_NONE)
        refuse(r, "a type %s", type);
    return ptx_type_bits(t) / 8;
}

/* [.align n] .type name [count]; where it begins in an area of *bytes. */
static struct variable read_variable(struct reader *r, int *bytes)
{
    struct variable v = { .scope = r->scope };
    int align = 0, count = 1;

    if (take(r, ".align"))
        align = (int)number(r);
    while (is(r, ".ptr") || is(r, ".global"))
        next(r);
    int each = type_bytes(r, r->token);
    next(r);
    if (take(r, ".ptr") && take(r, ".align"))
        number(r);
    memcpy(v.name, r->token, sizeof v.name);
    next(r);
    if (take(r, "[")) {
        count = is(r, "]") ? 0 : (int)number(r);
        expect(r, "]");
    }
    v.align = align > each ? align : each;
    v.at = (*bytes + v.align - 1) / v.align * v.align;
    v.bytes = count * each;
    *bytes = v.at + v.bytes;
    return v;
}

static void add_variable(struct reader *r, struct variable v, enum ptx_symbol_kind kind)
{
    v.kind = kind;
    *ADD(r->variables, r->n_variables) = v;
}

/* Their place is their number until a kernel is put together. */
static void read_shared(struct reader *r)
{
    struct ptx_module *m = r->module;
    int none = 0;
    struct variable v = read_variable(r, &none);
    struct ptx_shared *s = ADD(m->shared, m->n_shared);

    *s = (struct ptx_shared){ v.bytes, v.align };
    v.at = m->n_shared - 1;
    add_variable(r, v, PTX_SHARED_ADDRESS);
    expect(r, ";");
}

/* A table of bytes that no kernel writes: there are no others. */
static void read_global(struct reader *r)
{
    struct ptx_module *m = r->module;
    int none = 0;
    struct variable v = read_variable(r, &none);
    unsigned char *bytes = aligned_alloc(256, ((size_t)v.bytes + 255) / 256 * 256);

    if (!bytes)
        abort();
    expect(r, "=");
    expect(r, "{");
    for (int i = 0; i < v.bytes; i++) {
        bytes[i] = (unsigned char)number(r);
        if (i < v.bytes - 1)
            expect(r, ",");
    }
    expect(r, "}");
    expect(r, ";");
    *ADD(m->globals, m->n_globals) = bytes;
    v.at = m->n_globals - 1;
    add_variable(r, v, PTX_GLOBAL_ADDRESS);
    ptx_memory_add(bytes, (size_t)v.bytes, false);
}

static void read_registers(struct reader *r)
{
    bool wide = type_bytes(r, r->token) == 8;

    next(r);
    do {
        struct registers *g = ADD(r->registers, r->n_registers);
        memcpy(g->name, r->token, sizeof g->name);
        next(r);
        if (take(r, "<")) {
            g->count = (int)number(r);
            expect(r, ">");
        }
        g->first = r->f->n_slots;
        g->scope = r->scope;
        g->wide = wide;
        r->f->n_slots += g->count ? g->count : 1;
    } while (take(r, ","));
    expect(r, ";");
}

/* ---- operands */

struct operand {
    int slots[4], n;            /* n 0: an address, or _ */
    bool is_address, is_not, wide, is_name; /* is_name: text has it, a label or function */
    int64_t offset;
    char text[MOST_NAME];
};

static int symbol_slot(struct reader *r, enum ptx_symbol_kind kind, uint64_t value)
{
    struct ptx_function *f = r->f;

    for (int i = 0; i < f->n_symbols; i++)
        if (f->symbols[i].kind == kind && f->symbols[i].value == value)
            return f->symbols[i].slot;
    struct ptx_symbol *s = ADD(f->symbols, f->n_symbols);
    *s = (struct ptx_symbol){ .kind = kind, .slot = f->n_slots++, .value = value };
    return s->slot;
}

static const struct registers *find_register(const struct reader *r, const char *name, int *slot)
{
    for (int i = r->n_registers - 1; i >= 0; i--) {
        const struct registers *g = &r->registers[i];
        size_t n = strlen(g->name);
        if (!g->count && strcmp(g->name, name) == 0) {
            *slot = g->first;
            return g;
        }
        if (g->count && strncmp(g->name, name, n) == 0 && isdigit((unsigned char)name[n])) {
            char *end;
            long k = strtol(name + n, &end, 10);
            if (!*end && k < g->count) {
                *slot = g->first + (int)k;
                return g;
            }
        }
    }
    return NULL;
}

static const struct variable *find_variable(const struct reader *r, const char *name)
{
    for (int i = r->n_variables - 1; i >= 0; i--)
        if (strcmp(r->variables[i].name, name) == 0)
            return &r->variables[i];
    return NULL;
}

static int find_special(const char *name)
{
    static const char *const names[] = {
        [PTX_TID_X] = "%tid.x", [PTX_TID_Y] = "%tid.y", [PTX_TID_Z] = "%tid.z",
        [PTX_NTID_X] = "%ntid.x", [PTX_NTID_Y] = "%ntid.y", [PTX_NTID_Z] = "%ntid.z",
        [PTX_CTAID_X] = "%ctaid.x", [PTX_CTAID_Y] = "%ctaid.y", [PTX_CTAID_Z] = "%ctaid.z",
        [PTX_NCTAID_X] = "%nctaid.x", [PTX_NCTAID_Y] = "%nctaid.y", [PTX_NCTAID_Z] = "%nctaid.z",
        [PTX_LANEID] = "%laneid", [PTX_CLUSTER_RANK] = "%cluster_ctarank",
        [PTX_CLUSTER_SIZE] = "%cluster_nctarank", [PTX_LANES_BELOW] = "%lanemask_lt",
        [PTX_TIME] = "%globaltimer",
    };

    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strcmp(names[i], name) == 0)
            return (int)i;
    return -1;
}

/* Whole numbers as they are, floats by their bits. */
static int immediate_slot(struct reader *r)
{
    bool minus = take(r, "-");
    const char *t = r->token;
    char *end;
    uint64_t v = t[0] == '0' && (t[1] == 'f' || t[1] == 'd') ? strtoull(t + 2, &end, 16)
                                                               : strtoull(t, &end, 0);

    if (!isdigit((unsigned char)t[0]) || (*end && strcmp(end, "U") != 0))
        refuse(r, "'%s' is no register, variable or number", t);
    next(r);
    return symbol_slot(r, PTX_IMMEDIATE, minus ? -v : v);
}

/* A register, number or variable. */
static int read_slot(struct reader *r, bool *wide)
{
    int slot = 0, special = find_special(r->token);
    const struct registers *g = find_register(r, r->token, &slot);
    const struct variable *v = find_variable(r, r->token);

    *wide = true;
    if (g) {
        *wide = g->wide;
    } else if (v) {
        slot = symbol_slot(r, v->kind, (uint64_t)v->at);
    } else if (special >= 0) {
        slot = symbol_slot(r, PTX_SPECIAL, (uint64_t)special);
        r->asks_time |= special == PTX_TIME;
    } else {
        return immediate_slot(r);
    }
    next(r);
    return slot;
}

static void read_address(struct reader *r, struct operand *o)
{
    o->is_address = true;
    o->slots[0] = read_slot(r, &o->wide);
    o->n = 1;
    if (take(r, "+"))
        o->offset = number(r);
    expect(r, "]");
}

static bool starts_operand(const struct reader *r)
{
    int slot;

    return find_register(r, r->token, &slot) || find_variable(r, r->token) ||
           find_special(r->token) >= 0 || isdigit((unsigned char)r->token[0]) || is(r, "-");
}

static struct operand read_operand(struct reader *r)
{
    struct operand o = { .n = 0 };
    bool wide;

    o.is_not = take(r, "!");
    if (take(r, "[")) {
        read_address(r, &o);
    } else if (take(r, "{")) {
        do {
            if (o.n == 4)
                refuse(r, "a vector of more than four");
            if (take(r, "_"))
                o.slots[o.n++] = -1;
            else
                o.slots[o.n++] = read_slot(r, &wide);
        } while (take(r, ","));
        expect(r, "}");
    } else if (take(r, "_")) {
        o.slots[o.n++] = -1;
    } else if (starts_operand(r)) {
        o.slots[o.n++] = read_slot(r, &o.wide);
        if (take(r, "|"))
            o.slots[o.n++] = read_slot(r, &wide);
    } else {
        o.is_name = true;
        memcpy(o.text, r->token, sizeof o.text);
        next(r);
    }
    return o;
}

/* ---- instructions */

static void add_instruction(struct reader *r, const struct instruction *in)
{
    *ADD(r->f->code, r->f->n_code) = *in;
}

static int find_function(struct reader *r, const char *name)
{
    struct ptx_module *m = r->module;

    for (int i = 0; i < m->n_functions; i++)
        if (strcmp(m->functions[i]->name, name) == 0)
            return i;
    return -1;
}

/* Names of variables in parentheses; each is passed from or to the callee's param number i. */
static int read_passed(struct reader *r, const struct ptx_function *callee, bool is_result)
{
    int n = 0;

    expect(r, "(");
    while (!take(r, ")")) {
        const struct variable *v = find_variable(r, r->token);
        if (!v || v->kind != PTX_CALL_PARAM)
            refuse(r, "'%s' is no parameter of a call", r->token);
        if (is_result ? !callee->has_result : n >= callee->n_params)
            refuse(r, "more is passed to %s than it takes", callee->name);
        const struct ptx_param *p = &callee->params[is_result ? callee->n_params : n];
        struct ptx_passed *passed = ADD(r->f->passed, r->f->n_passed);
        *passed = (struct ptx_passed){ is_result ? p->at : v->at, is_result ? v->at : p->at,
                                       p->bytes };
        next(r);
        take(r, ",");
        n++;
    }
    return n;
}

/* What a call returns is named first, when its function is not yet known. */
static void read_call(struct reader *r, struct instruction in)
{
    struct reader before = *r;
    bool returns = is(r, "(");

    if (returns) {
        while (!take(r, ")"))
            next(r);
        expect(r, ",");
    }
    in.target = find_function(r, r->token);
    if (in.target < 0)
        refuse(r, "a call of %s, which is not there", r->token);
    const struct ptx_function *callee = r->module->functions[in.target];
    next(r);
    in.kind = PTX_CALL;
    in.first_passed = r->f->n_passed;
    if (take(r, ","))
        in.n_passed = read_passed(r, callee, false);
    expect(r, ";");
    if (in.n_passed != callee->n_params)
        refuse(r, "%d are passed to %s, which takes %d", in.n_passed, callee->name,
               callee->n_params);
    if (returns) {
        struct reader after = *r;
        r->at = before.at;
        r->line = before.line;
        memcpy(r->token, before.token, sizeof r->token);
        in.n_returned = read_passed(r, callee, true);
        r->at = after.at;
        r->line = after.line;
        memcpy(r->token, after.token, sizeof r->token);
    }
    add_instruction(r, &in);
}

static void read_branch(struct reader *r, struct instruction in)
{
    struct jump *j = ADD(r->jumps, r->n_jumps);

    memcpy(j->name, r->token, sizeof j->name);
    j->instruction = r->f->n_code;
    j->scope = r->scope;
    in.kind = PTX_BRANCH;
    add_instruction(r, &in);
    next(r);
    expect(r, ";");
}

static void place_operand(struct reader *r, struct instruction *in, const struct operand *o,
                          bool written)
{
    for (int i = 0; i < o->n; i++) {
        if (written) {
            if (in->n_written == MOST_WRITTEN)
                refuse(r, "too many results");
            in->written[in->n_written++] = o->slots[i];
        } else {
            if (in->n_read == MOST_READ)
                refuse(r, "too many operands");
            if (o->is_not)
                in->read_not |= (uint16_t)(1u << in->n_read);
            in->read[in->n_read++] = o->slots[i];
        }
    }
    if (o->is_address && in->addresses++ == 0) {
        in->wide_address = o->wide;
        in->offset = (int)o->offset;
    } else if (o->is_address && o->offset) {
        refuse(r, "an offset of a second address");
    }
}

/* The first operand is the result, but an address never is; vectors and pairs are several. */
static void read_operands(struct reader *r, struct instruction *in)
{
    bool first = true;

    while (!is(r, ";")) {
        struct operand o = read_operand(r);
        if (o.is_name)
            refuse(r, "'%s' is not known", o.text);
        place_operand(r, in, &o, first && !o.is_address);
        first = false;
        if (!take(r, ","))
            break;
    }
    expect(r, ";");
}

static void read_instruction(struct reader *r)
{
    struct instruction in = { .guard = -1, .line = r->line };
    bool wide;

    r->asks_time = false;
    if (take(r, "@")) {
        in.guard_not = take(r, "!");
        in.guard = read_slot(r, &wide);
    }
    char name[MOST_NAME];
    memcpy(name, r->token, sizeof name);
    next(r);
    if (strcmp(name, "bra") == 0 || strcmp(name, "bra.uni") == 0) {
        read_branch(r, in);
    } else if (strcmp(name, "call.uni") == 0 || strcmp(name, "call") == 0) {
        read_call(r, in);
    } else if (strcmp(name, "ret") == 0 || strcmp(name, "exit") == 0) {
        in.kind = PTX_RETURN;
        add_instruction(r, &in);
        expect(r, ";");
    } else {
        read_operands(r, &in);
        if (!ptx_operation_find(&in, name))
            refuse(r, "%s with %d results and %d operands is not known", name, in.n_written,
                   in.n_read);
        if (r->asks_time)        /* mov */
            in.run = ptx_tell_time;
        add_instruction(r, &in);
    }
}

/* ---- scopes */

static void close_scope(struct reader *r)
{
    int left = 0;

    for (int i = 0; i < r->n_jumps; i++) {
        struct jump *j = &r->jumps[i];
        int at = -1;
        for (int k = r->n_labels - 1; k >= 0 && at < 0; k--)
            if (j->scope == r->scope && r->labels[k].scope == r->scope &&
                strcmp(r->labels[k].name, j->name) == 0)
                at = r->labels[k].at;
        if (at >= 0) {
            r->f->code[j->instruction].target = at;
            continue;
        }
        if (j->scope == r->scope)
            j->scope--;
        r->jumps[left++] = *j;
    }
    r->n_jumps = left;
    while (r->n_labels > 0 && r->labels[r->n_labels - 1].scope == r->scope)
        r->n_labels--;
    while (r->n_registers > 0 && r->registers[r->n_registers - 1].scope == r->scope)
        r->n_registers--;
    while (r->n_variables > r->n_module_variables &&
           r->variables[r->n_variables - 1].scope == r->scope)
        r->n_variables--;
    r->scope--;
    if (r->scope == 0 && r->n_jumps > 0)
        refuse(r, "no label %s", r->jumps[0].name);
}

static void read_directive(struct reader *r)
{
    if (take(r, ".reg")) {
        read_registers(r);
    } else if (take(r, ".shared")) {
        read_shared(r);
    } else if (take(r, ".local")) {
        add_variable(r, read_variable(r, &r->f->local_bytes), PTX_LOCAL_ADDRESS);
        expect(r, ";");
    } else if (take(r, ".param")) {
        add_variable(r, read_variable(r, &r->f->param_bytes), PTX_CALL_PARAM);
        expect(r, ";");
    } else if (take(r, ".pragma")) {
        next(r);
        expect(r, ";");
    } else {
        refuse(r, "a directive %s", r->token);
    }
}

static bool read_label(struct reader *r)
{
    struct reader ahead = *r;

    next(&ahead);
    if (!is(&ahead, ":"))
        return false;
    struct label *l = ADD(r->labels, r->n_labels);
    memcpy(l->name, r->token, sizeof l->name);
    l->at = r->f->n_code;
    l->scope = r->scope;
    next(r);
    next(r);
    return true;
}

/* From behind the opening brace on. */
static void read_body(struct reader *r)
{
    const struct instruction end = { .kind = PTX_RETURN, .guard = -1, .line = r->line };

    r->scope = 1;
    while (r->scope > 0) {
        if (!*r->token)
            refuse(r, "the text ends");
        else if (take(r, "{"))
            r->scope++;
        else if (take(r, "}"))
            close_scope(r);
        else if (r->token[0] == '.')
            read_directive(r);
        else if (is(r, "@") || !read_label(r))
            read_instruction(r);
    }
    add_instruction(r, &end);
    r->f->defined = true;
}

/* ---- functions */

static void read_params(struct reader *r, bool is_result)
{
    struct ptx_function *f = r->f;
    enum ptx_symbol_kind kind = f->is_kernel ? PTX_KERNEL_PARAM : PTX_CALL_PARAM;

    expect(r, "(");
    while (!take(r, ")")) {
        expect(r, ".param");
        struct variable v = read_variable(r, &f->param_bytes);
        add_variable(r, v, kind);
        struct ptx_param *p = ADD(f->params, f->n_params);
        *p = (struct ptx_param){ v.at, v.bytes };
        take(r, ",");
    }
    if (is_result && f->n_params != 1)
        refuse(r, "%d results", f->n_params);
}

/* The result is read first, and comes last. */
static void result_to_end(struct ptx_function *f)
{
    struct ptx_param result = f->params[0];

    memmove(f->params, f->params + 1, (size_t)--f->n_params * sizeof *f->params);
    f->params[f->n_params] = result;
}

static struct ptx_function *function_named(struct reader *r, const char *name, bool is_kernel)
{
    int known = find_function(r, name);

    if (known >= 0)
        return r->module->functions[known];
    struct ptx_function *f = ptx_new(1, sizeof *f);
    f->name = strdup(name);
    f->is_kernel = is_kernel;
    *ADD(r->module->functions, r->module->n_functions) = f;
    return f;
}

/* From behind .entry or .func on. */
static void read_function(struct reader *r, bool is_kernel)
{
    struct ptx_function scratch = { .name = (char *)"a function", .is_kernel = is_kernel };

    r->scope = 1;
    r->f = &scratch;
    if (is(r, "("))
        read_params(r, true);
    scratch.has_result = scratch.n_params;
    struct ptx_function *f = function_named(r, r->token, is_kernel);
    scratch.name = f->name;
    next(r);
    if (is(r, "("))
        read_params(r, false);
    if (scratch.has_result)
        result_to_end(&scratch);
    free(f->params);
    *f = scratch;
    r->f = f;
    while (!is(r, "{") && !is(r, ";")) {
        if (take(r, ".maxntid")) {
            f->most_threads = 1;
            do
                f->most_threads *= (unsigned)number(r);
            while (take(r, ","));
        } else if (take(r, ".minnctapersm") || take(r, ".maxnreg")) {
            number(r);
        } else if (!take(r, ".noreturn")) {
            refuse(r, "'%s' behind a function's parameters", r->token);
        }
    }
    if (take(r, "{"))
        read_body(r);
    else
        next(r);
    r->scope = 0;
    r->n_variables = r->n_module_variables;
    r->f = NULL;
}

static void read_target(struct reader *r)
{
    if (strncmp(r->token, "sm_", 3) != 0)
        refuse(r, "a target %s", r->token);
    r->module->target = atoi(r->token + 3);
    next(r);
    while (take(r, ","))
        next(r);
}

struct ptx_module *ptx_module_read(const char *text, size_t n)
{
    struct ptx_module *m = ptx_new(1, sizeof *m);
    struct reader r = { .at = text, .end = text + n, .line = 1, .module = m };

    for (next(&r); *r.token;) {
        while (is(&r, ".visible") || is(&r, ".weak") || is(&r, ".extern"))
            next(&r);
        if (take(&r, ".version") || take(&r, ".address_size")) {
            next(&r);
        } else if (take(&r, ".target")) {
            read_target(&r);
        } else if (take(&r, ".shared")) {
            read_shared(&r);
            r.n_module_variables = r.n_variables;
        } else if (take(&r, ".global") || take(&r, ".const")) {
            read_global(&r);
            r.n_module_variables = r.n_variables;
        } else if (is(&r, ".entry") || is(&r, ".func")) {
            bool is_kernel = is(&r, ".entry");
            next(&r);
            read_function(&r, is_kernel);
        } else {
            refuse(&r, "'%s' is not known here", r.token);
        }
    }
    m->kernels = ptx_new((size_t)m->n_functions, sizeof *m->kernels);
    free(r.registers);
    free(r.variables);
    free(r.labels);
    free(r.jumps);
    return m;
}
