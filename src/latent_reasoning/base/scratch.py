"""The base model from scratch: a tiny one that learns to reason in text, tersely and verbosely.

It stands in for a pretrained language model in the laptop experiment. It reads the text of the SFT
rows in a mix of styles (`base.texts`) and learns all but the questions. The validation tests both
kinds of reasoning that the mix holds: each row is decoded greedily once after the beginning of its
equations and once after ` Results:`, and the lower accuracy counts. A base that can do only one of
them costs accuracy in every later stage.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from latent_reasoning.config import Architecture, Experiment, ReasoningMix
from latent_reasoning.data.dial.styles import RESULTS_PREFIX, styled_reasonings
from latent_reasoning.data.dial.tokenizer import build_tokenizer, generated_texts
from latent_reasoning.data.examples import PlainExample, short_enough
from latent_reasoning.data.rows import Row
from latent_reasoning.data.sequences import encode_plain_rows
from latent_reasoning.evaluation.evaluator import EvaluationSettings, validate
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.self_check import check_model
from latent_reasoning.runtime import seeds
from latent_reasoning.runtime.device import join_machine
from latent_reasoning.training.run import TrainingRun
from latent_reasoning.training.text import TextTask

VALIDATED_STYLES = {
    "full": ReasoningMix(full=1.0),
    "results_only": ReasoningMix(full=0.0, results_only=1.0),
}


def run(experiment: Experiment, seed: int, digest: str) -> None:
    """Train the base model on the rows `sft` and write its folder.

    `digest` is that of the stage's configuration. A killed run resumes from its last checkpoint.
    """
    machine = join_machine(experiment.runtime)
    TrainingRun(experiment, "base", seed, digest, machine).complete(base_task)


def base_task(run: TrainingRun) -> tuple[LatentReasoner, PreTrainedTokenizerBase, TextTask]:
    """The untrained base, its tokenizer and its task."""
    experiment, training = run.experiment, run.experiment.base.training
    tokenizer = build_tokenizer(generated_texts(experiment.data.generated.modulus))
    base = build_base(experiment.base.architecture, tokenizer)
    model = LatentReasoner(base, None).to(run.device)
    check_model(model)
    rows = run.training_rows(tokenizer)
    examples = encode_plain_rows(
        rows,
        tokenizer,
        prefix=experiment.data.prompt.training,
        reasonings=styled_reasonings(rows, experiment.base.texts, seed=run.seed),
    )
    if experiment.base.any_opening:
        examples = with_any_opening(
            examples, rows, tokenizer, share=experiment.base.any_opening, seed=run.seed
        )
    examples = short_enough(examples, experiment.data.max_tokens)
    longest = max(len(example) - example.question_length for example in examples)
    validation_rows = run.rows("validation", tokenizer)[: training.validation_rows]
    task = TextTask(
        run.name,
        model,
        examples,
        training,
        experiment.runtime,
        seed=run.seed,
        pad_id=tokenizer.pad_token_id,
        validate=_validation(run, model, tokenizer, validation_rows, 2 * longest),
        processes=run.processes,
    )
    return model, tokenizer, task


def with_any_opening(
    examples: Sequence[PlainExample],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    share: float,
    seed: int,
) -> list[PlainExample]:
    """Examples in which a share of the terse texts open with another token than ` Results:`.

    The token is drawn from the vocabulary without the special tokens, by the seed and the row's id.
    A model that has read such texts takes any unknown token after a question, a latent model's
    START among them, as the opening of terse working.
    """
    (opening,) = tokenizer(RESULTS_PREFIX, add_special_tokens=False)["input_ids"]
    choices = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    opened = []
    for example, row in zip(examples, rows, strict=True):
        generator = random.Random(seeds.seed_for(seed, seeds.ANY_OPENING.format(row=row.id)))
        first = example.question_length
        if example.input_ids[first] == opening and generator.random() < share:
            ids = example.input_ids.copy()
            ids[first] = generator.choice(choices)
            example = replace(example, input_ids=ids)
        opened.append(example)
    return opened


def build_base(shape: Architecture, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A causal LM of the given shape with random weights: seed first."""
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "max_position_embeddings": shape.max_position_embeddings,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "initializer_range": shape.initializer_range,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if shape.family == "gpt2":
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2LMHeadModel(GPT2Config(**common, **dropouts, n_inner=shape.intermediate_size))
    return LlamaForCausalLM(
        LlamaConfig(
            **common,
            intermediate_size=shape.intermediate_size,
            num_key_value_heads=shape.num_key_value_heads,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        )
    )


def _validation(
    run: TrainingRun,
    model: LatentReasoner,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_new_tokens: int,
) -> Callable[[], dict[str, float]]:
    """The accuracy after the first token of each style in the mix, and the lowest of these."""
    experiment = run.experiment
    settings = EvaluationSettings(
        prefix=experiment.data.prompt.training,
        max_new_tokens=max_new_tokens,
        batch_size=experiment.runtime.evaluation_batch_size,
        number_rule=experiment.data.number_rule,
    )
    beginnings = {
        style: _first_tokens(rows, tokenizer, mix)
        for style, mix in VALIDATED_STYLES.items()
        if getattr(experiment.base.texts, style)
    }

    def measure() -> dict[str, float]:
        decode = partial(validate, model, tokenizer, rows, settings, run.processes)
        by_style = {style: decode(first) for style, first in beginnings.items()}
        if not by_style:
            return decode()
        values = dict(min(by_style.values(), key=lambda v: v["validation_accuracy"]))
        for style, measured in by_style.items():
            values[f"validation_accuracy_{style}"] = measured["validation_accuracy"]
        return values

    return measure


def _first_tokens(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, mix: ReasoningMix
) -> list[list[int]]:
    """The first token of each row's reasoning in one style."""
    texts = styled_reasonings(rows, mix, seed=0)
    return [ids[:1] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
