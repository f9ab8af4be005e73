"""A check from outside: lm-evaluation-harness runs a model; its verdicts beside our own.

    python -m latent_reasoning.evaluation.harness --path MODEL_DIR --data FILE [--output FILE]

makes a local task of the harness from rows with `question` and `answer`, has the harness ask the
model (any folder that `evaluation --path` reads, latent ones too), extract the answers and score
them, and evaluates the same rows in our own way. It prints both accuracies, and each row on which
they differ with the reason. `--backend hf` lets the harness load and decode a plain model itself.

The harness is optional: `pip install "lm_eval>=0.4.9"`. `reasoner_lm` gives it a model for any of
its tasks that generate text.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latent_reasoning.config import UserError
from latent_reasoning.data.answers import in_our_words
from latent_reasoning.data.context import decode
from latent_reasoning.data.rows import Row
from latent_reasoning.data.sequences import encode_prompts
from latent_reasoning.evaluation.evaluator import EvaluationSettings, predict
from latent_reasoning.evaluation.folder import (
    OpenFolder,
    add_reading_options,
    open_folder,
    read_free_rows,
    without_special_text,
)
from latent_reasoning.evaluation.records import Prediction
from latent_reasoning.model.generation import generate
from latent_reasoning.runtime.command import described, positive, run_stage
from latent_reasoning.runtime.device import autocast
from latent_reasoning.runtime.files import write_json
from latent_reasoning.runtime.parallel import OneProcess

TASK = "latent_reasoning_rows"
ANSWER = r"(?i) The answer is:\s*\$?(-?[0-9][0-9,]*(?:\.[0-9]+)?|-?\.[0-9]+)"
"""How the task reads an answer: the number after the last ` The answer is:`."""


@dataclass(frozen=True)
class Disagreement:
    """A row that the harness and the evaluation judge or complete differently, and why."""

    id: str
    answer: str
    harness_right: bool
    ours_right: bool
    harness_answer: str
    our_answer: str | None
    why: str


@dataclass(frozen=True)
class Comparison:
    """Both counts of right answers over `n` rows, completions that differ, and the rows."""

    n: int
    harness_correct: int
    our_correct: int
    other_completions: int
    disagreements: list[Disagreement]


def main(arguments: list[str] | None = None) -> None:
    """Compare the harness with the evaluation on one model and one file of rows."""
    options = _parser().parse_args(arguments)
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError('lm_eval is not installed: pip install "lm_eval>=0.4.9"')
    folder = open_folder(options.path, options)
    if options.backend == "hf" and folder.model.settings is not None:
        raise UserError(
            f"--backend: {options.path} reasons in latent steps, which hf does not know; leave "
            "--backend out"
        )
    rows = read_free_rows(options.data, options.limit)
    rows = without_special_text(rows, folder.tokenizer, "skip", options.data)
    result = compare(folder, rows, options)
    print(comparison_text(result))
    if options.output is not None:
        write_json(options.output, dataclasses.asdict(result))


def compare(folder: OpenFolder, rows: Sequence[Row], options: argparse.Namespace) -> Comparison:
    """Ask the model through the harness and through the evaluation, and compare row by row."""
    settings = EvaluationSettings(folder.prefix, options.max_new_tokens, options.batch_size)
    folder.model.eval()
    with autocast(folder.model.device, folder.precision):
        ours = predict(folder.model, folder.tokenizer, rows, settings, OneProcess())
    if options.backend == "hf":
        arguments = {"pretrained": str(options.path), "dtype": "float32"}
        model: Any = "hf"
    else:
        arguments, model = {}, reasoner_lm(folder, options.batch_size)
    samples = run_harness(
        model,
        arguments,
        rows,
        prefix=folder.prefix,
        max_new_tokens=options.max_new_tokens,
        until=folder.tokenizer.eos_token,
        batch_size=options.batch_size,
        device=str(folder.model.device),
    )
    return _compared(rows, samples, ours)


def run_harness(
    model: Any,
    arguments: dict[str, str],
    rows: Sequence[Row],
    *,
    prefix: str,
    max_new_tokens: int,
    until: str,
    batch_size: int,
    device: str,
) -> list[dict[str, Any]]:
    """The harness's samples of the rows, in their order.

    `model` is a model of the harness, or the name of one that takes `arguments`.
    """
    import datasets
    import lm_eval
    from lm_eval.api.task import ConfigurableTask

    records = [{"question": row.question, "answer": row.answer} for row in rows]

    def own_rows(**_: Any) -> dict[str, datasets.Dataset]:
        return {"test": datasets.Dataset.from_list(records)}

    task = ConfigurableTask(config=task_config(prefix, max_new_tokens, until, own_rows))
    results = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=[task],
        batch_size=batch_size,
        device=device,
        bootstrap_iters=0,
    )
    return sorted(results["samples"][TASK], key=lambda sample: sample["doc_id"])


def task_config(prefix: str, max_new_tokens: int, until: str, rows: Any) -> dict[str, Any]:
    """The task in the harness's own terms; `rows` is a function that makes its data set."""
    return {
        "task": TASK,
        "custom_dataset": rows,
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": prefix + "{{question}}",
        "doc_to_target": "{{answer}}",
        "num_fewshot": 0,
        "generation_kwargs": {
            "until": [until],
            "max_gen_toks": max_new_tokens,
            "do_sample": False,
        },
        "filter_list": [
            {
                "name": "answer",
                "filter": [
                    {"function": "regex", "regex_pattern": ANSWER, "group_select": -1},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "regexes_to_ignore": [","],
            }
        ],
    }


def reasoner_lm(folder: OpenFolder, batch_size: int) -> Any:
    """A model of ours as one of the harness (`lm_eval.api.model.LM`), for tasks that generate."""
    from lm_eval.api.model import LM

    class ReasonerLM(LM):
        """Greedy completions; the text of the latent tokens is part of them."""

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            asked = [Row(str(i), request.args[0], None, "") for i, request in enumerate(requests)]
            how = [request.args[1] for request in requests]
            if any(kwargs.get("do_sample") for kwargs in how):
                raise UserError("the task samples (do_sample); these models are decoded greedily")
            settings = folder.model.settings
            most = [kwargs.get("max_gen_toks", 256) for kwargs in how]
            with autocast(folder.model.device, folder.precision):
                generations = generate(
                    folder.model,
                    encode_prompts(
                        asked,
                        folder.tokenizer,
                        prefix="",  # the task has written it
                        latent=settings is not None,
                        suffix=settings.suffix if settings else "",
                    ),
                    max_new_tokens=max(most),
                    eos_id=folder.tokenizer.eos_token_id,
                    batch_size=batch_size,
                )
            announcement = settings.answer_text if settings else None
            texts = [
                in_our_words(decode(folder.tokenizer, generation.ids[:length]), announcement)
                for generation, length in zip(generations, most, strict=True)
            ]
            return [_until(text, kwargs["until"]) for text, kwargs in zip(texts, how, strict=True)]

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            raise UserError("a text has no likelihood under latent steps: choose a generative task")

        loglikelihood_rolling = loglikelihood

    return ReasonerLM()


def _until(text: str, ends: str | Sequence[str]) -> str:
    """A text before the first of some ends, or of one."""
    for end in [ends] if isinstance(ends, str) else ends:
        text = text.split(end, 1)[0]
    return text


def _compared(
    rows: Sequence[Row], samples: Sequence[dict[str, Any]], ours: Sequence[Prediction]
) -> Comparison:
    right = [bool(sample["exact_match"] == 1) for sample in samples]
    others, found = 0, []
    for row, sample, theirs, own in zip(rows, samples, right, ours, strict=True):
        completion = sample["resps"][0][0]
        others += completion != own.completion
        if theirs != own.correct:
            found.append(
                Disagreement(
                    id=row.id,
                    answer=row.answer,
                    harness_right=theirs,
                    ours_right=own.correct,
                    harness_answer=str(sample["filtered_resps"][0]),
                    our_answer=own.extracted,
                    why=_why(completion, own),
                )
            )
    return Comparison(len(rows), sum(right), sum(p.correct for p in ours), others, found)


def _why(completion: str, own: Prediction) -> str:
    if completion != own.completion:
        return f"the completions differ: {completion!r} and {own.completion!r}"
    if not own.well_formatted:
        return f"the completion is badly formatted, which the task does not see: {own.completion!r}"
    return f"the same completion, whose number is written otherwise: {own.completion!r}"


def comparison_text(result: Comparison) -> str:
    """The comparison for a reader."""
    lines = [
        f"harness  {100 * result.harness_correct / result.n:.2f} % "
        f"({result.harness_correct} of {result.n})",
        f"ours     {100 * result.our_correct / result.n:.2f} % ({result.our_correct})",
        f"completions that differ: {result.other_completions}; "
        f"verdicts that differ: {len(result.disagreements)}",
    ]
    for row in result.disagreements:
        lines.append(
            f"  {row.id} (answer {row.answer}): harness {row.harness_answer} "
            f"{'right' if row.harness_right else 'wrong'}, ours {row.our_answer} "
            f"{'right' if row.ours_right else 'wrong'}; {row.why}"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = described(__doc__)
    add = parser.add_argument
    add("--path", type=Path, required=True, metavar="MODEL_DIR", help="model folder")
    add("--data", type=Path, required=True, metavar="FILE", help="rows: question, answer")
    add("--output", type=Path, metavar="FILE", help="write the comparison here, as JSON")
    add("--limit", type=positive, help="first rows only")
    add("--backend", choices=("ours", "hf"), default="ours", help="who loads and decodes the model")
    add("--max-new-tokens", type=positive, default=512, metavar="N")
    add("--batch-size", type=positive, default=64)
    add_reading_options(parser)
    return parser


if __name__ == "__main__":
    run_stage(main)
