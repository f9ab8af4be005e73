"""Golden numbers: what the pipeline gave when they were recorded, and what it has to give again.

    make golden                  record them again; refused where they changed and no RECIPE did

- `test.json`: SHA-256 of every model, metrics file, prediction and table of `config/test.yaml`, its
  appendix included
- `curves.json`: the losses of 40 steps of latent SFT and of RL
- `laptop.json`: SHA-256 of the weights of the laptop experiment with seed 0, the published ones
- `digests.json`: the digest of science of every stage of every shipped configuration

Weights are equal to the bit where torch and the processor are those recorded; elsewhere the curves
are compared, to 1e-4. Numbers that change say that finished models of users are no longer what the
code would make: `RECIPE` of that stage is to be raised, and a recording is refused until it is.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas
import torch

from latent_reasoning.config import PROJECT_ROOT, Experiment, load
from latent_reasoning.dag.digests import RECIPE, science_digest

FOLDER = Path(__file__).parent
TOLERANCE = 1e-4
CURVES = ("long-latent", "long-rl")
LAPTOP_FILES = ("model.safetensors", "latent.safetensors")
CONFIGURATIONS = (
    *(["laptop"], ["laptop", "laptop-5seeds"], ["laptop", "laptop-hard"], ["test"]),
    *(["laptop", "laptop-ablations"], ["laptop", "laptop-gpt2"], ["laptop", "laptop-sre"]),
    ["laptop", "laptop-sre", "laptop-estimators"],
    *(["smollm2"], ["smollm2", "smollm2-cpu"], ["paper"], ["paper", "h100"], ["published"]),
)


def read(name: str) -> dict[str, Any]:
    """A recorded file."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def machine() -> dict[str, str]:
    """What floating-point results depend on beside the code: torch, and the processor's kernels."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    vendor = next((line.split(":")[1].strip() for line in lines if "vendor_id" in line), "unknown")
    return {
        "torch": torch.__version__.split("+")[0],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "vendor": vendor,
    }


# ------------------------------------------------------------------------------ what is recorded


def result_sums(results: Path) -> dict[str, str]:
    """SHA-256 of the results of an experiment that hold neither times nor versions, by name."""
    patterns = (
        *("data/*.jsonl", "base/**/*.safetensors", "models/**/*.safetensors"),
        *("checkpoints/**/metrics.jsonl", "evaluations/**/predictions.parquet"),
        *("evaluations/**/*.csv", "tables/*"),
    )
    files = sorted(file for pattern in patterns for file in results.glob(pattern))
    return {str(file.relative_to(results)): _sum(file) for file in files if _is_final(file)}


def _is_final(file: Path) -> bool:
    timed = file.name == "compute.csv"
    return not timed and not any(part.startswith("long-") for part in file.parts)


def _sum(file: Path) -> str:
    if file.suffix == ".parquet":  # the file itself holds the version of its writer
        content = pandas.read_parquet(file).to_json(orient="split").encode()
    else:
        content = file.read_bytes()
    return hashlib.sha256(content).hexdigest()


def loss_curves(results: Path) -> dict[str, list[float]]:
    """The loss at each step of the trainings `CURVES`."""
    curves = {}
    for model in CURVES:
        file = results / "checkpoints" / model / "seed-0" / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        curves[model] = [row["loss"] for row in rows if "loss" in row]
    return curves


def laptop_sums(results: Path) -> dict[str, str]:
    """SHA-256 of the weights of a finished laptop experiment with seed 0."""
    folders = [results / "base" / "seed-0", *sorted(results.glob("models/*/seed-0"))]
    files = [folder / name for folder in folders for name in LAPTOP_FILES]
    return {str(file.relative_to(results)): _sum(file) for file in files if file.exists()}


def science_digests() -> dict[str, dict[str, str]]:
    """The digests of all shipped configurations, alone and as they are combined."""
    return {"+".join(names): dict(_digests_of(_experiment(names))) for names in CONFIGURATIONS}


def _experiment(names: list[str]) -> Experiment:
    return load([PROJECT_ROOT / "config" / f"{name}.yaml" for name in names])


def _digests_of(experiment: Experiment) -> Iterator[tuple[str, str]]:
    for stage in ("data", "test_set", "base"):
        yield stage, science_digest(experiment, stage)
    for model in experiment.models:
        for stage in ("model", "evaluation"):
            yield f"{stage} {model}", science_digest(experiment, stage, model)


# ------------------------------------------------------------------------------ how it compares


def differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Names whose values differ, or that are on one side alone."""
    names = dict.fromkeys([*recorded, *found])
    return [name for name in names if recorded.get(name) != found.get(name)]


def curve_differences(
    recorded: Mapping[str, list[float]], found: Mapping[str, list[float]]
) -> list[str]:
    """The first step of each curve that is further from the recorded one than `TOLERANCE`."""
    wrong = []
    for model, expected in recorded.items():
        losses = found.get(model, [])
        if len(losses) != len(expected):
            wrong.append(f"{model}: {len(losses)} steps instead of {len(expected)}")
            continue
        for step, (ours, theirs) in enumerate(zip(losses, expected, strict=True), start=1):
            if not math.isclose(ours, theirs, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
                wrong.append(f"{model}: loss {ours} instead of {theirs} at step {step}")
                break
    return wrong


def check_recipes(recorded: Mapping[str, Any], changed: list[str]) -> None:
    """Raise `ValueError` where numbers changed and no stage's `RECIPE` was raised."""
    if changed and recorded.get("recipe") == RECIPE:
        raise ValueError(
            f"{len(changed)} golden numbers changed ({', '.join(changed[:5])}, ..) and RECIPE in "
            "src/latent_reasoning/dag/digests.py did not: users would keep models that this code "
            "no longer makes. Raise the recipe of the stage that changed; or, where nothing was "
            "meant to change, find what did"
        )


def record(name: str, key: str, content: Mapping[str, Any]) -> None:
    """Write a recorded file, unless its numbers changed under the same recipes."""
    file = FOLDER / f"{name}.json"
    if file.exists() and read(name).get("machine") == machine():
        check_recipes(read(name), differences(read(name)[key], content))
    text = {"machine": machine(), "recipe": RECIPE, key: content}
    file.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
