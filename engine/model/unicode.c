#include "engine/model/unicode.h"

#include <utf8proc.h>

struct range {
    int32_t first, last;
};

/* Letters and numbers of Unicode 15.1 and 16, which a utf8proc of Unicode 15
 * calls unassigned; one that knows them agrees. */
static const struct range late_letters[] = {
    { 0x1C89, 0x1C8A }, { 0xA7CB, 0xA7CD }, { 0xA7DA, 0xA7DC }, { 0x105C0, 0x105F3 },
    { 0x10D4A, 0x10D65 }, { 0x10D6F, 0x10D85 }, { 0x10EC2, 0x10EC4 },
    { 0x11380, 0x11389 }, { 0x1138B, 0x1138B }, { 0x1138E, 0x1138E },
    { 0x11390, 0x113B5 }, { 0x113B7, 0x113B7 }, { 0x113D1, 0x113D1 },
    { 0x113D3, 0x113D3 }, { 0x11BC0, 0x11BE0 }, { 0x13460, 0x143FA },
    { 0x16100, 0x1611D }, { 0x16D40, 0x16D6C }, { 0x18CFF, 0x18CFF },
    { 0x1E5D0, 0x1E5ED }, { 0x1E5F0, 0x1E5F0 }, { 0x2EBF0, 0x2EE5D },
};
static const struct range late_numbers[] = {
    { 0x10D40, 0x10D49 }, { 0x116D0, 0x116E3 }, { 0x11BF0, 0x11BF9 },
    { 0x16130, 0x16139 }, { 0x16D70, 0x16D79 }, { 0x1CCF0, 0x1CCF9 },
    { 0x1E5F1, 0x1E5FA },
};
/* Numbers of Unicode 17: Digits alone knows them. */
static const struct range later_digits[] = {
    { 0x11DE0, 0x11DE9 }, { 0x16FF4, 0x16FF6 },
};
/* Word characters that are neither letter, mark, decimal digit, letter number
 * nor connector punctuation: the circled and squared letters, and what came
 * after Unicode 15. */
static const struct range more_words[] = {
    { 0x897, 0x897 }, { 0x1C89, 0x1C8A }, { 0x24B6, 0x24E9 }, { 0xA7CB, 0xA7CD },
    { 0xA7DA, 0xA7DC }, { 0x105C0, 0x105F3 }, { 0x10D40, 0x10D65 },
    { 0x10D69, 0x10D6D }, { 0x10D6F, 0x10D85 }, { 0x10EC2, 0x10EC4 },
    { 0x10EFC, 0x10EFC }, { 0x11380, 0x11389 }, { 0x1138B, 0x1138B },
    { 0x1138E, 0x1138E }, { 0x11390, 0x113B5 }, { 0x113B7, 0x113C0 },
    { 0x113C2, 0x113C2 }, { 0x113C5, 0x113C5 }, { 0x113C7, 0x113CA },
    { 0x113CC, 0x113D3 }, { 0x113E1, 0x113E2 }, { 0x116D0, 0x116E3 },
    { 0x11BC0, 0x11BE0 }, { 0x11BF0, 0x11BF9 }, { 0x11F5A, 0x11F5A },
    { 0x13460, 0x143FA }, { 0x16100, 0x16139 }, { 0x16D40, 0x16D6C },
    { 0x16D70, 0x16D79 }, { 0x18CFF, 0x18CFF }, { 0x1CCF0, 0x1CCF9 },
    { 0x1E5D0, 0x1E5FA }, { 0x1F130, 0x1F149 }, { 0x1F150, 0x1F169 },
    { 0x1F170, 0x1F189 }, { 0x2EBF0, 0x2EE5D },
};
/* Marks with a combining class that came after Unicode 9: the normalizer does
 * not know them and lets them stand where they are.  U+1DF6..1DFA and the like
 * are whole ranges because everything in them is as young. */
static const struct range late_marks[] = {
    { 0x7FD, 0x7FD }, { 0x898, 0x89F }, { 0x8CA, 0x8D3 }, { 0x9FE, 0x9FE },
    { 0xC3C, 0xC3C }, { 0xD3B, 0xD3C }, { 0xEBA, 0xEBA }, { 0x1715, 0x1715 },
    { 0x1ABF, 0x1ACE }, { 0x1DF6, 0x1DFA }, { 0xA82C, 0xA82C }, { 0x10D24, 0x10D27 },
    { 0x10EAB, 0x10EAC }, { 0x10EFD, 0x10EFF }, { 0x10F46, 0x10F50 },
    { 0x10F82, 0x10F85 }, { 0x11070, 0x11070 }, { 0x1133B, 0x1133B },
    { 0x1145E, 0x1145E }, { 0x11839, 0x1183A }, { 0x1193D, 0x1193E },
    { 0x11943, 0x11943 }, { 0x119E0, 0x119E0 }, { 0x11A34, 0x11A34 },
    { 0x11A47, 0x11A47 }, { 0x11A99, 0x11A99 }, { 0x11D42, 0x11D42 },
    { 0x11D44, 0x11D45 }, { 0x11D97, 0x11D97 }, { 0x11F41, 0x11F42 },
    { 0x16FF0, 0x16FF1 }, { 0x1E08F, 0x1E08F }, { 0x1E130, 0x1E136 },
    { 0x1E2AE, 0x1E2AE }, { 0x1E2EC, 0x1E2EF }, { 0x1E4EC, 0x1E4EF },
};
#define N_OF(ranges) (sizeof(ranges) / sizeof(ranges)[0])

static bool found_in(const struct range *ranges, size_t n, int32_t c)
{
    size_t low = 0, high = n;

    while (low < high) {
        size_t middle = (low + high) / 2;
        if (c > ranges[middle].last)
            low = middle + 1;
        else
            high = middle;
    }
    return low < n && c >= ranges[low].first;
}

/* 1 = space, 2 = letter, 3 = number: see enum char_class. */
const uint8_t unicode_ascii_class[128] = {
    ['\t'] = 1, ['\n'] = 1, ['\v'] = 1, ['\f'] = 1, ['\r'] = 1, [' '] = 1,
    ['0'] = 3, ['1'] = 3, ['2'] = 3, ['3'] = 3, ['4'] = 3,
    ['5'] = 3, ['6'] = 3, ['7'] = 3, ['8'] = 3, ['9'] = 3,
    ['A'] = 2, ['B'] = 2, ['C'] = 2, ['D'] = 2, ['E'] = 2, ['F'] = 2, ['G'] = 2,
    ['H'] = 2, ['I'] = 2, ['J'] = 2, ['K'] = 2, ['L'] = 2, ['M'] = 2, ['N'] = 2,
    ['O'] = 2, ['P'] = 2, ['Q'] = 2, ['R'] = 2, ['S'] = 2, ['T'] = 2, ['U'] = 2,
    ['V'] = 2, ['W'] = 2, ['X'] = 2, ['Y'] = 2, ['Z'] = 2,
    ['a'] = 2, ['b'] = 2, ['c'] = 2, ['d'] = 2, ['e'] = 2, ['f'] = 2, ['g'] = 2,
    ['h'] = 2, ['i'] = 2, ['j'] = 2, ['k'] = 2, ['l'] = 2, ['m'] = 2, ['n'] = 2,
    ['o'] = 2, ['p'] = 2, ['q'] = 2, ['r'] = 2, ['s'] = 2, ['t'] = 2, ['u'] = 2,
    ['v'] = 2, ['w'] = 2, ['x'] = 2, ['y'] = 2, ['z'] = 2,
};

enum char_class unicode_class(int32_t c)
{
    if (c < 0x80)
        return unicode_ascii_class[c];
    switch (utf8proc_category(c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
        return CHAR_LETTER;
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO:
        return CHAR_NUMBER;
    case UTF8PROC_CATEGORY_ZS:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
        return CHAR_SPACE;
    case UTF8PROC_CATEGORY_CC:
        return c == 0x85 ? CHAR_SPACE : CHAR_OTHER;
    case UTF8PROC_CATEGORY_CN:
        if (found_in(late_letters, N_OF(late_letters), c))
            return CHAR_LETTER;
        return found_in(late_numbers, N_OF(late_numbers), c) ? CHAR_NUMBER : CHAR_OTHER;
    default:
        return CHAR_OTHER;
    }
}

bool unicode_is_numeric(int32_t c)
{
    return unicode_class(c) == CHAR_NUMBER || found_in(later_digits, N_OF(later_digits), c);
}

bool unicode_is_word(int32_t c)
{
    switch (utf8proc_category(c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
        return true;
    default:
        /* U+200C and U+200D join letters into words. */
        return c == 0x200C || c == 0x200D || found_in(more_words, N_OF(more_words), c);
    }
}

int unicode_combining_class(int32_t c)
{
    if (c < 0x300)
        return 0;
    int class = utf8proc_get_property(c)->combining_class;
    return class && found_in(late_marks, N_OF(late_marks), c) ? 0 : class;
}
