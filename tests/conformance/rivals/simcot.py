"""Cases of `simcot/`: the step decoder's texts, losses and gradients on CODI and on Coconut.

Host weights lie beside them (arXiv 2509.20317). What is cut out of recorded ids, the public way,
is done here; which latent input gets which text, and the losses, are the project's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from latent_reasoning.config import StepDecoder as StepDecoderSection
from latent_reasoning.data.collation import collate_latent, pad_prompts
from latent_reasoning.data.step_texts import texts_of_groups, texts_of_inputs
from latent_reasoning.model.base_files import load_base
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.rival_weights import load_rival
from latent_reasoning.model.step_decoder import (
    StepBatch,
    StepDecoder,
    attach_step_decoder,
    step_decoder_of,
    step_loss,
)
from latent_reasoning.sft.latent_sft import LatentReading, latent_sft_losses
from latent_reasoning.training.text import Labels, cross_entropy
from tests.conformance.checks import EXACT, Check, Checks, Tolerance
from tests.conformance.recording import Record, Vectors
from tests.conformance.rivals.codi import (
    IGNORED,
    LOSS,
    PARTS,
    STATES,
    all_tokens_compete,
    distillation_of,
    gradient_checks,
    public_model,
    recorded_examples,
    recorded_gradients,
    skip,
)

INFORMATION = {"decoder_in_train_mode", "form", "stop_ids", "pad_id"}
SUM = Tolerance(absolute=1e-3, relative=1e-5)
PUBLIC_CUT = (
    "the public code cuts the steps of all rows to the length of the first row's; the case "
    "*_no_cut, or one whose first row is the longest, shows the method"
)


def _decoder(
    vectors: Vectors, model: LatentReasoner, name: str, first_position: int
) -> StepDecoder:
    """Let a recorded decoder be trained with the host, with its layer in front where it has one."""
    attach_step_decoder(model, load_base(vectors.folder(f"simcot/{name}")))
    decoder = step_decoder_of(model)
    decoder.first_position = first_position
    if list(decoder.input_layer.parameters()):
        fronts = [f"simcot/{folder}input_projection.safetensors" for folder in (f"{name}/", "")]
        front = next((path for path in fronts if path in vectors.paths), fronts[0])
        decoder.input_layer.load_state_dict(dict(vectors.file(front)))
    return decoder


def _slot(texts: Sequence[Sequence[Sequence[int]]], slot: int) -> list[list[Sequence[int]]]:
    """The rows' texts of one slot, in its place."""
    return [[[]] * slot + [row[slot]] if slot < len(row) else [] for row in texts]


def _placed(
    texts: Sequence[Sequence[Sequence[int]]], slot: int, group: int, width: int
) -> dict[str, Tensor]:
    """Labels and mask of the decoder's input of one slot, as the public code writes them."""
    labels = torch.full((len(texts), width - 1), IGNORED)
    mask = torch.zeros(len(texts), width, dtype=torch.long)
    for row, own in enumerate(texts):
        text = own[slot] if slot < len(own) else []
        labels[row, group - 1 : group - 1 + len(text)] = torch.tensor(text)
        mask[row, : group + len(text)] = 1
    return {"labels": labels, "attention_mask": mask}


# ---------------------------------------------------------------------------------------- on CODI


def _on_codi(vectors: Vectors, entry: Record, name: str) -> Checks:
    settings, arrays = entry["settings"], vectors.file(f"simcot/loss_{name}.npz")
    model, tokenizer = public_model(vectors, settings["ckpt"])
    marks, eos = settings["step_ids"], tokenizer.eos_token_id
    examples = recorded_examples(arrays, settings, model)
    slots = settings["num_latent"] + 1
    steps = [
        list(_cut_out(e.teacher.input_ids[e.teacher.first_label :].tolist(), marks))
        for e in examples
    ]
    texts = [texts_of_inputs(own, slots, marks["eot_id"]) for own in steps]
    yield Check(slots, entry["slots_total"])
    none = [[marks["pad_id"]]]
    yield Check([t + none * (slots - len(t)) for t in texts], entry["steps"], part="texts")
    yield Check(marks["eot_id"], eos, part="texts")
    longest = [max(map(len, slot)) for slot in zip(*_filled(texts, slots), strict=True)]
    first = [len(text) for text in _filled(texts, slots)[0]]
    if settings["public_cut"] and longest != first:
        _decoder(vectors, model, settings["decoder"], 0)
        skip(PUBLIC_CUT, arrays, entry)
    yield from _placed_slots(texts, arrays, "slot", 1)
    decoder = _decoder(vectors, model, settings["decoder"], 0)
    yield from _losses_on_codi(model, decoder, examples, texts, entry, arrays)
    rows = len(tokenizer) - 2  # but for CONTINUE and STOP
    yield from gradient_checks(_gradients(model, rows - 1, rows), entry, arrays)


def _filled(texts: Sequence[list[list[int]]], slots: int) -> list[list[list[int]]]:
    return [own + [[]] * (slots - len(own)) for own in texts]


def _losses_on_codi(model, decoder, examples, texts, entry: Record, arrays: Record) -> Checks:
    settings = entry["settings"]
    distillation = distillation_of(
        {"distance": "smooth_l1", "divide_by_std": True, "teacher_weight": 1.0} | dict(settings)
    )
    batch = collate_latent(examples, pad_id=0)
    reading = LatentReading.plan(model, batch, distillation, step_texts=texts)
    section = StepDecoderSection(weight=settings["explain_weight"])
    losses = latent_sft_losses(model, reading, distillation, step_decoder=section)
    names = PARTS | {"explain_loss": "step_loss"}
    own = {name: losses.get(ours, torch.tensor(0.0)) for name, ours in names.items()}
    yield Check(own, {name: entry[name] for name in own}, LOSS, "parts")
    yield Check(sum(losses.values()), entry["loss"], LOSS, "loss")
    ids, mask = batch["latent_input_ids"], batch["latent_attention_mask"]
    with torch.no_grad():
        output = model(ids, mask)
        thinking = (ids == model.settings.start_id) | (ids == model.settings.continue_id)
        latents = model.latent_input(output.last_hidden[thinking])
        latents = latents.view(len(ids), -1, latents.shape[-1])
        yield Check(latents, arrays["out/latents"], STATES, "latents")
        for slot, expected in enumerate(entry["slot_losses"]):
            plan = StepBatch.plan(ids, _slot(texts, slot), model.settings)
            own_loss = step_loss(model, output.last_hidden, plan, "tokens")
            yield Check(own_loss, expected, LOSS, "slots")
    sum(losses.values()).backward()


def _cut_out(ids: Sequence[int], marks: Mapping) -> Iterator[list[int]]:
    """Steps in a teacher's ids: from a token of `<<` to the next of `>>`."""
    start = None
    for place, token in enumerate(ids):
        if start is None and token in marks["start_ids"]:
            start = place
        elif start is not None and token == marks["end_id"]:
            yield list(ids[start : place + 1])
            start = None


def _placed_slots(texts, arrays: Record, name: str, group: int) -> Checks:
    """What the decoder reads and learns, of every slot recorded."""
    slot = 0
    while f"out/{name}{slot}_labels" in arrays:
        width = arrays[f"out/{name}{slot}_attention_mask"].shape[1]
        for key, own in _placed(texts, slot, group, width).items():
            yield Check(own, arrays[f"out/{name}{slot}_{key}"].long(), EXACT, "texts")
        slot += 1
    yield Check(max(map(len, texts)), slot, part="texts")


def _gradients(model: LatentReasoner, end_id: int, rows: int) -> dict[str, Tensor]:
    names = {"step_decoder.decoder.": "decoder.", "step_decoder.input_layer.": "pj_in."}
    own = recorded_gradients(model, end_id, rows)
    for ours, public in names.items():
        own = {name.replace(ours, public): gradient for name, gradient in own.items()}
    return own


# ------------------------------------------------------------------------------------- on Coconut


def _on_coconut(vectors: Vectors, entry: Record, name: str) -> Checks:
    settings, arrays = entry["settings"], vectors.file(f"simcot/loss_{name}.npz")
    model, tokenizer = load_rival(vectors.folder(settings["ckpt"]), "coconut")
    public = model.settings
    model = all_tokens_compete(model, "end_id", "continue_id")
    kind = settings["ckpt"].rpartition("_")[2]
    pieces = vectors.file("coconut/data.json")["kinds"][kind]["tokenised"]
    group, limit = settings["c_thought"], settings["max_latent_stage"]
    ids, texts = [], []
    groups = int((arrays["in/input_ids"][0] == public.continue_id).sum()) // group
    expected = [settings["stage"], limit]
    if not settings["pad_latent_to_max"] and settings["stage"] > limit:
        expected.append(len(pieces[settings["rows"][0]]["steps"]))
    yield Check(groups, min(expected), part="texts")
    mask = arrays["in/attention_mask"]
    positions = (mask.cumsum(1) - 1) * mask
    yield Check(positions, arrays["in/position_ids"], part="texts")
    read = {name: tokenizer(name, add_special_tokens=False)["input_ids"] for name in (">>", "\n")}
    for place, index in enumerate(settings["rows"]):
        steps = pieces[index]["steps"]
        removed = steps[: settings["stage"]] if settings["stage"] <= limit else steps
        yield Check(removed, entry["removed_steps"][place], part="texts")
        row = arrays["in/input_ids"][place][arrays["in/attention_mask"][place].bool()]
        labels = arrays["in/labels"][place]
        remaining = labels[labels != IGNORED].tolist()[:-1]
        ids.append(row.tolist())
        equations = [_without_newline(step, read) for step in removed]
        texts.append(
            texts_of_groups(
                equations,
                remaining,
                groups,
                separator=read["\n"],
                eos_id=tokenizer.eos_token_id,
            )
        )
    _, steps = pad_ids(entry["removed_steps"])
    yield Check(steps, arrays["in/explainable_ids_list"], part="texts")
    yield from _placed_slots(texts, arrays, "thought", group)
    decoder = _decoder(vectors, model, settings["decoder"], 1)
    for slot in range(groups):
        positions = arrays[f"out/thought{slot}_position_ids"]
        own = torch.arange(positions.shape[1]) + decoder.first_position
        yield Check(own.expand_as(positions), positions, part="texts")
    yield from _losses_on_coconut(model, public, decoder, ids, texts, entry, arrays)
    own = _gradients(model, public.end_id, public.stop_id)
    own = {name.replace("codi.", "base."): gradient for name, gradient in own.items()}
    yield from gradient_checks(own, entry, arrays)


def pad_ids(rows: Sequence[Sequence[Sequence[int]]]) -> tuple[int, Tensor]:
    """Rows' steps side by side, padded with 0 on the right."""
    flat = [torch.tensor([t for step in steps for t in step]) for steps in rows]
    return len(flat), torch.nn.utils.rnn.pad_sequence(flat, batch_first=True).long()


def _without_newline(step: Sequence[int], read: Mapping[str, list[int]]) -> list[int]:
    """A recorded step up to its `>>`, which Llama 3 reads as one token with the newline."""
    end = read[">>"]
    if list(step[-1:]) == read["\n"]:
        return list(step[:-1])
    return [*step[:-1], *end]


def _losses_on_coconut(model, public, decoder, ids, texts, entry: Record, arrays: Record) -> Checks:
    """The host's cross-entropy and the decoder's losses; leaves the gradients of their sum."""
    settings, special = entry["settings"], model.settings
    swapped = {public.continue_id: special.continue_id, public.end_id: special.stop_id}
    batch, mask = pad_prompts([[swapped.get(t, t) for t in row] for row in ids], pad_id=0)
    labels = torch.full_like(batch, IGNORED)
    for row, own in enumerate(arrays["in/labels"]):
        learnt = own[own != IGNORED].long()
        labels[row, batch.shape[1] - len(learnt) :] = learnt
    output = model(batch, mask)
    ce_loss = cross_entropy(model, output, Labels.of(labels, output.kinds, special))
    yield Check(ce_loss, entry["ce_loss"], LOSS, "loss")
    normalise = {"token_level": "tokens", "sequence_level": "rows"}[settings["loss_level"]]
    group = settings["c_thought"]
    plan = StepBatch.plan(batch, texts, special, group)
    loss = ce_loss + step_loss(model, output.last_hidden, plan, normalise)
    tolerance = LOSS._replace(relative=SUM.relative)
    yield Check(loss, entry["loss"], tolerance, "loss")
    with torch.no_grad():
        for slot, expected in enumerate(entry["thought_ce_sums"]):
            plan = StepBatch.plan(batch, _slot(texts, slot), special, group)
            mean = step_loss(model, output.last_hidden, plan, "rows")
            yield Check(mean * len(ids), expected, SUM, "sums")
    loss.backward()


READERS = {
    r"simcot/loss_codi\.json": {r"(.+)": _on_codi},
    r"simcot/loss_coconut\.json": {r"(.+)": _on_coconut},
}
