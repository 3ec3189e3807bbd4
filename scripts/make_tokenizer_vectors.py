#!/usr/bin/env python3
"""Records the tokenizer fixtures of tests/unit/data/tokenizer with Hugging Face `tokenizers`.

    python3 scripts/make_tokenizer_vectors.py        (needs: pip install tokenizers)

Trains one small byte-level BPE in the style of each family on the sentences
below and writes <style>.json, then encodes and decodes odd texts with each and
with the bundled model's tokenizer and writes the answers to vectors.json.  The
tests read these files and need neither Python nor the library."""
import json
import random
import unicodedata
from pathlib import Path

import tokenizers
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers,
                        pre_tokenizers, processors, trainers)

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "tests/unit/data/tokenizer"
BUNDLED = ROOT / "models/asynctlsd-books-9m/tokenizer.json"

QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

SENTENCES = """\
The lighthouse keeper counted forty-two ships before the fog came in.
Don't say they're late; we've seen that I'll wait and he'd stay, 'cause it's 7:45.
A tokenizer turns text into numbers, and the model never sees anything else.
for (int i = 0; i < n; i++) { sum += weights[i] * inputs[i]; }
def forward(self, hidden):\n        return self.norm(hidden) @ self.weight.T
In 1987 there were 1,024 of them, in 2024 over 65,536.
Ещё вчера мы думали, что поезд придёт вовремя.
Le garçon a mangé une crème brûlée à Noël.
天气很好，我们去公园散步吧。
今日はとても暖かいですね。
오늘은 날씨가 좋습니다.
नमस्ते, आप कैसे हैं?
Tiếng Việt có nhiều dấu thanh.
🙂 👍🏽 👩‍🔬 🇫🇷 fine""".split("\n")


def train(pre_tokenizer, specials=(), size=640):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizer
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(SENTENCES, trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(specials), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return t


def split(pattern):
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def added(content, **rules):
    return AddedToken(content, **{"normalized": False, **rules})


def bos_template(t, before, after=""):
    special = [(s, t.token_to_id(s)) for s in (before, after) if s]
    return processors.TemplateProcessing(single=f"{before} $A {after}".strip(),
                                         special_tokens=special)


def qwen():
    t = train(split(QWEN))
    t.normalizer = normalizers.NFC()
    t.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    t.add_tokens([added("<think>"), added("</think>")])
    return json.loads(t.to_str())


def llama():
    """Merges in the legacy form, and a word that only ignore_merges can find."""
    t = train(split(LLAMA))
    t.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>"])
    t.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), bos_template(t, "<|begin_of_text|>")])
    d = json.loads(t.to_str())
    model = d["model"]
    model["ignore_merges"] = True
    model["merges"] = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    last = max(model["vocab"].values())
    for i, word in enumerate(("Ġunmergeable", "---")):
        model["vocab"][word] = last + 1 + i
    for token in d["added_tokens"]:
        token["id"] += 2
    for special in d["post_processor"]["processors"][1]["special_tokens"].values():
        special["ids"] = [i + 2 for i in special["ids"]]
    return d


def smol():
    t = train(pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]),
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>"])
    return json.loads(t.to_str())


def gpt2():
    """As old files are, without the keys that came later, and with bytes missing."""
    d = json.loads(train(pre_tokenizers.ByteLevel(add_prefix_space=False),
                         ["<|endoftext|>"]).to_str())
    gone = set("bĠ½")
    kept = [w for w in sorted(d["model"]["vocab"], key=d["model"]["vocab"].get)
            if not set(w) & gone]
    d["model"] = {"dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": False,
                  "vocab": {w: i for i, w in enumerate(kept)},
                  "merges": ["#version: 0.2"] + [" ".join(m) for m in d["model"]["merges"]
                                                 if not set("".join(m)) & gone]}
    d["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    d["added_tokens"][0]["normalized"] = True
    return d


def rules():
    """Every rule that an added token can have."""
    t = train(split(QWEN))
    t.normalizer = normalizers.NFC()
    t.add_tokens([
        added("<a>"), added("<a>b"), added("<a>bcd"), added("word", single_word=True),
        added("wo", lstrip=True), added("<l>", lstrip=True), added("<r>", rstrip=True),
        added("<lr>", lstrip=True, rstrip=True), added("é"), added("éx", normalized=True),
        added("NORM", normalized=True), added("norm", normalized=True, single_word=True),
        added(" sp", rstrip=True), added("世界"), added("\u1100\u1161"), added("  "),
        added("ab cd", lstrip=True, normalized=True), added("the", single_word=True)])
    t.add_special_tokens([added("<s>"), added("</s>", rstrip=True), added("<x y>")])
    t.post_processor = bos_template(t, "<s>", "</s>")
    return json.loads(t.to_str())


GOLDEN = [
    "", " ", "  ", "\n", "\t\n \r\n", "Hello  world\n\n  foo", "I'LL don't we'Ve", "12345 67",
    "a.b(c)\r\n\tx", "  \n \n  y", " 你好，世界！ok", "x=1;\n\n\n", "\u00a0hi \u3000there  ",
    "e\u0301a", "...\n...", "tab\t\tend  ", "_foo_bar$9", "'\u017f s", "🙂🙂 a",
    "\u212b \u2126 \uf900 \uff21", "\u1112\u1161\u11ab\u1100\u1173\u11af", "\u0f73\u0f81\u0301",
    "a\u0315\u0300\u05ae\u0062", "²½Ⅷ①७", "\u180e \u0085x\u2028y\u200b\ufeff", "<|im_start|>user\n",
    "<a>bc<a>b<a>", "sword word wordy word", "x  wo  <l>  y<r>  z  <lr>  e\u0301x NORM norms norm",
    "a" * 100, "-" * 70, "  unmergeable --- unmergeable", "\U0001e4ec\U0002ebf0\U00010d45",
]
WORDS = ("the The word wo norm NORM he's 'ſ 'S 'RE sp ab cd unmergeable light keeper sword-fish "
         "foo_bar x=1; ... --- ==== été e\u0301x \u212b Tiếng 오늘 世界 你好，世界！ が привет "
         "🙂 👩‍🔬 नमस्ते <a> <a>b <l> <r> <lr> <s> </s> <x <|endoftext|> <|im_end|> <think> <|eot_id|> "
         "<|begin_of_text|> <repo_name> <|im_").split(" ")
SPACES = "\t\n\v\f\r   \x85\xa0\u1680\u2003\u200b\u2028\u202f\u3000\u180e\ufeff\x1c"


def odd_texts(n, seed=20240229):
    r = random.Random(seed)
    named = [chr(c) for c in range(1, 0x30000)
             if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
    marks = [c for c in named if unicodedata.category(c)[0] == "M"]

    def part():
        kind = r.random()
        if kind < .4:
            return r.choice(WORDS)
        if kind < .6:
            return "".join(r.choice(SPACES) for _ in range(r.randint(1, 3)))
        if kind < .7:
            return str(r.randrange(10 ** r.randint(1, 7)))
        if kind < .8:
            return "".join(r.choice(marks) for _ in range(r.randint(1, 4)))
        return "".join(r.choice(named) for _ in range(r.randint(1, 3)))

    return ["".join(part() for _ in range(r.randint(1, 9))) for _ in range(n)]


def record(tokenizer, texts):
    """Texts with an odd index get the post-processor's ids."""
    r = random.Random(1)
    n = tokenizer.get_vocab_size()
    zero = tokenizer.token_to_id("Ā")    # byte 0 cannot stand in the tests' JSON
    decoded = []
    for i in range(40):
        ids = [r.randrange(n if i % 2 else 256) for _ in range(r.randint(1, 12))]
        ids = [id for id in ids if id != zero]
        decoded.append([ids, i % 3 == 0,
                        tokenizer.decode(ids, skip_special_tokens=i % 3 == 0)])
    return {"ids": [tokenizer.encode(t, add_special_tokens=i % 2 == 1).ids
                    for i, t in enumerate(texts)],
            "decoded": decoded}


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    texts = GOLDEN + odd_texts(120)
    vectors = {"recorded_with": "tokenizers " + tokenizers.__version__, "texts": texts,
               "tokenizers": {}}
    for style in (qwen, llama, smol, gpt2, rules):
        text = json.dumps(style(), ensure_ascii=False, separators=(",", ":"))
        path = OUT / f"{style.__name__}.json"
        path.write_text(text + "\n")
        vectors["tokenizers"][str(path.relative_to(ROOT))] = record(
            Tokenizer.from_str(text), texts)
    vectors["tokenizers"][str(BUNDLED.relative_to(ROOT))] = record(
        Tokenizer.from_file(str(BUNDLED)), texts)
    (OUT / "vectors.json").write_text(
        json.dumps(vectors, ensure_ascii=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
