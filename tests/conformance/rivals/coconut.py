"""Cases of `coconut/`: stages of rows, forwards with their losses and gradients, generation.

The public text form: pieces tokenised apart, question and steps with a newline, `### {answer}` and
EOS, START and STOP where there are latents or text. The public code has the three marker tokens in
its softmax; here START, END, CONTINUE and STOP get rows of their own behind the vocabulary, copies
of the markers' rows, so that the logits of the vocabulary are left as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from latent_reasoning.data.context import decode, read_pieces, read_whole
from latent_reasoning.data.examples import PlainExample, StagedRow
from latent_reasoning.data.sequences import beginning
from latent_reasoning.model.folder import load_tokenizer
from latent_reasoning.model.generation import generate
from latent_reasoning.model.heads import target_log_probabilities
from latent_reasoning.model.reading import plan_reading
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings
from latent_reasoning.model.state import ReasoningState
from latent_reasoning.rivals.coconut import Stages, mixed_stage
from latent_reasoning.training.checkpoints import parameter_names
from latent_reasoning.training.text import Labels, cross_entropy
from tests.conformance.checks import Check, Checks, Tolerance
from tests.conformance.recording import Record, Vectors

INFORMATION = {"smallest_margin", "seed"}
STATE, LOSS = Tolerance(absolute=3e-4), Tolerance(relative=1e-5)
GRADIENT, GRADIENT_NORM = Tolerance(relative=1e-3, by_norm=True), Tolerance(relative=1e-3)
SPECIAL = ("start_id", "end_id", "latent_id")
MARKERS = ("<|start-latent|>", "<|end-latent|>", "<|latent|>")


# --------------------------------------------------------------------------------------- sequences


def _tokenised(vectors: Vectors, entries: list[Record], kind: str) -> Checks:
    """The pieces of each row by our tokenisation."""
    tokenizer = load_tokenizer(vectors.folder(f"coconut/ckpt_{kind}"))
    first = beginning(tokenizer)
    for row, entry in zip(vectors.file("coconut/data.json")["rows"], entries, strict=True):
        (question,) = read_whole(tokenizer, [row["question"] + "\n"])
        steps = list(read_pieces(tokenizer, [f"{step}\n" for step in row["steps"]]))
        (answer,) = read_pieces(tokenizer, [f"### {row['answer']}"])
        own = {"question": [*first, *question], "steps": steps}
        own["answer"] = [*answer, tokenizer.eos_token_id]
        yield Check(own, entry)


def _ids(vectors: Vectors, ids: Record, kind: str) -> Checks:
    """Ids of the tokens: the markers' rows follow the vocabulary, begun as that of `<<`."""
    tokenizer = load_tokenizer(vectors.folder(f"coconut/ckpt_{kind}"))
    (first,) = read_pieces(tokenizer, ["<<"])
    own = {key: len(tokenizer) + place for place, key in enumerate(SPECIAL)}
    own |= {"eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.eos_token_id}
    yield Check(own | {"init_from_id": first[0]}, ids)


class _Recorded:
    """Recorded draws, in their order."""

    def __init__(self, draws: list) -> None:
        self.draws = iter(draws)

    def random(self) -> float:
        return self._next("random")[0]

    def randrange(self, stop: int, /) -> int:
        choices, chosen = self._next("choice")
        if choices != stop:
            raise ValueError(f"a draw among {choices} is recorded, ours is among {stop}")
        return chosen

    def _next(self, kind: str) -> list:
        recorded, *values = next(self.draws)
        if recorded != kind:
            raise ValueError(f"a draw of {recorded} is recorded where ours is of {kind}")
        return values


def _stages(vectors: Vectors, case: Record, kind: str) -> Checks:
    """Every row at the recorded stages, and the prompts of the evaluation."""
    settings, every = case["settings"], list(_rows(vectors, kind))
    for position, entry in enumerate(case["stages"]):
        draws = _Recorded(entry.get("draws", []))
        examples = []
        for row in every:
            stage = entry["stage"]
            if settings["uniform_prob"]:
                stage = mixed_stage(row.steps, stage, settings["uniform_prob"], draws)
            examples.append(_example(vectors, row, settings, stage, kind))
        own = [{"input_ids": e.input_ids.tolist(), "labels": e.labels.tolist()} for e in examples]
        yield Check(own, entry["train"], part=f"{position}/train")
        yield Check(list(draws.draws), [], part=f"{position}/draws")
        prompts = [_prompt(vectors, row, settings, entry["stage"], kind) for row in every]
        yield Check(prompts, entry["evaluation"], part=f"{position}/evaluation")


def _rows(vectors: Vectors, kind: str) -> Iterator[StagedRow]:
    for entry in vectors.file("coconut/data.json")["kinds"][kind]["tokenised"]:
        steps, answer = entry["steps"], entry["answer"]
        texts = [[i for step in steps[first:] for i in step] for first in range(len(steps) + 1)]
        yield StagedRow(entry["question"], texts, answer, len(answer))


def _stages_of(settings: Record) -> Stages:
    return Stages(
        settings["c_thought"], settings["max_latent_stage"], settings["pad_latent_to_max"]
    )


def _example(
    vectors: Vectors, row: StagedRow, settings: Record, stage: int, kind: str
) -> PlainExample:
    if settings["no_cot"]:
        return row.example([], [])
    latents, left_out = _stages_of(settings).of_training(row.steps, stage)
    return row.example(_run(vectors, settings, latents, kind), row.texts[left_out])


def _prompt(vectors: Vectors, row: StagedRow, settings: Record, stage: int, kind: str) -> list[int]:
    latents = _stages_of(settings).of_evaluation(row.steps, stage)
    return [*row.question, *_run(vectors, settings, latents, kind)]


def _run(vectors: Vectors, settings: Record, latents: int, kind: str) -> list[int]:
    if not settings.get("markers", True):
        return []
    ids = vectors.file("coconut/data.json")["kinds"][kind]["ids"]
    start, end, latent = (ids[key] for key in SPECIAL)
    return [start, *[latent] * latents, end]


# ----------------------------------------------------------------------------------------- forward


def _forward(vectors: Vectors, case: Record, name: str) -> Checks:
    """A batch: its sequences, latent inputs, log-probabilities, loss and gradients."""
    settings, arrays = case["settings"], vectors.file(f"coconut/forward_{name}.npz")
    kind = _kind(settings)
    mask, labels = arrays["in/attention_mask"], arrays["in/labels"].long()
    yield from _batch_of_rows(vectors, settings, arrays, kind)
    own = ReasoningState.empty(mask.bool()).append(mask.bool()) * mask
    yield Check(own, arrays["in/position_ids"], part="position_ids")
    model, rename = _reasoner(vectors, settings, kind)
    ids = rename[arrays["in/input_ids"]]
    yield from _latents(vectors, model, case, arrays, ids, kind)
    output = model(ids, mask)
    learned = Labels.of(labels, output.kinds, model.settings)
    yield Check(len(learned.rows), case["labels"], part="labels")
    hidden = output.last_hidden[learned.rows, learned.columns]
    with torch.no_grad():
        log_probs = torch.zeros(labels[:, 1:].shape)
        log_probs[learned.rows, learned.columns] = target_log_probabilities(
            model, hidden, learned.targets
        )
        yield Check(log_probs, arrays["out/label_logprobs"], STATE, "label_logprobs")
        if "out/label_logits" in arrays:
            expected = arrays["out/label_logits"]
            logits = model.logits(hidden, learned.targets.kinds)[:, : expected.shape[1]]
            yield Check(logits, expected, STATE, "label_logits")
    loss = cross_entropy(model, output, learned)
    yield Check(loss, case["loss"], LOSS, "loss")
    loss.backward()
    yield from _gradients(model, case, arrays, rename)


def _batch_of_rows(vectors: Vectors, settings: Record, arrays: Record, kind: str) -> Checks:
    """The recorded batch holds the rows at the stage; at a drawn one, where stages are mixed."""
    every, mask = list(_rows(vectors, kind)), arrays["in/attention_mask"].bool()
    for position, index in enumerate(settings["rows"]):
        row, stages = every[index], {settings["stage"]}
        if settings["uniform_prob"]:
            stages |= {*range(row.steps + 1)}
        ids, labels = (arrays[f"in/{k}"][position][mask[position]] for k in ("input_ids", "labels"))
        possible = [_example(vectors, row, settings, stage, kind) for stage in sorted(stages)]
        own = next((e for e in possible if e.input_ids.tolist() == ids.tolist()), possible[0])
        yield Check(own.input_ids.tolist(), ids.tolist(), part="input_ids")
        yield Check(own.labels.tolist(), labels.tolist(), part="labels")
    yield Check(bool((arrays["in/labels"][~mask] == -100).all()), True, part="labels")


def _latents(
    vectors: Vectors, model: LatentReasoner, case: Record, arrays: Record, ids: Tensor, kind: str
) -> Checks:
    """The number of latents and of passes, and what was fed at each latent."""
    mask = arrays["in/attention_mask"]
    latent = vectors.file("coconut/data.json")["kinds"][kind]["ids"]["latent_id"]
    is_latent = (arrays["in/input_ids"] == latent) & mask.bool()
    counts = is_latent.sum(1).tolist()
    yield Check(counts, case["latents"], part="latents")
    # Ours are cut at STOP even where there is no latent at all.
    passes = len(plan_reading(model, ids, mask).passes) if any(counts) else 1
    yield Check(passes, case["passes"], part="passes")
    rows, columns = is_latent.nonzero(as_tuple=True)
    yield Check(torch.stack([rows, columns], 1), arrays["out/latent_index"], part="latent_index")
    with torch.no_grad():
        fed = model.latent_input(model(ids, mask).last_hidden[rows, columns - 1])
    yield Check(fed, arrays["out/latent_embeds"], STATE, "latent_embeds")


def _gradients(model: LatentReasoner, case: Record, arrays: Record, rename: Tensor) -> Checks:
    """Gradients of all parameters: a marker's row has what ours have of its copies too."""
    own, copies = {}, {}
    if model.settings is not None:
        ids = model.settings
        marker = {v: i for i, v in enumerate(rename.tolist()) if i != v}
        copies = {ids.start_id: marker[ids.start_id], ids.end_id: marker[ids.stop_id]}
    for parameter, name in parameter_names(model).items():
        gradient = parameter.grad.clone()
        if len(gradient) == len(rename) + 4 and copies:
            for copy, row in copies.items():
                gradient[row] += gradient[copy]
            gradient = gradient[: len(rename)]
        own[name.removeprefix("base.")] = gradient
    recorded = {key.removeprefix("grad/"): arrays[key] for key in arrays if key.startswith("grad/")}
    yield Check({key: own[key] for key in recorded}, recorded, GRADIENT, "gradients")
    norms = case["grad_norms"]
    yield Check({key: g.norm() for key, g in own.items()}, norms, GRADIENT_NORM, "grad_norms")
    total = torch.stack([gradient.norm() for gradient in own.values()]).norm()
    yield Check(total, case["grad_norm"], GRADIENT_NORM, "grad_norm")


def _kind(settings: Record) -> str:
    return settings["ckpt"].removeprefix("ckpt_").removesuffix("_overfit")


def _reasoner(vectors: Vectors, settings: Record, kind: str) -> tuple[LatentReasoner, Tensor]:
    """The checkpoint as a latent reasoner with four more rows, and our id of each recorded id."""
    plain = vectors.model(f"coconut/{settings['ckpt']}")
    count = plain.base.get_input_embeddings().weight.shape[0]
    rename = torch.arange(count)
    if not settings.get("markers", True):
        return plain, rename
    ids = vectors.file("coconut/data.json")["kinds"][kind]["ids"]
    start, end, latent = (ids[key] for key in SPECIAL)
    base = plain.base
    base.resize_token_embeddings(count + 4, mean_resizing=False)
    with torch.no_grad():
        for matrix in (base.get_input_embeddings().weight, base.get_output_embeddings().weight):
            matrix[count:] = matrix[[start, end, latent, end]]
    rename[[start, latent, end]] = torch.tensor([count, count + 2, count + 3])
    own = LatentSettings(count, count + 1, count + 2, count + 3, recurrent_filter="none")
    return LatentReasoner(base, own).requires_grad_(True).eval(), rename


# -------------------------------------------------------------------------------------- generation


def _generation(vectors: Vectors, case: Record) -> Checks:
    """Greedy completions and what the public evaluation reads in them."""
    settings = case["settings"]
    kind = _kind(settings)
    model, rename = _reasoner(vectors, settings, kind)
    tokenizer = load_tokenizer(vectors.folder(f"coconut/{settings['ckpt']}"))
    rows = vectors.file("coconut/data.json")["rows"]
    entries, staged = case["rows"], list(_rows(vectors, kind))
    verdicts = []
    for position, entry in enumerate(entries):
        index = settings.get("rows", range(len(entries)))[position]
        prompt = entry["prompt"]
        own = _prompt(vectors, staged[index], settings, settings["stage"], kind)
        yield Check(own, prompt, part="prompt")
        output = [*prompt, *_written(model, rename[prompt].tolist(), settings, tokenizer)]
        yield Check(output, entry["output"], part="output")
        text = _text(output, tokenizer, vectors.file("coconut/data.json")["kinds"][kind]["ids"])
        answer = text.split("#")[-1].replace(",", "").strip()
        chain = "\n".join(text.split("\n")[1:]).split("#")[0].strip()
        yield Check({"answer": answer, "cot": chain}, {k: entry[k] for k in ("answer", "cot")})
        gold = rows[index]
        right = answer == gold["answer"].replace(",", "").strip()
        verdicts.append((right, chain == "\n".join(gold["steps"])))
    expected = list(zip(case["correct"], case["cot_match"], strict=True))
    yield Check([list(v) for v in verdicts], [list(v) for v in expected], part="correct")


def _text(output: list[int], tokenizer: PreTrainedTokenizerBase, ids: Record) -> str:
    """The text of a sequence; the markers stay in it, EOS and BOS do not."""
    markers = {ids[key]: text for key, text in zip(SPECIAL, MARKERS, strict=True)}
    hidden = (tokenizer.eos_token_id, *beginning(tokenizer))
    parts = itertools.groupby((i for i in output if i not in hidden), key=markers.get)
    return "".join(
        decode(tokenizer, list(group)) if marker is None else marker * len(list(group))
        for marker, group in parts
    )


def _written(
    model: LatentReasoner, prompt: list[int], settings: Record, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The new ids; the public loop goes on after a first token that is EOS, and keeps it."""
    most, eos = settings["max_new_tokens"], tokenizer.eos_token_id
    ids: list[int] = []
    (written,) = generate(model, [prompt], max_new_tokens=most, eos_id=eos, batch_size=1)
    if written.ids == [eos]:
        ids = [eos]
        (written,) = generate(
            model, [[*prompt, eos]], max_new_tokens=most - 1, eos_id=eos, batch_size=1
        )
    return ids + (written.ids if written.cut_off else written.ids[:-1])


READERS = {
    r"coconut/data\.json": {
        "kinds/(.+)/ids": _ids,
        "kinds/(.+)/tokenised": _tokenised,
        "kinds/(.+)/cases/.+": _stages,
    },
    r"coconut/forward\.json": {"(.+)": _forward},
    r"coconut/generation\.json": {".+": _generation},
}
