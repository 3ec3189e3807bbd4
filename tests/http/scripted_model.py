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

GLM_MARKERS = ["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]
GLM_CONTROLS = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]

# Qwen3's template in so many words as the server knows it by.
QWEN3 = r"""{{- "# Tools\n\nYou may call one or more functions to assist with the user query." }}
<tools> <tool_response> {\"name\": <function-name> last_query_index
loop.last or (not loop.last and reasoning_content)
<|im_start|>assistant\n {%- if enable_thinking is false %}<think>\n\n</think>\n\n"""

# And GLM-4.7's.
GLM = r"""[gMASK]<sop> <|system|>\n# Tools\n <arg_key>{arg-key-1}</arg_key> <|observation|>
clear_thinking is defined and not clear_thinking
'</think>' if (enable_thinking is defined and not enable_thinking) else '<think>'"""


def tokenizer(pieces, controls=()):
    """The bundled tokenizer with more tokens, and their ids.  controls: special ones."""
    t = json.loads((Path(MODEL) / "tokenizer.json").read_text())
    ids = {}
    for piece in [*MARKERS, *pieces, *controls]:
        ids.setdefault(piece, FIRST_ID + len(ids))
    t["added_tokens"] += [{"id": i, "content": piece, "single_word": False, "lstrip": False,
                           "rstrip": False, "normalized": False, "special": piece in controls}
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


def write_model(tok, chains, template):
    """A folder that goes away with its last reference.  chains: lists of ids."""
    folder = tempfile.TemporaryDirectory(prefix="asynctlsd-model-")
    path = Path(folder.name)
    steps = [step for chain in chains for step in zip(chain, chain[1:])]
    rows = (max(t["id"] for t in tok["added_tokens"]) // 64 + 1) * 64
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


def scripted_model(thinking, quiet, template=QWEN3):
    """thinking: what follows a prompt that ends in one line end, as Qwen3's do; quiet: in two,
    as they do with enable_thinking off."""
    tok, ids = tokenizer(thinking + quiet)
    vocab = tok["model"]["vocab"]
    return write_model(tok, [[vocab[start], *(ids[piece] for piece in script), END_ID]
                             for start, script in ((LINE, thinking), (LINES, quiet))], template)


def scripted_glm(thoughts, answer):
    """A model that is talked to as GLM-4.7 is: thinks, ends its thoughts and answers, or answers
    at once with enable_thinking off."""
    tok, ids = tokenizer(GLM_MARKERS + thoughts + answer, GLM_CONTROLS)
    return write_model(tok, [[ids[piece] for piece in chain] for chain in
                             (["<think>", *thoughts, "</think>"],
                              ["</think>", *answer, "<|observation|>"])], GLM)
