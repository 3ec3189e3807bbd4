#!/usr/bin/env python3
"""Write model folders with random weights: test models and benchmark shapes.

    make_model.py --tests build/models            every test model
    make_model.py qwen3-8b /tmp/m                 one preset
    make_model.py qwen3-0.6b /tmp/m --layers 2    with changes
    make_model.py qwen3-30b-a3b /tmp/m --layers 8 less than its 61 GB
    make_model.py glm-4.7-flash /tmp/m --layers 8 less than its 62 GB
    make_model.py --list

The bytes are the same on every machine: weights come from a counter (splitmix64
of seed, tensor name and element number), through integer sums and single
float multiplications only.  The scales are chosen so that attention is sharp,
every sublayer moves the residual stream, and logits have a standard deviation
of about 1.5: a wrong rotation, head mapping or bias shows in the first token.
What a family keeps in float32 whatever the others are (a router's bias) is float32 here.
"""
import argparse
import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "models" / "asynctlsd-books-9m"
TOKENIZER_IDS = 6144
CHUNK = 1 << 16      # elements computed at once
PIECE = 1 << 23      # elements that a process writes at once

SCORE_STD = 1.5      # of q.k / sqrt(head_dim)
LOGIT_STD = 1.5      # more of these and keys rounded to bf16 alone move logprobs by 0.02
MLP_GAIN = 1.0
ROUTER_STD = 2.0     # of a router's scores: some experts matter much more than others
ROUTER_BIAS_STD = 0.2    # sigmoids of these scores lie near 0 or 1: it moves some choices

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 1024}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
YARN_MSCALE = {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}

# layout: of config.json, 4 or 5 for the major version of transformers that
# writes it.  head_dim None leaves the key out.  latent: widths of latent attention, of which
# nope, rope and value are a head's.  mtp: a layer more, for guessing ahead, that readers skip.
# Where there are experts the layers of dense_layers have none.
DEFAULTS = dict(layers=2, kv_heads=2, head_dim=None, vocab=TOKENIZER_IDS, tied=False, dtype="bf16",
                experts=0, chosen=0, expert_mlp=0, shared=0, renormalise=True, dense_layers=(),
                latent=None, mtp=False, shards=1,
                layout=4, theta=10000.0, rope=None, max_position=8192, eps=1e-6, seed=1,
                attn_gain=1.0)   # less, and what attention finds changes less from step to step
TEST_MODELS = {
    "qwen3": dict(family="qwen3", hidden=96, mlp=192, heads=4, head_dim=64, tied=True,
                  theta=1e6),
    "qwen3-yarn-g5": dict(family="qwen3", hidden=64, mlp=160, heads=5, kv_heads=1, head_dim=128,
                          layout=5, theta=1e6, rope=YARN, dtype="f32"),
    "qwen2-g7": dict(family="qwen2", hidden=224, mlp=256, heads=7, kv_heads=1, shards=3,
                     theta=1e6),
    "llama3": dict(family="llama", hidden=96, mlp=224, heads=4, head_dim=64, eps=1e-5, tied=True,
                   theta=5e5, rope=LLAMA3),
    "llama-linear-mha": dict(family="llama", hidden=128, mlp=192, heads=2, layout=5, dtype="f32",
                             eps=1e-5, rope={"rope_type": "linear", "factor": 4.0}),
    "mistral": dict(family="mistral", hidden=80, mlp=192, heads=4, kv_heads=1, head_dim=64,
                    eps=1e-5, theta=1e6, shards=2, vocab=6400),
    "smollm2": dict(family="llama", hidden=576, mlp=512, heads=9, kv_heads=3, tied=True, eps=1e-5,
                    theta=1e5),
    "qwen3-moe": dict(family="qwen3_moe", hidden=96, mlp=192, layers=3, heads=4, head_dim=64,
                      experts=8, chosen=2, expert_mlp=80, dense_layers=(1,), theta=1e6, shards=2,
                      seed=3),
    "qwen3-moe-128": dict(family="qwen3_moe", hidden=64, mlp=96, heads=2, kv_heads=1, head_dim=64,
                          experts=128, chosen=8, expert_mlp=24, renormalise=False, layout=5,
                          theta=1e6),
    # The shape of GLM-4.7-Flash's cache, which is the one that GPU kernels exist for.
    "glm4-moe-lite": dict(family="glm4_moe_lite", hidden=96, mlp=192, layers=3, heads=5, kv_heads=5,
                          latent=dict(q_rank=48, dim=512, nope=32, rope=64, value=40), experts=8,
                          chosen=2, expert_mlp=80, shared=1, dense_layers=(0,), theta=1e6, mtp=True,
                          shards=2),
    "glm4-moe-lite-small": dict(family="glm4_moe_lite", hidden=64, mlp=96, layers=3, heads=4,
                                kv_heads=4,
                                latent=dict(q_rank=40, dim=64, nope=24, rope=16, value=16),
                                experts=16, chosen=3, expert_mlp=24, shared=2, dense_layers=(0,),
                                renormalise=False, layout=5, dtype="f32", rope=YARN_MSCALE),
}
BENCH_MODELS = {
    "qwen3-8b": dict(family="qwen3", hidden=4096, mlp=12288, layers=36, heads=32, kv_heads=8,
                     head_dim=128, vocab=151936, theta=1e6, max_position=131072, shards=5),
    "qwen3-0.6b": dict(family="qwen3", hidden=1024, mlp=3072, layers=28, heads=16, kv_heads=8,
                       head_dim=128, vocab=151936, theta=1e6, max_position=131072, tied=True),
    "qwen3-30b-a3b": dict(family="qwen3_moe", hidden=2048, mlp=6144, layers=48, heads=32,
                          kv_heads=4, head_dim=128, vocab=151936, experts=128, chosen=8,
                          expert_mlp=768, theta=1e7, max_position=262144, shards=16),
    "glm-4.7-flash": dict(family="glm4_moe_lite", hidden=2048, mlp=10240, layers=47, heads=20,
                          kv_heads=20, vocab=154880, experts=64, chosen=4, expert_mlp=1536,
                          latent=dict(q_rank=768, dim=512, nope=192, rope=64, value=256), shared=1,
                          dense_layers=(0,), theta=1e6, max_position=202752, eps=1e-5, shards=16),
    "smollm2-135m": dict(family="llama", hidden=576, mlp=1536, layers=30, heads=9, kv_heads=3,
                         vocab=49152, theta=1e5, max_position=8192, eps=1e-5, tied=True),
}
PRESETS = {**TEST_MODELS, **BENCH_MODELS}
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM",
                 "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
                 "qwen3_moe": "Qwen3MoeForCausalLM", "glm4_moe_lite": "Glm4MoeLiteForCausalLM"}


BIAS = "gate.e_score_correction_bias"


def head_dim_of(m):
    return m["head_dim"] or m["hidden"] // m["heads"]


def mlp_tensors(at, hidden, mlp):
    yield at + "gate_proj.weight", (mlp, hidden), 0, hidden ** -0.5
    yield at + "up_proj.weight", (mlp, hidden), 0, hidden ** -0.5
    yield at + "down_proj.weight", (hidden, mlp), 0, MLP_GAIN * mlp ** -0.5


def output_tensor(m, at, width, gain):
    return at + "o_proj.weight", (m["hidden"], width), 0, gain * width ** -0.5


def latent_tensors(m, at, gain):
    """Keys get their size from kv_b, and so do values; a key's part for rotation has no norm."""
    hidden, heads, w = m["hidden"], m["heads"], m["latent"]
    q, kv = heads * (w["nope"] + w["rope"]), heads * (w["nope"] + w["value"])
    sharp = SCORE_STD ** 0.5
    yield at + "q_a_proj.weight", (w["q_rank"], hidden), 0, hidden ** -0.5
    yield at + "q_a_layernorm.weight", (w["q_rank"],), 1, 0.2
    yield at + "q_b_proj.weight", (q, w["q_rank"]), 0, sharp * w["q_rank"] ** -0.5
    yield (at + "kv_a_proj_with_mqa.weight", (w["dim"] + w["rope"], hidden), 0,
           sharp * hidden ** -0.5)
    yield at + "kv_a_layernorm.weight", (w["dim"],), 1, 0.2
    yield at + "kv_b_proj.weight", (kv, w["dim"]), 0, sharp * w["dim"] ** -0.5
    yield output_tensor(m, at, heads * w["value"], gain)


def attention_tensors(m, at, gain):
    hidden, d = m["hidden"], head_dim_of(m)
    q, kv = m["heads"] * d, m["kv_heads"] * d
    sharp = SCORE_STD ** 0.5
    qk = 1.0 if m["family"] in ("qwen3", "qwen3_moe") else sharp
    yield at + "q_proj.weight", (q, hidden), 0, qk * hidden ** -0.5
    yield at + "k_proj.weight", (kv, hidden), 0, qk * hidden ** -0.5
    yield at + "v_proj.weight", (kv, hidden), 0, hidden ** -0.5
    yield output_tensor(m, at, q, gain)
    if m["family"] == "qwen2":
        yield at + "q_proj.bias", (q,), 0, 0.5
        yield at + "k_proj.bias", (kv,), 0, 0.5
        yield at + "v_proj.bias", (kv,), 0, 0.5
    if m["family"] in ("qwen3", "qwen3_moe"):
        yield at + "q_norm.weight", (d,), sharp, 0.2
        yield at + "k_norm.weight", (d,), sharp, 0.2


def experts_tensors(m, at):
    hidden = m["hidden"]
    yield at + "gate.weight", (m["experts"], hidden), 0, ROUTER_STD * hidden ** -0.5
    if m["family"] == "glm4_moe_lite":
        yield at + BIAS, (m["experts"],), 0, ROUTER_BIAS_STD
    for e in range(m["experts"]):
        yield from mlp_tensors(f"{at}experts.{e}.", hidden, m["expert_mlp"])
    if m["shared"]:
        yield from mlp_tensors(at + "shared_experts.", hidden, m["shared"] * m["expert_mlp"])


def tensors(m):
    """(name, shape, mean, standard deviation) of every tensor."""
    hidden = m["hidden"]
    embed = LOGIT_STD * hidden ** -0.5 if m["tied"] else 1.0
    yield "model.embed_tokens.weight", (m["vocab"], hidden), 0, embed
    for n in range(m["layers"] + m["mtp"]):
        at = f"model.layers.{n}."
        yield at + "input_layernorm.weight", (hidden,), 1, 0.2
        attention = latent_tensors if m["latent"] else attention_tensors
        gain = m["attn_gain"] * (min(1.0, 2 * embed) if n == 0 else 1.0)
        yield from attention(m, at + "self_attn.", gain)
        yield at + "post_attention_layernorm.weight", (hidden,), 1, 0.2
        if m["experts"] and n not in m["dense_layers"]:
            yield from experts_tensors(m, at + "mlp.")
        else:
            yield from mlp_tensors(at + "mlp.", hidden, m["mlp"])
        if n == m["layers"]:
            yield at + "eh_proj.weight", (hidden, 2 * hidden), 0, hidden ** -0.5
            yield at + "shared_head.norm.weight", (hidden,), 1, 0.2
    yield "model.norm.weight", (hidden,), 1, 0.2
    if not m["tied"]:
        yield "lm_head.weight", (m["vocab"], hidden), 0, LOGIT_STD * hidden ** -0.5


# ---- numbers

def stream_of(name, seed):
    """FNV-1a of the name: where in the counter a tensor starts."""
    h = 14695981039346656037
    for byte in f"{seed}/{name}".encode():
        h = (h ^ byte) * 1099511628211 % 2 ** 64
    return np.uint64(h)


def normals(stream, start, n):
    """Sums of four 16-bit uniforms: normal enough, at most 3.5 deviations, and exact."""
    with np.errstate(over="ignore"):
        z = np.arange(start, start + n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + stream
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    low = np.uint64(0xFFFF)
    total = (z & low) + (z >> np.uint64(16) & low) + (z >> np.uint64(32) & low) \
        + (z >> np.uint64(48))
    return (total.astype(np.int64) - 131070).astype(np.float32) * np.float32(1 / 37837.2)


def to_bf16(x):
    """Round to nearest, ties to even."""
    u = x.view(np.uint32)
    return ((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1)))
            >> np.uint32(16)).astype("<u2")


# ---- files

def write_piece(piece):
    """Some elements of a tensor, in chunks that fit the cache, to their place in the file."""
    path, at, stream, start, end, mean, std, dtype = piece
    fd = os.open(path, os.O_WRONLY)
    for first in range(start, end, CHUNK):
        x = normals(stream, first, min(CHUNK, end - first)) * np.float32(std)
        if mean:
            x += np.float32(mean)
        data = to_bf16(x) if dtype == "bf16" else x.astype("<f4")
        os.pwrite(fd, data, at + (first - start) * data.itemsize)
    os.close(fd)


def write_header(path, entries, m):
    """The file with everything but the numbers: (bytes of them, pieces to write)."""
    header, at, places = {"__metadata__": {"format": "pt"}}, 0, []
    for name, shape, mean, std in entries:
        n = int(np.prod(shape))
        dtype = "f32" if name.endswith(BIAS) else m["dtype"]
        size = 2 if dtype == "bf16" else 4
        header[name] = {"dtype": dtype.upper(), "shape": list(shape),
                        "data_offsets": [at, at + size * n]}
        places += [(at + size * start, stream_of(name, m["seed"]), start, min(start + PIECE, n),
                    mean, std, dtype) for start in range(0, n, PIECE)]
        at += size * n
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + at)
    return at, [(path, 8 + len(text) + place, *rest) for place, *rest in places]


def write_weights(folder, m):
    entries = list(tensors(m))
    weight_map, total, pieces = {}, 0, []
    for i in range(m["shards"]):
        part = entries[i * len(entries) // m["shards"]:(i + 1) * len(entries) // m["shards"]]
        name = "model.safetensors" if m["shards"] == 1 \
            else f"model-{i + 1:05d}-of-{m['shards']:05d}.safetensors"
        size, places = write_header(folder / name, part, m)
        total += size
        pieces += places
        weight_map.update({entry[0]: name for entry in part})
    if m["shards"] > 1:
        write_json(folder / "model.safetensors.index.json",
                   {"metadata": {"total_size": total}, "weight_map": weight_map})
    if total < PIECE:        # less than processes take to start
        for piece in pieces:
            write_piece(piece)
        return
    with multiprocessing.Pool() as pool:
        for _ in pool.imap_unordered(write_piece, pieces):
            pass


def latent_config(m):
    w = m["latent"]
    c = {"q_lora_rank": w["q_rank"], "kv_lora_rank": w["dim"], "qk_nope_head_dim": w["nope"],
         "qk_rope_head_dim": w["rope"], "v_head_dim": w["value"], "n_routed_experts": m["experts"],
         "n_shared_experts": m["shared"], "n_group": 1, "topk_group": 1,
         "routed_scaling_factor": 1.8}
    if m["layout"] == 5:
        c["mlp_layer_types"] = ["dense" if n in m["dense_layers"] else "sparse"
                                for n in range(m["layers"])]
    else:
        c.update(topk_method="noaux_tc", first_k_dense_replace=len(m["dense_layers"]),
                 num_nextn_predict_layers=int(m["mtp"]), partial_rotary_factor=1.0)
    return c


def config(m):
    dtype = "bfloat16" if m["dtype"] == "bf16" else "float32"
    c = {
        "architectures": [ARCHITECTURES[m["family"]]], "model_type": m["family"],
        "hidden_size": m["hidden"], "intermediate_size": m["mlp"],
        "num_hidden_layers": m["layers"], "num_attention_heads": m["heads"],
        "num_key_value_heads": m["kv_heads"], "vocab_size": m["vocab"],
        "max_position_embeddings": m["max_position"], "rms_norm_eps": m["eps"],
        "hidden_act": "silu", "tie_word_embeddings": m["tied"], "attention_dropout": 0.0,
        "bos_token_id": 6141, "eos_token_id": 6141, "initializer_range": 0.02, "use_cache": True,
    }
    if m["head_dim"]:
        c["head_dim"] = m["head_dim"]
    if m["family"] in ("qwen2", "qwen3", "qwen3_moe"):
        c.update(use_sliding_window=False, sliding_window=None, max_window_layers=m["layers"])
    if m["family"] in ("qwen3", "llama", "qwen3_moe", "glm4_moe_lite"):
        c["attention_bias"] = False
    if m["family"] == "mistral":
        c["sliding_window"] = None
    if m["experts"]:
        c.update(num_experts_per_tok=m["chosen"], moe_intermediate_size=m["expert_mlp"],
                 norm_topk_prob=m["renormalise"])
    if m["family"] == "qwen3_moe":
        c.update(decoder_sparse_step=1,
                 mlp_only_layers=[n for n in m["dense_layers"] if n < m["layers"]])
        c["num_local_experts" if m["layout"] == 5 else "num_experts"] = m["experts"]
    if m["family"] == "glm4_moe_lite":
        c.update(latent_config(m))
    if m["layout"] == 5:
        c.update(dtype=dtype, pad_token_id=None,
                 rope_parameters={"rope_type": "default", **(m["rope"] or {}),
                                  "rope_theta": m["theta"]})
        if m["family"] in ("qwen2", "qwen3"):
            c["layer_types"] = ["full_attention"] * m["layers"]
    else:
        c.update(torch_dtype=dtype, rope_theta=m["theta"], rope_scaling=m["rope"])
    return c


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


def make(folder, m):
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    write_json(folder / "config.json", config(m))
    write_json(folder / "generation_config.json", {"bos_token_id": 6141, "eos_token_id": [6141]})
    if m["vocab"] < TOKENIZER_IDS:
        sys.exit(f"the tokenizer has {TOKENIZER_IDS} ids, a vocabulary of {m['vocab']} is too small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    write_weights(folder, m)


def preset(name, **changes):
    return {**DEFAULTS, **PRESETS[name], **changes}


def main():
    ap = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("preset", nargs="?", choices=PRESETS)
    ap.add_argument("out", nargs="?", type=Path)
    ap.add_argument("--tests", type=Path, metavar="DIR", help="all test models into DIR")
    ap.add_argument("--list", action="store_true")
    for key in ("layers", "hidden", "mlp", "heads", "kv_heads", "head_dim", "vocab", "shards",
                "layout", "max_position", "seed", "experts", "chosen", "expert_mlp"):
        ap.add_argument("--" + key.replace("_", "-"), type=int)
    ap.add_argument("--dtype", choices=("bf16", "f32"))
    ap.add_argument("--family", choices=ARCHITECTURES)
    ap.add_argument("--theta", type=float)
    ap.add_argument("--attn-gain", type=float)
    ap.add_argument("--rope", type=json.loads, help="rope scaling as a JSON object")
    ap.add_argument("--tied", type=lambda s: s == "true", metavar="true|false")
    args = ap.parse_args()
    if args.list:
        for name in PRESETS:
            print(name, {k: v for k, v in PRESETS[name].items()})
    elif args.tests:
        for name in TEST_MODELS:
            make(args.tests / name, preset(name))
    elif args.preset and args.out:
        changes = {k: v for k, v in vars(args).items()
                   if v is not None and k not in ("preset", "out", "tests", "list")}
        make(args.out, preset(args.preset, **changes))
    else:
        ap.error("name a preset and a folder")


if __name__ == "__main__":
    main()
