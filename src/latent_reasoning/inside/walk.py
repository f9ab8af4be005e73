"""The one interface to the latent steps: run to step k, replace what comes next, go on, decode.

A walk is `model.trajectory.Trajectory` taken a step at a time, with the model's own forward; every
analysis and every intervention is made of it. A method that reasons in another way joins by these
functions.

P prompts, R rows that answer, n latent steps so far, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latent_reasoning.model.heads import STOPS, decision_logits, greedy_stops
from latent_reasoning.model.passes import Kind
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.trajectory import Trajectory

ANSWER_TOKENS = 32
"""Longest answer, after ` The answer is:`: its first number counts."""


@dataclass(frozen=True)
class Answers:
    """What R rows wrote: ids up to EOS, and the mean log-probability (R,) of these and of EOS."""

    ids: list[list[int]]
    log_probability: Tensor


@dataclass
class Walk:
    """P prompts, each ending in START, and the latent steps taken so far.

    `hidden[j]` (P, d) is h_j, after the final norm, at START (j = 0) and after the j-th step;
    `inputs[j - 1]` (P, d) is z_j, which the j-th step has read.
    """

    model: LatentReasoner
    trajectory: Trajectory
    inputs: list[Tensor]

    @classmethod
    @torch.no_grad()
    def begin(cls, model: LatentReasoner, prompts: Sequence[Sequence[int]]) -> Walk:
        """Read the prompts."""
        return cls(model, Trajectory.begin(model, prompts), [])

    @property
    def hidden(self) -> list[Tensor]:
        return self.trajectory.hidden

    def fork(self) -> Walk:
        """The same walk, to go on without changing this one."""
        trajectory = replace(
            self.trajectory, state=self.trajectory.state.fork(), hidden=[*self.hidden]
        )
        return Walk(self.model, trajectory, [*self.inputs])

    @torch.no_grad()
    def next_input(self) -> Tensor:
        """What the next step would read: the filtered last state, (P, d)."""
        return self.model.latent_input(self.hidden[-1], self.trajectory.state)

    def replace_state(self, hidden: Tensor) -> None:
        """Put another state (P, d) in the last one's place, for the next input and the decision.

        What was read stays as it is in the cache.
        """
        self.hidden[-1] = hidden

    @torch.no_grad()
    def step(self, inputs: Tensor | None = None) -> None:
        """Take a latent step that reads `inputs` (P, d); None: what the model itself would."""
        self.inputs.append(self.next_input() if inputs is None else inputs)
        hidden = self.model.advance(self.trajectory.state, self.inputs[-1].unsqueeze(1))
        self.hidden.append(hidden[:, -1])

    def run(self, steps: int, change: Callable[[int, Tensor], Tensor] | None = None) -> Walk:
        """Go on to `steps` steps; `change` makes of j and z_j (P, d) what step j reads instead."""
        while len(self.inputs) < steps:
            inputs = self.next_input()
            self.step(inputs if change is None else change(len(self.inputs) + 1, inputs))
        return self

    @torch.no_grad()
    def stop_probabilities(self) -> Tensor:
        """The probability of STOP at each decision so far, (P, n + 1)."""
        logits = decision_logits(self.model, torch.stack(self.hidden, 1))
        return logits.softmax(-1)[..., STOPS]

    @torch.no_grad()
    def stops(self) -> Tensor:
        """Whether a greedy model stops at each decision so far, (P, n + 1)."""
        hidden = torch.stack(self.hidden, 1)
        return greedy_stops(self.model, hidden, decision_logits(self.model, hidden))

    @torch.no_grad()
    def answers(
        self, prompts: Tensor, steps: Tensor, ending: Sequence[int], eos_id: int
    ) -> Answers:
        """Greedy answers of rows that leave prompt `prompts[i]` after `steps[i]` steps; both (R,).

        `ending` is STOP and what follows up to the answer. The walk itself does not change.
        """
        state = self.trajectory.leave(self.model, prompts, steps)
        device = self.model.device
        forced = torch.tensor([list(ending)], device=device).expand(len(prompts), -1)
        self.model.advance(state, self.model.embed(forced))
        kinds = torch.full((len(prompts),), int(Kind.ANSWER), device=device)
        tokens: list[Tensor] = []
        done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        length = total = torch.zeros(len(prompts), device=device)
        for _ in range(ANSWER_TOKENS):
            log_probs = self.model.logits(state.last_hidden, kinds).float().log_softmax(-1)
            best, token = log_probs.max(-1)
            total, length = total + best.masked_fill(done, 0), length + (~done).float()
            tokens.append(torch.where(done, eos_id, token))
            done = done | (token == eos_id)
            limit = self.model.position_limit
            if done.all() or (limit is not None and (state.lengths >= limit).any()):
                break
            self.model.read_tokens(state, tokens[-1], thinking=False)
        ids = torch.stack(tokens, 1).tolist()
        cut = [row[: row.index(eos_id)] if eos_id in row else row for row in ids]
        return Answers(cut, (total / length).cpu())
