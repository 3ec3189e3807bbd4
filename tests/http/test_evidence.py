"""scripts/evidence.py, tiny: every stage that needs no GPU, what it leaves, and what is made of it."""
import argparse
import contextlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import unittest
from dataclasses import replace
from pathlib import Path

from daemon import BINARY, PATIENCE, ROOT

SCRIPT = str(ROOT / "scripts" / "evidence.py")
sys.path.insert(0, str(ROOT / "scripts"))
import evidence as evidence_script  # noqa: E402


def evidence(out, *more):
    return subprocess.run([sys.executable, SCRIPT, "--quick", "--out", str(out), "--bin",
                           str(Path(BINARY).parent), "--commit", "test", *more],
                          capture_output=True, text=True, timeout=240 * PATIENCE)


class Evidence(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.scratch = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.scratch.cleanup)
        cls.out = Path(cls.scratch.name) / "out"
        cls.done = evidence(cls.out)

    def stage(self, name, folder=None):
        return json.loads(((folder or self.out) / f"{name}.json").read_text())

    def test_all_stages(self):
        self.assertEqual((self.done.returncode, self.done.stderr), (0, ""), self.done.stdout)
        text = (self.out / "RESULTS.md").read_text()
        self.assertIn(text, self.done.stdout)
        for name in ("accuracy-2048", "choices", "offload"):
            stage = self.stage(name)
            self.assertIsNone(stage["problem"])
            self.assertEqual(stage["commit"], "test")
            self.assertGreater(stage["seconds"], 0)
            self.assertIn(f"## {stage['heading']}\n\n    ", text)
            for command in stage["commands"]:
                self.assertIn(f"    {command}\n", text)
            self.assertIn(f"{stage['machine']}, commit test", text)
        # The bundled model finds a needle with full attention, whatever the machine.
        self.assertIn("| 2,048 | full | 1 | 2 | 1.00 (0.34 to 1.00) |", text)
        for row in ("| 2,048 | published |", "| 2,048 | token-index=channels+keep-tokens=256 |"):
            self.assertIn(row, text)
        self.assertNotIn("no step was sparse", text)
        self.assertIn("host tier", text.split("## Offloading")[1])

    def test_what_is_there_is_not_run_again(self):
        before = {p.name: p.read_bytes() for p in self.out.glob("*.json*")}
        again = evidence(self.out)
        self.assertEqual(again.returncode, 0, again.stderr)
        self.assertEqual(again.stdout.count(" is there\n"), 3)
        self.assertEqual({p.name: p.read_bytes() for p in self.out.glob("*.json*")}, before)

    def test_merged(self):
        """Stages of two folders in one document; of one that both have the later counts."""
        with tempfile.TemporaryDirectory() as scratch:
            a, b, c = (Path(scratch) / n for n in "abc")
            for folder, name in ((a, "choices"), (a, "offload"), (b, "choices")):
                folder.mkdir(exist_ok=True)
                shutil.copy(self.out / f"{name}.json", folder)
            later = dict(self.stage("choices"), commit="later")
            later["ended"] += 1
            (b / "choices.json").write_text(json.dumps(later))
            done = evidence(c, "--stages", "", "--merge", str(b), "--merge", str(a))
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            text = (c / "RESULTS.md").read_text()
            self.assertIn("## Choices\n", text)
            self.assertIn("## Offloading\n", text)
            self.assertNotIn("## Accuracy\n", text)
            self.assertIn("commit later", text)
            self.assertEqual(text.count("commit test"), 1)

    def test_a_stage_that_fails_is_told_and_run_again(self):
        with tempfile.TemporaryDirectory() as scratch:
            out, run = Path(scratch), ("--stages", "offload")
            failed = evidence(out, *run, "--bin", "/nowhere")
            self.assertEqual(failed.returncode, 1)
            self.assertIn("/nowhere/asynctlsd", self.stage("offload", out)["problem"])
            self.assertIn("**offload: ", (out / "RESULTS.md").read_text())
            mended = evidence(out, *run)
            self.assertEqual((mended.returncode, mended.stderr), (0, ""), mended.stdout)
            self.assertNotIn("**", (out / "RESULTS.md").read_text())
            ended = self.stage("offload", out)["ended"]
            self.assertEqual(evidence(out, *run, "--again").returncode, 0)
            self.assertGreater(self.stage("offload", out)["ended"], ended)

    def test_a_stage_that_takes_too_long(self):
        """What it answered in time counts, and it goes on from there."""
        with tempfile.TemporaryDirectory() as scratch:
            out, name = Path(scratch), "accuracy-2048"
            whole = (self.out / f"{name}.jsonl").read_text().splitlines(keepends=True)
            (out / f"{name}.jsonl").write_text("".join(whole[:-1]))
            shutil.copy(self.out / f"{name}.txt", out)
            args = argparse.Namespace(out=out, bin=Path(BINARY).parent, models=None, quick=True)
            run, stage = evidence_script.Run(args), evidence_script.stages(True)[name]
            with contextlib.redirect_stdout(io.StringIO()):
                done = evidence_script.perform(run, name, replace(stage, seconds=0), "test", "here")
            self.assertFalse(done)
            cut = self.stage(name, out)
            self.assertEqual(cut["problem"], "not done after 0 s")
            self.assertEqual(len(cut["result"]["lines"]), len(whole) - 2)
            self.assertEqual(evidence(out, "--stages", name).returncode, 0)
            self.assertEqual(len(self.stage(name, out)["result"]["lines"]), len(whole) - 1)

    def test_bad_input(self):
        for more, sentence in ((("--stages", "speed"), "there is no stage speed; there are accuracy-2048"),
                               (("--merge", "/nowhere"), "--merge /nowhere is no folder")):
            done = evidence(self.out, *more)
            self.assertEqual(done.returncode, 2)
            self.assertIn(sentence, done.stderr)


if __name__ == "__main__":
    unittest.main()
