"""A Gaussian over the next latent input: the latent head of CoLaR (arXiv 2505.16552).

It works in units of s, the standard deviation of the model's input embeddings, which is stored with
its weights: the input of the next latent step is `s * (mean + std * noise)`.

R rows, d hidden size, w width of the head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from latent_reasoning.model.settings import LatentSettings
from latent_reasoning.runtime.seeds import LATENT_NOISE, seed_for

LOG_TWO_PI = math.log(2 * math.pi)
LOG_OF_NO_SPREAD = math.log(1e-9)
"""The log standard deviation of a deterministic head, that of the public code."""


class GaussianHead(nn.Module):
    """Linear -> GELU -> Linear -> LayerNorm, then a linear layer each for mean and log std.

    `deterministic`: no layer for the latter; the std is 1e-9. The filter of a noise of 0, the
    default of `forward`, is the mean.
    """

    def __init__(
        self, hidden_size: int, width: int, embedding_std: Tensor, *, deterministic: bool = False
    ) -> None:
        super().__init__()
        self.input_layer = nn.Linear(hidden_size, width)
        self.output_layer = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mean = nn.Linear(width, hidden_size)
        self.log_std = None if deterministic else nn.Linear(width, hidden_size)
        self.register_buffer("embedding_std", embedding_std.detach().clone())

    def distribution(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log std, both `(.., d)` in units of s, of states `(.., d)`: float32 at least."""
        inner = nn.functional.gelu(self.input_layer(hidden))
        inner = self.norm(self.output_layer(inner))
        mean = self.mean(inner)
        mean = mean.to(torch.promote_types(mean.dtype, torch.float32))
        if self.log_std is None:
            return mean, torch.full_like(mean, LOG_OF_NO_SPREAD)
        return mean, self.log_std(inner).to(mean.dtype)

    def forward(self, hidden: Tensor, noise: Tensor | None = None) -> Tensor:
        """The next latent input `(.., d)`; `noise` `(.., d)` is standard normal, None: 0."""
        mean, log_std = self.distribution(hidden)
        return self.embedding_std * (
            mean if noise is None else mean + log_std.exp() * noise.to(mean)
        )


def log_density(latents: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Mean over the features `(..)` of the log density of `latents` `(.., d)` in units of s.

    A mean, as in CoLaR's RL: a ratio of such densities is the d-th root of the true ratio.
    """
    deviation = (latents - mean) / log_std.exp()
    return (-deviation.square() / 2 - log_std - LOG_TWO_PI / 2).mean(-1)


def noise_of(
    settings: LatentSettings | None, prompts: Sequence[Sequence[int]], size: int
) -> LatentNoise | None:
    """The noise of the rows that continue prompts, whose ids are their keys; None where the latent
    inputs are their means. `size` is d."""
    if settings is None or not settings.latent_noise:
        return None
    keys = [str(list(prompt)) for prompt in prompts]
    return LatentNoise(settings.noise_seed, keys, size, settings.latent_noise)


class LatentNoise:
    """Standard normal numbers for the latent steps of R rows: a stream of its own for each row.

    A row's numbers are a function of `seed` and its key alone, whatever rows stand beside it.
    `scale` is a factor on all of them.
    """

    def __init__(self, seed: int, keys: Sequence[str], size: int, scale: float = 1.0) -> None:
        self._size, self._scale = size, scale
        self._streams = [
            torch.Generator().manual_seed(seed_for(seed, LATENT_NOISE.format(row=key)))
            for key in keys
        ]

    def next(self, rows: Sequence[int] | None = None) -> Tensor:
        """The next numbers `(R, d)`, on the host, of some rows (None: all)."""
        chosen = range(len(self._streams)) if rows is None else rows
        numbers = [torch.randn(self._size, generator=self._streams[row]) for row in chosen]
        return self._scale * torch.stack(numbers)
