"""Floating-point operations (FLOPs): those that a path executes, and the fewest that it needs.

Executed ones are counted by PyTorch as the matrix products run (a multiply-add is two; attention in
full, as torch's own formulas have it: causal masking saves nothing). Sums, norms and softmax count
nowhere.

The minimum is what a path without any overhead would execute: no padding, no distinct beginning of
an example's texts read twice, no state computed that nothing reads. With d the hidden size, V the
vocabulary, L blocks, H heads of size s, a position that sees n tokens (itself included) costs

    in each block   2 (W_kv + W_rest) + 4 H s n        weights of keys and values, and the others
    in the last one 2 W_kv only, where nothing reads the position's state
    latent step     2 W_filter (soft re-embedding: 4 d V)
    read out        2 d V where a token is chosen or learned, 4 d where a stop decision is

Backward takes twice the forward (a product for the inputs, one for the weights). Examples share
nothing with each other, however alike their questions begin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from latent_reasoning.data.examples import (
    IGNORED_LABEL,
    LatentExample,
    PlainExample,
    StudentExample,
)
from latent_reasoning.model.filters import SRE
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings

FORWARD, TRAINING = 1, 3
"""A forward, and a forward with its backward, in forwards."""

# ---------------------------------------------------------------------------------------- executed


def _attention(query, key, value, *arguments, **keywords) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient, query, key, value, *arguments, **keywords) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


ON_A_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""What torch's counter does not know."""


def executed(run: Callable[[], object]) -> int:
    """FLOPs of the matrix products that `run` executes, backward included."""
    with FlopCounterMode(display=False, custom_mapping=ON_A_CPU) as counter:
        run()
    return counter.get_total_flops()


# ----------------------------------------------------------------------------------------- minimum


class Needs(IntEnum):
    """What is read of the state at a position."""

    NOTHING = 0
    STATE = 1
    DECISION = 2
    VOCABULARY = 3


@dataclass(frozen=True)
class Text:
    """A sequence that a model reads, and what is needed at each of its positions."""

    ids: Sequence[int]
    needs: Sequence[Needs]


def answered(prompt: Sequence[int], answer: Sequence[int], special: LatentSettings) -> Text:
    """A prompt and what was written after it; the last token written is never read."""
    ids = [*prompt, *answer[:-1]]
    needs = [Needs.NOTHING] * (len(prompt) - 1)
    return Text(ids, [*needs, *(_read_out(token, special) for token in ids[len(prompt) - 1 :])])


def taught(example: LatentExample, special: LatentSettings) -> list[Text]:
    """Both sides of a row of latent SFT: labels, and the states that the distillation compares."""
    return [
        _labelled(example.teacher, special, reads_states=True),
        _labelled(example.student, special, reads_states=True),
    ]


def written(example: PlainExample, special: LatentSettings) -> Text:
    """A row of text that is learned as it stands."""
    return _labelled(example, special, reads_states=False)


def _labelled(example: PlainExample, special: LatentSettings, reads_states: bool) -> Text:
    ids = example.input_ids.tolist()
    follows = example.labels[1:] != IGNORED_LABEL
    states = [False] * len(ids)
    if reads_states:
        thinks = isinstance(example, StudentExample)
        reasoning = example.continue_map if thinks else example.reasoning_map
        states = (example.target_token_map | reasoning).tolist()
    needs = [Needs.STATE if state else Needs.NOTHING for state in states]
    for position in follows.nonzero()[0].tolist():
        needs[position] = _read_out(ids[position], special)
    length = 1 + max(position for position, need in enumerate(needs) if need)
    return Text(ids[:length], needs[:length])


def _read_out(token: int, special: LatentSettings) -> Needs:
    """What choosing or learning the token after this one needs."""
    thinking = token in (special.start_id, special.continue_id)
    return Needs.DECISION if thinking else Needs.VOCABULARY


def minimum(model: LatentReasoner, examples: Iterable[Sequence[Text]]) -> int:
    """FLOPs of one forward over the texts of all examples, each distinct beginning once."""
    costs = _Costs.of(model)
    return sum(
        costs.of_position(token, seen, needs)
        for texts in examples
        for token, seen, needs in _distinct(texts, model.settings)
    )


def _distinct(texts: Sequence[Text], special: LatentSettings) -> Iterable[tuple[int, int, Needs]]:
    """Token, tokens seen and needs of each distinct position: a tree of the texts' beginnings."""
    nodes: dict[tuple[int, int], int] = {}
    found: list[tuple[int, int, Needs]] = []
    for text in texts:
        node = -1
        followers = [*text.ids[1:], None]
        for seen, (token, needs, follower) in enumerate(
            zip(text.ids, text.needs, followers, strict=True), start=1
        ):
            if follower == special.continue_id:
                needs = max(needs, Needs.STATE)
            node = nodes.setdefault((node, token), len(found))
            if node == len(found):
                found.append((token, seen, needs))
            elif needs > found[node][2]:
                found[node] = (token, seen, needs)
    return found


@dataclass(frozen=True)
class _Costs:
    """FLOPs of a position's parts in a Llama-shaped model."""

    blocks: int
    keys_and_values: int
    rest: int
    attention: int
    latent_step: int
    decision: int
    vocabulary: int
    continue_id: int

    @classmethod
    def of(cls, model: LatentReasoner) -> _Costs:
        block, embedding = model.base.model.layers[0], model.base.get_input_embeddings().weight
        attention, hidden_size = block.self_attn, embedding.shape[1]
        keys_and_values = 2 * _weights(attention.k_proj, attention.v_proj)
        latent_step = 2 * _weights(model.recurrent_filter)
        if isinstance(model.recurrent_filter, SRE):
            latent_step = 4 * embedding.numel()
        return cls(
            blocks=len(model.base.model.layers),
            keys_and_values=keys_and_values,
            rest=2 * _weights(attention, block.mlp) - keys_and_values,
            attention=4 * attention.q_proj.weight.shape[0],
            latent_step=latent_step,
            decision=4 * hidden_size,
            vocabulary=2 * embedding.numel(),
            continue_id=model.settings.continue_id,
        )

    def of_position(self, token: int, seen: int, needs: Needs) -> int:
        """Of a position that sees so many tokens, itself included."""
        rest = self.rest + self.attention * seen
        flops = self.blocks * self.keys_and_values + (self.blocks - (not needs)) * rest
        flops += self.latent_step * (token == self.continue_id)
        read_out = {Needs.DECISION: self.decision, Needs.VOCABULARY: self.vocabulary}
        return flops + read_out.get(needs, 0)


def _weights(*modules: nn.Module) -> int:
    """Elements of the matrices of some modules."""
    parameters = (parameter for module in modules for parameter in module.parameters())
    return sum(parameter.numel() for parameter in parameters if parameter.ndim == 2)
