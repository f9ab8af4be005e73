"""A token reasoner whose thinking tokens are gated: HRPO (arXiv 2505.18454; docs/rivals.md).

The model writes ordinary text. But what it reads of a token that it has written is, until it has
written the marker ` The answer is:`, a blend of the token's embedding and of the mixture of
embeddings that the token was chosen from. Prompts, the marker's last token and the answer are read
as they are.

R rows, d hidden size, V vocabulary, M characters of the marker.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from latent_reasoning.model.base_files import existing
from latent_reasoning.model.marker import progress_after
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings_file import read_as
from latent_reasoning.model.special_rows import embedding_matrix
from latent_reasoning.model.state import ReasoningState
from latent_reasoning.model.tensors import load_tensors, own_state, read_tensors
from latent_reasoning.runtime.files import write_json

GATE_SETTINGS = "gate.json"
GATE_WEIGHTS = "gate.safetensors"

SHARPNESS = 8.0
"""c of `kept = exp(-c softplus(-decay) r)`: that of the recurrent unit the gate is taken from."""
SPARED = 1e-8
"""Added under the square root, whose gradient would be infinite where all of a token is kept."""


@dataclass(frozen=True)
class GateSettings:
    """The distribution that a token is chosen from, and its mixture made of: logits over
    `temperature`, of which the `top_k` largest are kept (0: all)."""

    temperature: float = 0.5
    top_k: int = 50

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities `(.., V)` of logits `(.., V)`, in float32 at least."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        if self.top_k:
            least = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        return logits.softmax(-1)


def mixture(probabilities: Tensor, embeddings: Tensor) -> Tensor:
    """The embeddings `(V, d)` weighted by probabilities `(.., V)`, `(.., d)`.

    Over the norm of the probabilities: the flatter they are, the longer the mixture.
    """
    return (probabilities.to(embeddings.dtype) @ embeddings) / probabilities.norm(
        dim=-1, keepdim=True
    ).to(embeddings.dtype)


class ThinkingGate(nn.Module):
    """Blends a token's embedding e and a mixture s, feature by feature.

    `r = sigmoid(recurrence(e))`, `i = sigmoid(input(e))`, `kept = exp(-8 softplus(-decay) r)`; the
    blend is `kept e + sqrt(1 - kept^2) i s`.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.recurrence = nn.Linear(hidden_size, hidden_size)
        self.input = nn.Linear(hidden_size, hidden_size)
        self.decay = nn.Parameter(torch.zeros(hidden_size))

    def begin(self, least: float, most: float, std: float, uniform: Tensor | None = None) -> None:
        """New weights: `kept^(1 / r)` of a feature is drawn from [`least`, `most`) by `uniform`
        `(d,)` (None: torch's generator); matrices are normal with `std`, biases 0."""
        with torch.no_grad():
            for layer in (self.recurrence, self.input):
                layer.weight.normal_(std=std)
                layer.bias.zero_()
            uniform = torch.rand(self.decay.shape) if uniform is None else uniform
            kept = least + (most - least) * uniform
            self.decay.copy_(-torch.log(kept ** (-1 / SHARPNESS) - 1))

    def kept(self, r: Tensor) -> Tensor:
        """The share of the token's embedding that is kept at `r` `(.., d)`."""
        return torch.exp(-SHARPNESS * functional.softplus(-self.decay) * r)

    def forward(self, embeddings: Tensor, mixtures: Tensor) -> tuple[Tensor, Tensor]:
        """The blend and the share kept, both `(.., d)`, of embeddings and mixtures `(.., d)`."""
        kept = self.kept(torch.sigmoid(self.recurrence(embeddings)))
        added = (1 - kept.square() + SPARED).sqrt()
        gated = torch.sigmoid(self.input(embeddings)) * mixtures
        return (kept * embeddings + added * gated).to(embeddings.dtype), kept


class Fed(NamedTuple):
    """What rows read of a token: `inputs` `(R, d)`, the `mixtures` `(R, d)` in them, the share
    `kept` of the token's embedding `(R, d)`, and whether the rows are `thinking` `(R,)`: elsewhere
    the input is the token's embedding, whatever the mixture."""

    inputs: Tensor
    mixtures: Tensor
    kept: Tensor
    thinking: Tensor


class GatedReasoner(LatentReasoner):
    """A plain language model that reads its own thinking through a gate.

    Parameters are those of the plain model and `gate.*`. `marker_table` is `marker.marker_table`.
    A `ReasoningState` knows how far its rows' texts have come towards the marker (`progress`).
    """

    def __init__(
        self, base: PreTrainedModel, settings: GateSettings, gate: ThinkingGate, table: Tensor
    ) -> None:
        super().__init__(base, None)
        self.gate_settings = settings
        self.gate = gate
        self.register_buffer("marker_table", table)
        self.to(self.device)

    def read_prompts(self, input_ids: Tensor, attention_mask: Tensor) -> ReasoningState:
        """Read prompts `(B, T)`; after one that ends in the marker nothing is gated."""
        state = super().read_prompts(input_ids, attention_mask)
        last = len(self.marker_table) - 1
        progress = torch.zeros(len(input_ids), dtype=torch.long, device=self.device)
        for column in input_ids[:, -last:].unbind(1):
            progress = progress_after(self.marker_table, progress % last, column[:, None])
        state.progress = progress
        return state

    def read_tokens(
        self, state: ReasoningState, tokens: Tensor, *, thinking: bool = True
    ) -> Tensor:
        """Read one more token per row `(R,)`, gated where the row thinks; new states `(R, d)`."""
        fed = self.feed(state, tokens)
        return self.advance(state, fed.inputs.unsqueeze(1))[:, -1]

    def feed(self, state: ReasoningState, tokens: Tensor) -> Fed:
        """What the rows of a state read of `tokens` `(R,)` that they have just written.

        Notes in the state how far their texts have come.
        """
        state.progress = progress_after(self.marker_table, state.progress, tokens[:, None])
        thinking = state.progress < len(self.marker_table) - 1
        embeddings = embedding_matrix(self.base, None, None)
        mixtures = mixture(self.choices(state.last_hidden), embeddings)
        inputs, kept = self.gated(tokens, mixtures, thinking)
        return Fed(inputs, mixtures, kept, thinking)

    def choices(self, hidden: Tensor) -> Tensor:
        """The probabilities `(.., V)` from which a token is chosen after states `(.., d)`."""
        return self.gate_settings.distribution(self.vocabulary_logits(hidden))

    def gated(self, tokens: Tensor, mixtures: Tensor, thinking: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and shares kept, both `(.., d)`, of tokens `(..)` with mixtures `(.., d)`."""
        embeddings, thinking = self.embed(tokens), thinking.unsqueeze(-1)
        inputs, kept = self.gate(embeddings, mixtures.to(embeddings.dtype))
        return torch.where(thinking, inputs, embeddings), torch.where(thinking, kept, 1.0)


# ------------------------------------------------------------------------------------------ files


def write_gate(model: GatedReasoner, folder: Path) -> None:
    """Write what makes the model of a folder a gated one: `gate.json`, `gate.safetensors`."""
    write_json(folder / GATE_SETTINGS, dataclasses.asdict(model.gate_settings))
    save_file(own_state(model), folder / GATE_WEIGHTS, metadata={"format": "pt"})


def read_gate(base: PreTrainedModel, folder: Path) -> GatedReasoner:
    """The gated model around the `base` of a folder. Raises `CheckpointError`."""
    settings = read_as(GateSettings, folder / GATE_SETTINGS)
    file = existing(folder, GATE_WEIGHTS)
    tensors = read_tensors(file)
    table = tensors.get("marker_table", torch.zeros(1, 1, dtype=torch.int16))
    gate = ThinkingGate(base.get_input_embeddings().weight.shape[1]).to(base.dtype)
    model = GatedReasoner(base, settings, gate, table)
    load_tensors(model, tensors, set(own_state(model)), file)
    return model
