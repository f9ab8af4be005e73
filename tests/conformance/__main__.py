"""Replay recorded vectors of the public implementation through the project's own code paths.

    python -m tests.conformance DIR

prints one line a case, `PASS name`, `FAIL name: why` or `SKIP name: why`, and last
`N passed, M failed, K skipped`. It exits with 1 on any failure, and when no case is found or a
file, a key or an array of the folder is not understood.

Each area is a table, `READERS`: a pattern of files, and in it patterns of keys, one for each level
with `/` between, each with a reader. `reader(vectors, content, *groups)` yields checks of what the
key holds, or where the pattern of keys is empty, of the file of that name; the groups are those of
both patterns. Whatever no reader has read fails.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.conformance import data, forward, generation, grpo, losses, rewards
from tests.conformance.checks import Reader, compare
from tests.conformance.recording import Skip, Vectors
from tests.conformance.rivals import (
    coconut,
    codi,
    colar,
    cot2,
    hrpo,
    icot,
    latent_sft,
    latentseek,
    simcot,
    soft_thinking,
)

RIVALS = (
    *(coconut, codi, colar, cot2, hrpo, icot),
    *(latent_sft, latentseek, simcot, soft_thinking),
)
AREAS = (data, forward, generation, grpo, losses, rewards, *RIVALS)
INFORMATION = {area.__name__.rpartition(".")[2]: area.INFORMATION for area in AREAS}
"""By the folder's name: keys that describe the run or repeat other values, and need no reader."""
UNNAMED = r"(^data/[^/]+)/expected\.json|(/length_rewards)/cases(?=/)|_attention_mask(?=/)"
"""What the names of cases leave out."""
OTHER_FILES = r"(\w+/)?(README[\w-]*\.md|MANIFEST\.json)|bench/(sft|smol|grpo)_\w+\.npz"
"""Files that hold no case: descriptions, and batches that benchmarks run on."""

Outcomes = Iterator[tuple[str, str | Exception]]
"""Name of a case, and why it fails; empty where it does not. An error may stand for the reason."""


def replay(folder: Path) -> dict[str, tuple[str, str]]:
    """Verdict (PASS, FAIL or SKIP) and reason of each case of a folder, by its name.

    The first failure of a case decides, else the first reason to skip it.
    """
    verdicts: dict[str, tuple[str, str]] = {}
    for name, why in _outcomes(Vectors(folder)):
        is_plain = isinstance(why, str | Skip | ValueError)
        reason = " ".join((str(why) if is_plain else repr(why)).split())
        verdict = "SKIP" if isinstance(why, Skip) else "FAIL" if reason else "PASS"
        name = re.sub(UNNAMED, r"\1\2", name)
        worst = ("PASS", "SKIP", "FAIL").index
        if name not in verdicts or worst(verdict) > worst(verdicts[name][0]):
            verdicts[name] = verdict, reason
    return verdicts


def _outcomes(vectors: Vectors) -> Outcomes:
    """Those of every area, and last what no reader has read: files, keys and arrays."""
    skipped = set()
    tables = [item for area in AREAS for item in area.READERS.items()]
    for (pattern, readers), file in itertools.product(tables, vectors.paths):
        if match := re.fullmatch(pattern, file):
            for path, reader in readers.items():
                found = _guarded(file, _read(vectors, file, path, reader, match.groups()))
                for name, why in found:
                    skipped |= {name.partition("/")[0]} if isinstance(why, Skip) else set()
                    yield name, why
    for name in vectors.unread(INFORMATION):
        if re.fullmatch(OTHER_FILES, name):
            continue
        if name.partition("/")[0] in skipped:
            yield name, Skip("nothing has read it, as cases of its folder were skipped")
        else:
            yield name, "not understood: nothing reads it"


def _guarded(name: str, outcomes: Outcomes) -> Outcomes:
    """An error that ends the outcomes becomes that of the case `name`, and others follow."""
    try:
        yield from outcomes
    except Exception as error:
        yield name, error


def _read(vectors: Vectors, file: str, path: str, reader: Reader, groups: tuple) -> Outcomes:
    found: Iterable[tuple] = [(file, file, groups)]
    if path:
        found = _find(file, vectors.file(file), path.split("/"), groups)
    for name, content, all_groups in found:
        checks = reader(vectors, content, *all_groups)
        parts = ((f"{name}/{c.part}".removesuffix("/"), compare(*c[:3])) for c in checks)
        yield from _guarded(name, parts)


def _find(name: str, content: Any, keys: list[str], groups: tuple) -> Iterator[tuple]:
    """Name, content and groups of what lies under the keys; a number on the way is not passed."""
    if not keys or not isinstance(content, Mapping | list):
        yield name, content, groups
        return
    for key in content if isinstance(content, Mapping) else range(len(content)):
        if match := re.fullmatch(keys[0], str(key)):
            yield from _find(f"{name}/{key}", content[key], keys[1:], groups + match.groups())


def main() -> None:
    """Print the verdicts."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("directory", type=Path, help="folder of vectors")
    options = arguments.parse_args()
    if not options.directory.is_dir():
        sys.exit(f"error: {options.directory}: no such folder of vectors")
    torch.set_num_threads(1)
    verdicts = replay(options.directory)
    for name, (verdict, reason) in verdicts.items():
        print(f"{verdict} {name}" + (f": {reason}" if reason else ""))
    counts = Counter(verdict for verdict, _ in verdicts.values())
    print(f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIP']} skipped")
    if counts["FAIL"] or not counts["PASS"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
