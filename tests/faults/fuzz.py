"""Random configurations and rows: accepted, or refused in words.

A refusal is one of the project's own errors and names the file, the key or line, and a reason.
Anything else that is raised is a finding. The cases go through the functions that the command lines
call, in this process; a few of them through the command line itself.
"""

from __future__ import annotations

import copy
import json
import random
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from latent_reasoning import config
from latent_reasoning.config import PROJECT_ROOT, ConfigError
from latent_reasoning.dag import digests
from latent_reasoning.dag.cost import describe
from latent_reasoning.dag.layout import Layout
from latent_reasoning.dag.planning import write_config
from latent_reasoning.data import __main__ as data_stage
from latent_reasoning.data.dial.tokenizer import build_tokenizer, generated_texts
from latent_reasoning.data.rows import DataError, read_rows
from latent_reasoning.data.sequences import (
    SPECIAL_TOKENS,
    apply_special_token_policy,
    encode_latent_rows,
    reasoning_text,
)
from latent_reasoning.evaluation.folder import read_free_rows

OWN_ERRORS = (ConfigError, DataError)
BASE = yaml.safe_load((PROJECT_ROOT / "config" / "test.yaml").read_text(encoding="utf-8"))
SHORTEST_REASON = 8


@dataclass
class Tally:
    """What came of the cases of one kind."""

    kind: str
    accepted: int = 0
    refused: int = 0
    findings: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return self.accepted + self.refused + len(self.findings)


KEY_OR_LINE = re.compile(r"line \d+|[a-z_0-9-]+(\.[^ ]+)*: |a mapping of keys|cannot be read")


def judged(error: Exception, names: Sequence[str], where: re.Pattern[str] | None = None) -> str:
    """What is wrong with an error; nothing where it is as it should be.

    It is to be of the project's own, to name one of `names` (a file), what `where` matches (a key
    or line), and to give a reason.
    """
    if not isinstance(error, OWN_ERRORS):
        return unexpected(error)
    text = str(error)
    if not any(name in text for name in names):
        return f"names none of {names}: {text}"
    rest = text
    for name in names:
        rest = rest.replace(name + ":", "")
    if where is not None and not where.search(rest):
        return f"names no key or line: {text}"
    if len(re.sub(r"[^A-Za-z]", "", rest)) < SHORTEST_REASON:
        return f"gives no reason: {text}"
    return ""


def unexpected(error: Exception) -> str:
    """An error that nobody wrote for a user, and where it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "latent_reasoning" in frame.filename] or frames
    where = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "no program text"
    return f"{type(error).__name__} in {where}: {str(error)[:150]}"


def run_cases(
    tally: Tally, strategy: st.SearchStrategy, cases: int, number: int, check: Callable[[Any], str]
) -> Tally:
    """Try `cases` examples; `check` returns "accepted", "refused" or what is wrong."""

    @seed(number)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def one(example: Any) -> None:
        try:
            verdict = check(example)
        except Exception as error:
            verdict = unexpected(error)
        if verdict in ("accepted", "refused"):
            setattr(tally, verdict, getattr(tally, verdict) + 1)
        else:
            tally.findings.append(f"{verdict[:300]} <- {example!r:.600}")

    one()
    return tally


# ------------------------------------------------------------------------------- configurations

NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**30, 1e308, -1e308, 1e-320, "1e-4", "1e999"]),
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["", " ", "null", "base", "latent-6", "self", "rl", "a b", "a" * 5000]),
    st.sampled_from(["../../up", "$(touch x)", "`id`", "${NOT_SET}", "'", '"', "<START>"]),
    st.sampled_from(["ü", "\x00", "\u202e", "\ud800"]),
)
SCALARS = st.one_of(NUMBERS, TEXTS, st.none(), st.booleans(), st.dates(), st.binary(max_size=5))
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.one_of(TEXTS, SCALARS), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every key and list item of a configuration."""
    children = value.items() if isinstance(value, dict) else ()
    children = enumerate(value) if isinstance(value, list) else children
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def plain(value: Any) -> Any:
    """A deep copy without shared parts."""
    return json.loads(json.dumps(value))


def known_keys() -> list[str]:
    """Every key that some section knows, so that the right key stands in the wrong place, too."""
    definitions = config.schema_of_experiment()["$defs"].values()
    return sorted({key for part in definitions for key in part.get("properties", {})})


FULL = config.dump(config.resolve(plain(BASE), "test.yaml"))
PLACES = {"short": list(places(plain(BASE))), "full": list(places(FULL))}
KEYS = known_keys()


@st.composite
def configurations(draw: st.DrawFn) -> dict:
    """The test configuration, or its resolved form, with one to three things wrong."""
    form = draw(st.sampled_from(["short", "full"]))
    mutated = plain(BASE) if form == "short" else copy.deepcopy(FULL)
    for _ in range(draw(st.integers(1, 3))):
        mutate(mutated, draw(st.sampled_from(PLACES[form])), draw)
    return mutated


def mutate(tree: Any, path: tuple, draw: st.DrawFn) -> None:
    """Replace, remove or add one thing at a path, where an earlier change left it."""
    try:
        for key in path[:-1]:
            tree = tree[key]
        last = path[-1]
        tree[last]
    except (KeyError, IndexError, TypeError):
        return
    what = draw(st.sampled_from(["replace", "replace", "remove", "add", "rename", "move"]))
    if isinstance(tree, list):
        tree[last] = draw(VALUES)
    elif isinstance(tree, dict):
        if what == "remove":
            del tree[last]
        elif what == "add":
            tree[draw(st.one_of(st.sampled_from(KEYS), TEXTS, SCALARS))] = draw(VALUES)
        elif what == "rename":
            tree[draw(st.one_of(st.sampled_from(KEYS), TEXTS))] = tree.pop(last)
        elif what == "move":
            tree[last] = {last: tree[last]}
        else:
            tree[last] = draw(VALUES)


YAML_PARTS = [
    *(b"\t", b": ", b"- ", b"&a *a", b"{", b"]", b"? ", b"|\n", b"\n---\n"),
    *(b"\xff\xfe", b"!!python/name:os", b"<<: *few_steps\n"),
]
ENCODINGS = ["utf-16", "latin-1"]


@st.composite
def configuration_files(draw: st.DrawFn) -> bytes:
    """The bytes of a configuration: a mutated one as YAML, or the file itself damaged as text."""
    if draw(st.integers(0, 2)):
        text = yaml.dump(draw(configurations()), allow_unicode=True, sort_keys=False)
        data = text.encode("utf-8", "surrogatepass")
    else:
        data = (PROJECT_ROOT / "config" / "test.yaml").read_bytes()
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(data)))
            some = draw(st.one_of(st.binary(max_size=6), st.sampled_from(YAML_PARTS)))
            data = data[:at] + some + data[at + draw(st.integers(0, 12)) :]
    if not draw(st.integers(0, 15)):
        text = data.decode("utf-8", "replace")
        data = text.encode(draw(st.sampled_from(ENCODINGS)), "replace")
    return data


def fuzz_configurations(folder: Path, cases: int, number: int) -> Tally:
    """Load, resolve, digest, dump and load again, as the workflow and every stage do."""
    file = folder / "fuzzed.yaml"

    def check(data: bytes) -> str:
        file.write_bytes(data)
        try:
            experiment = config.load(file)
        except Exception as error:
            wrong = judged(error, [str(file)], KEY_OR_LINE)
            return wrong or "refused"
        use(experiment, folder)
        return "accepted"

    return run_cases(Tally("configurations"), configuration_files(), cases, number, check)


def use(experiment: config.Experiment, folder: Path) -> None:
    """What planning does with an accepted configuration, which then may not fail."""
    main = experiment.report.main or list(experiment.models)
    describe(experiment, main)
    for name in experiment.models:
        for stage in ("model", "evaluation"):
            digests.science_digest(experiment, stage, name)
    for stage in ("data", "base"):
        digests.science_digest(experiment, stage)
    layout = Layout.of(experiment, folder / "results")
    assert layout.folder.parent == folder / "results", "results lie outside results/"
    write_config(experiment, folder / "resolved.yaml")
    assert config.load(folder / "resolved.yaml") == experiment, "not the same after dump and load"


# ----------------------------------------------------------------------------------------- rows

WORDS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(["", " ", "5", "-3", "1,000", "5.", "NaN", "1e400", "٣", "½", "#### 5"]),
    st.sampled_from(["<START>", "<END>", "<|CONTINUE|>", "<|STOP|>", "</s>", "The answer is: 5"]),
    st.sampled_from(["\x00", "\u2028", "\ud83d", "word " * 400, "<<1+2=3>>", "\\", "\n\n", "{}"]),
)
CELLS = st.one_of(
    WORDS,
    st.integers(),
    st.floats(),
    st.none(),
    st.booleans(),
    st.lists(st.one_of(WORDS, st.integers(), st.none()), max_size=4),
    st.dictionaries(st.text(max_size=5), WORDS, max_size=2),
)


def plain_row(number: int) -> dict[str, Any]:
    """A row with nothing wrong."""
    steps = ["<<1+1=2>>", "<<2+1=3>>"]
    return {"question": f"What is {number} and 1?", "steps": steps, "answer": "3"}


SOUND_ROW = st.integers(0, 9999).map(plain_row)
ROW = st.one_of(
    SOUND_ROW,
    st.builds(
        lambda row, column, cell: {**row, column: cell},
        SOUND_ROW,
        st.sampled_from(["question", "steps", "answer", "id", "Question"]),
        CELLS,
    ),
    st.builds(
        lambda row, column: {k: v for k, v in row.items() if k != column},
        SOUND_ROW,
        st.sampled_from(["question", "steps", "answer"]),
    ),
    CELLS,
)
RAW_LINES = st.one_of(
    st.binary(max_size=30),
    st.sampled_from([b"{", b"\xff\xfe", b"[" * 3000, b"NaN", b"\x00", b"\r", b"\xef\xbb\xbf{}"]),
    st.sampled_from([b'{"question": "a", "question": 1}', b'{"answer": 1' + b"0" * 5000 + b"}"]),
)


@st.composite
def row_files(draw: st.DrawFn) -> tuple[str, bytes, dict[str, str]]:
    """A file of rows (kind and bytes), and settings that say what becomes of bad ones."""
    kind = draw(st.sampled_from(["jsonl", "jsonl", "jsonl", "parquet", "csv"]))
    keys = {
        "on_bad_row": draw(st.sampled_from(["error", "skip"])),
        "special_token_text": draw(st.sampled_from(["error", "skip", "escape", "keep"])),
    }
    sound = [plain_row(n) for n in range(draw(st.sampled_from([0, 8, 8, 8])))]
    rows = sound + draw(st.lists(ROW, max_size=4))
    if kind == "parquet":
        data = parquet_bytes(rows, draw)
    else:
        texts = [json.dumps(row, ensure_ascii=False) for row in rows]
        lines = [text.encode("utf-8", "surrogatepass") for text in texts]
        if draw(st.booleans()):
            lines += draw(st.lists(RAW_LINES, max_size=2))
        data = b"\n".join(draw(st.permutations(lines)))
    if not draw(st.integers(0, 9)):
        data = data[: draw(st.integers(0, len(data)))]
    return kind, data, keys


def parquet_bytes(rows: list[Any], draw: st.DrawFn) -> bytes:
    """The rows as parquet where a table can hold them, else some table with such columns."""
    records = [row for row in rows if isinstance(row, dict) and row]
    try:
        table = pyarrow.Table.from_pylist(records)
    except (pyarrow.ArrowException, UnicodeError, OverflowError, TypeError, ValueError):
        numbers = draw(st.lists(st.integers(-5, 5), min_size=1, max_size=3))
        table = pyarrow.table({"question": numbers, "answer": numbers})
    sink = pyarrow.BufferOutputStream()
    try:
        pyarrow.parquet.write_table(table, sink)
    except pyarrow.ArrowException:
        return b"PAR1"
    return sink.getvalue().to_pybytes()


def fuzz_rows(folder: Path, cases: int, number: int) -> Tally:
    """Prepare local rows by the data stage's own `main`, then read them as training does."""
    rows = folder / "rows"
    rows.mkdir(parents=True, exist_ok=True)
    for split in ("validation", "test"):
        lines = [json.dumps(plain_row(-number)) for number in range(1, 8)]
        (rows / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tokenizer = build_tokenizer(generated_texts(7))
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})

    def check(case: tuple[str, bytes, dict[str, str]]) -> str:
        kind, data, keys = case
        for old in rows.glob("train.*"):
            old.unlink()
        file = rows / f"train.{kind}"
        file.write_bytes(data)
        experiment = plain(BASE) | {"data": {"source": "local", "path": str(rows), **keys}}
        experiment["base"] = {"source": "local", "path": str(folder)}
        path = folder / "rows.yaml"
        path.write_text(yaml.safe_dump(experiment), encoding="utf-8")
        try:
            data_stage.main(["--config", str(path)])
            encode(config.load(path), tokenizer)
            if kind == "jsonl":
                read_free_rows(file)
        except Exception as error:
            named = (str(file), str(rows), "the split", "sft.jsonl", "row train-")
            return judged(error, named) or "refused"
        return "accepted"

    return run_cases(Tally("rows"), row_files(), cases, number, check)


def encode(experiment: config.Experiment, tokenizer) -> None:
    """Read prepared rows and make sequences of them, as latent SFT does."""
    layout, entry = Layout.of(experiment), experiment.models["latent-6"]
    kept, _ = apply_special_token_policy(
        read_rows(layout.data("sft")), tokenizer, experiment.data.special_token_text
    )
    with_steps = [row for row in kept if row.steps is not None]
    encode_latent_rows(
        with_steps,
        tokenizer,
        steps=entry.latent_steps,
        prefix=experiment.data.prompt.training,
        reasonings=[reasoning_text(row, drop_last_step=entry.drop_last_step) for row in with_steps],
        drop_last_step=entry.drop_last_step,
        shift_target=entry.shift_target,
        mask_latent_labels=entry.mask_latent_labels,
        learn_start=entry.learn_start,
    )


# --------------------------------------------------------------------------------- command lines

WRONG = {
    "no file": None,
    "empty": b"",
    "a list": b"- 1\n",
    "bad YAML": b"a: [1\n",
    "not UTF-8": b"experiment: \xff\n",
    "unknown key": b"experiment: a\nmodel_s: {}\nmodels: {a: {stage: sft, training: {steps: 1}}}\n",
    "a shell": b"experiment: $(touch x)\nmodels: {a: {stage: sft, training: {steps: 1}}}\n",
}


def fuzz_commands(folder: Path, cases: int, number: int) -> Tally:
    """Configurations that cannot be run, by the real command line of each stage."""
    tally = Tally("command lines")
    stages = ["data", "tracking", "analysis", "model", "evaluation", "sft", "rl"]
    wrong = list(WRONG.items())
    random.Random(number).shuffle(wrong)
    for case in range(cases):
        name, content = wrong[case % len(wrong)]
        stage = stages[case % len(stages)]
        file = folder / f"wrong-{case}.yaml"
        if content is not None:
            file.write_bytes(content)
        command = [sys.executable, "-m", f"latent_reasoning.{stage}"]
        command += ["tables"] if stage == "analysis" else []
        command += ["--config", str(file)]
        command += ["--model", "a"] if stage in ("sft", "rl", "evaluation") else []
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        said = result.stderr.strip().splitlines()
        if result.returncode == 0 or not said:
            tally.findings.append(f"{stage}, {name}: accepted")
        elif "Traceback" in result.stderr or not said[-1].startswith("error: "):
            tally.findings.append(f"{stage}, {name}: {said[-1]}")
        elif str(file) not in result.stderr:
            tally.findings.append(f"{stage}, {name}: does not name the file: {said[-1]}")
        else:
            tally.refused += 1
    if (folder / "x").exists():
        tally.findings.append("a name reached a shell")
    return tally
