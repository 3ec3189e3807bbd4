#ifndef BASE_INVARIANT_H
#define BASE_INVARIANT_H

/* ASSERT states what must hold unless the program itself is wrong.  It is
 * compiled into every build: a server that has lost an invariant must stop
 * before it serves a wrong answer.  Never use it on input. */

#ifdef __cplusplus
extern "C" {
#endif

#define ASSERT(expr) \
    ((expr) ? (void)0 : invariant_failed(__FILE__, __LINE__, #expr))

/* Prints file:line, the expression and the thread's name, then aborts. */
void invariant_failed(const char *file, int line, const char *expr)
    __attribute__((noreturn, cold));

#ifdef __cplusplus
}
#endif
#endif
