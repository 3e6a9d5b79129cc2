import pytest
from carriers import CARRIERS, Carrier
from gated_engine import Gate
from ray_cluster import cluster  # noqa: F401
from serving import encode, engine_dir, reference, server  # noqa: F401


@pytest.fixture(params=CARRIERS.values(), ids=CARRIERS)
def kind(request: pytest.FixtureRequest) -> type[Carrier]:
    """A test that asks for it runs over every carrier."""
    return request.param


@pytest.fixture
def gate() -> Gate:
    """Closed: an image that is computed waits, one that is not does not."""
    return Gate()
