"""Cases of `hrpo/`: the gate, sampled and greedy generation, loss and gradients, the reward.

The public code scores without an attention mask (`attention: none`): padding is attended and counts
as positions. Here such prompts are read with their padding as tokens, by the same functions. Its
way to read numbers (the last one of a text, fractions, no thousands) is in this file alone.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from latent_reasoning.data.collation import pad_prompts
from latent_reasoning.model.base_files import load_base
from latent_reasoning.model.gated import Fed, GatedReasoner, GateSettings, ThinkingGate
from latent_reasoning.model.generation import generate
from latent_reasoning.model.marker import marker_table
from latent_reasoning.model.passes import Kind
from latent_reasoning.rivals.hrpo import (
    Sampled,
    completion_mask,
    completion_states,
    is_rewarded,
    sample,
    score,
)
from latent_reasoning.rl.grpo import advantages, policy_loss
from tests.conformance.checks import EXACT, Check, Checks, Tolerance
from tests.conformance.recording import Record, Vectors

INFORMATION = {"min_margin", "pad_token_id"}
GATE, MIXTURE = Tolerance(absolute=1e-6), Tolerance(absolute=1e-5)
LOGITS, LOSS = Tolerance(absolute=1e-4), Tolerance(absolute=1e-6)
GRADIENT = Tolerance(absolute=1e-10, relative=1e-4, by_norm=True)
GATE_NAMES = {"gate_r": "recurrence", "gate_i": "input", "Lambda.Lambda": "decay"}
"""Our names of the gate's recorded parts."""


# ------------------------------------------------------------------------------------------- gate


def _ours(name: str) -> str:
    return functools.reduce(lambda text, pair: text.replace(*pair), GATE_NAMES.items(), name)


def _gate(vectors: Vectors) -> ThinkingGate:
    tensors = load_file(vectors.folder("hrpo/model") / "gate.safetensors")
    gate = ThinkingGate(len(tensors["Lambda.Lambda"]))
    gate.load_state_dict({_ours(name): tensor for name, tensor in tensors.items()})
    return gate


def _begun(vectors: Vectors, entry: Record, kind: str) -> Checks:
    """Lambda drawn between two bounds, and the share kept at some r; or how many rows are gated."""
    if "n" in entry:
        yield Check(len(vectors.file(f"hrpo/gate_{kind}.npz")["embeds"]), entry["n"])
        return
    arrays = vectors.file("hrpo/lambda_init.npz")
    gate = ThinkingGate(len(arrays["uniform"]))
    gate.begin(entry["r_min"], entry["r_max"], std=0.02, uniform=arrays["uniform"])
    yield Check(gate.decay, arrays[f"{kind}_Lambda"], MIXTURE, "Lambda")
    kept = gate.kept(torch.tensor(entry["r"])[:, None])
    yield Check(kept, arrays[f"{kind}_a_at_r"], GATE, "kept")


def _gated(vectors: Vectors, file: str) -> Checks:
    arrays, gate = vectors.file(file), _gate(vectors)
    inputs = [arrays[name].clone().requires_grad_() for name in ("embeds", "residual")]
    output, kept = gate(*inputs)
    yield Check(output, arrays["output"], GATE, "output")
    yield Check(kept, arrays["a"], GATE, "kept")
    (output * arrays["cotangent"]).sum().backward()
    for name, tensor in zip(("embeds", "residual"), inputs, strict=True):
        yield Check(tensor.grad, arrays[f"grad_{name}"], GRADIENT, f"grad/{name}")
    for name in (name for name in arrays if name.startswith("grad/")):
        own = gate.get_parameter(_ours(name.removeprefix("grad/")))
        yield Check(own.grad, arrays[name], GRADIENT, name)


# ------------------------------------------------------------------------------------- generation


class _Model(NamedTuple):
    model: GatedReasoner
    texts: list[str]
    eos_id: int


def _model(vectors: Vectors, settings: GateSettings) -> _Model:
    folder = vectors.folder("hrpo/model")
    about = vectors.file("hrpo/model/hrpo.json")
    base, texts = load_base(folder), list(about["token_strings"])
    table = marker_table(texts, about["answer_start"])
    model = GatedReasoner(base, settings, _gate(vectors), table).eval().requires_grad_(True)
    return _Model(model, texts, about["eos_token_id"])


class _Replay:
    """A recorded generation done again, B prompts with one completion each."""

    def __init__(self, vectors: Vectors, kind: str) -> None:
        self.entry = vectors.file("hrpo/expected.json")["generation"][kind]
        self.arrays = vectors.file(f"hrpo/gen_{kind}.npz")
        settings = GateSettings(self.entry["temperature"], self.entry["top_k"])
        self.model, self.texts, self.eos_id = _model(vectors, settings)
        ids, mask = self.arrays["prompt_ids"], self.arrays["prompt_mask"].bool()
        self.padded, self.width = ids.tolist(), ids.shape[1]
        self.prompts = [row[read].tolist() for row, read in zip(ids, mask, strict=True)]

    def sampled(self) -> Sampled:
        return sample(self.model, self.prompts, self.arrays["u"][:, None], self.eos_id)

    def written(self) -> list[list[int]]:
        """Our completions, to EOS."""
        if not self.entry["greedy"]:
            return [list(c.ids) for c in self.sampled().rollout.completions]
        size = self.entry["max_new_tokens"]
        options = {"max_new_tokens": size, "eos_id": self.eos_id, "batch_size": len(self.prompts)}
        return [generation.ids for generation in generate(self.model, self.prompts, **options)]

    @torch.no_grad()
    def walk(self) -> tuple[list[Tensor], list[Fed]]:
        """What the recorded tokens are drawn from (C) and what is read of them (C - 1)."""
        ids, mask = pad_prompts(self.prompts, self.eos_id)
        state, probabilities, every = self.model.read_prompts(ids, mask), [], []
        for tokens in self.arrays["ids"][:, self.width :].unbind(1):
            probabilities.append(self.model.choices(state.last_hidden))
            every.append(self.model.feed(state, tokens))
            self.model.advance(state, every[-1].inputs.unsqueeze(1))
        return probabilities, every[:-1]


def _generation(vectors: Vectors, entry: Record, kind: str) -> Checks:
    replay = _Replay(vectors, kind)
    arrays, size = replay.arrays, entry["max_new_tokens"]
    own = [ids + [replay.eos_id] * (size - len(ids)) for ids in replay.written()]
    yield Check(own, arrays["ids"][:, replay.width :].tolist(), part="ids")
    texts = ["".join(replay.texts[token] for token in ids) for ids in own]
    yield Check(texts, list(entry["text"]), part="texts")
    probabilities, every = replay.walk()
    if "probs" in arrays:
        yield Check(torch.stack(probabilities, 1), arrays["probs"], MIXTURE, "probabilities")
    plain = replay.model.embed(arrays["ids"]).detach()
    mixtures, inputs, kept = plain.clone(), plain.clone(), torch.ones(plain.shape[:2])
    thinking = torch.zeros(plain.shape[:2], dtype=torch.bool)
    for column, fed in enumerate(every, replay.width):
        mixtures[:, column], inputs[:, column] = fed.mixtures, fed.inputs
        thinking[:, column], kept[:, column] = fed.thinking, fed.kept.mean(-1)
    yield Check(thinking, arrays["thinking_mask"], part="thinking")
    yield Check(mixtures, arrays["thinking_states"], MIXTURE, "mixtures")
    yield Check(inputs[:, :-1], arrays["fed_embeds"], MIXTURE, "fed")
    yield Check(kept, arrays["embeds_ratio"], GATE, "kept")


# ------------------------------------------------------------------------------------------- loss


def _loss(vectors: Vectors, entry: Record, kind: str) -> Checks:
    replay, arrays = _Replay(vectors, entry["generation"]), vectors.file(f"hrpo/loss_{kind}.npz")
    model, (rollout, read, _) = replay.model, replay.sampled()
    prompts = {"none": replay.padded, "masked": replay.prompts}[entry["attention"]]
    completions, mask = rollout.completions, completion_mask(rollout.completions)
    wide = torch.zeros_like(arrays["completion_mask"], dtype=torch.bool)
    wide[:, : mask.shape[1]] = mask
    yield Check(wide.int(), arrays["completion_mask"], part="mask")
    yield Check(mask.sum(1).float().mean(), entry["completion_length"], part="length")
    advantage = advantages(arrays["rewards"], entry["group_size"])
    yield Check(advantage, arrays["advantages"], MIXTURE, "advantages")
    hidden = completion_states(model, prompts, completions, read)
    kinds = torch.full(hidden.shape[:2], int(Kind.TEXT))
    yield Check(model.logits(hidden, kinds)[mask], arrays["logits"][wide], LOGITS, "logits")
    ids = vectors.file(f"hrpo/gen_{entry['generation']}.npz")["ids"][:, replay.width :]
    reference = arrays["ref_logits"].log_softmax(-1).gather(-1, ids.unsqueeze(-1))[..., 0]

    def loss(log_probs: Tensor, weight: float) -> Tensor:
        return policy_loss(
            log_probs,
            advantage if weight == entry["beta"] else torch.zeros_like(advantage),
            mask,
            kind="grpo",
            epsilon=0.2,
            kl_weight=weight,
            max_completion_length=mask.shape[1],
            reference=reference[:, : mask.shape[1]],
        ).loss

    log_probs = score(model, prompts, completions, read)
    yield Check(loss(log_probs, 1.0), entry["kl"], LOSS, "kl")
    total = loss(log_probs, entry["beta"])
    yield Check(total, entry["loss"], LOSS, "loss")
    total.backward()
    for name in (name for name in arrays if name.startswith("grad/")):
        path = name.removeprefix("grad/")
        own = model.get_parameter(_ours(path) if path.startswith("gate.") else f"base.{path}")
        yield Check(own.grad, arrays[name], GRADIENT, name)


# ----------------------------------------------------------------------------------------- reward


def _public_answer(text: str) -> str:
    """What the public code takes for the answer: all after the last marker, without a final dot."""
    return text.split("####")[-1].strip().removesuffix(".")


def _public_number(text: str) -> str:
    """The last number of an answer as the public code writes it; empty without one."""
    found = re.findall(r"-?\d+/?\.?\d*", _public_answer(text))
    return _plain(found[-1]) if found else ""


def _plain(number: str) -> str:
    """Without trailing zeros; a fraction as a decimal number."""
    whole = number.rstrip("/")
    value = Fraction(whole)
    return str(int(value)) if value.denominator == 1 else str(float(value))


def _reward(_: Vectors, case: Record) -> Checks:
    def matches(label: str, text: str) -> bool:
        number = _public_number(text)
        return bool(number) and number == _public_number(label)

    text = case["completion"]
    own = is_rewarded(text, case["answer"], matches, marker="####")
    yield Check(float(own), case["reward"], EXACT, "reward")
    yield Check(_public_answer(text), case["extracted"], part="extracted")
    yield Check(_public_number(text), case["number"], part="number")


READERS = {
    r"hrpo/gate_\w+\.npz": {"": _gated},
    r"hrpo/expected\.json": {
        r"gate/(.+)": _begun,
        r"generation/(.+)": _generation,
        r"loss/(.+)": _loss,
        r"rewards/.+": _reward,
    },
}
