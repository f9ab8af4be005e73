"""CoLaR: groups of words, their losses, sampled chains, the policy, released weights."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from latent_reasoning.config import (
    Colar,
    Data,
    Model,
    Reward,
    RivalPolicyModel,
    Runtime,
    Training,
    UserError,
)
from latent_reasoning.data.dial.tokenizer import build_tokenizer, generated_texts
from latent_reasoning.data.rows import Row
from latent_reasoning.data.sequences import encode_prompts
from latent_reasoning.evaluation.evaluator import EvaluationSettings, evaluate, validate
from latent_reasoning.model.folder import load, load_tokenizer, save
from latent_reasoning.model.gaussian import LatentNoise
from latent_reasoning.model.generation import generate, generate_forced
from latent_reasoning.model.heads import decision_logits, greedy_stops
from latent_reasoning.model.self_check import check_model
from latent_reasoning.model.special_tokens import check_tokenizer, make_latent
from latent_reasoning.model.tensors import CheckpointError
from latent_reasoning.rivals.colar import colar_losses, group_embeddings
from latent_reasoning.rivals.colar_rl import ColarPolicyTask, score_chains
from latent_reasoning.rivals.colar_sft import ColarTask, collate_groups, grouped_examples
from latent_reasoning.rl import reward
from latent_reasoning.rl.prompts import rl_prompts
from latent_reasoning.rl.reward import Outcomes
from latent_reasoning.runtime.parallel import ALONE
from latent_reasoning.runtime.signals import TrainingInterruptedError
from latent_reasoning.training.gradients import accumulate_gradients
from tests.data.generated import generated_rows
from tests.model.models import build_base
from tests.runtime.trainings import half_are_right
from tests.training.tiny_training import assert_bitwise_equal, out_of_time, run, weights

SETTINGS = Colar(speeds=[1, 3], speed=3, speed_text=" at {speed}")
RELEASED = Path(__file__).parents[1] / "conformance" / "vectors" / "colar" / "model_mid"
FIT = Path(__file__).parents[3] / "shared" / "rivals" / "vectors" / "colar" / "model_fit"


@pytest.fixture(scope="module")
def rows():
    return generated_rows(24)


def build(architecture: str = "llama", **model):
    """A random latent reasoner with a Gaussian filter, and its tokenizer."""
    tokenizer = build_tokenizer(generated_texts(7))
    base = build_base(architecture, vocabulary=len(tokenizer)).float()
    torch.manual_seed(1)
    settings = Model(recurrent_filter="gaussian", filter_width=24, **model)
    reasoner = make_latent(base, tokenizer, settings)
    with torch.no_grad():  # as mean rows, both decisions would be equally likely
        matrix = base.get_output_embeddings().weight
        for token in (reasoner.settings.continue_id, reasoner.settings.stop_id):
            matrix[token] = torch.randn(matrix.shape[1])
    reasoner.change_settings(prompt_suffix=SETTINGS.speed_text, speed=SETTINGS.speed)
    return reasoner.eval(), tokenizer


def batch_of(rows, model, tokenizer, speed: str, size: int):
    examples = grouped_examples(rows, tokenizer, SETTINGS, Data())
    draws = [np.full(len(example.words), 0.6) for example in examples]
    return examples, collate_groups(examples, speed, size, draws, model.settings, 0)


def test_the_embeddings_std_is_that_of_the_words_before_mean_rows_are_added():
    model, _ = build()
    base = build_base(vocabulary=len(build_tokenizer(generated_texts(7)))).float()
    expected = base.get_input_embeddings().weight.std()
    torch.testing.assert_close(model.recurrent_filter.embedding_std, expected)


def test_a_group_is_the_sum_of_its_words_over_the_root_of_their_number():
    embedded = torch.randn(1, 5, 4)
    columns = torch.tensor([[2, 2, 2, 3, 9]])
    groups = group_embeddings(embedded, columns, 9, single=False)
    torch.testing.assert_close(groups[0, 2], embedded[0, :3].sum(0) / (3**0.5 + 1e-5))
    torch.testing.assert_close(groups[0, 3], embedded[0, 3] / (1 + 1e-5))
    assert not groups[0, [0, 1, 4, 5, 6, 7, 8]].any()
    mean = group_embeddings(embedded, columns, 9, single=False, pooling="mean")
    torch.testing.assert_close(mean[0, 2], embedded[0, :3].sum(0) / (3 + 1e-5))
    alone = torch.arange(5)[None]
    assert torch.equal(group_embeddings(embedded, alone, 5, single=True), embedded)


@pytest.mark.parametrize("stop_rule", ["head", "marker"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_one_parallel_pass_gives_the_losses_of_a_chain_read_step_by_step(
    rows, architecture, stop_rule
):
    model, tokenizer = build(architecture, stop_rule=stop_rule)
    settings = SETTINGS.model_copy(update={"latent_loss": "nll", "entropy_weight": -0.1})
    examples, batch = batch_of(rows[:3], model, tokenizer, "3", 3)
    losses = colar_losses(model, batch, settings)
    terms, latents, entropies, labels = [], [], [], 0
    special, head = model.settings, model.recurrent_filter
    excluded = [special.start_id, special.end_id, special.continue_id, special.stop_id]
    for example in examples:
        words = torch.from_numpy(example.words).long()
        groups = [model.embed(part).sum(0) / (len(part) ** 0.5 + 1e-5) for part in words.split(3)]
        ids = torch.from_numpy(example.prompts["3"]).long()[None]
        state = model.read_prompts(ids, torch.ones_like(ids))
        for place, group in enumerate([*groups, None]):
            hidden = state.last_hidden
            decision = decision_logits(model, hidden).log_softmax(-1)[0]
            terms.append(-decision[int(group is None)])
            end = model.embed(torch.tensor(special.stop_id))
            target = (end if group is None else group).detach() / head.embedding_std
            mean, log_std = head.distribution(hidden[0])
            normal = torch.distributions.Normal(mean, log_std.exp())
            latents.append(-normal.log_prob(target).mean())
            entropies.append(normal.entropy().mean())
            labels += 1
            if group is None:
                model.advance(state, end[None, None])
                break
            part = words.split(3)[place]
            logits = model.vocabulary_logits(hidden)[0].index_fill(
                0, torch.tensor(excluded), float("-inf")
            )
            terms.append(-logits.log_softmax(-1)[part[int(0.6 * len(part))]])
            model.advance(state, group[None, None])
        for token in example.answer.tolist():
            logits = model.logits(state.last_hidden, torch.tensor([3]))
            terms.append(functional.cross_entropy(logits, torch.tensor([token])))
            model.read_tokens(state, torch.tensor([token]))
            labels += 1
    torch.testing.assert_close(losses["ce_loss"], sum(terms) / labels, rtol=1e-4, atol=1e-5)
    expected = torch.stack(latents).mean()
    torch.testing.assert_close(losses["latent_loss"], expected, rtol=1e-4, atol=1e-5)
    expected = -0.1 * torch.stack(entropies).mean()
    torch.testing.assert_close(losses["entropy_loss"], expected, rtol=1e-4, atol=1e-5)


def test_the_marker_is_stop_against_all_other_words():
    model, _ = build(stop_rule="marker")
    hidden = torch.randn(50, 16)
    logits = model.vocabulary_logits(hidden)
    special = model.settings
    logits[:, [special.start_id, special.end_id, special.continue_id]] = float("-inf")
    stops = decision_logits(model, hidden).softmax(-1)[:, 1]
    torch.testing.assert_close(stops, logits.softmax(-1)[:, special.stop_id])
    greedy = greedy_stops(model, hidden, decision_logits(model, hidden))
    assert torch.equal(greedy, logits.argmax(-1) == special.stop_id)


def test_a_step_has_one_speed_and_its_words_do_not_depend_on_the_micro_batch(rows):
    model, tokenizer = build()
    tasks = [sft_task(model, tokenizer, rows, size) for size in (None, 3)]
    speeds = {tasks[0].speed_of(step) for step in range(20)}
    assert speeds == {(1, "1"), (3, "3")}
    foretold = []
    for task in tasks:
        batches = [planned.inputs for planned in task.micro_batches(4)]
        assert {batch.single for batch in batches} == {tasks[0].speed_of(4)[0] == 1}
        foretold.append(sorted(int(w) for batch in batches for w in batch.foretold[:, 2]))
    assert foretold[0] == foretold[1]


def test_the_loss_of_a_step_does_not_depend_on_its_micro_batches(rows):
    model, tokenizer = build()
    settings = SETTINGS.model_copy(update={"latent_loss": "nll", "entropy_weight": 0.5})
    losses = []
    for size in (None, 3):
        task = sft_task(model, tokenizer, rows, size, accumulation="tokens")
        task.settings = settings
        parts = [task.loss(batch) for batch in task.micro_batches(4)]
        weight = sum(part.weight for part in parts)
        losses.append(sum(part.loss * part.weight for part in parts) / weight)
    assert len({len(example.words) for example in task.examples}) > 1
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------- training


def sft_task(model, tokenizer, rows, micro_batch=None, **changes):
    values = {"steps": 6, "batch_size": 8, "learning_rate": 3e-3, "validate_every": 3}
    examples = grouped_examples(rows, tokenizer, SETTINGS, Data())
    settings = EvaluationSettings("Question: ", max_new_tokens=12)
    return ColarTask(
        "colar",
        model,
        examples,
        Training(**(values | changes)),
        Runtime(device="cpu", micro_batch_size=micro_batch),
        seed=3,
        pad_id=tokenizer.pad_token_id,
        validate=lambda: validate(model, tokenizer, rows[:2], settings, ALONE),
        settings=SETTINGS,
    )


def policy_task(model, tokenizer, rows, micro_batch=1, batch=2, **changes):
    values = {"from": "colar", "method": "colar", "group_size": 4, "max_new_tokens": 8}
    values |= {"max_latent_steps": 4, "loss": "grpo", "kl_weight": 0.0}
    entry = RivalPolicyModel(
        **values | changes,
        training=Training(steps=4, batch_size=batch, learning_rate=1e-3, validate_every=2),
        reward=Reward(penalty=0.0, bonus=None),
    )
    prompts = rl_prompts(
        rows, tokenizer, prefix="Question: ", max_prompt_tokens=None, suffix=model.settings.suffix
    )
    settings = EvaluationSettings("Question: ", max_new_tokens=8)
    return ColarPolicyTask(
        "colar-rl",
        model,
        tokenizer,
        prompts,
        entry,
        Runtime(device="cpu", micro_batch_size=micro_batch),
        seed=3,
        validate=lambda: validate(model, tokenizer, rows[:2], settings, ALONE),
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("make", [sft_task, policy_task])
def test_a_training_that_is_killed_resumes_to_the_same_bits(rows, tmp_path, architecture, make):
    model, tokenizer = build(architecture)
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    whole = make(first, tokenizer, rows)
    training = whole.training if make is sft_task else whole.entry.training
    training = training.model_copy(update={"select": "last"})
    run(tmp_path / "whole", whole, training, checkpoint_every=2)
    for _ in range(training.steps - 1):
        with pytest.raises(TrainingInterruptedError):
            run(
                tmp_path / "killed",
                make(copy.deepcopy(model), tokenizer, rows),
                training,
                checkpoint_every=2,
                stop=out_of_time(),
            )
    run(tmp_path / "killed", make(second, tokenizer, rows), training, checkpoint_every=2)
    assert_bitwise_equal(weights(first), weights(second))
    assert any(
        not torch.equal(before, after)
        for before, after in zip(model.parameters(), first.parameters(), strict=True)
    )


def test_training_lowers_the_loss(rows):
    model, tokenizer = build()
    task = sft_task(model, tokenizer, rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    _, batch = batch_of(rows, model, tokenizer, "3", 3)
    losses = []
    for _ in range(30):
        torch.manual_seed(0)
        loss, parts = task.program(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append({name: part.item() for name, part in parts.items()})
    for name in ("ce_loss", "latent_loss"):
        assert losses[-1][name] < 0.7 * losses[0][name]


# ---------------------------------------------------------------------------------------- samples


def test_sampled_latents_depend_on_the_seed_and_the_prompt_not_on_the_batch(rows):
    model, tokenizer = build(detach_stop_head=True)
    model.change_settings(latent_noise=1.0, noise_seed=5, max_latent_steps=4)
    prompts = encode_prompts(rows[:6], tokenizer, prefix="", latent=True, suffix=" at 3")
    options = {"max_new_tokens": 8, "eos_id": tokenizer.eos_token_id}

    def probabilities(batch_size):
        written = generate(model, prompts, batch_size=batch_size, **options)
        return [torch.tensor(row.stop_probabilities) for row in written]

    together, alone = probabilities(6), probabilities(1)
    for first, second in zip(together, alone, strict=True):
        torch.testing.assert_close(first, second)
    model.change_settings(noise_seed=6)
    changed = probabilities(6)
    assert any(
        len(first) != len(second) or not torch.allclose(first, second)
        for first, second in zip(together, changed, strict=True)
    )
    with pytest.raises(UserError, match="forced_steps: this model samples"):
        generate(model, [[*prompts[0], model.settings.continue_id]], batch_size=1, **options)
    end = [model.settings.stop_id]
    curve = generate_forced(model, prompts, end, last=2, batch_size=6, **options)
    assert [len(row) for row in curve] == [6, 6, 6]


def test_chains_are_scored_as_they_are_sampled(rows):
    model, tokenizer = build()
    model.change_settings(max_latent_steps=4)
    task = policy_task(model, tokenizer, rows)
    (batch, _) = task.micro_batches(0)
    tokens, densities = score_chains(model, batch.chains, batch.latents)
    row = int(batch.masks[1].sum(1).argmax())
    ids = batch.chains.input_ids[row][batch.chains.mask[row].bool()]
    first = (ids == model.settings.start_id).nonzero()[0, 0] + 1
    state = model.read_prompts(ids[None, :first], torch.ones(1, first, dtype=torch.long))
    head = model.recurrent_filter
    for step, token in enumerate(ids[first:].tolist()):
        hidden = state.last_hidden
        if token in (model.settings.continue_id, model.settings.stop_id):
            decision = decision_logits(model, hidden).log_softmax(-1)[0]
            expected = decision[int(token == model.settings.stop_id)]
        else:
            expected = model.logits(hidden, torch.tensor([3])).log_softmax(-1)[0, token]
        torch.testing.assert_close(tokens[row, step], expected, rtol=1e-4, atol=1e-5)
        if token == model.settings.continue_id:
            given = batch.latents[row, step]
            mean, log_std = head.distribution(hidden[0])
            normal = torch.distributions.Normal(mean, log_std.exp())
            expected = normal.log_prob(given / head.embedding_std).mean()
            torch.testing.assert_close(densities[row, step], expected, rtol=1e-4, atol=1e-5)
            model.advance(state, given[None, None])
        else:
            model.read_tokens(state, torch.tensor([token]))


def test_two_samples_of_a_question_have_latents_of_their_own(rows):
    model, tokenizer = build()
    (batch, _) = policy_task(model, tokenizer, rows).micro_batches(0)
    assert len(batch.latents) == 4
    assert not torch.allclose(batch.latents[0, 0], batch.latents[1, 0])


def test_rewards_of_a_group_may_be_shared_by_its_steps(rows):
    model, tokenizer = build()
    task = policy_task(model, tokenizer, rows, group_size=2, reward_per_step=True)
    yes = torch.tensor([True, True, False, True])
    outcomes = Outcomes(torch.ones(4, dtype=torch.bool), yes, torch.tensor([6, 4, 5, 2]))
    counts = torch.tensor([4, 2, 3, 0])
    assert task.earned(outcomes, counts).tolist() == [0.25, 0.5, 0.0, 1.0]


@pytest.mark.parametrize("loss", ["bnpo", "grpo", "dr_grpo"])
def test_micro_batches_change_neither_the_policy_s_loss_nor_its_gradient(rows, loss, monkeypatch):
    monkeypatch.setattr(reward, "judge_sample", half_are_right)
    results = []
    for size in (None, 1):
        model, tokenizer = build()
        task = policy_task(model.double(), tokenizer, rows, size, 8, loss=loss, group_size=2)
        values = accumulate_gradients(model, task, 0)
        results.append((values, [p.grad for p in model.parameters() if p.grad is not None]))
    (whole, gradients), (values, parts) = results
    for name in ("loss", "token_loss", "latent_loss", "reward", "reasoning_tokens"):
        assert values[name] == pytest.approx(whole[name], rel=1e-9), name
    assert max(gradient.norm() for gradient in gradients) > 1e-3
    for gradient, part in zip(gradients, parts, strict=True):
        torch.testing.assert_close(part, gradient, rtol=1e-9, atol=1e-12)


def test_a_sample_that_is_cut_off_while_it_thinks_has_no_score_for_what_nothing_read(rows):
    model, tokenizer = build()
    on = torch.tensor([0.0, -50.0])
    model.stop_logits = lambda hidden: on.expand(*hidden.shape[:-1], 2)
    task = policy_task(model, tokenizer, rows, max_latent_steps=None)
    (batch, _) = task.micro_batches(0)
    assert (batch.chains.input_ids[:, -8:] == model.settings.continue_id).all()
    assert batch.latents.shape[1] == 7
    tokens, densities = score_chains(model, batch.chains, batch.latents)
    assert (tokens.shape[1], densities.shape[1]) == (8, 7)
    assert (densities != 0).all()
    assert task.loss(batch).loss.isfinite()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speed": "fast"}, "'fast' is neither a number of words nor auto"),
        ({"speed": "auto"}, "speed: auto is in no prompt of the training"),
    ],
)
def test_a_speed_that_is_none_or_not_trained_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        Colar(**changes)
    assert Colar(speed="auto", auto_share=0.5).speed == "auto"


def test_noise_is_a_stream_of_its_own_for_each_row():
    both, one = LatentNoise(1, ["a", "b"], 5), LatentNoise(1, ["b"], 5, scale=2.0)
    first, second = both.next(), both.next([1])
    assert torch.equal(one.next(), 2 * first[1:])
    assert torch.equal(one.next(), 2 * second)
    assert not torch.equal(first[0], first[1])


# ------------------------------------------------------------------------------- released weights


def test_released_weights_are_read_written_and_read_again(tmp_path):
    model, tokenizer = load(RELEASED, "cpu"), load_tokenizer(RELEASED)
    assert model.settings.suffix == " Let's think step by step:(Thinking speed: 5)"
    save(model, tokenizer, tmp_path / "own", {"model": "colar"})
    again = load(tmp_path / "own", "cpu")
    assert again.settings == model.settings
    assert_bitwise_equal(weights(model), weights(again))
    assert load_tokenizer(tmp_path / "own").get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("colar.json", ("embeds_std", "std"), "unknown or missing keys: embeds_std, std"),
        ("colar.json", ("Question: {}", "Q: {}"), "does not begin with 'Question: {}'"),
        ("colar.json", ('"separator": "###"', '"separator": "1"'), "is not the token 397"),
        ("colar.json", ("48", "50"), "latent_head.safetensors: .*misshapen"),
    ],
)
def test_released_weights_that_differ_from_the_format_are_refused(tmp_path, file, change, message):
    folder = tmp_path / "released"
    shutil.copytree(RELEASED, folder)
    (folder / file).chmod(0o644)
    text = (folder / file).read_text()
    assert change[0] in text
    folder.chmod(0o755)
    (folder / file).write_text(text.replace(*change))
    with pytest.raises(CheckpointError, match=message):
        load(folder, "cpu")


@pytest.mark.skipif(not FIT.is_dir(), reason="only a selection of the recorded vectors is here")
def test_released_weights_answer_their_training_rows_through_our_evaluation():
    """The recorded greedy chains at speed 3: all eight rows are right after 6.875 latent steps."""
    recorded = json.loads((FIT.parent / "expected.json").read_text())
    case = recorded["generation"]["fit_c3_mean"]
    rows = [
        Row(name, texts["question"], tuple(texts["steps"]), texts["answer"])
        for name, texts in recorded["rows"].items()
        if name in case["rows"]
    ]
    model, tokenizer = load(FIT, "cpu"), load_tokenizer(FIT)
    check_tokenizer(tokenizer, model.base)
    check_model(model)
    model.change_settings(speed=3)
    settings = EvaluationSettings("Question: ", max_new_tokens=32, max_forced_steps=1)
    evaluation = evaluate(model, tokenizer, rows, settings)
    assert [prediction.correct for prediction in evaluation.predictions] == [True] * 8
    steps = {p.id: p.latent_steps for p in evaluation.predictions}
    assert sum(steps.values()) / 8 == pytest.approx(sum(case["n_latents"]) / 8, abs=0.5)
    assert [point.n for point in evaluation.forced] == [8, 8]
