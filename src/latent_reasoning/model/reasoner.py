"""The latent reasoner: one latent forward around any Hugging Face causal language model.

Training, rollouts, evaluation and `ask` all use `LatentReasoner.advance`: it runs the input
embeddings of new columns through the base model's body on top of a growing key-value cache, with
positions that count real tokens only. `forward` runs a plan of such passes (`passes.py`) and
gathers their states back into the layout of the batch. Gradients flow through the whole latent
chain (conformance note 12).

B rows, T positions, W new columns, K cached columns, d hidden size, V vocabulary, L blocks.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from latent_reasoning.model.attention_source import AttentionSource
from latent_reasoning.model.bases import (
    adjusted_logits,
    check_length,
    check_supported,
    position_limit,
    scaled_rows,
)
from latent_reasoning.model.blocks import RowOrder, SharedPrefix, run_blocks, runs_directly
from latent_reasoning.model.filters import SRE, build_filter
from latent_reasoning.model.parts import Part, gather_states, join
from latent_reasoning.model.passes import Kind
from latent_reasoning.model.reading import Reading, ReasonerOutput, plan_prompts, plan_reading
from latent_reasoning.model.settings import Adapter, LatentSettings
from latent_reasoning.model.special_rows import (
    SpecialRows,
    embedding_matrix,
    ids_on,
    is_tied,
    moved_rows,
    token_id,
    vocabulary_logits,
)
from latent_reasoning.model.state import ReasoningState, in_order, tokens_first
from latent_reasoning.model.stop_rules import fixed_logits, marker_logits
from latent_reasoning.runtime.device import to_device
from latent_reasoning.runtime.graphs import CapturedParts, Sizes

PASS_COST = 600_000
"""Fixed overhead of a pass, in tokens, times the squared hidden size: a pass costs as much as 37
tokens at hidden size 128 and 2 at 576 (measured on a CPU)."""


class LatentReasoner(nn.Module):
    """A causal language model that reasons in hidden states; a plain one without `settings`.

    Parameters are named `base.*`, `recurrent_filter.*` and, where the special tokens' rows are
    modules, `special_rows.*`. Only `lora.py` attaches and merges `adapter`. The base has
    `position_limit` positions (None: no end); its own dropout works only with `base_dropout`. For
    graphs, batches are padded to few `sizes`; `compiled` is `runtime.compile`.
    """

    def __init__(self, base: PreTrainedModel, settings: LatentSettings | None) -> None:
        """Raises `UnsupportedBaseError` where `base` cannot be used."""
        super().__init__()
        check_supported(base)
        self.base = base
        self.settings = settings
        self.position_limit = position_limit(base)
        self.base_dropout = True
        self.captured, self.compiled, self.remembers = CapturedParts(), False, False
        self.sizes: Sizes | None = None
        self.recurrent_filter: nn.Module | None = None
        self.special_rows: SpecialRows | None = None
        self.adapter: Adapter | None = None
        if settings is not None:
            self.recurrent_filter = build_filter(settings, base)
            self.remembers = isinstance(self.recurrent_filter, AttentionSource)
            if settings.special_rows == "modules":
                weight = base.get_input_embeddings().weight
                self.special_rows = SpecialRows(weight.shape[1], is_tied(base)).to(weight)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.base.get_input_embeddings().weight.device

    def change_settings(self, **changes: Any) -> None:
        """Replace some of the latent settings; modules that were built from them do not change."""
        self.settings = dataclasses.replace(self.settings, **changes)

    def train(self, mode: bool = True) -> LatentReasoner:
        """Set train or eval mode; see `base_dropout`."""
        super().train(mode)
        if not self.base_dropout:
            for name, module in self.base.named_modules():
                module.training = mode and "lora_dropout" in name
        return self

    @property
    def pass_cost(self) -> float:
        """Fixed overhead of a pass: the number of tokens that could be read in that time."""
        return PASS_COST / self.base.config.hidden_size**2

    @property
    def allowance(self) -> float:
        """Padding in a pass that is not worth another one; on a GPU none is worth it."""
        return self.pass_cost if self.device.type == "cpu" else math.inf

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        output_hidden_states: bool = False,
        hidden_at: Tensor | None = None,
        prefix: ReasoningState | None = None,
    ) -> ReasonerOutput:
        """Hidden states of a batch `(B, T)`, latent steps included.

        `attention_mask` is 1 at tokens, 0 at padding. `hidden_at` `(B, T)` restricts
        `hidden_states` to some positions. `prefix` is a text that the rows continue, as returned by
        `read_prompts`; it does not change. Raises `ValueError` where a sequence is illegal.
        """
        continues = prefix is not None
        reading = plan_reading(
            self, input_ids, attention_mask, hidden_at=hidden_at, continues=continues
        )
        reading = to_device(reading, self.device)
        return self.run(reading, output_hidden_states=output_hidden_states, prefix=prefix)

    def run(
        self,
        reading: Reading,
        *,
        output_hidden_states: bool = False,
        prefix: ReasoningState | None = None,
    ) -> ReasonerOutput:
        """The forward of a planned batch that is on this device: the host waits for nothing."""
        cached = len(reading.passes) > 1
        _, last, every = self._run(reading, output_hidden_states, cached, prefix)
        shape, chosen = (*reading.kinds.shape, -1), reading.chosen
        last_hidden = gather_states(last, reading.index).view(shape)
        hidden_states = None
        if output_hidden_states:
            index = reading.index if chosen is None else chosen
            hidden_states = tuple(gather_states(layer, index) for layer in zip(*every, strict=True))
            if chosen is None:
                hidden_states = tuple(states.view(shape) for states in hidden_states)
        return ReasonerOutput(last_hidden, hidden_states, reading.kinds)

    def read(self, reading: Reading) -> ReasoningState:
        """Read planned prompts that are on this device; `last_hidden` is as they were planned."""
        state, last, _ = self._run(reading)
        state.last_hidden = None if reading.index is None else gather_states(last, reading.index)
        return state

    def read_prompts(self, input_ids: Tensor, attention_mask: Tensor) -> ReasoningState:
        """Read prompts `(B, T)`, which may hold latent steps; `last_hidden` is the state of each
        prompt's last token."""
        return self.read(to_device(plan_prompts(self, input_ids, attention_mask), self.device))

    def advance(
        self, state: ReasoningState, inputs_embeds: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Run new columns `(B, W, d)`, extend `state` by them and return their states `(B, W, d)`.

        `mask` `(B, W)` is False where a row has nothing in a column; None: True everywhere.
        """
        return self._advance(state, inputs_embeds, mask)[0]

    def read_tokens(
        self, state: ReasoningState, tokens: Tensor, *, thinking: bool = True
    ) -> Tensor:
        """Read one more token per row `(R,)`, extend `state` and return the new states `(R, d)`.

        The input of CONTINUE is the filtered state of the position before (docs/method.md,
        section 3); `thinking` False says that no token is CONTINUE.
        """
        inputs = self.embed(tokens)
        if self.settings is not None and thinking:
            is_step = tokens == self.settings.continue_id
            # On a GPU a look at the tokens would take longer than the filter.
            if tokens.device.type != "cpu" or is_step.any():
                latent = self.latent_input(state.last_hidden, state).to(inputs.dtype)
                inputs = torch.where(is_step.unsqueeze(-1), latent, inputs)
        return self.advance(state, inputs.unsqueeze(1))[:, -1]

    def branch(self, state: ReasoningState, order: RowOrder, mask: Tensor) -> ReasoningState:
        """New rows that continue `order.rows` `(R,)` of `state`, without copies of its columns.

        `mask` `(R, K)` says which of `state.mask`'s columns each new row sees: a row that leaves a
        shared latent trajectory early does not see the later steps.
        """
        if not runs_directly(self.base) or state.prefix is not None:
            return state.select(order.rows, mask)
        return ReasoningState.empty(mask, SharedPrefix.of(state.cache, order, mask))

    def embed(self, input_ids: Tensor) -> Tensor:
        """Input embeddings `(.., d)` of tokens; STOP reads END's row."""
        if self.settings is None:
            return self.base.get_input_embeddings()(input_ids)
        stop_id, end_id = self.settings.stop_id, self.settings.end_id
        input_ids = torch.where(input_ids == stop_id, end_id, input_ids)
        embeddings = self.base.get_input_embeddings()(input_ids)
        if self.special_rows is not None:
            for token in ("start", "end"):
                is_token = (input_ids == token_id(self.settings, token)).unsqueeze(-1)
                row = self.special_rows.input_row(token).to(embeddings.dtype)
                embeddings = torch.where(is_token, scaled_rows(self.base, row), embeddings)
        return embeddings

    def latent_input(self, hidden: Tensor, state: ReasoningState | None = None) -> Tensor:
        """The recurrent filter: state of one position -> input of the next, `(.., d)`; `state` is
        for one that samples, or attends to what was read before."""
        if isinstance(self.recurrent_filter, SRE):
            matrix = embedding_matrix(self.base, self.settings, self.special_rows)
            return self.recurrent_filter(hidden, self.vocabulary_logits, matrix)
        noise = None if state is None else state.noise
        further = state if self.remembers else noise
        return self.recurrent_filter(hidden, *([] if further is None else [further]))

    def _run(
        self,
        reading: Reading,
        output_hidden_states: bool = False,
        cached: bool = True,
        prefix: ReasoningState | None = None,
    ) -> tuple[ReasoningState, list[Tensor], list[tuple[Tensor, ...]]]:
        """Run planned passes: the state after them, and last and all states of each pass.

        States that are not needed of a first pass may be zero.
        """
        last, every, passes = [], [], reading.passes
        if prefix is None:
            state, hidden, hidden_states = self._begin(reading, output_hidden_states, cached)
            last.append(hidden)
            every.append(hidden_states)
            passes = passes[1:]
        else:
            state = prefix.fork()
        for step in passes:
            if step.rows is not None:
                state = state.select(step.rows)
            columns = []
            if step.latent:
                columns.append(self.latent_input(state.last_hidden, state).unsqueeze(1))
            if step.token_ids.shape[1]:
                columns.append(self.embed(step.token_ids))
            hidden, hidden_states = self._advance(
                state,
                columns[0] if len(columns) == 1 else torch.cat(columns, 1),
                step.mask,
                full=step.full,
                packed=step.packed,
                output_hidden_states=output_hidden_states,
            )
            last.append(hidden)
            every.append(hidden_states)
        return state, last, every

    def _begin(
        self, reading: Reading, output_hidden_states: bool, cached: bool
    ) -> tuple[ReasoningState, Tensor, tuple[Tensor, ...] | None]:
        """Run the first pass, of text alone, in parts of rows of similar length."""
        step = reading.passes[0]
        inputs_embeds = self.embed(step.token_ids)
        parts = []
        for part in reading.parts:
            mask = step.mask[part.rows, part.columns]
            state = ReasoningState.empty(mask)
            hidden, hidden_states = self._advance(
                state,
                inputs_embeds[part.rows, part.columns],
                mask,
                full=part.full,
                causal=part.causal,
                packed=step.packed,
                first_read=part.first_read,
                output_hidden_states=output_hidden_states,
                cached=cached,
            )
            hidden = functional.pad(hidden, (0, 0, part.first_read, 0))
            parts.append(Part(part.rows, part.columns, state, hidden, hidden_states))
        if len(parts) == 1:
            return state, hidden, hidden_states
        return join(parts, step.mask, full=step.full)

    def _advance(
        self,
        state: ReasoningState,
        inputs_embeds: Tensor,
        mask: Tensor | None = None,
        *,
        full: bool = False,
        causal: bool = False,
        packed: Tensor | None = None,
        first_read: int = 0,
        output_hidden_states: bool = False,
        cached: bool = True,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """As `advance`, but returns states from column `first_read` on only, and the states of all
        layers if asked for; `full` says that `mask` is True everywhere, `causal` that these are the
        first columns and no padding stands before a token; `packed` are the flat indices of tokens
        to be packed; `cached` False keeps no keys and values."""
        if mask is None:
            mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.bool, device=self.device)
            full = True
        state.full = state.full and full
        order = None
        if state.mask.shape[1] and not runs_directly(self.base):
            state.close_gaps()
            order = tokens_first(mask)
            if order is not None:
                inputs_embeds, mask = in_order(inputs_embeds, order), mask.gather(1, order)
        positions = state.append(mask)
        if self.position_limit is not None:
            check_length(self.base, self.position_limit, int(positions.max()) + 1)
        hidden, hidden_states = run_blocks(
            self.base,
            inputs_embeds,
            positions.clamp(min=0),
            state.mask,
            state.cache if cached else None,
            state.prefix,
            full=state.full or causal,
            packed=packed,
            first_read=first_read,
            output_hidden_states=output_hidden_states,
            compiled=self.compiled,
        )
        if self.remembers and cached:
            self.recurrent_filter.remember(hidden, state.cache)
        if order is not None:
            back = order.argsort(1)
            hidden = in_order(hidden, back)
            if hidden_states is not None:
                hidden_states = tuple(in_order(states, back) for states in hidden_states)
        state.last_hidden = hidden[:, -1] if hidden.shape[1] else None
        return hidden, hidden_states

    def stop_logits(self, hidden: Tensor) -> Tensor:
        """Stop head: `(.., d)` -> `(.., 2)`, logits of CONTINUE and STOP over its temperature."""
        if self.settings.detach_stop_head:
            hidden = hidden.detach()
        if self.settings.stop_rule == "marker":
            return marker_logits(self.vocabulary_logits(hidden), self.settings)
        if self.settings.stop_rule == "fixed":
            return fixed_logits(hidden)
        if self.special_rows is not None:
            rows = torch.stack([self.special_rows.output_row(t) for t in ("continue", "stop")])
        else:
            rows = self.base.get_output_embeddings().weight.index_select(0, self._stop_ids)
        bias = getattr(self.base.get_output_embeddings(), "bias", None)
        bias = None if bias is None else bias.index_select(0, self._stop_ids)
        logits = adjusted_logits(self.base, functional.linear(hidden, rows, bias))
        return logits / (self.settings.stop_head_temperature or 1.0)

    def logits(self, hidden: Tensor, kinds: Tensor | None = None) -> Tensor:
        """Next-token logits `(.., V)` of states `(.., d)` at positions of the given kinds `(..)`,
        which count for nothing in a plain language model.

        At THINKING positions all tokens but CONTINUE and STOP are -inf. Elsewhere those two and END
        are -inf, and after STOP so is START unless rethinking is allowed (conformance note 10).
        """
        logits = self.vocabulary_logits(hidden)
        if self.settings is None:
            return logits
        settings, minus_infinity = self.settings, float("-inf")
        thinking = (kinds == Kind.THINKING).unsqueeze(-1)
        logits = logits.masked_fill_(thinking, minus_infinity)
        logits[..., settings.end_id] = minus_infinity
        stop_logits = torch.where(thinking, self.stop_logits(hidden).to(logits), minus_infinity)
        logits.index_copy_(-1, self._stop_ids, stop_logits)
        if not settings.allow_rethinking:
            is_answer = kinds == Kind.ANSWER
            start = logits[..., settings.start_id].masked_fill(is_answer, minus_infinity)
            logits[..., settings.start_id] = start
        return logits

    def full_logits(self, output: ReasonerOutput) -> Tensor:
        """Logits `(B, T, V)` of every position."""
        return self.logits(output.last_hidden, output.kinds)

    @property
    def _stop_ids(self) -> Tensor:
        return ids_on(self.device, self.settings.continue_id, self.settings.stop_id)

    def vocabulary_logits(self, hidden: Tensor) -> Tensor:
        """Unmasked logits `(.., V)` of states `(.., d)`, whatever their positions."""
        return vocabulary_logits(self.base, self.settings, self.special_rows, hidden)

    def move_special_rows(self, to: Literal["embedding", "modules"]) -> None:
        """Move the special tokens' rows into the matrices or into modules of their own."""
        if self.settings.special_rows != to:
            self.special_rows = moved_rows(self.base, self.settings, self.special_rows)
            self.change_settings(special_rows=to)
