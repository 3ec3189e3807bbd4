"""scripts/compare.py: two of our own servers side by side, one of them started by the script."""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from daemon import BACKEND, BINARY, MODEL, NAME, PATIENCE, ROOT, Case

SCRIPT = str(ROOT / "scripts" / "compare.py")
LOAD = ["--concurrency", "2", "--requests", "6", "--prompt-tokens", "uniform(5,60)",
        "--output-tokens", "uniform(2,20)", "--quiet"]
# Never ends: whoever waits for it has to give up or to end it.
SLEEPER = 'sh -c "echo I am asleep; exec sleep 600"'


def compare(*argv, load=LOAD):
    return subprocess.run([sys.executable, SCRIPT, *argv, *load], capture_output=True, text=True,
                          timeout=120 * PATIENCE, env=dict(os.environ, OPENAI_API_KEY=""))


class Compare(Case):
    options = {"max_model_len": 512}

    def setUp(self):
        scratch = tempfile.NamedTemporaryFile(suffix=".json")
        self.addCleanup(scratch.close)
        self.json = scratch.name
        self.here = self.d.url + "/v1"

    def test_one_started_and_one_that_runs(self):
        before = self.d.gauge("generation_tokens_total")
        done = compare("--server", f"asynctlsd={MODEL}", "--server", f"theirs={self.here}",
                       "--program", f"asynctlsd={BINARY}", "--options",
                       f"asynctlsd=--cpu-threads 2 --kv-cache-bytes 256mb --backend {BACKEND}",
                       "--json", self.json, "--goodput", "ttft:600000")
        self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout)
        ours, theirs = json.loads(Path(self.json).read_text())
        self.assertEqual((ours["name"], theirs["name"]), ("asynctlsd", "theirs"))
        self.assertIn("--max-model-len 8192", ours["command"])
        self.assertIsNone(theirs["command"])
        # The same texts, and the same lengths of answers, which were kept to.
        for key in ("prompt_tokens", "output_tokens", "wanted_tokens", "model"):
            self.assertEqual(ours[key], theirs[key], key)
        self.assertEqual(ours["model"], NAME)
        self.assertEqual(ours["output_tokens"], ours["wanted_tokens"])
        self.assertEqual((ours["requests"]["ok"], ours["objections"], theirs["objections"]), (6, [], []))
        # And the token that warmed it up.
        self.assertEqual(self.d.gauge("generation_tokens_total") - before, theirs["output_tokens"] + 1)
        self.assertIn("| | asynctlsd | theirs |\n", done.stdout)
        self.assertIn("| goodput | 100.0 % | 100.0 % |", done.stdout)
        self.assertIn("| comparable | yes | yes |", done.stdout)

    def test_plot(self):
        servers = ["--server", f"ours={self.here}", "--server", f"theirs={self.here}"]
        if subprocess.run([sys.executable, "-c", "import matplotlib"], capture_output=True).returncode:
            done = compare(*servers, "--plot", "/nowhere/plot.png")
            self.assertEqual(done.returncode, 2)
            self.assertIn("--plot needs matplotlib", done.stderr)
            return
        with tempfile.TemporaryDirectory() as folder:
            done = compare(*servers, "--plot", folder + "/plot.png")
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertEqual((Path(folder) / "plot.png").read_bytes()[:8], b"\x89PNG\r\n\x1a\n")

    def test_an_answer_of_another_length_is_told(self):
        """stop ends answers early, as a server does that takes no notice of ignore_eos."""
        done = compare("--server", f"ours={self.here}", "--server", f"theirs={self.here}",
                       "--fields", 'theirs={"stop": ["e", "a", "."], "ignore_eos": true}', "--json", self.json)
        self.assertEqual(done.returncode, 1, done.stderr)
        ours, theirs = json.loads(Path(self.json).read_text())
        self.assertLess(theirs["output_tokens"], ours["output_tokens"])
        self.assertIn("| comparable | yes | NO |", done.stdout)
        self.assertRegex(done.stdout, r"theirs: \d of 6 answers have another length than asked for \(\d+ "
                                      rf"tokens, not {ours['output_tokens']}\)\.\n")

    def test_usage_that_is_not_told(self):
        done = compare("--server", f"ours={self.here}", "--server", f"theirs={self.here}", "--fields",
                       'theirs={"stream_options": null, "ignore_eos": true}', "--json", self.json)
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("theirs: it does not tell usage in 6 of 6 streams", done.stdout)

    def test_requests_that_fail(self):
        """Prompts that are too long for one of them."""
        done = compare("--server", f"asynctlsd={MODEL}", "--server", f"theirs={self.here}",
                       "--program", f"asynctlsd={BINARY}", "--options",
                       f"asynctlsd=--cpu-threads 2 --kv-cache-bytes 256mb --backend {BACKEND}",
                       load=[*LOAD[:4], "--prompt-tokens", "0.5*20+0.5*700", "--output-tokens", "4", "--quiet"])
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertRegex(done.stdout, r"theirs: [1-5] of 6 requests were not answered\.\n")
        self.assertIn("| comparable | yes | NO |", done.stdout)

    def test_a_server_that_does_not_start(self):
        for program, timeout, sentence in (
                (BINARY, "60", "asynctlsd did not start"), ("/nowhere/asynctlsd", "60", "cannot be run"),
                (SLEEPER, "1", "I am asleep")):
            with self.subTest(program):
                done = compare("--server", "asynctlsd=/nowhere", "--program", f"asynctlsd={program}",
                               "--start-timeout", timeout)
                self.assertEqual(done.returncode, 1)
                self.assertIn(sentence, done.stderr)

    def test_bad_input(self):
        for argv, sentence in (
                ([], "the following arguments are required: --server"),
                (["--server", "ours"], "'ours' is not NAME=SOMETHING"),
                (["--server", "ours=/model"], "none of those that can be started: asynctlsd, llama.cpp"),
                (["--server", "a=http://x", "--server", "a=http://y"], "two servers have the same name"),
                (["--server", "a=http://x", "--fields", "b={}"], "--fields b: there is no such server"),
                (["--server", "a=http://x", "--fields", "a=[1]"], "'[1]' is not a JSON object"),
                (["--server", "a=http://x", "--options", "a=-v"], "--options a: that one runs already")):
            with self.subTest(argv):
                done = compare(*argv)
                self.assertEqual(done.returncode, 2)
                self.assertIn(sentence, done.stderr)
        done = compare("--server", f"a={self.here}", load=["--rate", "1"])
        self.assertIn("--requests is needed", done.stderr)
        done = compare("--server", "a=http://127.0.0.1:9/v1")
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, "compare: a at http://127.0.0.1:9/v1: ")
