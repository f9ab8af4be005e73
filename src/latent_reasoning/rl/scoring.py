"""Log-probabilities of sampled completions, all samples of a prompt in one pass.

The shared trajectory is read once, with gradient through the whole latent chain; the answers follow
as one pass over the distinct (latent steps, answer) pairs, on top of the trajectory's cache.
Completions that think again after STOP leave the trajectory and are scored as whole sequences. The
result equals scoring every sample on its own (`tests/rl/test_scoring.py`).

U distinct completions of at most T tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latent_reasoning.data.collation import pad_prompts
from latent_reasoning.model.blocks import RowOrder
from latent_reasoning.model.heads import CONTINUES, STOPS, Targets, target_log_probabilities
from latent_reasoning.model.passes import Kind
from latent_reasoning.model.reading import Reading, padded, plan_reading, sizes_of
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings
from latent_reasoning.model.trajectory import Trajectory
from latent_reasoning.rl.rollouts import Completion, SamplingSettings
from latent_reasoning.runtime.device import to_device
from latent_reasoning.runtime.graphs import Sizes


def loss_mask(completions: Sequence[Completion], special: LatentSettings) -> Tensor:
    """True (U, T) at the tokens that were sampled, that is all but a forced STOP.

    Where the number of steps is fixed CONTINUE counts too, though its probability is 1.
    """
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


@dataclass(frozen=True)
class Scoring:
    """How completions of prompts will be scored; planned on the host.

    `prompts` are read where there is no trajectory yet; it is extended to `steps` latent steps, and
    each of `decisions` (D, 3) is (prompt, step, choice). `places` (N, 2) are the (completion,
    token) of each log-probability, decisions first, then `answers`, then `alone`; the result has
    `shape` (U, T). Places that only make up the number are in row U.
    """

    prompts: Reading | None
    steps: int
    decisions: Tensor
    answers: _Answers | None
    alone: _Alone | None
    places: Tensor
    shape: tuple[int, int]

    @classmethod
    def plan(
        cls,
        model: LatentReasoner,
        prompts: Sequence[list[int]],
        completions: Sequence[Completion],
        *,
        begun: bool = False,
        sizes: Sizes | None = None,
    ) -> Scoring:
        """Plan it; with `begun` there is a trajectory of the prompts already.

        With `sizes` the result is larger than needed, to be of few shapes, and 0 there.
        """
        special = model.settings
        thinks_again = [special.start_id in completion.ids for completion in completions]
        shared = [i for i, again in enumerate(thinks_again) if not again]
        again = [i for i, again in enumerate(thinks_again) if again]
        paths = [_Path.of(index, completions[index], special) for index in shared]
        taken = [(path, step) for path in paths for step in range(path.decisions)]
        answered = [path for path in paths if path.answer]
        places = [(path.index, step) for path, step in taken]
        places += [
            (path.index, path.decisions + i) for path in answered for i, _ in enumerate(path.answer)
        ]
        places += [(i, token) for i in again for token in range(len(completions[i].ids))]
        with sizes_of(model, "prompts"):
            reading = Trajectory.plan(model, prompts) if paths and not begun else None
        planned = cls(
            reading,
            max((path.decisions for path in paths), default=0) - 1,
            torch.tensor([_decision(path, step) for path, step in taken]).view(-1, 3),
            _Answers.plan(answered, len(prompts), special, sizes) if answered else None,
            _Alone.plan(model, prompts, [completions[i] for i in again]) if again else None,
            torch.tensor(places),
            (len(completions), max(len(completion.ids) for completion in completions)),
        )
        return planned if sizes is None else planned._of_few_shapes(sizes)

    def _of_few_shapes(self, sizes: Sizes) -> Scoring:
        rows, width = sizes("completions", self.shape[0]), sizes("longest", self.shape[1])
        taken, answered = sizes("decisions taken", len(self.decisions)), 0
        if self.answers is not None:
            answered = len(self.answers.at)
        places = torch.tensor([[rows, 0]]).repeat(taken + answered, 1)
        decided = len(self.decisions)
        places[:decided] = self.places[:decided]
        places[taken:][: len(self.places) - decided] = self.places[decided:]
        return replace(
            self,
            steps=sizes("decisions", self.steps + 1) - 1,
            decisions=padded(self.decisions, taken),
            places=places,
            shape=(rows, width),
        )


def score(
    model: LatentReasoner,
    scoring: Scoring,
    temperature: float,
    trajectory: Trajectory | None = None,
) -> Tensor:
    """Log-probability of each token of each completion, (U, T), 0 after a completion's end.

    `scoring` is on the model's device; `trajectory` is that of its prompts under the same weights.
    The host waits for nothing here. In float32 at least.
    """
    parts: list[Tensor] = []
    if len(scoring.decisions):
        if trajectory is None:
            trajectory = Trajectory.read(model, scoring.prompts)
        trajectory.extend(model, scoring.steps)
        log_probs = trajectory.decision_log_probs(model, temperature)
        parts.append(log_probs[tuple(scoring.decisions.T)])
        if scoring.answers is not None:
            parts.append(scoring.answers.score(model, trajectory, temperature))
    if scoring.alone is not None:
        parts.append(scoring.alone.score(model, temperature))
    values, (rows, width) = torch.cat(parts), scoring.shape
    result = values.new_zeros(rows + 1, width).index_put(tuple(scoring.places.T), values)
    return result[:-1]


def score_completions(
    model: LatentReasoner,
    prompts: Sequence[list[int]],
    completions: Sequence[Completion],
    settings: SamplingSettings,
    trajectory: Trajectory | None = None,
) -> Tensor:
    """Plan and `score`."""
    scoring = Scoring.plan(model, prompts, completions, begun=trajectory is not None)
    return score(model, to_device(scoring, model.device), settings.temperature, trajectory)


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


def _decision(path: _Path, step: int) -> tuple[int, int, int]:
    return path.prompt, step, STOPS if step == path.steps else CONTINUES


def _with_more(rows: list[_Path], count: int, prompts: int) -> list[_Path]:
    """`count` rows: those that only make up the number predict nothing, and belong to the prompts
    with the fewest, because each prompt has as many slots as the one with the most."""
    own = Counter(row.prompt for row in rows)
    rows = list(rows)
    while len(rows) < count:
        prompt = min(range(prompts), key=lambda place: own[place])
        rows.append(replace(rows[0], prompt=prompt))
        own[prompt] += 1
    return rows


@dataclass(frozen=True)
class _Answers:
    """Answers of R rows, at most W tokens: one pass over their tokens, from a trajectory's cache.

    The rows leave their prompts, in `order`, after `steps` (R,) latent steps. `inputs` and `mask`
    are (R, W), `mask` None where no row has padding; `at` (N,) are the places of the tokens that
    predict `targets`.
    """

    order: RowOrder
    steps: Tensor
    inputs: Tensor
    mask: Tensor | None
    at: Tensor
    targets: Targets

    @classmethod
    def plan(
        cls, rows: list[_Path], prompts: int, special: LatentSettings, sizes: Sizes | None
    ) -> _Answers:
        width, count = max(len(row.answer) for row in rows), len(rows)
        if sizes is not None:
            width, count = sizes("answer", width), sizes("answers", count)
        tokens = torch.tensor([token for row in rows for token in row.answer])
        rows = _with_more(rows, count, prompts)
        lengths = torch.tensor([len(row.answer) for row in rows])
        # Padding is on the right here: no token of a row comes after it, so none sees it.
        mask = torch.arange(width) < lengths[:, None]
        inputs = torch.full(mask.shape, special.stop_id)
        read = [token for row in rows for token in (special.stop_id, *row.answer[:-1])]
        inputs[mask] = torch.tensor(read)
        kinds = torch.full_like(tokens, int(Kind.ANSWER))
        at = mask.flatten().nonzero()[: len(tokens), 0]
        targets = Targets.of(tokens, kinds, special)
        if sizes is not None:
            places, _, targets = targets.of_few_shapes(sizes)
            at = at[places]
        return cls(
            RowOrder.of(torch.tensor([row.prompt for row in rows]), prompts, sizes),
            torch.tensor([row.steps for row in rows]),
            inputs,
            None if mask.all() and sizes is None else mask,
            at,
            targets,
        )

    def score(self, model: LatentReasoner, trajectory: Trajectory, temperature: float) -> Tensor:
        """Log-probabilities (N,)."""
        state = trajectory.leave(model, self.order, self.steps)
        hidden = model.advance(state, model.embed(self.inputs), self.mask)
        hidden = hidden.flatten(0, 1).index_select(0, self.at)
        return target_log_probabilities(model, hidden, self.targets, temperature)


@dataclass(frozen=True)
class _Alone:
    """Completions that think again: whole sequences, all in one forward.

    Their N tokens are predicted at `rows` and `columns`, both (N,).
    """

    reading: Reading
    rows: Tensor
    columns: Tensor
    targets: Targets

    @classmethod
    def plan(
        cls, model: LatentReasoner, prompts: Sequence[list[int]], chosen: Sequence[Completion]
    ) -> _Alone:
        # The last token is not read, because nothing was sampled after it.
        sequences = [[*prompts[c.prompt], *c.ids[:-1]] for c in chosen]
        input_ids, attention_mask = pad_prompts(sequences, pad_id=0)
        reading, width = plan_reading(model, input_ids, attention_mask), input_ids.shape[1]
        rows = torch.tensor([i for i, c in enumerate(chosen) for _ in c.ids])
        columns = [width - len(c.ids) + position for c in chosen for position in range(len(c.ids))]
        columns = torch.tensor(columns)
        tokens = torch.tensor([token for c in chosen for token in c.ids])
        targets = Targets.of(tokens, reading.kinds[rows, columns], model.settings)
        return cls(reading, rows, columns, targets)

    def score(self, model: LatentReasoner, temperature: float) -> Tensor:
        """Log-probabilities (N,)."""
        hidden = model.run(self.reading).last_hidden[self.rows, self.columns]
        return target_log_probabilities(model, hidden, self.targets, temperature)
