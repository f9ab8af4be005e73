"""Mixtures of words: how they are cut, fed, learned and scored."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from latent_reasoning.config import (
    ConfigError,
    RivalPolicyModel,
    Runtime,
    TeacherForcedModel,
    Training,
)
from latent_reasoning.config.mixtures import MixtureTargets
from latent_reasoning.dag.cost import first_stage_steps
from latent_reasoning.model.filters import SRE, MixtureFilter
from latent_reasoning.model.latentseek import SeekingReasoner, SeekSettings
from latent_reasoning.model.mixtures import Mixture, drawn, entropy, likeliest, truncated
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings
from latent_reasoning.model.soft_thinking import SoftRows, SoftThinking
from latent_reasoning.model.special_rows import vocabulary_logits
from latent_reasoning.rivals.chains import Chains
from latent_reasoning.rivals.csft import aligned
from latent_reasoning.rivals.decode import DECODERS
from latent_reasoning.rivals.encoder_targets import FirstStage
from latent_reasoning.rivals.latent_encoder import CompressedBatch, Place, compressed_row
from latent_reasoning.rivals.mixture_sft import MixtureExample, MixtureTask, counted
from latent_reasoning.rivals.mts import MtsTask, StepPolicy, mean_embeddings, sample, score
from latent_reasoning.rl import reward
from latent_reasoning.rl.prompts import rl_prompts
from latent_reasoning.training.gradients import accumulate_gradients
from tests.model.models import (
    CONTINUE,
    EOS,
    START,
    STOP,
    build_base,
    build_reasoner,
    latent_example,
)
from tests.rl.conftest import generated_rows, latent_tokenizer, special_ids
from tests.runtime.trainings import half_are_right

P = torch.tensor([[0.5, 0.3, 0.15, 0.05]])


def test_distributions_lose_their_unlikely_words_and_are_normalised():
    assert truncated(P, 2, 1.0, 0.0)[0].tolist() == pytest.approx([0.625, 0.375, 0, 0])
    # 0.5 alone is less than 0.6: the second word is needed, the third is not.
    assert truncated(P, None, 0.6, 0.0)[0].tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert truncated(P, None, 1.0, 0.3)[0].tolist() == pytest.approx([10 / 19, 6 / 19, 3 / 19, 0])
    assert torch.equal(truncated(P, None, 1.0, 0.0), P)


def test_entropy_is_in_nats_and_zero_where_one_word_is_certain():
    certain = torch.tensor([[1.0, 0.0]])
    assert entropy(certain).item() == 0
    assert entropy(torch.full((1, 8), 1 / 8)).item() == pytest.approx(np.log(8), rel=1e-6)


def test_a_draw_takes_the_first_word_whose_cumulative_probability_exceeds_it():
    draws = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 0.999])
    assert drawn(P.expand(6, -1), draws).tolist() == [0, 0, 1, 1, 2, 3]
    no_first = torch.tensor([[0.0, 1.0]])
    assert drawn(no_first, torch.tensor([0.0])).tolist() == [1]


def test_a_mixture_of_all_words_is_soft_re_embedding():
    logits, matrix = torch.randn(3, 7), torch.randn(7, 5)
    expected = SRE()(logits, lambda hidden: hidden, matrix)
    for size in (None, 7, 9):
        mixed = MixtureFilter(size)(logits, lambda hidden: hidden, matrix)
        assert torch.allclose(mixed, expected, atol=1e-6)
    without = MixtureFilter(None, excluded=(2,))(logits, lambda hidden: hidden, matrix)
    logits[:, 2] = -torch.inf
    assert torch.allclose(without, SRE()(logits, lambda hidden: hidden, matrix), atol=1e-6)


def test_a_mixture_of_the_likeliest_words_is_a_softmax_among_them():
    mixture = likeliest(torch.tensor([1.0, 3.0, 2.0, -1.0]), 2, temperature=0.5)
    assert mixture.ids.tolist() == [1, 2]
    assert mixture.probabilities.tolist() == torch.tensor([6.0, 4.0]).softmax(-1).tolist()


def test_targets_count_words_the_commonest_first():
    probabilities, ids = counted([[5, 3, 5], [4]])
    assert ids.tolist() == [[5, 3], [4, 0]]
    assert np.allclose(probabilities, [[2 / 3, 1 / 3], [1, 0]])
    assert counted([[5, 3, 5]], size=1)[0].tolist() == [[1.0]]
    assert aligned([[1, 2], [3]], 3, after=9) == [[1, 3], [2, 9], [9, 9]]


def mixture_task(micro_batch: int | None, **settings) -> MixtureTask:
    model = build_reasoner(recurrent_filter="mixture", mixture_size=3)
    students = [
        latent_example([2, 3, 4 + i], [], n).student for i, n in enumerate((2, 4, 0, 1, 3, 2))
    ]
    generator = np.random.default_rng(0)
    examples = []
    for student in students:
        n = int(student.continue_map.sum())
        shares = generator.random((n, 3)).astype(np.float32)
        words = generator.integers(2, 20, (n, 3)).astype(np.int32)
        examples.append(MixtureExample(student, shares / shares.sum(-1, keepdims=True), words))
    return MixtureTask(
        "model",
        model,
        examples,
        Training(steps=1, batch_size=6),
        Runtime(micro_batch_size=micro_batch),
        seed=0,
        pad_id=0,
        validate=dict,
        **settings,
    )


@pytest.mark.parametrize("settings", [{}, {"adds_steps": True}, {"own_inputs": True}])
def test_gradients_do_not_depend_on_the_micro_batches(settings):
    gradients = []
    for size in (None, 2):
        task = mixture_task(size, **settings)
        values = accumulate_gradients(task.model.train(), task, 0)
        gradients.append([p.grad for p in task.model.parameters() if p.grad is not None])
        assert values["kl"] > 0
    for whole, parts in zip(*gradients, strict=True):
        assert torch.allclose(whole, parts, rtol=1e-5, atol=1e-7)


def test_the_loss_is_that_of_a_slow_loop_over_rows_and_steps():
    task = mixture_task(None)
    (planned,) = task.micro_batches(0)
    output = task.loss(planned)
    model, losses, labels = task.model, [], []
    for example in task.examples:
        ids = torch.tensor(example.student.input_ids).long()[None]
        inputs, divergences = model.embed(ids), []
        matrix = model.base.get_input_embeddings().weight
        for step, column in enumerate((ids[0] == CONTINUE).nonzero()[:, 0].tolist()):
            q = torch.tensor(example.probabilities[step]).double()
            inputs[0, column] = q @ matrix[torch.tensor(example.ids[step]).long()]
        hidden = model.base.model(inputs_embeds=inputs).last_hidden_state[0]
        for step, column in enumerate((ids[0] == CONTINUE).nonzero()[:, 0].tolist()):
            q = torch.tensor(example.probabilities[step]).double()
            words = torch.tensor(example.ids[step]).long()
            log_p = vocabulary_logits(model.base, model.settings, None, hidden[column - 1])
            log_p = log_p.log_softmax(-1)[words]
            divergences.append((q * (q.log() - log_p)).sum())
        losses.append(torch.stack(divergences).mean() if divergences else torch.zeros(()))
        labels.append(int((example.student.labels[1:] != -100).sum()))
    assert output.metrics["kl"].item() == pytest.approx((sum(losses) / 6).item(), rel=1e-6)
    assert sum(labels) > 0


def test_soft_thinking_is_refused_where_a_folder_says_how_it_is_decoded():
    """`load` would follow the parent's settings, and not those of Soft Thinking beside them."""
    model = SeekingReasoner(build_base(), SeekSettings())
    with pytest.raises(ConfigError, match=r"x is decoded in its own way; Soft Thinking is for"):
        DECODERS["soft_thinking"](None, None, model, "x")


def test_an_mts_sample_is_scored_as_it_was_drawn():
    model = build_reasoner(recurrent_filter="SRE", stop_rule="fixed", max_latent_steps=2)
    prompts = [[2, 3, START], [4, START], [5, 6, 7, START]]
    generator = torch.Generator().manual_seed(1)
    policy = StepPolicy(3)
    draws = torch.rand(3, 2, 3, generator=generator), torch.rand(3, 5, generator=generator)
    completions, drawn_words = sample(model, prompts, policy, *draws, EOS)
    chains = Chains.plan(prompts, completions, model.settings)
    of_tokens, of_steps = score(model, chains, drawn_words, policy)
    for row, prompt in enumerate(prompts):
        assert completions[row][:3] == (CONTINUE, CONTINUE, STOP)
        state = model.read_prompts(torch.tensor([prompt]), torch.ones(1, len(prompt)))
        for step in range(2):
            words = drawn_words[row, step]
            logits = vocabulary_logits(model.base, model.settings, None, state.last_hidden[0])
            expected = (logits / 3).log_softmax(-1)[words].sum()
            assert torch.allclose(of_steps[row, step], expected, rtol=1e-5)
            again = policy.draw(model, state.last_hidden, draws[0][row, step][None])
            assert torch.equal(again[0], words)
            model.advance(state, mean_embeddings(model, words)[None, None])
        token = STOP
        for place, drawn_token in enumerate(completions[row][3:], 3):
            hidden = model.read_tokens(state, torch.tensor([token]))
            logits = model.logits(hidden, torch.tensor([3]))
            token = drawn_token
            expected = logits.log_softmax(-1)[0, token]
            assert torch.allclose(of_tokens[row, place], expected, rtol=1e-5)
        assert (of_tokens[row, len(completions[row]) :] == 0).all()


def mts_task(size: int | None, loss: str) -> MtsTask:
    tokenizer = latent_tokenizer(3)
    special = LatentSettings(
        *special_ids(tokenizer), recurrent_filter="SRE", stop_rule="fixed", max_latent_steps=2
    )
    model = LatentReasoner(build_base(vocabulary=len(tokenizer)), special).double()
    rows, _ = generated_rows(8, 0, max_steps=2, modulus=3)
    entry = RivalPolicyModel(
        **{"from": "csft", "method": "mts", "loss": loss},
        training=Training(steps=1, batch_size=4, learning_rate=1e-3),
        group_size=8,
        max_new_tokens=24,
        kl_weight=0.0,
    )
    prompts = rl_prompts(rows, tokenizer, prefix="", max_prompt_tokens=None)
    runtime = Runtime(device="cpu", micro_batch_size=size)
    return MtsTask("mts", model, tokenizer, prompts, entry, runtime, seed=0, validate=dict)


@pytest.mark.parametrize("loss", ["bnpo", "grpo", "dr_grpo"])
def test_micro_batches_change_nothing_of_an_mts_step(loss, monkeypatch):
    monkeypatch.setattr(reward, "judge_sample", half_are_right)
    results = []
    for size in (None, 1):
        task = mts_task(size, loss)
        values = accumulate_gradients(task.model, task, 0)
        results.append((values, [p.grad for p in task.model.parameters() if p.grad is not None]))
    (whole, gradients), (values, parts) = results
    for name in ("loss", "reward", "rollout_accuracy"):
        assert values[name] == pytest.approx(whole[name], rel=1e-9), name
    assert max(gradient.norm() for gradient in gradients) > 1e-3
    for gradient, part in zip(gradients, parts, strict=True):
        assert torch.allclose(part, gradient, rtol=1e-9, atol=1e-12)


def test_ratios_of_words_multiply_or_have_their_root_taken():
    model, hidden = build_reasoner(recurrent_filter="SRE"), torch.randn(2, 16).double()
    words = torch.tensor([[3, 4], [5, 5]])
    logits = vocabulary_logits(model.base, model.settings, None, hidden)
    root = StepPolicy(2, "root").score(model, hidden, words)
    expected = logits.log_softmax(-1).gather(-1, words).mean(-1)
    assert torch.allclose(root, expected)
    divided = StepPolicy(2, temperature=0.5).score(model, hidden, words)
    assert torch.allclose(divided, expected * 2)


def test_the_end_of_thinking_is_written_from_where_it_has_begun():
    how = SoftThinking(end=(7, 8, 9), sure_below=100.0, patience=1)
    rows = SoftRows.begin(how, torch.tensor([[5, 7, 8], [5, 5, 5], [7, 8, 9]]), torch.ones(3, 3))
    assert rows.thinking.tolist() == [True, True, False]
    model = build_reasoner()
    model.settings, written = None, []
    for _ in range(3):
        step, rows = rows.choose(model, torch.randn(3, 16).double())
        written.append(step.token.tolist())
        assert not rows.thinking.any()
    assert [row[0] for row in written[:1]] == [9]
    assert [row[1] for row in written] == [7, 8, 9]


def test_a_mixture_that_ends_thinking_is_the_token_alone():
    how = SoftThinking(end=(7,), sure_below=100.0, patience=1, size=3)
    rows = SoftRows.begin(how, torch.tensor([[5]]), torch.ones(1, 1))
    model = build_reasoner()
    model.settings = None
    step, _ = rows.choose(model, torch.randn(1, 16).double())
    assert step.mixture.probabilities.tolist() == [[1.0, 0.0, 0.0]]
    assert step.mixture.ids[0, 0] == 7
    matrix = torch.eye(40)
    assert Mixture(step.mixture.probabilities, step.mixture.ids).embed(matrix)[0, 7] == 1


def test_the_encoder_compresses_after_every_rate_tokens_and_after_a_rest():
    row = compressed_row([1, 2], [11, 12, 13], [4], [5, 6], rate=2, compress_id=9)
    assert row.encoder_ids == [1, 2, 11, 12, 9, 13, 9, 4]
    assert row.decoder_ids == [1, 2, 9, 13, 9, 4, 5, 6]
    batch = CompressedBatch.of([row], 9, 0)
    assert batch.positions.tolist() == [[0, 1, 2, 3, 3, 4, 5, 6]]
    assert batch.places[0, 3] == Place.TEXT


def test_an_encoder_that_would_read_past_the_last_position_is_refused():
    model = build_reasoner("gpt2", recurrent_filter="mixture")  # 64 positions
    entry = SimpleNamespace(latent_sft=MixtureTargets(rate=1))
    run = SimpleNamespace(name="soft", entry=entry)
    plain = [latent_example([2] * 56, [], 0).teacher]
    rows = FirstStage.of(run, model, latent_tokenizer(7), plain, ["1+2"]).rows
    assert len(rows[0].encoder_ids) == 56 + 1 + 2 * 3 + 1
    with pytest.raises(ConfigError, match="up to 66 tokens, compress tokens included, past the 64"):
        FirstStage.of(run, model, latent_tokenizer(7), plain, ["1+2+"])


def test_the_first_stage_counts_as_training():
    settings = {"targets": "encoder", "encoder_steps": 200}
    training = Training(steps=600)
    entry = TeacherForcedModel(method="latent_sft", training=training, latent_sft=settings)
    assert first_stage_steps(entry) == 600
    assert first_stage_steps(TeacherForcedModel(method="latent_sft", training=training)) == 0
    assert first_stage_steps(entry.model_copy(update={"method": "csft"})) == 0
