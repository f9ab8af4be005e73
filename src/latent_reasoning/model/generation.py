"""Greedy generation, cached and batched, built on the reasoner's own primitives.

It is greedy whatever a checkpoint's generation config says (conformance note 17). Prompts of
similar length share a batch; finished rows leave it. On a GPU, rows are written by captured steps
instead (`decoding.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import Tensor

from latent_reasoning.config import UserError
from latent_reasoning.data.collation import bucket_by_length, pad_prompts
from latent_reasoning.model.decoding import Written, decodes_statically, write
from latent_reasoning.model.gaussian import LatentNoise, noise_of
from latent_reasoning.model.heads import decision_logits, greedy_stops
from latent_reasoning.model.mixtures import Mixture
from latent_reasoning.model.passes import Kind, plan_passes
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.soft_thinking import SoftRows, SoftThinker, read_mixture
from latent_reasoning.model.state import ReasoningState
from latent_reasoning.model.static_rows import Beginning, Writing, after_token
from latent_reasoning.model.trajectory import Trajectory
from latent_reasoning.runtime.memory import in_fewer_rows, in_halves

T = TypeVar("T")
Rows = tuple[list[list[int]], list[list[list[float]]]]
"""Of each row, ids that go on after EOS, and the probabilities of stop decisions."""

COMPACT_BELOW = 0.75
"""Finished rows leave once at most this share is unfinished, because leaving copies the cache."""

FORCED_ROWS = 4
"""Where rows share their prompt, a batch has this multiple of `batch_size` rows."""


@dataclass(frozen=True)
class Generation:
    """What the model wrote after one prompt.

    `ids` ends with EOS unless it was `cut_off` at the maximum length or at the base's last
    position. `stop_probabilities` holds (p(continue), p(stop)) of each stop decision;
    `latent_steps` is the number of CONTINUE written; `searched` the number of other texts that a
    search has written to find this one.
    """

    ids: list[int]
    stop_probabilities: list[tuple[float, float]]
    latent_steps: int
    cut_off: bool
    searched: int = 0


@torch.no_grad()
def generate(
    model: LatentReasoner,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int,
    batch_size: int,
) -> list[Generation]:
    """Greedy completions of prompts of token ids, in the prompts' order.

    STOP is forced where the model's settings say so (`LatentSettings.max_latent_steps`). The caller
    sets eval mode and autocast. A batch too large for the memory is written in halves.
    """
    _check_noise(model, prompts)
    kind = _SoftWriter if isinstance(model, SoftThinker) else _Writer
    if kind is _Writer and decodes_statically(model):
        return _generate_statically(model, prompts, max_new_tokens, eos_id, batch_size)

    def write_batch(batch: Sequence[int]) -> list[Generation]:
        own = [prompts[position] for position in batch]
        ids, mask = pad_prompts(own, eos_id)
        writer = kind.after_prompts(model, ids.to(model.device), mask.to(model.device))
        writer.noise = noise_of(model.settings, own, model.base.config.hidden_size)
        written = writer.write(max_new_tokens, eos_id)
        return _generations(model, written, mask.sum(1).tolist(), eos_id)

    return _in_batches(write_batch, prompts, batch_size)


@torch.no_grad()
def generate_forced(
    model: LatentReasoner,
    prompts: Sequence[Sequence[int]],
    ending: Sequence[int],
    *,
    last: int,
    max_new_tokens: int,
    eos_id: int,
    batch_size: int,
) -> list[list[Generation]]:
    """Greedy completions after 0, 1, .., `last` forced latent steps: a list for each number.

    They equal those of `generate` on prompts followed by n CONTINUE and `ending` (STOP and any more
    forced tokens). But each prompt, which ends in START, is read once, and its latent steps are
    taken once: all lengths branch off one trajectory. A batch too large for the memory is written
    in halves.
    """
    if decodes_statically(model):
        step = model.settings.continue_id
        whole = [[*prompt, *[step] * n, *ending] for prompt in prompts for n in range(last + 1)]
        rows = FORCED_ROWS * batch_size
        written = _generate_statically(model, whole, max_new_tokens, eos_id, rows)
        return [written[n :: last + 1] for n in range(last + 1)]
    counts = torch.arange(last + 1, device=model.device)
    # The rows of a prompt share its keys and values, so more of them fit into memory.
    prompts_at_once = max(1, FORCED_ROWS * batch_size // len(counts))

    def write_curves(batch: Sequence[int]) -> list[list[Generation]]:
        own = [prompts[position] for position in batch]
        trajectory = Trajectory.begin(model, own)
        trajectory.noise = noise_of(model.settings, own, model.base.config.hidden_size)
        trajectory.extend(model, last)
        of_prompt = torch.arange(len(batch), device=model.device).repeat_interleave(len(counts))
        steps = counts.repeat(len(batch))
        written = write_after(model, trajectory, of_prompt, steps, ending, max_new_tokens, eos_id)
        read = [len(prompts[i]) + n + len(ending) for i in batch for n in range(last + 1)]
        rows = _generations(model, written, read, eos_id)
        return [rows[first : first + last + 1] for first in range(0, len(rows), last + 1)]

    curves = _in_batches(write_curves, prompts, prompts_at_once)
    return [[curve[n] for curve in curves] for n in range(last + 1)]


def _in_batches(
    run: Callable[[Sequence[int]], list[T]], prompts: Sequence[Sequence[int]], at_once: int
) -> list[T]:
    """What `run` gives for the places of prompts of similar length, in the prompts' order."""
    results: dict[int, T] = {}
    for batch in bucket_by_length([len(prompt) for prompt in prompts], at_once):
        results |= zip(batch, in_halves(run, batch), strict=True)
    return [results[place] for place in range(len(prompts))]


def write_after(
    model: LatentReasoner,
    trajectory: Trajectory,
    prompts: Tensor,
    steps: Tensor,
    ending: Sequence[int],
    max_new_tokens: int,
    eos_id: int,
) -> Rows:
    """What rows write greedily that leave `prompts` (R,) of a trajectory after `steps` (R,) latent
    steps and read `ending`."""
    state = trajectory.leave(model, prompts, steps)
    ids = torch.tensor([list(ending)], device=model.device).expand(len(prompts), -1)
    model.advance(state, model.embed(ids))
    writer = _Writer(model, state, torch.full_like(prompts, Kind.ANSWER))
    return writer.write(max_new_tokens, eos_id)


def _check_noise(model: LatentReasoner, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse prompts with latent steps in them where the model samples its latent inputs."""
    settings = model.settings
    if settings is None or not settings.latent_noise:
        return
    if any(settings.continue_id in prompt for prompt in prompts):
        raise UserError(
            "forced_steps: this model samples its latent inputs (latent_noise in latent.json); "
            "decode it with latent_noise: 0, or measure the forced curve"
        )


def _generate_statically(
    model: LatentReasoner,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_id: int,
    batch_size: int,
) -> list[Generation]:
    """As `generate`, by captured steps; prompts that begin with the same text share its reading."""
    if not prompts:
        return []
    plan_passes(*pad_prompts(prompts, eos_id), model.settings)  # refuses illegal sequences
    beginnings = [Beginning.of(model.settings, prompt) for prompt in prompts]
    how = Writing(eos_id, max_new_tokens)

    def write_at_most(rows: int) -> list[Written]:
        return write(model, beginnings, how, rows)

    def forget() -> None:
        model.captured.clear()

    rows = in_fewer_rows(write_at_most, min(batch_size, len(prompts)), forget)
    return [_generation(model, row.ids, row.probabilities, eos_id) for row in rows]


def _generations(
    model: LatentReasoner, written: Rows, read: Sequence[int], eos_id: int
) -> list[Generation]:
    """The generations of rows whose numbers of tokens before them were `read`.

    A row is cut after its last position and one more token, which need not be read.
    """
    limit = model.position_limit
    return [
        _generation(model, ids[: None if limit is None else limit - length + 1], made, eos_id)
        for ids, made, length in zip(*written, read, strict=True)
    ]


def _generation(
    model: LatentReasoner, ids: list[int], decisions: list[list[float]], eos_id: int
) -> Generation:
    """One row of the writer's output, without what follows EOS."""
    cut_off = eos_id not in ids
    length = len(ids) if cut_off else ids.index(eos_id) + 1
    ids = ids[:length]
    made = [(on, stop) for on, stop in decisions[:length] if on + stop > 0]
    steps = 0 if model.settings is None else ids.count(model.settings.continue_id)
    return Generation(ids, made, steps, cut_off)


class _Writer:
    """One batch of B rows being written; `rows` (R,) are those that are still in it. With `noise`
    their latent inputs are sampled."""

    def __init__(self, model: LatentReasoner, state: ReasoningState, kinds: Tensor) -> None:
        """Continue `state`, whose last positions have `kinds` (B,)."""
        self.model = model
        self.settings = model.settings
        self.state = state
        self.kinds = kinds
        self.rows = torch.arange(len(kinds), device=model.device)
        self.run_steps = torch.zeros_like(self.rows)
        self.noise: LatentNoise | None = None

    @classmethod
    def after_prompts(
        cls, model: LatentReasoner, input_ids: Tensor, attention_mask: Tensor
    ) -> Self:
        """Read prompts (B, T), padded on the left."""
        kinds = torch.full((len(input_ids),), int(Kind.TEXT), device=model.device)
        state = model.read_prompts(input_ids, attention_mask)
        if model.settings is None:
            return cls(model, state, kinds)
        has_stopped = (attention_mask.bool() & (input_ids == model.settings.stop_id)).any(1)
        kinds = torch.where(has_stopped, int(Kind.ANSWER), kinds)
        writer = cls(model, state, kinds)
        is_continue = input_ids == model.settings.continue_id
        writer.run_steps = is_continue[:, :-1].flip(1).cumprod(1).sum(1)
        writer._note(input_ids[:, -1])
        return writer

    def write(self, max_new_tokens: int, eos_id: int) -> Rows:
        """Ids (B, S) and stop probabilities (B, S, 2), zero where no stop decision was made."""
        count, written = len(self.rows), 0
        ids = torch.full((count, max_new_tokens), eos_id, device=self.rows.device)
        probabilities = torch.zeros(count, max_new_tokens, 2, device=self.rows.device)
        done = torch.zeros(count, dtype=torch.bool, device=self.rows.device)
        for step in range(max_new_tokens):
            tokens = self._choose(probabilities[:, step])
            ids[self.rows, step] = torch.where(done, eos_id, tokens)
            written = step + 1
            done |= tokens == eos_id
            must_leave = self._mark_the_last_position(done)
            unfinished = (~done).nonzero()[:, 0]
            if not len(unfinished):
                break
            if len(unfinished) <= COMPACT_BELOW * len(done) or must_leave:
                self._keep(unfinished)
                done, tokens = done[unfinished], tokens[unfinished]
            self._read(tokens, more=written < max_new_tokens)
        return ids[:, :written].tolist(), probabilities[:, :written].tolist()

    def _read(self, tokens: Tensor, *, more: bool) -> None:
        """Read the chosen tokens (R,), unless no `more` will be chosen."""
        self._note(tokens)
        if more:
            if self.noise is not None:
                self.state.noise = self._next_noise(self.noise, tokens)
            self.model.read_tokens(self.state, tokens)

    def _next_noise(self, noise: LatentNoise, tokens: Tensor) -> Tensor:
        """The noise (R, d) of the latent inputs of rows that read `tokens` (R,): 0 elsewhere."""
        thinking = tokens == self.settings.continue_id
        numbers = torch.zeros_like(self.state.last_hidden)
        rows = self.rows[thinking].tolist()
        if rows:
            numbers[thinking] = noise.next(rows).to(numbers)
        return numbers

    def _choose(self, probabilities: Tensor) -> Tensor:
        """The next token (R,) of each row; fills the stop probabilities (B, 2) of this step."""
        hidden = self.state.last_hidden
        tokens = torch.empty_like(self.rows)
        text = (self.kinds != Kind.THINKING).nonzero()[:, 0]
        thinking = (self.kinds == Kind.THINKING).nonzero()[:, 0]
        if len(text):
            tokens[text] = self.model.logits(hidden[text], self.kinds[text]).argmax(-1)
        if len(thinking):
            logits = decision_logits(self.model, hidden[thinking])
            probabilities[self.rows[thinking]] = logits.softmax(-1).float()
            stops = greedy_stops(self.model, hidden[thinking], logits)
            if self.settings.max_latent_steps is not None:
                stops |= self.run_steps[thinking] >= self.settings.max_latent_steps
            tokens[thinking] = torch.where(stops, self.settings.stop_id, self.settings.continue_id)
        return tokens

    def _mark_the_last_position(self, done: Tensor) -> bool:
        """Mark rows that can read no further token as `done` (R,), and say whether there are any.

        Such rows must leave the batch: the base has no position for another column.
        """
        if self.model.position_limit is None:
            return False
        at_end = self.state.lengths >= self.model.position_limit
        done |= at_end
        return bool(at_end.any())

    def _note(self, tokens: Tensor) -> None:
        """Update `kinds` and `run_steps` by one more token per row (R,)."""
        if self.settings is None:
            return
        self.kinds, self.run_steps = after_token(self.settings, self.kinds, self.run_steps, tokens)

    def _keep(self, unfinished: Tensor) -> None:
        """Continue with the unfinished rows alone."""
        self.state = self.state.select(unfinished)
        self.rows = self.rows[unfinished]
        self.kinds, self.run_steps = self.kinds[unfinished], self.run_steps[unfinished]


class _SoftWriter(_Writer):
    """Rows of a model that thinks softly: what they read next is a `mixture` of words."""

    model: SoftThinker
    soft: SoftRows
    mixture: Mixture

    @classmethod
    def after_prompts(
        cls, model: LatentReasoner, input_ids: Tensor, attention_mask: Tensor
    ) -> Self:
        """Read prompts (B, T), padded on the left."""
        writer = super().after_prompts(model, input_ids, attention_mask)
        writer.soft = SoftRows.begin(writer.model.how, input_ids, attention_mask)
        return writer

    def _choose(self, probabilities: Tensor) -> Tensor:
        """The next token (R,) of each row; there are no stop decisions."""
        step, self.soft = self.soft.choose(self.model, self.state.last_hidden)
        self.mixture = step.mixture
        return step.token

    def _read(self, tokens: Tensor, *, more: bool) -> None:
        """Read the mixtures, unless no `more` will be chosen."""
        if more:
            inputs = read_mixture(self.model, self.mixture)
            self.model.advance(self.state, inputs.unsqueeze(1))

    def _keep(self, unfinished: Tensor) -> None:
        super()._keep(unfinished)
        self.soft, self.mixture = self.soft.select(unfinished), self.mixture.select(unfinished)
