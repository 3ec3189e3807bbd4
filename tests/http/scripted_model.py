"""A model that says what it is told to: each token of a script is followed by the next.

Its embedding gives every token of a script a direction of its own, its layer adds nothing, and
its output matrix answers each direction with the token that comes next.  So what a chat model
might say (thoughts, calls, broken calls) goes through the whole server, and does so always.
A script is a list of pieces that are tokens of their own; no piece may stand in it twice."""
import json
import tempfile
import weakref
from pathlib import Path

import numpy as np

from daemon import MODEL

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP = 256, 4, 2, 64, 64
FIRST_ID, END_ID = 6144, 6143        # behind the bundled tokenizer's ids; its <|im_end|>
LINE, LINES = "\u010a", "\u010a\u010a"       # \n and \n\n as byte-level vocabularies spell them
MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>",
           "</tool_response>"]

# Qwen3's template in so many words as the server knows it by.
QWEN3 = r"""{{- "# Tools\n\nYou may call one or more functions to assist with the user query." }}
<tools> <tool_response> {\"name\": <function-name> last_query_index
<|im_start|>assistant\n {%- if enable_thinking is false %}<think>\n\n</think>\n\n"""


def tokenizer(pieces):
    """The bundled tokenizer with more tokens, and their ids."""
    t = json.loads((Path(MODEL) / "tokenizer.json").read_text())
    ids = {}
    for piece in MARKERS + pieces:
        ids.setdefault(piece, FIRST_ID + len(ids))
    t["added_tokens"] += [{"id": i, "content": piece, "single_word": False, "lstrip": False,
                           "rstrip": False, "normalized": False, "special": False}
                          for piece, i in ids.items()]
    return t, ids


def weights(steps, vocab):
    """steps: (token, next token), at most HIDDEN of them."""
    assert len(steps) <= HIDDEN and len({a for a, _ in steps}) == len(steps)
    embed, head = np.zeros((vocab, HIDDEN), "f4"), np.zeros((vocab, HIDDEN), "f4")
    for direction, (a, b) in enumerate(steps):
        embed[a, direction] = 1
        head[b, direction] = 4       # times sqrt(HIDDEN): nothing else has a chance
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    at = "model.layers.0."
    shapes = {"self_attn.q_proj": (q, HIDDEN), "self_attn.k_proj": (kv, HIDDEN),
              "self_attn.v_proj": (kv, HIDDEN), "self_attn.o_proj": (HIDDEN, q),
              "mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN),
              "mlp.down_proj": (HIDDEN, MLP)}
    norms = {at + "input_layernorm": HIDDEN, at + "post_attention_layernorm": HIDDEN,
             at + "self_attn.q_norm": HEAD_DIM, at + "self_attn.k_norm": HEAD_DIM,
             "model.norm": HIDDEN}
    return {"model.embed_tokens.weight": embed, "lm_head.weight": head,
            **{f"{at}{name}.weight": np.zeros(shape, "f4") for name, shape in shapes.items()},
            **{f"{name}.weight": np.ones(n, "f4") for name, n in norms.items()}}


def write_tensors(path, tensors):
    header, at = {}, 0
    for name, x in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text
                     + b"".join(x.tobytes() for x in tensors.values()))


def scripted_model(thinking, quiet, template=QWEN3):
    """A folder that goes away with its last reference.  thinking: what follows a prompt that
    ends in one line end, as Qwen3's do; quiet: in two, as they do with enable_thinking off."""
    folder = tempfile.TemporaryDirectory(prefix="asynctlsd-model-")
    path = Path(folder.name)
    tok, ids = tokenizer(thinking + quiet)
    vocab = tok["model"]["vocab"]
    steps = []
    for start, script in ((LINE, thinking), (LINES, quiet)):
        chain = [vocab[start]] + [ids[piece] for piece in script] + [END_ID]
        steps += zip(chain, chain[1:])
    rows = (FIRST_ID + len(ids) + 63) // 64 * 64
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": HIDDEN,
              "intermediate_size": MLP, "num_hidden_layers": 1, "num_attention_heads": HEADS,
              "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "vocab_size": rows,
              "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
              "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
              "eos_token_id": END_ID, "torch_dtype": "float32"}
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text(json.dumps(tok))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    write_tensors(path / "model.safetensors", weights(steps, rows))
    weakref.finalize(folder, folder.cleanup)
    return folder
