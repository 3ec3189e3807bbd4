"""The daemon on a GPU: a device that breaks, and starts that are refused."""
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.error
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "http"))
from daemon import BINARY, Daemon, read_head, read_response, read_to_end     # noqa: E402

PRELOAD = os.environ.get("FAILING_CUDA_SO", str(Path(BINARY).parent / "failing_cuda.so"))
LONG = {"prompt": "The old house", "max_tokens": 20000, "ignore_eos": True, "temperature": 0}


def gpus():
    n = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    return n.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(n)) == 0 else 0


def setUpModule():
    if not gpus():
        raise unittest.SkipTest("no GPU")


def documents(chunked):
    """What the events of a chunked stream hold."""
    lines = chunked.decode().replace("\r", "").split("\n")
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


class Failure(unittest.TestCase):
    def test_a_device_that_breaks(self):
        self.start_and_break("cuda:0")

    @unittest.skipUnless(gpus() > 1, "one GPU")
    def test_one_of_several_devices_that_breaks(self):
        self.start_and_break("cuda:all")

    def start_and_break(self, backend):
        with tempfile.TemporaryDirectory() as folder:
            switch = Path(folder) / "broken"
            d = Daemon(backend=backend, env={"LD_PRELOAD": PRELOAD, "FAILING_CUDA": str(switch)})
            try:
                self.break_device(d, switch)
            finally:
                d.kill()

    def break_device(self, d, switch):
        self.assertIn('device="cuda:0', list(d.metrics()["asynctlsd:build_info"])[0])
        stream = d.post_raw(dict(LONG, stream=True))
        self.assertEqual(read_head(stream)[0], 200)
        whole = d.post_raw(LONG)
        self.assertTrue(d.wait_until(lambda: d.gauge("num_requests_running") == 2))
        self.assertEqual(d.request("GET", "/health")[0], 200)
        switch.touch()

        status, headers, body = read_response(whole)
        self.assertEqual(status, 500, body)
        self.assertEqual(headers.get("x-should-retry"), "false")
        error = json.loads(body)["error"]
        self.assertEqual(error["type"], "server_error")
        # As long as it answers.
        health = []
        while d.process.poll() is None:
            try:
                health.append(d.request("GET", "/health", timeout=5)[0])
            except (OSError, urllib.error.URLError):
                break
            time.sleep(0.02)
        self.assertEqual(set(health), {503})
        events = documents(read_to_end(stream))
        self.assertEqual(events[-1], "[DONE]")
        self.assertIn("error", json.loads(events[-2]))
        self.assertIn("choices", json.loads(events[-3]))
        self.assertEqual(d.wait(), 3)
        self.assertRegex(d.log_text(), r" E .*(stream_sync|graph_launch|stream_copy) failed on cuda:\d")
        print(f"device failure: {len(health)} answers of /health before the end")


class Start(unittest.TestCase):
    def assert_refused(self, want, env=None, **options):
        """Exit status 1 and one sentence; nothing is served, on a CPU least of all."""
        d = Daemon(wait=False, env=env, **options)
        self.assertEqual(d.wait(60), 1, d.log_text())
        errors = [line for line in d.log_text().splitlines() if re.match(r"\S+ E ", line)]
        self.assertEqual(len(errors), 1, d.log_text())
        self.assertIn(want, errors[0])
        self.assertNotIn("cpu:", d.log_text())
        self.assertEqual(d.out, [])

    def test_a_gpu_that_is_not_there(self):
        self.assert_refused("cuda:99: this machine has", backend="cuda:99")
        self.assert_refused("cuda:0", backend="cuda:0", env={"CUDA_VISIBLE_DEVICES": ""})

    def test_too_little_memory(self):
        self.assert_refused("more than the device has", backend="cuda:0", kv_cache_bytes="4096gb")
        # The smallest share there is, all of it in use by somebody else.
        with Daemon(backend="cuda:0", kv_cache_bytes="12gb"):
            self.assert_refused("gpu-memory-fraction allows", backend="cuda:0",
                                gpu_memory_fraction="0.05", kv_cache_bytes="0")

    def test_auto_takes_the_gpu(self):
        with Daemon(backend="auto") as d:
            info, = d.metrics()["asynctlsd:build_info"]
            self.assertIn('device="cuda:0', info)

    def test_all_of_them(self):
        with Daemon(backend="cuda:all") as d:
            infos = d.metrics()["asynctlsd:build_info"]
            self.assertEqual(len(infos), gpus())
            for i, info in enumerate(infos):
                self.assertIn(f'device="cuda:{i}: ', info)

    @unittest.skipUnless(gpus() > 1, "one GPU")
    def test_the_first_gpu_is_left_alone(self):
        """No context of ours on it, which takes some hundred MB: from start to end."""
        def used():
            out = subprocess.run(["nvidia-smi", "--id=0", "--query-gpu=memory.used",
                                  "--format=csv,noheader,nounits"], capture_output=True, text=True)
            return int(out.stdout)
        before = used()
        with Daemon(backend="cuda:1", host_kv_bytes="64mb") as d:
            d.complete(prompt="It was", max_tokens=20)
            self.assertLess(used() - before, 64)

    def test_progress_of_loading(self):
        d = Daemon(wait=False, backend="cuda:0")
        seen = []
        try:
            self.assertTrue(d.wait_until(lambda: "listening on" in d.log_text()))
            d.url = f"http://127.0.0.1:{re.search(r'listening on .* port ([0-9]+)', d.log_text())[1]}"
            while (answer := d.request("GET", "/ready"))[0] == 503:
                seen.append(json.loads(answer[2])["error"])
                time.sleep(0.001)
            self.assertEqual(answer[0], 200)
            self.assertEqual({e["code"] for e in seen} - {"loading"}, set())
            of = [re.search(r"(\d+) of (\d+) MB of weights are on the device", e["message"]) for e in seen]
            done = [int(m[1]) for m in of if m]
            self.assertEqual(done, sorted(done))
            print(f"loading: {len(seen)} answers of /ready, {len(done)} with progress")
        finally:
            d.kill()


if __name__ == "__main__":
    unittest.main()
