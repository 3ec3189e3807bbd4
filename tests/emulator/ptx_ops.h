#ifndef TESTS_EMULATOR_PTX_OPS_H
#define TESTS_EMULATOR_PTX_OPS_H

#include "tests/emulator/ptx_code.h"

/* What the files of operations share: ptx_arithmetic.c, what a lane does with registers;
 * ptx_transfers.c, memory, copies and their barriers; ptx_together.c, what lanes do as a warp;
 * ptx_names.c, who of them knows a name. */

/* For every lane l that takes part: d is the result, a, b and c are what is read. */
#define EACH(statement)                                                                      \
    do {                                                                                     \
        union value *d = w->slots[in->written[0]];                                           \
        const union value *a = w->slots[in->read[0]], *b = w->slots[in->read[1]],            \
                          *c = w->slots[in->read[2]];                                        \
        (void)a, (void)b, (void)c;                                                           \
        if (lanes == ALL_LANES)                                                              \
            for (int l = 0; l < LANES; l++) {                                                \
                statement;                                                                   \
            }                                                                                \
        else                                                                                 \
            for (int l = 0; l < LANES; l++)                                                  \
                if (lanes >> l & 1) {                                                        \
                    statement;                                                               \
                }                                                                            \
    } while (0)

#define OPERATION(name, statement)                                                           \
    static void name(struct warp *w, const struct instruction *in, uint32_t lanes)           \
    {                                                                                        \
        EACH(statement);                                                                     \
    }

/* Parts of a name, which dots separate. */
struct parts {
    char text[160];
    const char *at[20];
    int n;
};

bool ptx_has_part(const struct parts *p, const char *part);
/* Index in names, or -1. */
int ptx_index_of(const char *const *names, int n, const char *s);
enum ptx_type ptx_type_named(const char *s);

/* An operation that is all in its name. */
struct ptx_named {
    const char *name;
    ptx_operation *run;
    int written, read;          /* operands; read below 0: so many, and no result */
};

/* Of n, the one of that name and as many operands; false: none. */
bool ptx_find_named(struct instruction *in, const char *name, const struct ptx_named *all,
                    size_t n);
/* Operations that write nothing have their first operand taken for a result: no more. */
void ptx_read_first(struct instruction *in);

bool ptx_find_arithmetic(struct instruction *in, const struct parts *p, const char *name);
bool ptx_find_transfer(struct instruction *in, const struct parts *p, const char *name);
bool ptx_find_together(struct instruction *in, const struct parts *p, const char *name);

/* What the address of a lane is, checked for access to so many bytes. */
unsigned char *ptx_place_of(struct warp *w, const struct instruction *in, int lane, size_t bytes,
                            enum ptx_access access);

int ptx_type_bits(enum ptx_type t);
bool ptx_is_signed(enum ptx_type t);
bool ptx_is_float(enum ptx_type t);
float ptx_from_bf16(uint16_t v);
/* A whole number of a type, which then fills 64 bits. */
uint64_t ptx_extended(uint64_t v, enum ptx_type t);

/* What is done with two values of a type. */
enum atomic { ATOMIC_ADD, ATOMIC_MIN, ATOMIC_MAX, ATOMIC_OR, ATOMIC_AND, ATOMIC_EXCHANGE,
              ATOMIC_COMPARE };

uint64_t ptx_combined(enum atomic op, enum ptx_type t, uint64_t old, uint64_t v, uint64_t other);

#endif
