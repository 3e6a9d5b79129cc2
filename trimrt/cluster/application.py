"""The Ray Serve application: one pool of replicas, or several behind a router."""

from __future__ import annotations

from ray import serve

from server.settings import Settings
from trimrt.cluster.arguments import ROUTER, Arguments
from trimrt.cluster.replica import Replica
from trimrt.cluster.router import Router


def build(arguments: Arguments) -> serve.Application:
    """The application of those pools; replicas, resources and limits are the configuration's to set."""
    pools = [serve.deployment(name=pool.name)(Replica).bind(pool.settings) for pool in arguments.pools]
    if len(pools) == 1:
        return pools[0]
    # The router holds bodies in its own memory, so it has a limit of its own: the most generous pool's.
    settings = [Settings(**pool.settings) for pool in arguments.pools]
    return serve.deployment(name=ROUTER)(Router).bind(
        *pools,
        max_body_bytes=max(pool.max_body_bytes for pool in settings),
        max_body_memory_bytes=max(pool.max_body_memory_bytes for pool in settings),
        timeout_s=max(pool.timeout_ms for pool in settings) / 1000,
    )
