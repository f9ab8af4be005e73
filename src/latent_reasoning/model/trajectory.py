"""The latent trajectory shared by all samples of a prompt (docs/method.md, section 5, "Structure").

Given the question, the latent states are deterministic: only stop decisions and answer tokens are
random. The samples of a prompt therefore lie on one trajectory and differ only in where they leave
it and in what they answer. The trajectory is computed once, with its graph where gradients are
enabled, for both sampling and the update.

P prompts, N latent steps so far, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from latent_reasoning.data.collation import pad_prompts
from latent_reasoning.model.blocks import RowOrder
from latent_reasoning.model.gaussian import LatentNoise
from latent_reasoning.model.heads import decision_logits
from latent_reasoning.model.reading import Reading, plan_prompts
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.state import ReasoningState
from latent_reasoning.runtime.device import to_device


@dataclass
class Trajectory:
    """States along the latent steps of P prompts, each ending in START.

    `hidden[j]` `(P, d)` is the state after j latent steps, in which the j-th decision (continue or
    stop, from 0) is made; `state` covers the prompts and all steps so far. With `noise` the latent
    inputs are sampled, and `inputs[j]` `(P, d)` is that of step j, from 0.
    """

    state: ReasoningState
    hidden: list[Tensor]
    prompt_columns: int
    noise: LatentNoise | None = None
    inputs: list[Tensor] = field(default_factory=list)

    @classmethod
    def begin(cls, model: LatentReasoner, prompts: Sequence[Sequence[int]]) -> Trajectory:
        """Read the prompts, before any latent step."""
        return cls.read(model, to_device(cls.plan(model, prompts), model.device))

    @classmethod
    def plan(cls, model: LatentReasoner, prompts: Sequence[Sequence[int]]) -> Reading:
        """How the prompts will be read, decided on the host."""
        # Padding is masked everywhere: any id of the vocabulary serves.
        ids, mask = pad_prompts(prompts, pad_id=0)
        if model.sizes is not None:
            more = model.sizes("prompt", ids.shape[1]) - ids.shape[1]
            ids, mask = (functional.pad(tensor, (more, 0)) for tensor in (ids, mask))
        return plan_prompts(model, ids, mask)

    @classmethod
    def read(cls, model: LatentReasoner, reading: Reading) -> Trajectory:
        """Read planned prompts that are on the model's device."""
        state = model.read(reading)
        return cls(state, [state.last_hidden], reading.kinds.shape[1])

    @property
    def steps(self) -> int:
        """N, the number of latent steps taken so far."""
        return len(self.hidden) - 1

    def extend(self, model: LatentReasoner, steps: int) -> None:
        """Take latent steps with all prompts together, until there are `steps` of them."""
        while self.steps < steps:
            noise = None if self.noise is None else self.noise.next()
            self.state.noise = noise
            inputs = model.latent_input(self.hidden[-1], self.state)
            if noise is not None:
                self.inputs.append(inputs)
            self.hidden.append(model.advance(self.state, inputs.unsqueeze(1))[:, -1])

    def leave(
        self, model: LatentReasoner, prompts: Tensor | RowOrder, steps: Tensor
    ) -> ReasoningState:
        """A state whose row i leaves prompt `prompts[i]` after `steps[i]` latent steps; both (R,).

        The new rows see the prompt and their own steps, no later ones. Prompts that are not in a
        `RowOrder` yet are looked at, on whatever device they are.
        """
        order = prompts
        if isinstance(order, Tensor):
            order = to_device(RowOrder.of(order, len(self.state.mask)), model.device)
        steps = to_device(steps, model.device)
        columns = torch.arange(self.state.mask.shape[1], device=steps.device)
        own = columns < self.prompt_columns + steps[:, None]
        return model.branch(self.state, order, self.state.mask[order.rows] & own)

    def decision_log_probs(self, model: LatentReasoner, temperature: float) -> Tensor:
        """Log-probabilities of CONTINUE and STOP at each decision, (P, N + 1, 2)."""
        return decision_logits(model, torch.stack(self.hidden, dim=1), temperature).log_softmax(-1)
