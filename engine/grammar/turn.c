#include "engine/grammar/turn.h"

#include "engine/base/invariant.h"
#include "engine/grammar/json_schema.h"

#include <string.h>

/* ---- calls */

static enum status emit_call(struct nfa *g, struct grammar_call *call,
                             const struct grammar_pairs *pairs, nfa_at next, nfa_at *start,
                             size_t *places, struct error *err)
{
    enum status st = ST_OK;

    next = nfa_text(g, call->tail, next);
    if (pairs)
        st = json_schema_emit_pairs(g, call->schema, pairs, next, start, places, err);
    else if (call->schema)
        st = json_schema_emit(g, call->schema, next, start, places, err);
    else
        *start = json_object_emit(g, next);
    call->refused = st != ST_OK;
    *start = nfa_text(g, call->head, *start);
    return st;
}

/* One of them; where several may follow each other, it goes on or not. */
static enum status emit_calls(struct nfa *g, const struct grammar_turn *turn, nfa_at *start,
                              size_t *places, struct error *err)
{
    nfa_at next = turn->between ? nfa_reserve(g) : NFA_RETURN;

    *start = NFA_NOTHING;
    for (size_t i = 0; i < turn->n_calls; i++) {
        nfa_at one;
        TRY(emit_call(g, &turn->calls[i], turn->pairs, next, &one, places, err));
        *start = nfa_either(g, one, *start);
    }
    if (turn->between)
        nfa_split(g, next, NFA_RETURN, nfa_text(g, turn->between, *start));
    return ST_OK;
}

/* ---- thoughts
 *
 * Up to a marker the text is followed as by a search for it.  A marker has one '<', its first byte,
 * so whatever does not go on with it leads to one of two places: behind a '<' or outside. */

struct search { nfa_at outside, opened; };

/* Bytes with which no marker goes on: any but a and b; b may be 0, which is in none. */
static nfa_at other(struct nfa *g, const struct search *s, char a, char b)
{
    struct byte_set set = { { 0 } };
    nfa_at opened = a == '<' ? NFA_NOTHING : nfa_range(g, '<', '<', s->opened);

    byte_set_add(&set, 0, 0);
    for (unsigned byte = 1; byte < 256; byte++)
        if (byte != '<' && byte != (unsigned char)a && byte != (unsigned char)b)
            byte_set_add(&set, byte, byte);
    return nfa_either(g, opened, nfa_set(g, &set, s->outside));
}

/* Behind the first two bytes of a marker. */
static nfa_at rest_of(struct nfa *g, const struct search *s, const char *marker, nfa_at next)
{
    for (size_t i = strlen(marker); i-- > 2;)
        next = nfa_either(g, nfa_range(g, (unsigned char)marker[i], (unsigned char)marker[i], next),
                          other(g, s, marker[i], 0));
    return next;
}

static nfa_at emit_thoughts(struct nfa *g, const struct grammar_turn *turn, nfa_at next)
{
    struct search s = { nfa_reserve(g), nfa_reserve(g) };
    const char *end = turn->think_end, *never = turn->never ? turn->never : end;

    ASSERT(strrchr(end, '<') == end && strrchr(never, '<') == never);
    ASSERT(strlen(end) > 2 && (never == end || end[1] != never[1]));
    nfa_at at = nfa_range(g, (unsigned char)end[1], (unsigned char)end[1],
                          rest_of(g, &s, end, next));
    if (never != end)
        at = nfa_either(g, at, nfa_range(g, (unsigned char)never[1], (unsigned char)never[1],
                                         rest_of(g, &s, never, NFA_NOTHING)));
    nfa_split(g, s.opened, at, other(g, &s, end[1], never[1]));
    nfa_split(g, s.outside, nfa_range(g, '<', '<', s.opened), other(g, &s, '<', 0));
    return s.outside;
}

/* ---- all of it */

enum status turn_emit(struct nfa *g, const struct grammar_turn *turn, nfa_at text, nfa_at *start,
                      size_t *places, struct error *err)
{
    nfa_at answer;

    TRY(emit_calls(g, turn, &answer, places, err));
    *start = answer = nfa_either(g, text, answer);
    if (turn->thoughts == GRAMMAR_NO_THOUGHTS)
        return ST_OK;
    nfa_at after = answer;
    for (int i = 0; i < TURN_MAX_LINES; i++)
        after = nfa_either(g, answer, nfa_text(g, "\n", after));
    *start = emit_thoughts(g, turn, after);
    if (turn->thoughts == GRAMMAR_MAY_THINK)
        *start = nfa_either(g, nfa_text(g, turn->think, *start), answer);
    return ST_OK;
}
