"""Recurrent filters, which turn a hidden state into the input of the next latent step.

See docs/method.md, section 3. Filters map `(.., d)` to `(.., d)`; `SRE` also needs the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from latent_reasoning.model.attention_source import RMS_NORM_EPS, AttentionSource
from latent_reasoning.model.bases import scaled_rows
from latent_reasoning.model.gaussian import GaussianHead
from latent_reasoning.model.mixtures import Mixture, likeliest
from latent_reasoning.model.settings import LatentSettings
from latent_reasoning.model.special_rows import ids_on


class MLP(nn.Module):
    """Linear -> GELU -> Linear -> LayerNorm; Xavier-uniform weights, zero biases."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.input_layer = nn.Linear(hidden_size, hidden_size)
        self.output_layer = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        for layer in (self.input_layer, self.output_layer):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """`(.., d)` -> `(.., d)`."""
        return self.norm(self.output_layer(nn.functional.gelu(self.input_layer(hidden))))


class Projection(nn.Module):
    """CODI's P: Linear -> GELU -> Linear -> LayerNorm (if `norm`), with torch's initial values.

    Unlike `MLP` it has an inner `width` of its own (arXiv 2502.21074; its public code)."""

    def __init__(self, hidden_size: int, width: int | None, norm: bool) -> None:
        super().__init__()
        width = width or hidden_size
        self.input_layer = nn.Linear(hidden_size, width)
        self.output_layer = nn.Linear(width, hidden_size)
        self.norm = nn.LayerNorm(hidden_size) if norm else nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        """`(.., d)` -> `(.., d)`."""
        return self.norm(self.output_layer(nn.functional.gelu(self.input_layer(hidden))))


class LinearRmsNorm(nn.Module):
    """Linear -> RMSNorm -> + bias (`linear`, `linear_ECF`)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm = nn.RMSNorm(hidden_size, eps=RMS_NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        nn.init.xavier_uniform_(self.layer.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """`(.., d)` -> `(.., d)`."""
        return self.norm(self.layer(hidden)) + self.bias


class LinearLayerNorm(nn.Module):
    """Linear -> LayerNorm (`linear_ln`)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        nn.init.xavier_uniform_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """`(.., d)` -> `(.., d)`."""
        return self.norm(self.layer(hidden))


class Pause(nn.Module):
    """A learnt vector in place of the hidden state (`pause`): time to compute, but no thought."""

    def __init__(self, initial: Tensor) -> None:
        super().__init__()
        self.row = nn.Parameter(initial.clone())

    def forward(self, hidden: Tensor) -> Tensor:
        """`(.., d)` -> `(.., d)`, the same for every state."""
        return self.row.expand_as(hidden)


class SRE(nn.Module):
    """Soft re-embedding: the softmax over the vocabulary, times the embedding matrix."""

    def forward(
        self,
        hidden: Tensor,
        vocabulary_logits: Callable[[Tensor], Tensor],
        embedding_matrix: Tensor,
    ) -> Tensor:
        """`(.., d)` -> `(.., d)`, with unmasked logits `(.., V)` and a matrix `(V, d)`."""
        return vocabulary_logits(hidden).softmax(-1) @ embedding_matrix


class MixtureFilter(SRE):
    """The mixture of the `size` likeliest words (None: all), at a temperature (`mixture`).

    With all words at temperature 1 it is `SRE`, but for the ids `excluded`, which are no words. So
    Latent-SFT and CoT2 reason.
    """

    def __init__(
        self, size: int | None = None, temperature: float = 1.0, excluded: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.size, self.temperature, self.excluded = size, temperature, tuple(excluded)

    def forward(
        self,
        hidden: Tensor,
        vocabulary_logits: Callable[[Tensor], Tensor],
        embedding_matrix: Tensor,
    ) -> Tensor:
        """`(.., d)` -> `(.., d)`, with unmasked logits `(.., V)` and a matrix `(V, d)`."""
        logits = vocabulary_logits(hidden)
        if self.excluded:
            excluded = ids_on(logits.device, *self.excluded)
            logits = logits.index_fill(-1, excluded, float("-inf"))
        if self.size is None:
            return (logits / self.temperature).softmax(-1) @ embedding_matrix
        return self.mixture(logits).embed(embedding_matrix)

    def mixture(self, logits: Tensor) -> Mixture:
        """The mixture (.., k) of few words that follows from logits `(.., V)`."""
        return likeliest(logits, self.size, self.temperature)


def embedding_covariance_filter(embeddings: Tensor) -> LinearRmsNorm:
    """`linear_ECF`: `linear` with initial weight `E^T E / V`, scaled to the mean embedding length.

    `embeddings` is `E` `(V, d)`; the norm's weight is mean |E_v| / sqrt(d), because RMSNorm gives
    vectors of length sqrt(d).
    """
    vocabulary_size, hidden_size = embeddings.shape
    module = LinearRmsNorm(hidden_size)
    with torch.no_grad():
        module.layer.weight.copy_(embeddings.T @ embeddings / vocabulary_size)
        module.norm.weight.fill_(embeddings.norm(dim=-1).mean() / math.sqrt(hidden_size))
    return module


def build_filter(settings: LatentSettings, base: PreTrainedModel) -> nn.Module:
    """A new filter for `base`, on its device and in its dtype.

    Raises `ValueError` for an unknown `recurrent_filter`.
    """
    name = settings.recurrent_filter
    embeddings = scaled_rows(base, base.get_input_embeddings().weight.detach())
    hidden_size = embeddings.shape[1]
    builders: dict[str, Callable[[], nn.Module]] = {
        "none": nn.Identity,
        "MLP": lambda: MLP(hidden_size),
        "linear": lambda: LinearRmsNorm(hidden_size),
        "linear_ln": lambda: LinearLayerNorm(hidden_size),
        "linear_ECF": lambda: embedding_covariance_filter(embeddings.float().cpu()),
        "SRE": SRE,
        "projection": lambda: Projection(hidden_size, settings.filter_width, settings.filter_norm),
        "mixture": lambda: MixtureFilter(
            settings.mixture_size,
            settings.mixture_temperature,
            excluded=(settings.end_id, settings.continue_id),
        ),
        "pause": lambda: Pause(embeddings.mean(0)),
        "attention": lambda: AttentionSource(
            embeddings.float().cpu(),
            base.config.num_attention_heads,
            base.config.num_hidden_layers,
        ),
        "gaussian": lambda: GaussianHead(
            hidden_size,
            settings.filter_width or hidden_size,
            embeddings.std(),
            deterministic=settings.deterministic_latents,
        ),
    }
    if name not in builders:
        raise ValueError(f"unknown recurrent filter {name!r}; there are {', '.join(builders)}")
    return builders[name]().to(device=embeddings.device, dtype=embeddings.dtype)
