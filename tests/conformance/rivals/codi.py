"""Cases of `codi/`: texts, losses with gradients, greedy ids (arXiv 2502.21074).

The public form of a row is written here; what is computed from its ids is the project's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from latent_reasoning.config import Distillation, Lora
from latent_reasoning.data.collation import collate_latent
from latent_reasoning.data.examples import LatentExample, PlainExample, StudentExample
from latent_reasoning.data.sequences import beginning, latent_run, special_token_ids
from latent_reasoning.model.generation import generate
from latent_reasoning.model.lora import attach_lora
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.rival_weights import load_rival
from latent_reasoning.sft.distillation import Side, read_with_states
from latent_reasoning.sft.latent_sft import (
    STUDENT_LOSS,
    TEACHER_LOSS,
    LatentReading,
    latent_sft_losses,
)
from latent_reasoning.training.checkpoints import parameter_names
from tests.conformance.checks import Check, Checks, Tolerance, recorded
from tests.conformance.recording import Record, Skip, Vectors

INFORMATION = {"derived", "smallest_margin", "rows", "remove_eos", "include_last_step"}
"""Two settings of the recorded batches among them: the batches themselves are read."""
LOSS, STATES = Tolerance(absolute=1e-4), Tolerance(absolute=3e-4)
GRADIENT, GRADIENT_NORM = Tolerance(relative=1e-3, by_norm=True), Tolerance(relative=1e-3)
# Norms of gradients that are zero but for rounding, such as those of GPT-2's key biases.
ROUNDING = 1e-5
IGNORED = -100

ANSWER_PROMPT = "The answer is:"
QUESTION_TOKENS = 256
PARTS = {"ref_ce_loss": TEACHER_LOSS, "ce_loss": STUDENT_LOSS, "distill_loss": "codi_loss"}
"""Recorded names of our parts of the loss."""
PADDING_BUG = (
    "the public code attends to the padding of the question and counts it in positions; the same "
    "rows with masks are the case *_mask_aware"
)


# ------------------------------------------------------------------------------------------ texts


def _variant(vectors: Vectors, variant: Record, name: str) -> Checks:
    """Ids and positions of each kept row, and the same as one batch."""
    settings = variant["settings"]
    folder = vectors.folder(f"codi/ckpt_{settings['tokenizer']}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = vectors.file("codi/data.json")["rows"]
    first = len(tokenizer)
    ids = {"pad_id": first, "bot_id": first + 1, "eot_id": first + 2}
    yield Check(ids, {key: variant[key] for key in ids}, part="ids")
    own = [public_example(row, tokenizer, settings) for row in rows]
    own = [example for example in own if example is not None]
    expected = [{key: example[key] for key in own[0]} for example in variant["examples"]]
    yield Check(own, expected, part="examples")
    arrays = vectors.file(f"codi/data_{name}_collated.npz")
    yield Check(_collated(own, ids["pad_id"]), dict(arrays.items()), part="collated")


def public_example(
    row: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]
) -> dict[str, Any] | None:
    """A row as the public code writes it; None for one that it drops."""
    steps, text = row["cot"].split(" "), row["question"] + row["cot"] + row["answer"]
    number = row["answer"].replace("####", "").split(" ")[-1]
    if not number[:1].isdigit():
        return None
    cot = " ".join(steps if settings.get("include_last") else steps[:-1])
    answer = f"{ANSWER_PROMPT} {number}"

    def read(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    if len(beginning(tokenizer) + read(text)) > settings["max_token_num"]:
        return None
    bot = len(tokenizer) + 1
    mark = [] if settings["remove_eos"] else [tokenizer.eos_token_id]
    question = (beginning(tokenizer) + read(row["question"]))[:QUESTION_TOKENS] + mark
    side = [bot + 1, *mark, *read(answer), tokenizer.eos_token_id]
    teacher = [*question, *read(cot), *mark, *read(answer), tokenizer.eos_token_id]
    prompt = len(read(ANSWER_PROMPT))
    return {
        "encoder_input_ids": [*question, bot],
        "decoder_input_ids": side,
        "labels": side,
        "ref_input_ids": teacher,
        "ref_labels": [IGNORED] * len(question) + teacher[len(question) :],
        "ref_answer_position": len(teacher) - len(read(answer)) - 1 + prompt,
        "model_answer_position": 1 + len(mark) + prompt,
    }


def _collated(examples: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Tensor]:
    """The public batch: the question side is padded on the left, the others on the right."""
    batch = {}
    for name, values in ((name, [e[name] for e in examples]) for name in examples[0]):
        if name.endswith("position"):
            batch[name] = torch.tensor(values)
            continue
        width, fill = max(map(len, values)), IGNORED if "labels" in name else pad
        fills = [[fill] * (width - len(row)) for row in values]
        on_left = name.startswith("encoder")
        batch[name] = torch.tensor(
            [f + r if on_left else r + f for r, f in zip(values, fills, strict=True)]
        )
    for side in ("encoder", "ref"):
        batch[f"{side}_attention_mask"] = batch[f"{side}_input_ids"] != pad
    return batch


# ----------------------------------------------------------------------------------------- losses


def public_model(
    vectors: Vectors, folder: str, projection: str | None = "layer_norm"
) -> tuple[LatentReasoner, PreTrainedTokenizerBase]:
    """A recorded CODI checkpoint as our loader reads it, to be trained as the public code does."""
    model, tokenizer = load_rival(vectors.folder(folder), "codi")
    settings, weights = model.settings, model.recurrent_filter.state_dict()
    if projection is None:
        settings, weights = replace(settings, recurrent_filter="none"), {}
    elif projection == "no_layer_norm":
        settings = replace(settings, filter_norm=False)
        weights = {name: w for name, w in weights.items() if not name.startswith("norm.")}
    model = LatentReasoner(model.base, settings)
    model.recurrent_filter.load_state_dict(weights)
    return all_tokens_compete(model, "end_id"), tokenizer


def all_tokens_compete(model: LatentReasoner, *moved: str) -> LatentReasoner:
    """The same model, whose weights are all trained and whose softmax has all recorded tokens.

    Some special tokens are never predicted here; those `moved` get rows beyond the vocabulary,
    which are copies of their recorded ones.
    """
    base, rows = model.base, len(model.base.get_input_embeddings().weight)
    base.resize_token_embeddings(rows + len(moved), mean_resizing=False)
    with torch.no_grad():
        weight = base.get_input_embeddings().weight
        for place, name in enumerate(moved):
            weight[rows + place] = weight[getattr(model.settings, name)]
    model.change_settings(
        allow_rethinking=True, **{name: rows + place for place, name in enumerate(moved)}
    )
    return model.requires_grad_(True)


def recorded_examples(
    arrays: Mapping[str, Tensor], settings: Mapping[str, Any], model: LatentReasoner
) -> list[LatentExample]:
    """The rows of a recorded batch as ours; `position_shift` moves the target token."""
    n, special = settings["num_latent"], model.settings
    examples = []
    for row in range(len(arrays["in/labels"])):
        question = arrays["in/encoder_input_ids"][row][arrays["in/encoder_attention_mask"][row]]
        teacher = arrays["in/ref_input_ids"][row][arrays["in/ref_attention_mask"][row]].numpy()
        labels = arrays["in/labels"][row]
        side = arrays["in/decoder_input_ids"][row][labels != IGNORED]
        if not torch.equal(side, labels[labels != IGNORED]):
            raise ValueError(f"row {row}: the answer side is not its own labels")
        answer = side[1:].numpy()
        length = len(question) - 1
        run = [special.start_id, *[special.continue_id] * n, special.stop_id]
        student = np.concatenate([question[:-1].numpy(), run, answer]).astype(np.int32)
        first = int((arrays["in/ref_labels"][row] != IGNORED).long().argmax())
        shift = settings["position_shift"] - 1
        target = int(arrays["in/ref_answer_position"][row]) + shift
        place = int(arrays["in/model_answer_position"][row]) + shift
        examples.append(
            LatentExample(
                PlainExample(teacher.astype(np.int32), first, len(teacher) - first, first, target),
                StudentExample(student, length, n + 2, length + n + 2, length + n + 1 + place),
            )
        )
    return examples


def distillation_of(settings: Mapping[str, Any]) -> Distillation:
    """The recorded settings under our names."""
    divided = "layerwise_variance" if settings["distance"] == "l2" else "layerwise_std"
    return Distillation(
        codi_weight=settings["distill_weight"],
        teacher_loss_weight=settings["teacher_weight"],
        distance=settings["distance"],
        normalise=divided if settings["divide_by_std"] else "none",
        include_embedding_layer=True,
    )


def _loss(vectors: Vectors, entry: Record, name: str) -> Checks:
    """One batch: parts of the loss, states, log-probabilities and all gradients."""
    settings, arrays = entry["settings"], vectors.file(f"codi/loss_{name}.npz")
    # The flag mends the answer side of padded rows only, and changes nothing without padding.
    reason = PADDING_BUG + (" (mended on the answer side)" if settings["fix_attn_mask"] else "")
    if settings["left_padding"] and not settings.get("mask_aware"):
        skip(reason, arrays, entry)
    model, tokenizer = public_model(vectors, f"codi/{settings['ckpt']}", settings["projection"])
    if settings.get("lora"):
        _attach(vectors, model, settings["lora"])
    distillation = distillation_of(settings)
    batch = collate_latent(recorded_examples(arrays, settings, model), tokenizer.eos_token_id)
    reading = LatentReading.plan(model, batch, distillation)
    losses = latent_sft_losses(model, reading, distillation)
    yield from loss_checks(losses, entry)
    yield from _states(model, batch, distillation, arrays)
    sum(losses.values()).backward()
    rows = len(tokenizer) - 2  # but for CONTINUE and STOP
    yield from gradient_checks(recorded_gradients(model, rows - 1, rows), entry, arrays)


def skip(reason: str, *records: Record) -> None:
    """Skip a case, all of whose keys count as read. Raises `Skip`."""
    for record in records:
        for value in record.values():
            if isinstance(value, Record):
                dict(value.items())
    raise Skip(reason)


def loss_checks(losses: Mapping[str, Tensor], entry: Record) -> Checks:
    """The parts of the loss and their sum, which is recorded as `loss`."""
    own = {name: losses.get(ours, torch.tensor(0.0)) for name, ours in PARTS.items()}
    yield Check(own, {name: entry[name] for name in own}, LOSS, "parts")
    yield Check(sum(losses.values()), entry["loss"], LOSS, "loss")


def _attach(vectors: Vectors, model: LatentReasoner, lora: Record) -> None:
    """The recorded adapter; the special tokens' rows are frozen with the embeddings."""
    factors = dict(vectors.file(f"codi/{lora['file']}"))
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in factors})
    attach_lora(
        model,
        Lora(
            r=lora["r"],
            alpha=lora["alpha"],
            dropout=lora["dropout"],
            target_modules=targets,
            train_special_rows=False,
        ),
    )
    own = model.state_dict()
    for name, factor in factors.items():
        own["base." + re.sub(r"\.(lora_[AB])\.", r".\1.default.", name)].copy_(factor)


def _states(
    model: LatentReasoner,
    batch: Mapping[str, Tensor],
    distillation: Distillation,
    arrays: Mapping[str, Tensor],
) -> Checks:
    """What the gradients come from: latent inputs, compared states, probabilities of labels."""
    distillation = distillation.model_copy(update={"codi_weight": 1.0})  # 0 would compare nothing
    with torch.no_grad():
        for side, before in (("teacher", ""), ("student", "latent_")):
            plan = Side.plan(model, batch, side, distillation)
            output, summary = read_with_states(model, plan, distillation)
            states = {f"out/{side}_target_states": summary.target}
            yield recorded(states, arrays, STATES, "states")
            ids, mask = batch[f"{before}input_ids"], batch[f"{before}attention_mask"].bool()
            logits = model.full_logits(output)
            if side == "student":
                steps = (ids == model.settings.continue_id)[:, 1:]
                own = model.latent_input(output.last_hidden[:, :-1][steps])
                own = own.view(len(ids), len(own) // len(ids), own.shape[-1])
                yield recorded({"out/latent_inputs": own}, arrays, STATES, "latents")
            labels = batch[f"{before}labels"]
            yield from _probabilities(logits, ids, mask, labels, side, arrays)


def _probabilities(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor,
    labels: Tensor,
    side: str,
    arrays: Mapping[str, Tensor],
) -> Checks:
    """Log-probabilities of a side's labels, or all its logits where they are recorded."""
    start = mask.long().argmax(1)
    if side == "student" and "out/student_logits" in arrays:
        expected = arrays["out/student_logits"]
        first = (labels != IGNORED).long().argmax(1) - 1  # where eot is read
        for row in range(len(ids)):
            own = logits[row, int(first[row]) :, : expected.shape[-1]]
            yield Check(own, expected[row, : len(own)], STATES, "logits")
        return
    key = f"out/{side}_label_logprobs"
    if key not in arrays:
        return
    own = torch.zeros_like(arrays[key])
    log_probabilities = logits.log_softmax(-1)
    for row, column in (labels != IGNORED).nonzero().tolist():
        place = column - 1 - int(start[row])
        if side == "student":
            place = column - int((labels[row] != IGNORED).long().argmax())
        own[row, place] = log_probabilities[row, column - 1, labels[row, column]]
    yield Check(own, arrays[key], STATES, "log-probabilities")


def recorded_gradients(model: LatentReasoner, end_id: int, rows: int) -> dict[str, Tensor]:
    """All gradients by their recorded names: `rows` are recorded, END's as row `end_id`."""
    own = {}
    for parameter, name in parameter_names(model).items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if name.startswith("base.") and name.endswith(("embed_tokens.weight", "wte.weight")):
            gradient[end_id] += gradient[model.settings.end_id]
            gradient = gradient[:rows]
        own[recorded_name(name)] = gradient
    return own


def recorded_name(name: str) -> str:
    """The public name of one of our parameters."""
    for ours, public in (("input_layer", "1"), ("output_layer", "3"), ("norm", "ln")):
        name = name.replace(f"recurrent_filter.{ours}.", f"prj.{public}.")
    return re.sub("^base", "codi", name).replace(".default.", ".")


def gradient_checks(
    own: Mapping[str, Tensor], entry: Record, arrays: Mapping[str, Tensor]
) -> Checks:
    """All recorded gradients, their norms and that of all together."""
    expected = {name.removeprefix("grad/"): arrays[name] for name in arrays if "grad/" in name}
    yield Check({name: own[name] for name in expected}, expected, GRADIENT, "gradients")
    norms = dict(entry["grad_norms"])
    tolerance = GRADIENT_NORM._replace(absolute=ROUNDING)
    yield Check({name: g.norm() for name, g in own.items()}, norms, tolerance, "norms")
    total = torch.stack([gradient.norm() for gradient in own.values()]).norm()
    yield Check(total, entry["grad_norm"], GRADIENT_NORM, "norms")


# ------------------------------------------------------------------------------------- generation


def _generation(vectors: Vectors, entry: Record) -> Checks:
    """Greedy ids after the forced latent steps, and what the public evaluation reads in them."""
    settings, questions = entry["settings"], entry["questions"]
    model, tokenizer = load_rival(vectors.folder(f"codi/{settings['ckpt']}"), "codi")
    mark = [] if settings["remove_eos"] else [tokenizer.eos_token_id]
    run = latent_run(settings["latent_steps"], special_token_ids(tokenizer))
    prompts = []
    for question in questions:
        text = question["question"].strip().replace("  ", " ")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompts.append([*beginning(tokenizer), *ids, *mark, *run, *mark])
    generations = generate(
        model,
        prompts,
        max_new_tokens=settings["max_new_tokens"],
        eos_id=tokenizer.eos_token_id,
        batch_size=settings["batch_size"],
    )
    ids = [generation.ids for generation in generations]
    yield Check(ids, entry["generated_ids"], part="ids")
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    gold = [_gold(question["answer"]) for question in questions]
    own = [_last_number(text) for text in texts]
    yield Check(list(map(str, own)), entry["predictions"], part="predictions")
    yield Check(list(map(str, gold)), entry["gold"], part="gold")
    right = sum(a == b for a, b in zip(own, gold, strict=True)) / len(gold)
    yield Check(right, entry["accuracy"], Tolerance(absolute=1e-9), "accuracy")


def _gold(answer: str) -> float:
    try:
        return float(answer.split("####")[-1].replace(",", ""))
    except ValueError:
        return float("inf")


def _last_number(text: str) -> float:
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return float(found[-1]) if found else float("inf")


READERS = {
    r"codi/data\.json": {r"variants/(.+)": _variant},
    r"codi/loss\.json": {r"(.+)": _loss},
    r"codi/generation\.json": {".+": _generation},
}
