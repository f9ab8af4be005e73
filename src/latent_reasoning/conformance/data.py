"""Cases of `data/<tokenizer>/`: texts, ids, labels, maps, selection, splits, collation. Exact."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from latent_reasoning.config import LatentSteps
from latent_reasoning.conformance.cases import Case, check_equal, check_known
from latent_reasoning.data.answers import is_negative, is_plain_number
from latent_reasoning.data.collation import collate_latent, collate_plain
from latent_reasoning.data.examples import LatentExample, PlainExample, within_limit
from latent_reasoning.data.prepare import split_positions
from latent_reasoning.data.rows import Row
from latent_reasoning.data.sequences import (
    SPECIAL_TOKENS,
    START,
    encode_latent_rows,
    encode_prompts,
    reasoning_text,
)

TRAINING_PREFIX = "Question: "
PROMPT_PREFIX = ""
SFT_SHARE = 0.85
MAX_PROMPT_TOKENS = 100
SEED = 42
# Not in the recorded settings: the public code always learns START unless all are masked (note 7).
LEARN_START = True

SETTINGS = {
    "form",
    "natural_language",
    "drop_last_step",
    "steps_factor",
    "steps_bias",
    "steps_min",
    "steps_max",
    "mask_latent_labels",
    "shift_target",
    "drop_negative_answers",
    "max_tokens",
}
INFORMATION = {"checks", "notes", "eval_rows", "rows", "len_tokenizer"}
COLLATED = re.compile(r"collated_(?P<variant>.+)_first(?P<count>\d+)\.npz")
OVERRIDE = re.compile(r"override(?P<steps>\d+)")
SLICE = re.compile(r"(?P<part>sft|rl)?_?slice_(?P<percent>\d+)p(_kept_row_indices_in_order)?")
SHUFFLE = re.compile(r"shuffle_and_slice_seed(?P<seed>\d+)")
PROMPT_LIMIT = re.compile(r"max_prompt_tokens_(?P<limit>\d+)")


def cases(folder: Path) -> Iterator[Case]:
    """The cases of every tokenizer's folder."""
    for path in sorted(folder.iterdir()):
        yield from (
            _Recorded(path).cases() if path.is_dir() else [_not_understood(f"data/{path.name}")]
        )


def _kept(rows: list[Row], drop_negative: bool) -> list[Row]:
    """The rows that pass the filter of the training stages."""
    numeric = [row for row in rows if is_plain_number(row.answer)]
    return [row for row in numeric if not (drop_negative and is_negative(row.answer))]


def _not_understood(name: str) -> Case:
    def fail() -> None:
        raise ValueError("not understood: no kind of case has this name")

    return Case(name, fail)


class _Recorded:
    """One tokenizer's folder: `tokenizer/`, `expected.json` and collated batches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = f"data/{folder.name}"
        self.expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(str(self.folder / "tokenizer"))

    @cached_property
    def rows(self) -> list[Row]:
        return _rows(self.expected["rows"])

    def cases(self) -> Iterator[Case]:
        handlers: dict[str, Callable[[], Iterator[Case]]] = {
            "special_token_ids": self._special_tokens,
            "bos_token_id": partial(self._token_id, "bos_token_id"),
            "eos_token_id": partial(self._token_id, "eos_token_id"),
            "variants": self._variants,
            "filter_table": self._filter_table,
            "max_tokens_boundary": self._boundary,
            "eval_tokenised": self._evaluation_prompts,
            "rl_train": self._rl_prompts,
        }
        for key in self.expected:
            if key in handlers:
                yield from handlers[key]()
            elif SHUFFLE.fullmatch(key):
                yield from self._shuffle(key)
            elif SLICE.fullmatch(key):
                yield Case(f"{self.name}/{key}", partial(self._check_sft_slice, key))
            elif key not in INFORMATION:
                yield _not_understood(f"{self.name}/{key}")
        for path in sorted(self.folder.iterdir()):
            if COLLATED.fullmatch(path.name):
                yield Case(f"{self.name}/{path.name}", partial(self._check_collated, path))
            elif path.name not in ("tokenizer", "expected.json"):
                yield _not_understood(f"{self.name}/{path.name}")

    # ------------------------------------------------------------------------------- tokenizer

    def _special_tokens(self) -> Iterator[Case]:
        def check() -> None:
            ids = self.expected["special_token_ids"]
            check_known(ids, set(SPECIAL_TOKENS), "special_token_ids")
            check_equal({t: self.tokenizer.convert_tokens_to_ids(t) for t in ids}, ids, "ids")

        yield Case(f"{self.name}/special_token_ids", check)

    def _token_id(self, key: str) -> Iterator[Case]:
        def check() -> None:
            check_equal(getattr(self.tokenizer, key), self.expected[key], key)

        yield Case(f"{self.name}/{key}", check)

    # -------------------------------------------------------------------------------- variants

    def _variants(self) -> Iterator[Case]:
        for name in self.expected["variants"]:
            for what, check in (
                ("selection", self._check_selection),
                ("texts_with_demarcators", self._check_texts),
                ("examples", self._check_examples),
            ):
                yield Case(f"{self.name}/variants/{name}/{what}", partial(check, name))

    def _check_selection(self, name: str) -> None:
        variant = self._variant(name)
        kept = [int(row.id) for row, _ in self._encode(variant["settings"])]
        check_equal(kept, variant["kept_row_indices"], "kept_row_indices")
        if "dropped_row_indices" in variant:
            dropped = [index for index in range(len(self.rows)) if index not in set(kept)]
            check_equal(dropped, variant["dropped_row_indices"], "dropped_row_indices")

    def _check_examples(self, name: str) -> None:
        variant = self._variant(name)
        encoded = self._encode(variant["settings"])
        check_equal(len(encoded), len(variant["examples"]), "the number of examples")
        for (row, example), expected in zip(encoded, variant["examples"], strict=True):
            columns = _columns(example)
            check_equal(set(columns), set(variant.get("columns", expected)), "the set of columns")
            check_known(expected, set(columns), f"row {row.id}")
            for column, values in expected.items():
                check_equal(columns[column].tolist(), values, f"row {row.id}: {column}")

    def _check_texts(self, name: str) -> None:
        variant = self._variant(name)
        encoded = self._encode(variant["settings"])
        texts = variant.get("texts_with_demarcators", [])
        for (row, example), expected in zip(encoded, texts, strict=bool(texts)):
            check_known(expected, {"full_text", "full_latent_text"}, f"row {row.id}")
            latent = isinstance(example, LatentExample)
            pairs = {"full_text": example.teacher if latent else example}
            if latent:
                pairs["full_latent_text"] = example.student
            for key, text in expected.items():
                if text is None:
                    check_equal(key in pairs, False, f"row {row.id}: presence of {key}")
                else:
                    ids = self.tokenizer(text.replace("<DEMARCATE>", ""))["input_ids"]
                    check_equal(
                        self.tokenizer.decode(pairs[key].input_ids),
                        self.tokenizer.decode(ids),
                        f"row {row.id}: {key}",
                    )

    def _variant(self, name: str) -> dict[str, Any]:
        variant = self.expected["variants"][name]
        check_known(
            variant,
            {"settings", "kept_row_indices", "dropped_row_indices", "columns", "examples"}
            | {"texts_with_demarcators"},
            name,
        )
        return variant

    def _encode(
        self, settings: dict[str, Any], rows: list[Row] | None = None
    ) -> list[tuple[Row, PlainExample | LatentExample]]:
        """The rows that the settings keep, each with its example, as the training stages do it."""
        check_known(settings, SETTINGS, "settings")
        kept = _kept(self.rows if rows is None else rows, settings["drop_negative_answers"])
        form = settings["form"]
        if form not in ("cot", "no_cot", "latent"):
            raise ValueError(f"form {form!r} is not cot, no_cot or latent")
        # Text alone is the teacher's side: its settings are read there.
        pairs = encode_latent_rows(
            kept,
            self.tokenizer,
            prefix=TRAINING_PREFIX,
            reasonings=[
                ""
                if form == "no_cot"
                else reasoning_text(
                    row,
                    natural_language=settings["natural_language"],
                    drop_last_step=settings["drop_last_step"],
                )
                for row in kept
            ],
            steps=LatentSteps(
                factor=settings["steps_factor"] or 0,
                bias=settings["steps_bias"] or 0,
                min=settings["steps_min"],
                max=settings["steps_max"],
            ),
            drop_last_step=settings["drop_last_step"],
            shift_target=settings["shift_target"],
            mask_latent_labels=settings["mask_latent_labels"],
            learn_start=LEARN_START,
        )
        examples = pairs if form == "latent" else [pair.teacher for pair in pairs]
        return [
            (row, example)
            for row, example in zip(kept, examples, strict=True)
            if within_limit(example, settings["max_tokens"])
        ]

    # ------------------------------------------------------------------------ filters and limits

    def _filter_table(self) -> Iterator[Case]:
        for index, entry in enumerate(self.expected["filter_table"]):
            yield Case(f"{self.name}/filter_table/{index}", partial(_check_filter, entry))

    def _boundary(self) -> Iterator[Case]:
        recorded = self.expected["max_tokens_boundary"]
        for key in recorded:
            name = f"{self.name}/max_tokens_boundary/{key}"
            if match := re.fullmatch(r"final_(latent_)?lengths_(.+)", key):
                check = partial(self._check_lengths, key, bool(match[1]), match[2])
                yield Case(name, check)
            elif key == "kept_row_indices_by_max_tokens":
                for limit in recorded[key]:
                    yield Case(f"{name}/{limit}", partial(self._check_limit, limit))
            else:
                yield _not_understood(name)

    def _settings_named(self, name: str) -> dict[str, Any]:
        variants = self.expected["variants"]
        if name not in variants:
            raise ValueError(f"variant {name!r} is not in the file")
        return variants[name]["settings"]

    def _check_lengths(self, key: str, of_student: bool, variant: str) -> None:
        lengths = [
            len(example.student if of_student else _teacher(example))
            for _, example in self._encode(self._settings_named(variant))
        ]
        check_equal(lengths, self.expected["max_tokens_boundary"][key], key)

    def _check_limit(self, limit: str) -> None:
        recorded = self.expected["max_tokens_boundary"]
        named = {
            re.sub(r"final_(latent_)?lengths_", "", key) for key in recorded if "lengths" in key
        }
        if len(named) != 1:
            raise ValueError(f"the boundary table is of one variant, not of {sorted(named)}")
        settings = {**self._settings_named(named.pop()), "max_tokens": int(limit)}
        kept = [int(row.id) for row, _ in self._encode(settings)]
        check_equal(kept, recorded["kept_row_indices_by_max_tokens"][limit], "kept_row_indices")

    # ------------------------------------------------------------------------------------ prompts

    def _evaluation_prompts(self) -> Iterator[Case]:
        for kind in self.expected["eval_tokenised"]:
            yield Case(
                f"{self.name}/eval_tokenised/{kind}",
                partial(self._check_evaluation_prompts, kind),
            )

    def _check_evaluation_prompts(self, kind: str) -> None:
        override = OVERRIDE.fullmatch(kind)
        if not override and kind not in ("plain", "append_start"):
            raise ValueError(f"kind of prompt {kind!r} is not understood")
        rows = _rows(self.expected["eval_rows"])
        prompts = encode_prompts(
            rows,
            self.tokenizer,
            prefix=PROMPT_PREFIX,
            latent=kind != "plain",
            forced_steps=int(override["steps"]) if override else None,
        )
        entries = self.expected["eval_tokenised"][kind]
        for row, prompt, expected in zip(rows, prompts, entries, strict=True):
            check_known(expected, {"input_ids", "attention_mask", "answer"}, f"row {row.id}")
            check_equal(prompt, expected["input_ids"], f"row {row.id}: input_ids")
            check_equal([1] * len(prompt), expected["attention_mask"], f"row {row.id}: mask")
            check_equal(row.answer, expected["answer"], f"row {row.id}: answer")

    def _rl_prompts(self) -> Iterator[Case]:
        for kind in self.expected["rl_train"]:
            yield Case(f"{self.name}/rl_train/{kind}", partial(self._check_rl_prompts, kind))

    def _check_rl_prompts(self, kind: str) -> None:
        """`prompt_id` counts the rows that pass the answer filter, long prompts included."""
        rows, limit = self.rows, MAX_PROMPT_TOKENS
        if match := PROMPT_LIMIT.fullmatch(kind):
            limit = int(match["limit"])
        elif match := SLICE.fullmatch(kind):
            rows = self._slice("rl", 1 - int(match["percent"]) / 100, SEED)
        else:
            raise ValueError(f"kind of RL prompts {kind!r} is not understood")
        kept = _kept(rows, drop_negative=False)
        prompts = encode_prompts(kept, self.tokenizer, prefix=PROMPT_PREFIX, latent=True)
        actual = [
            {"prompt": row.question + START, "label": row.answer, "prompt_id": index}
            for index, (row, prompt) in enumerate(zip(kept, prompts, strict=True))
            if len(prompt) <= limit
        ]
        check_equal(actual, self.expected["rl_train"][kind], "prompts")

    # ------------------------------------------------------------------------------------- splits

    def _slice(self, part: str, sft_share: float, seed: int) -> list[Row]:
        sft, rl = split_positions(len(self.rows), sft_share, seed)
        return [self.rows[position] for position in (sft if part == "sft" else rl)]

    def _check_sft_slice(self, key: str) -> None:
        match = SLICE.fullmatch(key)
        assert match is not None
        rows = self._slice("sft", int(match["percent"]) / 100, SEED)
        # The slice is recorded for latent SFT, whose variants keep and drop the same rows.
        every = [variant["settings"] for variant in self.expected["variants"].values()]
        latent = [s for s in every if s["form"] == "latent" and s["drop_negative_answers"]]
        kept = [int(row.id) for row, _ in self._encode(latent[0], rows)]
        check_equal(kept, self.expected[key], key)

    def _shuffle(self, key: str) -> Iterator[Case]:
        match = SHUFFLE.fullmatch(key)
        assert match is not None
        for count, entry in self.expected[key].items():
            check = partial(_check_split, int(count), int(match["seed"]), entry)
            yield Case(f"{self.name}/{key}/{count}", check)

    # ---------------------------------------------------------------------------------- collation

    def _check_collated(self, path: Path) -> None:
        match = COLLATED.fullmatch(path.name)
        assert match is not None
        encoded = self._encode(self._settings_named(match["variant"]))
        examples: list[Any] = [example for _, example in encoded[: int(match["count"])]]
        collate = collate_latent if isinstance(examples[0], LatentExample) else collate_plain
        # The public code has no padding token of its own: it pads with EOS.
        batch = collate(examples, pad_id=self.expected["eos_token_id"])
        with np.load(path) as expected:
            check_equal(set(batch), set(expected.files), "the set of arrays")
            for name, values in batch.items():
                check_equal(
                    str(values.numpy().dtype), str(expected[name].dtype), f"dtype of {name}"
                )
                check_equal(values.tolist(), expected[name].tolist(), name)


def _rows(records: list[dict[str, Any]]) -> list[Row]:
    """Recorded rows, empty answers too: the filter is tested here, not the reading."""
    return [
        Row(str(index), record["question"], tuple(record["steps"]), record["answer"])
        for index, record in enumerate(records)
    ]


def _teacher(example: PlainExample | LatentExample) -> PlainExample:
    return example.teacher if isinstance(example, LatentExample) else example


def _columns(example: PlainExample | LatentExample) -> dict[str, np.ndarray]:
    """The example under the recorded names: a batch of one, without the batch."""
    batch = (
        collate_latent([example], pad_id=0)
        if isinstance(example, LatentExample)
        else collate_plain([example], pad_id=0)
    )
    return {name: values[0].numpy() for name, values in batch.items()}


def _check_filter(entry: dict[str, Any]) -> None:
    check_known(entry, {"answer", "keep", "keep_with_remove_negative"}, "entry")
    keep = is_plain_number(entry["answer"])
    check_equal(keep, entry["keep"], f"keep of {entry['answer']!r}")
    if "keep_with_remove_negative" in entry:
        keep = keep and not is_negative(entry["answer"])
        check_equal(keep, entry["keep_with_remove_negative"], f"keep of {entry['answer']!r}, >= 0")


def _check_split(count: int, seed: int, entry: dict[str, Any]) -> None:
    sft, rl = (part.tolist() for part in split_positions(count, SFT_SHARE, seed))
    actual: dict[str, Any] = {
        "n_sft": len(sft),
        "n_rl": len(rl),
        "disjoint": not set(sft) & set(rl),
        "union_is_all": set(sft) | set(rl) == set(range(count)),
        "equals_numpy_default_rng_42_permutation": True,
    }
    for key in entry:
        if match := re.fullmatch(r"(sft|rl)_(first|last)(\d+)", key):
            part, length = (sft if match[1] == "sft" else rl), int(match[3])
            actual[key] = part[:length] if match[2] == "first" else part[-length:]
    check_known(entry, set(actual), str(count))
    for key, value in entry.items():
        check_equal(actual[key], value, key)
