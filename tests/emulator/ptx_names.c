/* Which operation a name is, and what all of them need to know of types. */

#include "tests/emulator/ptx_ops.h"

#include <string.h>

static void split(struct parts *p, const char *name)
{
    *p = (struct parts){ .n = 0 };
    strncpy(p->text, name, sizeof p->text - 1);
    for (char *s = p->text; s && p->n < 20;) {
        char *dot = strchr(s, '.');
        p->at[p->n++] = s;
        if (dot)
            *dot++ = '\0';
        s = dot;
    }
}

bool ptx_has_part(const struct parts *p, const char *part)
{
    for (int i = 1; i < p->n; i++)
        if (strcmp(p->at[i], part) == 0)
            return true;
    return false;
}

enum ptx_type ptx_type_named(const char *s)
{
    static const struct { const char *name; enum ptx_type type; } types[] = {
        { "u8", PTX_U8 }, { "s8", PTX_S8 }, { "b8", PTX_U8 }, { "u16", PTX_U16 },
        { "s16", PTX_S16 }, { "b16", PTX_U16 }, { "u32", PTX_U32 }, { "s32", PTX_S32 },
        { "b32", PTX_U32 }, { "u64", PTX_U64 }, { "s64", PTX_S64 }, { "b64", PTX_U64 },
        { "f32", PTX_F32 }, { "f64", PTX_F64 }, { "bf16", PTX_BF16 }, { "pred", PTX_PRED },
    };

    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++)
        if (strcmp(types[i].name, s) == 0)
            return types[i].type;
    return PTX_NONE;
}

int ptx_index_of(const char *const *names, int n, const char *s)
{
    for (int i = 0; i < n; i++)
        if (names[i] && strcmp(names[i], s) == 0)
            return i;
    return -1;
}

void ptx_read_first(struct instruction *in)
{
    memmove(in->read + in->n_written, in->read, in->n_read * sizeof *in->read);
    memcpy(in->read, in->written, in->n_written * sizeof *in->read);
    in->n_read += in->n_written;
    in->n_written = 0;
}

bool ptx_find_named(struct instruction *in, const char *name, const struct ptx_named *all,
                    size_t n)
{
    for (size_t i = 0; i < n; i++) {
        bool no_result = all[i].read < 0;
        if (strcmp(all[i].name, name) != 0)
            continue;
        if (no_result)
            ptx_read_first(in);
        if (all[i].written == in->n_written &&
            (no_result ? -all[i].read : all[i].read) == in->n_read) {
            in->run = all[i].run;
            return true;
        }
    }
    return false;
}

bool ptx_operation_find(struct instruction *in, const char *name)
{
    struct parts p;

    split(&p, name);
    in->kind = PTX_PLAIN;
    return ptx_find_arithmetic(in, &p, name) || ptx_find_transfer(in, &p, name) ||
           ptx_find_together(in, &p, name);
}

/* ---- types */

float ptx_from_bf16(uint16_t v)
{
    union value u = { .u32 = (uint32_t)v << 16 };

    return u.f32;
}

int ptx_type_bits(enum ptx_type t)
{
    switch (t) {
    case PTX_U8: case PTX_S8: return 8;
    case PTX_U16: case PTX_S16: case PTX_BF16: return 16;
    case PTX_U64: case PTX_S64: case PTX_F64: return 64;
    default: return 32;
    }
}

bool ptx_is_signed(enum ptx_type t)
{
    return t == PTX_S8 || t == PTX_S16 || t == PTX_S32 || t == PTX_S64;
}

bool ptx_is_float(enum ptx_type t)
{
    return t == PTX_F32 || t == PTX_F64 || t == PTX_BF16;
}

uint64_t ptx_extended(uint64_t v, enum ptx_type t)
{
    int spare = 64 - ptx_type_bits(t);

    return ptx_is_signed(t) ? (uint64_t)((int64_t)(v << spare) >> spare) : v << spare >> spare;
}

uint64_t ptx_combined(enum atomic op, enum ptx_type t, uint64_t old, uint64_t v, uint64_t other)
{
    bool less = ptx_is_signed(t) ? (int64_t)old < (int64_t)v : old < v;

    switch (op) {
    case ATOMIC_ADD:
        if (t == PTX_F32) {
            union value a = { .u64 = old }, b = { .u64 = v };
            a.f32 += b.f32;
            return a.u32;
        }
        return old + v;
    case ATOMIC_MIN: return less ? old : v;
    case ATOMIC_MAX: return less ? v : old;
    case ATOMIC_OR: return old | v;
    case ATOMIC_AND: return old & v;
    case ATOMIC_EXCHANGE: return v;
    case ATOMIC_COMPARE: return old == v ? other : old;
    }
    return 0;
}
