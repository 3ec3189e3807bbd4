/* A prompt whose blocks stream through the device is answered as one that is all on it. */

#include "tests/support/backend_fixture.h"
#include "tests/support/streamed_history.h"

#include <check.h>

static const struct streamed_history histories[] = {
    { .dir = "models/asynctlsd-books-9m", .prompt = 1500, .chunk = 128, .decodes = 20 },
    { .dir = "models/asynctlsd-books-9m", .prompt = 700, .chunk = 77, .decodes = 70, .seed = 1 },
    { .dir = "build/models/qwen3", .prompt = 900, .chunk = 64, .decodes = 5, .seed = 2 },
    { .dir = "build/models/llama3", .isa = "scalar", .prompt = 400, .chunk = 300, .decodes = 3,
      .seed = 3 },
    { .dir = "build/models/qwen3-yarn-g5", .prompt = 640, .chunk = 1, .seed = 4 },
    { .dir = "build/models/glm4-moe-lite", .prompt = 900, .chunk = 100, .decodes = 5, .seed = 5 },
    { .dir = "build/models/glm4-moe-lite-small", .isa = "scalar", .prompt = 500, .chunk = 77,
      .decodes = 70, .seed = 6 },
};

START_TEST(streaming_changes_nothing)
{
    if (test_backend(histories[_i].isa ? histories[_i].isa : "auto"))
        streamed_history_run(&histories[_i]);
}
END_TEST

TCase *model_streamed_case(void)
{
    TCase *tc = tcase_create("model_streamed");

    tcase_set_timeout(tc, 120);
    tcase_add_loop_test(tc, streaming_changes_nothing, 0,
                        sizeof histories / sizeof histories[0]);
    return tc;
}
