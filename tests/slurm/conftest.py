"""One SLURM for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing_programs, started


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running SLURM, of which nothing is left in the end."""
    skip_without_slurm()
    with started(Cluster(tmp_path_factory.mktemp("cluster"))) as running:
        yield running
    assert running.processes() == []


def skip_without_slurm() -> None:
    """Skip where its programs are missing, with their names."""
    if missing := missing_programs():
        pytest.skip(f"not installed: {', '.join(missing)}; as root: tests/slurm/install.sh")
