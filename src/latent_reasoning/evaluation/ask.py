"""Ask a model one question and see how it thinks.

    python -m latent_reasoning.ask MODEL_DIR "question"

prints the answer, the number of latent steps and the stop probability at each of them. A plain
language model's reasoning is printed as text.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from latent_reasoning.data.answers import find_number, in_our_words, split_completion
from latent_reasoning.data.context import decode
from latent_reasoning.data.rows import DataError, Row
from latent_reasoning.data.sequences import (
    SPECIAL_TOKENS,
    apply_special_token_policy,
    encode_prompts,
)
from latent_reasoning.evaluation.folder import add_reading_options, open_folder
from latent_reasoning.evaluation.latentseek import Seeking
from latent_reasoning.model.generation import Generation, generate
from latent_reasoning.model.latentseek import SeekingReasoner
from latent_reasoning.runtime.command import described, positive, run_stage
from latent_reasoning.runtime.device import autocast


def main(arguments: list[str] | None = None) -> None:
    """Answer one question."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.question.strip():
        parser.error("the question is empty")
    folder = open_folder(options.path, options)
    model, tokenizer = folder.model, folder.tokenizer
    latent = model.settings is not None
    question = Row(id="question", question=options.question, steps=None, answer="0")
    suffix = model.settings.suffix if latent else ""
    rows, _ = apply_special_token_policy([question], tokenizer, "escape")
    prompts = encode_prompts(rows, tokenizer, prefix=folder.prefix, latent=latent, suffix=suffix)
    with autocast(model.device, folder.precision):
        (generation,) = generate(
            model,
            prompts,
            max_new_tokens=options.max_new_tokens,
            eos_id=tokenizer.eos_token_id,
            batch_size=1,
        )
        if isinstance(model, SeekingReasoner):
            if model.seek_settings.reward == "oracle":
                raise DataError(f"{options.path}: its oracle needs the right answer: evaluate it")
            how = Seeking(model, tokenizer, rows, prompts, options.max_new_tokens, 1, "exact")
            (generation,) = how.improved([generation])
    text = decode(tokenizer, generation.ids)
    text = in_our_words(text, model.settings.answer_text if latent else None)
    print(answer_text(generation, text, tokenizer.eos_token, latent))


def answer_text(generation: Generation, text: str, eos_token: str, latent: bool) -> str:
    """The answer, and how the model came to it, for a reader."""
    text = text.removesuffix(eos_token)
    parts = split_completion(text)
    number = None if parts is None else find_number(parts[1])
    lines = [f"answer: {number}" if number is not None else "answer: none found"]
    if latent:
        lines.append(f"latent steps: {generation.latent_steps}")
        for step, (_, stop) in enumerate(generation.stop_probabilities):
            where = "before the first step" if step == 0 else f"after step {step}"
            lines.append(f"  p(stop) {where}: {stop:.4f}")
    written = text
    for token in SPECIAL_TOKENS if latent else ():
        written = written.replace(token, "")
    lines.append(f"text: {written.strip()}")
    if generation.cut_off:
        lines.append("(cut off at --max-new-tokens)")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = described(__doc__)
    parser.add_argument("path", type=Path, metavar="MODEL_DIR", help="model folder")
    parser.add_argument("question", help="the question")
    parser.add_argument("--max-new-tokens", type=positive, default=512, metavar="N")
    add_reading_options(parser)
    return parser


if __name__ == "__main__":
    run_stage(main)
