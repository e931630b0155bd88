"""What a run says of itself to Prometheus: at the endpoint of Ray, beside the journal, and in what Grafana draws."""

import contextlib
import json
import re
import threading
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from prometheus_client.parser import text_string_to_metric_families
from runs import open_session

from on_ray.conftest import EXPORT_S, ROOT
from raychat.config import Config
from raychat.on_ray import driver, gauges
from raychat.on_ray.gauges import METRICS, RunGauges
from raychat.tracking.journal import read_journal
from raychat.tracking.summary import Summary
from raychat.training.events import Metrics, Note

GRAFANA = ROOT / "cluster" / "grafana"
STEPS = 8
NEVER_ON_A_CPU = {"raychat_mfu_percent"}
OF_RAY = {
    "ray_node_gpus_utilization",
    "ray_node_gram_used",
    "ray_node_gram_available",
    "ray_node_gpu_power_milliwatts",
    "ray_node_gpu_temperature_celsius",
}


class Scraper:
    """Reads the metrics of every node again and again, as Prometheus does, and keeps raychat's: run -> name -> values."""

    def __init__(self, *, every_s: float = 1.0) -> None:
        self.seen: dict[str, dict[str, list[float]]] = {}
        self.labels: list[dict[str, str]] = []
        self.names: set[str] = set()
        self._every_s, self._over = every_s, threading.Event()
        self._urls = [
            f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            for node in ray.nodes()
            if node["Alive"]
        ]
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Scraper":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def last(self, run: str) -> dict[str, float]:
        """The newest value of each metric of a run."""
        return {name: values[-1] for name, values in self.seen.get(run, {}).items()}

    def _run(self) -> None:
        while not self._over.wait(self._every_s):
            for url in self._urls:
                with contextlib.suppress(OSError, HTTPException):  # as Prometheus does: the next time, then
                    self._take_in(url)

    def _take_in(self, url: str) -> None:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        self.names |= set(re.findall(r"^ray_node_\w+", text, re.MULTILINE))
        ours = "\n".join(line for line in text.splitlines() if "ray_raychat_" in line)
        for family in text_string_to_metric_families(ours + "\n"):
            for sample in family.samples:
                self.labels.append(sample.labels)
                self.seen.setdefault(sample.labels["run"], {}).setdefault(sample.name, []).append(sample.value)


class Broken:
    """A gauge of a Ray that has changed its mind."""

    def __init__(self, *_: object) -> None:
        pass

    def set(self, *_: object) -> None:
        raise RuntimeError("no metrics today")


@pytest.fixture(scope="module")
def run(connected, tiny_flags, prepared_base, tmp_path_factory) -> tuple[Summary, list[dict[str, Any]], Scraper]:
    """A run with a driver in this process: what it left, and what was scraped meanwhile."""
    own = {"base_dir": str(prepared_base), "storage_path": str(tmp_path_factory.mktemp("metrics") / "runs")}
    own |= {"model_tag": "seen", "num_iterations": STEPS, "price_per_hour": 36.0, "budget_usd": 100.0}
    config = Config.from_flat(tiny_flags | own)
    with Scraper() as scraper:
        summary = driver.run(config, echo=lambda line: None)
        time.sleep(EXPORT_S + 2.0)  # the last values are on their way
    return summary, read_journal(config.run_dir / "metrics.jsonl"), scraper


@pytest.mark.ray
def test_the_endpoint_shows_the_numbers_of_the_journal(run):
    summary, records, scraper = run
    shown = scraper.last("seen")
    assert {name.removeprefix("ray_") for name in shown} == METRICS.keys() - NEVER_ON_A_CPU
    newest = {key: value for record in records for key, value in record.items()}
    assert shown == shown | {
        "ray_raychat_step": STEPS - 1,
        "ray_raychat_total_steps": STEPS,
        "ray_raychat_train_loss": newest["train/loss"],
        "ray_raychat_val_bpb": newest["val/bpb"],
        "ray_raychat_tokens_per_second": newest["train/tok_per_sec"],
        "ray_raychat_machines": 1,
        "ray_raychat_workers": 0,
        "ray_raychat_cost_usd_per_hour": 36.0,
        "ray_raychat_budget_usd": 100.0,
        "ray_raychat_restarts": summary.restarts,
        "ray_raychat_preemptions": summary.preemptions,
        "ray_raychat_replayed_steps": summary.replayed_steps,
        "ray_raychat_skipped_batches": 0,
        "ray_raychat_goodput_ratio": pytest.approx(summary.goodput, rel=0.2),  # which the end of the run still lowers
        "ray_raychat_cost_usd": pytest.approx(summary.cost_usd, rel=0.2),
    }
    assert shown["ray_raychat_cost_usd"] <= summary.cost_usd


@pytest.mark.ray
def test_metrics_say_whose_they_are_and_gpus_that_are_not_there_show_nothing(run):
    _, _, scraper = run
    session = ray.get_runtime_context().get_session_name()
    assert all({"run", "WorkerId", "NodeAddress"} <= labels.keys() for labels in scraper.labels)
    assert {labels["SessionName"] for labels in scraper.labels} == {session}
    assert "ray_node_cpu_utilization" in scraper.names
    assert not scraper.names & OF_RAY


class Recorder:
    """Stands for Ray's gauges: what was set, in order."""

    set_to: list[tuple[str, float, dict[str, str]]]

    def __init__(self, name: str, text: str, labels: tuple[str, ...]) -> None:
        self.name = name
        assert text
        assert labels == ("run",)

    def set(self, value: float, tags: dict[str, str]) -> None:
        Recorder.set_to.append((self.name, value, tags))


@pytest.fixture
def recorded(monkeypatch):
    Recorder.set_to = []
    monkeypatch.setattr(gauges, "Gauge", Recorder)
    return lambda: {name: value for name, value, _ in Recorder.set_to}


def step(number, **values):
    return Metrics(number, {"train/loss": 5.0, "train/tok_per_sec": 700.0, "train/mfu": 41.0} | values, time.time())


@pytest.fixture
def session(own_config):
    opened = open_session(own_config(model_tag="mine", price_per_hour=36.0))
    yield opened
    opened.close("stopped")


def test_interruptions_are_counted_as_the_summary_counts_them(session):
    session.begin_attempt(nodes=3)
    session.receive(step(0))
    session.receive(step(1))
    session.attempt_failed("preempted", "taken")
    session.begin_attempt(nodes=2)
    session.receive(Note("rollback", {"bad_step": 4, "from_step": 1, "cursor": 32}))
    found = gauges.of_run(session)
    assert found == found | {
        "raychat_restarts": 1,
        "raychat_preemptions": 1,
        "raychat_replayed_steps": 2 + 3,  # those before the first save, and those that the rollback undid
        "raychat_skipped_batches": 1,
        "raychat_machines": 2,
        "raychat_cost_usd_per_hour": 72.0,
    }
    assert found["raychat_cost_usd"] == pytest.approx(session.cost_usd(), abs=0.1)
    assert not {"raychat_val_bpb", "raychat_budget_usd"} & found.keys()  # not known, and not given


def test_rates_are_not_said_while_no_worker_trains_and_the_rest_is(session, recorded, monkeypatch):
    monkeypatch.setattr(gauges, "REFRESH_S", 0.0)
    session.begin_attempt()
    told = RunGauges(session)
    told.told(step(3))
    told.keep(workers=4)
    assert recorded() == recorded() | {"raychat_step": 3, "raychat_mfu_percent": 41.0, "raychat_workers": 4}
    assert {tags["run"] for _, _, tags in Recorder.set_to} == {"mine"}
    Recorder.set_to.clear()
    told.keep(workers=0)
    assert recorded()["raychat_train_loss"] == 5.0
    assert recorded()["raychat_workers"] == 0
    assert not set(gauges.RATES) & recorded().keys()
    told.told(Metrics(4, {"val/bpb": 2.0}, time.time()))  # an evaluation, which is no step
    assert recorded()["raychat_step"] == 3


def test_the_price_of_all_that_is_small_and_paid_seldom(session, recorded):
    """Gauges are set with every step, the ledger is made up every few seconds; a millisecond a step is the limit."""
    session.begin_attempt()
    told, count = RunGauges(session), 200
    begun = time.process_time()
    for number in range(count):
        told.told(step(number))
        told.keep(workers=1)
    assert (time.process_time() - begun) / count < 1e-3
    assert sum(name == "raychat_workers" for name, _, _ in Recorder.set_to) == 1
    told.end()
    assert sum(name == "raychat_workers" for name, _, _ in Recorder.set_to) == 2


def test_metrics_that_fail_are_warned_of_once_and_disturb_nothing(session, monkeypatch, caplog):
    monkeypatch.setattr(gauges, "Gauge", Broken)
    monkeypatch.setattr(gauges, "REFRESH_S", 0.0)
    session.begin_attempt()
    told = RunGauges(session)
    for number in range(3):
        told.told(step(number))
        told.keep(workers=1)
    monkeypatch.setattr(gauges, "of_run", Broken().set)
    told.keep(workers=1)
    told.end()
    [warning] = [record.getMessage() for record in caplog.records if record.name == gauges.__name__]
    assert "no metrics today" in warning


def names_in(expression: str) -> set[str]:
    """The metrics of a query."""
    return set(re.findall(r"\bray_\w+", expression))


def exported() -> set[str]:
    return {f"ray_{name}" for name in METRICS}


def expressions(panels) -> list[str]:
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


@pytest.fixture(scope="module")
def dashboard():
    return json.loads((GRAFANA / "raychat.json").read_text())


def test_every_metric_has_a_panel_and_every_panel_a_metric(dashboard):
    drawn = [names_in(expression) for expression in expressions(dashboard["panels"])]
    assert all(drawn)
    assert set().union(*drawn) == exported() | OF_RAY
    for panel in dashboard["panels"]:
        assert panel["type"] == "row" or panel["targets"]


def test_gpu_panels_draw_what_ray_measures_itself():
    """Ray's own agent reads every GPU of a node: names that an upgrade of Ray may change."""
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    assert {name.removeprefix("ray_") for name in OF_RAY} <= METRICS_GAUGES.keys()


def test_the_dashboard_has_the_fields_that_grafana_asks_for(dashboard):
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time", "refresh"} <= dashboard.keys()
    assert dashboard.get("id") is None  # that of another Grafana's database
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    assert names_in(variables["run"]["query"]["query"]) <= exported()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        assert {"type", "title", "gridPos"} <= panel.keys()
        if panel["type"] == "row":
            continue
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken  # panels do not lie on each other
        taken |= cells
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["description"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for expression in expressions(dashboard["panels"]):
        assert ('run=~"$run"' in expression) == ("raychat" in expression)


def test_alerts_ask_for_metrics_that_exist():
    groups = yaml.safe_load((GRAFANA / "alerts.yaml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {"alert", "expr", "labels", "annotations"} <= set.intersection(*map(set, rules))
    for rule in rules:
        assert names_in(rule["expr"])
        assert names_in(rule["expr"]) <= exported()


def test_the_page_explains_every_metric_and_the_files_that_it_names_exist():
    page = (ROOT / "docs" / "monitoring.md").read_text()
    assert exported() | OF_RAY <= names_in(page)
    assert names_in(page) <= exported() | OF_RAY
    for named in set(re.findall(r"cluster/grafana/[\w.]+", page)):
        assert Path(ROOT / named).exists()
    assert str(GRAFANA.relative_to(ROOT) / "raychat.json") in page
