#ifndef TESTS_EMULATOR_PTX_CODE_H
#define TESTS_EMULATOR_PTX_CODE_H

#include "tests/emulator/ptx.h"

/* Decoded PTX: what ptx_read.c makes and ptx_run.c runs.  Private to tests/emulator.
 *
 * A warp has a file of slots, each of LANES values.  Registers are slots, and so is everything
 * else that an instruction can name: immediates, special registers, addresses of variables.
 * These have been filled in when a kernel starts, or a block, and are never written. */

enum { LANES = 32, MOST_READ = 16, MOST_WRITTEN = 4 };

#define ALL_LANES 0xffffffffu

union value {
    uint64_t u64;
    int64_t s64;
    uint32_t u32;
    int32_t s32;
    uint16_t u16;
    int16_t s16;
    uint8_t u8;
    int8_t s8;
    float f32;
    double f64;
};

enum ptx_type { PTX_NONE, PTX_PRED, PTX_U8, PTX_S8, PTX_U16, PTX_S16, PTX_U32, PTX_S32, PTX_U64,
                PTX_S64, PTX_BF16, PTX_F32, PTX_F64 };

/* How the loop of a warp treats an instruction. */
enum ptx_kind {
    PTX_PLAIN,          /* each lane by itself */
    PTX_TOGETHER,       /* by all lanes of a mask, read[in->members]; -1: by all there are */
    PTX_BRANCH, PTX_CALL, PTX_RETURN,
    PTX_BARRIER,        /* of the block */
    PTX_CLUSTER_ARRIVE, PTX_CLUSTER_WAIT,
    PTX_TRY_WAIT,       /* of a barrier in shared memory */
};

enum ptx_space { PTX_GENERIC, PTX_SHARED };

/* Of a float that becomes an integer, and of operations that are rounded so. */
enum ptx_rounding { PTX_NEAREST, PTX_ZERO, PTX_DOWN, PTX_UP };

enum ptx_compare { PTX_EQ, PTX_NE, PTX_LT, PTX_LE, PTX_GT, PTX_GE, PTX_EQU, PTX_NEU, PTX_LTU,
                   PTX_LEU, PTX_GTU, PTX_GEU, PTX_NUM, PTX_NAN };

struct warp;
struct instruction;
typedef void ptx_operation(struct warp *w, const struct instruction *in, uint32_t lanes);

/* One value of the caller's that becomes the callee's, or back: bytes of the areas of .param. */
struct ptx_passed {
    int from, to, bytes;
};

struct instruction {
    ptx_operation *run;
    enum ptx_kind kind;
    int guard;                  /* slot of a predicate, or -1 */
    bool guard_not;
    int written[MOST_WRITTEN];  /* slots, or -1: not wanted */
    int read[MOST_READ];
    uint16_t read_not;          /* bit i: of predicate read[i] the opposite */
    uint8_t n_written, n_read, addresses;
    int members;                /* of read: the slot of a mask; -1 */
    bool wide_address;          /* the register of an address has 64 bits */
    bool saturate;
    uint8_t way;                /* which of an operation's variants: its file says of what */
    enum ptx_type type, from;   /* of the result, and of what is converted or compared */
    enum ptx_space space;
    enum ptx_compare compare;
    enum ptx_rounding rounding;
    uint8_t bytes, vector;      /* of one element in memory; elements */
    int offset;                 /* of the first address */
    int target;                 /* of a branch: instruction; of a call: function */
    int first_passed, n_passed, n_returned; /* of a call: of its function's `passed` */
    int line;
};

/* What a slot that is no register has. */
enum ptx_symbol_kind { PTX_IMMEDIATE, PTX_SHARED_ADDRESS, PTX_LOCAL_ADDRESS, PTX_KERNEL_PARAM,
                       PTX_CALL_PARAM, PTX_GLOBAL_ADDRESS, PTX_SPECIAL };

enum ptx_special { PTX_TID_X, PTX_TID_Y, PTX_TID_Z, PTX_NTID_X, PTX_NTID_Y, PTX_NTID_Z,
                   PTX_CTAID_X, PTX_CTAID_Y, PTX_CTAID_Z, PTX_NCTAID_X, PTX_NCTAID_Y,
                   PTX_NCTAID_Z, PTX_LANEID, PTX_CLUSTER_RANK, PTX_CLUSTER_SIZE, PTX_LANES_BELOW,
                   PTX_TIME };

struct ptx_symbol {
    enum ptx_symbol_kind kind;
    int slot;
    uint64_t value;             /* immediate, enum ptx_special, number of a shared or global
                                   variable, or bytes from the area's start */
};

struct ptx_param {
    int at, bytes;              /* in the kernel's parameters, or the function's area */
};

struct ptx_function {
    char *name;
    bool is_kernel, defined;
    struct instruction *code;
    int n_code, n_slots, local_bytes, param_bytes;
    struct ptx_symbol *symbols;
    int n_symbols;
    struct ptx_param *params;
    int n_params, has_result;   /* the result, if any, is params[n_params] */
    struct ptx_passed *passed;
    int n_passed;
    unsigned most_threads;      /* .maxntid, or 0 */
};

struct ptx_shared {
    int bytes, align;           /* bytes 0: of the size that the launch says */
};

struct ptx_module {
    struct ptx_function **functions;
    struct ptx_shared *shared;
    unsigned char **globals;    /* constant tables */
    int n_functions, n_shared, n_globals;
    struct ptx_kernel **kernels;/* one a kernel, of the same index; NULL where it is none */
    int target;
};

/* A kernel and all it calls as one run of instructions, callees first; slots, areas and targets
 * are those of the whole. */
struct ptx_kernel {
    struct ptx_module *module;
    const struct ptx_function *entry;
    struct instruction *code;
    struct ptx_symbol *symbols;
    struct ptx_passed *passed;
    int n_code, n_slots, n_symbols, n_passed, start, local_bytes, param_bytes;
    int shared_bytes;           /* of variables with a size; those without begin there */
};

/* Fills in run, kind and what depends on the operation from its name, such as "add.s32"; false:
 * it is not known. */
bool ptx_operation_find(struct instruction *in, const char *name);

/* Nanoseconds; the only special register that changes while a kernel runs. */
ptx_operation ptx_tell_time;

/* ---- a warp that runs; ptx_run.c and ptx_ops.h */

struct copy {
    unsigned char *to;
    const unsigned char *from;
    int group;
    uint8_t bytes, zeros;       /* bytes from there, and zeros behind */
};

struct copies {                 /* of a lane: those not yet made, in order */
    struct copy *all;
    int n, most, group;         /* group: of the next */
};

enum { MOST_DEPTH = 8 };

enum ptx_access { PTX_READ, PTX_WRITE, PTX_ATOMIC, PTX_UNTOUCHED };

/* Who last touched a word of shared memory, and between which barriers of its block: warps of the
 * same stretch may come in any order.  What other blocks and copies in the background bring does
 * not count: for that there are other barriers.  Nor do stores of what is there already, by which
 * several threads that find the same say so. */
struct touch {
    unsigned written, read;     /* stretches; 0: never */
    uint8_t writer, reader;     /* warps */
    uint8_t bytes_written, bytes_read; /* of the word, a bit each */
    bool many_writers, many_readers; /* writers: of different bytes; who wrote which is lost */
    bool by_atomic;
};

struct block {
    struct touch *touched;      /* of each word of shared */
    unsigned stretch;
    struct cluster *cluster;
    int rank;
    unsigned char *shared;      /* [cluster->shared_bytes], from address SHARED_START on */
    struct warp *warps;
    int n_warps, n_alive;       /* threads */
    int arrived[16], wanted[16]; /* at barriers; threads, 0: all there are */
    int value[16];              /* what has come of their reductions */
};

struct cluster {
    const struct ptx_kernel *kernel;
    const struct ptx_launch *launch;
    struct block *blocks;
    int size, n_alive, arrived;
    unsigned phase;             /* of its barrier */
    int shared_bytes;
    unsigned char *param_values; /* of the kernel */
    bool early_copies;          /* made when they are asked for, else as late as can be */
};

struct warp {
    struct block *block;
    union value (*slots)[LANES];
    unsigned char *params, *local; /* [LANES] areas */
    uint32_t alive, parked, held; /* parked: at an instruction that waits for other lanes;
                                     held: at a barrier of the block */
    int at[LANES];
    int back[LANES][MOST_DEPTH], depth[LANES];
    unsigned cluster_phase[LANES];
    bool cluster_arrived[LANES];
    struct copies copies[LANES];
};

enum { SHARED_START = 1024, RANK_SHIFT = 24 };

/* Memory for free(), zeroed, and more of it; they end the process where there is none.  Not
 * engine/base/mem.h's: kernels are run by threads that are forbidden to allocate there. */
void *ptx_new(size_t n, size_t bytes);
void *ptx_more(void *p, size_t n, size_t bytes);

/* Whether predicate read[i] of a lane is true. */
bool ptx_predicate(const struct warp *w, const struct instruction *in, int i, int lane);
/* Ends the process with where the warp is and the sentence. */
_Noreturn void ptx_fail(const struct warp *w, const struct instruction *in, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Where an address in shared memory is; it must be this block's, unless any of the cluster. */
unsigned char *ptx_shared_at(struct warp *w, const struct instruction *in, uint64_t address,
                             size_t bytes, bool any_block);
/* Checks bytes at p, of lane, for access. */
void ptx_memory_check(struct warp *w, const struct instruction *in, int lane, const void *p,
                      size_t bytes, enum ptx_access access);
/* Notes access to this block's shared memory at p; with another warp's, without a barrier in
 * between, it is an error unless both only read. */
void ptx_shared_touch(struct warp *w, const struct instruction *in, const void *p, size_t bytes,
                      enum ptx_access access);
bool ptx_memory_allows(const void *p, size_t bytes, bool write);
/* Make the copies of a lane but those of its last `keep` groups. */
void ptx_copies_make(struct copies *c, int keep);
/* Whether the phase of that parity of a barrier in shared memory has ended. */
bool ptx_barrier_passed(struct warp *w, const struct instruction *in, int lane);

#endif
