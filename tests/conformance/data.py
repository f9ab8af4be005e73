"""Cases of `data/<tokenizer>/`: texts, ids, labels, maps, selection, splits, collation. Exact."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from latent_reasoning.config import LatentSteps
from latent_reasoning.data import sequences
from latent_reasoning.data.answers import START, is_negative, is_plain_number
from latent_reasoning.data.collation import collate_latent, collate_plain
from latent_reasoning.data.examples import LatentExample, PlainExample, within_limit
from latent_reasoning.data.prepare import split_positions
from latent_reasoning.data.rows import Row
from tests.conformance.checks import Check, Checks, Reader, recorded
from tests.conformance.recording import Record, Vectors

INFORMATION = {"notes", "checks", "len_tokenizer", "rows", "eval_rows", "crafted"}
TRAINING_PREFIX, PROMPT_PREFIX = "Question: ", ""
SFT_SHARE, SEED, MAX_PROMPT_TOKENS = 0.85, 42, 100
FORMS = ("cot", "no_cot", "latent")
# Not in the recorded settings: the public code always learns START unless all are masked (note 7).
LEARN_START = True

Example = PlainExample | LatentExample


class _Folder:
    """What belongs to a tokenizer's folder: its rows, and their examples in a recorded variant."""

    def __init__(self, vectors: Vectors, name: str) -> None:
        self.vectors, self.name = vectors, name
        self.expected = vectors.file(f"data/{name}/expected.json")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        path = self.vectors.folder(f"data/{self.name}/tokenizer")
        return AutoTokenizer.from_pretrained(str(path))

    def rows(self, key: str = "rows") -> list[Row]:
        """Recorded rows, empty answers too: the filter is tested here, not the reading."""
        return [
            Row(str(index), record["question"], tuple(record["steps"]), record["answer"])
            for index, record in enumerate(self.expected[key])
        ]

    def slices(self, sft_share: float) -> list[list[Row]]:
        """The rows of SFT and those of RL, shuffled."""
        rows = self.rows()
        parts = split_positions(len(rows), sft_share, SEED)
        return [[rows[position] for position in part] for part in parts]

    def encode(
        self, variant: str, rows: list[Row] | None = None, limit: int | None = None
    ) -> dict[int, Example]:
        """The rows that the variant's settings keep, by number, as the training stages do it."""
        settings = self.expected["variants"][variant]["settings"]
        form, masked = settings["form"], settings["drop_negative_answers"]
        if form not in FORMS:
            raise ValueError(f"form {form!r} is none of {FORMS}")
        kept = _numeric(self.rows() if rows is None else rows)
        kept = [row for row in kept if not (masked and is_negative(row.answer, "public"))]
        texts = {key: settings[key] for key in ("natural_language", "drop_last_step")}
        examples: list[Any] = sequences.encode_latent_rows(
            kept,
            self.tokenizer,
            steps=LatentSteps(
                **{key: settings[f"steps_{key}"] or 0 for key in ("factor", "bias")},
                **{key: settings[f"steps_{key}"] for key in ("min", "max")},
            ),
            prefix=TRAINING_PREFIX,
            reasonings=[
                "" if form == "no_cot" else sequences.reasoning_text(row, **texts) for row in kept
            ],
            learn_start=LEARN_START,
            **{k: settings[k] for k in ("drop_last_step", "shift_target", "mask_latent_labels")},
        )
        if form != "latent":  # text alone is the teacher's side
            examples = [example.teacher for example in examples]
        limit = settings["max_tokens"] if limit is None else limit
        pairs = zip(kept, examples, strict=True)
        return {int(row.id): example for row, example in pairs if within_limit(example, limit)}


def _numeric(rows: list[Row]) -> list[Row]:
    return [row for row in rows if is_plain_number(row.answer, "public")]


def _teacher(example: Example) -> PlainExample:
    return example.teacher if isinstance(example, LatentExample) else example


def _collate(examples: list[Any], pad_id: int) -> dict[str, Tensor]:
    collate = collate_latent if isinstance(examples[0], LatentExample) else collate_plain
    return collate(examples, pad_id=pad_id)


def _special_tokens(folder: _Folder, ids: Record) -> Checks:
    id_of = folder.tokenizer.convert_tokens_to_ids
    yield recorded({token: id_of(token) for token in sequences.SPECIAL_TOKENS}, ids)


def _token_id(folder: _Folder, expected: int | None, which: str) -> Checks:
    yield Check(getattr(folder.tokenizer, which), expected)


def _variant(folder: _Folder, entry: Record, variant: str) -> Checks:
    encoded, decode = folder.encode(variant), folder.tokenizer.decode
    dropped = [index for index in range(len(folder.rows())) if index not in encoded]
    kept = {"kept_row_indices": [*encoded], "dropped_row_indices": dropped}
    yield recorded(kept, entry, part="selection")
    texts = entry.get("texts_with_demarcators", [{}] * len(encoded))
    for example, text in zip(encoded.values(), texts, strict=True):
        student = example.student if isinstance(example, LatentExample) else None
        pieces = {"full_text": _teacher(example), "full_latent_text": student}
        for key in pieces.keys() & {*text}:
            own, expected = pieces[key] and decode(pieces[key].input_ids), text[key]
            if expected is not None:
                expected = decode(
                    folder.tokenizer(expected.replace("<DEMARCATE>", ""))["input_ids"]
                )
            yield Check(own, expected, part="texts_with_demarcators")
    for example, arrays in zip(encoded.values(), entry["examples"], strict=True):
        own = _collate([example], pad_id=0)
        yield Check({*own}, {*entry.get("columns", arrays)}, part="examples")
        yield recorded({key: array[0] for key, array in own.items()}, arrays, part="examples")


def _filter(_: _Folder, entry: Record) -> Checks:
    keep = is_plain_number(entry["answer"], "public")
    positive = keep and not is_negative(entry["answer"], "public")
    yield recorded({"keep": keep, "keep_with_remove_negative": positive}, entry)


def _lengths(folder: _Folder, expected: list[int], student: str | None, variant: str) -> Checks:
    examples = folder.encode(variant).values()
    yield Check([len(e.student if student else _teacher(e)) for e in examples], expected)


def _limit(folder: _Folder, expected: list[int], limit: str) -> Checks:
    keys = folder.expected["max_tokens_boundary"]
    (variant,) = {key.partition("lengths_")[2] for key in keys if "lengths_" in key}
    yield Check([*folder.encode(variant, limit=int(limit))], expected)


def _sft_slice(folder: _Folder, expected: list[int], percent: str) -> Checks:
    rows, _ = folder.slices(int(percent) / 100)
    # The slice is recorded for latent SFT, whose variants keep and drop the same rows.
    latent = next(
        key
        for key, variant in folder.expected["variants"].items()
        if variant["settings"]["form"] == "latent" and variant["settings"]["drop_negative_answers"]
    )
    yield Check([*folder.encode(latent, rows)], expected)


def _evaluation_prompts(
    folder: _Folder, expected: list[Record], kind: str, forced: str | None
) -> Checks:
    rows, steps = folder.rows("eval_rows"), None if forced is None else int(forced)
    style = {"prefix": PROMPT_PREFIX, "latent": kind != "plain", "forced_steps": steps}
    prompts = sequences.encode_prompts(rows, folder.tokenizer, **style)
    own = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "answer": row.answer}
        for row, ids in zip(rows, prompts, strict=True)
    ]
    yield Check(own, expected)


def _rl_prompts(
    folder: _Folder, expected: list[Record], limit: str | None, percent: str | None
) -> Checks:
    """`prompt_id` counts the rows that pass the answer filter, long prompts included."""
    rows = folder.rows() if percent is None else folder.slices(1 - int(percent) / 100)[1]
    kept = _numeric(rows)
    prompts = sequences.encode_prompts(kept, folder.tokenizer, prefix=PROMPT_PREFIX, latent=True)
    own = [
        {"prompt": row.question + START, "label": row.answer, "prompt_id": index}
        for index, (row, prompt) in enumerate(zip(kept, prompts, strict=True))
        if len(prompt) <= int(limit or MAX_PROMPT_TOKENS)
    ]
    yield Check(own, expected)


def _split(_: _Folder, entry: Record, seed: str, count: str) -> Checks:
    sft, rl = (part.tolist() for part in split_positions(int(count), SFT_SHARE, int(seed)))
    own: dict[str, Any] = {
        "n_sft": len(sft),
        "n_rl": len(rl),
        "disjoint": not set(sft) & set(rl),
        "union_is_all": {*sft, *rl} == set(range(int(count))),
        "equals_numpy_default_rng_42_permutation": True,
    }
    for key in entry:
        if match := re.fullmatch(r"(sft|rl)_(first|last)(\d+)", key):
            part, length = (sft if match[1] == "sft" else rl), int(match[3])
            own[key] = part[:length] if match[2] == "first" else part[-length:]
    yield recorded(own, entry)


def _collated(folder: _Folder, file: str, variant: str, count: str) -> Checks:
    expected = dict(folder.vectors.file(file))
    examples = [*folder.encode(variant).values()][: int(count)]
    # The public code has no padding token of its own: it pads with EOS.
    batch = _collate(examples, folder.expected["eos_token_id"])
    own, types = ({key: str(array.dtype) for key, array in b.items()} for b in (batch, expected))
    yield Check(own, types)
    yield Check(batch, expected)


def _in_folder(reader: Reader) -> Reader:
    """The reader with the tokenizer's folder in place of its name."""
    return lambda vectors, content, name, *groups: reader(_Folder(vectors, name), content, *groups)


READERS = {
    r"data/([^/]+)/expected\.json": {
        "special_token_ids": _in_folder(_special_tokens),
        "(bos_token_id|eos_token_id)": _in_folder(_token_id),
        "variants/(.+)": _in_folder(_variant),
        "filter_table/.+": _in_folder(_filter),
        r"max_tokens_boundary/final_(latent_)?lengths_(.+)": _in_folder(_lengths),
        r"max_tokens_boundary/kept_row_indices_by_max_tokens/(\d+)": _in_folder(_limit),
        r"eval_tokenised/(plain|append_start|override(\d+))": _in_folder(_evaluation_prompts),
        r"rl_train/(?:max_prompt_tokens_(\d+)|(?:rl_)?slice_(\d+)p)": _in_folder(_rl_prompts),
        r"(?:sft_)?slice_(\d+)p(?:_kept_row_indices_in_order)?": _in_folder(_sft_slice),
        r"shuffle_and_slice_seed(\d+)/(\d+)": _in_folder(_split),
    },
    r"data/([^/]+)/collated_(.+)_first(\d+)\.npz": {"": _in_folder(_collated)},
}
