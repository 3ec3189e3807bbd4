"""The page at /: its headers, who may use it, and what it does in a browser.

PAGE_SCREENSHOT=docs/page.png makes the picture that README shows anew."""
import os
import re
import subprocess
import sys
import time
import unittest
from pathlib import Path

from browser import PROGRAM, Browser
from daemon import NAME, ROOT, Case, Daemon

IS_DONE = "document.querySelector('#log .note') && !document.getElementById('send').disabled"


class Headers(Case):
    def get(self):
        status, headers, body = self.d.request("GET", "/")
        self.assertEqual(status, 200)
        return headers, body.decode()

    def test_policy(self):
        headers, body = self.get()
        self.assertEqual(headers["Content-Type"], "text/html; charset=utf-8")
        self.assertEqual(headers["X-Content-Type-Options"], "nosniff")
        self.assertEqual(headers["Cache-Control"], "no-store")
        policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
        self.assertEqual(policy["default-src"], "'none'")
        self.assertEqual(policy["frame-ancestors"], "'none'")
        self.assertNotIn("unsafe", headers["Content-Security-Policy"])
        nonce = re.fullmatch(r"'nonce-([0-9a-f]{24})'", policy["script-src"])[1]
        self.assertEqual(policy["style-src"], f"'nonce-{nonce}'")
        self.assertEqual(re.findall(r'nonce="(.*?)"', body), [nonce, nonce])
        self.assertTrue(body.startswith("<!doctype html>") and body.endswith("</html>\n"))

    def test_another_number_each_time(self):
        self.assertNotEqual(self.get()[1], self.get()[1])

    def test_loads_nothing_from_elsewhere(self):
        body = self.get()[1]
        self.assertEqual(re.findall(r"https?://", body), [])
        self.assertEqual(re.findall(r"\s(?:src|on[a-z]+|style)=", body), [])
        self.assertNotIn("innerHTML", body)

    def test_methods(self):
        status, headers, body = self.d.request("HEAD", "/")
        self.assertEqual((status, body), (200, b""))
        status, headers, body = self.d.request("POST", "/", {})
        self.assert_error(status, body, 405)
        self.assertEqual(headers["Allow"], "GET, HEAD")

    def ask(self, origin, host):
        return self.d.request("POST", "/v1/completions", {"prompt": "The", "max_tokens": 1},
                              {"Origin": origin, "Host": host})

    def test_own_page_may_ask(self):
        own = f"127.0.0.1:{self.d.port}"
        status, headers, body = self.ask("http://" + own, own)
        self.assertEqual(status, 200, body)
        self.assertNotIn("Access-Control-Allow-Origin", headers)

    def test_other_pages_may_not(self):
        port = self.d.port
        for origin, host in ((f"http://127.0.0.1:{port + 1}", f"127.0.0.1:{port}"),
                             (f"http://evil.example:{port}", f"evil.example:{port}"),
                             ("null", f"127.0.0.1:{port}")):
            status, _, body = self.ask(origin, host)
            self.assert_error(status, body, 403, "origin_not_allowed")


class Key(unittest.TestCase):
    def test_page_is_public_what_it_asks_for_is_not(self):
        with Daemon(api_key="secret") as d:
            self.assertEqual(d.request("GET", "/")[0], 200)
            for path in ("/v1/models", "/metrics"):
                self.assertEqual(d.request("GET", path)[0], 401)


@unittest.skipUnless(PROGRAM, "no chromium")
class InBrowser(unittest.TestCase):
    def open(self, b, d):
        b.call("Page.navigate", url=d.url + "/")
        b.wait_for("document.getElementById('form') !== null")

    def send(self, b, text):
        b.evaluate(f"document.getElementById('prompt').value = {text!r};"
                   "document.getElementById('form').requestSubmit()")

    def text(self, b, selector):
        return b.evaluate(f"document.querySelector({selector!r}).textContent")

    def test_chat_and_gauges(self):
        with Daemon(host_kv_bytes="256mb") as d, Browser() as b:
            self.open(b, d)
            b.wait_for("!document.getElementById('send').disabled")
            self.assertEqual(self.text(b, "#state"), "ready")
            self.assertEqual(self.text(b, "#model"), NAME)
            self.assertEqual(self.text(b, "#talk-title"), "Chat")
            b.evaluate("document.getElementById('temperature').value = '0'")
            self.send(b, "Tell me of the old house by the river.")
            b.wait_for(IS_DONE)
            answer, note = self.text(b, "#log .answer"), self.text(b, "#log .note")
            self.assertEqual(int(re.search(r"(\d+) out", note)[1]), d.gauge("generation_tokens_total"))
            self.assertRegex(note, r"first after \d+ ms, [0-9.]+ tokens/s")
            # The next question has the first one and its answer before it.
            self.send(b, "And then?")
            b.wait_for("document.querySelectorAll('#log .note').length === 2")
            self.assertEqual(b.evaluate("turns.slice(0, 3).map(t => t.role).join()"), "user,assistant,user")
            self.assertEqual(b.evaluate("turns[1].content"), answer)
            self.assertFalse(b.evaluate("document.getElementById('host').hidden"))
            b.evaluate("document.getElementById('clear').click()")
            self.assertEqual(b.evaluate("turns.length + document.querySelectorAll('.turn').length"), 0)
            self.assertEqual(b.complaints(), [])

    def test_completion_where_there_is_no_chat(self):
        with Daemon(chat_format="none") as d, Browser() as b:
            self.open(b, d)
            b.wait_for("!document.getElementById('send').disabled")
            self.assertEqual(self.text(b, "#talk-title"), "Completion")
            self.assertTrue(b.evaluate("document.getElementById('host').hidden"))
            self.send(b, "The old house")
            b.wait_for(IS_DONE)
            self.assertGreater(len(self.text(b, "#log .answer")), 20)

    def test_it_streams_until_stopped(self):
        with Daemon() as d, Browser() as b:
            self.open(b, d)
            b.wait_for("!document.getElementById('send').disabled")
            b.evaluate("document.getElementById('max-tokens').value = '20000';"
                       "document.getElementById('temperature').value = '0'; chat = false")
            self.send(b, "The old house")
            b.wait_for("document.querySelector('#log .answer')")
            b.wait_for("Number(document.getElementById('rate').textContent) > 0")
            b.wait_for("document.getElementById('running').textContent === '1'")
            b.wait_for("/[1-9]/.test(document.querySelector('#pool .text').textContent)")
            b.evaluate("document.getElementById('stop').click()")
            b.wait_for(IS_DONE)
            self.assertEqual(self.text(b, "#log .note"), "stopped")
            d.wait_idle()
            self.assertEqual(d.metrics()["asynctlsd:request_success_total"]
                             [f'model_name="{NAME}",engine="0",finished_reason="abort"'], 1)

    @unittest.skipUnless(os.environ.get("PAGE_SCREENSHOT"), "only with PAGE_SCREENSHOT")
    def test_picture(self):
        with Daemon(host_kv_bytes="96mb", kv_cache_bytes="64mb") as d, Browser(height=580) as b:
            self.open(b, d)
            b.wait_for("!document.getElementById('send').disabled")
            load = subprocess.Popen([sys.executable, str(ROOT / "scripts" / "loadtest.py"), "--quiet",
                                     "--url", d.url + "/v1", "--concurrency", "4", "--duration", "45",
                                     "--prompt-tokens", "lognormal(200,0.8)"], stdout=subprocess.DEVNULL)
            b.evaluate("document.getElementById('max-tokens').value = '130';"
                       "document.getElementById('temperature').value = '0.7'")
            time.sleep(30)                      # for a curve to see
            self.send(b, "Tell me of the old house by the river.")
            b.wait_for(IS_DONE)
            Path(os.environ["PAGE_SCREENSHOT"]).write_bytes(b.screenshot())
            load.wait()

    def test_key_is_asked_for(self):
        with Daemon(api_key="secret") as d, Browser() as b:
            self.open(b, d)
            b.wait_for("!document.getElementById('ask-key').hidden")
            self.assertTrue(b.evaluate("document.getElementById('key-wrong').hidden"))
            for key, wrong in (("guess", True), ("secret", False)):
                b.evaluate(f"document.getElementById('key').value = {key!r};"
                           "document.getElementById('key-form').requestSubmit()")
                if wrong:
                    b.wait_for("!document.getElementById('key-wrong').hidden")
            b.wait_for("!document.getElementById('send').disabled")
            self.assertTrue(b.evaluate("document.getElementById('ask-key').hidden"))
            self.send(b, "Good evening")
            b.wait_for(IS_DONE)
            self.assertTrue(b.evaluate("document.querySelector('#log .error') === null"))

    def test_refusals_are_shown_as_text(self):
        with Daemon() as d, Browser() as b:
            self.open(b, d)
            b.wait_for("!document.getElementById('send').disabled")
            b.evaluate("document.getElementById('max-tokens').value = '90000000'")
            self.send(b, "<img src=x onerror=alert(1)>")
            b.wait_for("document.querySelector('#log .error')")
            self.assertIn("maximum context length", self.text(b, "#log .error"))
            self.assertEqual(self.text(b, "#log .user"), "<img src=x onerror=alert(1)>")
            self.assertEqual(b.evaluate("turns.length"), 0)
            self.assertEqual(b.evaluate("document.images.length"), 0)


if __name__ == "__main__":
    unittest.main()
