#include "server/config_table.h"

#include "server/config.h"

#include <string.h>

#define AT(member) .offset = offsetof(struct config, member)

enum { MILLION = 1000000 };
enum { SECOND_MS = 1000, HOUR_MS = 3600 * SECOND_MS };

/* clang-format off */
/* The defaults of the attention group are select_default()'s; a test compares them. */
static const struct option table[] = {
    { .group = "Model and memory",
      .key = "model", .type = OPTION_TEXT, AT(engine.model_dir), .initial = "none",
      .help = "Folder of the model: config.json, tokenizer.json and safetensors files. "
              "Required." },
    { .key = "served-model-name", .type = OPTION_LIST, AT(model_names), .initial = "none",
      .help = "Names that requests may put in \"model\", separated by commas; the first is "
              "the one that answers carry. none: the name of the model's folder." },
    { .key = "chat-format", .type = OPTION_CHOICE, AT(chat_format), .initial = "auto",
      .choices = CHAT_FORMAT_WORDS,
      .help = "How conversations are written for the model: chatml, smollm2, qwen2.5, qwen3, "
              "qwen3-thinking, qwen3-instruct, qwen3-instruct-early, glm-4.7, llama-3, llama-3.1 "
              "or llama-3.2. auto: as its folder's chat template says, if that is one of these; "
              "plain: \"User: text\", for models that were not made for chat; none: no chat." },
    { .key = "backend", .type = OPTION_LIST, AT(backends), .initial = "auto",
      .help = "The device that computes: cpu, cuda:N, or auto: cuda:0 where there is a GPU, "
              "else cpu. Several separated by commas, such as cuda:0,cuda:1, or cuda:all for "
              "every GPU, get an engine each: requests go where their beginning is cached, or "
              "else where least is to be done. What other options say of memory, waiting and "
              "running holds for each engine." },
    { .key = "cpu-threads", .type = OPTION_INT, AT(engine.threads), .initial = "0", .max = 1024,
      .help = "Worker threads of the CPU back end, divided among its engines. 0: one a core." },
    { .key = "cpu-isa", .type = OPTION_WORD, AT(engine.isa), .initial = "auto",
      .choices = "auto|scalar|avx2|avx512",
      .help = "Vector instructions of the CPU back end. auto: the best that the processor "
              "has." },
    { .key = "max-model-len", .type = OPTION_U32, AT(engine.max_model_len), .initial = "0",
      .max = 1u << 26,
      .help = "Longest context in tokens, prompt and completion together. 0: the most that "
              "the model and the KV pool allow." },
    { .key = "kv-cache-bytes", .type = OPTION_BYTES, AT(engine.kv_bytes), .initial = "0",
      .max = 64ull << 40,
      .help = "Memory of the KV pool with its index, of each engine. 0: on a GPU what "
              "gpu-memory-fraction leaves, else a quarter of the machine's or the container's "
              "memory, divided among the engines." },
    { .key = "gpu-memory-fraction", .type = OPTION_SHARE, AT(engine.gpu_memory_thousandths),
      .initial = "0.9", .min = 50, .max = 1000,
      .help = "Share of the GPU's memory that weights, scratch and KV pool take together; "
              "what others use of it counts too. With kv-cache-bytes set it means nothing." },
    { .key = "prefix-cache", .type = OPTION_BOOL, AT(engine.prefix_cache), .initial = "yes",
      .help = "Keep computed blocks and reuse them for prompts that begin alike." },

    { .group = "Host tier",
      .key = "host-kv-bytes", .type = OPTION_BYTES, AT(engine.host_kv_bytes), .initial = "0",
      .max = 64ull << 40,
      .help = "Host memory for keys and values: of sequences that the device has no room for, "
              "and of finished ones whose prefix may be wanted again. Each engine takes that "
              "much. It is pinned, so the memlock limit must allow it. 0: no host tier." },
    { .key = "offload", .type = OPTION_CHOICE, AT(engine.offload), .initial = "auto",
      .choices = "auto|always",
      .help = "Which sequences decode out of the host tier. auto: the longest, where the "
              "device has no room for all; always: all that can, to measure or test." },
    { .key = "offload-sequences", .type = OPTION_U32, AT(engine.offload_sequences),
      .initial = "0", .max = 4096,
      .help = "How many may at a time; each takes device memory for its hot rows and index. 0: "
              "as many as longest contexts fit the host tier, in at most half of that memory." },
    { .key = "hot-rows", .type = OPTION_U32, AT(engine.hot_rows), .initial = "0",
      .max = 65535,
      .help = "Rows of K and V that such a sequence keeps on the device for each layer and KV "
              "head, at least keep-tokens. 0: 4 to 16 times keep-tokens, as many as leave half "
              "of that memory, and room for a longest context, to the pool." },

    { .group = "Scheduling",
      .key = "max-running", .type = OPTION_U32, AT(engine.max_running), .initial = "64",
      .min = 1, .max = 4096, .help = "Sequences in a step of an engine." },
    { .key = "step-tokens", .type = OPTION_U32, AT(engine.step_tokens), .initial = "1024",
      .min = 1, .max = 1u << 17,
      .help = "Tokens computed in a step, decoded and prefilled together; at least "
              "max-running plus 64. Less lets long prompts disturb running streams less." },
    { .key = "max-waiting", .type = OPTION_U32, AT(engine.max_waiting), .initial = "256",
      .min = 1, .max = 1u << 20,
      .help = "Sequences that may wait for an engine; where all engines have as many, requests "
              "are answered with 429." },
    { .key = "max-waiting-tokens", .type = OPTION_U64, AT(engine.max_waiting_tokens),
      .initial = "2000000", .min = 1, .max = UINT64_C(1) << 40,
      .help = "Prompt tokens that may wait for an engine; where all have as many, requests are "
              "answered with 429." },

    { .group = "Two-level attention",
      .key = "filter", .type = OPTION_CHOICE, AT(engine.select.filter), .initial = "coarse",
      .choices = "bounds|coarse|means",
      .help = "How blocks are scored. coarse: by their best token at very low precision; "
              "means: by the best mean of two tokens, which reads half and misses "
              "facts in contexts beyond 16,384 tokens; "
              "bounds: by the minimum and maximum of their keys." },
    { .key = "token-index", .type = OPTION_CHOICE, AT(engine.select.index),
      .initial = "rotated",
      .choices = "rotated|channels",
      .help = "How tokens are scored. rotated: two bits of all channels after a rotation; "
              "channels: four bits of 32 channels chosen by --calibrate." },
    { .key = "selection", .type = OPTION_CHOICE, AT(engine.select.selection), .initial = "exact",
      .choices = "exact|lagged",
      .help = "Among which blocks tokens are chosen. exact: those that the filter keeps in this "
              "step; lagged: those that it kept in the step before, and the newest." },
    { .key = "keep-blocks", .type = OPTION_INT, AT(engine.select.keep_blocks), .initial = "64",
      .min = 1, .max = 1u << 20, .help = "Blocks of 64 tokens that survive the filter." },
    { .key = "keep-tokens", .type = OPTION_INT, AT(engine.select.keep_tokens),
      .initial = "1024",
      .min = 1, .max = 1u << 26,
      .help = "Tokens that attention reads, at most 64 times keep-blocks." },
    { .key = "sink-tokens", .type = OPTION_INT, AT(engine.select.sink_tokens), .initial = "4",
      .max = 1u << 20, .help = "First tokens of a context that are always kept." },
    { .key = "recent-tokens", .type = OPTION_INT, AT(engine.select.recent_tokens),
      .initial = "64", .min = 1, .max = 1u << 20,
      .help = "Newest tokens that are always kept." },
    { .key = "crossover", .type = OPTION_INT, AT(engine.select.crossover_tokens),
      .initial = "0", .max = 1u << 30,
      .help = "Contexts of up to that many tokens get full attention. 0: as many as that is "
              "no slower for on this device." },
    { .key = "layer-exceptions", .type = OPTION_TEXT, AT(engine.select.layers),
      .initial = "none",
      .help = "Layers that differ, as in 0-1:dense;6:blocks=128,tokens=2048." },

    { .group = "Network",
      .key = "host", .type = OPTION_TEXT, AT(host), .initial = "127.0.0.1",
      .help = "Address or name to listen on. Anything but loopback needs an API key." },
    { .key = "port", .type = OPTION_U32, AT(port), .initial = "8000", .max = 65535,
      .help = "TCP port. 0: any free one; the ready line tells which." },
    { .key = "api-key", .type = OPTION_LIST, AT(api_keys), .initial = "none", .secret = true,
      .help = "Keys that clients may present, separated by commas. Other users of the "
              "machine can read a command line: prefer api-key-file or the environment." },
    { .key = "api-key-file", .type = OPTION_TEXT, AT(api_key_file), .initial = "none",
      .help = "File with more keys, one a line; lines that begin with # are skipped." },
    { .key = "key-requests-per-minute", .type = OPTION_U32, AT(key_requests_per_minute),
      .initial = "0", .max = MILLION,
      .help = "Requests with a body that each API key may make in a minute, at once or one by "
              "one; beyond it 429, with the time to wait in Retry-After. 0: any number." },
    { .key = "key-waiting-share", .type = OPTION_SHARE, AT(engine.share_thousandths),
      .initial = "1.0", .min = 1, .max = 1000,
      .help = "Share of max-waiting and of max-waiting-tokens that each API key may take, of "
              "every engine; beyond it its requests are answered with 429." },
    { .key = "cache-per-key", .type = OPTION_BOOL, AT(cache_per_key), .initial = "yes",
      .help = "Let each API key find only what itself left in the prefix cache: how fast an "
              "answer begins then tells nothing about what others asked." },
    { .key = "insecure-no-key", .type = OPTION_BOOL, AT(insecure_no_key), .initial = "no",
      .help = "Allow to listen beyond loopback without any key." },
    { .key = "metrics-public", .type = OPTION_BOOL, AT(metrics_public), .initial = "no",
      .help = "Answer /metrics without a key." },
    { .key = "allowed-origins", .type = OPTION_LIST, AT(allowed_origins), .initial = "none",
      .help = "Origins whose pages may use the server from a browser, separated by commas, "
              "or *. Requests of other pages are refused with 403." },
    { .key = "max-connections", .type = OPTION_U32, AT(max_connections), .initial = "1024",
      .min = 1, .max = 1u << 17, .help = "Open connections." },
    { .key = "max-body-bytes", .type = OPTION_BYTES, AT(max_body_bytes), .initial = "16mb",
      .min = 1024, .max = 1u << 30, .help = "Longest body of a request." },
    { .key = "max-bodies-bytes", .type = OPTION_BYTES, AT(max_bodies_bytes), .initial = "128mb",
      .min = 1024, .max = UINT64_C(1) << 40,
      .help = "All bodies that are being received or parsed, together." },
    { .key = "idle-timeout", .type = OPTION_MS, AT(idle_timeout_ms), .initial = "60s",
      .min = SECOND_MS, .max = HOUR_MS,
      .help = "From one answer, or the connection's start, to the end of the next "
              "request's headers; also a client that takes nothing of its answer. Then the "
              "connection is closed." },
    { .key = "body-timeout", .type = OPTION_MS, AT(body_timeout_ms), .initial = "60s",
      .min = SECOND_MS, .max = HOUR_MS, .help = "Time for a whole body to arrive; then 408." },
    { .key = "ping-interval", .type = OPTION_MS, AT(ping_interval_ms), .initial = "15s",
      .min = 100, .max = HOUR_MS,
      .help = "Silence after which a stream gets a comment line, so that proxies keep it "
              "open." },

    { .group = "Limits of one request",
      .key = "max-choices", .type = OPTION_U32, AT(limits.max_choices), .initial = "128",
      .min = 1, .max = 1u << 16,
      .help = "Prompts times n or best_of, whichever is larger. Never more than max-waiting, "
              "or a key's share of it." },
    { .key = "max-prompts", .type = OPTION_U32, AT(limits.max_prompts), .initial = "128",
      .min = 1, .max = 1u << 16, .help = "Prompts in a request." },
    { .key = "max-stops", .type = OPTION_U32, AT(limits.max_stops), .initial = "16",
      .max = 1024, .help = "Stop strings, and stop token ids." },
    { .key = "max-stop-bytes", .type = OPTION_U32, AT(limits.max_stop_bytes), .initial = "1024",
      .min = 1, .max = 1u << 20, .help = "Length of a stop string in UTF-8." },
    { .key = "max-logit-bias", .type = OPTION_U32, AT(limits.max_bias), .initial = "1024",
      .max = 1u << 20, .help = "Entries of logit_bias." },
    { .key = "max-logprobs", .type = OPTION_U32, AT(limits.max_logprobs), .initial = "20",
      .max = 20, .help = "Largest value of logprobs." },
    { .key = "max-logprob-entries", .type = OPTION_U64, AT(limits.max_logprob_entries),
      .initial = "4000000", .min = 1, .max = UINT64_C(1) << 40,
      .help = "Choices times tokens times 1 + logprobs, echoed prompts included." },
    { .key = "max-json-values", .type = OPTION_U64, AT(limits.max_json_values),
      .initial = "1000000", .min = 64, .max = 100 * MILLION,
      .help = "Values in a body, at all depths. Each costs about 80 bytes while it is "
              "parsed." },
    { .key = "max-request-bytes", .type = OPTION_BYTES, AT(limits.max_arena_bytes),
      .initial = "64mb", .min = 64 * 1024, .max = UINT64_C(1) << 40,
      .help = "Memory of one parsed request: its ids, texts and stop strings." },

    { .group = "Operation",
      .key = "log-level", .type = OPTION_CHOICE, AT(log_level), .initial = "info",
      .choices = "error|warn|info|debug", .help = "What is logged to standard error." },
    { .key = "log-format", .type = OPTION_CHOICE, AT(log_format), .initial = "text",
      .choices = "text|json",
      .help = "How. text: lines for people; json: one JSON object a line." },
    { .key = "drain-timeout", .type = OPTION_MS, AT(drain_timeout_ms), .initial = "30s",
      .max = 24 * (uint64_t)HOUR_MS,
      .help = "After SIGTERM: time for accepted requests to finish before they are "
              "cancelled." },
    { .key = "stall-timeout", .type = OPTION_MS, AT(stall_timeout_ms), .initial = "120s",
      .max = HOUR_MS,
      .help = "Work but no finished step for so long turns /health to 503. 0: never." },
    { .key = "selection-dump", .type = OPTION_TEXT, AT(engine.selection_dump), .initial = "none",
      .help = "File, not there yet, for what sparse steps select, with the queries, keys and "
              "values of the requests: scripts/selection_report.py judges it. Sparse "
              "steps then wait for the disk, and a GPU runs them in parts. For one device." },
    { .key = "selection-dump-bytes", .type = OPTION_BYTES, AT(engine.selection_dump_bytes),
      .initial = "4gb", .min = 4096, .max = 64ull << 40,
      .help = "Most that it may become; the disk must have that much. Then no more is written." },
    { .key = "selection-dump-nth-layer", .type = OPTION_U32, AT(engine.selection_dump_nth_layer),
      .initial = "1", .min = 1, .max = 1024,
      .help = "Which layers are in it: every n-th, from layer 0 on." },
    { .key = "check-invariants", .type = OPTION_BOOL, AT(engine.check_invariants),
      .initial = "no", .help = "Check the scheduler and the KV pool after every step; slow." },
};
/* clang-format on */

size_t config_n_options(void)
{
    return sizeof table / sizeof table[0];
}

const struct option *config_option(size_t i)
{
    return &table[i];
}

const struct option *config_find(const char *key, size_t n)
{
    for (size_t i = 0; i < config_n_options(); i++)
        if (strlen(table[i].key) == n && memcmp(table[i].key, key, n) == 0)
            return &table[i];
    return NULL;
}
