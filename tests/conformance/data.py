"""Cases of `data/<tokenizer>/`: texts, ids, labels, maps, selection, splits, collation. Exact."""

from __future__ import annotations

import re
from collections.abc import Mapping
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
from tests.conformance.checks import Check, Checks
from tests.conformance.recording import Record, Vectors

INFORMATION = {"notes", "checks", "len_tokenizer", "rows", "eval_rows", "crafted"}
TRAINING_PREFIX, PROMPT_PREFIX = "Question: ", ""
SFT_SHARE, SEED, MAX_PROMPT_TOKENS = 0.85, 42, 100
# Not in the recorded settings: the public code always learns START unless all are masked (note 7).
LEARN_START = True

Example = PlainExample | LatentExample


# ------------------------------------------------------------- what belongs to a tokenizer's folder


def _folder(name: str) -> str:
    return "/".join(name.split("/")[:2])


def _tokenizer(vectors: Vectors, name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(vectors.folder(f"{_folder(name)}/tokenizer")))


def _expected(vectors: Vectors, name: str, key: str) -> Any:
    return vectors.file(f"{_folder(name)}/expected.json")[key]


def _rows(vectors: Vectors, name: str, key: str = "rows") -> list[Row]:
    """Recorded rows, empty answers too: the filter is tested here, not the reading."""
    return [
        Row(str(index), record["question"], tuple(record["steps"]), record["answer"])
        for index, record in enumerate(_expected(vectors, name, key))
    ]


def _slices(vectors: Vectors, name: str, sft_share: float) -> list[list[Row]]:
    """The rows of SFT and those of RL, shuffled."""
    rows = _rows(vectors, name)
    parts = split_positions(len(rows), sft_share, SEED)
    return [[rows[position] for position in part] for part in parts]


def _numeric(rows: list[Row]) -> list[Row]:
    return [row for row in rows if is_plain_number(row.answer, "public")]


def _encode(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, Any],
    max_tokens: int | None,
) -> list[tuple[Row, Example]]:
    """The rows that the settings keep, each with its example, as the training stages do it."""
    if settings["form"] not in ("cot", "no_cot", "latent"):
        raise ValueError(f"form {settings['form']!r} is not cot, no_cot or latent")
    kept = _numeric(rows)
    if settings["drop_negative_answers"]:
        kept = [row for row in kept if not is_negative(row.answer, "public")]
    texts = {key: settings[key] for key in ("natural_language", "drop_last_step")}
    steps = LatentSteps(
        factor=settings["steps_factor"] or 0,
        bias=settings["steps_bias"] or 0,
        min=settings["steps_min"],
        max=settings["steps_max"],
    )
    examples: list[Any] = sequences.encode_latent_rows(
        kept,
        tokenizer,
        steps=steps,
        prefix=TRAINING_PREFIX,
        reasonings=[
            "" if settings["form"] == "no_cot" else sequences.reasoning_text(row, **texts)
            for row in kept
        ],
        learn_start=LEARN_START,
        **{key: settings[key] for key in ("drop_last_step", "shift_target", "mask_latent_labels")},
    )
    if settings["form"] != "latent":  # text alone is the teacher's side
        examples = [example.teacher for example in examples]
    pairs = zip(kept, examples, strict=True)
    return [(row, example) for row, example in pairs if within_limit(example, max_tokens)]


def _encode_variant(vectors: Vectors, name: str, variant: str) -> list[tuple[Row, Example]]:
    settings = _expected(vectors, name, "variants")[variant]["settings"]
    tokenizer, limit = _tokenizer(vectors, name), settings["max_tokens"]
    return _encode(_rows(vectors, name), tokenizer, settings, limit)


def _ids(encoded: list[tuple[Row, Example]]) -> list[int]:
    return [int(row.id) for row, _ in encoded]


def _teacher(example: Example) -> PlainExample:
    return example.teacher if isinstance(example, LatentExample) else example


def _collate(examples: list[Any], pad_id: int) -> dict[str, Tensor]:
    collate = collate_latent if isinstance(examples[0], LatentExample) else collate_plain
    return collate(examples, pad_id=pad_id)


# ------------------------------------------------------------------------------------------- cases


def _special_tokens(vectors: Vectors, name: str, ids: Record) -> Checks:
    tokens = [token for token in sequences.SPECIAL_TOKENS if token in ids]
    own = _tokenizer(vectors, name).convert_tokens_to_ids(tokens)
    yield Check(name, own, [ids[token] for token in tokens])


def _token_id(vectors: Vectors, name: str, expected: int | None, which: str) -> Checks:
    yield Check(name, getattr(_tokenizer(vectors, name), which), expected)


def _variant(vectors: Vectors, name: str, entry: Record, variant: str) -> Checks:
    tokenizer, encoded = _tokenizer(vectors, name), _encode_variant(vectors, name, variant)
    kept = _ids(encoded)
    yield Check(f"{name}/selection", kept, entry["kept_row_indices"])
    dropped = [index for index in range(len(_rows(vectors, name))) if index not in set(kept)]
    yield Check(f"{name}/selection", dropped, entry.get("dropped_row_indices", dropped))
    texts = entry.get("texts_with_demarcators", [{}] * len(encoded))
    for (row, example), recorded in zip(encoded, texts, strict=True):
        pieces = {"full_text": _teacher(example)}
        if isinstance(example, LatentExample):
            pieces["full_latent_text"] = example.student
        for key in {"full_text", "full_latent_text"} & {*recorded}:
            own = tokenizer.decode(pieces[key].input_ids) if key in pieces else None
            text = recorded[key]
            if text is not None:
                text = tokenizer.decode(tokenizer(text.replace("<DEMARCATE>", ""))["input_ids"])
            yield Check(f"{name}/texts_with_demarcators", own, text, what=f"row {row.id}, {key}")
    for (row, example), recorded in zip(encoded, entry["examples"], strict=True):
        own, case = _collate([example], pad_id=0), f"{name}/examples"
        yield Check(case, {*own}, {*entry.get("columns", recorded)}, what="columns")
        own = {key: own[key][0] for key in own.keys() & recorded.keys()}
        yield Check(case, own, recorded, what=f"row {row.id}")


def _filter(vectors: Vectors, name: str, entry: Record) -> Checks:
    keep = is_plain_number(entry["answer"], "public")
    yield Check(name, keep, entry["keep"])
    keep = keep and not is_negative(entry["answer"], "public")
    yield Check(name, keep, entry.get("keep_with_remove_negative", keep), what="not negative")


def _lengths(
    vectors: Vectors, name: str, expected: list[int], student: str | None, variant: str
) -> Checks:
    examples = [example for _, example in _encode_variant(vectors, name, variant)]
    own = [len(example.student if student else _teacher(example)) for example in examples]
    yield Check(name, own, expected)


def _limit(vectors: Vectors, name: str, expected: list[int], limit: str) -> Checks:
    keys = _expected(vectors, name, "max_tokens_boundary")
    (variant,) = {key.partition("lengths_")[2] for key in keys if "lengths_" in key}
    settings = _expected(vectors, name, "variants")[variant]["settings"]
    encoded = _encode(_rows(vectors, name), _tokenizer(vectors, name), settings, int(limit))
    yield Check(name, _ids(encoded), expected)


def _sft_slice(vectors: Vectors, name: str, expected: list[int], percent: str) -> Checks:
    rows, _ = _slices(vectors, name, int(percent) / 100)
    # The slice is recorded for latent SFT, whose variants keep and drop the same rows.
    every = [variant["settings"] for variant in _expected(vectors, name, "variants").values()]
    latent = next(s for s in every if s["form"] == "latent" and s["drop_negative_answers"])
    encoded = _encode(rows, _tokenizer(vectors, name), latent, latent["max_tokens"])
    yield Check(name, _ids(encoded), expected)


def _evaluation_prompts(
    vectors: Vectors, name: str, expected: list[Record], kind: str, forced: str | None
) -> Checks:
    rows = _rows(vectors, name, "eval_rows")
    prompts = sequences.encode_prompts(
        rows,
        _tokenizer(vectors, name),
        prefix=PROMPT_PREFIX,
        latent=kind != "plain",
        forced_steps=None if forced is None else int(forced),
    )
    own = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "answer": row.answer}
        for row, ids in zip(rows, prompts, strict=True)
    ]
    yield Check(name, own, expected)


def _rl_prompts(
    vectors: Vectors, name: str, expected: list[Record], limit: str | None, percent: str | None
) -> Checks:
    """`prompt_id` counts the rows that pass the answer filter, long prompts included."""
    rows = _rows(vectors, name)
    if percent is not None:
        _, rows = _slices(vectors, name, 1 - int(percent) / 100)
    kept = _numeric(rows)
    prompts = sequences.encode_prompts(
        kept, _tokenizer(vectors, name), prefix=PROMPT_PREFIX, latent=True
    )
    own = [
        {"prompt": row.question + START, "label": row.answer, "prompt_id": index}
        for index, (row, prompt) in enumerate(zip(kept, prompts, strict=True))
        if len(prompt) <= int(limit or MAX_PROMPT_TOKENS)
    ]
    yield Check(name, own, expected)


def _split(vectors: Vectors, name: str, entry: Record, seed: str, count: str) -> Checks:
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
    for key in own.keys() & entry.keys():
        yield Check(name, own[key], entry[key], what=key)


def _collated(vectors: Vectors, name: str) -> Checks:
    expected = dict(vectors.file(name))
    variant, count = re.fullmatch(r".*/collated_(.+)_first(\d+)\.npz", name).groups()
    examples = [example for _, example in _encode_variant(vectors, name, variant)]
    # The public code has no padding token of its own: it pads with EOS.
    batch = _collate(examples[: int(count)], _expected(vectors, name, "eos_token_id"))
    own, types = ({key: str(array.dtype) for key, array in b.items()} for b in (batch, expected))
    yield Check(name, own, types, what="type")
    yield Check(name, batch, expected)


READERS = {
    "data/*/expected.json": {
        "special_token_ids": _special_tokens,
        "(bos_token_id|eos_token_id)": _token_id,
        "variants/(.+)": _variant,
        "filter_table/.+": _filter,
        r"max_tokens_boundary/final_(latent_)?lengths_(.+)": _lengths,
        r"max_tokens_boundary/kept_row_indices_by_max_tokens/(\d+)": _limit,
        r"eval_tokenised/(plain|append_start|override(\d+))": _evaluation_prompts,
        r"rl_train/(?:max_prompt_tokens_(\d+)|(?:rl_)?slice_(\d+)p)": _rl_prompts,
        r"(?:sft_)?slice_(\d+)p(?:_kept_row_indices_in_order)?": _sft_slice,
        r"shuffle_and_slice_seed(\d+)/(\d+)": _split,
    },
    "data/*/collated_*.npz": _collated,
}
