"""What makes a language model a latent reasoner, and what an attached adapter is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from latent_reasoning.config import Lora


@dataclass(frozen=True)
class LatentSettings:
    """What makes a language model a latent reasoner (docs/method.md, section 3).

    `max_latent_steps` is the policy's bound on thinking: wherever the model samples, scores or
    writes, STOP is forced after this number of latent steps since the last START. None: STOP is
    never forced.
    """

    start_id: int
    end_id: int
    continue_id: int
    stop_id: int
    recurrent_filter: str = "MLP"
    stop_head_temperature: float | None = None
    detach_stop_head: bool = False
    allow_rethinking: bool = False
    special_rows: Literal["embedding", "modules"] = "embedding"
    max_latent_steps: int | None = None
    filter_width: int | None = None
    filter_norm: bool = True


@dataclass
class Adapter:
    """An attached adapter, and frozen copies of the latent modules as they were before it.

    `originals` are the float32 weights, on the host, of those that `frozen.py` holds in less.
    """

    lora: Lora
    reference: dict[str, nn.Module | None]
    originals: dict[str, Tensor] = field(default_factory=dict)
