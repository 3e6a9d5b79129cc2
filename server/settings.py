"""Every setting of the server, from the environment (`TRIMRT_*`) or the command line (`--…`)."""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from models.cores import cores
from models.preprocessing import DEFAULT_MAX_PIXELS, FORMATS
from runtime.signatures import Trust, trust_in


class Settings(BaseSettings):
    """One field is one environment variable and one option of `trimrt serve`; defaults are safe."""

    # Treat empty variables as unset: an empty API key would let everyone in.
    model_config = SettingsConfigDict(
        env_prefix="TRIMRT_", env_ignore_empty=True, frozen=True, extra="forbid"
    )

    engine: str = Field(
        default="",
        description="Engine to serve: a name in the engine directory, or a package's path. "
        "Several with commas; the first is the default. Needed unless the directory holds exactly one.",
    )
    engine_dir: Path = Field(default=Path("engines"), description="Where engine packages are found by name.")
    trusted_key: str | None = Field(
        default=None,
        min_length=1,
        description="Serve no package but those that this key has signed (`trimrt sign`): file of the public "
        "key; several with commas.",
    )

    host: str = Field(default="127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port; 0 takes a free one.")
    uds: Path | None = Field(
        default=None,
        description="Unix socket to listen on as well, for programs of this user and its group.",
    )

    workers: int = Field(
        default=1, ge=1, description="Processes that share the port and the cores; auto: one for every core."
    )
    share_engines: bool = Field(
        default=False, description="Run CPU engines in one process for all workers, as those on a device."
    )
    worker_timeout_s: float = Field(
        default=60.0, gt=0, description="A worker that hangs for so long is killed and replaced, seconds."
    )
    grpc_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="TCP port for the Open Inference Protocol over gRPC; off unless set.",
    )

    client_shared_memory: bool = Field(
        default=False,
        description="Let programs on this machine register shared memory for the Open Inference Protocol's "
        "tensors; Linux, one worker.",
    )

    watch: bool = Field(
        default=False, description="Load engine packages that appear or change in the engine directory."
    )
    watch_interval_s: float = Field(default=2.0, gt=0, description="How often --watch looks, seconds.")
    api_key: SecretStr | None = Field(
        default=None,
        min_length=1,
        description="Key for the management routes. Without one they are off, except for programs on this "
        "machine while the server listens on loopback alone.",
    )
    trust_loopback: bool = Field(
        default=False,
        description="Ask programs on this machine for no key. Not behind a proxy on this machine.",
    )
    protect_predict: bool = Field(default=False, description="Ask for the key for inference too.")
    client_keys: Path | None = Field(
        default=None,
        description="File of keys for inference alone, one a line; none may manage. With --protect-predict "
        "they let in; with --rate-limit each has a rate of its own.",
    )
    rate_limit: float | None = Field(
        default=None,
        gt=0,
        description="Images a second that each key may ask for, and all callers without a key together; "
        "beyond it, 429. No limit unless set.",
    )
    cors_origin: str = Field(
        default="",
        description="Web site whose pages may call the server, like https://example.org; several with "
        "commas, * for any. None unless set.",
    )
    root_path: str = Field(
        default="",
        pattern="^(/[^/?#]+)*$",
        description="Prefix that a proxy removes from the paths it passes on, like /trimrt.",
    )

    queue_limit: int = Field(
        default=128,
        ge=1,
        description="Images that may have to run until a request is answered; beyond it, 429. "
        "Requests take turns: small ones do not wait for all of the large.",
    )
    max_batch_delay_ms: float = Field(
        default=0.0, ge=0, le=1000, description="How long an idle engine waits for a fuller batch. 0: never."
    )
    slots: int | None = Field(
        default=None, ge=1, description="Batches an engine runs at once; left out, the backend decides."
    )
    inference_threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads that an engine on the CPU computes with; left out, one for every core.",
    )
    cuda: Literal["cuda-bindings", "pycuda"] | None = Field(
        default=None, description="CUDA interface of TensorRT engines; left out, what is installed."
    )
    cuda_graphs: bool = Field(default=True, description="Let TensorRT engines use CUDA graphs.")
    host_code: bool = Field(
        default=False, description="Let version-compatible TensorRT plans run the code that they carry."
    )
    decode_threads: int = Field(
        default_factory=cores, ge=1, description="Threads that decode images for engines on a device."
    )
    linux_scheduling: bool = Field(
        default=True,
        description="On Linux, let threads that compute on a CPU give way to the server's other threads.",
    )
    max_failed_batches: int = Field(
        default=5,
        ge=1,
        description="Failed batches in a row that make the server not ready; "
        "an error that CUDA does not recover from does so at once.",
    )
    exit_when_lost: bool = Field(
        default=False,
        description="End the process with code 70 then, for whoever starts it again: Docker, systemd.",
    )
    timeout_ms: float = Field(
        default=30_000, gt=0, description="Longest a request may take; X-Request-Timeout-Ms can ask for less."
    )

    max_body_bytes: int = Field(default=32 << 20, ge=1, description="Largest request body.")
    max_body_memory_bytes: int = Field(
        default=192 << 20, ge=1, description="Most that all request bodies together may hold; beyond it, 429."
    )
    max_images: int = Field(default=64, ge=1, description="Most images in one request.")
    max_pixels: int = Field(default=DEFAULT_MAX_PIXELS, ge=1, description="Most pixels in one image.")
    formats: str = Field(
        default=",".join(FORMATS).lower(), description="Formats of images to accept, with commas."
    )
    max_decoding_ms: float = Field(
        default=1000,
        gt=0,
        description="Most processor time for decoding one request's images, as their headers foretell it.",
    )
    max_decoding_memory_bytes: int = Field(
        default=200 << 20,
        ge=1,
        description="Most that all images under decode may take, as their headers foretell it; others wait.",
    )

    keep_alive_s: int = Field(
        default=75, ge=0, description="How long a connection is kept on which nothing arrives, seconds."
    )
    drain_delay_s: float = Field(
        default=0.0, ge=0, description="After SIGTERM, how long to serve on while not ready, seconds."
    )
    grace_s: float = Field(
        default=30.0, ge=0, description="How long a stop waits for accepted requests, seconds."
    )

    cache_mib: int = Field(
        default=0,
        ge=0,
        description="Memory in which answers are kept, MiB, for images that come again to the same engine; "
        "0: none are.",
    )

    access_log: bool = Field(default=False, description="Log every request.")
    log_format: Literal["auto", "json", "text"] = Field(
        default="auto", description="auto is text on a terminal, else JSON."
    )
    keep: Path | None = Field(
        default=None,
        description="Folder in which to keep images that an engine was unsure of, for the next training; "
        "no image is stored unless this is set.",
    )
    keep_below: float = Field(
        default=0.5, gt=0, le=1, description="Keep images whose likeliest label is less probable than this."
    )
    keep_share: float = Field(default=0.01, gt=0, le=1, description="Share of those images that is kept.")
    keep_mib: int = Field(default=256, ge=1, description="Most that the folder of kept images may hold, MiB.")
    otlp_endpoint: str = Field(
        default_factory=lambda: os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", ""),
        description="Where OpenTelemetry traces go, over OTLP/HTTP; OTEL_EXPORTER_OTLP_ENDPOINT works too.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least level logged."
    )

    @cached_property
    def trust(self) -> Trust:
        """Whose engine packages are served; the keys are read once."""
        return trust_in(self.trusted_key)

    @cached_property
    def inference_keys(self) -> frozenset[bytes]:
        """SHA-256 of the keys in `client_keys`, which is read once."""
        lines = [] if self.client_keys is None else self.client_keys.read_text("utf-8").splitlines()
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if any(not key.isascii() or not key.isprintable() for key in keys):
            raise ValueError("a key has characters beyond printable ASCII")
        if self.client_keys is not None and not keys:
            raise ValueError("there is no key")
        return frozenset(hashlib.sha256(key.encode()).digest() for key in keys)

    @cached_property
    def cors_origins(self) -> frozenset[str]:
        """The sites of `cors_origin`."""
        return frozenset(origin.strip().rstrip("/") for origin in self.cors_origin.split(",")) - {""}

    @field_validator("formats")
    @classmethod
    def _check_formats(cls, formats: str) -> str:
        for name in formats.split(","):
            if name.strip().upper() not in FORMATS:
                raise ValueError(f"{name.strip()!r} is none of {', '.join(FORMATS).lower()}")
        return formats

    @field_validator("workers", mode="before")
    @classmethod
    def _one_for_every_core(cls, workers: object) -> object:
        return cores() if workers == "auto" else workers

    @model_validator(mode="after")
    def _has_client_keys(self) -> Settings:
        try:
            self.inference_keys  # noqa: B018 - read, and kept
        except (OSError, ValueError) as error:
            raise ValueError(f"client_keys: {self.client_keys} cannot be used: {error}") from None
        return self

    @model_validator(mode="after")
    def _one_process_knows_the_regions(self) -> Settings:
        if self.client_shared_memory and self.workers > 1:
            raise ValueError(
                "client_shared_memory works with one worker: each process would know other regions"
            )
        return self

    @field_validator("api_key")
    @classmethod
    def _sendable(cls, key: SecretStr | None) -> SecretStr | None:
        """The key as a header carries it: without the spaces and the line's end around it."""
        if key is None:
            return None
        value = key.get_secret_value().strip(" \t\r\n")
        if not value or any(character < " " or character == "\x7f" for character in value):
            raise ValueError("a header cannot carry this key: it is blank or has control characters")
        return SecretStr(value)
