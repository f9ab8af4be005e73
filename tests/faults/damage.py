"""Files that are not what was written: results, checkpoints, and inputs from outside.

A damaged result either does not matter to what is made next, or is refused by an error that names
it; removed as that error says, it is made again. A damaged checkpoint is never in the way.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.cases import Case
from tests.faults.reference import Reference
from tests.faults.workbench import TRACEBACK, Run, Workbench, write_experiment


def flipped(data: bytes, chance: random.Random) -> bytes:
    """Another value of one bit."""
    changed = bytearray(data)
    changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": lambda data, chance: data[: chance.randrange(1, max(2, len(data)))],
    "emptied": lambda data, chance: b"",  # as after a crash of the machine
    "one bit flipped": flipped,
    "overwritten": lambda data, chance: chance.randbytes(len(data)),
}
MODEL, EVALUATION = "models/{model}/seed-0", "evaluations/{model}/seed-0/test"
SUMMARY, TABLE = f"{EVALUATION}/summary.json", "tables/main.csv"
OUTPUTS = [
    ("prepare_data", "data/test.jsonl", SUMMARY),
    ("latent_sft", f"{MODEL}/model.safetensors", SUMMARY),
    ("prepare_data", "data/sft.jsonl", MODEL),
    ("prepare_data", "data/validation.jsonl", MODEL),
    ("base_model", "base/seed-0/model.safetensors", MODEL),
    ("latent_sft", f"{MODEL}/config.json", SUMMARY),
    ("latent_sft", f"{MODEL}/tokenizer.json", SUMMARY),
    ("latent_sft", f"{MODEL}/latent.json", SUMMARY),
    ("evaluate", SUMMARY, TABLE),
    ("evaluate", f"{EVALUATION}/predictions.parquet", TABLE),
    ("evaluate", f"{EVALUATION}/forced.csv", TABLE),
    ("prepare_data", "data/summary.json", "report.html"),
    ("tables", TABLE, "report.html"),
    ("(the configuration)", "config.yaml", SUMMARY),
]
"""The rule that makes it, what is damaged, and what is made from it next."""


def damage_file(file: Path, damage: str, chance: random.Random) -> None:
    file.write_bytes(DAMAGES[damage](file.read_bytes(), chance))


def check_refusal(case: Case, run: Run, *named: str) -> None:
    """A failed run says what, where and what to do, and shows no program text."""
    case.check(run.returncode != 0, "the run went through")
    case.check(TRACEBACK not in run.output, "a traceback in the output")
    said = re.search(r"^\s*(error: |WorkflowError)", run.output, re.MULTILINE)
    case.check(said, "no line that says `error:`")
    for name in named:
        case.check(name in run.output, f"the output does not name {name}")


def check_results(
    case: Case, bench: Workbench, reference: Reference, run: Run, target: str
) -> None:
    """The run ended well, its target is there, and every result is the reference's."""
    case.check(run.returncode == 0, "the next run failed")
    case.check(TRACEBACK not in run.output, "a traceback in the output of the next run")
    case.check((bench.results / target).exists(), f"{target} is not there")
    case.problems += reference.problems(bench.results)
    case.problems += [f"orphan: {name}" for name in bench.orphans()]


def remove(path: Path) -> None:
    """A file, or a folder with what is in it."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def unit_of(results: Path, damaged: str) -> Path:
    """What is made, and so removed, as one: a model's folder, or the file."""
    parts = Path(damaged).parts
    length = {"models": 3, "base": 2}.get(parts[0], len(parts))
    return results.joinpath(*parts[:length])


def damaged_output(
    bench: Workbench,
    reference: Reference,
    randomness: random.Random,
    *,
    output: tuple[str, str, str],
    damage: str,
    model: str,
) -> Case:
    """Damage one result, make what depends on it, remove what the error names, make it again."""
    rule, damaged, target = (part.format(model=model) for part in output)
    case = Case("damaged output", rule, f"{damaged} {damage}")
    remove(bench.results / target)
    if target.startswith("models/"):
        remove(bench.results / "checkpoints" / model)
    damage_file(bench.results / damaged, damage, randomness)
    first = bench.make(target)
    if first.returncode:  # otherwise it was healed, or stood where nothing is read
        check_refusal(case, first, Path(damaged).name)
        problems = reference.problems(bench.results)
        case.problems += [problem for problem in problems if not problem.startswith(damaged)]
    remove(unit_of(bench.results, damaged))
    if first.returncode and damaged.endswith(".jsonl"):
        remove((bench.results / damaged).with_suffix(".sha256"))
    check_results(case, bench, reference, bench.make(target), target)
    return case.finish()


def damaged_checkpoint(
    bench: Workbench, reference: Reference, randomness: random.Random, *, model: str, damage: str
) -> Case:
    """Damage a file of the newest checkpoint of a model whose folder is gone."""
    stage = "base_model" if model == "base" else bench.experiment["models"][model]["stage"]
    folder = bench.results / "checkpoints" / model / "seed-0"
    newest = max(
        (path for path in folder.iterdir() if path.is_dir()), key=lambda p: p.stat().st_mtime_ns
    )
    file = randomness.choice(sorted(path for path in newest.iterdir() if path.is_file()))
    case = Case("damaged checkpoint", stage, f"{model}: {newest.name}/{file.name} {damage}")
    target = "base/seed-0" if model == "base" else f"models/{model}/seed-0"
    remove(bench.results / target)
    damage_file(file, damage, randomness)
    check_results(case, bench, reference, bench.make(target), target)
    return case.finish()


def damaged_input(
    bench: Workbench, reference: Reference, randomness: random.Random, *, what: str, damage: str
) -> Case:
    """Local rows or base weights that arrived damaged: refused by name, taken once restored."""
    folder = bench.folder / "raw"
    (folder / "rows").mkdir(parents=True)
    for split, source in (("train", "sft"), ("validation", "validation"), ("test", "test")):
        shutil.copy(bench.results / f"data/{source}.jsonl", folder / f"rows/{split}.jsonl")
    shutil.copytree(bench.results / "base" / "seed-0", folder / "base")
    experiment = bench.experiment | {"experiment": "local"}
    experiment["data"] = {"source": "local", "path": str(folder / "rows")}
    experiment["base"] = {"source": "local", "path": str(folder / "base")}
    write_experiment(bench.folder, experiment)
    bench = Workbench(bench.folder, cores=bench.cores)
    file, target, rule = {
        "rows": (folder / "rows/train.jsonl", "data/summary.json", "prepare_data"),
        "weights": (folder / "base/model.safetensors", "base", "base_model"),
    }[what]
    case = Case("damaged input", rule, f"{file.name} {damage}")
    good = file.read_bytes()
    damage_file(file, damage, randomness)
    bad = file.read_bytes()
    run = bench.make(target)
    # A flipped bit in a row may leave a row; weights have a digest.
    if run.returncode or what == "weights" or damage != "one bit flipped":
        check_refusal(case, run, str(file))
    case.check(file.read_bytes() == bad, "the input was changed")
    case.check(not (bench.results / target).exists() or not run.returncode, "half a result is left")
    file.write_bytes(good)
    run = bench.make(target)
    case.check(run.returncode == 0, "the next run failed")
    if what == "weights":
        ours = bench.results / "base/model.safetensors"
        case.check(ours.is_file() and ours.read_bytes() == good, "the weights differ")
    else:
        case.check((bench.results / target).is_file(), "no rows")
    return case.finish()


def every_damage(randomness: random.Random) -> Iterator[tuple[tuple[str, str, str], str]]:
    """Every output with one damage, each kind of damage in turn."""
    kinds = list(DAMAGES)
    start = randomness.randrange(len(kinds))
    for number, output in enumerate(OUTPUTS):
        yield output, kinds[(start + number) % len(kinds)]
