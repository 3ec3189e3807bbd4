#!/usr/bin/env python3
"""Train a small long-context model of the kind in models/: a Qwen3-architecture
language model of some ten million parameters that really retrieves what it read
tens of thousands of tokens ago.

    python3 scripts/train_bundled_model.py --text books/*.txt --out models/mine

Needs PyTorch with a GPU, transformers' `tokenizers` and `safetensors`.  Any
plain text will do, 50 MB and up; a part of it is held out for the figures
printed at the end.  The time goes as --minutes; the phases get their shares.

What it learns from: the text, with facts set into it at random places ("The
access code of the silver lantern is 48213."), questions about them anywhere
later, several at once, chains of variables, and passages to be recalled word
by word.  The value of a fact has no weight in the loss where it is stated
(nobody can know it), and a high one where it is asked for: that signal, many
times in every sequence, is what makes retrieval over distance appear in minutes.
"""
import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import torch.utils.data
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

CONFIG = dict(
    architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_act="silu", hidden_size=256,
    intermediate_size=768, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
    head_dim=128, rms_norm_eps=1e-6, rope_theta=1e7, rope_scaling=None, tie_word_embeddings=True,
    attention_bias=False, max_position_embeddings=131072, torch_dtype="bfloat16",
    use_sliding_window=False, sliding_window=None, initializer_range=0.02)

# (sequence length, share of the time, learning-rate factor at the start and at the end)
PHASES = [(2048, 0.40, 1.0, 0.6), (8192, 0.13, 0.6, 0.4), (32768, 0.19, 0.4, 0.25),
          (98304, 0.28, 0.25, 0.02)]
TOKENS_PER_STEP = 98304

ATTRIBUTES = ("access code|serial number|page number|room number|catalogue number|price|weight|"
              "birth year|ticket number|house number|account number|secret number|lock code|"
              "registration number|telephone number").split("|")
ADJECTIVES = ("silver|broken|ancient|crimson|hollow|quiet|golden|wooden|frozen|painted|narrow|"
              "velvet|rusty|hidden|marble|distant|copper|wandering|gentle|forgotten").split("|")
NOUNS = ("lantern|bridge|compass|garden|mirror|anchor|violin|harbour|cabinet|tower|ladder|orchard|"
         "chapel|kettle|saddle|beacon|locket|carriage|fountain|ledger").split("|")
STATE = ["The {a} of the {s} is {v}.", "Remember that the {a} of the {s} is {v}.",
         "It was written that the {a} of the {s} is {v}.", "For the {s}, the {a} is {v}."]
ASK = ["What is the {a} of the {s}? The {a} of the {s} is {v}.",
       "Question: what is the {a} of the {s}? Answer: {v}.",
       "As said before, the {a} of the {s} is {v}.",
       "<|im_start|>user\nWhat is the {a} of the {s}?<|im_end|>\n<|im_start|>assistant\n{v}<|im_end|>\n"]
WEIGHT = dict(text=1.0, answer=6.0, recall=2.0, rest=0.2, stated=0.0)


# ---------------------------------------------------------------- the data

def train_tokenizer(texts, vocab):
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab - len(SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.add_special_tokens(SPECIALS)
    return tok


class Sequences:
    """An endless stream of sequences, as lists of ids and of loss weights."""

    def __init__(self, tok, ids, seed):
        self.tok, self.ids, self.rng = tok, ids, random.Random(seed)
        self.eos = tok.token_to_id(SPECIALS[0])

    def encode(self, text):
        return self.tok.encode(text).ids

    def template(self, form, a, s, v, weight):
        """The ids of a sentence and their weights, `weight` on those of the value."""
        head, tail = form.split("{v}")
        ids, weights = [], []
        # The blank belongs to the value: byte-level BPE joins it to what follows.
        blank = " " if head.endswith(" ") else ""
        for text, w in ((head[:len(head) - len(blank)], WEIGHT["rest"]), (blank + v, weight),
                        (tail, WEIGHT["rest"])):
            part = self.encode(text.format(a=a, s=s) if "{" in text else text)
            ids += part
            weights += [w] * len(part)
        return ids, weights

    def fact(self):
        rng = self.rng
        value = str(rng.randrange(10 ** rng.randint(2, 6), 10 ** 7)) if rng.random() < 0.8 else \
            f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
        return rng.choice(ATTRIBUTES), f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}", value

    def pieces(self, length):
        """(position, ids, weights) of what is set into the text, at least length/16 of it."""
        rng, out, spent = self.rng, [], 0
        known = {}
        while spent < length // 5:
            kind = rng.random()
            if kind < 0.12:                       # a chain of variables
                names = ["".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=3)) for _ in range(2)]
                value = str(rng.randrange(10000, 99999))
                at = sorted(rng.random() for _ in range(3))
                group = [(at[0], f" VAR {names[0]} = {value}.", WEIGHT["rest"]),
                         (at[1], f" VAR {names[1]} = {names[0]}.", WEIGHT["rest"])]
                out += [(p, i := self.encode(t), [w] * len(i)) for p, t, w in group]
                q = self.encode(f" {names[1]} = {names[0]} =")
                v = self.encode(f" {value}")
                out.append((at[2], q + v, [WEIGHT["rest"]] * len(q) + [WEIGHT["answer"]] * len(v)))
                spent += len(q) + len(v) + 24
                continue
            a, s, v = self.fact()
            if known.setdefault((a, s), v) != v:
                continue
            place = rng.random() * 0.95
            ids, weights = self.template(" " + rng.choice(STATE), a, s, v, WEIGHT["stated"])
            out.append((place, ids, weights))
            spent += len(ids)
            for _ in range(rng.randint(1, 3)):    # asked anywhere later, often at the end
                later = place + (1 - place) * (rng.random() if rng.random() < 0.6 else
                                               0.97 + 0.03 * rng.random())
                ids, weights = self.template(" " + rng.choice(ASK), a, s, v, WEIGHT["answer"])
                out.append((max(later, place + 1e-6), ids, weights))
                spent += len(ids)
        return sorted(out, key=lambda p: p[0])

    def recall(self, ids, weights):
        """Repeat a passage from earlier on, for its first words."""
        n = self.rng.randint(24, 48)
        start = self.rng.randrange(0, max(1, len(ids) // 2))
        passage = ids[start:start + n]
        return passage, [WEIGHT["rest"]] * 6 + [WEIGHT["recall"]] * (len(passage) - 6)

    def sequence(self, length):
        start = self.rng.randrange(len(self.ids) - length)
        text = self.ids[start:start + length].tolist()
        if self.rng.random() < (0.1 if length < 32768 else 0.04):
            return text, [WEIGHT["text"]] * length
        ids, weights, at = [], [], 0
        for place, piece, w in self.pieces(length):
            upto = int(place * length * 0.8)
            ids += text[at:upto]
            weights += [WEIGHT["text"]] * max(0, upto - at)
            at = max(at, upto)
            ids += piece
            weights += w
        p, w = self.recall(ids, weights)
        ids += text[at:at + 64] + p
        weights += [WEIGHT["text"]] * len(text[at:at + 64]) + w
        ids += text[at + 64:]
        weights += [WEIGHT["text"]] * (len(ids) - len(weights))
        return ids[:length], weights[:length]

    def batch(self, length):
        rows = [self.sequence(length) for _ in range(TOKENS_PER_STEP // length)]
        ids = torch.tensor([r[0] for r in rows], dtype=torch.long)
        return ids, torch.tensor([r[1] for r in rows])


class Batches(torch.utils.data.IterableDataset):
    """Batches made by several processes: one could not keep the GPU busy."""

    def __init__(self, tok, ids, seed, length):
        self.tok, self.ids, self.seed, self.length = tok.to_str(), ids, seed, length

    def __iter__(self):
        worker = torch.utils.data.get_worker_info().id
        sequences = Sequences(Tokenizer.from_str(self.tok), self.ids,
                              f"{self.seed}/{self.length}/{worker}")
        while True:
            yield sequences.batch(self.length)


def batches(tok, ids, seed, length):
    return iter(torch.utils.data.DataLoader(Batches(tok, ids, seed, length), batch_size=None,
                                            num_workers=12, pin_memory=True, prefetch_factor=2))


# --------------------------------------------------------------- the model

class Norm(torch.nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(n))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), CONFIG["rms_norm_eps"])


class Linear(torch.nn.Linear):
    """Float weights, multiplied in the type of the input."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        h, d, i = CONFIG["hidden_size"], CONFIG["head_dim"], CONFIG["intermediate_size"]
        self.nq, self.nk, self.d = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"], d

        def linear(n_in, n_out):
            return Linear(n_in, n_out, bias=False)

        self.input_layernorm, self.post_attention_layernorm = Norm(h), Norm(h)
        self.q_proj, self.k_proj = linear(h, self.nq * d), linear(h, self.nk * d)
        self.v_proj, self.o_proj = linear(h, self.nk * d), linear(self.nq * d, h)
        self.q_norm, self.k_norm = Norm(d), Norm(d)
        self.gate_proj, self.up_proj, self.down_proj = linear(h, i), linear(h, i), linear(i, h)

    def rotate(self, x, cos, sin):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def forward(self, x, cos, sin):
        n, t, _ = x.shape
        h = self.input_layernorm(x)
        q = self.q_norm(self.q_proj(h).view(n, t, self.nq, self.d)).transpose(1, 2)
        k = self.k_norm(self.k_proj(h).view(n, t, self.nk, self.d)).transpose(1, 2)
        v = self.v_proj(h).view(n, t, self.nk, self.d).transpose(1, 2)
        a = F.scaled_dot_product_attention(self.rotate(q, cos, sin), self.rotate(k, cos, sin), v,
                                           is_causal=True, enable_gqa=True)
        x = x + self.o_proj(a.transpose(1, 2).reshape(n, t, -1))
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Model(torch.nn.Module):
    def __init__(self, vocab):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(vocab, CONFIG["hidden_size"])
        self.layers = torch.nn.ModuleList(Layer() for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = Norm(CONFIG["hidden_size"])
        for name, p in self.named_parameters():
            if p.ndim == 2:
                torch.nn.init.normal_(p, std=0.02)

    def forward(self, ids):
        d = CONFIG["head_dim"]
        freq = CONFIG["rope_theta"] ** (-torch.arange(0, d, 2, device=ids.device).float() / d)
        angle = torch.outer(torch.arange(ids.shape[1], device=ids.device).float(), freq)
        cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
        x = self.embed_tokens(ids).bfloat16()
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, cos, sin, use_reentrant=False) \
                if ids.shape[1] > 8192 and self.training else layer(x, cos, sin)
        return self.norm(x)

    def losses(self, hidden, ids, chunk=8192):
        """Cross entropy of every next token, in pieces: whole logits would not fit."""
        h, target = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        w = self.embed_tokens.weight.bfloat16()
        parts = [torch.utils.checkpoint.checkpoint(
            lambda a, b: F.cross_entropy((a @ w.T).float(), b, reduction="none"),
            h[i:i + chunk], target[i:i + chunk], use_reentrant=False)
            for i in range(0, h.shape[0], chunk)]
        return torch.cat(parts)


def orthogonal(g, steps=5):
    """Newton-Schulz iteration towards the nearest orthogonal matrix (Muon)."""
    x = g.bfloat16() / (g.norm() + 1e-7)
    flip = x.shape[0] > x.shape[1]
    x = x.T if flip else x
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.T if flip else x).float()


class Muon:
    def __init__(self, params, lr=0.02, momentum=0.95, decay=0.05):
        self.params, self.lr, self.momentum, self.decay = list(params), lr, momentum, decay
        self.buffers = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def step(self, factor):
        for p, m in zip(self.params, self.buffers):
            m.mul_(self.momentum).add_(p.grad)
            update = orthogonal(p.grad + self.momentum * m)
            scale = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
            p.mul_(1 - self.lr * factor * self.decay).add_(update, alpha=-self.lr * factor * scale)
            p.grad = None


# ------------------------------------------------------------ train and save

def train(model, tok, text, seed, minutes):
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon, adam = Muon(matrices), torch.optim.Adam(others, lr=3e-3, betas=(0.9, 0.95), fused=True)
    began, step = time.time(), 0
    for length, share, first, last in PHASES:
        data = batches(tok, text, seed, length)
        next(data)                                # the workers are up
        phase_began, budget = time.time(), share * minutes * 60
        while (spent := time.time() - phase_began) < budget:
            ids, weights = (t.cuda(non_blocking=True) for t in next(data))
            losses = model.losses(model(ids), ids)
            w = weights[:, 1:].flatten()
            loss = (losses * w).sum() / w.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(others, 1.0)
            cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, spent / budget)))
            factor = (last + (first - last) * cosine) * min(1.0, (step + 1) / 100)
            adam.param_groups[0]["lr"] = 3e-3 * factor
            adam.step()
            adam.zero_grad(set_to_none=True)
            muon.step(factor)
            if step % 50 == 0:
                asked = losses[w == WEIGHT["answer"]].mean()
                print(f"{time.time() - began:6.0f} s  step {step:5d}  length {length:6d}  "
                      f"loss {loss.item():.3f}  answers {asked.item():.3f}", flush=True)
            step += 1


@torch.no_grad()
def evaluate(model, data):
    """Answers exact by argmax, and perplexity of the text, on what was held out."""
    model.eval()
    report = {}
    for length in (2048, 8192, 32768, 98304):
        right = asked = 0
        nats = tokens = 0.0
        for _ in range(8):
            sequence, weights = data.sequence(length)
            ids, w = torch.tensor([sequence]).cuda(), torch.tensor(weights)[1:].cuda()
            hidden = model(ids)
            best = torch.cat([(h @ model.embed_tokens.weight.bfloat16().T).argmax(-1)
                              for h in hidden[0, :-1].split(8192)])
            wanted = w == WEIGHT["answer"]
            right += (best == ids[0, 1:])[wanted].sum().item()
            asked += wanted.sum().item()
            text = w == WEIGHT["text"]
            nats += model.losses(hidden, ids)[text].sum().item()
            tokens += text.sum().item()
        report[length] = dict(answer_tokens=asked, right=round(right / max(1, asked), 4),
                              perplexity=round(math.exp(nats / max(1, tokens)), 2))
        print(length, report[length], flush=True)
    return report


def save(model, tok, out, report):
    out.mkdir(parents=True, exist_ok=True)
    tok.save(str(out / "tokenizer.json"))
    eos, end = tok.token_to_id(SPECIALS[0]), tok.token_to_id(SPECIALS[2])
    config = dict(CONFIG, vocab_size=model.embed_tokens.weight.shape[0], bos_token_id=eos,
                  eos_token_id=eos)
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (out / "generation_config.json").write_text(json.dumps(dict(
        bos_token_id=eos, pad_token_id=eos, eos_token_id=[eos, end], do_sample=True,
        temperature=0.7, top_p=0.9, top_k=40), indent=2) + "\n")
    (out / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="Qwen2Tokenizer", eos_token=SPECIALS[2], pad_token=SPECIALS[0],
        model_max_length=131072), indent=2) + "\n")
    tensors = {}
    for name, p in model.named_parameters():
        for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            name = name.replace(f".{part}.", f".self_attn.{part}.")
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = name.replace(f".{part}.", f".mlp.{part}.")
        tensors[f"model.{name}"] = p.detach().bfloat16().contiguous().cpu()
    save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n")


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    ap.add_argument("--text", nargs="+", required=True, help="plain text files, UTF-8")
    ap.add_argument("--out", type=Path, required=True, help="the model folder to write")
    ap.add_argument("--minutes", type=float, default=7.5, help="training time (7.5)")
    ap.add_argument("--vocab", type=int, default=6144)
    ap.add_argument("--seed", type=int, default=1)
    args = ap.parse_args()
    torch.manual_seed(args.seed)
    texts = [Path(p).read_text(encoding="utf-8", errors="replace") for p in args.text]
    joined = "\n\n".join(texts)
    if len(joined) < 4_000_000:
        raise SystemExit(f"{len(joined)} characters are too few; 4 million is the least, 50 good")
    tok = train_tokenizer([joined[i:i + 100_000] for i in range(0, min(len(joined), 31_000_000),
                                                                100_000)], args.vocab)
    print("tokenizer:", tok.get_vocab_size(), "tokens", flush=True)
    parts = tok.encode_batch([joined[i:i + 100_000] for i in range(0, len(joined), 100_000)])
    ids = torch.tensor([i for p in parts for i in p.ids], dtype=torch.int32)
    held = max(200_000, len(ids) // 50)
    if held < 98304 * 2:
        held = 98304 * 2
    print(f"text: {len(ids)} tokens, {held} held out", flush=True)
    model = Model(tok.get_vocab_size()).cuda()
    train(model, tok, ids[:-held], args.seed, args.minutes)
    report = evaluate(model, Sequences(tok, ids[-held:], args.seed + 1))
    save(model, tok, args.out, dict(minutes=args.minutes, tokens=len(ids), held_out=report))


if __name__ == "__main__":
    main()
