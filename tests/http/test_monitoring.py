"""The dashboard and the alert rules ask for metrics and labels that the server has."""
import json
import re
import unittest

from daemon import ROOT, Daemon

DASHBOARD = ROOT / "configs" / "grafana-dashboard.json"
ALERTS = ROOT / "configs" / "prometheus-alerts.yml"
# One sample's name with the labels that are asked of it, if any.
SELECTOR = re.compile(r"(asynctlsd:\w+)(?:\{([^}]*)\})?")
# What the one who scrapes adds.
SCRAPED = {"instance", "job"}


def dashboard_queries():
    dashboard = json.loads(DASHBOARD.read_text())
    return ([t["expr"] for p in dashboard["panels"] for t in p.get("targets", [])] +
            [v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"])


def alert_rules():
    """[(name, text)] of the rules, in the shape that this file keeps to."""
    blocks = re.split(r"^      - alert: ", ALERTS.read_text(), flags=re.M)[1:]
    return [(b.split("\n", 1)[0], "\n".join(line for line in b.splitlines()
                                            if not line.lstrip().startswith("#")))
            for b in blocks]


def balanced(text):
    depth = 0
    for c in re.sub(r'"[^"]*"', "", text):
        depth += (c in "({[") - (c in ")}]")
        if depth < 0:
            return False
    return depth == 0


class Monitoring(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        # With a host tier, and every kind of answer given once: all families are there.
        with Daemon(host_kv_bytes="64mb") as d:
            d.complete(prompt="It was", max_tokens=3)
            d.request("GET", "/nothing")
            d.wait_idle()
            cls.samples = {}
            for name, samples in d.metrics().items():
                labels = set()
                for text in samples:
                    labels.update(re.findall(r'([a-z_]+)="', text))
                cls.samples[name] = labels

    def assert_known(self, text, where):
        asked = SELECTOR.findall(text)
        self.assertTrue(asked, f"{where} asks for nothing: {text}")
        for name, selector in asked:
            self.assertIn(name, self.samples, where)
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            self.assertLessEqual(labels, self.samples[name] | SCRAPED, f"{where}: {name}")
        self.assertTrue(balanced(text), f"{where}: {text}")

    def test_dashboard(self):
        queries = dashboard_queries()
        self.assertGreater(len(queries), 20)
        for query in queries:
            self.assert_known(query, "dashboard")
            for by in re.findall(r"by \(([^)]*)\)", query):
                names = SELECTOR.findall(query)
                for label in re.split(r",\s*", by):
                    self.assertIn(label, self.samples[names[0][0]] | SCRAPED, query)

    def test_panels(self):
        panels = json.loads(DASHBOARD.read_text())["panels"]
        self.assertEqual(len({p["id"] for p in panels}), len(panels))
        cells = [(x, y) for p in panels for x in range(p["gridPos"]["x"],
                                                       p["gridPos"]["x"] + p["gridPos"]["w"])
                 for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])]
        self.assertEqual(len(set(cells)), len(cells), "panels lie over each other")
        for p in panels:
            if p["type"] != "row":
                self.assertTrue(p["title"] and p["description"] and p["targets"], p)

    def test_alerts(self):
        rules = alert_rules()
        self.assertGreater(len(rules), 5)
        self.assertEqual(len({name for name, _ in rules}), len(rules))
        for name, text in rules:
            expression = re.search(r"^        expr: (?:>-\n)?(.*?)\n        for: \d+m$", text,
                                   re.S | re.M)
            self.assertTrue(expression, name)
            self.assert_known(expression[1], name)
            for part in ("severity: ", "summary: ", "description: "):
                self.assertEqual(text.count(part), 1, name)

    def test_a_missing_metric_is_found(self):
        with self.assertRaises(AssertionError):
            self.assert_known("rate(asynctlsd:no_such_total[5m])", "made up")
        with self.assertRaises(AssertionError):
            self.assert_known('asynctlsd:steps_total{flavour="x"}', "made up")


if __name__ == "__main__":
    unittest.main()
