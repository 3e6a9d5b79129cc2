"""`deploy/kubernetes`: held against Kubernetes' schemas, and against the server that it runs.

The schemas are those of the package kubernetes-validate. Of the custom resources (KServe, KubeRay,
Prometheus operator) the pods inside are held against them; the rest is asserted here.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError
from running import Running
from tiny_engine import write_package

from server.settings import Settings

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "deploy/kubernetes"
DOCS = (ROOT / "docs/deployment.md").read_text("utf-8")
OLDEST, NEWEST = "1.31", kubernetes_validate.latest_version()
# KServe's own fields of a predictor; the others are a pod's.
KSERVE_FIELDS = {"minReplicas", "maxReplicas", "timeout"}


def _documents() -> dict[str, dict[str, Any]]:
    """Every manifest by its path; what Kustomize and Helm read is no manifest."""
    paths = sorted(MANIFESTS.rglob("*.yaml"))
    loaded = {str(path.relative_to(MANIFESTS)): yaml.safe_load(path.read_text("utf-8")) for path in paths}
    return {path: document for path, document in loaded.items() if not path.endswith(NOT_MANIFESTS)}


NOT_MANIFESTS = ("kustomization.yaml", "gpu/deployment.yaml", "jetson/deployment.yaml", "adapter-values.yaml")
DOCUMENTS = _documents()
CUSTOM = ("InferenceService", "RayService", "ServiceMonitor")
CORE = [path for path, document in DOCUMENTS.items() if document["kind"] not in CUSTOM]


def _pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for path, document in DOCUMENTS.items():
        spec = document["spec"]
        if document["kind"] == "Deployment":
            yield path, spec["template"]["spec"]
        elif document["kind"] == "InferenceService":
            yield (
                path,
                {field: value for field, value in spec["predictor"].items() if field not in KSERVE_FIELDS},
            )
        elif document["kind"] == "RayService":
            cluster = spec["rayClusterConfig"]
            yield f"{path}:head", cluster["headGroupSpec"]["template"]["spec"]
            for group in cluster["workerGroupSpecs"]:
                yield f"{path}:{group['groupName']}", group["template"]["spec"]


PODS = dict(_pods())
SERVERS = {path: pod for path, pod in PODS.items() if "kuberay" not in path}
any_pod = pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
any_server = pytest.mark.parametrize("pod", SERVERS.values(), ids=SERVERS)


def documented(kind: str) -> str:
    """The example of that kind in the documentation."""
    blocks = re.findall("```yaml\n(.*?)```", DOCS, re.DOTALL)
    (example,) = (block for block in blocks if f"kind: {kind}\n" in block)
    return example


def container(pod: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod["containers"]
    return only


def environment(pod: dict[str, Any]) -> dict[str, str]:
    """As Kubernetes sets it, with 2 for a number of cores, and some text for a secret."""
    variables = {}
    for variable in container(pod)["env"]:
        source = variable.get("valueFrom", {})
        assert set(source) <= {"resourceFieldRef", "secretKeyRef"}
        variables[variable["name"]] = variable.get("value", "2" if "resourceFieldRef" in source else "text")
    return variables


def settings(pod: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in environment(pod).items():
        monkeypatch.setenv(name, value)
    return Settings()


# Schemas ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kubernetes", [OLDEST, NEWEST])
@pytest.mark.parametrize("path", CORE)
def test_manifests_are_what_kubernetes_knows(path: str, kubernetes: str) -> None:
    kubernetes_validate.validate(DOCUMENTS[path], kubernetes, strict=True)


@any_pod
def test_every_pod_is_one(pod: dict[str, Any]) -> None:
    document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}
    kubernetes_validate.validate(document, OLDEST, strict=True)


def test_the_validation_is_strict() -> None:
    deployment = yaml.safe_load((MANIFESTS / "base/deployment.yaml").read_text("utf-8"))
    container(deployment["spec"]["template"]["spec"])["imgae"] = "typo"
    with pytest.raises(kubernetes_validate.ValidationError, match="imgae"):
        kubernetes_validate.validate(deployment, NEWEST, strict=True)


def test_kustomizations_name_every_file_beside_them() -> None:
    for folder in ("base", "gpu", "autoscaling"):
        kustomization = yaml.safe_load((MANIFESTS / folder / "kustomization.yaml").read_text("utf-8"))
        named = {name for name in kustomization["resources"] if not name.startswith("..")}
        named |= {patch["path"] for patch in kustomization.get("patches", []) if "path" in patch}
        there = {path.name for path in (MANIFESTS / folder).iterdir()}
        assert named == there - {"kustomization.yaml", "adapter-values.yaml"}


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl, which has Kustomize, is not installed")
class TestKustomize:
    @staticmethod
    def build(folder: Path) -> dict[str, dict[str, Any]]:
        done = subprocess.run(
            ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        documents = list(yaml.safe_load_all(done.stdout))
        for document in documents:
            kubernetes_validate.validate(document, OLDEST, strict=True)
        return {document["kind"]: document for document in documents}

    def test_base_is_complete(self) -> None:
        kinds = self.build(MANIFESTS / "base")
        assert set(kinds) == {
            *("Deployment", "Service", "PersistentVolumeClaim", "PodDisruptionBudget", "NetworkPolicy")
        }
        monitor = DOCUMENTS["monitoring/servicemonitor.yaml"]["spec"]
        labels = kinds["Service"]["metadata"]["labels"]
        assert monitor["selector"]["matchLabels"].items() <= labels.items()

    def test_gpu_asks_for_one_and_is_the_base_otherwise(self) -> None:
        pod = self.build(MANIFESTS / "gpu")["Deployment"]["spec"]["template"]["spec"]
        base = DOCUMENTS["base/deployment.yaml"]["spec"]["template"]["spec"]
        assert container(pod)["image"] == "trimrt:gpu"
        assert container(pod)["resources"]["limits"]["nvidia.com/gpu"] == "1"
        own = {"TRIMRT_ENGINE": "digits-resnet18-int8-tensorrt", "TRIMRT_EXIT_WHEN_LOST": "1"}
        assert environment(pod) == environment(base) | own
        assert container(pod)["readinessProbe"] == container(base)["readinessProbe"]
        assert pod["securityContext"] == base["securityContext"]

    def test_a_jetsons_pod_is_a_gpus_in_the_groups_that_may_use_it(self) -> None:
        pod = self.build(MANIFESTS / "jetson")["Deployment"]["spec"]["template"]["spec"]
        gpu = self.build(MANIFESTS / "gpu")["Deployment"]["spec"]["template"]["spec"]
        assert container(pod) == {**container(gpu), "image": "trimrt:jetson"}
        assert pod["runtimeClassName"] == "nvidia"
        assert len(pod["securityContext"].pop("supplementalGroups")) == 2, "of /dev/nvmap and the render node"
        assert pod["securityContext"] == gpu["securityContext"]

    def test_with_the_autoscaler_no_manifest_sets_the_replicas(self, tmp_path: Path) -> None:
        overlay = {
            "resources": [os.path.relpath(MANIFESTS / "base", tmp_path)],
            "components": [os.path.relpath(MANIFESTS / "autoscaling", tmp_path)],
        }
        (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
        kinds = self.build(tmp_path)
        assert "replicas" not in kinds["Deployment"]["spec"]
        assert kinds["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == "trimrt"

    def test_the_overlay_that_the_docs_show_builds(self, tmp_path: Path) -> None:
        overlay = documented("Kustomization")
        here = overlay.replace("- trimrt/", f"- {os.path.relpath(ROOT, tmp_path)}/")
        (tmp_path / "kustomization.yaml").write_text(here)
        kinds = self.build(tmp_path)
        pod = kinds["Deployment"]["spec"]["template"]["spec"]
        assert container(pod)["image"] == "registry.example.com/trimrt:0.1.0-gpu"
        assert {document["metadata"]["namespace"] for document in kinds.values()} == {"vision"}
        assert "HorizontalPodAutoscaler" in kinds

    def test_engines_can_come_from_an_image_as_the_docs_show(self, tmp_path: Path) -> None:
        overlay = {
            "resources": [os.path.relpath(MANIFESTS / "base", tmp_path)],
            "patches": [{"patch": documented("Deployment")}],
        }
        (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
        pod = self.build(tmp_path)["Deployment"]["spec"]["template"]["spec"]
        (engines,) = (volume for volume in pod["volumes"] if volume["name"] == "engines")
        assert engines == {
            "name": "engines",
            "image": {"reference": "registry.example.com/trimrt-engines:1"},
        }


# What the manifests say of the server -------------------------------------------------------------------


def test_every_probe_and_scrape_asks_for_what_the_server_answers(server: Running) -> None:
    paths = {
        (pod_path, probe): container(pod)[probe]["httpGet"]["path"]
        for pod_path, pod in SERVERS.items()
        for probe in ("startupProbe", "readinessProbe", "livenessProbe")
        if probe in container(pod)
    }
    paths["monitor", "scrape"] = DOCUMENTS["monitoring/servicemonitor.yaml"]["spec"]["endpoints"][0]["path"]
    assert len(paths) == 8
    for asking, path in paths.items():
        assert server.client.get(path).status_code == 200, asking
    for (_, probe), path in paths.items():
        assert path.endswith({"livenessProbe": "/live", "scrape": "/metrics"}.get(probe, "/ready"))


@any_server
def test_every_variable_is_a_setting_with_a_value_that_it_takes(
    pod: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {name for name in environment(pod) if name not in ("STORAGE_URI", "PROTOCOL")}
    assert names <= {f"TRIMRT_{field.upper()}" for field in Settings.model_fields}
    chosen = settings(pod, monkeypatch)
    assert chosen.host == "0.0.0.0"
    assert chosen.decode_threads == int(container(pod)["resources"]["limits"]["cpu"])


@any_server
def test_every_probe_and_service_finds_the_port(pod: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = container(pod)["ports"]
    assert port["containerPort"] == settings(pod, monkeypatch).port
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if probe in container(pod):
            assert container(pod)[probe]["httpGet"]["port"] in (port["name"], port["containerPort"])


def test_service_monitor_and_policy_go_to_the_servers_port() -> None:
    (port,) = container(SERVERS["base/deployment.yaml"])["ports"]
    (service,) = DOCUMENTS["base/service.yaml"]["spec"]["ports"]
    assert service["targetPort"] == port["name"]
    (endpoint,) = DOCUMENTS["monitoring/servicemonitor.yaml"]["spec"]["endpoints"]
    assert endpoint["port"] == service["name"]
    (rule,) = DOCUMENTS["base/network.yaml"]["spec"]["ingress"]
    assert rule["ports"] == [{"port": port["name"]}]


def test_a_pod_has_time_to_answer_what_it_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    pod = SERVERS["base/deployment.yaml"]
    chosen = settings(pod, monkeypatch)
    # It drains, waits for its requests, and uvicorn waits for connections once more.
    assert pod["terminationGracePeriodSeconds"] > chosen.drain_delay_s + 2 * chosen.grace_s
    assert chosen.grace_s >= chosen.timeout_ms / 1000
    probe = container(pod)["readinessProbe"]
    assert chosen.drain_delay_s > probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"]


@any_pod
def test_service_links_are_off_because_one_would_be_taken_for_a_setting(
    pod: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pod["enableServiceLinks"] is False
    monkeypatch.setenv("TRIMRT_PORT", "tcp://10.96.0.17:8000")  # what Kubernetes sets for a Service `trimrt`
    with pytest.raises(ValidationError, match="port"):
        Settings()


# Security and resources ---------------------------------------------------------------------------------


@any_pod
def test_pods_run_with_no_more_rights_than_they_need(pod: dict[str, Any]) -> None:
    context = pod.get("securityContext", {}) | container(pod)["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] > 1000
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    engines = [mount for mount in container(pod)["volumeMounts"] if mount["name"] == "engines"]
    assert all(mount["readOnly"] for mount in engines)


@any_server
def test_servers_write_nowhere_but_to_a_small_tmp(pod: dict[str, Any]) -> None:
    assert container(pod)["securityContext"]["readOnlyRootFilesystem"] is True
    writable = [mount for mount in container(pod)["volumeMounts"] if not mount.get("readOnly")]
    assert [mount["mountPath"] for mount in writable] == ["/tmp"]
    (tmp,) = (volume for volume in pod["volumes"] if volume["name"] == "tmp")
    assert "sizeLimit" in tmp["emptyDir"]


@any_pod
def test_pods_are_guaranteed_what_they_may_use(pod: dict[str, Any]) -> None:
    resources = container(pod)["resources"]
    gpu = {"nvidia.com/gpu": resources["limits"].get("nvidia.com/gpu")}
    assert {name: amount for name, amount in resources["limits"].items() if name not in gpu} == resources[
        "requests"
    ]
    assert set(resources["requests"]) == {"cpu", "memory"}


def test_no_manifest_holds_a_secret() -> None:
    assert not [path for path, document in DOCUMENTS.items() if document["kind"] == "Secret"]
    for pod in PODS.values():
        for variable in container(pod).get("env", []):
            assert variable["name"] != "TRIMRT_API_KEY" or "secretKeyRef" in variable["valueFrom"]


# References among the manifests -------------------------------------------------------------------------


def test_every_selector_selects_the_servers_pods() -> None:
    labels = DOCUMENTS["base/deployment.yaml"]["spec"]["template"]["metadata"]["labels"]
    spec = {path: document["spec"] for path, document in DOCUMENTS.items()}
    for selector in (
        spec["base/deployment.yaml"]["selector"]["matchLabels"],
        spec["base/service.yaml"]["selector"],
        spec["base/disruption.yaml"]["selector"]["matchLabels"],
        spec["base/network.yaml"]["podSelector"]["matchLabels"],
        *(
            spread["labelSelector"]["matchLabels"]
            for spread in SERVERS["base/deployment.yaml"]["topologySpreadConstraints"]
        ),
    ):
        assert selector
        assert selector.items() <= labels.items()


def test_every_claim_is_the_engines_claim() -> None:
    name = DOCUMENTS["base/engines.yaml"]["metadata"]["name"]
    claims = [
        volume["persistentVolumeClaim"]["claimName"]
        for pod in PODS.values()
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    ]
    uris = [environment(pod)["STORAGE_URI"] for path, pod in SERVERS.items() if path.startswith("kserve")]
    assert claims == [name, name]
    assert uris == [f"pvc://{name}"] * 2


@any_pod
def test_the_claims_files_get_the_servers_group(pod: dict[str, Any]) -> None:
    """So it can read what others wrote. The kubelet leaves a volume alone that is read-only itself."""
    for volume in pod["volumes"]:
        if claim := volume.get("persistentVolumeClaim"):
            assert pod["securityContext"]["fsGroup"] == 10001
            assert "readOnly" not in claim


def test_images_differ_in_their_tag_only() -> None:
    images = {path: container(pod)["image"] for path, pod in PODS.items()}
    assert images == {
        "base/deployment.yaml": "trimrt:cpu",
        "kserve/cpu.yaml": "trimrt:cpu",
        "kserve/gpu.yaml": "trimrt:gpu",
        "kuberay/rayservice.yaml:head": "trimrt:ray",
        "kuberay/rayservice.yaml:cpu": "trimrt:ray",
    }


def test_the_autoscalers_metric_is_one_that_the_server_has_and_the_adapter_passes_on(
    server: Running,
) -> None:
    exported = {family.name for family in text_string_to_metric_families(server.client.get("/metrics").text)}
    (metric,) = DOCUMENTS["autoscaling/autoscaler.yaml"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert name in exported
    values = yaml.safe_load((MANIFESTS / "autoscaling/adapter-values.yaml").read_text("utf-8"))
    (rule,) = values["rules"]["custom"]
    assert rule["seriesQuery"].partition("{")[0] == name
    assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}
    # A server that is full asks for more of them long before it rejects.
    assert int(metric["pods"]["target"]["averageValue"]) < Settings().queue_limit / 4


# KServe and KubeRay -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["kserve/cpu.yaml", "kserve/gpu.yaml"])
def test_kserve_gets_the_container_it_looks_for(path: str) -> None:
    document, pod = DOCUMENTS[path], PODS[path]
    assert document["apiVersion"] == "serving.kserve.io/v1beta1"
    assert set(document["spec"]) == {"predictor"}
    assert container(pod)["name"] == "kserve-container"
    variables = environment(pod)
    assert variables["PROTOCOL"] == "v2"
    assert variables["TRIMRT_ENGINE_DIR"] == "/mnt/models"
    assert document["spec"]["predictor"]["timeout"] * 1000 > float(variables["TRIMRT_TIMEOUT_MS"])
    gpus = container(pod)["resources"]["limits"].get("nvidia.com/gpu")
    assert gpus == ("1" if path == "kserve/gpu.yaml" else None)


def test_kuberay_serves_what_trimrt_cluster_config_writes(tmp_path: Path) -> None:
    document = DOCUMENTS["kuberay/rayservice.yaml"]
    assert document["apiVersion"] == "ray.io/v1"
    said = yaml.safe_load(document["spec"]["serveConfigV2"])
    name = "digits-resnet18-int8-openvino"
    package = write_package(tmp_path, name, max_batch=32)
    options = ["--replicas", "2-8", "--cpus", "2", "--host", "0.0.0.0", "--target-ongoing", "8"]
    done = subprocess.run(
        [sys.executable, "-m", "trimrt", "cluster", "config", str(package), *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = yaml.safe_load(done.stdout)
    written["applications"][0]["args"]["pools"][0]["engine"] = f"/engines/{name}"
    assert said == written
    module, _, attribute = said["applications"][0]["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))


def test_kuberay_has_room_for_the_replicas() -> None:
    spec = DOCUMENTS["kuberay/rayservice.yaml"]["spec"]
    cluster = spec["rayClusterConfig"]
    (deployment,) = yaml.safe_load(spec["serveConfigV2"])["applications"][0]["deployments"]
    (group,) = cluster["workerGroupSpecs"]
    worker = PODS["kuberay/rayservice.yaml:cpu"]
    assert cluster["rayVersion"] == version("ray")
    assert int(container(worker)["resources"]["limits"]["cpu"]) == deployment["ray_actor_options"]["num_cpus"]
    scaling = deployment["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (group["minReplicas"], group["maxReplicas"])
    assert 8000 in {port["containerPort"] for port in container(worker)["ports"]}
