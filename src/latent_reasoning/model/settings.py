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

    `prompt_suffix` stands after every question, with the model's `speed` in the place of `{speed}`
    (CoLaR). Latent inputs of the filter `gaussian` have `latent_noise` times their std where the
    model writes greedily (0: the mean), drawn from `noise_seed`. With `stop_rule: marker` the
    language-model head decides when to stop (`stop_rules.py`), by `marker_id` (None: STOP itself);
    with `fixed` there are `max_latent_steps` steps. The filter `mixture` mixes the `mixture_size`
    likeliest words (None: all) at `mixture_temperature`. `answer_text` announces the model's
    answers (None: ` The answer is:`).
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
    deterministic_latents: bool = False
    latent_noise: float = 0.0
    noise_seed: int = 0
    prompt_suffix: str = ""
    speed: int | str | None = None
    stop_rule: Literal["head", "marker", "fixed"] = "head"
    marker_id: int | None = None
    mixture_size: int | None = None
    mixture_temperature: float = 1.0
    answer_text: str | None = None

    @property
    def marker(self) -> int:
        """Id of the token that means STOP to the language-model head."""
        return self.stop_id if self.marker_id is None else self.marker_id

    @property
    def suffix(self) -> str:
        """The text after every question."""
        return at_speed(self.prompt_suffix, self.speed)


def at_speed(text: str, speed: int | str | None) -> str:
    """A text with a speed in the place of `{speed}`."""
    return text.replace("{speed}", str(speed))


@dataclass
class Adapter:
    """An attached adapter, and frozen copies of the latent modules as they were before it.

    `originals` are the float32 weights, on the host, of those that `frozen.py` holds in less.
    """

    lora: Lora
    reference: dict[str, nn.Module | None]
    originals: dict[str, Tensor] = field(default_factory=dict)
