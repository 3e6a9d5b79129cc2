"""What each image must do, once it is built. A check returns what it measured, or raises."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from benchmarks.serving import free_port
from deploy.jetson.collect_tensorrt import CUDLA
from models.files import replace_folder
from tests.images import libraries
from tests.images.golden import write_images
from tests.images.podman import BUILD, ROOT, Container, call, configuration, started, wait_for

USER: Final = 10001
ENGINE: Final = "digits-resnet18-int8-openvino"
KIT: Final = BUILD / "kit"
ENGINES: Final = BUILD / "engines"  # what the image `cpu` builds, and the others serve
SCRATCH: Final = BUILD / "scratch"
IMAGES: Final = BUILD / "golden"
TORCH: Final = {"torch", "torchvision", "triton", "nvidia-modelopt", "torch-pruning", "onnx", "onnxruntime"}

# Emulated, and beside other work, a start takes minutes; what works waits no longer for it.
PATIENCE_S: Final = 1200.0
# Long enough to be asked while it drains, however slow the asking is.
DRAINING: Final = ("--env", "TRIMRT_DRAIN_DELAY_S=15")

Facts = dict[str, Any]


class CheckError(AssertionError):
    """An image does not do what it must."""


def expect(condition: object, what: str) -> None:
    """Raise unless `condition` holds.

    Raises:
        CheckError: naming `what` was expected.
    """
    if not condition:
        raise CheckError(f"expected: {what}")


def mount(source: Path, target: str, mode: str = "ro") -> tuple[str, str]:
    """The option that shows the container a folder of this machine."""
    return "--volume", f"{source}:{target}:{mode}"


def python(image: str, code: str, *options: str) -> str:
    """What a Python statement prints in the image.

    Raises:
        CheckError: it failed.
    """
    done = call(image, "-c", code, options=("--entrypoint", "python3", *options))
    expect(done.returncode == 0, f"`{code}` to run in {image}:\n{done.stderr}")
    return done.stdout.strip()


def ask(url: str, data: bytes | None = None, media_type: str = "image/png") -> tuple[int, Any]:
    """Status and JSON of an answer; status 0 where nothing listens yet."""
    request = urllib.request.Request(url, data, {"Content-Type": media_type} if data else {})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            status, body = response.status, response.read()
    except urllib.error.HTTPError as error:
        status, body = error.code, error.read()
    except (urllib.error.URLError, OSError):
        return 0, None
    return status, json.loads(body) if body.startswith((b"{", b"[")) else body.decode()


@contextmanager
def serving(image: str, *options: str, status: int = 200) -> Iterator[tuple[Container, str]]:
    """A confined server whose `/health/ready` has that status, and its address."""
    port = str(free_port())
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        return ask(f"{url}/health/ready")[0] == status

    with started(image, options=("--env", f"TRIMRT_PORT={port}", *options)) as container:
        wait_for(ready, container, PATIENCE_S)
        yield container, url


# What any server image must be --------------------------------------------------------------------------


def check_packages(image: str, *, training: bool = False) -> Facts:
    """Training libraries where they belong and nowhere else; nothing that reports its use."""
    names = python(
        image,
        "from importlib.metadata import distributions\n"
        "print(*{found.metadata['Name'].lower() for found in distributions()})",
    )
    found = set(names.replace("_", "-").split())
    expect("trimrt" in found, "TrimRT to be installed")
    expect(training or not TORCH & found, f"no training library, found {sorted(TORCH & found)}")
    expect("openvino-telemetry" not in found, "nothing that reports OpenVINO's use")
    return {"packages": len(found), "training_libraries": sorted(TORCH & found)}


def check_libraries(image: str, mounted: AbstractSet[str] = frozenset(), also: Sequence[str] = ()) -> Facts:
    """Every shared library that a package, or TensorRT, asks for is in the image, or will be mounted.

    Args:
        image: its name.
        mounted: what the container runtime brings from the host.
        also: what TensorRT asks for, where the base has none to ask.
    """
    script = mount(Path(libraries.__file__), "/libraries.py")
    arguments = ("/opt/trimrt", "/opt/tensorrt", "--also", *also)
    done = call(image, "/libraries.py", *arguments, options=("--entrypoint", "python3", *script))
    expect(done.returncode == 0, f"the libraries to be listed:\n{done.stderr}")
    missing: dict[str, list[str]] = json.loads(done.stdout)
    expect(missing.keys() <= mounted, f"no library but {sorted(mounted)} to be missing: {missing}")
    return {"libraries_from_the_host": sorted(missing)}


def check_user(image: str) -> Facts:
    """It does not run as root, and cannot write where the root file system is."""
    configured = configuration(image)
    expect(configured["User"] == str(USER), f"the user {USER}, not {configured['User']!r}")
    said = python(
        image, "import os; print(os.getuid(), os.access('/opt/trimrt', os.W_OK), os.access('/tmp', os.W_OK))"
    )
    expect(said == f"{USER} False True", f"a user who can write /tmp alone, not {said}")
    return {"user": USER}


def check_stop(container: Container, url: str, image: bytes | None) -> Facts:
    """SIGTERM: not ready, live, still serving; then the end, with exit code 0."""
    container.terminate()

    def draining() -> bool:
        return ask(f"{url}/health/ready")[0] == 503

    wait_for(draining, container, PATIENCE_S)
    expect(ask(f"{url}/health/live")[0] == 200, "to be live while it drains")
    if image is not None:
        expect(ask(f"{url}/predict", image)[0] == 200, "to serve while it drains")
    code = container.wait()
    expect(code == 0, f"exit code 0 after SIGTERM, not {code}:\n{container.logs()[-2000:]}")
    return {"exit_code_after_sigterm": code}


# Prepared here: a kit, and images ----------------------------------------------------------------------


def make_kit() -> None:
    """`trimrt prepare` of the student that ships with TrimRT, with this machine's own environment."""
    if KIT.is_dir():
        return
    student = ROOT / "models/pretrained/digits-resnet18"
    command = [sys.executable, "-m", "trimrt", "prepare", str(student), "--precision", "fp32,fp16,int8"]
    subprocess.run([*command, "--output", str(KIT)], check=True)


def emptied(folder: Path) -> Path:
    """`folder`, empty, and the images' user may write to it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chown(folder, USER, USER)
    return folder


def golden(image: str) -> dict[str, str]:
    """What the image's own preprocessing makes of every kind of image."""
    write_images(IMAGES)
    script = mount(Path(__file__).with_name("golden.py"), "/golden.py")
    options = ("--entrypoint", "python3", *mount(IMAGES, "/images"), *script)
    done = call(image, "/golden.py", "/images", options=options)
    expect(done.returncode == 0, f"the preprocessing to run:\n{done.stderr}")
    tensors: dict[str, str] = json.loads(done.stdout)
    return tensors


def check_selftest(image: str) -> str:
    """The image's own acceptance test passes on a CPU, and is no success where TensorRT is asked for."""
    passed = call(image, "selftest", "--backend", "openvino", "--soak-seconds", "1")
    expect(passed.returncode == 0, f"the self-test to pass:\n{passed.stdout}{passed.stderr}")
    check_selftest_without_tensorrt(image)
    return passed.stdout.splitlines()[-1]


def check_selftest_without_tensorrt(image: str) -> str:
    """The acceptance test fails on one screen, and says what is missing."""
    failed = call(image, "selftest", "--backend", "tensorrt")
    said = failed.stdout.splitlines()
    expect(failed.returncode == 1 and len(said) <= 24, f"a failure on one screen:\n{failed.stdout}")
    expect("tensorrt cannot be imported" in failed.stdout, "the missing library's name")
    return said[-1]


# x86 ----------------------------------------------------------------------------------------------------


def check_cpu(image: str) -> Facts:
    """Builds OpenVINO engines from a kit, serves one, and stops as asked to."""
    facts = {**check_packages(image), **check_user(image), **check_libraries(image)}
    telemetry = "from openvino.tools.ovc import telemetry_utils as t; import os; print(t.tm.__name__)"
    facts["openvino_telemetry"] = python(image, telemetry)
    expect(facts["openvino_telemetry"].endswith("telemetry_stub"), "OpenVINO's own stub for telemetry")

    empty = call(image)
    expect(empty.returncode == 1 and "`trimrt build` makes one" in empty.stderr, "the remedy, without engine")

    facts["selftest"] = check_selftest(image)
    make_kit()
    folders = (*mount(KIT, "/kit"), *mount(emptied(ENGINES), "/engines", "rw"))
    command = ("build", "/kit", "--target", "openvino", "--precision", "int8", "--output", "/engines")
    built = call(image, *command, options=folders)
    expect(built.returncode == 0 and (ENGINES / ENGINE).is_dir(), f"an engine from the kit:\n{built.stderr}")

    digit = (ROOT / "docs/images/7.png").read_bytes()
    options = (*mount(ENGINES, "/engines"), *DRAINING)
    with serving(image, *options) as (container, url):
        expect(container.is_healthy(), "the health check to succeed")
        expect(container.execute("touch", "/etc/written").returncode != 0, "a read-only root")
        status, answer = ask(f"{url}/predict", digit)
        expect(status == 200, f"a prediction, not {status}: {answer}")
        facts["prediction"] = answer["results"][0]["predictions"][0]["label"]
        expect(facts["prediction"] == "7", f"a 7, not {facts['prediction']}")
        expect(answer["engine"]["name"] == ENGINE, f"{ENGINE} to answer")
        facts |= check_stop(container, url, digit)
    facts["tensors"] = len(golden(image))
    return facts


def check_ray(image: str) -> Facts:
    """As KubeRay runs it: from a login shell, asked for its health with wget, configured by TrimRT."""
    facts = {**check_packages(image), **check_user(image), **check_libraries(image)}
    expect((ENGINES / ENGINE).is_dir(), "the engine that the check of the image `cpu` builds")
    config = f"trimrt cluster config /engines/{ENGINE} --replicas 1 --cpus 1 --port 8000 > /tmp/serve.yaml"
    script = f"ray start --head --num-cpus 2 && {config} && serve run /tmp/serve.yaml"
    options = (*mount(ENGINES, "/engines"), "--shm-size", "512m", "--no-healthcheck", "--entrypoint", "bash")
    url = "http://127.0.0.1:8000"

    def ready() -> bool:
        return ask(f"{url}/health/ready")[0] == 200

    with started(image, "-lc", script, options=options, confined=False) as container:
        wait_for(ready, container, PATIENCE_S)
        health = "wget -T 4 -q -O- http://127.0.0.1:52365/api/local_raylet_healthz"
        expect("success" in container.execute("bash", "-lc", health).stdout, "KubeRay's probe to succeed")
        status, answer = ask(f"{url}/predict", (ROOT / "docs/images/7.png").read_bytes())
        expect(status == 200 and answer["results"][0]["predictions"][0]["label"] == "7", f"a 7, not {answer}")
    return facts


def check_prepare(image: str) -> Facts:
    """The checkpoint that ships with TrimRT becomes a kit."""
    kits = emptied(SCRATCH)
    command = ("prepare", "/checkpoint", "--precision", "fp16,int8", "--output", "/kits/kit")
    folders = (*mount(ROOT / "models/pretrained/digits-resnet18", "/checkpoint"), *mount(kits, "/kits", "rw"))
    done = call(image, *command, options=folders)
    expect(done.returncode == 0 and (kits / "kit/kit.json").is_file(), f"a kit:\n{done.stderr[-2000:]}")
    return {**check_packages(image, training=True), **check_user(image)}


# Where TensorRT is missing -------------------------------------------------------------------------------


def without_tensorrt(image: str, builder: str) -> Facts:
    """The server starts, says why it has no engine, and stops; the builder says where TensorRT comes from."""
    remedy = "it comes with JetPack"
    make_kit()
    command = ("build", "/kit", "--target", "tensorrt", "--output", "/tmp/engines")
    refused = call(builder, *command, options=mount(KIT, "/kit"))
    said = " ".join(refused.stderr.split())
    expect(refused.returncode == 1 and "Traceback" not in said and remedy in said, f"the remedy, not {said}")
    facts: Facts = {"build": said, "selftest": check_selftest_without_tensorrt(builder)}
    check_selftest_without_tensorrt(image)

    engines = emptied(SCRATCH)
    options = (*mount(engines, "/engines"), "--env", "TRIMRT_WATCH=1", *DRAINING)
    with serving(image, *options, status=503) as (container, url):
        expect(ask(f"{url}/health/live")[0] == 200, "to be live")
        expect(not container.is_healthy(), "the health check to fail where the server is not ready")

        def why() -> str:
            return str(ask(f"{url}/health/ready")[1]["detail"])

        def no_engine() -> bool:
            return why() == "no engine is loaded yet"

        wait_for(no_engine, container, PATIENCE_S)
        facts["ready"] = [why()]
        digit = (ROOT / "docs/images/7.png").read_bytes()
        expect(ask(f"{url}/predict", digit)[0] == 503, "no prediction without engine")
        expect("trimrt_build_info" in str(ask(f"{url}/metrics")[1]), "metrics")

        write_tensorrt_package(engines / "digits-resnet18-int8-tensorrt")

        def no_tensorrt() -> bool:
            return remedy in why()

        wait_for(no_tensorrt, container, PATIENCE_S)
        facts["ready"].append(why())
        facts |= check_stop(container, url, None)
    return facts


def write_tensorrt_package(folder: Path) -> None:
    """The manifest of the OpenVINO engine's twin for TensorRT; a server without TensorRT reads no further."""
    manifest = json.loads((ENGINES / ENGINE / "manifest.json").read_text("utf-8"))
    with replace_folder(folder) as new:
        twin = {**manifest, "name": folder.name, "backend": "tensorrt"}
        (new / "manifest.json").write_text(json.dumps(twin), "utf-8")


def check_gpu(image: str) -> Facts:
    """Without TensorRT and GPU: everything else."""
    return {**check_packages(image), **check_user(image), **without_tensorrt(image, image)}


def check_jetson(image: str, builder: str, x86: str) -> Facts:
    """Without TensorRT, emulated: everything else, and the tensors that the image for x86 makes."""
    # cuDLA comes with TensorRT, which the stand-in for NVIDIA's base has not.
    asked = set(libraries.TENSORRT_NEEDS) - {CUDLA}
    facts = {
        **check_packages(image),
        **check_user(image),
        **check_libraries(image, libraries.MOUNTED, sorted(asked)),
        **without_tensorrt(image, builder),
    }
    facts["machine"] = python(image, "import platform; print(platform.machine(), platform.python_version())")
    expect(facts["machine"].startswith("aarch64"), "an Arm machine")
    here, there = golden(image), golden(x86)
    different = sorted(name for name in there if here.get(name) != there[name])
    expect(not different, f"the tensors of x86, but {different} differ")
    facts["tensors_equal_to_x86"] = len(here)
    facts["cuda_without_driver"] = python(
        image,
        "from cuda.bindings import runtime as r\n"
        "try: print(r.cudaGetDeviceCount()[0].name)\n"
        "except RuntimeError as e: print(str(e).splitlines()[0])",
    )
    return facts
