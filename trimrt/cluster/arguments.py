"""What a Ray Serve configuration says to TrimRT; all else in it is said to Ray."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from server.settings import Settings

ROUTER: Final = "router"

# Ray's proxies listen, and Ray starts and replaces replicas: a replica does neither.
_RAYS: Final = (
    "host",
    "port",
    "uds",
    "workers",
    "root_path",
    "grpc_port",
    "keep_alive_s",
    "drain_delay_s",
    "watch",
    "watch_interval_s",
)


class Pool(BaseModel):
    """One deployment: what all of its replicas are.

    Besides its fields it takes the settings of `trimrt serve`.

    Attributes:
        name: of the deployment.
        engine: what `trimrt serve --engine` takes, on the replica's node.
    """

    model_config = ConfigDict(extra="allow")

    name: str = Field(min_length=1)
    engine: str = Field(min_length=1)

    @property
    def settings(self) -> dict[str, Any]:
        """All but the name."""
        return self.model_dump(exclude={"name"})

    @model_validator(mode="after")
    def _check(self) -> Pool:
        if self.name == ROUTER:
            raise ValueError(f"{ROUTER!r} is the name of the deployment in front of the pools")
        if rays := [setting for setting in _RAYS if setting in self.settings]:
            raise ValueError(f"pool {self.name!r} sets {', '.join(rays)}, which is Ray's to decide")
        try:
            Settings(**self.settings)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"pool {self.name!r}: {where}: {first['msg']}") from None
        return self


class Arguments(BaseModel):
    """`args` of the application.

    Attributes:
        pools: the first is asked first.
    """

    model_config = ConfigDict(extra="forbid")

    pools: list[Pool] = Field(min_length=1)

    @field_validator("pools")
    @classmethod
    def _check(cls, pools: list[Pool]) -> list[Pool]:
        if len({pool.name for pool in pools}) < len(pools):
            raise ValueError("every pool needs a name of its own")
        return pools


def on_share(settings: dict[str, Any], cpus: float) -> Settings:
    """The settings of a server that has this many cores of its machine; explicit settings win."""
    threads = max(1, int(cpus))
    # Others reach a replica through Ray's proxies, wherever these listen.
    ours: dict[str, Any] = {
        "decode_threads": threads,
        "inference_threads": threads,
        "host": "0.0.0.0",
        "workers": 1,
    }
    return Settings(**(ours | settings))
