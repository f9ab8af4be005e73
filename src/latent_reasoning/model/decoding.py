"""Tokens written by many rows at once: one step of fixed shapes, which a GPU repeats as a graph.

A step reads the last token of each row, chooses the next one, greedily or from uniform numbers, and
notes it, all on the device. The host repeats it `LOOK_EVERY` times, looks which rows are done,
takes what they wrote and gives them other texts. Keys and values lie in buffers that never move; of
their columns a step works on the first few, in buckets, so that few graphs are captured. Weights
may change in place between two calls: the graphs stay valid, and are kept with the model.

Elsewhere (a CPU, bases that are not run block by block, `runtime.cuda_graphs: off`) rows are
written one look a token (`generation.py`, `rl/rollouts.py`).

R rows, K columns, T tokens, d hidden size, V vocabulary, L blocks, G heads of keys of size s.
"""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from latent_reasoning.model.blocks import runs_directly
from latent_reasoning.model.gated import GatedReasoner
from latent_reasoning.model.projection import mixed_precision
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.static_rows import (
    Beginning,
    Filling,
    Shape,
    StaticRows,
    Writing,
)
from latent_reasoning.runtime.device import to_device
from latent_reasoning.runtime.graphs import Captured, bucket

LOOK_EVERY = 8
"""Tokens between two looks at the device: a look waits for all that was given to it."""

REFILL = 0.25
"""Share of the rows that must be free before more texts are read: a text's pass takes as long as
several tokens, whatever the number of its rows."""

FEWEST_COLUMNS = 64
"""Fewer columns than these are not worth a graph of their own."""


@dataclass(frozen=True)
class Written:
    """What a row wrote after its beginning: token ids, and the probabilities (p(continue), p(stop))
    at each of them, zero where no stop decision was made."""

    ids: list[int]
    probabilities: list[list[float]]


def can_be_captured(model: LatentReasoner) -> bool:
    """Whether the steps of a model wait for nothing: transformers' own forward looks at masks, and
    a rotation that changes with the length of the text (`position_limit`) at positions, a gate at
    the text, and a step that attends at all that was read."""
    plain = not (isinstance(model, GatedReasoner) or model.remembers)
    return plain and runs_directly(model.base) and model.position_limit is None


def decodes_statically(model: LatentReasoner) -> bool:
    """Whether `write` can be used and should be: on a GPU, unless the configuration says no, or
    latent inputs are sampled."""
    if model.settings is not None and model.settings.latent_noise:
        return False
    if not model.captured.wanted_on(model.device):
        return False
    if can_be_captured(model):
        return True
    _say_once(f"note: no CUDA graphs for {type(model.base).__name__}: tokens are written without")
    return False


@torch.no_grad()
def write(
    model: LatentReasoner, beginnings: Sequence[Beginning], how: Writing, rows: int
) -> list[Written]:
    """What the model writes after each beginning, about `rows` of them at a time.

    Model mode and autocast are the caller's. In train mode each row has dropout of its own, except
    in its text, which rows share.
    """
    if not beginnings:
        return []
    longest = max(len(b.forced) for b in beginnings) + how.max_new_tokens
    columns = max(len(b.text) + len(b.forced) for b in beginnings) - 1 + how.max_new_tokens
    shape = Shape(bucket(min(rows, len(beginnings))), _columns(columns), bucket(longest))
    return _decoder(model, how, shape).write(beginnings, how.max_new_tokens)


def _columns(count: int) -> int:
    return max(FEWEST_COLUMNS, bucket(count))


@functools.cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _decoder(model: LatentReasoner, how: Writing, shape: Shape) -> Decoder:
    """The model's decoder, a new one where the last does not fit: it sees no other weights."""
    purpose = "greedy" if how.temperature is None else "sampled"
    key = _what_is_captured(model, how)
    if purpose in model.captured:
        decoder: Decoder = model.captured[purpose]
        if decoder.key == key:
            shape = decoder.shape.enclosing(shape)
            if shape == decoder.shape:
                return decoder
        del decoder, model.captured[purpose]  # its memory is free before more is taken
    model.captured[purpose] = Decoder(model, how, shape, key)
    return model.captured[purpose]


def _what_is_captured(model: LatentReasoner, how: Writing) -> tuple[Any, ...]:
    """All that a step depends on but the values of tensors: where they lie, modes, settings."""
    tensors = (*model.parameters(), *model.buffers())
    places = tuple((tensor.data_ptr(), tensor.dtype, tensor.requires_grad) for tensor in tensors)
    low = mixed_precision(model.base.get_input_embeddings().weight)
    modes = (model.training, model.base_dropout, model.compiled, low)
    return model.settings, how.eos_id, how.temperature, modes, places


@dataclass
class _Row:
    """What the host knows of a row: tokens that it has read, and how many it may still write."""

    beginning: int
    length: int
    left: int


class Decoder:
    """The host's side of R rows: it repeats captured steps, and gives rows that are done others.

    `steps` counts the steps made so far.
    """

    def __init__(
        self,
        model: LatentReasoner,
        how: Writing,
        shape: Shape,
        key: tuple[Any, ...] = (),
    ) -> None:
        """`key` says what the captured steps depend on."""
        self.shape, self.key = shape, key
        self.rows = StaticRows(model, how, shape)
        self.steps = 0
        self._programs: dict[int, Captured[None]] = {}
        is_gpu = model.device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if is_gpu else None

    def write(self, beginnings: Sequence[Beginning], max_new_tokens: int) -> list[Written]:
        """What the rows write after each beginning, in their order."""
        self.rows.done.fill_(True)  # what an interrupted call has left
        results: dict[int, Written] = {}
        order = sorted(range(len(beginnings)), key=lambda i: -len(beginnings[i].text))
        waiting, active = deque(order), dict[int, _Row]()
        while waiting or active:
            free = [row for row in range(self.shape.rows) if row not in active]
            if len(free) >= min(len(waiting), REFILL * self.shape.rows) and waiting:
                chosen = [waiting.popleft() for _ in free[: len(waiting)]]
                begun = [beginnings[index] for index in chosen]
                rows = free[: len(chosen)]
                self.rows.fill(Filling.plan(rows, begun, self.shape.tokens, max_new_tokens))
                for row, index, one in zip(rows, chosen, begun, strict=True):
                    left = len(one.forced) + max_new_tokens
                    active[row] = _Row(index, len(one.text) - 1, left)
            self._advance(list(active.values()))
            done = self.rows.done.tolist()
            finished = {row: active.pop(row).beginning for row in list(active) if done[row]}
            results |= self._take(finished, beginnings)
        return [results[index] for index in range(len(beginnings))]

    def _advance(self, active: list[_Row]) -> None:
        """Make as many steps as the host does not have to look in between."""
        steps = min(LOOK_EVERY, max(row.left for row in active))
        columns = _columns(max(row.length + min(steps, row.left) for row in active))
        program = self._program(min(columns, self.shape.columns))
        for _ in range(steps):
            program.run()
        self.steps += steps
        for row in active:
            row.length, row.left = row.length + steps, row.left - steps

    def _program(self, columns: int) -> Captured[None]:
        if columns not in self._programs:
            # A capture makes steps to warm up: no row may move in them.
            done = self.rows.done.clone()
            self.rows.done.fill_(True)
            step = functools.partial(self.rows.step, columns)
            self._programs[columns] = Captured(step, self.rows.device, self._pool)
            self.rows.done.copy_(done)
        return self._programs[columns]

    def _take(
        self, finished: dict[int, int], beginnings: Sequence[Beginning]
    ) -> dict[int, Written]:
        """What finished rows wrote, by the places of their beginnings."""
        if not finished:
            return {}
        rows = to_device(torch.tensor(list(finished)), self.rows.device)
        ids = self.rows.ids.index_select(0, rows)[:, :-1].tolist()
        probabilities = self.rows.probabilities.index_select(0, rows).tolist()
        taken = {}
        for index, row, made in zip(finished.values(), ids, probabilities, strict=True):
            first = len(beginnings[index].forced)
            end = row.index(-1) if -1 in row else len(row)
            taken[index] = Written(row[first:end], made[first:end])
        return taken
