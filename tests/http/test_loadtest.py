"""scripts/loadtest.py against the server: what it reports is what the server counted."""
import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from daemon import NAME, PATIENCE, ROOT, Case, Daemon

SCRIPT = str(ROOT / "scripts" / "loadtest.py")
SHORT = ["--prompt-tokens", "0.5*uniform(5,60)+0.5*lognormal(60,0.5)", "--output-tokens", "uniform(2,40)",
         "--ignore-eos", "--quiet"]


def loadtest(*argv, python=sys.executable):
    return subprocess.run([python, SCRIPT, *map(str, argv)], capture_output=True, text=True,
                          timeout=120 * PATIENCE, env=dict(os.environ, OPENAI_API_KEY=""))


class Load(Case):
    def load(self, *argv):
        """(report, what the server's counters grew by, the table), once all is quiet."""
        before = self.counters()
        with tempfile.NamedTemporaryFile(suffix=".json") as f:
            done = loadtest("--url", self.d.url + "/v1", "--json", f.name, *argv)
            self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout)
            report = json.loads(Path(f.name).read_text())
        self.d.wait_idle()
        after = self.counters()
        return report, {k: after[k] - before[k] for k in after}, done.stdout

    def counters(self):
        m = self.d.metrics()
        names = ("prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_sum",
                 "time_to_first_token_seconds_count", "e2e_request_latency_seconds_sum")
        values = {name: sum(m["asynctlsd:" + name].values()) for name in names}
        for labels, value in m["asynctlsd:request_success_total"].items():
            values[labels.split('finished_reason="')[1].rstrip('"')] = value
        return values

    def assert_ordered(self, report):
        for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
            s = report[name]
            steps = [s["p50"], s["p90"], s["p95"], s["p99"], s["max"]]
            self.assertEqual(steps, sorted(steps), name)
            self.assertLessEqual(s["mean"], s["max"])
            self.assertGreaterEqual(s["p50"], 0)
        self.assertLess(report["ttft_ms"]["max"], report["e2e_ms"]["max"])

    def test_closed_loop_counts_what_the_server_counts(self):
        report, grew, table = self.load("--concurrency", 4, "--duration", 2, "--goodput", "ttft:600000",
                                        "--goodput", "e2e:0.001", *SHORT)
        n = report["requests"]["ok"]
        self.assertGreater(n, 4)
        self.assertEqual(report["requests"],
                         {"open": 0, "ok": n, "cancelled": 0, "rejected": 0, "failed": 0})
        # And the one that asks how long words are.
        self.assertEqual(grew["length"], n + 1)
        self.assertEqual(grew["time_to_first_token_seconds_count"], n + 1)
        self.assertEqual(grew["generation_tokens_total"], report["output_tokens"] + 1)
        self.assertGreater(grew["prompt_tokens_total"], report["prompt_tokens"])
        self.assertAlmostEqual(report["output_tokens_per_s"] * report["seconds"], report["output_tokens"],
                               delta=1e-6 * report["output_tokens"])
        # A client sees a token after the server has it.
        self.assertGreaterEqual(report["ttft_ms"]["mean"] * n / 1000 + 1 * PATIENCE,
                                grew["time_to_first_token_seconds_sum"])
        self.assertGreater(report["e2e_ms"]["mean"] * n / 1000 + 1 * PATIENCE,
                           grew["e2e_request_latency_seconds_sum"])
        # Choices of a single token have no TPOT; there is none here.  The goal is out of reach.
        self.assertEqual(report["tpot_ms"]["n"], n)
        self.assertEqual(report["goodput"]["share"], 0)
        self.assertEqual(report["model"], NAME)
        self.assert_ordered(report)
        for word in (f"{n} done", "TTFT", "TPOT", "ITL", "E2E", "goodput"):
            self.assertIn(word, table)

    def test_poisson_with_cancels(self):
        report, grew, _ = self.load("--rate", 20, "--requests", 40, "--cancel", 0.5, "--api", "chat", *SHORT)
        counts = report["requests"]
        self.assertEqual(counts["ok"] + counts["cancelled"], 40)
        self.assertGreater(counts["cancelled"], 5)
        self.assertGreater(counts["ok"], 5)
        # One that is cancelled may be finished by then, or not yet have reached the engine.
        self.assertLessEqual(grew["abort"], counts["cancelled"])
        self.assertGreaterEqual(grew["length"], counts["ok"] + 1)
        self.assertLessEqual(grew["length"] + grew["abort"], 41)
        self.assertGreater(grew["abort"], 0)
        self.assert_ordered(report)

    def test_lengths_come_out(self):
        with tempfile.NamedTemporaryFile("w") as f:
            f.write("7\n7\n7\n")
            f.flush()
            report, _, _ = self.load("--concurrency", 2, "--requests", 6, "--prompt-tokens", 300,
                                     "--shared-prefix", 200, "--output-tokens", f"file({f.name})",
                                     "--ignore-eos", "--quiet")
        self.assertEqual(report["output_tokens"], 6 * 7)
        self.assertAlmostEqual(report["prompt_tokens"] / 6, 300, delta=45)
        self.assertGreater(self.d.gauge("prefix_cache_hits_total"), 3 * 128)

    def test_plot(self):
        if subprocess.run([sys.executable, "-c", "import matplotlib"], capture_output=True).returncode:
            done = loadtest("--concurrency", 1, "--requests", 1, "--plot", "/nowhere/plot.png")
            self.assertEqual(done.returncode, 2)
            self.assertIn("--plot needs matplotlib", done.stderr)
            return
        with tempfile.TemporaryDirectory() as folder:
            self.load("--concurrency", 2, "--requests", 6, "--plot", folder + "/plot.png", *SHORT)
            self.assertEqual((Path(folder) / "plot.png").read_bytes()[:8], b"\x89PNG\r\n\x1a\n")

    def test_bad_input(self):
        url = ["--url", self.d.url + "/v1"]
        cases = [([], "one of the arguments --concurrency --rate is required"),
                 (["--rate", "1"], "one of --requests and --duration is needed"),
                 (["--rate", "1", "--concurrency", "1"], "not allowed with"),
                 (["--rate", "-1", "--requests", "1"], "-1 is not more than 0"),
                 (["--rate", "1", "--requests", "1", "--cancel", "2"], "2 is not between 0 and 1"),
                 (["--rate", "1", "--requests", "1", "--prompt-tokens", "many"], "'many' is not a number"),
                 (["--rate", "1", "--requests", "1", "--prompt-tokens", "uniform(9,3)"], "no such lengths"),
                 (["--rate", "1", "--requests", "1", "--prompt-tokens", "file(/nowhere)"], "/nowhere"),
                 (["--rate", "1", "--requests", "1", "--goodput", "speed:3"], "'speed:3' is not ttft:MS"),
                 (["--rate", "1", "--requests", "1", "--extra", "[1]"], "'[1]' is not a JSON object")]
        for argv, want in cases:
            done = loadtest(*url, *argv)
            self.assertEqual(done.returncode, 2, argv)
            self.assertIn(want, done.stderr)
        for address in ("ftp://x", "127.0.0.1:8000"):
            done = loadtest("--url", address, "--rate", 1, "--requests", 1)
            self.assertEqual((done.returncode, done.stderr),
                             (1, f"loadtest: --url is '{address}', not http://host:port/path\n"))


class Refusals(unittest.TestCase):
    def test_a_full_queue_and_a_wrong_key(self):
        with Daemon(max_waiting="1", max_running="1", max_choices="1", api_key="k") as d:
            done = loadtest("--url", d.url + "/v1", "--rate", 1, "--requests", 1)
            self.assertEqual(done.returncode, 1)
            self.assertRegex(done.stderr, r"^loadtest: .*/v1: 401: .*invalid_api_key")
            with tempfile.NamedTemporaryFile() as f:
                done = loadtest("--url", d.url + "/v1", "--key", "k", "--rate", 100, "--requests", 20,
                                "--json", f.name, "--prompt-tokens", 20, "--output-tokens", 100,
                                "--ignore-eos", "--quiet")
                counts = json.loads(Path(f.name).read_text())["requests"]
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(counts["ok"] + counts["rejected"], 20)
        self.assertGreater(counts["rejected"], 0)
        self.assertIn("rate_limit_exceeded", done.stdout)

    def test_nobody_is_there(self):
        done = loadtest("--url", "http://127.0.0.1:9/v1", "--rate", 1, "--requests", 1)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r"^loadtest: http://127.0.0.1:9/v1: .*\n$")


if __name__ == "__main__":
    unittest.main()
