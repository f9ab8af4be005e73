"""The naive paths: what the public implementation does, to compare the package's own paths with.

A batch is padded to its longest row and read whole: the teacher in one forward, the student in one
forward for each latent *column* of the padded batch (of all rows, with a key-value cache), with
logits over the vocabulary and all hidden states at every position. Each of the G samples of a
prompt is a row of its own, sampled until the longest row ends and scored by a whole forward.

What both paths have in common is taken from the package: embedding, recurrent filter, masking of
logits, and the losses' arithmetic. `tests/benchmarks/test_naive.py` shows that results are equal.

B rows, T positions, d hidden size, V vocabulary, L blocks, N samples, S new tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from latent_reasoning.config import Distillation
from latent_reasoning.data.collation import pad_prompts
from latent_reasoning.data.examples import IGNORED_LABEL
from latent_reasoning.model.passes import Kind
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.rl.grpo import PolicyLoss, policy_loss
from latent_reasoning.rl.rollouts import Completion, SamplingSettings
from latent_reasoning.rl.scoring import loss_mask
from latent_reasoning.sft.distillation import StateSummary, distillation_losses

Choose = Callable[[Tensor, int], Tensor]
"""Chooses the next tokens (B,) from logits (B, V) and the index of the new token (from 0)."""


# ------------------------------------------------------------------------------------ the forward


@dataclass(frozen=True)
class Reading:
    """A padded batch after its forward: logits (B, T, V) and L + 1 tensors of states (B, T, d)."""

    logits: Tensor
    hidden_states: list[Tensor]
    cache: DynamicCache


def read(
    model: LatentReasoner, input_ids: Tensor, attention_mask: Tensor, hidden_states: bool = False
) -> Reading:
    """Read a padded batch (B, T): one forward for each latent column and each range between them.

    Without `hidden_states` the list of states holds only those of the last layer.
    """
    is_latent = torch.zeros_like(attention_mask, dtype=torch.bool)
    if model.settings is not None:
        is_latent = (input_ids == model.settings.continue_id) & attention_mask.bool()
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    inputs = model.embed(input_ids)
    cache, parts = DynamicCache(), []
    latent_columns = is_latent.any(0).nonzero()[:, 0].tolist()
    cuts = {0, input_ids.shape[1], *latent_columns, *(column + 1 for column in latent_columns)}
    for columns in itertools.starmap(slice, itertools.pairwise(sorted(cuts))):
        part = inputs[:, columns]
        if is_latent[:, columns].any():
            latent = model.latent_input(parts[-1][-1][:, -1:])
            part = torch.where(is_latent[:, columns, None], latent, part)
        mask = attention_mask[:, : columns.stop]
        parts.append(_states(model, part, mask, positions[:, columns], cache, hidden_states))
    states = [torch.cat(layer, 1) for layer in zip(*parts, strict=True)]
    logits = model.logits(states[-1], _kinds(model, input_ids, attention_mask))
    return Reading(logits, states, cache)


def _states(
    model: LatentReasoner,
    inputs: Tensor,
    mask: Tensor,
    positions: Tensor,
    cache: DynamicCache,
    hidden_states: bool = False,
) -> tuple[Tensor, ...]:
    """One forward on top of the cache; the states of all layers, or else of the last one."""
    output = model.base.base_model(
        inputs_embeds=inputs,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        output_hidden_states=hidden_states,
    )
    return output.hidden_states if hidden_states else (output.last_hidden_state,)


def _kinds(model: LatentReasoner, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """A `Kind` for each position (B, T)."""
    special = model.settings
    if special is None:
        return torch.full_like(input_ids, Kind.TEXT)
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
    """Loss of token SFT: one forward of the padded batch."""
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
    """The most probable token of each row."""
    return logits.argmax(-1)


def sampled(uniforms: Tensor, temperature: float) -> Choose:
    """Tokens by inverse sampling from uniform numbers (B, S), the same as the package's."""

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
    """Completions of all prompts as one padded batch; every row continues until the last one ends.

    A completion ends with EOS unless it was cut off at the maximum length.
    """
    ids, mask = pad_prompts(prompts, eos_id)
    width = ids.shape[1]
    reading = read(model, ids, mask)
    cache, logits, hidden = reading.cache, reading.logits[:, -1], reading.hidden_states[-1][:, -1:]
    done = torch.zeros(len(prompts), dtype=torch.bool)
    for step in range(max_new_tokens):
        tokens = torch.where(done, eos_id, choose(logits, step))[:, None]
        ids = torch.cat([ids, tokens], 1)
        done |= tokens[:, 0] == eos_id
        if done.all() or step + 1 == max_new_tokens:
            break
        inputs = model.embed(tokens)
        if model.settings is not None:
            is_latent = tokens == model.settings.continue_id
            if is_latent.any():
                inputs = torch.where(is_latent[..., None], model.latent_input(hidden), inputs)
        positions = mask.sum(1, keepdim=True)
        mask = functional.pad(mask, (0, 1), value=1)
        (hidden,) = _states(model, inputs, mask, positions, cache)
        logits = model.logits(hidden[:, -1], _kinds(model, ids, mask)[:, -1])
    rows = ids[:, width:].tolist()
    return [row[: row.index(eos_id) + 1] if eos_id in row else row for row in rows]


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
    """Log-probability of each token of each sample, (N, S), by a whole forward of every row."""
    prompt_ids, prompt_mask = pad_prompts([prompts[c.prompt] for c in completions], settings.eos_id)
    rows = [torch.tensor(completion.ids) for completion in completions]
    ids = pad_sequence(rows, batch_first=True, padding_value=settings.eos_id)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    reading = read(model, torch.cat([prompt_ids, ids], 1), torch.cat([prompt_mask, mask], 1))
    logits = reading.logits[:, -ids.shape[1] - 1 : -1] / settings.temperature
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
