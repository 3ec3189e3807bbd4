"""The files that put the server into service, held against the server and against each other."""
import re
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

import yaml
from daemon import ROOT, Daemon

UNIT = ROOT / "configs" / "asynctlsd.service"
KUBERNETES = sorted((ROOT / "configs" / "kubernetes").glob("*.yaml"))
OPTIONS = {line.split(" ")[0]: line.split(" ", 1)[1]
           for line in (ROOT / "configs" / "asynctlsd.conf").read_text().splitlines()
           if line and not line.startswith("#")}


def seconds(text):
    """Of one duration as systemd, Kubernetes and our options write it."""
    number, unit = re.fullmatch(r"(\d+)(s|m|min|h|)", text).groups()
    return int(number) * {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}[unit]


def option_of_variable(name):
    return name.removeprefix("ASYNCTLSD_").lower().replace("_", "-")


class Unit(unittest.TestCase):
    def setUp(self):
        self.values = {}
        for line in UNIT.read_text().splitlines():
            if "=" in line and not line.startswith("#"):
                key, value = line.split("=", 1)
                self.values.setdefault(key, []).append(value)

    def value(self, key):
        self.assertEqual(len(self.values[key]), 1, key)
        return self.values[key][0]

    def test_times(self):
        self.assertGreater(seconds(self.value("TimeoutStopSec")), seconds(OPTIONS["drain-timeout"]))
        self.assertGreater(seconds(self.value("WatchdogSec")), seconds(OPTIONS["stall-timeout"]))

    def test_descriptors(self):
        self.assertGreater(int(self.value("LimitNOFILE")), 2 * int(OPTIONS["max-connections"]) + 64)

    def test_credential_reaches_an_option(self):
        name = self.value("LoadCredential").split(":")[0]
        variable, path = self.value("Environment").split("=")
        self.assertEqual(path, "%d/" + name)
        self.assertIn(option_of_variable(variable), OPTIONS)

    def test_installed_as_it_says(self):
        with tempfile.TemporaryDirectory() as folder:
            lines = subprocess.run(["make", "-n", "CUDA=0", "install", "DESTDIR=" + folder], cwd=ROOT,
                                   capture_output=True, text=True, check=True).stdout
        program, config = self.value("ExecStart").split(" --config ")
        for path in (program, config, "/usr/local/lib/systemd/system/asynctlsd.service"):
            self.assertIn(folder + path, lines)

    def test_systemd_understands_it(self):
        if not shutil.which("systemd-analyze"):
            self.skipTest("no systemd-analyze")
        with tempfile.TemporaryDirectory() as folder:
            unit = Path(folder) / "asynctlsd.service"
            # The program need not be installed for that.
            unit.write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text()))
            for words in (["verify", "--man=no"], ["security", "--offline=yes", "--threshold=20"]):
                done = subprocess.run(["systemd-analyze", *words, str(unit)], capture_output=True,
                                      text=True)
                self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout)


class Image(unittest.TestCase):
    def setUp(self):
        text = (ROOT / "Dockerfile").read_text()
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
        self.steps = [step.split(None, 1)
                      for step in re.sub(r"\\\n\s*", " ", "\n".join(lines)).split("\n") if step]

    def of(self, kind):
        return [words for verb, words in self.steps if verb == kind]

    def test_what_it_copies_is_there_and_not_ignored(self):
        kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines()
                if line.startswith("!")}
        sources = [w.split()[0] for w in self.of("COPY") if not w.startswith("--from")]
        self.assertIn("server", sources)
        for source in sources:
            self.assertTrue((ROOT / source).exists(), source)
            self.assertIn(source, kept)
        self.assertEqual(kept, set(sources))

    def test_stages_exist_for_each_variant(self):
        stages = {w.split(" AS ")[1] for w in self.of("FROM") if " AS " in w}
        for word in self.of("FROM"):
            base = word.split()[0]
            for variant in ("cpu", "cuda"):
                name = base.replace("${VARIANT}", variant)
                self.assertTrue(name in stages or ":" in name, name)

    def test_build_packages_are_those_of_the_script(self):
        script = (ROOT / "scripts" / "install-deps.sh").read_text()
        build = re.search(r'(?s)^build="(.*?)"', script, re.M)[1].replace("\\\n", " ").split()
        first = next(w for w in self.of("RUN") if "apt-get install" in w)
        self.assertEqual({entry.split(":")[0] for entry in build},
                         set(re.search(r"--no-install-recommends (.*?) &&", first)[1].split()))

    def test_runs_as_nobody_in_particular_and_says_how_it_is(self):
        self.assertRegex(self.of("USER")[0], r"^[1-9]\d*:[1-9]\d*$")
        self.assertEqual(self.of("STOPSIGNAL"), ["SIGTERM"])
        self.assertIn('/health"', self.of("HEALTHCHECK")[0])
        names = re.findall(r"(ASYNCTLSD_\w+)=", " ".join(self.of("ENV")))
        self.assertIn("ASYNCTLSD_PORT", names)
        for name in names:
            self.assertIn(option_of_variable(name), OPTIONS)


class Kubernetes(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.objects = [o for path in KUBERNETES for o in yaml.safe_load_all(path.read_text())]
        cls.deployment = cls.one("Deployment")
        cls.pod = cls.deployment["spec"]["template"]
        cls.container, = cls.pod["spec"]["containers"]
        cls.env = {e["name"]: e["value"] for e in cls.container["env"]}

    @classmethod
    def one(cls, kind):
        found, = (o for o in cls.objects if o["kind"] == kind)
        return found

    def test_selectors_find_the_pods(self):
        labels = self.pod["metadata"]["labels"]
        selectors = [self.one("Service")["spec"]["selector"]] + [
            self.one(kind)["spec"]["selector"]["matchLabels"]
            for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor", "InferencePool")]
        for selector in selectors:
            self.assertTrue(selector.items() <= labels.items(), selector)

    def test_references(self):
        name = self.deployment["metadata"]["name"]
        self.assertEqual(self.one("ScaledObject")["spec"]["scaleTargetRef"]["name"], name)
        backend = self.one("HTTPRoute")["spec"]["rules"][0]["backendRefs"][0]
        self.assertEqual(backend["name"], self.one("InferencePool")["metadata"]["name"])
        ports = {p["name"]: p["containerPort"] for p in self.container["ports"]}
        self.assertEqual(self.one("Service")["spec"]["ports"][0]["targetPort"], "http")
        self.assertEqual(self.one("InferencePool")["spec"]["targetPorts"][0]["number"], ports["http"])
        self.assertEqual(self.one("PodMonitor")["spec"]["podMetricsEndpoints"][0]["port"], "http")
        volumes = {v["name"] for v in self.pod["spec"]["volumes"]}
        self.assertEqual({m["name"] for m in self.container["volumeMounts"]}, volumes)

    def test_it_has_time_to_drain(self):
        wait = int(self.container["lifecycle"]["preStop"]["exec"]["command"][1])
        drain = seconds(self.env["ASYNCTLSD_DRAIN_TIMEOUT"])
        self.assertGreater(self.pod["spec"]["terminationGracePeriodSeconds"], wait + drain)

    def test_runs_as_the_image_does(self):
        user = int(re.search(r"(?m)^USER (\d+):", (ROOT / "Dockerfile").read_text())[1])
        self.assertEqual(self.pod["spec"]["securityContext"]["runAsUser"], user)

    def test_options_and_probes_are_the_server_s(self):
        for name in self.env:
            self.assertIn(option_of_variable(name), OPTIONS)
        with tempfile.NamedTemporaryFile("w") as keys:
            keys.write("secret\n")
            keys.flush()
            env = dict(self.env, ASYNCTLSD_API_KEY_FILE=keys.name, ASYNCTLSD_HOST_KV_BYTES="64mb")
            del env["ASYNCTLSD_MODEL"]
            with Daemon(env=env) as d:
                for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                    self.assertEqual(self.container[probe]["httpGet"]["port"], "http")
                    path = self.container[probe]["httpGet"]["path"]
                    self.assertEqual(d.request("GET", path)[0], 200, path)
                path = self.one("PodMonitor")["spec"]["podMetricsEndpoints"][0]["path"]
                self.assertEqual(d.request("GET", path)[0], 200)
                served = set(d.metrics())
        self.assertIn("asynctlsd:num_requests_waiting", served)
        for path in KUBERNETES:
            for name in re.findall(r"asynctlsd:[a-z_]+", path.read_text()):
                self.assertTrue(name in served or name == "asynctlsd:cuda", f"{path.name}: {name}")


if __name__ == "__main__":
    unittest.main()
