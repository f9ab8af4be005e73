"""Sampling completions: stop decisions along the shared trajectory, then the answers.

Each sample draws its own stop decisions and answer tokens, but nothing is computed twice: samples
that have agreed so far share one row of the model, and a row is split only where they differ. With
a confident model the 16 samples of a prompt are a few rows. A sample that emits START after STOP
(`allow_rethinking`) continues in the same loop, with latent steps of its own.

Randomness is drawn in advance: one uniform number for each prompt, sample and token, inverted
through the token's distribution. The samples thus depend neither on how prompts are batched nor on
which samples share a row.

On a GPU a look at the device after each token would cost more than rows that compute the same
thing: there every sample has a row of its own, written by captured steps (`model/decoding.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latent_reasoning.model.decoding import decodes_statically, write
from latent_reasoning.model.gaussian import LatentNoise
from latent_reasoning.model.heads import CONTINUES, decision_logits
from latent_reasoning.model.passes import Kind
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.state import ReasoningState
from latent_reasoning.model.static_rows import Beginning, Writing
from latent_reasoning.model.trajectory import Trajectory
from latent_reasoning.runtime.device import to_device


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are sampled, and therefore how they are scored.

    The bound on latent steps is the model's (`LatentSettings.max_latent_steps`): a STOP that it
    forces has probability 1 and is outside the loss.
    """

    temperature: float
    max_new_tokens: int
    eos_id: int


@dataclass(frozen=True)
class Completion:
    """A distinct completion of one prompt of a batch: the tokens after the prompt's START.

    It ends in EOS unless it was cut off. It stands for `count` samples of the prompt.
    """

    prompt: int
    ids: tuple[int, ...]
    count: int = 1


@dataclass(frozen=True)
class Rollout:
    """The samples of P prompts, G each, as distinct completions.

    `sample_completion` (P, G) points into `completions`. With several `groups` per prompt it is
    (P, groups x G), group by group.
    """

    prompts: list[list[int]]
    completions: list[Completion]
    sample_completion: Tensor
    groups: int = 1

    @property
    def weights(self) -> Tensor:
        """The number of samples that each completion stands for, (U,)."""
        return torch.tensor([completion.count for completion in self.completions])


def draw_uniforms(prompts: int, group_size: int, max_new_tokens: int, seed: int) -> Tensor:
    """Uniform numbers in [0, 1), float32 (P, G, `max_new_tokens`), the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(prompts, group_size, max_new_tokens, generator=generator)


def sample(
    model: LatentReasoner,
    prompts: Sequence[list[int]],
    uniforms: Tensor,
    settings: SamplingSettings,
    noise: LatentNoise | None = None,
) -> tuple[Rollout, Trajectory | None]:
    """Sample G completions of each of P prompts from `uniforms` (P, G, `max_new_tokens`).

    The trajectory has its graph where gradients are enabled, so that the update can use it; all
    else is computed without gradients. There is none where every sample has a row of its own (on a
    GPU); in train mode each sample then has dropout of its own after the prompt, as in the public
    code. With `noise`, of which each prompt has a stream, latent inputs are sampled too; samples
    that are to differ in them are prompts of their own.
    """
    if noise is None and decodes_statically(model):
        return _sample_in_rows(model, prompts, uniforms, settings), None
    trajectory = Trajectory.begin(model, prompts)
    trajectory.noise = noise
    draws = to_device(uniforms, model.device)
    steps, stopped = _sample_stops(model, trajectory, draws, settings)
    with torch.no_grad():
        ids, lengths = sample_answers(
            model, trajectory, steps.cpu(), stopped.cpu(), uniforms, settings
        )
    return collect(prompts, ids, lengths), trajectory


def _sample_in_rows(
    model: LatentReasoner,
    prompts: Sequence[list[int]],
    uniforms: Tensor,
    settings: SamplingSettings,
) -> Rollout:
    """The same samples without a shared trajectory, each in a row of its own."""
    beginnings = [
        Beginning.of(model.settings, prompt, draws)
        for prompt, group in zip(prompts, uniforms, strict=True)
        for draws in group
    ]
    how = Writing(settings.eos_id, settings.max_new_tokens, settings.temperature)
    written = write(model, beginnings, how, len(beginnings))
    ids = torch.full(uniforms.shape, settings.eos_id)
    for row, sample_ids in zip(ids.flatten(0, 1), written, strict=True):
        row[: len(sample_ids.ids)] = torch.tensor(sample_ids.ids)
    lengths = torch.tensor([len(row.ids) for row in written])
    return collect(prompts, ids, lengths.view(ids.shape[:2]))


def collect(prompts: Sequence[list[int]], ids: Tensor, lengths: Tensor) -> Rollout:
    """Merge equal completions of `ids` (P, G, T), of which the first `lengths` (P, G) count."""
    index: dict[tuple[int, tuple[int, ...]], int] = {}
    samples = [
        [
            index.setdefault((prompt, tuple(row[:length])), len(index))
            for row, length in zip(*group, strict=True)
        ]
        for prompt, group in enumerate(zip(ids.tolist(), lengths.tolist(), strict=True))
    ]
    sample_completion = torch.tensor(samples)
    counts = sample_completion.flatten().bincount().tolist()
    completions = [Completion(*key, count) for key, count in zip(index, counts, strict=True)]
    return Rollout([list(prompt) for prompt in prompts], completions, sample_completion)


def _sample_stops(
    model: LatentReasoner, trajectory: Trajectory, uniforms: Tensor, settings: SamplingSettings
) -> tuple[Tensor, Tensor]:
    """Latent steps (P, G) of each sample, and whether it stopped before it ran out of tokens.

    Extends the trajectory as far as the longest sample needs.
    """
    steps = torch.zeros(uniforms.shape[:2], dtype=torch.long, device=uniforms.device)
    thinking = torch.ones_like(steps, dtype=torch.bool)
    for step in range(settings.max_new_tokens):
        trajectory.extend(model, step)
        if step == model.settings.max_latent_steps:
            thinking = torch.zeros_like(thinking)
            break
        with torch.no_grad():
            continues = continue_probability(model, trajectory, step, settings)
        thinking = thinking & (uniforms[:, :, step] < continues)
        steps += thinking
        if not thinking.any():
            break
    return steps, ~thinking


def continue_probability(
    model: LatentReasoner, trajectory: Trajectory, step: int, settings: SamplingSettings
) -> Tensor:
    """Probability of another latent step after `step` of them, float64 (P, 1)."""
    hidden = trajectory.hidden[step]
    logits = decision_logits(model, hidden, settings.temperature, torch.float64)
    return logits.softmax(-1)[:, CONTINUES, None]


@dataclass
class _Rows:
    """Completions being sampled; those that agree so far share one of the R rows. On the host.

    `prompt` (R,); `length` (R,): tokens so far; `token` (R,): the last of them, not yet read;
    `steps_since_start` (R,): latent steps since START where the row thinks again, else -1.
    """

    prompt: Tensor
    length: Tensor
    token: Tensor
    steps_since_start: Tensor


def sample_answers(
    model: LatentReasoner,
    trajectory: Trajectory,
    steps: Tensor,
    stopped: Tensor,
    uniforms: Tensor,
    settings: SamplingSettings,
) -> tuple[Tensor, Tensor]:
    """Complete samples that took `steps` (P, G) latent steps and then `stopped` or were cut off.

    Returns ids (P, G, `max_new_tokens`) and lengths (P, G), on the host like all arguments. Which
    samples share a row is decided there: it waits for the device once a token.
    """
    special = model.settings
    ids = torch.full(uniforms.shape, special.continue_id, device=uniforms.device)
    ids[stopped] = torch.where(
        torch.arange(uniforms.shape[2], device=ids.device) < steps[stopped][:, None],
        special.continue_id,
        special.stop_id,
    )
    lengths = steps + stopped
    prompt, member = (stopped & (lengths < settings.max_new_tokens)).nonzero(as_tuple=True)
    if not len(prompt):
        return ids, lengths
    leaves, row = torch.stack([prompt, steps[prompt, member]]).unique(dim=1, return_inverse=True)
    rows = _Rows(
        prompt=leaves[0],
        length=leaves[1] + 1,
        token=torch.full_like(leaves[0], special.stop_id),
        steps_since_start=torch.full_like(leaves[0], -1),
    )
    state = trajectory.leave(model, leaves[0], leaves[1])
    while True:
        tokens = _next_tokens(model, state, rows, uniforms, settings).cpu()[row, member]
        position = rows.length[row]
        ids[prompt, member, position] = tokens
        lengths[prompt, member] = position + 1
        unfinished = (tokens != settings.eos_id) & (position + 1 < settings.max_new_tokens)
        if not unfinished.any():
            return ids, lengths
        prompt, member, row = prompt[unfinished], member[unfinished], row[unfinished]
        rows, state, row = _split(model, state, rows, row, tokens[unfinished])


def _next_tokens(
    model: LatentReasoner,
    state: ReasoningState,
    rows: _Rows,
    uniforms: Tensor,
    settings: SamplingSettings,
) -> Tensor:
    """Read each row's last token and draw the next one for all G samples, (R, G)."""
    bound, kinds = model.settings.max_latent_steps, _kinds_of(rows)
    forced = torch.zeros_like(kinds, dtype=torch.bool)
    if bound is not None:
        forced = rows.steps_since_start >= bound
    draws = uniforms[rows.prompt, :, rows.length]
    thinking = bool((rows.token == model.settings.continue_id).any())
    token, kinds, forced, draws = to_device((rows.token, kinds, forced, draws), model.device)
    hidden = model.read_tokens(state, token, thinking=thinking)
    logits = model.logits(hidden, kinds).double() / settings.temperature
    cumulative = logits.softmax(-1).cumsum(-1)
    # The first token whose cumulative probability exceeds the draw: never one of probability 0.
    tokens = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
    return torch.where(forced[:, None], model.settings.stop_id, tokens)


def _kinds_of(rows: _Rows) -> Tensor:
    return torch.where(rows.steps_since_start >= 0, int(Kind.THINKING), int(Kind.ANSWER))


def _split(
    model: LatentReasoner, state: ReasoningState, rows: _Rows, row: Tensor, tokens: Tensor
) -> tuple[_Rows, ReasoningState, Tensor]:
    """A row for each distinct (row, token) of S unfinished samples, whose rows are `row` (S,)."""
    special = model.settings
    stride = int(tokens.max()) + 1
    children, row = (row * stride + tokens).unique(return_inverse=True)
    parent, token = children // stride, children % stride
    steps = torch.where(token == special.continue_id, rows.steps_since_start[parent] + 1, -1)
    steps = torch.where(token == special.start_id, 0, steps)
    split = _Rows(rows.prompt[parent], rows.length[parent] + 1, token, steps)
    unchanged = torch.equal(parent, torch.arange(len(rows.prompt), device=parent.device))
    return split, state if unchanged else state.select(parent), row
