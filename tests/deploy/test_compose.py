"""`compose.yaml` and what a Jetson adds: read by a compose parser, and held against the server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import compose_spec
import pytest
import yaml

from server.settings import Settings

ROOT = Path(__file__).parents[2]
FILES = {name: (ROOT / name).read_text("utf-8") for name in ("compose.yaml", "compose.jetson.yaml")}
# Compose's own tag, which replaces instead of merging; YAML parsers do not know it.
CONTENT = {name: yaml.safe_load(text.replace(" !override", "")) for name, text in FILES.items()}
SERVICES: dict[str, Any] = CONTENT["compose.yaml"]["services"]
SERVER = SERVICES["server"]


def filled(value: str) -> str:
    """With the defaults of `${NAME:-default}`."""
    return re.sub(r"\$\{\w+:-(.*?)\}", r"\1", value)


@pytest.mark.parametrize("name", FILES)
def test_a_compose_parser_takes_it(name: str) -> None:
    text = re.sub(r"\$\{RENDER_GROUP:\?.*?\}", "104", FILES[name])  # Compose fills in before it parses
    compose = compose_spec.PyCompose.from_yaml(text.replace(" !override", ""))
    compose.validate()


def test_the_parser_is_strict() -> None:
    with pytest.raises(ValueError, match="imgae"):
        compose_spec.PyCompose.from_yaml("services: {server: {imgae: trimrt}}")


@pytest.mark.parametrize("name", FILES)
def test_the_servers_environment_is_settings_that_it_takes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = SERVER["environment"] | CONTENT[name]["services"]["server"]["environment"]
    ours = {key: value for key, value in environment.items() if key.startswith("TRIMRT_")}
    assert set(ours) <= {f"TRIMRT_{field.upper()}" for field in Settings.model_fields}
    for key, value in ours.items():
        monkeypatch.setenv(key, filled(value))
    settings = Settings()
    assert settings.api_key is None, "nobody set one"
    assert f":{settings.port}" in SERVER["healthcheck"]["test"][-1]
    assert SERVER["ports"] == [f"127.0.0.1:{settings.port}:{settings.port}"]
    assert [volume.split(":")[1] for volume in SERVER["volumes"]] == [str(settings.engine_dir)]
    stop = int(SERVER["stop_grace_period"].removesuffix("s"))
    assert stop > settings.drain_delay_s + 2 * settings.grace_s


def test_nothing_is_published_beyond_this_machine() -> None:
    published = [port for service in SERVICES.values() for port in service["ports"]]
    assert len(published) == 3
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_services_have_no_more_rights_than_they_need() -> None:
    for service in SERVICES.values():
        assert service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in service["security_opt"]
        assert "privileged" not in service
    assert SERVER["read_only"] is True


def test_on_a_jetson_the_server_is_in_both_groups_that_may_use_the_gpu() -> None:
    """The second has another number on every host, so there is no default to be wrong."""
    video, render = CONTENT["compose.jetson.yaml"]["services"]["server"]["group_add"]
    assert video == "video"
    assert re.fullmatch(r"\$\{RENDER_GROUP:\?.*/dev/dri/renderD128.*\}", render)


def test_images_of_others_are_pinned() -> None:
    for name, service in SERVICES.items():
        if "build" not in service:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name


def test_every_mounted_file_is_there_and_read_only() -> None:
    for service in SERVICES.values():
        for volume in service["volumes"]:
            source, target, *mode = volume.split(":")
            if not source.startswith("./"):
                assert source in CONTENT["compose.yaml"]["volumes"]
                continue
            assert mode == ["ro"]
            if source != "./engines":
                assert (ROOT / source).is_dir(), f"{source} on {target}"


def test_prometheus_and_grafana_find_each_other_and_the_server() -> None:
    prometheus = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text("utf-8"))
    (job,) = prometheus["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    provisioning = ROOT / "deploy/grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards/trimrt.yml").read_text())["providers"]
    folder = provider["options"]["path"]
    assert f"./deploy/grafana/dashboards:{folder}:ro" in SERVICES["grafana"]["volumes"]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (ROOT / "deploy/grafana/dashboards" / Path(home).relative_to(folder)).is_file()
