"""Recorded vectors pass, and whatever is changed in them or added to them fails."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from latent_reasoning.config import PROJECT_ROOT
from tests.conformance.__main__ import main, replay
from tests.conformance.checks import EXACT, Tolerance, compare

SELECTION = Path(__file__).parent / "vectors"
DEFAULT = PROJECT_ROOT.parent / "shared" / "conformance"
EVERYTHING = Path(os.environ.get("LATENT_REASONING_CONFORMANCE", DEFAULT))
RIVALS = PROJECT_ROOT.parent / "shared" / "rivals" / "vectors"


@pytest.mark.parametrize(
    ("folder", "cases", "mistaken"), [(SELECTION, 249, 0), (EVERYTHING, 350, 0), (RIVALS, 1285, 5)]
)
def test_every_recorded_case_passes(folder, cases, mistaken):
    """Those that only a mistake of the public code can match are skipped."""
    if not folder.is_dir():
        pytest.skip("these vectors are not here")
    torch.set_num_threads(1)
    verdicts = replay(folder)
    other = {name: found for name, found in verdicts.items() if found[0] != "PASS"}
    skipped = [name for name, (verdict, why) in other.items() if why.startswith("the public code")]
    assert {name: found for name, found in other.items() if name not in skipped} == {}
    assert len(skipped) == mistaken
    assert len(verdicts) >= cases


@pytest.fixture
def vectors(tmp_path) -> Path:
    """A few cases that need no model."""
    shutil.copytree(SELECTION / "rewards", tmp_path / "rewards")
    (tmp_path / "grpo").mkdir()
    shutil.copy(SELECTION / "grpo" / "synthetic.npz", tmp_path / "grpo")
    content = json.loads((SELECTION / "grpo" / "expected.json").read_text(encoding="utf-8"))
    del content["e2e_temp1"]
    (tmp_path / "grpo" / "expected.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


def change(path: Path, *keys: str | int, value: object) -> None:
    """Set what lies under `keys` in a JSON or npz file."""
    if path.suffix == ".npz":
        np.savez(path, **(dict(np.load(path)) | {keys[0]: value}))
        return
    content = inner = json.loads(path.read_text(encoding="utf-8"))
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(content), encoding="utf-8")


def failed(vectors: Path) -> list[str]:
    return [name for name, (verdict, _) in replay(vectors).items() if verdict == "FAIL"]


CASE = "mixed/bnpo/beta0.0/old_none"
REWARDS, GRPO = "rewards/expected.json", "grpo/expected.json"
LENGTHS = "length_rewards", "cases", "paper/all_wrong"


@pytest.mark.parametrize(
    ("file", "keys", "value", "name"),
    [
        (REWARDS, ("compare_answers", 0, "verdict"), False, "compare_answers/0"),
        (REWARDS, (*LENGTHS, "rewards", 0), 0.00001, "length_rewards/paper/all_wrong"),
        (REWARDS, (*LENGTHS, "surprise"), 1, "length_rewards/paper/all_wrong/surprise"),
        (REWARDS, (*LENGTHS, "settings", "surprise"), None, "paper/all_wrong/settings/surprise"),
        (REWARDS, ("format_table", 3, "surprise"), 1, "format_table/3/surprise"),
        (REWARDS, ("surprise",), {"key": 1}, "rewards/expected.json/surprise"),
        (GRPO, ("synthetic", CASE, "loss"), 0.5, f"synthetic/{CASE}"),
        (GRPO, ("synthetic", CASE, "metrics", "surprise"), 0.5, f"{CASE}/metrics/surprise"),
        (GRPO, ("synthetic", "surprise"), 1, "synthetic/surprise"),
        ("grpo/synthetic.npz", ("advantages_mixed",), np.ones(8), "npz/advantages_mixed"),
        ("grpo/synthetic.npz", ("surprise",), np.ones(8), "npz/surprise"),
    ],
)
def test_a_changed_value_and_an_added_key_or_array_fail(vectors, file, keys, value, name):
    change(vectors / file, *keys, value=value)
    assert any(case.endswith(name) for case in failed(vectors))


@pytest.mark.parametrize("name", ["surprise.json", "grpo/surprise.npz", "rewards/a/b", "other/c"])
def test_an_added_file_fails(vectors, name):
    (vectors / name).parent.mkdir(exist_ok=True)
    (vectors / name).write_text("{}", encoding="utf-8")
    assert failed(vectors) == [name]


def test_cases_without_their_checkpoint_are_skipped(tmp_path):
    shutil.copytree(SELECTION / "losses", tmp_path / "losses")
    counts = Counter(verdict for verdict, _ in replay(tmp_path).values())
    assert counts["PASS"] == 9
    assert counts["SKIP"] > 0
    assert counts["FAIL"] == 0


@pytest.mark.parametrize(
    ("settings", "factor", "verdict"),
    [
        ("both20_block_0_2_smooth_l1_layerwise_std", 1.0, "PASS"),
        ("both10_smooth_l1_layerwise_std", 0.5, "PASS"),
        ("both20_l2_std", 1.0, "FAIL"),
    ],
)
def test_a_gradient_without_an_entry_is_replayed_by_its_name(tmp_path, settings, factor, verdict):
    (tmp_path / "losses").mkdir()
    arrays = dict(np.load(SELECTION / "losses" / "fixed_states.npz"))
    recorded = arrays.pop("grad_s_hs_both20_smooth_l1_layerwise_std")
    arrays[f"grad_s_hs_{settings}"] = factor * recorded
    np.savez(tmp_path / "losses" / "fixed_states.npz", **arrays)
    found = {name: verdict for name, (verdict, _) in replay(tmp_path).items()}
    assert found == {f"losses/fixed_states.npz/grad_s_hs_{settings}": verdict}


def test_the_command_prints_its_verdicts_and_fails_where_one_does(vectors, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["conformance", str(vectors)])
    main()
    assert capsys.readouterr().out.endswith("\n117 passed, 0 failed, 0 skipped\n")
    change(vectors / REWARDS, "format_table", 0, "formatted", value=False)
    with pytest.raises(SystemExit, match="1"):
        main()
    out = capsys.readouterr().out
    assert "FAIL rewards/expected.json/format_table/0: value formatted is 1, expected 0" in out
    assert out.endswith("\n116 passed, 1 failed, 0 skipped\n")


@pytest.mark.parametrize(
    ("actual", "expected", "tolerance", "is_same"),
    [
        ([1, 2], [1, 2], EXACT, True),
        ([1, 2], [1, 3], EXACT, False),
        ({"a": 1}, {"a": 1, "b": 1}, EXACT, False),
        ([[1.0], [2.0]], [[1.0], [2.1]], Tolerance(absolute=0.2), True),
        ([1.0], [1.0, 1.0], Tolerance(absolute=0.2), False),
        (torch.tensor([100.0, 1.0]), torch.tensor([100.5, 1.0]), Tolerance(relative=0.01), True),
        (torch.tensor([100.0, 0.5]), torch.tensor([100.0, 1.0]), Tolerance(relative=0.01), False),
        ([100.0, 0.5], [100.0, 1.0], Tolerance(relative=0.01, by_norm=True), True),
        ([float("nan")], [1.0], Tolerance(absolute=9.0), False),
        ([float("-inf"), 1.0], [float("-inf"), 1.0], Tolerance(absolute=0.1), True),
        ([float("-inf"), 1.0], [0.0, 1.0], Tolerance(absolute=9.0), False),
        (None, 1.0, Tolerance(absolute=9.0), False),
    ],
)
def test_values_are_compared_within_their_tolerance(actual, expected, tolerance, is_same):
    assert (compare(actual, expected, tolerance) == "") is is_same
