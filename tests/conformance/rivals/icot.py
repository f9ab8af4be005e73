"""Cases of `icot/`: lines of a file, removed tokens by batch, losses and gradients, generation.

The public text form: one string ` {question} {EOS} {steps} {EOS} {answer} {EOS}`, tokenised at
once; the sequence is question and first EOS, steps up to the second EOS, and the rest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from latent_reasoning.data.context import decode, read_whole
from latent_reasoning.data.examples import IGNORED_LABEL, PlainExample, StagedRow
from latent_reasoning.model.blocks import run_blocks
from latent_reasoning.model.folder import load_tokenizer
from latent_reasoning.model.generation import generate
from latent_reasoning.model.heads import target_log_probabilities
from latent_reasoning.model.reading import ReasonerOutput
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.rivals.icot import Removal, offset_probabilities
from latent_reasoning.training.checkpoints import parameter_names
from latent_reasoning.training.text import Labels, cross_entropy
from tests.conformance.checks import Check, Checks, Tolerance
from tests.conformance.recording import Record, Vectors

INFORMATION = {"schedule_columns", "saved_batches"}
PROBABILITY, LOSS = Tolerance(absolute=1e-6), Tolerance(relative=1e-5)
STATE, GRADIENT = Tolerance(absolute=3e-4), Tolerance(relative=1e-3, by_norm=True)
GRADIENT_NORM = Tolerance(relative=1e-3)
MARK = "####"


# -------------------------------------------------------------------------------------------- data


def _examples(vectors: Vectors, examples: list[Record]) -> Checks:
    """The kept lines of the file as whole sequences."""
    data = vectors.file("icot/data.json")
    tokenizer = _tokenizer(vectors)
    yield Check(tokenizer.eos_token_id, data["eos_id"], part="eos_id")
    rows = [_row(ids, tokenizer.eos_token_id) for ids in _lines(data["lines"], tokenizer)]
    whole = [row.example([], row.texts[0]) for row in rows]
    own = [{"input_ids": e.input_ids.tolist(), "labels": e.labels.tolist()} for e in whole]
    yield Check(own, examples)


def _tokenizer(vectors: Vectors) -> PreTrainedTokenizerBase:
    folders = [p for p in vectors.paths if re.fullmatch(r"icot/ckpt_[^/]+", p)]
    for folder in folders[1:]:
        vectors.folder(folder)
    return load_tokenizer(vectors.folder(folders[0]))


def _lines(lines: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    texts, eos = [], tokenizer.eos_token
    for line in lines:
        if len(parts := line.strip().split("||")) == 2:
            question, target = parts
            steps = target.partition(MARK)[0].strip()
            texts.append(f" {question} {eos} {steps} {eos} {extracted_answer(target)} {eos}")
    return read_whole(tokenizer, texts)


def extracted_answer(text: str) -> str:
    """The public reading of an answer: from `####` on, or all, without commas."""
    return text[max(text.find(MARK), 0) :].strip().replace(",", "")


def _row(ids: list[int], eos: int) -> StagedRow:
    """A sequence cut at its first two EOS: the first belongs to the question."""
    first = ids.index(eos) + 1
    second = ids.index(eos, first)
    end = ids.index(eos, second + 1) + 1
    return StagedRow(ids[:first], [ids[first:second]], ids[second:end], end - second)


def _answers(_: Vectors, pairs: list) -> Checks:
    yield Check([[text, extracted_answer(text)] for text, _ in pairs], [[*pair] for pair in pairs])


def _offsets(_: Vectors, expected: list[float], smoothing: str) -> Checks:
    """The distribution of offsets; without smoothing nothing is drawn, and it is 0."""
    value = float(smoothing)
    if math.isfinite(value):
        yield Check(offset_probabilities(value), expected, PROBABILITY)
    else:
        yield Check([1.0] + [0.0] * (len(expected) - 1), expected)
        yield Check(Removal(smoothing=None).offset(None), 0)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------- removal


def _removal(vectors: Vectors, case: Record, name: str) -> Checks:
    """The schedule by batch, and the sequences of the saved batches."""
    settings, arrays = case["settings"], vectors.file(f"icot/removal_{name}.npz")
    schedule = case["schedule"]
    batches = math.ceil(settings["rows"] / settings["batch_size"])
    yield Check(batches * settings["epochs"], len(schedule), part="batches")
    removal = _removal_of(settings, batches)
    own, previous, all_removed = [], removal.start, False
    for _, step, _, recorded_all, _ in schedule:
        scheduled = removal.scheduled(step)
        reset = settings["reset_optimizer"] and scheduled > previous and not all_removed
        all_removed, previous = recorded_all, scheduled
        own.append([step // batches, step, _json(scheduled), recorded_all, reset])
    yield Check(own, [[*line] for line in schedule], part="schedule")
    steps = [s for s in range(len(schedule)) if s % settings["accumulate"] == 0]
    yield Check(steps, case["optimizer_steps_after_batch"], part="optimizer_steps")
    ends = [_json(removal.scheduled(batches * (e + 1) - 1)) for e in range(settings["epochs"])]
    yield Check(ends, case["scheduled_at_evaluation"], part="scheduled_at_evaluation")
    eos = int(vectors.file("icot/data.json")["eos_id"])
    for step in sorted({int(key[1:].partition("/")[0]) for key in arrays}):
        recorded_all = schedule[step][3]
        yield from _batch(arrays, step, removal, settings, eos, recorded_all)


def _removal_of(settings: Record, batches: int) -> Removal:
    beyond, smoothing = (
        float(settings[key]) for key in ("remove_all_when_remove_beyond", "lambda_")
    )
    return Removal(
        start=settings["remove_start_from"],
        steps_per_token=round(batches / settings["remove_per_epoch"]),
        pretrain_steps=settings["pretrain_epochs"] * batches,
        all_beyond=int(beyond) if math.isfinite(beyond) else None,
        side=settings["side"],
        smoothing=smoothing if math.isfinite(smoothing) else None,
    )


def _json(number: float) -> float | str:
    """As it is recorded."""
    return float(number) if math.isfinite(number) else "inf"


def _batch(
    arrays: Record, step: int, removal: Removal, settings: Record, eos: int, recorded_all: bool
) -> Checks:
    """One batch: each row's number of removed tokens, and what is left."""
    given = arrays[f"b{step}/in/input_ids"]
    rows = [_row(ids, eos) for ids in given.tolist()]
    whole = [row.example([], row.texts[0]) for row in rows]
    yield Check(_padded(whole, eos, given.shape[1]), _recorded(arrays, f"b{step}/in"), part="in")
    numbers = [0.0] * len(rows)
    if f"b{step}/in/to_remove" in arrays:
        offsets = arrays[f"b{step}/in/offsets"].tolist()
        numbers = [removal.removed(step, removal.scheduled(step), o) for o in offsets]
        yield Check(torch.tensor(numbers), arrays[f"b{step}/in/to_remove"], part="to_remove")
    left = [
        row.example([], removal.remainder(row.texts[0], n))
        for row, n in zip(rows, numbers, strict=True)
    ]
    width = max(map(len, left))
    yield Check(_padded(left, eos, width), _recorded(arrays, f"b{step}/out"), part="out")
    if removal.side == "left":  # on the right side the public code always says so
        finished = all(n >= len(r.texts[0]) for r, n in zip(rows, numbers, strict=True))
        yield Check(finished and any(numbers), recorded_all, part="all_removed")
    if settings["keep_position"]:
        positions = torch.arange(given.shape[1]).repeat(len(rows), 1)
        for place, (row, example) in enumerate(zip(rows, left, strict=True)):
            # The public code shifts the separator before the removed tokens too.
            first = len(row.question) - 1
            if removal.side == "right":
                first += example.reasoning_length
            positions[place, first:] += len(row.texts[0]) - example.reasoning_length
        yield Check(positions[:, :width], arrays[f"b{step}/out/position_ids"], part="position_ids")


def _padded(examples: list[PlainExample], eos: int, width: int) -> dict[str, Tensor]:
    """The public collation: padded on the right."""
    ids = torch.full((len(examples), width), eos)
    labels = torch.full((len(examples), width), IGNORED_LABEL)
    for row, example in enumerate(examples):
        ids[row, : len(example)] = torch.from_numpy(example.input_ids)
        labels[row, : len(example)] = torch.from_numpy(example.labels)
    return {"input_ids": ids, "labels": labels}


def _recorded(arrays: Record, place: str) -> dict[str, Tensor]:
    return {name: arrays[f"{place}/{name}"] for name in ("input_ids", "labels")}


# -------------------------------------------------------------------------------------------- loss


def _loss(vectors: Vectors, case: Record, name: str) -> Checks:
    """Loss, accuracy of tokens and gradients of a saved batch."""
    file, place = case["batch"].split(" ")
    batch, arrays = vectors.file(f"icot/{file}"), vectors.file(f"icot/loss_{name}.npz")
    model = vectors.model(f"icot/{case['ckpt']}")
    ids, labels = (batch[f"{place}/{key}"].long() for key in ("input_ids", "labels"))
    output = _read(model, ids, labels, batch, f"{place}/position_ids")
    learned = Labels.of(labels, output.kinds, None)
    hidden = output.last_hidden[learned.rows, learned.columns]
    loss = cross_entropy(model, output, learned)
    yield Check(loss, case["loss"], LOSS, "loss")
    with torch.no_grad():
        log_probs = torch.zeros(labels[:, 1:].shape)
        log_probs[learned.rows, learned.columns] = target_log_probabilities(
            model, hidden, learned.targets
        )
        yield Check(log_probs, arrays["out/label_logprobs"], STATE, "label_logprobs")
        right = model.logits(hidden, learned.targets.kinds).argmax(-1) == learned.targets.tokens
    total, count = int(right.sum()), len(right)
    own = {"total_correct": total, "total_tokens": count, "token_accuracy": total / count}
    yield Check(own, {key: case[key] for key in own}, PROBABILITY, "accuracy")
    loss.backward()
    gradients = {n.removeprefix("base."): p.grad for p, n in parameter_names(model).items()}
    recorded = {key.removeprefix("grad/"): arrays[key] for key in arrays if key.startswith("grad/")}
    yield Check({key: gradients[key] for key in recorded}, recorded, GRADIENT, "gradients")
    norms = {key: gradient.norm() for key, gradient in gradients.items()}
    yield Check(norms, case["grad_norms"], GRADIENT_NORM, "grad_norms")


def _read(
    model: LatentReasoner, ids: Tensor, labels: Tensor, batch: Record, positions: str
) -> ReasonerOutput:
    """States of a batch padded on the right, at positions of its own where some are recorded."""
    columns = torch.arange(ids.shape[1])
    last = ((labels != IGNORED_LABEL) * columns).max(1, keepdim=True).values
    mask = columns <= last
    if positions not in batch:
        return model(ids, mask.long())
    hidden, _ = run_blocks(model.base, model.embed(ids), batch[positions].long(), mask, None)
    return ReasonerOutput(hidden, None, mask.long())


# -------------------------------------------------------------------------------------- generation


def _generation(vectors: Vectors, case: Record) -> Checks:
    """Greedy completions up to the second EOS, and the answers read in them."""
    model = vectors.model(f"icot/{case['ckpt']}")
    tokenizer = load_tokenizer(vectors.folder(f"icot/{case['ckpt']}"))
    eos = tokenizer.eos_token_id
    lines = list(_lines(vectors.file("icot/data.json")["lines"], tokenizer))
    for index, entry in zip(case["rows"], case["examples"], strict=True):
        row = _row(lines[index], eos)
        yield Check([*row.question], entry["prompt"], part="prompt")
        written = _written(model, entry["prompt"], case["max_new_tokens"], eos)
        output = entry["output"]
        fill = [eos] * (len(output) - len(entry["prompt"]) - len(written))
        yield Check([*entry["prompt"], *written, *fill], output, part="output")
        texts = {"predicted": written, "gold": [*row.texts[0], *row.ending]}
        own = {
            key: extracted_answer(decode(tokenizer, [i for i in ids if i != eos]))
            for key, ids in texts.items()
        }
        yield Check(own, {key: entry[key] for key in own}, part="answers")


def _written(model: LatentReasoner, prompt: list[int], most: int, eos: int) -> list[int]:
    """The new ids, up to the second EOS."""
    written: list[int] = []
    for _ in range(2):
        left = most - len(written)
        if left and written.count(eos) < 2:
            (part,) = generate(
                model, [[*prompt, *written]], max_new_tokens=left, eos_id=eos, batch_size=1
            )
            written += part.ids
    return written


READERS = {
    r"icot/data\.json": {
        "examples": _examples,
        "extract_answer": _answers,
        "offset_distribution/(.+)": _offsets,
    },
    r"icot/removal\.json": {"(.+)": _removal},
    r"icot/loss\.json": {"(.+)": _loss},
    r"icot/generation\.json": {".+": _generation},
}
