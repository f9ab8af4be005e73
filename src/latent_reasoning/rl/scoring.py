"""Log-probabilities of sampled completions, all samples of a prompt in one pass.

The shared trajectory is read once, with gradient through the whole latent chain; the answers follow
as one pass over the distinct (latent steps, answer) pairs, on top of the trajectory's cache.
Completions that think again after STOP leave the trajectory and are scored as whole sequences. The
result equals scoring every sample on its own (`tests/rl/test_scoring.py`).

U distinct completions of at most T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from latent_reasoning.data.collation import pad_prompts
from latent_reasoning.model.heads import CONTINUES, STOPS, target_log_probabilities
from latent_reasoning.model.passes import Kind
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings
from latent_reasoning.model.trajectory import Trajectory
from latent_reasoning.rl.rollouts import Completion, SamplingSettings


def loss_mask(completions: Sequence[Completion], special: LatentSettings) -> Tensor:
    """True (U, T) at the tokens that were sampled, that is all but a forced STOP."""
    width = max(len(completion.ids) for completion in completions)
    mask = torch.zeros(len(completions), width, dtype=torch.bool)
    for row, completion in zip(mask, completions, strict=True):
        row[: len(completion.ids)] = True
        steps = 0
        for position, token in enumerate(completion.ids):
            if token == special.continue_id:
                steps += 1
                continue
            if token == special.stop_id and steps == special.max_latent_steps:
                row[position] = False
            steps = 0
    return mask


def score_completions(
    model: LatentReasoner,
    prompts: Sequence[list[int]],
    completions: Sequence[Completion],
    settings: SamplingSettings,
    trajectory: Trajectory | None = None,
) -> Tensor:
    """Log-probability of each token of each completion, (U, T), 0 after a completion's end.

    `trajectory` is that of `prompts` under the same weights, where it is available. The result is
    in float32 at least.
    """
    special = model.settings
    thinks_again = [special.start_id in completion.ids for completion in completions]
    shared = [i for i, again in enumerate(thinks_again) if not again]
    alone = [i for i, again in enumerate(thinks_again) if again]
    parts: list[_Scores] = []
    if shared:
        trajectory = trajectory or Trajectory.begin(model, prompts)
        paths = [_Path.of(index, completions[index], special) for index in shared]
        trajectory.extend(model, max(path.decisions for path in paths) - 1)
        parts.append(_score_decisions(model, trajectory, paths, settings))
        answered = [path for path in paths if path.answer]
        if answered:
            parts.append(_score_answers(model, trajectory, answered, settings))
    if alone:
        parts.append(_score_alone(model, prompts, completions, alone, settings))
    values = torch.cat([part.values for part in parts])
    places = torch.tensor([place for part in parts for place in part.places], device=values.device)
    width = max(len(completion.ids) for completion in completions)
    return values.new_zeros(len(completions), width).index_put(tuple(places.T), values)


class _Scores(NamedTuple):
    """Log-probabilities (M,) with their places: the completion, and the token in it."""

    values: Tensor
    places: list[tuple[int, int]]


@dataclass(frozen=True)
class _Path:
    """A completion on the shared trajectory: `steps` times CONTINUE, then STOP and an answer.

    `stopped` is False where it was cut off while thinking; `answer` holds the tokens after STOP.
    """

    index: int
    prompt: int
    steps: int
    stopped: bool
    answer: tuple[int, ...]

    @classmethod
    def of(cls, index: int, completion: Completion, special: LatentSettings) -> _Path:
        stopped = special.stop_id in completion.ids
        steps = completion.ids.index(special.stop_id) if stopped else len(completion.ids)
        return cls(index, completion.prompt, steps, stopped, completion.ids[steps + 1 :])

    @property
    def decisions(self) -> int:
        """Number of stop decisions, of which the last is STOP unless it was cut off."""
        return self.steps + self.stopped


def _score_decisions(
    model: LatentReasoner,
    trajectory: Trajectory,
    rows: list[_Path],
    settings: SamplingSettings,
) -> _Scores:
    """Log-probabilities of the stop decisions along the trajectory."""
    log_probs = trajectory.decision_log_probs(model, settings.temperature)
    taken = [(row, step) for row in rows for step in range(row.decisions)]
    index = torch.tensor(
        [(row.prompt, step, STOPS if step == row.steps else CONTINUES) for row, step in taken],
        device=log_probs.device,
    )
    return _Scores(log_probs[tuple(index.T)], [(row.index, step) for row, step in taken])


def _score_answers(
    model: LatentReasoner,
    trajectory: Trajectory,
    rows: list[_Path],
    settings: SamplingSettings,
) -> _Scores:
    """Log-probabilities of the answers: one pass over their tokens, from the trajectory's cache."""
    device, stop_id = model.device, model.settings.stop_id
    state = trajectory.leave(
        model,
        torch.tensor([row.prompt for row in rows], device=device),
        torch.tensor([row.steps for row in rows], device=device),
    )
    lengths = torch.tensor([len(row.answer) for row in rows])
    # Padding is on the right here: no token of a row comes after it, so none sees it.
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    inputs = torch.full(mask.shape, stop_id)
    inputs[mask] = torch.tensor([token for row in rows for token in (stop_id, *row.answer[:-1])])
    mask = mask.to(device)
    hidden = model.advance(state, model.embed(inputs.to(device)), mask)[mask]
    targets = torch.tensor([token for row in rows for token in row.answer], device=device)
    kinds = torch.full_like(targets, int(Kind.ANSWER))
    log_probs = target_log_probabilities(model, hidden, kinds, targets, settings.temperature)
    places = [(row.index, row.decisions + i) for row in rows for i in range(len(row.answer))]
    return _Scores(log_probs, places)


def _score_alone(
    model: LatentReasoner,
    prompts: Sequence[list[int]],
    completions: Sequence[Completion],
    indices: list[int],
    settings: SamplingSettings,
) -> _Scores:
    """Log-probabilities of completions that think again: whole sequences, all in one forward."""
    chosen = [completions[index] for index in indices]
    # The last token is not read, because nothing was sampled after it.
    sequences = [[*prompts[c.prompt], *c.ids[:-1]] for c in chosen]
    input_ids, attention_mask = pad_prompts(sequences, pad_id=0)
    output = model(input_ids.to(model.device), attention_mask.to(model.device))
    width = input_ids.shape[1]
    row = [i for i, c in enumerate(chosen) for _ in c.ids]
    column = [width - len(c.ids) + position for c in chosen for position in range(len(c.ids))]
    targets = torch.tensor([token for c in chosen for token in c.ids], device=model.device)
    hidden, kinds = output.last_hidden[row, column], output.kinds[row, column]
    log_probs = target_log_probabilities(model, hidden, kinds, targets, settings.temperature)
    return _Scores(
        log_probs,
        [(i, token) for i, c in zip(indices, chosen, strict=True) for token in range(len(c.ids))],
    )
