"""`deploy/prometheus` and `deploy/grafana`: every expression, asked of a real Prometheus that scrapes a real
server. Without Prometheus the metrics' names are still held against what the server exports.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from gated_engine import Gate, load_gated
from jetson_files import write_orin_nano
from prometheus import Prometheus, scraping
from prometheus_client.parser import text_string_to_metric_families
from running import Running, running, wait_until
from tiny_engine import write_package

from runtime.devices import find_devices
from runtime.drift import LEAST_IMAGES
from runtime.manifest import Predictions
from server.settings import Settings

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus/prometheus.yml"
ALERTS = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text("utf-8"))
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/trimrt.json").read_text("utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ADAPTER = DEPLOY / "kubernetes/autoscaling/adapter-values.yaml"

needs_prometheus = pytest.mark.skipif(
    not shutil.which("prometheus"), reason="Prometheus is not installed (Debian's package `prometheus`)"
)
needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool is not installed (Debian's package `prometheus`)"
)


def dashboard_expressions() -> dict[str, str]:
    return {
        f"{panel['title']}/{target['refId']}": _filled(target["expr"])
        for panel in PANELS
        for target in panel["targets"]
    }


def _filled(expression: str) -> str:
    """With what Grafana puts in for its variables."""
    values = {"$__rate_interval": "1m", "$instance": ".*", "$engine": ".*"}
    for variable, value in values.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression
    return expression


def alert_expressions() -> dict[str, str]:
    return {rule["alert"]: rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]}


def adapter_expression() -> str:
    (rule,) = yaml.safe_load(ADAPTER.read_text("utf-8"))["rules"]["custom"]
    values = {
        "<<.Series>>": rule["seriesQuery"].partition("{")[0],
        "<<.LabelMatchers>>": 'engine!=""',
        "<<.GroupBy>>": "instance",
    }
    expression = rule["metricsQuery"]
    for placeholder, value in values.items():
        expression = expression.replace(placeholder, value)
    return expression


EXPRESSIONS = {**dashboard_expressions(), **alert_expressions(), "adapter": adapter_expression()}


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two engines; of one it is known what it said of the validation images."""
    directory = tmp_path_factory.mktemp("engines")
    write_package(directory, "tiny", predictions=Predictions(classes=[10] * 10, confidence=[0] * 8 + [100]))
    write_package(directory, "other", seed=1, precision="fp16")
    return directory


@pytest.fixture(scope="module")
def server(
    engine_dir: Path, tmp_path_factory: pytest.TempPathFactory, encode: Callable[..., bytes]
) -> Iterator[Running]:
    """On what takes itself for a Jetson, after a request of every kind."""
    root, gate = tmp_path_factory.mktemp("jetson"), Gate()
    write_orin_nano(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.app.find_devices", lambda: find_devices(root))
        settings = Settings(engine="tiny,other", engine_dir=engine_dir, port=0, queue_limit=1, cache_mib=1)
        with running(settings, load_gated(gate)) as it:
            for number in range(LEAST_IMAGES):
                assert it.predict(encode(number)).status_code == 200
            assert it.predict(encode(2), params={"engine": "other"}).status_code == 200
            assert it.predict(b"broken").status_code == 400
            gate.close()
            with ThreadPoolExecutor(1) as pool:
                failing = pool.submit(it.predict, encode(1003))
                gate.wait_for_arrivals(1)
                assert it.predict(encode(1004)).status_code == 429
                gate.fail_next = True
                gate.allow()
                assert failing.result().status_code == 500
            assert it.predict(encode(1005), headers={"X-Request-Timeout-Ms": "50"}).status_code == 504
            gate.open()
            yield it


def exported(server: Running) -> dict[str, set[str]]:
    """The names of the server's series, and the labels of each."""
    series: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(server.client.get("/metrics").text):
        for sample in family.samples:
            series.setdefault(sample.name, set()).update(sample.labels)
    return series


# Names, without Prometheus ------------------------------------------------------------------------------


def test_every_expression_is_about_series_that_the_server_exports(server: Running) -> None:
    names = exported(server)
    for where, expression in EXPRESSIONS.items():
        used = set(re.findall(r"\b(?:trimrt|process)_\w+", expression))
        assert used or "up{" in expression, where
        assert used <= set(names), where
        selectors = re.findall(r"\{(.*?)\}", expression)
        labels = {label for selector in selectors for label in re.findall(r"(\w+)[=!]", selector)}
        known = set().union(*(names[name] for name in used)) | {"instance", "job"}
        assert labels <= known, where


def test_the_dashboard_shows_everything_that_the_server_tells(server: Running) -> None:
    shown = set(re.findall(r"trimrt_\w+", " ".join(dashboard_expressions().values())))
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in exported(server)}
    ours = {name for name in families if name.startswith("trimrt_")}
    assert len(ours) >= 14
    assert {name for name in ours if not any(series.startswith(name) for series in shown)} == set()


def test_the_stages_are_those_of_the_server(server: Running) -> None:
    metrics = server.client.get("/metrics").text
    stages = set(re.findall(r'stage="(\w+)"', metrics))
    for expression in EXPRESSIONS.values():
        for match in re.findall(r'stage(?:=~|=|!=)"([\w|]+)"', expression):
            assert set(match.split("|")) <= stages


# Grafana's files ----------------------------------------------------------------------------------------


def test_the_dashboard_asks_the_source_that_is_provisioned() -> None:
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    expected = {"type": source["type"], "uid": source["uid"]}
    askers = [*PANELS, *DASHBOARD["templating"]["list"], *(t for p in PANELS for t in p["targets"])]
    assert len(askers) > 50
    assert all(asker["datasource"] == expected for asker in askers)


def test_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= 24
        cells = itertools.product(
            range(grid["x"], grid["x"] + grid["w"]), range(grid["y"], grid["y"] + grid["h"])
        )
        for cell in cells:
            assert cell not in taken, (panel["title"], taken[cell])
            taken[cell] = panel["title"]
    height = 1 + max(y for _, y in taken)
    rows = [y for y in range(height) if not any((x, y) in taken for x in range(24))]
    assert rows == []


def test_panels_have_titles_units_and_targets_of_their_own() -> None:
    titles = [panel["title"] for panel in PANELS]
    assert len(set(titles)) == len(titles)
    for panel in PANELS:
        assert panel["fieldConfig"]["defaults"]["unit"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references) > 0


def test_every_variable_is_used_and_every_used_one_is_there() -> None:
    there = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    text = json.dumps([panel["targets"] for panel in PANELS])
    assert {name for name in re.findall(r"\$(\w+)", text) if not name.startswith("__")} == there


# With Prometheus ----------------------------------------------------------------------------------------


@needs_promtool
def test_promtool_finds_nothing_wrong() -> None:
    done = subprocess.run(
        ["promtool", "check", "config", "--lint=all", "--lint-fatal", str(PROMETHEUS)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_alerts_fire_when_they_should_and_not_when_they_should_not(tmp_path: Path) -> None:
    shutil.copy(DEPLOY / "prometheus/alerts.yml", tmp_path)
    shutil.copy(Path(__file__).with_name("alerts_test.yml"), tmp_path)
    done = subprocess.run(
        ["promtool", "test", "rules", "alerts_test.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test_in_which_it_fires() -> None:
    content = yaml.safe_load(Path(__file__).with_name("alerts_test.yml").read_text("utf-8"))
    fired = {
        case["alertname"]
        for test in content["tests"]
        for case in test["alert_rule_test"]
        if case.get("exp_alerts")
    }
    assert fired == set(alert_expressions())


@pytest.fixture(scope="module")
def prometheus(server: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """After two scrapes, which is what a rate needs."""
    folder = tmp_path_factory.mktemp("prometheus")
    with scraping(server.url.removeprefix("http://"), PROMETHEUS, folder) as it:
        wait_until(lambda: it.query("sum_over_time(up[1m]) > 2") != [])
        yield it


@needs_prometheus
def test_prometheus_scrapes_the_server_and_knows_the_rules(prometheus: Prometheus) -> None:
    (target,) = prometheus.get("targets")["activeTargets"]
    assert target["labels"]["job"] == "trimrt"
    (group,) = prometheus.get("rules")["groups"]
    assert {rule["name"] for rule in group["rules"]} == set(alert_expressions())


@needs_prometheus
@pytest.mark.parametrize("where", [*dashboard_expressions(), "adapter"])
def test_every_panel_has_something_to_show(prometheus: Prometheus, where: str) -> None:
    wait_until(lambda: prometheus.query(EXPRESSIONS[where]) != [])


@needs_prometheus
@pytest.mark.parametrize("alert", alert_expressions())
def test_every_alert_has_something_to_compare(prometheus: Prometheus, alert: str) -> None:
    expression = alert_expressions()[alert]
    prometheus.query(expression)
    compared, _ = re.split(r"\s(?:==|>|unless)\s", expression, maxsplit=1)
    wait_until(lambda: prometheus.query(compared) != [])


@needs_prometheus
def test_the_dashboards_variables_have_values(prometheus: Prometheus) -> None:
    wait_until(lambda: prometheus.query("trimrt_engine_info") != [])
    values: dict[str, Any] = {}
    for variable in DASHBOARD["templating"]["list"]:
        match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert match is not None
        values[variable["name"]] = {s["metric"][match[2]] for s in prometheus.query(_filled(match[1]))}
    assert values["engine"] == {"tiny", "other"}
    assert len(values["instance"]) == 1
