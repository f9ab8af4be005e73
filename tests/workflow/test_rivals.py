"""The rivals' comparison on the test experiment: all methods run, up to the tables and the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml

from latent_reasoning.analysis.__main__ import main as analyse
from latent_reasoning.base.__main__ import main as make_base
from latent_reasoning.config import PROJECT_ROOT, dump, load, read
from latent_reasoning.dag.planning import parents_of
from latent_reasoning.data.__main__ import main as prepare
from latent_reasoning.evaluation import timing
from latent_reasoning.evaluation.__main__ import main as evaluate
from latent_reasoning.rivals.__main__ import main as train_rival
from latent_reasoning.rl.__main__ import main as train_policy
from latent_reasoning.sft.__main__ import main as fine_tune
from tests.workflow.workflow_tools import TEST_CONFIG, snakemake

CONFIG = PROJECT_ROOT / "config"
REFERENCES = ["latent-6-rl", "cot-sft"]
FEW = {"steps": 4, "batch_size": 2, "warmup_steps": 1, "validate_every": 2, "validation_rows": 4}
SHORT = {"steps_per_stage": 1, "last_latent_stage": 1, "first_stage": 1, "group_size": 2}
"""Values of an entry's own keys, where it has them, that make it end in seconds."""


def tiny(wanted: list[str] | None = None) -> dict[str, Any]:
    """The test experiment with some models of `config/rivals.yaml` (None: the first entry of each
    stage and method, with a step decoder and without), and those they need."""
    shipped = load([CONFIG / f"{name}.yaml" for name in ("laptop", "laptop-sre", "rivals")])
    if wanted is None:
        first: dict[tuple, str] = {}
        for name in shipped.report.rivals.models:
            entry = shipped.models[name]
            kinds = [getattr(entry, key, None) for key in ("stage", "method")]
            first.setdefault((*kinds, bool(getattr(entry, "step_decoder", None))), name)
        wanted = list(first.values())
    models, names = [name for name in wanted if name not in REFERENCES], []
    needed = [*models, *REFERENCES]
    while needed:
        name = needed.pop()
        if name != "base" and name not in names:
            names.append(name)
            needed += parents_of(shipped, name)
    entries = dump(shipped)["models"]
    for name in names:
        entry = entries[name]
        entry |= {key: value for key, value in SHORT.items() if key in entry}
        if "training" in entry:
            entry["training"] |= FEW
    trials = {models[-1]: [models[-1]]}
    rivals = {"models": models, "references": REFERENCES, "trials": trials}
    return read([TEST_CONFIG]) | {
        "models": {name: entries[name] for name in entries if name in names},
        "report": {"main": REFERENCES, "rivals": rivals},
        "tracking": {"enabled": False},
    }


def written(folder: Path, config: dict[str, Any]) -> Path:
    file = folder / "rivals.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return file


def check(results: Path, models: list[str]) -> None:
    """The tables have a row a model, with costs, and the page shows them."""
    table = pandas.read_csv(results / "tables" / "rivals.csv").set_index("model")
    assert list(table.index) == [*models, *REFERENCES]
    assert (table[["milliseconds_alone", "milliseconds_in_batches"]] > 0).all(axis=None)
    assert (table[["examples", "training_flop", "trained_parameters"]] > 0).all(axis=None)
    tuning = pandas.read_csv(results / "tables" / "rivals_tuning.csv")
    assert tuning["trial"].tolist() == [models[-1]]
    assert tuning["n"].tolist() == [8]
    assert len(pandas.read_csv(results / "tables" / "rivals_paired.csv")) == 2 * len(models)
    page = (results / "report.html").read_text(encoding="utf-8")
    assert "<h2>The rivals</h2>" in page
    assert all((results / "figures" / f"rivals{part}.png").exists() for part in ("", "_curves"))


@pytest.mark.rivals
def test_every_method_is_trained_timed_compared_and_shown(tmp_path, monkeypatch):
    """As the rules run them, in one process."""
    monkeypatch.setenv("LATENT_REASONING_RESULTS", str(tmp_path))
    file = written(tmp_path, tiny())
    experiment, made = load(file), {"base"}
    prepare(["--config", str(file)])
    make_base(["--config", str(file)])
    commands = {"sft": fine_tune, "latent_sft": fine_tune, "rl": train_policy}
    while len(made) <= len(experiment.models):
        for name, entry in experiment.models.items():
            if name not in made and made >= set(parents_of(experiment, name)):
                train = commands.get(entry.stage, train_rival)
                train(["--config", str(file), "--model", name])
                made.add(name)
    rivals = experiment.report.rivals
    for name in [*rivals.models, *rivals.references]:
        evaluate(["--config", str(file), "--model", name])
        timing.main(["--config", str(file), "--model", name])
    evaluate(["--config", str(file), "--model", rivals.models[-1], "--dataset", "validation"])
    for what in ("tables", "figures", "tuning", "rivals", "report"):
        analyse([what, "--config", str(file)])
    check(tmp_path / "test", rivals.models)


@pytest.mark.rivals
def test_the_target_rivals_runs_one_method_of_each_stage(tmp_path):
    config = tiny(["coconut", "colar-head", "colar-at-5", "colar-rl"])
    file = written(tmp_path, config)
    result = snakemake(tmp_path, "--configfile", file, "--", "rivals")
    assert result.returncode == 0, result.stdout + result.stderr
    check(tmp_path / "results" / "test", config["report"]["rivals"]["models"])


@pytest.mark.parametrize("names", [None, ["coconut"]])
def test_the_tiny_experiment_resolves(tmp_path, names):
    load(written(tmp_path, tiny(names)))
