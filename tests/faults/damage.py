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


def truncate(file: Path, randomness: random.Random) -> None:
    """Cut the end off."""
    data = file.read_bytes()
    file.write_bytes(data[: randomness.randrange(1, max(2, len(data)))])


def empty(file: Path, randomness: random.Random) -> None:
    """Nothing is left, as after a crash of the machine."""
    file.write_bytes(b"")


def flip(file: Path, randomness: random.Random) -> None:
    """Another value in one byte."""
    data = bytearray(file.read_bytes())
    data[randomness.randrange(len(data))] ^= 1 << randomness.randrange(8)
    file.write_bytes(data)


def overwrite(file: Path, randomness: random.Random) -> None:
    """As long as before, of random bytes."""
    file.write_bytes(randomness.randbytes(file.stat().st_size))


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "truncated": truncate,
    "emptied": empty,
    "one bit flipped": flip,
    "overwritten": overwrite,
}

MODEL, EVALUATION = "models/{model}/seed-0", "evaluations/{model}/seed-0/test"
# What is damaged, and what is made from it next.
OUTPUTS = [
    ("data/test.jsonl", f"{EVALUATION}/summary.json"),
    (f"{MODEL}/model.safetensors", f"{EVALUATION}/summary.json"),
    ("data/sft.jsonl", MODEL),
    ("data/validation.jsonl", MODEL),
    ("base/seed-0/model.safetensors", MODEL),
    (f"{MODEL}/config.json", f"{EVALUATION}/summary.json"),
    (f"{MODEL}/tokenizer.json", f"{EVALUATION}/summary.json"),
    (f"{MODEL}/latent.json", f"{EVALUATION}/summary.json"),
    (f"{EVALUATION}/summary.json", "tables/main.csv"),
    (f"{EVALUATION}/predictions.parquet", "tables/main.csv"),
    (f"{EVALUATION}/forced.csv", "tables/main.csv"),
    ("data/summary.json", "report.html"),
    ("tables/main.csv", "report.html"),
    ("config.yaml", f"{EVALUATION}/summary.json"),
]


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
    output: tuple[str, str],
    damage: str,
    model: str,
) -> Case:
    """Damage one result, make what depends on it, remove what the error names, make it again."""
    damaged, target = (name.format(model=model) for name in output)
    case = Case("damaged output", rule_that_makes(damaged, bench), f"{damaged} {damage}")
    remove(bench.results / target)
    if target.startswith("models/"):
        remove(bench.results / "checkpoints" / model)
    DAMAGES[damage](bench.results / damaged, randomness)
    path = f"results/{bench.experiment['experiment']}/{target}"
    first = bench.run(path)
    if first.returncode == 0:  # the damage was healed, or stood where nothing is read
        remove(unit_of(bench.results, damaged))
    else:
        check_refusal(case, first, Path(damaged).name)
        case.problems += [
            problem
            for problem in reference.problems(bench.results)
            if not problem.startswith(damaged)
        ]
        remove(unit_of(bench.results, damaged))
        if damaged.endswith(".jsonl"):
            remove((bench.results / damaged).with_suffix(".sha256"))
    made_again = f"results/{bench.experiment['experiment']}/{target}"
    check_results(case, bench, reference, bench.run(made_again), target)
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
    DAMAGES[damage](file, randomness)
    run = bench.run(f"results/{bench.experiment['experiment']}/{target}")
    check_results(case, bench, reference, run, target)
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
    DAMAGES[damage](file, randomness)
    bad = file.read_bytes()
    run = bench.run(f"results/local/{target}")
    # A flipped bit in a row may leave a row; weights have a digest.
    if run.returncode or what == "weights" or damage != "one bit flipped":
        check_refusal(case, run, str(file))
    case.check(file.read_bytes() == bad, "the input was changed")
    case.check(not (bench.results / target).exists() or not run.returncode, "half a result is left")
    file.write_bytes(good)
    run = bench.run(f"results/local/{target}")
    case.check(run.returncode == 0, "the next run failed")
    if what == "weights":
        ours = bench.results / "base/model.safetensors"
        case.check(ours.is_file() and ours.read_bytes() == good, "the weights differ")
    else:
        case.check((bench.results / target).is_file(), "no rows")
    return case.finish()


def rule_that_makes(path: str, bench: Workbench) -> str:
    """The rule of a result."""
    parts = Path(path).parts
    if parts[0] == "models":
        return bench.experiment["models"][parts[1]]["stage"]
    return {
        "data": "prepare_data",
        "base": "base_model",
        "evaluations": "evaluate",
        "tables": "tables",
        "config.yaml": "(the configuration)",
    }[parts[0]]


def every_damage(randomness: random.Random) -> Iterator[tuple[tuple[str, str], str]]:
    """Every output with one damage, each kind of damage in turn."""
    kinds = list(DAMAGES)
    start = randomness.randrange(len(kinds))
    for number, output in enumerate(OUTPUTS):
        yield output, kinds[(start + number) % len(kinds)]
