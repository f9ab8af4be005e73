"""The facts of the machine on which an experiment ran."""

import os

from latent_reasoning.analysis.environment import environment
from latent_reasoning.config import resolve

CONFIG = {"experiment": "tiny", "models": {"cot-sft": {"stage": "sft", "training": {"steps": 1}}}}


def test_the_cores_are_counted_where_a_process_is_not_bound_to_them_as_on_macos(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    facts = environment(resolve(CONFIG, "config.yaml"))
    assert facts["Processor"].endswith(", 10 cores for this process")
