#include "kernels/philox.h"

#include "tests/support/random_data.h"

#include <check.h>
#include <math.h>

/* The known answers that come with the Random123 distribution. */
START_TEST(philox_gives_known_answers)
{
    static const struct { struct philox_words counter; uint64_t key; struct philox_words want; }
        known[] = {
            { { 0, 0, 0, 0 }, 0, { 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8 } },
            { { 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff }, 0xffffffffffffffff,
              { 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd } },
            { { 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344 }, 0x299f31d0a4093822,
              { 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1 } },
        };

    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        struct philox_words got = philox4x32(known[i].counter, known[i].key);
        ck_assert_uint_eq(got.a, known[i].want.a);
        ck_assert_uint_eq(got.b, known[i].want.b);
        ck_assert_uint_eq(got.c, known[i].want.c);
        ck_assert_uint_eq(got.d, known[i].want.d);
    }
    struct philox_words counter = { 0x85a308d3, 0x13198a2e, 0, 0 };
    ck_assert_uint_eq(sample_bits(0x299f31d0a4093822, 0x85a308d3, 0x13198a2e),
                      philox4x32(counter, 0x299f31d0a4093822).a);
}
END_TEST

/* At both ends, around the seams, and at random. */
START_TEST(gumbel_is_accurate)
{
    static const uint32_t seams[] = { 0, 0x7fffffff, 0x80000000, 0xb504f2ff, 0xb504f333,
                                      0xb504f334, 0xb504f3ff, 0xffffff00, 0xfffffffe,
                                      0xffffffff };
    struct test_random r = test_random(3);
    double worst = 0;

    for (int i = 0; i < 200000; i++) {
        uint32_t bits = (uint32_t)random_u64(&r);
        if (i < 10)
            bits = seams[i];
        else if (i & 1)
            bits |= 0xffffffffu << (i % 32);           /* close to 1 */
        double want = -log(-log((bits + 0.5) * 0x1p-32));
        double off = fabs((double)gumbel_of(bits) - want);
        worst = off > worst ? off : worst;
    }
    ck_assert_double_lt(worst, 3e-6);
}
END_TEST

TCase *philox_case(void)
{
    TCase *c = tcase_create("philox");

    tcase_add_test(c, philox_gives_known_answers);
    tcase_add_test(c, gumbel_is_accurate);
    return c;
}
