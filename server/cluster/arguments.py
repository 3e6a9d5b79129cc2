"""What a Ray Serve configuration says to TrimRT; all else in it is said to Ray."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from server.settings import Settings

ROUTER: Final = "router"

# Ray's proxies listen, and Ray replaces replicas: a replica does neither.
_RAYS: Final = ("host", "port", "grpc_port", "keep_alive_s", "drain_delay_s", "watch", "watch_interval_s")


class Arguments(BaseModel):
    """`args` of the application.

    Attributes:
        pools: for each deployment its settings, those of `trimrt serve`. The first is asked first.
    """

    model_config = ConfigDict(extra="forbid")

    pools: dict[str, dict[str, Any]] = Field(min_length=1)

    @field_validator("pools")
    @classmethod
    def _check(cls, pools: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, settings in pools.items():
            if name == ROUTER:
                raise ValueError(f"{ROUTER!r} is the name of the deployment in front of the pools")
            if rays := [setting for setting in _RAYS if setting in settings]:
                raise ValueError(f"pool {name!r} sets {', '.join(rays)}, which is Ray's to decide")
            if not settings.get("engine"):
                raise ValueError(f"pool {name!r} names no engine")
            try:
                Settings(**settings)
            except ValidationError as error:
                first = error.errors()[0]
                raise ValueError(
                    f"pool {name!r}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
                ) from None
        return pools
