"""scripts/evaluate.py against a small server: that it measures what it says, and goes on."""
import json
import random
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from daemon import BACKEND, BINARY, MODEL, ON_CPU, PATIENCE, ROOT, Case

SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))
import evaluate  # noqa: E402
from evaluation_tasks import BLOCK_TOKENS, TASKS, Haystack, Maker, right_of  # noqa: E402

TEXT = (ROOT / "tests" / "texts" / "harbour.txt").read_text() * 4


class Tasks(unittest.TestCase):
    """One token a word: the real tokenizer is the server's affair."""

    def setUp(self):
        self.haystack = Haystack(TEXT, len(TEXT.split()))

    def sample(self, task, seed=1, n_tokens=2500, questions=1):
        return TASKS[task](Maker(self.haystack, str.split, n_tokens, 0.5, seed, questions))

    def test_statements_are_in_the_text(self):
        for task in ("needle", "multikey", "multiquery", "multivalue", "question", "json_facts"):
            with self.subTest(task):
                sample = self.sample(task)
                self.assertEqual(len(sample.questions), 1)
                for ask in sample.questions[0]:
                    for value in ask.expected:
                        self.assertIn(value.split("=")[-1], sample.context)
                        self.assertNotIn(value.split("=")[-1], ask.tail)
                self.assertEqual(sample, self.sample(task))
                self.assertNotEqual(sample, self.sample(task, seed=2))

    def test_several_questions_of_one_text(self):
        for task, n in (("needle", 8), ("border", 8), ("multikey", 8), ("multiquery", 4),
                        ("tracking", 4), ("question", 6), ("multivalue", 1), ("common_words", 1)):
            with self.subTest(task):
                sample = self.sample(task, questions=8)
                self.assertEqual(len({q[0].tail for q in sample.questions}), n)
                text = sample.context if isinstance(sample.context, str) else \
                    " ".join(sample.context)
                for asks in sample.questions:
                    for ask in asks:
                        self.assertTrue(all(e in text for e in ask.expected))
        # One in each part of the text.
        sample = self.sample("needle", questions=8)
        places = [sample.context.index(q[0].expected[0]) / len(sample.context)
                  for q in sample.questions]
        for i, place in enumerate(places):
            self.assertAlmostEqual(place, (i + 0.5) / 8, delta=0.03)
        for asks in self.sample("border", questions=8).questions:
            at = self.sample("border", questions=8).context.index(asks[0].expected[0] + ".")
            self.assertEqual(at % BLOCK_TOKENS, 0)

    def test_needle_is_in_the_middle(self):
        sample = self.sample("needle")
        at = sample.context.index(sample.questions[0][0].expected[0]) / len(sample.context)
        self.assertAlmostEqual(at, 0.5, delta=0.05)

    def test_ending(self):
        """The fact stands in the question, and its last digit is doubled."""
        sample = self.sample("ending", questions=3)
        for ask, in sample.questions:
            value = ask.expected[0]
            self.assertEqual((value[-1], len(value)), (value[-2], 7))
            self.assertEqual(ask.tail.count(value), 1)
            self.assertIn(f"is {value}. What is the ", ask.question)

    def test_border(self):
        """The value begins in one block and ends in the next; here it is one word, the second's."""
        for seed in range(5):
            sample = self.sample("border", seed)
            at = sample.context.index(sample.questions[0][0].expected[0] + ".")
            self.assertEqual(at % BLOCK_TOKENS, 0)

    def test_variables_are_given_before_they_are_used(self):
        sample = self.sample("tracking")
        last = sample.questions[0][0].tail.split()[0]
        first = sample.context.split(f"VAR {last} = ")[1].split(".")[0]
        value = sample.questions[0][0].expected[0]
        self.assertLess(sample.context.index(f"VAR {first} = {value}."),
                        sample.context.index(f"VAR {last} = {first}."))

    def test_words(self):
        for task, n in (("common_words", 10), ("frequent_words", 3)):
            words = self.sample(task).context.rstrip(".").split()
            top = sorted(set(words), key=words.count, reverse=True)[:n]
            self.assertEqual(set(top), set(self.sample(task).questions[0][0].expected), task)

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


    def test_difference(self):
        """Agresti and Min's interval where every text has one question; wider where questions that
        are lost are of one text; never empty."""
        def pairs(n_texts, n_questions, lost):
            full = {(t, q): 1.0 for t in range(n_texts) for q in range(n_questions)}
            return full, {key: float(key not in lost) for key in full}

        full, own = pairs(100, 1, [(i, 0) for i in range(8)])
        mean, low, high = evaluate.difference(own, full)
        self.assertAlmostEqual(mean, 0.08)
        half = 1.96 * (9 - 64 / 102) ** 0.5 / 102
        self.assertAlmostEqual(low, 8 / 102 - half)
        self.assertAlmostEqual(high, 8 / 102 + half)
        same = evaluate.difference(full, full)
        self.assertEqual(same[0], 0)
        self.assertAlmostEqual(same[2], 1.96 / 102)
        self.assertIn("+0.0 (-1.9 to +1.9), open", evaluate.difference_cells(full, full))
        full, own = pairs(400, 1, [])
        self.assertIn("+0.0 (-0.5 to +0.5), within", evaluate.difference_cells(own, full))
        full, own = pairs(10, 10, [(i, 0) for i in range(8)])
        spread = evaluate.difference(own, full)
        full, own = pairs(10, 10, [(0, i) for i in range(8)])
        clustered = evaluate.difference(own, full)
        self.assertEqual(spread[0], clustered[0])
        self.assertGreater(clustered[2] - clustered[1], 2 * (spread[2] - spread[1]))
        full, own = pairs(100, 1, [(i, 0) for i in range(30)])
        self.assertTrue(evaluate.difference_cells(own, full)[1].endswith("beyond"))
        self.assertEqual(evaluate.difference_cells(own, full)[0], "30, 0")


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
        self.assertIn("| 2,048 | full | 2 | 2 | 1.00 (0.34 to 1.00) |", done.stdout)
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

    def test_several_questions(self):
        done = self.evaluate("--questions", "3", "--tasks", "needle,prose", "--out", str(self.out))
        self.assertEqual(done.returncode, 0, done.stderr)
        lines = [json.loads(line) for line in self.out.read_text().splitlines()][1:]
        needles = [x for x in lines if x["task"] == "needle"]
        self.assertEqual([len(x["scores"]) for x in needles], [3] * 4)
        self.assertEqual(len(lines) - len(needles), 2 * 3 * 2)
        for x in needles:
            self.assertEqual([round(3 * d, 6) for d in x["depths"]],
                             [i + x["sample"] for i in range(3)])
        # Six needles at six depths, of which two share a part, and the bundled model finds all.
        depths = done.stdout.split("the needle stands:")[1].split("###")[0]
        row = [line for line in depths.splitlines() if line.startswith("| 2,048 | full |")]
        self.assertEqual([r.count("1.00") for r in row], [4])
        self.assertIn("| 2,048 | full | 2 | 6 | 1.00 (0.61 to 1.00) |", done.stdout)

    def test_options_compared(self):
        """Servers of its own, whose attention differs in an option or two."""
        def evaluate_own(configs, *more):
            return subprocess.run(
                [sys.executable, str(SCRIPTS / "evaluate.py"), "--asynctlsd", BINARY, "--model",
                 MODEL, "--text", str(self.text), "--tokens", "2048", "--samples", "1", "--tasks",
                 "needle", "--configs", configs, *more, "--", "--crossover", "512", "--backend",
                 BACKEND], capture_output=True, text=True, timeout=240 * PATIENCE)

        done = evaluate_own("256,filter=bounds+keep-tokens=256", "--out", str(self.out))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("| 2,048 | filter=bounds+keep-tokens=256 | 1 | 1 | 1.00 (0.21 to 1.00) | 0, 0 "
                      "| +0.0 (-65.3 to +65.3), open |", done.stdout)
        lines = [json.loads(line) for line in self.out.read_text().splitlines()][1:]
        self.assertEqual([(x["config"], x["sparse"]) for x in lines],
                         [("full", False), ("256", True), ("filter=bounds+keep-tokens=256", True)])
        for configs, sentence in (("many", "'many' of --configs"), ("0", "'0' of --configs"),
                                  ("256,256", "has one of them twice"),
                                  ("no-option=1", "the server did not start")):
            done = evaluate_own(configs)
            self.assertEqual(done.returncode, 1)
            self.assertIn(sentence, done.stderr)

    def test_conversation_of_another_server(self):
        done = self.evaluate("--chat", "--as-served", "--tasks", "multiquery")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stdout, r"\| 2,048 \| as served \| 2 \| 2 \| 0\.\d\d \([^|]* \|  \|  \|\n")

    def test_refuses(self):
        for more, sentence in (
                (("--tasks", "needles"), "there is no task 'needles' here"),
                (("--chat", "--tasks", "border"), "there is no task 'border' here"),
                (("--tokens", "100"), "whole numbers of at least 2048"),
                (("--tokens", "9000"), "the text has"), (("--text", "none"), "cannot be read"), (("--quick",), "no server is started"),
                (("--samples", "0"), "at least 1"),
                (("--questions", "9"), "have room for 8 questions, not 9")):
            with self.subTest(more):
                done = self.evaluate(*more)
                self.assertNotEqual(done.returncode, 0)
                self.assertIn(sentence, done.stderr)


if __name__ == "__main__":
    unittest.main()
