#ifndef BASE_STATUS_H
#define BASE_STATUS_H

/* Status codes and error text.
 *
 * Every function that can fail for a reason outside the program returns an
 * enum status: ST_OK is zero, everything else is negative.  There is no other
 * convention in this code base.  Predicates return bool.  Mistakes of the
 * programmer are not statuses, they are ASSERTs (see invariant.h).
 *
 * This header is read by C and by CUDA C++. */

#ifdef __cplusplus
extern "C" {
#endif

#define STATUS_MAP(X)                                        \
    X(INVALID,     -1, "the input is not acceptable")        \
    X(NOMEM,       -2, "out of host memory")                 \
    X(NODEVMEM,    -3, "out of device memory")               \
    X(IO,          -4, "a file could not be read")           \
    X(UNSUPPORTED, -5, "this build or device cannot do it")  \
    X(BUSY,        -6, "no room now, try again later")       \
    X(CANCELLED,   -7, "the caller gave up")                 \
    X(DEVICE,      -8, "the device failed")                  \
    X(SHUTDOWN,    -9, "the server is stopping")             \
    X(QUOTA,      -10, "the caller has its share already")

enum status {
    ST_OK = 0,
#define X(name, code, text) ST_##name = code,
    STATUS_MAP(X)
#undef X
};

#define MUST_USE __attribute__((warn_unused_result))

/* A status with one sentence for a person.  Callers own the storage, usually
 * on the stack; functions accept NULL when nobody will read it. */
struct error {
    enum status code;
    char text[400];
};

/* Fill *err (if not NULL) and return code, so failing is one line:
 *     return error_set(err, ST_IO, "%s: truncated header", path); */
enum status error_set(struct error *err, enum status code, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* "INVALID", "DEVICE", ...  Never NULL. */
const char *status_name(enum status code);

/* Return the status of expr to the caller unless it is ST_OK. */
#define TRY(expr)                                            \
    do {                                                     \
        enum status try_status_ = (expr);                    \
        if (try_status_ != ST_OK)                            \
            return try_status_;                              \
    } while (0)

#ifdef __cplusplus
}
#endif
#endif
