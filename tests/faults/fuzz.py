"""Random configurations and rows: accepted, or refused in words.

A refusal is a `UserError` that names the file and the key or line, and gives a reason. What is
accepted can be planned and comes back the same from its own dump. Anything else is a finding. The
cases go through the functions that the workflow and the commands call, in this process.
"""

from __future__ import annotations

import copy
import datetime
import json
import re
import string
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import yaml

from latent_reasoning import config
from latent_reasoning.config import PROJECT_ROOT, UserError
from latent_reasoning.dag import cost, digests
from latent_reasoning.dag.layout import Layout
from latent_reasoning.data import __main__ as data_stage
from latent_reasoning.data.dial.tokenizer import build_tokenizer, generated_texts
from latent_reasoning.data.rows import read_rows
from latent_reasoning.data.sequences import (
    SPECIAL_TOKENS,
    apply_special_token_policy,
    encode_prompts,
)

SHORT = config.read([PROJECT_ROOT / "config" / "test.yaml"])
FULL = config.dump(config.resolve(SHORT, "test.yaml"))
KEY_OR_LINE = r"line \d+|[a-z_0-9-]+(\.[^ ]+)*: |a mapping of keys|cannot be read"
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

    @property
    def row(self) -> dict[str, object]:
        """The row of `fuzz.csv`."""
        counts = {"cases": self.cases, "accepted": self.accepted, "refused": self.refused}
        return {"kind": self.kind, **counts, "findings": len(self.findings)}

    def note(self, verdict: str, example: object) -> None:
        """Count a case that was "accepted" or "refused"; any other verdict is a finding."""
        self.accepted += verdict == "accepted"
        self.refused += verdict == "refused"
        if verdict not in ("accepted", "refused"):
            self.findings.append(f"{verdict[:300]} <- {example!r:.600}")


def judged(error: Exception, files: Sequence[str], where: str = "") -> str:
    """ "refused" where an error is one that a user can mend; else what is wrong with it.

    It is to name one of `files`, what `where` matches (a key or line), and a reason.
    """
    if not isinstance(error, UserError):
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}: {error}"
    rest = str(error)
    for file in files:
        rest = rest.replace(f"{file}:", "")
    if not any(file in str(error) for file in files):
        return f"names none of {files}: {error}"
    if not re.search(where, rest):
        return f"names no key or line: {error}"
    letters = len(re.findall(r"[A-Za-z]", rest))
    return "refused" if letters >= SHORTEST_REASON else f"gives no reason: {error}"


# --------------------------------------------------------------------------------------- values

ODD_TEXTS = [
    *("", " ", "null", "self", "base", "latent-6", "rl", "a b", "a" * 5000, "1e-4", "1e999"),
    *("../../up", "$(touch x)", "`id`", "${NOT_SET}", "<START>", "<|STOP|>", "</s>", "<<1+2=3>>"),
    *("1,000", "-3", "NaN", "٣", "½", "#### 5", "The answer is: 5", "\n \n", "a\x85b", "\ud800"),
]
ODD_VALUES = [
    *(None, True, [], {}, [None], {"a": 1}, b"\xff", datetime.date(2020, 1, 1)),
    *(0, -1, 0.5, 2**63, 10**30, 1e308, 1e-320, float("nan"), float("-inf")),
]
CHARACTERS = string.printable + "üЖ٣½𝛽\x00\x1b\x7f\x85\xa0\u2028\u202e\ufeff\ud800"


def text(chance: Random) -> str:
    """A text of any characters, or one that means something somewhere."""
    letters = "".join(chance.choices(CHARACTERS, k=chance.randrange(20)))
    return chance.choice([letters, chance.choice(ODD_TEXTS)])


def anything(chance: Random) -> Any:
    """A value of any type."""
    number, words = chance.randrange(-9, 99), text(chance)
    odd = copy.deepcopy(chance.choice(ODD_VALUES))
    return chance.choice([odd, odd, number, chance.random(), words, [number, words]])


def like(value: Any, chance: Random) -> Any:
    """Another value, mostly of the same type."""
    number, share, words = chance.randrange(20), chance.random(), text(chance)
    same = {bool: not value, int: number, float: share, str: words}.get(type(value))
    return anything(chance) if same is None or chance.random() < 0.3 else same


# ------------------------------------------------------------------------------- configurations

YAML_PARTS = [
    *(b"\t", b": ", b"- ", b"&a *a", b"{", b"]", b"? ", b"|\n", b"\n---\n", b"\xff\xfe", b"\x7f"),
    *(b"!!python/name:os", b"!!set {a}", b"<<: *few_steps\n", b"2020-01-01", b".nan"),
]


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every mapping or list of a configuration with each of its keys or positions."""
    for key, child in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(child, dict | list):
            yield from places(child)


def known_keys() -> list[str]:
    """Every key that some section knows, so that the right key stands in the wrong place, too."""
    definitions = config.schema_of_experiment()["$defs"].values()
    return sorted({key for part in definitions for key in part.get("properties", {})})


def configuration(chance: Random, keys: Sequence[str]) -> bytes:
    """The test configuration, short or resolved, with one to three things wrong, or cut as text."""
    tree = copy.deepcopy(chance.choice([SHORT, FULL]))
    for _ in range(chance.choice([1, 1, 2, 3])):
        parent, key = chance.choice(list(places(tree)))
        new_key = chance.choice([chance.choice(keys), text(chance)])
        what = chance.choice(["replace"] * 5 + ["add", "rename", "remove"])
        if what == "replace" or isinstance(parent, list):
            parent[key] = like(parent[key], chance)
        elif what == "add":
            parent[new_key] = anything(chance)
        else:
            parent |= {new_key: parent.pop(key)} if what == "rename" else {}
            parent.pop(key, None)
    data = yaml.dump(tree, allow_unicode=True, sort_keys=False).encode("utf-8", "surrogatepass")
    if chance.random() < 0.2:
        at = chance.randrange(len(data))
        some = chance.choice([chance.randbytes(chance.randrange(6)), chance.choice(YAML_PARTS)])
        data = data[:at] + some + data[at + chance.randrange(12) :]
    return data


def fuzz_configurations(folder: Path, cases: int, number: int) -> Tally:
    """Load, plan, dump and load again, as the workflow and every stage do."""
    tally, chance, keys = Tally("configurations"), Random(f"{number} configurations"), known_keys()
    file = folder / "fuzzed.yaml"
    for _ in range(cases):
        data, names = configuration(chance, keys), [str(file)]
        file.write_bytes(data)
        verdict = "accepted"
        try:
            experiment = config.load(file)
            names = ["what is accepted can be used"]
            use(experiment, folder)
        except Exception as error:
            verdict = judged(error, names, KEY_OR_LINE)
        tally.note(verdict, data)
    return tally


def use(experiment: config.Experiment, folder: Path) -> None:
    """What planning does with an accepted configuration, which then may not fail."""
    cost.describe(experiment, experiment.report.main or list(experiment.models))
    for name in experiment.models:
        for stage in ("model", "evaluation"):
            digests.science_digest(experiment, stage, name)
    for stage in ("data", "base"):
        digests.science_digest(experiment, stage)
    layout = Layout.of(experiment, folder / "results")
    assert layout.folder.parent == folder / "results", "results lie outside results/"
    resolved = folder / "resolved.yaml"
    resolved.write_text(config.dump_yaml(experiment), encoding="utf-8")
    assert config.load(resolved) == experiment, "not the same after dump and load"


# ----------------------------------------------------------------------------------------- rows

RAW_LINES = [
    *(b"{", b"\xff\xfe", b"[" * 3000, b"NaN", b"\x00", b"\r", b"\xef\xbb\xbf{}", b""),
    *(b'{"question": "a", "question": 1}', b'{"answer": 1' + b"0" * 5000 + b"}", b"[1]"),
]


def plain_row(number: int) -> dict[str, Any]:
    """A row with nothing wrong."""
    steps = ["<<1+1=2>>", "<<2+1=3>>"]
    return {"question": f"What is {number} and 1?", "steps": steps, "answer": "3"}


def row_file(chance: Random) -> bytes:
    """JSON lines in any order, up to three of them odd, and sometimes one that is no row."""
    rows = [plain_row(number) for number in range(8)]
    for row in rows[: chance.randrange(4)]:
        column = chance.choice(["question", "steps", "answer", "id", "Question"])
        row[column] = like(row.get(column, ""), chance)
    lines = [json.dumps(r, ensure_ascii=False, default=str) for r in rows]
    raw = [chance.choice(RAW_LINES)] if chance.random() < 0.3 else []
    raw += [line.encode("utf-8", "surrogatepass") for line in lines]
    chance.shuffle(raw)
    return b"\n".join(raw)


def fuzz_rows(folder: Path, cases: int, number: int) -> Tally:
    """Prepare local rows by the data stage's own `main`, then read them as training does."""
    tally, chance = Tally("rows"), Random(f"{number} rows")
    rows, path = folder / "rows", folder / "rows.yaml"
    rows.mkdir(parents=True, exist_ok=True)
    for split in ("validation", "test"):
        lines = [json.dumps(plain_row(-number)) for number in range(1, 8)]
        (rows / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tokenizer = build_tokenizer(generated_texts(7))
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})

    for _ in range(cases):
        content = row_file(chance)
        (rows / "train.jsonl").write_bytes(content)
        policy = chance.choice(["error", "skip", "escape", "keep"])
        data = {"source": "local", "path": str(rows), "special_token_text": policy}
        data["on_bad_row"] = chance.choice(["error", "skip"])
        base = {"source": "local", "path": str(folder)}
        path.write_text(yaml.safe_dump({**SHORT, "data": data, "base": base}), encoding="utf-8")
        verdict = "accepted"
        try:
            data_stage.main(["--config", str(path)])
            prepared = read_rows(Layout.of(config.load(path)).data("sft"))
            kept, _ = apply_special_token_policy(prepared, tokenizer, policy)
            encode_prompts(kept, tokenizer, prefix="Question: ", latent=True)
        except Exception as error:
            verdict = judged(error, [str(rows), "the split", "sft.jsonl", "row train-"])
        tally.note(verdict, content)
    return tally
