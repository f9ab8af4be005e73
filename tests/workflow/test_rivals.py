"""The rivals' comparison on the test experiment: an entry of each method runs, up to the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas
import yaml

from latent_reasoning.config import PROJECT_ROOT, dump, load, read
from latent_reasoning.dag.planning import parents_of
from tests.workflow.workflow_tools import TEST_CONFIG, snakemake

CONFIG = PROJECT_ROOT / "config"
REFERENCES = ["latent-6-rl", "cot-sft"]
FEW = {"steps": 4, "batch_size": 2, "warmup_steps": 1, "validate_every": 2, "validation_rows": 4}
SHORT = {"steps_per_stage": 1, "last_latent_stage": 1, "first_stage": 1, "group_size": 2}
"""Values of an entry's own keys, where it has them, that make it end in seconds."""


def tiny() -> dict[str, Any]:
    """The test experiment with the first entry of each stage and method of `config/rivals.yaml`."""
    config = read([TEST_CONFIG])
    shipped = load([CONFIG / "laptop.yaml", CONFIG / "rivals.yaml"])
    chosen: dict[tuple[str, str], str] = {}
    for name in shipped.report.rivals.models:
        entry = shipped.models[name]
        chosen.setdefault((entry.stage, getattr(entry, "method", "")), name)
    wanted, names = [*chosen.values(), *REFERENCES], []
    while wanted:
        name = wanted.pop()
        if name != "base" and name not in names:
            names.append(name)
            wanted += parents_of(shipped, name)
    entries = dump(shipped)["models"]
    for name in names:
        entry = entries[name]
        entry |= {key: value for key, value in SHORT.items() if key in entry}
        if "training" in entry:
            entry["training"] |= FEW
    config["models"] = {name: entries[name] for name in entries if name in names}
    models = [name for name in chosen.values() if name not in REFERENCES]
    trials = {models[-1]: [models[-1]]}
    rivals = {"models": models, "references": REFERENCES, "trials": trials}
    config["report"] = {"main": REFERENCES, "rivals": rivals}
    return config


def test_methods_of_every_stage_are_trained_timed_compared_and_shown(tmp_path: Path):
    config = tiny()
    file = tmp_path / "rivals.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    result = snakemake(tmp_path, "--configfile", file, "--", "rivals")
    assert result.returncode == 0, result.stdout + result.stderr
    results, models = tmp_path / "results" / "test", config["report"]["rivals"]["models"]
    table = pandas.read_csv(results / "tables" / "rivals.csv").set_index("model")
    assert list(table.index) == [*models, *REFERENCES]
    assert (table[["milliseconds_alone", "milliseconds_in_batches"]] > 0).all(axis=None)
    assert (table[["examples", "training_flop", "trained_parameters"]] > 0).all(axis=None)
    tuning = pandas.read_csv(results / "tables" / "rivals_tuning.csv")
    assert tuning["trial"].tolist() == [models[-1]]
    assert tuning["n"].tolist() == [8]
    paired = pandas.read_csv(results / "tables" / "rivals_paired.csv")
    assert len(paired) == 2 * len(models)
    page = (results / "report.html").read_text(encoding="utf-8")
    assert "<h2>The rivals</h2>" in page
    assert all((results / "figures" / f"rivals{part}.png").exists() for part in ("", "_curves"))
