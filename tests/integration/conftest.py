"""One local Ray for all integration tests."""

from collections.abc import Iterator

import pytest
import ray

from pipelines import cluster


@pytest.fixture(scope="session")
def ray_cluster(s3_server: str) -> Iterator[None]:
    """Ray on this machine; its workers inherit the way to the S3 server."""
    cluster.connect()
    yield
    ray.shutdown()
