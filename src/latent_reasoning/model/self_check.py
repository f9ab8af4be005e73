"""A self-check of a model that is brought in: does the latent forward compute what it should?

Architectures differ in how they count positions, keep a cache, mask, scale and cap, and a wrong
guess gives wrong numbers without an error. So a model is held against slow and obvious computations
before anything is built on it:

1. its logits against those of `base(input_ids)`: for one row, for a padded batch of unlike lengths,
   and token by token on top of the cache;
2. the latent forward of rows with unlike numbers of steps, and rows that leave a shared trajectory
   (forced curves, samples), against a loop without cache, batch or padding;
3. an adapter: attached untrained it changes nothing; trained, saved, loaded and merged neither;
   with the recurrent filter and the special tokens' rows in use.

It takes seconds on a CPU: some forwards of at most 13 tokens. Of a large base, a copy of the first
two blocks and of some tokens' rows takes part 2; it always takes part 3. The model and the random
state do not change.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from latent_reasoning.config import Lora, UserError
from latent_reasoning.data.collation import pad_prompts
from latent_reasoning.model.attention_source import AttentionSource
from latent_reasoning.model.bases import CHOOSE
from latent_reasoning.model.filters import SRE, build_filter
from latent_reasoning.model.lora import (
    attach_lora,
    linear_modules,
    load_adapter,
    merge_lora,
    save_adapter,
    unreached_experts,
)
from latent_reasoning.model.passes import Kind
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings
from latent_reasoning.model.special_rows import is_tied
from latent_reasoning.model.state import ReasoningState
from latent_reasoning.model.trajectory import Trajectory
from latent_reasoning.runtime.files import first_line

TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
"""Largest differences by precision, as shares of the largest logit. Rounding stays far below (1e-5
is usual in float32), and the faults that this check looks for are far above."""

WHOLE_PARAMETERS = 100_000_000
"""Of larger bases a miniature takes the latent steps: a whole forward would take a second each."""

BLOCKS, TOKENS = 2, 60
"""Blocks and tokens of a miniature."""

SPECIAL_IDS = ("start_id", "end_id", "continue_id", "stop_id")


class SelfCheckError(UserError, ValueError):
    """A model gives other numbers than its own full forward; the message says where and why."""


def check_model(model: LatentReasoner) -> None:
    """Try all that the latent forward takes for granted; raises `SelfCheckError`."""
    base, settings = model.base, model.settings
    with _undisturbed(model), _failures_named(base):
        check_reading(base)
        whole = sum(parameter.numel() for parameter in base.parameters()) <= WHOLE_PARAMETERS
        if settings is not None:
            latent = _embedded(model)
            _check_latent(latent if model.special_rows is not None or not whole else model)
            _check_adapter(latent)
            return
        small = _miniature(base, _tokens(base, TOKENS))
        _check_latent(_latent(base if whole else small, "MLP"))
        # Soft re-embedding reads every row of both matrices, the special tokens' among them.
        _check_adapter(_latent(small, "SRE"))


def check_reading(base: PreTrainedModel) -> None:
    """Hold one row, a padded batch and reading on from a cache against `base(input_ids)`."""
    model = LatentReasoner(base, None).eval()
    with _undisturbed(model), _failures_named(base):
        rows = [_tokens(base, 9), _tokens(base, 14)[9:]]
        expected = [
            base(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[0]
            for row in rows
        ]
        ids, mask = (tensor.to(model.device) for tensor in pad_prompts(rows, pad_id=0))
        alone = model.full_logits(model(ids[:1], mask[:1]))
        _compare(
            "reading a text",
            "it does more between its last state and its logits, or before its first block, than "
            "is known here",
            alone[0],
            expected[0],
        )
        batch = model.full_logits(model(ids, mask))
        reason = "it counts padding"
        for found, row in zip(batch, expected, strict=True):
            _compare("reading prompts of unlike length", reason, found[-len(row) :], row)
        state = model.read_prompts(ids[:, :-2], mask[:, :-2])
        for column in (-2, -1):
            hidden = model.read_tokens(state, ids[:, column])
            found = model.logits(hidden, torch.full_like(ids[:, 0], int(Kind.TEXT)))
            reason = "it does not keep what it has read, or counts positions by itself"
            last = torch.stack([row[column] for row in expected])
            _compare("reading on from the cache", reason, found, last)


# ------------------------------------------------------------------------------- latent reasoning


def _check_latent(model: LatentReasoner) -> None:
    """Rows with unlike numbers of steps, and rows of one trajectory, against the slow loop."""
    rows = _latent_rows(model)
    expected = [_slow_logits(model, row.ids) for row in rows]
    ids, mask = pad_prompts([row.ids for row in rows], pad_id=0)
    output = model(ids.to(model.device), mask.to(model.device), output_hidden_states=True)
    reason = "its window or its bias counts empty columns"
    for found, row in zip(model.full_logits(output), expected, strict=True):
        _compare("rows with unlike numbers of latent steps", reason, found[-len(row) :], row)
    _check_states(model.base, output.hidden_states, output.last_hidden)
    trajectory = Trajectory.begin(model, [rows[0].prompt, rows[1].prompt])
    trajectory.extend(model, max(row.steps for row in rows))
    place = torch.tensor([row.place for row in rows], device=model.device)
    steps = torch.tensor([row.steps for row in rows], device=model.device)
    state = trajectory.leave(model, place, steps)
    answer = torch.tensor([row.answer for row in rows], device=model.device)
    hidden = model.advance(state, model.embed(answer))
    found = model.logits(hidden, torch.full_like(answer, int(Kind.ANSWER)))
    for own, row in zip(found, expected, strict=True):
        _compare("rows that leave a shared trajectory", reason, own, row[-answer.shape[1] :])


def _check_states(
    base: PreTrainedModel, states: Sequence[Tensor] | None, last_hidden: Tensor
) -> None:
    """Distillation compares the states of all blocks: L + 1 tensors of one shape."""
    shapes = {state.shape for state in states or ()}
    expected = base.config.num_hidden_layers + 1
    if states is None or len(states) != expected or shapes != {last_hidden.shape}:
        raise SelfCheckError(
            f"{type(base).__name__} fails the self-check: its layers' states are not "
            f"{expected} of one size; {CHOOSE}"
        )


@dataclass(frozen=True)
class _LatentRow:
    """A prompt (number `place` of two), `steps` times CONTINUE, then STOP and two tokens."""

    place: int
    prompt: list[int]
    steps: int
    answer: list[int]
    continue_id: int

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *[self.continue_id] * self.steps, *self.answer]


def _tokens(base: PreTrainedModel, count: int, other_than: Sequence[int] = ()) -> list[int]:
    """Tokens from inside the vocabulary, where rows are trained."""
    size = base.get_input_embeddings().weight.shape[0]
    return [token for token in range(size // 4, size) if token not in other_than][:count]


def _latent_rows(model: LatentReasoner) -> list[_LatentRow]:
    settings = model.settings
    special = [getattr(settings, name) for name in SPECIAL_IDS]
    tokens = _tokens(model.base, 9, other_than=special)
    prompts = [[*tokens[:6], settings.start_id], [*tokens[4:7], settings.start_id]]
    answer = [settings.stop_id, *tokens[7:9]]
    return [
        _LatentRow(place, prompts[place], steps, answer, settings.continue_id)
        for place, steps in ((0, 3), (1, 1), (0, 1))
    ]


def _slow_logits(model: LatentReasoner, ids: Sequence[int]) -> Tensor:
    """Logits (T, V) of one row by transformers' own forward, all read again for every step.

    Where a token is impossible at its position, the logit is minus infinity as in the reasoner.
    """
    base, settings, device = model.base, model.settings, model.device
    table, body = base.get_input_embeddings(), base.base_model
    inputs: list[Tensor] = []
    for token in ids:
        if token == settings.continue_id:
            read = body(inputs_embeds=torch.stack(inputs)[None], use_cache=False)
            inputs.append(_slow_filter(model, read.last_hidden_state[0]))
        else:
            token = settings.end_id if token == settings.stop_id else token
            inputs.append(table(torch.tensor(token, device=device)))
    logits = base(inputs_embeds=torch.stack(inputs)[None], use_cache=False).logits[0].clone()
    temperature = settings.stop_head_temperature or 1.0
    decisions = [settings.continue_id, settings.stop_id]
    answering = False
    for row, token in zip(logits, ids, strict=True):
        answering |= token == settings.stop_id
        stop_logits = row[decisions] / temperature
        if settings.stop_rule == "marker":
            special = [getattr(settings, name) for name in SPECIAL_IDS]
            left_out = torch.tensor([*special, settings.marker], device=device)
            words = row.index_fill(0, left_out, float("-inf"))
            stop_logits = torch.stack([words.logsumexp(0), row[settings.marker]])
        elif settings.stop_rule == "fixed":
            stop_logits = row.new_tensor([0.0, float("-inf")])
        if token in (settings.start_id, settings.continue_id):
            row.fill_(float("-inf"))
            row[decisions] = stop_logits
        else:
            row[[settings.end_id, *decisions]] = float("-inf")
            if answering and not settings.allow_rethinking:
                row[settings.start_id] = float("-inf")
    return logits


def _slow_filter(model: LatentReasoner, states: Tensor) -> Tensor:
    """The next input (d,) of a row whose states so far are (T, d)."""
    source, hidden = model.recurrent_filter, states[-1]
    if isinstance(source, AttentionSource):
        state = ReasoningState.empty(torch.empty(1, 0, dtype=torch.bool, device=states.device))
        source.remember(states[None], state.cache)
        return source(hidden[None], state)[0]
    if not isinstance(source, SRE):
        return source(hidden)
    table = model.base.get_input_embeddings()
    rows = table(torch.arange(table.weight.shape[0], device=states.device))
    # `check_reading` has held these logits against the base's own.
    return source(hidden, LatentReasoner(model.base, None).logits, rows)


# --------------------------------------------------------------------------------------- adapters


def _check_adapter(model: LatentReasoner) -> None:
    """Attach, train, save, load and merge an adapter; `model` is a copy, and changes."""
    names = linear_modules(model.base)
    names -= set(unreached_experts(model.base, names))
    lora = Lora(r=2, alpha=4, dropout=0.0, target_modules=sorted(names))
    fresh = copy.deepcopy(model)
    what = f"with the filter {model.settings.recurrent_filter}, an adapter"
    reason = "the special tokens' rows beside the matrices are not what they were in them"
    before = _logits_of_rows(model)
    attach_lora(model, lora)
    _compare(f"{what} attached untrained", reason, _logits_of_rows(model), before)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                spread = parameter.std(correction=0) + 1e-2
                parameter += 0.3 * spread * torch.randn_like(parameter)
    trained = _logits_of_rows(model)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, Path(folder), None)
        load_adapter(fresh, folder)
    loaded = _logits_of_rows(fresh.eval())
    _compare(f"{what} saved and loaded", "some of its tensors are lost", loaded, trained)
    merge_lora(model)
    reason = "its weights do not take the adapter's, or the special tokens' rows"
    _compare(f"{what} merged", reason, _logits_of_rows(model), trained)


def _logits_of_rows(model: LatentReasoner) -> Tensor:
    ids, mask = pad_prompts([row.ids for row in _latent_rows(model)], pad_id=0)
    output = model(ids.to(model.device), mask.to(model.device))
    return model.full_logits(output)[mask.bool()]


def _latent(base: PreTrainedModel, recurrent_filter: str) -> LatentReasoner:
    """A latent reasoner with four ordinary tokens from inside the vocabulary as special ones."""
    first = base.get_input_embeddings().weight.shape[0] // 2
    ids = {name: first + i for i, name in enumerate(SPECIAL_IDS)}
    settings = LatentSettings(**ids, recurrent_filter=recurrent_filter)
    return LatentReasoner(base, settings).eval()


def _embedded(model: LatentReasoner) -> LatentReasoner:
    """A miniature of a latent reasoner, with its special rows in the matrices."""
    ids = {name: getattr(model.settings, name) for name in SPECIAL_IDS}
    tokens = _tokens(model.base, TOKENS, other_than=[*ids.values()])
    body = model.base
    small = _miniature(body, [*tokens, *ids.values()])
    try:
        model.base = small
        copied = copy.deepcopy(model)
    finally:
        model.base = body
    own = {name: len(tokens) + i for i, name in enumerate(ids)}
    copied.change_settings(**own, marker_id=None)  # a marker of its own is not among these rows
    weights = copied.recurrent_filter.state_dict()
    copied.recurrent_filter = build_filter(copied.settings, small)  # for its ids and its blocks
    copied.recurrent_filter.load_state_dict(weights)
    copied.move_special_rows("embedding")
    return copied.eval()


def _miniature(base: PreTrainedModel, tokens: Sequence[int]) -> PreTrainedModel:
    """A copy of the first blocks of `base`, with the rows of some tokens alone."""
    count = base.config.num_hidden_layers
    lists = [
        (name, module)
        for name, module in base.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    table, head = base.get_input_embeddings(), base.get_output_embeddings()
    with contextlib.ExitStack() as stack:

        def replace_for_now(holder: Any, name: str, value: Any) -> None:
            stack.callback(setattr, holder, name, getattr(holder, name))
            setattr(holder, name, value)

        if count > BLOCKS and len(lists) == 1:
            parent, _, child = lists[0][0].rpartition(".")
            holder = base.base_model.get_submodule(parent)
            replace_for_now(holder, child, lists[0][1][:BLOCKS])
            replace_for_now(base.config, "num_hidden_layers", BLOCKS)
        rows = nn.Parameter(table.weight[[*tokens]])
        own = rows if is_tied(base) else nn.Parameter(head.weight[[*tokens]])
        if getattr(head, "bias", None) is not None:
            replace_for_now(head, "bias", nn.Parameter(head.bias[[*tokens]]))
        replace_for_now(table, "weight", rows)
        replace_for_now(head, "weight", own)
        replace_for_now(table, "padding_idx", None)
        replace_for_now(base.config, "vocab_size", len(tokens))
        return copy.deepcopy(base)


# --------------------------------------------------------------------------------------- verdicts


def _compare(what: str, reason: str, found: Tensor, expected: Tensor) -> None:
    """Raise `SelfCheckError` where logits differ by more than rounding or in which are infinite."""
    found, expected = found.detach(), expected.detach()
    if expected.isnan().any():
        raise SelfCheckError(f"{what}: its own full forward gives no numbers: damaged weights")
    possible = expected.isfinite()
    if torch.equal(found.isfinite(), possible):
        difference = float((found[possible] - expected[possible]).abs().max())
        largest = float(expected[possible].abs().max())
        if difference <= TOLERANCES[expected.dtype] * max(largest, 1e-3):
            return
        numbers = f"logits differ by {difference:.2g}, of at most {largest:.2g}"
    else:
        numbers = "other logits are infinite or not numbers"
    raise SelfCheckError(f"{what}: {numbers}, from its own full forward: {reason}")


@contextlib.contextmanager
def _failures_named(base: PreTrainedModel) -> Iterator[None]:
    """Any failure as a `SelfCheckError` that names the base."""
    name = f"{type(base).__name__} fails the self-check"
    try:
        yield
    except SelfCheckError as error:
        if str(error).startswith(name):
            raise
        raise SelfCheckError(f"{name}: {error}; {CHOOSE}") from None
    except Exception as error:
        raise SelfCheckError(
            f"{name}, which ended with {type(error).__name__}: {first_line(error)}; {CHOOSE}"
        ) from error


@contextlib.contextmanager
def _undisturbed(model: LatentReasoner) -> Iterator[None]:
    """Eval mode without gradients, and a random state of its own."""
    modes = {module: module.training for module in model.modules()}
    try:
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(0)
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
