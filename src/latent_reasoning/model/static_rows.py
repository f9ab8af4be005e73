"""Rows on a device that write tokens in steps of fixed shapes, which can be captured.

A step reads the last token of each row, chooses the next one, greedily or from uniform numbers, and
notes it. Keys and values lie in buffers that never move. Nothing in a step depends on values but
through the device's own arithmetic. The host's part is in `decoding.py`.

R rows, K columns, T tokens, d hidden size, V vocabulary, L blocks, G heads of keys of size s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from latent_reasoning.model.blocks import run_blocks
from latent_reasoning.model.cache import GrowingCache, StaticCache
from latent_reasoning.model.heads import CONTINUES, decision_logits, greedy_stops
from latent_reasoning.model.passes import Kind, SpecialIds
from latent_reasoning.model.projection import mixed_precision, weights_cast_once
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.runtime.device import to_device


@dataclass(frozen=True)
class Beginning:
    """What a row starts from: a `text`, which is read, and tokens that it has to write first.

    Rows that start from the same text share its reading. `draws` `(T,)` are uniform numbers in [0,
    1), from which the row is sampled.
    """

    text: tuple[int, ...]
    forced: tuple[int, ...] = ()
    draws: Tensor | None = None

    @classmethod
    def of(
        cls, special: SpecialIds | None, prompt: Sequence[int], draws: Tensor | None = None
    ) -> Beginning:
        """A prompt, of which the text before the first latent step or STOP is read."""
        ends = () if special is None else (special.continue_id, special.stop_id)
        length = next((i for i, token in enumerate(prompt) if token in ends), len(prompt))
        return cls(tuple(prompt[:length]), tuple(prompt[length:]), draws)


@dataclass(frozen=True)
class Writing:
    """How rows are written: until `eos_id`, at most `max_new_tokens` tokens.

    `temperature` None: greedily, otherwise sampled from the draws.
    """

    eos_id: int
    max_new_tokens: int
    temperature: float | None = None


@dataclass(frozen=True)
class Filling:
    """R' rows to be started: texts (P, W) to be read, padded on the right, and where they go.

    Row `rows[i]` continues text `text_of[i]`, has read `length[i]` tokens and reads `token[i]`
    next. `ids` (R', T + 1) holds what it has to write, -1 elsewhere, `draws` (R', T + 1) the number
    from which each token is sampled, if it is.
    """

    texts: Tensor
    text_of: Tensor
    rows: Tensor
    length: Tensor
    token: Tensor
    ids: Tensor
    limit: Tensor
    draws: Tensor

    @classmethod
    def plan(cls, rows: list[int], begun: Sequence[Beginning], tokens: int, new: int) -> Filling:
        """Plan it on the host; a row may write `new` tokens after its beginning."""
        distinct = {text: index for index, text in enumerate(dict.fromkeys(b.text for b in begun))}
        texts = torch.zeros(len(distinct), max(map(len, distinct)) - 1, dtype=torch.long)
        for text, index in distinct.items():
            texts[index, : len(text) - 1] = torch.tensor(text[:-1], dtype=torch.long)
        ids = torch.full((len(begun), tokens + 1), -1)
        for row, beginning in zip(ids, begun, strict=True):
            row[: len(beginning.forced)] = torch.tensor(beginning.forced, dtype=torch.long)
        draws = torch.zeros(ids.shape)
        for row, beginning in zip(draws, begun, strict=True):
            if beginning.draws is not None:
                first = len(beginning.forced)
                row[first : first + len(beginning.draws)] = beginning.draws
        return cls(
            texts,
            torch.tensor([distinct[b.text] for b in begun]),
            torch.tensor(rows),
            torch.tensor([len(b.text) - 1 for b in begun]),
            torch.tensor([b.text[-1] for b in begun]),
            ids,
            torch.tensor([len(b.forced) + new for b in begun]),
            draws,
        )


class Shape(NamedTuple):
    """Sizes of the buffers: R, K and T."""

    rows: int
    columns: int
    tokens: int

    def enclosing(self, other: Shape) -> Shape:
        """The smallest shape in which both fit."""
        return Shape(*map(max, self, other))


class CastWeights:
    """Weights cast once to the precision of autocast's products, which casts them in each step.

    Results are the same to the bit. Without autocast (`low` None) there is nothing to cast.
    """

    def __init__(self, modules: Iterable[nn.Module], low: torch.dtype | None) -> None:
        weights = [
            parameter
            for module in modules
            for parameter in module.parameters(recurse=False)
            if low is not None and parameter.dtype == torch.float32
        ]
        self._weights = list(dict.fromkeys(weights))
        self._casts = [weight.detach().to(low) for weight in self._weights]

    def refresh(self) -> None:
        """Cast them anew, in place."""
        if self._casts:
            torch._foreach_copy_(self._casts, [weight.detach() for weight in self._weights])

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """The modules compute with the casts; so does what is captured, from then on."""
        own = [weight.data for weight in self._weights]
        for weight, cast in zip(self._weights, self._casts, strict=True):
            weight.data = cast
        try:
            yield
        finally:
            for weight, data in zip(self._weights, own, strict=True):
                weight.data = data


class StaticRows:
    """R rows being written. One that is done does not change, whatever steps are made."""

    def __init__(self, model: LatentReasoner, how: Writing, shape: Shape) -> None:
        """Free rows."""
        self.model, self.how, self.shape = model, how, shape
        self.device = model.device
        rows, columns, tokens = shape
        config, matrix = model.base.config, model.base.get_input_embeddings().weight
        size = model.base.model.layers[0].self_attn.head_dim
        blocks = (len(model.base.model.layers), rows, config.num_key_value_heads, columns, size)

        def zeros(*sizes: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(sizes, dtype=dtype, device=self.device)

        low, head = mixed_precision(matrix), model.base.get_output_embeddings()
        linear = (m for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
        # The output matrix may be the input matrix too, which is read as it is.
        self.linear, self.head = CastWeights(linear, low), CastWeights([head], low)
        # Attention multiplies in autocast's precision whatever it is given.
        held = low or matrix.dtype
        self.keys, self.values = zeros(*blocks, dtype=held), zeros(*blocks, dtype=held)
        self.token, self.length, self.written, self.limit = (zeros(rows) for _ in range(4))
        self.kinds, self.run_steps = zeros(rows), zeros(rows)
        self.done = torch.ones(rows, dtype=torch.bool, device=self.device)
        self.hidden = zeros(rows, matrix.shape[1], dtype=matrix.dtype)
        # One column more than tokens: rows that are done write there.
        self.ids = zeros(rows, tokens + 1)
        self.probabilities = zeros(rows, tokens + 1, 2, dtype=torch.float32)
        self.draws = zeros(rows, tokens + 1, dtype=torch.float32)

    def fill(self, plan: Filling) -> None:
        """Read texts and start rows from them."""
        for weights in (self.linear, self.head):
            weights.refresh()
        plan = to_device(plan, self.device)
        width = plan.texts.shape[1]
        # Numbers of a row's last text that were not finite would reach what is masked.
        for buffer in (self.keys, self.values):
            buffer.index_fill_(1, plan.rows, 0)
        read = self._read_texts(plan.texts).layers if width else []
        for layer, entry in enumerate(read):
            for buffer, states in ((self.keys, entry.keys), (self.values, entry.values)):
                own = states.index_select(0, plan.text_of).to(buffer.dtype)
                buffer[layer, :, :, :width].index_copy_(0, plan.rows, own)
        kinds = torch.full_like(plan.token, int(Kind.TEXT))
        if self.model.settings is not None:
            is_start = plan.token == self.model.settings.start_id
            kinds = torch.where(is_start, int(Kind.THINKING), kinds)
        zeros = torch.zeros_like(kinds)
        for own, values in (
            (self.token, plan.token),
            (self.length, plan.length),
            (self.limit, plan.limit),
            (self.kinds, kinds),
            (self.written, zeros),
            (self.run_steps, zeros),
            (self.done, zeros.bool()),
            (self.ids, plan.ids),
            (self.draws, plan.draws),
        ):
            own.index_copy_(0, plan.rows, values)
        self.probabilities.index_fill_(0, plan.rows, 0)

    def step(self, columns: int) -> None:
        """Read the last token of each row, in the first `columns`, and write the next one."""
        # What others have cast before does not lie where a graph may read it.
        with weights_cast_once(), self.linear.used():
            hidden = self._read(columns)
        active = ~self.done
        at = torch.where(active, self.written, self.shape.tokens)[:, None]
        given = self.ids.gather(1, at)[:, 0]
        with self.head.used():
            chosen, probabilities = self._choose(hidden, at)
        token = torch.where(given >= 0, given, chosen)
        self.ids.scatter_(1, at, token[:, None])
        if probabilities is not None:
            index = at[..., None].expand(-1, -1, 2)
            self.probabilities.scatter_(1, index, probabilities[:, None])
        if self.model.settings is not None:
            kinds, steps = after_token(self.model.settings, self.kinds, self.run_steps, token)
            self.kinds.copy_(torch.where(active, kinds, self.kinds))
            self.run_steps.copy_(torch.where(active, steps, self.run_steps))
        self.hidden.copy_(torch.where(active[:, None], hidden, self.hidden))
        self.token.copy_(torch.where(active, token, self.token))
        self.length.add_(active)
        self.written.add_(active)
        ended = (token == self.how.eos_id) & (given < 0)
        self.done |= active & (ended | (self.written >= self.limit))

    def _read_texts(self, texts: Tensor) -> GrowingCache:
        """Read texts (P, W) that are padded on the right: causal attention needs no mask then."""
        width, cache = texts.shape[1], GrowingCache()
        run_blocks(
            self.model.base,
            self.model.embed(texts),
            torch.arange(width, device=texts.device).expand_as(texts),
            torch.ones_like(texts, dtype=torch.bool),
            cache,
            full=True,
            first_read=width,
            compiled=self.model.compiled,
        )
        return cache

    def _read(self, columns: int) -> Tensor:
        """States (R, d) of each row's last token, which becomes a column of its cache."""
        model, special = self.model, self.model.settings
        inputs = model.embed(self.token)
        if special is not None:
            latent = model.latent_input(self.hidden).to(inputs.dtype)
            is_step = self.token == special.continue_id
            inputs = torch.where(is_step[:, None], latent, inputs)
        at = self.length.clamp(max=columns - 1)
        mask = torch.arange(columns, device=self.device) <= at[:, None]
        cache = StaticCache(self.keys, self.values, at, columns)
        hidden, _ = run_blocks(
            model.base,
            inputs[:, None],
            self.length[:, None],
            mask,
            cache,
            compiled=model.compiled,
        )
        return hidden[:, -1]

    def _choose(self, hidden: Tensor, at: Tensor) -> tuple[Tensor, Tensor | None]:
        """Next tokens (R,) after states (R, d), and the probabilities (R, 2) of stop decisions
        where they are greedy: zero where none is made."""
        model, special = self.model, self.model.settings
        logits, draws = model.logits(hidden, self.kinds), self.draws.gather(1, at)
        is_greedy = self.how.temperature is None
        tokens = logits.argmax(-1) if is_greedy else self._sampled(logits, draws)
        if special is None:
            return tokens, None
        thinking, probabilities = self.kinds == Kind.THINKING, None
        if is_greedy:
            decisions = decision_logits(model, hidden)
            stops = greedy_stops(model, hidden, decisions)
            probabilities = torch.where(thinking[:, None], decisions.softmax(-1).float(), 0.0)
        else:
            decisions = decision_logits(model, hidden, self.how.temperature, torch.float64)
            stops = draws[:, 0] >= decisions.softmax(-1)[:, CONTINUES]
        if special.max_latent_steps is not None:
            stops |= self.run_steps >= special.max_latent_steps
        decided = torch.where(stops, special.stop_id, special.continue_id)
        return torch.where(thinking, decided, tokens), probabilities

    def _sampled(self, logits: Tensor, draws: Tensor) -> Tensor:
        """The first tokens (R,) whose cumulative probabilities exceed the draws (R, 1)."""
        cumulative = (logits.double() / self.how.temperature).softmax(-1).cumsum(-1)
        tokens = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
        # Weights that are not finite must not become an id that the device stops at.
        return tokens[:, 0].clamp(max=logits.shape[1] - 1)


def after_token(
    special: SpecialIds, kinds: Tensor, run_steps: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Kinds of the last positions and latent steps since START, all (R,), after one more token."""
    is_continue = tokens == special.continue_id
    is_thinking = is_continue | (tokens == special.start_id)
    after = torch.where(kinds == Kind.THINKING, int(Kind.ANSWER), kinds)
    kinds = torch.where(is_thinking, int(Kind.THINKING), after)
    return kinds, torch.where(is_continue, run_steps + 1, 0)
