/* What a lane does with its registers alone. */

#include "tests/emulator/ptx_ops.h"

#include <fenv.h>
#include <math.h>
#include <string.h>

#define BINARY(name, field, operator) \
    OPERATION(name, d[l].field = a[l].field operator b[l].field)

BINARY(add_32, u32, +) BINARY(add_64, u64, +) BINARY(sub_32, u32, -) BINARY(sub_64, u64, -)
BINARY(add_f32, f32, +) BINARY(sub_f32, f32, -) BINARY(mul_f32, f32, *) BINARY(div_f32, f32, /)
BINARY(add_f64, f64, +) BINARY(sub_f64, f64, -) BINARY(mul_f64, f64, *)
BINARY(mul_32, u32, *) BINARY(mul_64, u64, *)
BINARY(and_32, u32, &) BINARY(or_32, u32, |) BINARY(xor_32, u32, ^)
BINARY(and_64, u64, &) BINARY(or_64, u64, |) BINARY(xor_64, u64, ^)
OPERATION(sub_16, d[l].u16 = (uint16_t)(a[l].u16 - b[l].u16))
OPERATION(mul_16, d[l].u16 = (uint16_t)((unsigned)a[l].u16 * b[l].u16))
OPERATION(and_16, d[l].u16 = a[l].u16 & b[l].u16)
OPERATION(xor_16, d[l].u16 = a[l].u16 ^ b[l].u16)
OPERATION(not_32, d[l].u32 = ~a[l].u32)
OPERATION(neg_32, d[l].u32 = 0 - a[l].u32)
OPERATION(neg_64, d[l].u64 = 0 - a[l].u64)
OPERATION(neg_f32, d[l].f32 = -a[l].f32)
OPERATION(neg_f64, d[l].f64 = -a[l].f64)
OPERATION(abs_f32, d[l].f32 = fabsf(a[l].f32))

/* Predicates are 0 or 1. */
OPERATION(and_pred, d[l].u32 = a[l].u32 && b[l].u32)
OPERATION(or_pred, d[l].u32 = a[l].u32 || b[l].u32)
OPERATION(xor_pred, d[l].u32 = !a[l].u32 != !b[l].u32)
OPERATION(not_pred, d[l].u32 = !a[l].u32)
OPERATION(mov_pred, d[l].u32 = a[l].u32 != 0)

OPERATION(mul_wide_s32, d[l].s64 = (int64_t)a[l].s32 * b[l].s32)
OPERATION(mul_wide_u32, d[l].u64 = (uint64_t)a[l].u32 * b[l].u32)
OPERATION(mul_wide_u16, d[l].u32 = (uint32_t)a[l].u16 * b[l].u16)
OPERATION(mul_hi_s32, d[l].s32 = (int32_t)((int64_t)a[l].s32 * b[l].s32 >> 32))
OPERATION(mad_32, d[l].u32 = a[l].u32 * b[l].u32 + c[l].u32)
OPERATION(mad_wide_u32, d[l].u64 = (uint64_t)a[l].u32 * b[l].u32 + c[l].u64)
OPERATION(fma_f32, d[l].f32 = fmaf(a[l].f32, b[l].f32, c[l].f32))
OPERATION(fma_f64, d[l].f64 = fma(a[l].f64, b[l].f64, c[l].f64))

/* Of a zero divisor the result is not defined; all bits, as the hardware has it. */
OPERATION(div_u32, d[l].u32 = b[l].u32 ? a[l].u32 / b[l].u32 : ~0u)
OPERATION(div_u64, d[l].u64 = b[l].u64 ? a[l].u64 / b[l].u64 : ~(uint64_t)0)
OPERATION(div_s32, d[l].s32 = b[l].s32 ? (int32_t)((int64_t)a[l].s32 / b[l].s32) : -1)
OPERATION(rem_s32, d[l].s32 = b[l].s32 ? (int32_t)((int64_t)a[l].s32 % b[l].s32) : a[l].s32)
OPERATION(div_s64, d[l].s64 = b[l].s64 ? (b[l].s64 == -1 ? (int64_t)(0 - a[l].u64)
                                                         : a[l].s64 / b[l].s64) : -1)

OPERATION(min_s32, d[l].s32 = a[l].s32 < b[l].s32 ? a[l].s32 : b[l].s32)
OPERATION(max_s32, d[l].s32 = a[l].s32 > b[l].s32 ? a[l].s32 : b[l].s32)
OPERATION(min_u32, d[l].u32 = a[l].u32 < b[l].u32 ? a[l].u32 : b[l].u32)
OPERATION(max_u32, d[l].u32 = a[l].u32 > b[l].u32 ? a[l].u32 : b[l].u32)
OPERATION(min_u64, d[l].u64 = a[l].u64 < b[l].u64 ? a[l].u64 : b[l].u64)
OPERATION(max_u64, d[l].u64 = a[l].u64 > b[l].u64 ? a[l].u64 : b[l].u64)
OPERATION(min_f32, d[l].f32 = fminf(a[l].f32, b[l].f32))
OPERATION(max_f32, d[l].f32 = fmaxf(a[l].f32, b[l].f32))

/* Shifts by the width and more leave nothing, or the sign. */
OPERATION(shl_32, d[l].u32 = b[l].u32 > 31 ? 0 : a[l].u32 << b[l].u32)
OPERATION(shl_64, d[l].u64 = b[l].u32 > 63 ? 0 : a[l].u64 << b[l].u32)
OPERATION(shr_u32, d[l].u32 = b[l].u32 > 31 ? 0 : a[l].u32 >> b[l].u32)
OPERATION(shr_u64, d[l].u64 = b[l].u32 > 63 ? 0 : a[l].u64 >> b[l].u32)
OPERATION(shr_s32, d[l].s32 = a[l].s32 >> (b[l].u32 > 31 ? 31 : b[l].u32))

OPERATION(mov_16, d[l].u16 = a[l].u16)
OPERATION(mov_32, d[l].u32 = a[l].u32)
OPERATION(mov_64, d[l].u64 = a[l].u64)
OPERATION(select_32, d[l].u32 = c[l].u32 ? a[l].u32 : b[l].u32)
OPERATION(select_64, d[l].u64 = c[l].u32 ? a[l].u64 : b[l].u64)
OPERATION(select_16, d[l].u16 = c[l].u32 ? a[l].u16 : b[l].u16)

OPERATION(count_bits_32, d[l].s32 = __builtin_popcount(a[l].u32))
OPERATION(zeros_above_32, d[l].s32 = a[l].u32 ? __builtin_clz(a[l].u32) : 32)
OPERATION(shift_to_top, d[l].s32 = a[l].u32 ? __builtin_clz(a[l].u32) : -1)

/* The approximations of the hardware are within an ulp or two of these. */
OPERATION(sqrt_f32, d[l].f32 = sqrtf(a[l].f32))
OPERATION(reciprocal_f32, d[l].f32 = 1 / a[l].f32)
OPERATION(reciprocal_f64, d[l].f64 = 1 / a[l].f64)
OPERATION(reciprocal_root_f32, d[l].f32 = (float)(1 / sqrt((double)a[l].f32)))
OPERATION(power_of_2, d[l].f32 = exp2f(a[l].f32))

static uint32_t turned(uint32_t v)
{
    uint32_t out = 0;

    for (int i = 0; i < 32; i++)
        out |= (v >> i & 1) << (31 - i);
    return out;
}

static uint32_t permuted(uint32_t a, uint32_t b, uint32_t how)
{
    uint64_t bytes = a | (uint64_t)b << 32;
    uint32_t out = 0;

    for (int i = 0; i < 4; i++) {
        uint32_t pick = how >> 4 * i & 15;
        uint32_t v = (uint32_t)(bytes >> 8 * (pick & 7)) & 0xff;
        if (pick & 8)
            v = v & 0x80 ? 0xff : 0;
        out |= v << 8 * i;
    }
    return out;
}

static uint64_t inserted(uint64_t field, uint64_t into, uint32_t at, uint32_t n, uint32_t width)
{
    at &= 0xff;
    n &= 0xff;
    if (at >= width || n == 0)
        return into;
    uint64_t mask = n >= 64 ? ~(uint64_t)0 : ((uint64_t)1 << n) - 1;
    return (into & ~(mask << at)) | (field & mask) << at;
}

OPERATION(turn_bits, d[l].u32 = turned(a[l].u32))
OPERATION(permute, d[l].u32 = permuted(a[l].u32, b[l].u32, c[l].u32))
OPERATION(insert_32, d[l].u32 = (uint32_t)inserted(a[l].u32, b[l].u32, c[l].u32,
                                                   w->slots[in->read[3]][l].u32, 32))
OPERATION(insert_64, d[l].u64 = inserted(a[l].u64, b[l].u64, c[l].u32,
                                         w->slots[in->read[3]][l].u32, 64))

static int into_rounding(enum ptx_rounding r)
{
    static const int modes[] = { [PTX_NEAREST] = FE_TONEAREST, [PTX_ZERO] = FE_TOWARDZERO,
                                 [PTX_DOWN] = FE_DOWNWARD, [PTX_UP] = FE_UPWARD };
    int before = fegetround();

    fesetround(modes[r]);
    return before;
}

static void fma_rounded(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    int before = into_rounding(in->rounding);

    EACH(d[l].f32 = fmaf(a[l].f32, b[l].f32, c[l].f32));
    fesetround(before);
}

/* Words into a 64-bit value, and out of it. */
OPERATION(pack, d[l].u64 = a[l].u32 | (uint64_t)b[l].u32 << 32)
OPERATION(pack_16, d[l].u32 = a[l].u16 | (uint32_t)b[l].u16 << 16)

static void unpack(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    for (int l = 0; l < LANES; l++) {
        uint64_t v = w->slots[in->read[0]][l].u64;
        if (lanes >> l & 1)
            for (int i = 0; i < 2; i++)
                if (in->written[i] >= 0)
                    w->slots[in->written[i]][l].u32 = (uint32_t)(v >> 32 * i);
    }
}

static void unpack_16(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    for (int l = 0; l < LANES; l++) {
        uint32_t v = w->slots[in->read[0]][l].u32;
        if (lanes >> l & 1)
            for (int i = 0; i < 2; i++)
                if (in->written[i] >= 0)
                    w->slots[in->written[i]][l].u16 = (uint16_t)(v >> 16 * i);
    }
}

/* ---- comparisons */

static bool ordered(enum ptx_compare c, int order)
{
    switch (c) {
    case PTX_EQ: case PTX_EQU: return order == 0;
    case PTX_NE: case PTX_NEU: return order != 0;
    case PTX_LT: case PTX_LTU: return order < 0;
    case PTX_LE: case PTX_LEU: return order <= 0;
    case PTX_GT: case PTX_GTU: return order > 0;
    case PTX_GE: case PTX_GEU: return order >= 0;
    case PTX_NUM: return true;
    case PTX_NAN: return false;
    }
    return false;
}

static bool compare_floats(enum ptx_compare c, double a, double b)
{
    if (isnan(a) || isnan(b))
        return c == PTX_EQU || c == PTX_NEU || c == PTX_LTU || c == PTX_LEU || c == PTX_GTU ||
               c == PTX_GEU || c == PTX_NAN;
    return ordered(c, (a > b) - (a < b));
}

#define ORDER(field) ((a[l].field > b[l].field) - (a[l].field < b[l].field))
#define COMPARE(field) EACH(d[l].u32 = ordered(in->compare, ORDER(field)))

static void compare(struct warp *w, const struct instruction *in, uint32_t lanes)
{
    switch (in->from) {
    case PTX_U16: COMPARE(u16); break;
    case PTX_S16: COMPARE(s16); break;
    case PTX_U32: COMPARE(u32); break;
    case PTX_S32: COMPARE(s32); break;
    case PTX_U64: COMPARE(u64); break;
    case PTX_S64: COMPARE(s64); break;
    case PTX_F32: EACH(d[l].u32 = compare_floats(in->compare, (double)a[l].f32,
                                                 (double)b[l].f32)); break;
    default: EACH(d[l].u32 = compare_floats(in->compare, a[l].f64, b[l].f64)); break;
    }
}

/* ---- conversions */

/* To nearest, ties to even; NaN is one of its own. */
static uint16_t to_bf16(float f)
{
    union value u = { .f32 = f };

    if (isnan(f))
        return 0x7fff;
    return (uint16_t)((u.u32 + 0x7fff + (u.u32 >> 16 & 1)) >> 16);
}

static double rounded(double v, enum ptx_rounding r)
{
    return r == PTX_ZERO ? trunc(v) : r == PTX_DOWN ? floor(v) : r == PTX_UP ? ceil(v) : rint(v);
}

/* Limits are the type's; NaN is 0. */
static uint64_t to_whole(double v, const struct instruction *in)
{
    int bits = ptx_type_bits(in->type);

    if (isnan(v))
        return 0;
    v = rounded(v, in->rounding);
    if (ptx_is_signed(in->type)) {
        double limit = ldexp(1, bits - 1);
        return v >= limit ? ((uint64_t)1 << (bits - 1)) - 1
               : v < -limit ? (uint64_t)-((int64_t)1 << (bits - 2)) * 2 : (uint64_t)(int64_t)v;
    }
    return v <= 0 ? 0 : v >= ldexp(1, bits) ? ~(uint64_t)0 >> (64 - bits) : (uint64_t)v;
}

static union value converted(union value v, const struct instruction *in)
{
    union value out = { .u64 = 0 };
    bool to_float = ptx_is_float(in->type);

    if (!ptx_is_float(in->from)) {
        uint64_t whole = ptx_extended(v.u64, in->from);
        if (!to_float)
            out.u64 = ptx_extended(whole, in->type);
        else if (in->type == PTX_F64)
            out.f64 = ptx_is_signed(in->from) ? (double)(int64_t)whole : (double)whole;
        else
            out.f32 = ptx_is_signed(in->from) ? (float)(int64_t)whole : (float)whole;
        return out;
    }
    double f = in->from == PTX_BF16 ? (double)ptx_from_bf16(v.u16)
               : in->from == PTX_F32 ? (double)v.f32 : v.f64;
    if (!to_float) {
        out.u64 = to_whole(f, in);
        return out;
    }
    if (in->type == in->from && !in->saturate)
        f = rounded(f, in->rounding);
    if (in->saturate)
        f = isnan(f) || f < 0 ? 0 : f > 1 ? 1 : f;
    if (in->type == PTX_F64)
        out.f64 = f;
    else if (in->type == PTX_F32)
        out.f32 = (float)f;
    else
        out.u16 = to_bf16((float)f);
    return out;
}

OPERATION(convert, d[l] = converted(a[l], in))
OPERATION(convert_pair, d[l].u32 = to_bf16(b[l].f32) | (uint32_t)to_bf16(a[l].f32) << 16)

/* ---- names */

static const struct ptx_named plain[] = {
    { "add.s32", add_32, 1, 2 }, { "add.u32", add_32, 1, 2 }, { "add.s64", add_64, 1, 2 },
    { "add.u64", add_64, 1, 2 }, { "add.f32", add_f32, 1, 2 }, { "add.rn.f32", add_f32, 1, 2 },
    { "add.f64", add_f64, 1, 2 }, { "add.rn.f64", add_f64, 1, 2 }, { "sub.s16", sub_16, 1, 2 },
    { "sub.u16", sub_16, 1, 2 }, { "sub.s32", sub_32, 1, 2 }, { "sub.u32", sub_32, 1, 2 },
    { "sub.s64", sub_64, 1, 2 }, { "sub.u64", sub_64, 1, 2 }, { "sub.f32", sub_f32, 1, 2 },
    { "sub.rn.f32", sub_f32, 1, 2 }, { "sub.f64", sub_f64, 1, 2 }, { "mul.f32", mul_f32, 1, 2 },
    { "mul.rn.f32", mul_f32, 1, 2 }, { "mul.f64", mul_f64, 1, 2 }, { "mul.rn.f64", mul_f64, 1, 2 },
    { "mul.lo.s32", mul_32, 1, 2 }, { "mul.lo.u32", mul_32, 1, 2 }, { "mul.lo.s64", mul_64, 1, 2 },
    { "mul.lo.u64", mul_64, 1, 2 }, { "mul.lo.s16", mul_16, 1, 2 }, { "mul.lo.u16", mul_16, 1, 2 },
    { "mul.wide.s32", mul_wide_s32, 1, 2 }, { "mul.wide.u32", mul_wide_u32, 1, 2 },
    { "mul.wide.u16", mul_wide_u16, 1, 2 }, { "mul.hi.s32", mul_hi_s32, 1, 2 },
    { "mad.lo.s32", mad_32, 1, 3 }, { "mad.lo.u32", mad_32, 1, 3 },
    { "mad.wide.u32", mad_wide_u32, 1, 3 }, { "fma.rn.f32", fma_f32, 1, 3 },
    { "fma.rn.f64", fma_f64, 1, 3 }, { "div.rn.f32", div_f32, 1, 2 },
    { "div.approx.f32", div_f32, 1, 2 }, { "div.full.f32", div_f32, 1, 2 },
    { "div.s32", div_s32, 1, 2 }, { "div.u32", div_u32, 1, 2 }, { "div.s64", div_s64, 1, 2 },
    { "div.u64", div_u64, 1, 2 }, { "rem.s32", rem_s32, 1, 2 }, { "min.s32", min_s32, 1, 2 },
    { "max.s32", max_s32, 1, 2 }, { "min.u32", min_u32, 1, 2 }, { "max.u32", max_u32, 1, 2 },
    { "min.u64", min_u64, 1, 2 }, { "max.u64", max_u64, 1, 2 }, { "min.f32", min_f32, 1, 2 },
    { "max.f32", max_f32, 1, 2 }, { "and.b32", and_32, 1, 2 }, { "or.b32", or_32, 1, 2 },
    { "xor.b32", xor_32, 1, 2 }, { "and.b64", and_64, 1, 2 }, { "or.b64", or_64, 1, 2 },
    { "xor.b64", xor_64, 1, 2 }, { "and.b16", and_16, 1, 2 }, { "xor.b16", xor_16, 1, 2 },
    { "and.pred", and_pred, 1, 2 }, { "or.pred", or_pred, 1, 2 }, { "xor.pred", xor_pred, 1, 2 },
    { "not.pred", not_pred, 1, 1 }, { "not.b32", not_32, 1, 1 }, { "neg.s32", neg_32, 1, 1 },
    { "neg.s64", neg_64, 1, 1 }, { "neg.f32", neg_f32, 1, 1 }, { "neg.f64", neg_f64, 1, 1 },
    { "abs.f32", abs_f32, 1, 1 }, { "shl.b32", shl_32, 1, 2 }, { "shl.b64", shl_64, 1, 2 },
    { "shr.u32", shr_u32, 1, 2 }, { "shr.b32", shr_u32, 1, 2 }, { "shr.u64", shr_u64, 1, 2 },
    { "shr.b64", shr_u64, 1, 2 }, { "shr.s32", shr_s32, 1, 2 }, { "mov.pred", mov_pred, 1, 1 },
    { "mov.u16", mov_16, 1, 1 }, { "mov.b16", mov_16, 1, 1 }, { "mov.u32", mov_32, 1, 1 },
    { "mov.s32", mov_32, 1, 1 }, { "mov.b32", mov_32, 1, 1 }, { "mov.f32", mov_32, 1, 1 },
    { "mov.u64", mov_64, 1, 1 }, { "mov.s64", mov_64, 1, 1 }, { "mov.b64", mov_64, 1, 1 },
    { "mov.f64", mov_64, 1, 1 }, { "mov.b64", pack, 1, 2 }, { "mov.b64", unpack, 2, 1 },
    { "mov.b32", pack_16, 1, 2 }, { "mov.b32", unpack_16, 2, 1 }, { "selp.b32", select_32, 1, 3 },
    { "selp.u32", select_32, 1, 3 }, { "selp.s32", select_32, 1, 3 },
    { "selp.f32", select_32, 1, 3 }, { "selp.b64", select_64, 1, 3 },
    { "selp.u64", select_64, 1, 3 }, { "selp.s64", select_64, 1, 3 },
    { "selp.f64", select_64, 1, 3 }, { "selp.b16", select_16, 1, 3 },
    { "selp.u16", select_16, 1, 3 }, { "selp.s16", select_16, 1, 3 },
    { "popc.b32", count_bits_32, 1, 1 }, { "clz.b32", zeros_above_32, 1, 1 },
    { "brev.b32", turn_bits, 1, 1 }, { "bfind.shiftamt.u32", shift_to_top, 1, 1 },
    { "bfi.b32", insert_32, 1, 4 }, { "bfi.b64", insert_64, 1, 4 }, { "prmt.b32", permute, 1, 3 },
    { "sqrt.rn.f32", sqrt_f32, 1, 1 }, { "sqrt.approx.f32", sqrt_f32, 1, 1 },
    { "rcp.rn.f32", reciprocal_f32, 1, 1 }, { "rcp.approx.f32", reciprocal_f32, 1, 1 },
    { "rcp.approx.ftz.f64", reciprocal_f64, 1, 1 },
    { "rsqrt.approx.f32", reciprocal_root_f32, 1, 1 }, { "ex2.approx.f32", power_of_2, 1, 1 },
    { "ex2.approx.ftz.f32", power_of_2, 1, 1 }, { "cvt.rn.bf16x2.f32", convert_pair, 1, 2 },
    { "cvta.to.global.u64", mov_64, 1, 1 }, { "cvta.global.u64", mov_64, 1, 1 },
    { "cvta.to.local.u64", mov_64, 1, 1 }, { "cvta.local.u64", mov_64, 1, 1 },
};

static bool find_compare(struct instruction *in, const struct parts *p)
{
    static const char *const names[] = {
        [PTX_EQ] = "eq", [PTX_NE] = "ne", [PTX_LT] = "lt", [PTX_LE] = "le", [PTX_GT] = "gt",
        [PTX_GE] = "ge", [PTX_EQU] = "equ", [PTX_NEU] = "neu", [PTX_LTU] = "ltu",
        [PTX_LEU] = "leu", [PTX_GTU] = "gtu", [PTX_GEU] = "geu", [PTX_NUM] = "num",
        [PTX_NAN] = "nan",
    };
    int op = p->n == 3 ? ptx_index_of(names, 14, p->at[1]) : -1;

    in->from = p->n == 3 ? ptx_type_named(p->at[2]) : PTX_NONE;
    in->compare = (enum ptx_compare)(op < 0 ? 0 : op);
    in->run = compare;
    return op >= 0 && in->from != PTX_NONE && in->n_written == 1 && in->n_read == 2;
}

static bool find_conversion(struct instruction *in, const struct parts *p)
{
    static const char *const rounding[] = { "rni", "rzi", "rmi", "rpi" };

    in->type = ptx_type_named(p->at[p->n - 1 - (p->n > 2)]);
    in->from = ptx_type_named(p->at[p->n - 1]);
    for (int i = 1; i < p->n - 2; i++) {
        int r = ptx_index_of(rounding, 4, p->at[i]);
        if (r >= 0)
            in->rounding = (enum ptx_rounding)r;
        else if (strcmp(p->at[i], "sat") == 0)
            in->saturate = true;
        else if (strcmp(p->at[i], "rn") != 0)
            return false;
    }
    in->run = convert;
    return p->n > 2 && in->type != PTX_NONE && in->from != PTX_NONE && in->n_written == 1 &&
           in->n_read == 1 && !(in->saturate && !ptx_is_float(in->type));
}

bool ptx_find_arithmetic(struct instruction *in, const struct parts *p, const char *name)
{
    if (strcmp(p->at[0], "setp") == 0)
        return find_compare(in, p);
    if (strcmp(p->at[0], "cvt") == 0 && !ptx_has_part(p, "bf16x2"))
        return find_conversion(in, p);
    if (strcmp(name, "fma.rm.f32") == 0) {
        in->rounding = PTX_DOWN;
        in->run = fma_rounded;
        return in->n_read == 3;
    }
    return ptx_find_named(in, name, plain, sizeof plain / sizeof plain[0]);
}
