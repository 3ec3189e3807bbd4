#!/usr/bin/env python3
"""Record what transformers computes for the test models of make_model.py.

    make_model.py --tests build/models
    make_references.py build/models tests/model/golden [name ...]

Needs torch and transformers; glm4_moe_lite one that caches latent rows, as 5.24 does: only then
are they what is rounded below.  float32 arithmetic, eager attention.  For prompts
of 5, 130, 1,500 and 6,000 tokens: the eight largest logprobs at the last
position, then 16 greedy tokens with the margin of each over the second best.
The tests only read the files written here.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, cache_utils

LENGTHS = (5, 130, 1500, 6000)
N_GREEDY, N_TOP, ID_LIMIT = 16, 8, 6141
MASK = 2 ** 64 - 1


def prompt(n):
    """splitmix64 of the position; tests/support/model_runner.c has the same."""
    ids = []
    for i in range(n):
        z = ((n << 32) + i + 1) * 0x9E3779B97F4A7C15 & MASK
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
        ids.append((z ^ z >> 31) % ID_LIMIT)
    return ids


def weights_sum(folder):
    """Tells whether a golden file belongs to the model at hand."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        words = np.frombuffer(data + b"\0" * (-len(data) % 8), dtype="<u8")
        odd = 2 * np.arange(len(words), dtype=np.uint64) + np.uint64(1)
        total = (total + int(np.sum(words * odd, dtype=np.uint64))) & MASK
    return f"{total:016x}"


class Bf16Layer(cache_utils.DynamicLayer):
    def update(self, keys, values, *args, **kwargs):
        return super().update(keys.bfloat16().float(), values.bfloat16().float(), *args,
                              **kwargs)


@torch.no_grad()
def rounded_logprobs(model, n, top_ids):
    cache = cache_utils.DynamicCache(config=model.config)
    cache.layers = [Bf16Layer() for _ in range(model.config.num_hidden_layers)]
    out = model(torch.tensor([prompt(n)]), past_key_values=cache, use_cache=True,
                logits_to_keep=1)
    logprobs = torch.log_softmax(out.logits[0, -1].double(), -1)
    return [round(logprobs[i].item(), 5) for i in top_ids]


@torch.no_grad()
def record(model, n):
    ids, entry = prompt(n), {"n_tokens": n, "greedy_ids": [], "greedy_margins": []}
    tokens, cache = torch.tensor([ids]), None
    for step in range(N_GREEDY):
        out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits[0, -1].double()
        top = torch.topk(torch.log_softmax(logits, -1), N_TOP)
        if step == 0:
            entry["top_ids"] = top.indices.tolist()
            entry["top_logprobs"] = [round(x, 5) for x in top.values.tolist()]
            entry["top_logprobs_bf16_kv"] = rounded_logprobs(model, n, entry["top_ids"])
            entry["logit_std"] = round(logits.std().item(), 3)
        entry["greedy_ids"].append(top.indices[0].item())
        entry["greedy_margins"].append(round((top.values[0] - top.values[1]).item(), 5))
        tokens = top.indices[:1].view(1, 1)
    return entry


def main():
    models, out = Path(sys.argv[1]), Path(sys.argv[2])
    names = sys.argv[3:] or sorted(p.name for p in models.iterdir() if p.is_dir())
    for name in names:
        model = AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32,
                                                     attn_implementation="eager").eval()
        prompts = [record(model, n) for n in LENGTHS]
        golden = {"made_by": "transformers, float32, eager attention",
                  "weights_sum": weights_sum(models / name), "prompts": prompts}
        text = json.dumps(golden, indent=1)
        (out / f"{name}.json").write_text(text + "\n")
        rounding = [max(abs(a - b) for a, b in zip(p["top_logprobs"], p["top_logprobs_bf16_kv"]))
                    for p in prompts]
        print(name, [p["logit_std"] for p in prompts], "bf16 K and V move the logprobs by",
              [round(x, 4) for x in rounding], flush=True)


if __name__ == "__main__":
    main()
