"""Rules, alerts, dashboard and scaling use only metrics that a worker exports."""

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from ralf.worker.chaos import bodies
from ralf.worker.errors import Crashed, Interrupted, Rejected, by_code
from ralf.worker.service.connection import connect
from ralf.worker.service.processes import as_environment
from ralf.worker.service.store import Store
from tests.deploy_tools import DEPLOY, ROOT, run
from tests.documents import a_job
from tests.redis_server import RedisServer
from tests.test_worker_group import two_ports
from tests.waiting import until
from tests.web import get
from tests.workers import QUICK, TESTS

RULES = yaml.safe_load((DEPLOY / "prometheus" / "rules.yaml").read_text())["groups"]
ALERTS = [rule for group in RULES for rule in group["rules"] if "alert" in rule]
RECORDS = [rule for group in RULES for rule in group["rules"] if "record" in rule]
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "ralf.json").read_text())
EXTERNAL = {
    # NVIDIA's DCGM exporter, which names a GPU by Hostname and gpu
    "DCGM_FI_DEV_DEC_UTIL",
    "DCGM_FI_DEV_FB_USED",
    "DCGM_FI_DEV_GPU_UTIL",
    "DCGM_FI_DEV_XID_ERRORS",
}
"""Metrics that other programs export."""
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def dashboard_queries() -> list[str]:
    """Every query of the dashboard."""
    return [target["expr"] for chart in DASHBOARD["panels"] for target in chart.get("targets", ())]


def test_the_dashboard_can_be_narrowed_to_a_queue_a_model_or_a_process(
    exported: dict[str, set[str]],
):
    """Each variable lists a label that a worker exports and narrows a chart of metrics with it."""
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert ["datasource", "priority", "model", "instance"] == list(variables)
    for name in ("priority", "model", "instance"):
        metric, label = re.fullmatch(
            r"label_values\((\w+), (\w+)\)", variables[name]["query"]["query"]
        ).groups()  # type: ignore[union-attr]
        # Prometheus itself adds `instance`.
        assert name == label and (name == "instance" or label in exported[metric])
        assert [q for q in dashboard_queries() if f'{name}=~"${name}"' in q]
    used = {v for query in dashboard_queries() for v in re.findall(r"\$(\w+)", query)}
    assert {"priority", "model", "instance"} == used
    sources = re.findall(r'"uid": "([^"]+)"', json.dumps(DASHBOARD["panels"]))
    assert {"${datasource}"} == set(sources) and "datasource" == variables["datasource"]["type"]


def test_the_dashboard_shows_the_share_of_each_label_and_redis_memory():
    """A jump of one label is often the first sign of a broken model or of a wave of forgeries."""
    charts = {chart["title"]: chart for chart in DASHBOARD["panels"]}
    [labels] = charts["Labels"]["targets"]
    assert labels["expr"].startswith("sum by (label) (increase(ralf_verdicts_total{")
    assert " / on () group_left () (sum(increase(ralf_verdicts_total{" in labels["expr"]
    assert "percentunit" == charts["Labels"]["fieldConfig"]["defaults"]["unit"]
    assert "max(ralf_redis_memory_share)" == charts["Redis memory"]["targets"][0]["expr"]
    places = [chart["gridPos"] for chart in DASHBOARD["panels"]]
    cells = [
        (x, y)
        for p in places
        for x in range(p["x"], p["x"] + p["w"])
        for y in range(p["y"], p["y"] + p["h"])
    ]
    assert len(cells) == len(set(cells)), "two charts cover each other"


def scaling_queries() -> list[str]:
    """The queries that KEDA sends to Prometheus."""
    scaled = yaml.safe_load((DEPLOY / "k8s" / "base" / "scale.yaml").read_text())
    return [trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]]


def named(query: str) -> set[str]:
    """The names of the metrics in a query."""
    return set(re.findall(r"\b(?:ralf[_:][\w:]+|DCGM_\w+)", re.sub(r'"[^"]*"', '""', query)))


@pytest.fixture(scope="module")
def exported(redis_server: RedisServer) -> dict[str, set[str]]:
    """The metrics of a worker that ran a job, by name, with their labels."""
    settings = replace(
        QUICK, redis_url=redis_server.url, redis_prefix="rules:", http_port=two_ports()
    )
    store = Store(connect(redis_server.url), settings)
    worker = subprocess.Popen(
        [sys.executable, "-m", "ralf", "worker", *TESTS],
        env=as_environment(settings, os.environ),
        cwd=ROOT,
    )
    try:
        store.submit([a_job("1")], function=bodies.PREFIX + "trivial")
        until(lambda: (status := store.status("j1")) and status.ended)
        text = get(settings.http_port, "/metrics")[1]
    finally:
        worker.terminate()
        worker.wait(60)
        store.redis.close()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for suffix in SUFFIXES[family.type]:
            found[family.name + suffix] = set()
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_every_query_names_a_metric_that_a_worker_exports_or_a_rule_records(
    exported: dict[str, set[str]],
):
    """Otherwise a renamed metric would disable an alert or empty a chart without any error."""
    recorded = {rule["record"] for rule in RECORDS}
    queries = [rule["expr"] for rule in RECORDS + ALERTS] + dashboard_queries() + scaling_queries()
    assert len(queries) > 60

    unknown = {name for query in queries for name in named(query)} - recorded - EXTERNAL
    assert sorted(unknown - set(exported)) == []


def test_a_process_without_a_model_is_ready(redis_server: RedisServer):
    """Otherwise the alert on workers that are not ready would never end."""
    settings = replace(QUICK, redis_url=redis_server.url, http_port=two_ports())
    janitor = subprocess.Popen(
        [sys.executable, "-m", "ralf", "janitor"],
        env=as_environment(settings, os.environ),
        cwd=ROOT,
    )
    try:
        until(lambda: answered(settings.http_port))
        text = get(settings.http_port, "/metrics")[1]
    finally:
        janitor.terminate()
        janitor.wait(60)

    assert "\nralf_ready 1.0\n" in text


def answered(port: int) -> bool:
    """Whether a program listens on the port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_every_metric_is_shown_or_watched(exported: dict[str, set[str]]):
    """A metric that no rule and no chart uses should not be exported."""
    asked = {
        n for q in [r["expr"] for r in RECORDS + ALERTS] + dashboard_queries() for n in named(q)
    }
    families = {re.sub(r"_(total|bucket|sum|count|created)$", "", name) for name in exported}
    seen = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in asked}

    assert sorted(families - seen) == []


@pytest.mark.parametrize(
    ("kind", "base", "others"),
    [
        ("rejected", Rejected, {"deadline_passed"}),
        ("interrupted", Interrupted, set()),
        ("crashed", Crashed, set()),
    ],
)
def test_the_classes_of_failure_are_those_of_the_errors(
    kind: str, base: type[Exception], others: set[str]
):
    """Each new error is in one class of the rules; a passed deadline is the client's decision."""
    (rule,) = [r for r in RECORDS if r.get("labels", {}).get("class") == kind]
    listed = re.search(r'code=~"([^"]+)"', rule["expr"])
    codes = {code for code, error in by_code().items() if issubclass(error, base)}

    assert listed is not None
    assert codes - others == set(listed[1].split("|"))


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_says_what_is_wrong_how_bad_it_is_and_where_to_read_on(alert: dict[str, Any]):
    """Its link points to a heading of docs/operations.md."""
    text = (ROOT / "docs" / "operations.md").read_text()
    anchors = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    page, _, anchor = alert["annotations"]["runbook_url"].partition("#")

    assert page == "{{ $externalLabels.runbooks }}docs/operations.md"
    assert anchor in anchors
    assert alert["labels"]["severity"] in {"page", "ticket"}
    assert alert["annotations"]["summary"].endswith(".")


def test_every_alert_has_a_test_in_which_it_fires():
    """promtool runs them in the test below."""
    tests = yaml.safe_load((DEPLOY / "prometheus" / "rules_test.yaml").read_text())["tests"]
    fires = {
        case["alertname"]
        for group in tests
        for case in group.get("alert_rule_test", ())
        if case["exp_alerts"]
    }

    assert {alert["alert"] for alert in ALERTS} == fires


def test_the_operators_rules_are_the_same():
    """`make rules` writes them again."""
    text = (DEPLOY / "k8s" / "base" / "prometheusrule.yaml").read_text()

    assert yaml.safe_load(text)["spec"]["groups"] == RULES


def test_promtool_accepts_rules_and_configuration_and_every_alert_fires_when_it_should():
    """Uses Debian's promtool."""
    run("promtool", "check", "config", DEPLOY / "prometheus" / "prometheus.yml")
    run("promtool", "check", "rules", DEPLOY / "prometheus" / "rules.yaml")
    run("promtool", "test", "rules", DEPLOY / "prometheus" / "rules_test.yaml")


def test_the_queries_of_the_dashboard_and_of_the_scaling_parse(tmp_path: Path):
    """They are checked as rules, since promtool cannot read dashboards."""
    queries = dashboard_queries() + scaling_queries()
    rules = [{"record": f"q:{n}", "expr": query} for n, query in enumerate(queries)]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    run("promtool", "check", "rules", path)
