"""/debug/state: who may ask, and that it tells what is going on."""
import json
import unittest

from daemon import Case, Daemon

KEY = {"Authorization": "Bearer alpha"}
LONG = {"prompt": "It was", "max_tokens": 20000, "ignore_eos": True, "stream": True}
SECRET = "a text nobody else should read"


def state(d):
    status, headers, body = d.request("GET", "/debug/state", headers=KEY)
    assert status == 200 and headers["Content-Type"] == "application/json", (status, body)
    return json.loads(body)


def ask(d, request_id, **body):
    """A socket on which a completion has been asked for."""
    s = d.connect()
    data = json.dumps(dict(LONG, **body)).encode()
    s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer alpha\r\n"
              b"x-request-id: %s\r\nContent-Length: %d\r\n\r\n" % (request_id, len(data)) + data)
    return s


class State(Case):
    options = {"api_key": "other,alpha", "max_running": "1", "max_waiting": "7",
               "metrics_public": "yes", "served_model_name": 'odd"name'}

    def test_idle(self):
        self.d.wait_idle()
        s = state(self.d)
        self.assertEqual((s["state"], s["model"], s["requests"]), ("ready", 'odd"name', []))
        e, = s["engines"]
        self.assertEqual((e["engine"], e["running"], e["waiting"], e["max_running"],
                          e["max_waiting"], e["busy"], e["stalled"], e["host_tier"]),
                         (0, 0, 0, 1, 7, False, False, None))
        self.assertEqual(e["kv_pool"]["used"], 0)
        self.assertEqual(e["kv_pool"]["blocks"], self.d.gauge("kv_cache_blocks"))

    def test_busy(self):
        self.d.wait_idle()
        with ask(self.d, b"runs") as first:
            self.assertTrue(self.d.wait_until(lambda: self.d.gauge("num_requests_running") == 1))
            with ask(self.d, b"waits", prompt=SECRET, n=2, temperature=1):
                self.assertTrue(self.d.wait_until(
                    lambda: self.d.gauge("num_requests_waiting") == 2))

                def runs():
                    s = state(self.d)
                    found = {r["request_id"]: r for r in s["requests"]}
                    c = found["runs"]["choices"][0]
                    return (s, found) if c["output_tokens"] > 70 else None
                s, found = self.d.wait_until(runs)
                self.assertEqual(set(found), {"runs", "waits"})
                r = found["runs"]
                self.assertEqual((r["state"], r["path"], r["key"], r["stream"]),
                                 ("working", "/v1/completions", 2, True))
                self.assertGreater(r["age_ms"], 0)
                c, = r["choices"]
                self.assertEqual((c["state"], c["engine"], c["place"], c["max_tokens"]),
                                 ("running", 0, "device", 20000))
                # The engine's snapshot and the count of the output are not of the same moment.
                self.assertLess(abs(c["computed_tokens"] - c["prompt_tokens"]
                                    - c["output_tokens"]), 60)
                self.assertEqual(c["blocks"], c["blocks_on_device"])
                self.assertGreaterEqual(c["blocks"] * 64, c["computed_tokens"])
                self.assertEqual([c["state"] for c in found["waits"]["choices"]], ["waiting"] * 2)
                e, = s["engines"]
                self.assertEqual((e["running"], e["waiting"], e["busy"]), (1, 2, True))
                self.assertNotIn(SECRET, json.dumps(s))
                self.assertNotIn("alpha", json.dumps(s))
            first.close()
        self.d.wait_idle()
        self.assertEqual(state(self.d)["requests"], [])

    def test_needs_the_key(self):
        for headers in (None, {"Authorization": "Bearer alph"}):
            self.assertEqual(self.d.request("GET", "/debug/state", headers=headers)[0], 401)
        self.assertEqual(self.d.request("POST", "/debug/state", {}, KEY)[0], 405)


class Others(unittest.TestCase):
    def test_without_keys_there_is_none(self):
        with Daemon() as d:
            self.assert_missing(d, None)
            self.assert_missing(d, KEY)
            routes = "".join(d.metrics()["asynctlsd:http_requests_total"])
            self.assertNotIn("/debug", routes)

    def assert_missing(self, d, headers):
        want, got = (d.request("GET", path, headers=headers) for path in ("/none", "/debug/state"))
        self.assertEqual((got[0], got[2]), (404, want[2]))

    def test_a_host_tier(self):
        with Daemon(api_key="alpha", metrics_public="yes", host_kv_bytes="64mb", offload="always",
                    crossover="100", keep_blocks="4", keep_tokens="96", recent_tokens="32") as d:
            with ask(d, b"leaves", prompt=[300 + i for i in range(400)]):
                def offloaded():
                    s = state(d)
                    choices = [c for r in s["requests"] for c in r["choices"]]
                    return s if [c.get("place") for c in choices] == ["offloaded"] else None
                s = d.wait_until(offloaded)
                self.assertTrue(s, state(d))
                self.assertEqual(s["engines"][0]["host_tier"]["offloaded"], 1)
                c = s["requests"][0]["choices"][0]
                self.assertLess(c["blocks_on_device"], c["blocks"])
            d.wait_idle()


if __name__ == "__main__":
    unittest.main()
