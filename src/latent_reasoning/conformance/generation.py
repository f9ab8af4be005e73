"""Cases of `generation/` and `bench/`: greedy ids, stop probabilities, lengths, verdicts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from latent_reasoning.config import Distillation
from latent_reasoning.conformance.cases import Case, Skip, check_equal, check_known
from latent_reasoning.data.rows import Row
from latent_reasoning.data.sequences import encode_prompts
from latent_reasoning.evaluation.evaluator import prediction_of
from latent_reasoning.evaluation.metrics import summarise
from latent_reasoning.evaluation.records import Evaluation, Prediction
from latent_reasoning.model.folder import load, load_tokenizer
from latent_reasoning.model.generation import Generation, generate
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.sft.latent_sft import STUDENT_LOSS, TEACHER_LOSS, latent_sft_losses

PROBABILITY_ABSOLUTE = 5e-4
LOSS_ABSOLUTE = 2e-4
METRIC_ABSOLUTE = 1e-9
CODI_WEIGHT = 1.0
"""Weight of the recorded codi loss of the overfitted batch."""

INFORMATION = {"overfit_rows", "notes", "checks"}
LOSSES_KEY = re.compile(r"overfit_loss_on_(\d+)")
AGGREGATE_KEY = re.compile(r"aggregate.*max_new_tokens_(\d+)|result")
CONFIG_KEYS = {"latent_thinking", "latent_thought_count_override", "max_new_tokens", "batch_size"}
ENTRY_KEYS = {
    *("eval_config", "metrics", "rows", "checkpoint", "compare_length_aggregates", "forced_steps")
}
ROW_KEYS = {
    *("question", "label", "prompt_ids", "output_ids", "output_ids_incl_pad", "decoded_output"),
    *("continue_stop_probs", "min_top2_logit_margin_before_eos", "well_formatted", "correct"),
    *("reasoning_length", "compare_length", "answer", "steps"),
}
STUB_ROW_KEYS = {
    *("label", "output_text", "output_ids", "correct", "reasoning_lengths", "n_bad_format"),
    *("n_length_cutoffs", "n_continue_tokens", "compare_length"),
}
METRIC_KEYS = {
    *("score", "correct_p", "n_correct", "n_total", "bad_format_p", "n_bad_format"),
    *("n_length_cutoffs", "n_avg_reasoning_tokens", "n_reasoning_tokens_std"),
    *("min_reasoning_tokens", "max_reasoning_tokens", "reasoning_lengths", "correct_list"),
}


def cases(folder: Path) -> Iterator[Case]:
    """Every case of `generation/`, named `generation/file/..`."""
    readers: dict[str, Callable[[Path], Iterator[Case]]] = {
        "expected.json": _expected_cases,
        "eval_stub.json": _stub_cases,
    }
    losses = re.compile(r"batch_overfit\d+\.npz")
    for path in sorted(folder.iterdir()):
        if path.name in readers:
            yield from readers[path.name](path)
        elif not (path / "config.json").exists() and not losses.fullmatch(path.name):
            yield Case(f"generation/{path.name}", partial(_fail, "file not understood"))


def bench_cases(folder: Path) -> Iterator[Case]:
    """The generated ids recorded in `bench/`; its other files are for measuring speed."""
    for path in sorted(folder.glob("eval_expected_*.npz")):
        prompts = folder / path.name.replace("expected", "prompts")
        yield Case(f"bench/{path.name}", partial(_check_bench, path, prompts))


def _fail(why: str) -> None:
    raise AssertionError(why)


# ------------------------------------------------------------------------------------- generation


def _expected_cases(path: Path) -> Iterator[Case]:
    content = json.loads(path.read_text(encoding="utf-8"))
    root = path.parent.parent
    checks = {
        "prompts": _check_prompts,
        "ids": _check_ids,
        "stop_probabilities": _check_probabilities,
        "lengths": _check_lengths,
        "verdicts": _check_verdicts,
        "metrics": _check_metrics,
    }
    for kind, entries in content.items():
        name = f"generation/expected.json/{kind}"
        if kind in INFORMATION:
            continue
        if match := LOSSES_KEY.fullmatch(kind):
            yield Case(name, partial(_check_losses, path.parent, match[1], entries))
        elif isinstance(entries, dict) and all("eval_config" in e for e in entries.values()):
            for key, entry in entries.items():
                run = _Run(root, entry)
                for what, check in checks.items():
                    yield Case(f"{name}/{key}/{what}", partial(check, run))
        else:
            yield Case(name, partial(_fail, "kind of case not understood"))


class _Run:
    """One recorded evaluation, replayed once when the first of its cases needs it."""

    def __init__(self, root: Path, entry: dict[str, Any]) -> None:
        self.root = root
        self.entry = entry
        self._replayed: tuple[list[list[int]], list[Generation], list[Prediction]] | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.entry["rows"]

    @property
    def prompts(self) -> list[list[int]]:
        return self._replay()[0]

    @property
    def generations(self) -> list[Generation]:
        return self._replay()[1]

    @property
    def predictions(self) -> list[Prediction]:
        return self._replay()[2]

    def _replay(self) -> tuple[list[list[int]], list[Generation], list[Prediction]]:
        if self._replayed is None:
            self._replayed = self._evaluate()
        return self._replayed

    def _evaluate(self) -> tuple[list[list[int]], list[Generation], list[Prediction]]:
        check_known(self.entry, ENTRY_KEYS, "entry")
        config = self.entry["eval_config"]
        check_known(config, CONFIG_KEYS, "eval_config")
        for row in self.rows:
            check_known(row, ROW_KEYS, "row")
        forced, latent = self.entry["forced_steps"], config["latent_thinking"]
        check_equal(forced, config["latent_thought_count_override"], "forced_steps")
        model, tokenizer = _model_of(self.root / self.entry["checkpoint"])
        rows = [_row(row["label"], row["question"]) for row in self.rows]
        # The public code's prompts have no prefix (note 1).
        prompts = encode_prompts(rows, tokenizer, prefix="", latent=latent, forced_steps=forced)
        generations = generate(
            model,
            prompts,
            max_new_tokens=config["max_new_tokens"],
            eos_id=tokenizer.eos_token_id,
            batch_size=config["batch_size"],
        )
        predictions = [
            prediction_of(row, generation, tokenizer, latent=latent, forced_steps=forced)
            for row, generation in zip(rows, generations, strict=True)
        ]
        return prompts, generations, predictions


@cache
def _model_of(checkpoint: Path) -> tuple[LatentReasoner, PreTrainedTokenizerBase]:
    if not checkpoint.is_dir():
        raise Skip(f"no checkpoint {checkpoint.name}")
    return load(checkpoint, device="cpu"), load_tokenizer(checkpoint)


def _row(label: str, question: str = "") -> Row:
    return Row(id="recorded-0", question=question, steps=None, answer=label)


def _check_prompts(run: _Run) -> None:
    check_equal(run.prompts, [row["prompt_ids"] for row in run.rows], "prompts")


def _check_ids(run: _Run) -> None:
    for index, (own, row) in enumerate(zip(run.generations, run.rows, strict=True)):
        check_equal(own.ids, row["output_ids"], f"ids of row {index}")


def _check_probabilities(run: _Run) -> None:
    for index, (own, row) in enumerate(zip(run.generations, run.rows, strict=True)):
        expected = np.array(row["continue_stop_probs"]).reshape(-1, 2)
        probabilities = np.array(own.stop_probabilities).reshape(-1, 2)
        check_equal(len(probabilities), len(expected), f"stop decisions of row {index}")
        difference = np.abs(probabilities - expected).max(initial=0.0)
        if not difference <= PROBABILITY_ABSOLUTE:
            raise AssertionError(
                f"stop probabilities of row {index} differ by {difference:.2e} "
                f"(allowed {PROBABILITY_ABSOLUTE:.0e})"
            )


def _check_lengths(run: _Run) -> None:
    for index, (own, row) in enumerate(zip(run.predictions, run.rows, strict=True)):
        if row["compare_length"]:
            expected = row["reasoning_length"]
            check_equal(own.reasoning_tokens, expected, f"reasoning length of row {index}")


def _check_verdicts(run: _Run) -> None:
    for index, (own, row) in enumerate(zip(run.predictions, run.rows, strict=True)):
        check_equal(own.correct, row["correct"], f"correctness of row {index}")
        if "well_formatted" in row:
            check_equal(own.well_formatted, row["well_formatted"], f"format of row {index}")


def _check_metrics(run: _Run) -> None:
    cut_off = sum(generation.cut_off for generation in run.generations)
    lengths = run.entry["compare_length_aggregates"]
    _compare_metrics(run.predictions, cut_off, run.entry["metrics"], lengths)


def _compare_metrics(
    predictions: Sequence[Prediction], cut_off: int, expected: dict[str, Any], lengths: bool
) -> None:
    """Aggregates of an evaluation; those of lengths only where the public ones are right.

    Badly formatted rows vanish from the public per-row lists (note 16).
    """
    check_known(expected, METRIC_KEYS, "metrics")
    summary = summarise(Evaluation(list(predictions), [], 0.0).frame(), 0.0)
    own = {
        "score": summary["accuracy"],
        "correct_p": summary["accuracy"],
        "n_correct": summary["correct"],
        "n_total": summary["n"],
        "bad_format_p": summary["badly_formatted"] / summary["n"],
        "n_bad_format": summary["badly_formatted"],
        "n_length_cutoffs": cut_off,
        "correct_list": [p.correct for p in predictions if p.well_formatted],
    }
    if lengths:
        own |= {
            "n_avg_reasoning_tokens": summary["reasoning_tokens_mean"],
            "n_reasoning_tokens_std": summary["reasoning_tokens_std"],
            "min_reasoning_tokens": summary["reasoning_tokens_min"],
            "max_reasoning_tokens": summary["reasoning_tokens_max"],
            "reasoning_lengths": [p.reasoning_tokens for p in predictions if p.well_formatted],
        }
    for name, value in own.items():
        recorded = expected[name]
        same = value == recorded
        if isinstance(value, float) and recorded is not None:
            same = abs(value - recorded) <= METRIC_ABSOLUTE
        if not same:
            raise AssertionError(f"{name} is {value!r}, expected {recorded!r}")


def _check_losses(folder: Path, rows: str, expected: dict[str, float]) -> None:
    """The losses of the overfitted checkpoint on its own batch."""
    with np.load(folder / f"batch_overfit{rows}.npz") as file:
        batch = {key: torch.from_numpy(file[key]) for key in file.files}
    model, _ = _model_of(folder / "ckpt_overfit")
    with torch.no_grad():
        losses = latent_sft_losses(model, batch, Distillation(codi_weight=CODI_WEIGHT))
    own = {
        "teacher_ce_loss": losses[TEACHER_LOSS],
        "student_ce_loss": losses[STUDENT_LOSS],
        "codi_loss": losses["codi_loss"],
        "total_loss": sum(losses.values()),
    }
    check_known(expected, set(own), "losses")
    for name, recorded in expected.items():
        difference = abs(own[name].item() - recorded)
        if not difference <= LOSS_ABSOLUTE:
            raise AssertionError(f"{name} differs by {difference:.2e}")


# ------------------------------------------------------------------------------------ the verdicts


def _stub_cases(path: Path) -> Iterator[Case]:
    """Crafted completions: `rows` and their aggregates, by what the prompt asked for."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for kind, entry in content.items():
        name = f"generation/eval_stub.json/{kind}"
        match = re.fullmatch(r"adaptive|cot_mode|override(\d+)", kind)
        if match is None:
            yield Case(name, partial(_fail, "kind of case not understood"))
            continue
        stub = _Stub(path.parent.parent, kind, None if match[1] is None else int(match[1]))
        for key, value in entry.items():
            if key == "rows":
                for index, row in enumerate(value):
                    yield Case(f"{name}/rows/{index}", partial(stub.check_row, row))
            elif AGGREGATE_KEY.fullmatch(key):
                limit = AGGREGATE_KEY.fullmatch(key)[1]
                run = partial(stub.check_aggregate, entry["rows"], value, limit)
                yield Case(f"{name}/{key}", run)
            elif key == "must_be_wrong_not_crash":
                for index, row in enumerate(value):
                    yield Case(f"{name}/{key}/{index}", partial(stub.check_wrong, row))
            elif key == "forced_length":
                yield Case(f"{name}/{key}", partial(stub.check_length, entry["rows"], value))
            elif key not in INFORMATION:
                yield Case(f"{name}/{key}", partial(_fail, "kind of case not understood"))


class _Stub:
    """Completions of one kind of prompt: `adaptive`, `cot_mode` or `override{n}`."""

    def __init__(self, root: Path, kind: str, forced_steps: int | None) -> None:
        self.root = root
        self.latent = kind != "cot_mode"
        self.forced_steps = forced_steps

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        folders = [*self.root.glob("generation/*/"), *self.root.glob("forward/ckpt/*/")]
        for folder in sorted(folders):
            if (folder / "tokenizer.json").exists():
                return load_tokenizer(folder)
        raise Skip("no checkpoint with a tokenizer")

    def predict(self, row: dict[str, Any]) -> Prediction:
        """The evaluation's verdict on a completion."""
        tokenizer = self.tokenizer
        ids = row.get("output_ids")
        if ids is None:
            ids = tokenizer(row["output_text"], add_special_tokens=False)["input_ids"]
        generation = Generation(ids, [], 0, cut_off=tokenizer.eos_token_id not in ids)
        return prediction_of(
            _row(row.get("label", "18")),
            generation,
            tokenizer,
            latent=self.latent,
            forced_steps=self.forced_steps,
        )

    def check_row(self, row: dict[str, Any]) -> None:
        check_known(row, STUB_ROW_KEYS, "row")
        own = self.predict(row)
        if "n_bad_format" in row:
            check_equal(int(not own.well_formatted), row["n_bad_format"], "badly formatted")
        # Empty where the format is bad: the public lists leave such a row out (note 16).
        if "correct" in row:
            check_equal(own.correct, any(row["correct"]), "correct")
        if row.get("compare_length"):
            check_equal([own.reasoning_tokens], row["reasoning_lengths"], "reasoning length")

    def check_aggregate(
        self, rows: list[dict[str, Any]], expected: dict[str, Any], limit: str | None
    ) -> None:
        predictions = [self.predict(row) for row in rows]
        # A crafted completion without EOS is cut off only where it also has the full length.
        full = [limit is not None and len(row["output_ids"]) >= int(limit) for row in rows]
        cut_off = sum(p.cut_off and is_full for p, is_full in zip(predictions, full, strict=True))
        _compare_metrics(predictions, cut_off, expected, lengths=self.forced_steps is not None)

    def check_wrong(self, row: dict[str, Any]) -> None:
        check_equal(self.predict(row).correct, False, "correct")

    def check_length(self, rows: list[dict[str, Any]], expected: int) -> None:
        lengths = {self.predict(row).reasoning_tokens for row in rows}
        check_equal(lengths, {expected}, "reasoning lengths")


# ------------------------------------------------------------------------------------------ bench


def _check_bench(expected_file: Path, prompts_file: Path) -> None:
    checkpoints = sorted(expected_file.parent.glob("ckpt_*"))
    if not checkpoints or not prompts_file.exists():
        raise Skip("no checkpoint or no prompts beside it")
    model, tokenizer = _model_of(checkpoints[0])
    with np.load(expected_file) as file:
        expected = file["new_tokens"]
    with np.load(prompts_file) as file:
        ids, mask = file["input_ids"], file["attention_mask"].astype(bool)
    generations = generate(
        model,
        [row[read].tolist() for row, read in zip(ids, mask, strict=True)],
        max_new_tokens=expected.shape[1],
        eos_id=tokenizer.eos_token_id,
        batch_size=len(ids),
    )
    for index, (own, recorded) in enumerate(zip(generations, expected.tolist(), strict=True)):
        padding = [tokenizer.eos_token_id] * (len(recorded) - len(own.ids))
        check_equal(own.ids + padding, recorded, f"ids of row {index}")
