"""GPU slots between real processes; a script of its name stands in for `nvidia-smi`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from latent_reasoning.config import PROJECT_ROOT
from latent_reasoning.runtime import gpus
from latent_reasoning.runtime.gpus import (
    Gpu,
    GpuSlotError,
    lock_folder,
    take_gpus,
    visible_gpus,
)

JOB = """
import os, sys, time
from pathlib import Path
from latent_reasoning.runtime import gpus
gpus.POLL_SECONDS = 0.05
gpus.take_gpus("auto", int(sys.argv[2]), Path(sys.argv[1]))
print(os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
time.sleep(float(sys.argv[3]))
"""
CLEARED = ("CUDA_VISIBLE_DEVICES", "WORLD_SIZE", gpus.TAKEN, *gpus.SLURM_ASSIGNED)


@pytest.fixture(autouse=True)
def host(tmp_path, monkeypatch):
    """A host with as many GPUs as the test says; the environment is that of a plain shell."""
    for name in CLEARED:
        monkeypatch.delenv(name, raising=False)

    def with_gpus(count: int) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        listed = "".join(f"GPU-{number}a\\n" for number in range(count))
        (folder / "nvidia-smi").write_text(f'#!/bin/sh\nprintf "{listed}"\n')
        (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        return tmp_path / "locks"

    return with_gpus


class Job:
    """A process that takes GPUs and holds them."""

    def __init__(self, locks: Path, count: int = 1, seconds: float = 60, **environment: str):
        self.process = subprocess.Popen(
            [sys.executable, "-c", JOB, str(locks), str(count), str(seconds)],
            env=os.environ | {"PYTHONPATH": str(PROJECT_ROOT / "src")} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def visible(self) -> list[str]:
        """What it shows to CUDA, once it has it."""
        return self.process.stdout.readline().strip().split(",")

    def end(self) -> str:
        """Kill it as the kernel does; what it printed."""
        self.process.kill()
        return self.process.communicate()[1]


@pytest.fixture
def job():
    jobs = []

    def begin(*args, **environment) -> Job:
        jobs.append(Job(*args, **environment))
        return jobs[-1]

    yield begin
    for started in jobs:
        started.end()


def test_each_job_has_a_gpu_of_its_own_and_a_third_waits_until_one_is_killed(host, job):
    locks = host(2)
    first, second = job(locks), job(locks)
    shown = {job_.visible()[0]: job_ for job_ in (first, second)}
    assert sorted(shown) == ["GPU-0a", "GPU-1a"]
    third = job(locks)
    line = third.process.stderr.readline()
    assert line.startswith("waiting for 1 of 2 GPUs; taken by process ")
    assert str(second.process.pid) in line
    assert str(locks) in line
    shown["GPU-1a"].end()
    assert third.visible() == ["GPU-1a"]
    assert third.process.stderr.readline().startswith("took a GPU after ")


def test_a_job_of_two_processes_takes_both_at_once_or_none(host, job):
    locks = host(2)
    one = job(locks)
    one.visible()
    two = job(locks, 2)
    assert two.process.stderr.readline().startswith("waiting for 2 of 2 GPUs")
    # The waiting job holds nothing: another one gets the free GPU.
    other = job(locks, 1, 0.0)
    assert other.visible() == ["GPU-1a"]
    one.end()
    assert two.visible() == ["GPU-0a", "GPU-1a"]


def test_gpus_are_chosen_among_those_visible_and_known_by_any_of_their_names(host, job):
    locks = host(4)
    by_index = job(locks, 1, 60, CUDA_VISIBLE_DEVICES="2,3")
    assert by_index.visible() == ["2"]
    by_uuid = job(locks, 1, 60, CUDA_VISIBLE_DEVICES="GPU-2,GPU-3")
    assert by_uuid.visible() == ["GPU-3"]
    anywhere = job(locks, 2)
    assert anywhere.visible() == ["GPU-0a", "GPU-1a"]


def test_what_follows_an_unknown_gpu_is_not_visible(host, monkeypatch):
    host(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,7,0")
    assert visible_gpus() == [Gpu("1", "GPU-1a")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


@pytest.mark.parametrize(
    ("device", "environment"),
    [
        ("cpu", {}),
        ("auto", {"CUDA_VISIBLE_DEVICES": ""}),
        ("auto", {"SLURM_STEP_GPUS": "1", "CUDA_VISIBLE_DEVICES": "1"}),
        ("auto", {"SLURM_JOB_GPUS": "1", "CUDA_VISIBLE_DEVICES": "1"}),
        ("auto", {gpus.TAKEN: "GPU-0a"}),
        ("auto", {"WORLD_SIZE": "2"}),
    ],
)
def test_nothing_is_taken_where_there_is_nothing_to_choose(host, monkeypatch, device, environment):
    locks = host(2)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert take_gpus(device, 1, locks) == []
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == environment.get("CUDA_VISIBLE_DEVICES")
    assert not locks.exists()


def test_jobs_inside_one_slurm_allocation_share_its_gpus_out(host, job):
    locks = host(4)
    allocation = {"SLURM_JOB_GPUS": "1,3", "CUDA_VISIBLE_DEVICES": "1,3"}
    shown = [job(locks, 1, 60, **allocation).visible() for _ in range(2)]
    assert shown == [["1"], ["3"]]


def test_a_host_without_nvidia_gpus_takes_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert take_gpus("auto", 1, tmp_path / "locks") == []


def test_more_processes_than_gpus_are_refused(host):
    locks = host(2)
    with pytest.raises(GpuSlotError, match=r"runtime.processes: 3 .* shows 2"):
        take_gpus("cuda", 3, locks)


def test_a_folder_of_locks_that_belongs_to_somebody_else_is_refused(host, tmp_path):
    host(1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(GpuSlotError, match="belongs to another user"):
        take_gpus("auto", 1, tmp_path / "link")


def test_locks_lie_on_the_host_itself_one_folder_a_user(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/network")
    assert lock_folder() == Path(f"/tmp/latent-reasoning-gpus-{os.getuid()}")
