"""Cases of `colar/`: losses, latent chains, rewards, a step of the policy (arXiv 2505.16552).

The public layout of a batch, whose last group may be a hole, is written here; what is computed from
it is the project's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from latent_reasoning.config import Colar
from latent_reasoning.data import numbers
from latent_reasoning.data.answers import ANSWER_PREFIX, in_our_words
from latent_reasoning.data.context import decode
from latent_reasoning.data.examples import IGNORED_LABEL
from latent_reasoning.data.rows import Row
from latent_reasoning.data.sequences import encode_prompts
from latent_reasoning.model.folder import load_tokenizer
from latent_reasoning.model.gaussian import LatentNoise
from latent_reasoning.model.generation import write_after
from latent_reasoning.model.given import read_given
from latent_reasoning.model.heads import STOPS, decision_logits
from latent_reasoning.model.passes import Kind
from latent_reasoning.model.published_colar import our_name
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.state import ReasoningState
from latent_reasoning.model.trajectory import Trajectory
from latent_reasoning.rivals.chains import Chains, Pair
from latent_reasoning.rivals.colar import (
    Groups,
    batch_inputs,
    entropy,
    foretell,
    latent_loss,
    weighted_losses,
    words_cross_entropy,
)
from latent_reasoning.rivals.colar_rl import chain_loss, score_chains
from latent_reasoning.rl.grpo import advantages
from latent_reasoning.training.text import Labels
from tests.conformance.checks import Check, Checks, Tolerance
from tests.conformance.recording import Record, Vectors

INFORMATION = {"n_latents", "min_margin", "speed", "noise"}
"""Numbers that follow from others which are compared, the text of a speed, which is in the ids, and
whether the noise is 0, which is recorded."""
INPUTS, STATES = Tolerance(absolute=1e-6), Tolerance(absolute=1e-4)
LOSS, GRADIENT = Tolerance(relative=1e-5), Tolerance(relative=1e-4, by_norm=True)
CHAIN = Tolerance(absolute=2e-3)
LOG_PROBS, POLICY_LOSS = Tolerance(absolute=1e-3), Tolerance(absolute=1e-4)
POLICY_GRADIENT = Tolerance(relative=5e-3, by_norm=True)
CLIP, SUMMED = 0.2, 32.0
"""Of the public RL: the range of ratios, and what a sample's sum is divided by."""
NO_STD = 1e-8
"""Added to the standard deviation of a group's rewards."""

NAMES = {"llm.": "base.", "latent_policy.": "recurrent_filter."}


# -------------------------------------------------------------------------------------------- SFT


def _sft(vectors: Vectors, entry: Record, name: str) -> Checks:
    """Inputs, head, losses and gradients of a batch."""
    arrays = vectors.file(f"colar/sft_{name}.npz")
    model = vectors.model(f"colar/{entry['model']}")
    if entry["deterministic"]:
        model.recurrent_filter.log_std = None
    weights, size = entry["settings"], entry["r"]
    settings = Colar(
        speeds=[size],
        pooling="sqrt_mean" if weights["sqrt_mean"] else "mean",
        ce_weight=weights["ce_weight"],
        latent_loss=weights["embed_modeling_loss"],
        latent_weight=weights["embed_modeling_weight"],
        entropy_weight=float(weights["entropy_weight"]),
    )
    yield from _texts(vectors, entry, arrays)
    layout = Layout.of(arrays, size)
    own = layout.batch(model, arrays)
    mask, latent_mask = arrays["attention_mask"], arrays["latent_mask"].bool()
    yield Check(own.mask.long(), mask, part="attention_mask")
    positions = ReasoningState.empty(own.mask.bool()).append(own.mask.bool())
    yield Check(positions * mask, arrays["position_ids"] * mask, part="position_ids")
    yield Check(layout.labels, arrays["labels"], part="labels")
    holes = (layout.group_mask[:, -1] == 0).nonzero()[:, 0].tolist()
    yield Check(holes, list(entry["hole_rows"]), part="hole_rows")
    noise = arrays["eps"][latent_mask]
    foretold = foretell(model, own, settings, noise)
    kept = mask.bool()
    yield Check(foretold.inputs[kept], arrays["inputs_embeds"][kept], INPUTS, "inputs_embeds")
    yield Check(foretold.mean, arrays["mu"][latent_mask], STATES, "mu")
    yield Check(foretold.log_std.exp(), arrays["sigma"][latent_mask], STATES, "sigma")
    yield Check(foretold.target, arrays["target"][latent_mask], STATES, "target")
    losses = weighted_losses(model, own, settings, foretold)
    total = sum(losses.values())
    second = torch.zeros(())
    if weights["pred_embed_forward_weight"]:
        second = _second(model, own, layout, arrays, settings)
        total = total + weights["pred_embed_forward_weight"] * second
    recorded = {
        "ce_loss": words_cross_entropy(model, foretold.hidden, own, settings),
        "embed_modeling_loss": latent_loss(settings.latent_loss, foretold),
        "entropy": entropy(foretold.log_std),
        "pred_embed_forward_loss": second,
        "total_loss": total,
    }
    yield Check(recorded, {key: entry[key] for key in recorded}, LOSS)
    total.backward()
    yield from _gradients(model, arrays, "grad", GRADIENT)


def _texts(vectors: Vectors, entry: Record, arrays: Record) -> Checks:
    """The recorded question and steps are the texts of the rows at this speed."""
    folder = vectors.folder(f"colar/{entry['model']}")
    rows = _rows(vectors, entry["rows"])
    tokenizer = load_tokenizer(folder)
    settings = dataclasses.replace(
        vectors.model(f"colar/{entry['model']}").settings, speed=entry["speed"]
    )
    prompts = encode_prompts(
        rows, tokenizer, prefix="Question: ", latent=True, suffix=settings.suffix
    )
    questions = _unpadded(arrays["question_ids"], arrays["question_mask"])
    yield Check([prompt[:-1] for prompt in prompts], questions, part="question_ids")
    steps = [decode(tokenizer, ids) for ids in _unpadded(arrays["steps_ids"], arrays["steps_mask"])]
    texts = ["###" + "\n".join(row.steps or ()) for row in rows]
    yield Check(steps, texts, part="steps_ids")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The public layout of a batch: `before` columns of the question, then n groups of `size`.

    `group_mask` (B, n) is 0 where a group holds only padding; `members` (B, n, `size`) are the ids
    in the groups and `real` says which are words; `labels` are those of the whole sequence.
    """

    size: int
    before: int
    group_mask: Tensor
    members: Tensor
    real: Tensor
    labels: Tensor

    @classmethod
    def of(cls, arrays: Mapping[str, Tensor], size: int) -> Layout:
        """The separator ends the group that it stands in, and is alone in it."""
        ids, mask = arrays["steps_ids"], arrays["steps_mask"].bool()
        rows, width = ids.shape
        left = torch.zeros(rows, dtype=torch.long)
        right = 0
        if size > 1:
            padding = (~mask).sum(1) % size
            left = size - 1 - padding
            right = size - (width + size - 1) % size
            left = torch.where(right + padding == size, left + size, left)
        whole = width + size - 1 + right if size > 1 else width
        columns = left[:, None] + torch.arange(width)
        members = torch.zeros(rows, whole, dtype=torch.long).scatter(1, columns, ids)
        real = torch.zeros(rows, whole, dtype=torch.bool).scatter(1, columns, mask)
        members, real = members.view(rows, -1, size), real.view(rows, -1, size)
        chosen = arrays["group_index"] if size > 1 else torch.zeros(members.shape[:2]).long()
        words = members.gather(2, chosen.unsqueeze(-1))[..., 0]
        group_mask = real.any(-1)
        questions = torch.full_like(arrays["question_ids"], IGNORED_LABEL)
        answers = arrays["answer_ids"].masked_fill(arrays["answer_mask"] == 0, IGNORED_LABEL)
        labels = torch.cat([questions, words.masked_fill(~group_mask, IGNORED_LABEL), answers], 1)
        return cls(size, questions.shape[1], group_mask, members, real, labels)

    def batch(self, model: LatentReasoner, arrays: Mapping[str, Tensor]) -> Groups:
        """As our batches are: CONTINUE at the groups, of which a state foretells the next input."""
        special, groups = model.settings, self.group_mask.shape[1]
        # Where groups are single words, what is read at padding is PAD's own embedding.
        padding = self.members[..., 0] if self.size == 1 else torch.tensor(special.continue_id)
        steps = torch.where(self.group_mask, special.continue_id, padding)
        input_ids = torch.cat([arrays["question_ids"], steps, arrays["answer_ids"]], 1)
        masks = arrays["question_mask"], self.group_mask.long(), arrays["answer_mask"]
        width, mask = input_ids.shape[1], torch.cat(masks, 1)
        inside = torch.zeros_like(input_ids, dtype=torch.bool)
        inside[:, self.before : self.before + groups] = self.group_mask
        kinds = torch.where(inside, int(Kind.THINKING), int(Kind.ANSWER))
        # What comes after a thinking position is a decision, and the word of a group besides.
        labels, after = self.labels.clone(), inside.roll(1, 1)
        is_word = after & inside
        foretold = is_word.nonzero() - torch.tensor([0, 1])
        words = self.labels[is_word]
        labels[is_word] = special.continue_id
        labels[after & ~inside & (labels == special.marker)] = special.stop_id
        columns = self.before + torch.arange(groups).repeat_interleave(self.size)
        columns = torch.where(self.real.flatten(1), columns, width)
        return Groups(
            input_ids,
            mask,
            self.members.flatten(1),
            columns,
            self.size == 1,
            kinds,
            Labels.of(labels, kinds, special),
            inside.nonzero(),
            torch.cat([foretold, words[:, None]], 1),
            torch.ones(()),
        )


def _second(
    model: LatentReasoner, own: Groups, layout: Layout, arrays: Record, settings: Colar
) -> Tensor:
    """CE2 as the public code computes it: samples without their unit, a column late; the separator
    in the first column of the groups."""
    first, last = layout.before, layout.before + layout.group_mask.shape[1]
    inputs = batch_inputs(model, own, settings)
    hidden = read_given(model, inputs, own.mask)
    mean, log_std = model.recurrent_filter.distribution(hidden[:, first:last])
    samples = mean + log_std.exp() * arrays["eps"]
    separator = model.embed(torch.full((len(inputs), 1), model.settings.marker))
    second = torch.cat([inputs[:, :first], separator, samples[:, 1:], inputs[:, last:]], 1)
    mask = own.mask.clone()
    mask[:, first] = 1
    kept = mask.bool()
    expected = arrays["second_inputs_embeds"][kept]
    torch.testing.assert_close(second[kept], expected, atol=1e-4, rtol=0)
    assert torch.equal(mask, arrays["second_attention_mask"])
    positions = ReasoningState.empty(kept).append(kept)
    assert torch.equal(positions * mask, arrays["second_position_ids"] * mask)
    return words_cross_entropy(model, read_given(model, second, mask), own, settings)


def _gradients(model: LatentReasoner, arrays: Record, prefix: str, tolerance: Tolerance) -> Checks:
    """Gradients of every parameter; the copies of the separator's row belong to it."""
    parameters = dict(model.named_parameters())
    for key in [key for key in arrays if key.startswith(f"{prefix}/")]:
        expected, parameter = arrays[key], parameters[_own(key.removeprefix(f"{prefix}/"))]
        gradient = parameter.grad
        if gradient.shape != expected.shape:
            special, count = model.settings, len(expected)
            gradient = gradient.clone()
            copies = gradient[special.start_id] + gradient[special.end_id]
            gradient[special.marker] += copies
            gradient = gradient[:count]
        yield Check(gradient, expected, tolerance, key)


def _own(name: str) -> str:
    """Our name of a recorded parameter."""
    for theirs, ours in NAMES.items():
        if name.startswith(theirs):
            rest = name.removeprefix(theirs)
            return ours + (our_name(rest) if theirs == "latent_policy." else rest)
    raise ValueError(f"unknown parameter {name}")


# ------------------------------------------------------------------------------------- generation


class Recorded(LatentNoise):
    """Recorded normal numbers (R, n, d), times a temperature, in the place of drawn ones."""

    def __init__(self, numbers: Tensor, temperature: float) -> None:
        super().__init__(0, [], numbers.shape[-1])
        self.numbers, self.step = temperature * numbers, 0

    def next(self, rows: object = None) -> Tensor:
        self.step += 1
        return self.numbers[:, self.step - 1]


@torch.no_grad()
def _generation(vectors: Vectors, entry: Record, name: str) -> Checks:
    """A chain from recorded noise and decisions, then the greedy answer."""
    arrays = vectors.file(f"colar/gen_{name}.npz")
    folder = vectors.folder(f"colar/{entry['model']}")
    model, tokenizer = vectors.model(f"colar/{entry['model']}"), load_tokenizer(folder)
    model.change_settings(speed=entry["factor"], max_latent_steps=entry["max_latents"])
    settings = model.settings
    rows = _rows(vectors, entry["rows"])
    prompts = encode_prompts(
        rows, tokenizer, prefix="Question: ", latent=True, suffix=settings.suffix
    )
    read = _unpadded(arrays["question_ids"], arrays["question_mask"])
    read = [[*ids[:-1], settings.start_id] for ids in read]
    yield Check(prompts, read, part="question_ids")
    count = arrays["eps"].shape[1]
    trajectory = Trajectory.begin(model, prompts)
    trajectory.noise = Recorded(arrays["eps"], entry["latent_temperature"])
    trajectory.extend(model, count)
    hidden = torch.stack(trajectory.hidden, 1)
    stops = decision_logits(model, hidden[:, 1:]).softmax(-1)[..., STOPS]
    is_stop = arrays["sampled"] == settings.marker
    latents = torch.where(is_stop.any(1), is_stop.long().argmax(1) + 1, count)
    yield Check(latents, arrays["n_latents"], part="n_latents")
    yield Check(int(latents.max()) <= settings.max_latent_steps, True, part="max_latents")
    own = torch.arange(count) < latents[:, None]
    mean, log_std = model.recurrent_filter.distribution(hidden[:, :-1])
    unit = model.recurrent_filter.embedding_std
    sigma = entry["latent_temperature"] * log_std.exp()
    yield Check(unit * mean[own], unit * arrays["mu"][own], CHAIN, "mu")
    yield Check(unit * sigma[own], unit * arrays["sigma"][own], CHAIN, "sigma")
    fed = torch.stack(trajectory.inputs, 1)
    yield Check(fed[own], arrays["latents"][own], CHAIN, "latents")
    yield Check(stops[own], arrays["p_eol"][own], CHAIN, "p_eol")
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    positions = lengths[:, None] + torch.arange(count)
    yield Check(positions[own], arrays["latent_position_ids"][own], part="latent_position_ids")
    yield _drawn(model, hidden[:, 1:][own], arrays["sampled"][own], arrays["u"][own])
    yield from _prefix(model, arrays, fed, own)
    width = arrays["answer_ids"].shape[1]
    ids, _ = write_after(
        model,
        trajectory,
        torch.arange(len(rows)),
        latents,
        [settings.stop_id],
        width,
        tokenizer.eos_token_id,
    )
    yield from _answers(entry, ids, arrays["answer_ids"], tokenizer)


def _drawn(model: LatentReasoner, hidden: Tensor, words: Tensor, uniforms: Tensor) -> Check:
    """The recorded words are those that the uniform numbers draw from our distributions."""
    logits = model.vocabulary_logits(hidden)[:, : model.settings.start_id]
    cumulative = logits.double().softmax(-1).cumsum(-1)
    upper = cumulative.gather(1, words[:, None])[:, 0]
    lower = upper - logits.double().softmax(-1).gather(1, words[:, None])[:, 0]
    inside = (uniforms > lower - 2e-3) & (uniforms < upper + 2e-3)
    return Check(bool(inside.all()), True, part="sampled")


def _prefix(model: LatentReasoner, arrays: Record, fed: Tensor, own: Tensor) -> Checks:
    """What stands before the answer: question, latent inputs and the separator."""
    end = torch.full((len(fed), 1), model.settings.stop_id)
    embedded = torch.cat([model.embed(arrays["question_ids"]), fed, model.embed(end)], 1)
    mask = torch.cat([arrays["question_mask"], own.long(), torch.ones_like(end)], 1)
    yield Check(mask, arrays["answer_attention_mask"], part="answer_attention_mask")
    kept = mask.bool()
    expected = arrays["answer_inputs_embeds"][kept]
    yield Check(embedded[kept], expected, CHAIN, "answer_inputs_embeds")


def _answers(entry: Record, ids: list[list[int]], expected: Tensor, tokenizer) -> Checks:
    """Greedy answers up to EOS, their texts and verdicts."""
    written = [_until_eos(row, tokenizer.eos_token_id) for row in ids]
    recorded = [_until_eos(row, tokenizer.eos_token_id) for row in expected.tolist()]
    yield Check(written, recorded, part="answer_ids")
    yield Check([len(row) for row in written], list(entry["output_length"]), part="output_length")
    eos = tokenizer.eos_token
    texts = [decode(tokenizer, row).removesuffix(eos) for row in written]
    yield Check(texts, list(entry["text"]), part="text")
    answers = [_answer(text) for text in texts]
    yield Check(answers, list(entry["answer"]), part="answer")
    verdicts = [_is_right(a, gold) for a, gold in zip(answers, entry["gold"], strict=True)]
    yield Check(verdicts, list(entry["correct"]), part="correct")


def _answer(text: str) -> str:
    """The text between a first and a second `Answer:`, read as our evaluation reads it."""
    ours = in_our_words(text, "Answer:")
    return ours.rpartition(ANSWER_PREFIX)[2].partition("Answer:")[0]


def _is_right(answer: str, gold: str) -> float:
    """The public verdict, numbers read by our grammar."""
    value, expected = (numbers.read_number(text.strip().rstrip(".")) for text in (answer, gold))
    if value is None or expected is None:
        return float(answer == gold)
    return float(numbers.equal(expected, value))


def _until_eos(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos) + 1] if eos in ids else ids


# --------------------------------------------------------------------------------------------- RL


def _rl(vectors: Vectors, entry: Record) -> Checks:
    """Rewards and advantages of a rollout, its log-probabilities, and the loss after a step."""
    arrays = vectors.file("colar/rl.npz")
    folder = vectors.folder(f"colar/{entry['model']}")
    model, tokenizer = vectors.model(f"colar/{entry['model']}"), load_tokenizer(folder)
    size, counts = entry["group_size"], arrays["n_latent_forward"][:, 0]
    yield Check(counts.tolist(), list(entry["n_latents"]), part="n_latents")
    yield from _rewards(entry, arrays, size, counts, tokenizer)
    rows = [row for row in _rows(vectors, entry["rows"]) for _ in range(size)]
    model.change_settings(speed=entry["factor"])
    prompts = encode_prompts(
        rows, tokenizer, prefix="Question: ", latent=True, suffix=model.settings.suffix
    )
    read = _unpadded(arrays["question_input_ids"], arrays["question_attention_mask"])
    yield Check([prompt[:-1] for prompt in prompts], [ids[:-1] for ids in read], part="question")
    special = model.settings
    answers = _unpadded(arrays["answer_input_ids"], arrays["answer_attention_mask"])
    completions = [
        [*[special.continue_id] * int(n), special.stop_id, *answer[1:]]
        for n, answer in zip(counts, answers, strict=True)
    ]
    texts = [decode(tokenizer, ids[1:]).removesuffix(tokenizer.eos_token) for ids in answers]
    yield Check(texts, list(entry["text"]), part="text")
    chains = Chains.plan(prompts, completions, special)
    masks = arrays["answer_attention_mask"].bool(), arrays["latent_attention_mask"].bool()
    with torch.no_grad():
        old = _scores(model, chains, arrays, counts)
    yield Check(old[0][masks[0]], arrays["answer_logprobs"][masks[0]], LOG_PROBS, "answer_logprobs")
    yield Check(old[1][masks[1]], arrays["latent_logprobs"][masks[1]], LOG_PROBS, "latent_logprobs")
    _step(model, arrays)
    recorded = arrays["answer_logprobs"], arrays["latent_logprobs"]
    yield from _policy_step(model, chains, arrays, counts, masks, recorded, entry["losses"])


def _rewards(entry: Record, arrays: Record, size: int, counts: Tensor, tokenizer) -> Checks:
    golds = [gold for gold in entry["gold"] for _ in range(size)]
    right = [_is_right(_answer(t), g) for t, g in zip(entry["text"], golds, strict=True)]
    rewards = torch.tensor(right)
    yield Check(right, list(entry["rewards"]), part="rewards of texts")
    for name, values in (("", rewards), ("_punished", rewards / counts)):
        yield Check(values[:, None], arrays[f"rewards{name}"], INPUTS, f"rewards{name}")
        relative = advantages(values, size, offset=NO_STD)[:, None]
        yield Check(relative, arrays[f"advantages{name}"], INPUTS, f"advantages{name}")
    yield Check(rewards[:, None], arrays["accuracies"], part="accuracies")


def _scores(model: LatentReasoner, chains: Chains, arrays: Record, counts: Tensor) -> Pair:
    """Log-probabilities as recorded: of the answer with its separator, and of latent inputs."""
    tokens, latents = score_chains(model, chains, arrays["latent_inputs_embeds"])
    width = arrays["answer_input_ids"].shape[1]
    columns = (counts[:, None] + torch.arange(width)).clamp(max=tokens.shape[1] - 1)
    return tokens.gather(1, columns), latents


def _step(model: LatentReasoner, arrays: Record) -> None:
    """Add the recorded differences to every parameter; the separator's copies move with it."""
    parameters = dict(model.named_parameters())
    special = model.settings
    with torch.no_grad():
        for key in [key for key in arrays if key.startswith("delta/")]:
            parameter, delta = parameters[_own(key.removeprefix("delta/"))], arrays[key]
            parameter[: len(delta)] += delta
            if parameter.shape != delta.shape:
                for copy in (special.start_id, special.end_id):
                    parameter[copy] = parameter[special.marker]


def _policy_step(
    model: LatentReasoner,
    chains: Chains,
    arrays: Record,
    counts: Tensor,
    masks: Pair,
    old: Pair,
    losses: Record,
) -> Checks:
    """The losses of each way to average, and the gradients of both terms together."""
    for kind, how, divisor in (("grpo", "mean", 1.0), ("dr_grpo", "sum32", SUMMED)):
        model.zero_grad()
        new = _scores(model, chains, arrays, counts)
        if how == "mean":
            for name, own, mask in zip(("answer", "latent"), new, masks, strict=True):
                key = f"new_{name}_logprobs"
                yield Check(own[mask], arrays[key][mask], LOG_PROBS, key)
        parts = chain_loss(
            new,
            masks,
            arrays["advantages"][:, 0],
            old,
            [divisor * len(counts)] * 2,
            kind=kind,
            epsilon=CLIP,
        )
        answer, latent = (part.loss for part in parts)
        zero = torch.zeros(())
        for terms, of_answer, of_latents in (
            ("latent_answer", answer, latent),
            ("latent", zero, latent),
            ("answer", answer, zero),
        ):
            own = {
                "total_loss": of_answer + of_latents,
                "latent_loss": of_latents,
                "answer_loss": of_answer,
            }
            expected = losses[f"{how}_{terms}"]
            yield Check(own, {k: expected[k] for k in own}, POLICY_LOSS, f"{how}_{terms}")
        (answer + latent).backward()
        yield from _gradients(model, arrays, f"grad_{how}", POLICY_GRADIENT)


# ------------------------------------------------------------------------------------------ shared


def _rows(vectors: Vectors, names: list[str]) -> list[Row]:
    """The rows of these names."""
    texts = vectors.file("colar/expected.json")["rows"]
    return [
        Row(name, texts[name]["question"], tuple(texts[name]["steps"]), texts[name]["answer"])
        for name in names
    ]


def _row(vectors: Vectors, entry: Record, name: str) -> Checks:
    """A row's texts: the cases that name it compare its ids."""
    texts = [entry["question"], entry["answer"], *entry["steps"]]
    yield Check([isinstance(text, str) for text in texts], [True] * len(texts))


def _unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]


READERS = {
    r"colar/expected\.json": {
        "rows/(.+)": _row,
        "sft/(.+)": _sft,
        "generation/(.+)": _generation,
        "rl": _rl,
    },
}
