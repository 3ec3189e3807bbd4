"""scripts/evaluate.py against a small server: that it measures what it says, and goes on."""
import json
import random
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from daemon import ON_CPU, PATIENCE, ROOT, Case

SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))
import evaluate  # noqa: E402
from evaluation_tasks import BLOCK_TOKENS, TASKS, Haystack, Maker, right_of  # noqa: E402

TEXT = (ROOT / "tests" / "texts" / "harbour.txt").read_text() * 4


class Tasks(unittest.TestCase):
    """One token a word: the real tokenizer is the server's affair."""

    def setUp(self):
        self.haystack = Haystack(TEXT, len(TEXT.split()))

    def sample(self, task, seed=1, n_tokens=2500):
        return TASKS[task](Maker(self.haystack, str.split, n_tokens, 0.5, seed))

    def test_statements_are_in_the_text(self):
        for task in ("needle", "multikey", "multiquery", "multivalue", "question", "json_facts"):
            with self.subTest(task):
                sample = self.sample(task)
                for ask in sample.asks:
                    for value in ask.expected:
                        self.assertIn(value.split("=")[-1], sample.context)
                        self.assertNotIn(value.split("=")[-1], ask.tail)
                self.assertEqual(sample, self.sample(task))
                self.assertNotEqual(sample, self.sample(task, seed=2))

    def test_needle_is_in_the_middle(self):
        sample = self.sample("needle")
        at = sample.context.index(sample.asks[0].expected[0]) / len(sample.context)
        self.assertAlmostEqual(at, 0.5, delta=0.05)

    def test_border(self):
        """The value begins in one block and ends in the next; here it is one word, the second's."""
        for seed in range(5):
            sample = self.sample("border", seed)
            at = sample.context.index(sample.asks[0].expected[0] + ".")
            self.assertEqual(at % BLOCK_TOKENS, 0)

    def test_variables_are_given_before_they_are_used(self):
        sample = self.sample("tracking")
        last = sample.asks[0].tail.split()[0]
        first = sample.context.split(f"VAR {last} = ")[1].split(".")[0]
        value = sample.asks[0].expected[0]
        self.assertLess(sample.context.index(f"VAR {first} = {value}."),
                        sample.context.index(f"VAR {last} = {first}."))

    def test_words(self):
        for task, n in (("common_words", 10), ("frequent_words", 3)):
            words = self.sample(task).context.rstrip(".").split()
            top = sorted(set(words), key=words.count, reverse=True)[:n]
            self.assertEqual(set(top), set(self.sample(task).asks[0].expected), task)

    def test_right(self):
        for task, expected, answer, right in (
                ("needle", ["1234567"], " 1234567. The", 1),
                ("needle", ["1234567"], " 12345678", 0),
                ("multivalue", ["11", "22"], "22, 33", 1),
                ("question", ["in the Oak"], "In the oak.", 1),
                ("json_facts", ["a b=1", "c d=2"], 'a b": "1", "the c d": 3}', 1),
                ("json_facts", ["a b=1", "c d=2"], '{"c d": 2, "a b": "1"}', 2)):
            self.assertEqual(right_of(task, expected, answer), right, (task, answer))

    def test_wilson(self):
        low, high = evaluate.wilson(8, 10)
        self.assertAlmostEqual(low, 0.4902, places=3)
        self.assertAlmostEqual(high, 0.9433, places=3)
        self.assertEqual(evaluate.wilson(0, 5)[0], 0)
        self.assertEqual(evaluate.wilson(5, 5)[1], 1)


class Evaluate(Case):
    options = {"crossover": 512, "keep_tokens": 128, "keep_blocks": 8, "recent_tokens": 16}

    def setUp(self):
        self.scratch = tempfile.TemporaryDirectory()
        self.addCleanup(self.scratch.cleanup)
        self.text, self.out = (Path(self.scratch.name) / n for n in ("text.txt", "out.jsonl"))
        self.text.write_text(TEXT)

    def evaluate(self, *more):
        return subprocess.run(
            [sys.executable, str(SCRIPTS / "evaluate.py"), "--url", self.d.url, "--text",
             str(self.text), "--tokens", "2048", "--samples", "2", "--parallel", "2", *more],
            capture_output=True, text=True, timeout=240 * PATIENCE)

    def test_next_token(self):
        """What a forced decode step says is what an echoed prompt says, with full attention."""
        client = evaluate.Client(self.d.url)
        ids = client.tokenise(TEXT)[:1500]
        echo = self.d.complete(prompt=ids, max_tokens=0, echo=True, logprobs=0)
        want = echo["choices"][0]["logprobs"]["token_logprobs"]
        differs = 0
        for end in random.Random(1).sample(range(1000, 1500), 6):
            if ids[end] == ids[end - 1]:
                continue
            full, _ = evaluate.next_token(client, ids[:end + 1], "full")
            sparse, _ = evaluate.next_token(client, ids[:end + 1], "sparse")
            self.assertAlmostEqual(full, want[end], delta=1e-4 if ON_CPU else 0.2)
            differs += abs(sparse - full) > 1e-3
        self.assertGreater(differs, 0)

    def test_goes_on(self):
        run = ("--tasks", "needle,prose,recall", "--out", str(self.out))
        done = self.evaluate(*run)
        self.assertEqual(done.returncode, 0, done.stderr)
        lines = [json.loads(line) for line in self.out.read_text().splitlines()]
        self.assertEqual(len(lines), 1 + 3 * 2 * 2)
        self.assertTrue(all(x["sparse"] == (x["config"] == "sparse") for x in lines[1:]))
        # The bundled model finds a needle with full attention, whatever the machine.
        self.assertIn("| 2,048 | 2 | 1.00 (0.34 to 1.00) |", done.stdout)
        for task in ("needle", "prose", "recall"):
            self.assertIn(f"### {task}\n", done.stdout)
        self.assertNotIn("not measured", done.stdout)

        # The last line is lost and one is cut: only those are asked for again.
        kept = self.out.read_text().splitlines(keepends=True)
        self.out.write_text("".join(kept[:-2]) + kept[-2][:20])
        again = self.evaluate(*run)
        self.assertEqual(again.returncode, 0, again.stderr)
        self.assertEqual(again.stderr.count("evaluate: "), 1, again.stderr)
        self.assertEqual(len(self.out.read_text().splitlines()), len(lines))
        if ON_CPU:
            self.assertEqual(again.stdout, done.stdout)

        other = self.evaluate(*run, "--seed", "2")
        self.assertNotEqual(other.returncode, 0)
        self.assertIn("has results of other settings", other.stderr)
        other = self.evaluate(*run[:-1], str(self.text))
        self.assertIn("is not a file of results", other.stderr)

    def test_conversation_of_another_server(self):
        done = self.evaluate("--chat", "--as-served", "--tasks", "multiquery")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("| tokens | samples | as served |", done.stdout)

    def test_refuses(self):
        for more, sentence in (
                (("--tasks", "needles"), "there is no task 'needles' here"),
                (("--chat", "--tasks", "border"), "there is no task 'border' here"),
                (("--tokens", "100"), "whole numbers of at least 2048"),
                (("--tokens", "9000"), "the text has"), (("--text", "none"), "cannot be read"), (("--quick",), "no server is started"),
                (("--samples", "0"), "at least 1")):
            with self.subTest(more):
                done = self.evaluate(*more)
                self.assertNotEqual(done.returncode, 0)
                self.assertIn(sentence, done.stderr)


if __name__ == "__main__":
    unittest.main()
