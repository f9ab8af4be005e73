"""The naive paths: what the public implementation does, as the opponent of the package's own.

A batch is padded to its longest row and read whole: the teacher in one forward, the student in one
forward for each latent *column* of the padded batch (all rows take part, with a key-value cache),
logits over the vocabulary and all hidden states at every position. Each of the G samples of a
prompt is a row of its own, sampled to the end of the longest and scored by its own whole forward.

What both paths do alike is taken from the package: embedding, recurrent filter, the masking of
logits, and the losses' arithmetic. `tests/benchmarks/test_naive.py` shows that results are equal.

B rows, T positions, d hidden size, V vocabulary, L blocks, N samples, S new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from latent_reasoning.config import Distillation
from latent_reasoning.data.collation import pad_prompts
from latent_reasoning.data.sequences import IGNORED_LABEL
from latent_reasoning.model.passes import Kind
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.rl.grpo import PolicyLoss, policy_loss
from latent_reasoning.rl.rollouts import Completion, SamplingSettings
from latent_reasoning.rl.scoring import loss_mask
from latent_reasoning.sft.distillation import StateSummary, distillation_losses

Choose = Callable[[Tensor, int], Tensor]
"""Next tokens (B,) from logits (B, V) at new token number s."""


# ------------------------------------------------------------------------------------ the forward


@dataclass(frozen=True)
class Reading:
    """A padded batch after its forward: logits (B, T, V), L + 1 times states (B, T, d)."""

    logits: Tensor
    hidden_states: list[Tensor]
    kinds: Tensor
    cache: DynamicCache


def read(
    model: LatentReasoner, input_ids: Tensor, attention_mask: Tensor, hidden_states: bool = False
) -> Reading:
    """Read a padded batch (B, T) column range by column range; a latent column is one forward.

    Without `hidden_states` the list of states holds the last ones alone.
    """
    is_latent = _is_latent(model, input_ids, attention_mask)
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    inputs = model.embed(input_ids)
    cache, parts = DynamicCache(), []
    for columns in _column_ranges(is_latent):
        part = inputs[:, columns]
        if is_latent[:, columns].any():
            latent = model.latent_input(parts[-1][-1][:, -1:])
            part = torch.where(is_latent[:, columns, None], latent, part)
        output = model.base.base_model(
            inputs_embeds=part,
            attention_mask=attention_mask[:, : columns.stop],
            position_ids=positions[:, columns],
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=hidden_states,
        )
        parts.append(output.hidden_states if hidden_states else (output.last_hidden_state,))
    states = [torch.cat(layer, 1) for layer in zip(*parts, strict=True)]
    kinds = _kinds(model, input_ids, attention_mask)
    return Reading(model.logits(states[-1], kinds), states, kinds, cache)


def _is_latent(model: LatentReasoner, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    if model.settings is None:
        return torch.zeros_like(input_ids, dtype=torch.bool)
    return (input_ids == model.settings.continue_id) & attention_mask.bool()


def _column_ranges(is_latent: Tensor) -> Iterator[slice]:
    """Columns in order: those where any row has a latent step alone, the ones between together."""
    begin = 0
    for column, latent in enumerate(is_latent.any(0).tolist()):
        if latent:
            if begin < column:
                yield slice(begin, column)
            yield slice(column, column + 1)
            begin = column + 1
    if begin < is_latent.shape[1]:
        yield slice(begin, is_latent.shape[1])


def _kinds(model: LatentReasoner, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """A `Kind` for each position (B, T)."""
    if model.settings is None:
        return torch.full_like(input_ids, Kind.TEXT)
    special = model.settings
    answering = (input_ids == special.stop_id).cumsum(1) > 0
    thinking = (input_ids == special.start_id) | (input_ids == special.continue_id)
    kinds = torch.where(answering, int(Kind.ANSWER), int(Kind.TEXT))
    kinds = torch.where(thinking, int(Kind.THINKING), kinds)
    return kinds * attention_mask


# -------------------------------------------------------------------------------------------- SFT


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the next token from logits (B, T, V) at every position."""
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL
    )


def token_sft_loss(model: LatentReasoner, batch: dict[str, Tensor]) -> Tensor:
    """Loss of text: one forward of the padded batch."""
    reading = read(model, batch["input_ids"], batch["attention_mask"])
    return cross_entropy(reading.logits, batch["labels"])


def latent_sft_loss(
    model: LatentReasoner, batch: dict[str, Tensor], distillation: Distillation
) -> Tensor:
    """Loss of latent SFT: teacher and student as two whole forwards with all hidden states."""
    teacher = read(model, batch["input_ids"], batch["attention_mask"], hidden_states=True)
    student = read(
        model, batch["latent_input_ids"], batch["latent_attention_mask"], hidden_states=True
    )
    distances = distillation_losses(
        _summary(teacher, batch["target_token_map"], batch["reasoning_map"]),
        _summary(student, batch["latent_target_token_map"], batch["latent_continue_map"]),
        distillation,
    )
    return (
        cross_entropy(teacher.logits, batch["labels"])
        + cross_entropy(student.logits, batch["latent_labels"])
        + sum(distances.values())
    )


def _summary(reading: Reading, target_map: Tensor, span_map: Tensor) -> StateSummary:
    """States (L, B, d) of all blocks at the target token, and averaged over the reasoning."""
    blocks = torch.stack(reading.hidden_states[1:])
    counts = span_map.sum(1)
    mean = (blocks * span_map[..., None]).sum(2) / counts.clamp(min=1)[:, None]
    return StateSummary(blocks[:, target_map], mean, counts > 0)


# ------------------------------------------------------------------------------------- generation


def greedy(logits: Tensor, step: int) -> Tensor:
    """The likeliest token of each row."""
    return logits.argmax(-1)


def sampled(uniforms: Tensor, temperature: float) -> Choose:
    """Tokens by inversion of uniform numbers (B, S): the draws that the package is given."""

    def choose(logits: Tensor, step: int) -> Tensor:
        cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
        draws = uniforms[:, step, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, draws, right=True)[:, 0]

    return choose


@torch.no_grad()
def generate(
    model: LatentReasoner,
    prompts: Sequence[Sequence[int]],
    choose: Choose,
    *,
    max_new_tokens: int,
    eos_id: int,
) -> list[list[int]]:
    """Completions of all prompts as one padded batch; every row goes on until the last is done.

    A completion ends with EOS unless the length ran out first.
    """
    input_ids, mask = pad_prompts(prompts, eos_id)
    reading = read(model, input_ids, mask)
    cache, logits, kinds = reading.cache, reading.logits[:, -1], reading.kinds[:, -1]
    hidden = reading.hidden_states[-1][:, -1:]
    done = torch.zeros(len(prompts), dtype=torch.bool)
    ids: list[Tensor] = []
    while len(ids) < max_new_tokens:
        tokens = torch.where(done, eos_id, choose(logits, len(ids)))
        ids.append(tokens)
        done |= tokens == eos_id
        if done.all() or len(ids) == max_new_tokens:
            break
        inputs = model.embed(tokens[:, None])
        if model.settings is not None:
            is_latent = tokens == model.settings.continue_id
            if is_latent.any():
                inputs = torch.where(is_latent[:, None, None], model.latent_input(hidden), inputs)
            kinds = _next_kinds(model, kinds, tokens)
        positions = mask.sum(1, keepdim=True)
        mask = functional.pad(mask, (0, 1), value=1)
        hidden = model.base.base_model(
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits = model.logits(hidden[:, -1], kinds)
    rows = torch.stack(ids, 1).tolist()
    return [row[: row.index(eos_id) + 1] if eos_id in row else row for row in rows]


def _next_kinds(model: LatentReasoner, kinds: Tensor, tokens: Tensor) -> Tensor:
    special = model.settings
    answering = (kinds == Kind.ANSWER) | (tokens == special.stop_id)
    thinking = (tokens == special.start_id) | (tokens == special.continue_id)
    after = torch.where(answering, int(Kind.ANSWER), int(Kind.TEXT))
    return torch.where(thinking, int(Kind.THINKING), after)


# ------------------------------------------------------------------------------------------- GRPO


def sample(
    model: LatentReasoner,
    prompts: Sequence[list[int]],
    uniforms: Tensor,
    settings: SamplingSettings,
) -> list[Completion]:
    """G samples of each of P prompts from `uniforms` (P, G, S), each a row of the model."""
    group_size = uniforms.shape[1]
    rows = [prompt for prompt in prompts for _ in range(group_size)]
    completions = generate(
        model,
        rows,
        sampled(uniforms.flatten(0, 1), settings.temperature),
        max_new_tokens=settings.max_new_tokens,
        eos_id=settings.eos_id,
    )
    return [Completion(row // group_size, tuple(ids)) for row, ids in enumerate(completions)]


def score(
    model: LatentReasoner,
    prompts: Sequence[list[int]],
    completions: Sequence[Completion],
    settings: SamplingSettings,
) -> Tensor:
    """Log-probability of each token of each sample, (N, S): a whole forward of every row."""
    prompt_ids, prompt_mask = pad_prompts([prompts[c.prompt] for c in completions], settings.eos_id)
    width = max(len(completion.ids) for completion in completions)
    ids = torch.full((len(completions), width), settings.eos_id)
    mask = torch.zeros_like(ids)
    for row, completion in enumerate(completions):
        ids[row, : len(completion.ids)] = torch.tensor(completion.ids)
        mask[row, : len(completion.ids)] = 1
    reading = read(model, torch.cat([prompt_ids, ids], 1), torch.cat([prompt_mask, mask], 1))
    logits = reading.logits[:, -width - 1 : -1] / settings.temperature
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def grpo_loss(
    model: LatentReasoner,
    reference: LatentReasoner,
    prompts: Sequence[list[int]],
    completions: Sequence[Completion],
    advantages: Tensor,
    settings: SamplingSettings,
    *,
    kl_weight: float,
) -> PolicyLoss:
    """The GRPO loss (bnpo) of N samples with `advantages` (N,), each scored on its own."""
    with torch.no_grad():
        reference_log_probs = score(reference, prompts, completions, settings)
    return policy_loss(
        score(model, prompts, completions, settings),
        advantages,
        loss_mask(completions, model.settings),
        kind="bnpo",
        epsilon=0.2,
        kl_weight=kl_weight,
        max_completion_length=settings.max_new_tokens,
        reference=reference_log_probs,
    )
