"""What the tests of several machines share."""

from collections.abc import Iterator
from typing import Any

import pytest


def add_node(cluster: Any, num_cpus: int) -> Any:
    """Add a node to a cluster, whose agents have as little time to start as the first one's."""
    try:
        node = cluster.add_node(num_cpus=num_cpus)
        cluster.wait_for_nodes()
    except Exception as error:
        pytest.skip(f"Ray itself did not start another node: {error}")
    return node


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Ray cluster of one node with two cores, to which a test may add others."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    try:
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    except Exception as error:  # its agents have 15 s to start, whatever else the machine does
        pytest.skip(f"Ray itself did not start: {error}")
    ray.init(address=started.address, log_to_driver=False)
    yield started
    ray.shutdown()
    started.shutdown()
