"""Cases of `latent_sft/`: both stages with all gradients, and generation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from latent_reasoning.data.examples import IGNORED_LABEL
from latent_reasoning.model.filters import MixtureFilter
from latent_reasoning.model.folder import load
from latent_reasoning.model.generation import Generation, generate
from latent_reasoning.model.given import read_given
from latent_reasoning.model.mixtures import Mixture
from latent_reasoning.model.reading import ReasonerOutput
from latent_reasoning.model.reasoner import LatentReasoner
from latent_reasoning.model.settings import LatentSettings
from latent_reasoning.model.special_rows import vocabulary_logits
from latent_reasoning.model.trajectory import Trajectory
from latent_reasoning.rivals.latent_encoder import (
    CompressedBatch,
    CompressedRow,
    compressed_row,
    decoder_loss,
    decoder_states,
    encoded_mixtures,
    induction_mask,
    supervision_mask,
)
from latent_reasoning.rivals.mixture_sft import (
    Steps,
    mixture_kl,
    noisy,
    with_mixtures,
)
from latent_reasoning.training.text import Labels, cross_entropy
from tests.conformance.checks import Check, Checks, Tolerance
from tests.conformance.recording import Record, Vectors

INFORMATION = {"trained_latents", "lens"}
"""Latents that the overfitted decoder was trained on; lengths of stage 2's parts."""
PROBABILITY = LOSS = Tolerance(absolute=1e-5)
LOGIT = FED = Tolerance(absolute=1e-4)
GRADIENT = Tolerance(relative=1e-4, by_norm=True)


def gradients(model: LatentReasoner, strip: str = "base.") -> dict[str, Tensor]:
    """Every parameter's gradient by its name in the base model, of those that have one."""
    return {
        name.removeprefix(strip): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def recorded_gradients(arrays: Record, prefix: str) -> dict[str, Tensor]:
    """Those recorded whose names begin with `prefix`."""
    return {key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)}


# ----------------------------------------------------------------------------------------- stage 1


def _stage1(vectors: Vectors, entry: Record, name: str) -> Checks:
    arrays = vectors.file(f"latent_sft/stage1_{name}.npz")
    ids = vectors.file("latent_sft/expected.json")["ids"]
    rows = list(_compressed_rows(arrays, entry, ids))
    batch = CompressedBatch.of(rows, ids["compress"], ids["pad"])
    yield Check(batch.encoder_ids, arrays["cot_ids"], part="sequences")
    latents = torch.where(batch.places == 2, IGNORED_LABEL, batch.decoder_ids)
    yield Check(latents, arrays["input_ids"], part="sequences")
    yield Check(batch.labels, arrays["labels"], part="sequences")
    yield Check(batch.positions, arrays["position_ids"], part="sequences")
    own = induction_mask(batch.is_compress, batch.encoder_mask)
    yield Check(own, arrays["induction_mask"], part="masks")
    yield Check(supervision_mask(batch.places), arrays["supervision_mask"], part="masks")
    encoder, decoder = (vectors.model(f"latent_sft/{side}") for side in ("encoder", "decoder"))
    mixtures = encoded_mixtures(encoder, decoder, batch, entry["topk"])
    counts = batch.is_compress.sum(1).tolist()
    embedded = mixtures.embed(decoder.base.get_input_embeddings().weight)
    parts = (mixtures.probabilities, mixtures.ids, embedded)
    for row, values in enumerate(zip(*(part.split(counts) for part in parts), strict=True)):
        yield Check(values[0], arrays[f"topk_probs_{row}"], PROBABILITY, "mixtures")
        yield Check(values[1], arrays[f"topk_ids_{row}"], part="mixtures")
        yield Check(values[2], arrays[f"latent_{row}"], PROBABILITY, "mixtures")
    hidden = decoder_states(decoder, batch, mixtures)
    loss, logits = decoder_loss(decoder, hidden, batch.labels)
    real = batch.places > 0
    yield Check(logits[real], arrays["logits"][real], LOGIT, "logits")
    yield Check(loss, entry["loss"], LOSS, "loss")
    loss.backward()
    own = gradients(encoder, "base.model.")
    yield Check(own, recorded_gradients(arrays, "grad/encoder."), GRADIENT, "gradients")
    own = gradients(decoder)
    yield Check(own, recorded_gradients(arrays, "grad/decoder."), GRADIENT, "gradients")


def _compressed_rows(arrays: Record, entry: Record, ids: Record) -> Iterator[CompressedRow]:
    """The rows made from the parts that the recorded sequences hold."""
    end, start = ids["end_think"], ids["think"]
    for cot, whole, (prompt, reasoning, answer) in zip(
        arrays["cot_ids"].tolist(), arrays["input_ids"].tolist(), entry["lens"], strict=True
    ):
        compressed = reasoning + -(-reasoning // entry["k"])
        first = prompt + len(start)
        chain = [token for token in cot[first : first + compressed] if token != ids["compress"]]
        last = whole.index(end[0], first) + len(end)
        # An answer ends with EOS, which its length counts or does not.
        stop = whole.index(ids["eos"], last) + 1
        assert stop - last in (answer, answer + 1)
        yield compressed_row(
            cot[:first],
            chain,
            end,
            whole[last:stop],
            rate=entry["k"],
            compress_id=ids["compress"],
        )


# ----------------------------------------------------------------------------------------- stage 2


def _stage2(vectors: Vectors, entry: Record, name: str) -> Checks:
    """One batch. The public code trains no embedding by a token that is read."""
    arrays = vectors.file(f"latent_sft/stage2_{name}.npz")
    model = vectors.model("latent_sft/decoder")
    ids, mask, labels = arrays["input_ids"], arrays["attention_mask"].bool(), arrays["labels"]
    begins, ends = arrays["latent_index"].T
    columns = torch.arange(ids.shape[1])
    is_latent = (columns >= begins[:, None]) & (columns < ends[:, None])
    yield Check(is_latent, ids == IGNORED_LABEL, part="latents")
    probabilities = [arrays[f"topk_probs_{row}"] for row in range(len(ids))]
    if entry["gumbel"] is not None:
        yield Check(_noisy(arrays, entry["gumbel"], len(ids)), probabilities, PROBABILITY, "noise")
    words = torch.cat([arrays[f"topk_ids_{row}"] for row in range(len(ids))])
    yield Check(words.shape[1], entry["topk"], part="latents")
    rows, places = is_latent.nonzero(as_tuple=True)
    weights = 1 / is_latent.sum(1)[rows] / len(ids)
    steps = Steps(rows, places, Mixture(torch.cat(probabilities), words), weights)
    inputs = with_mixtures(model, model.embed(ids.clamp(min=0)).detach(), steps)
    hidden = read_given(model, inputs, mask)
    logits = vocabulary_logits(model.base, None, None, hidden)
    yield Check(logits[mask], arrays["logits"][mask], LOGIT, "logits")
    learned = Labels.of(labels, torch.ones_like(labels), None)
    ce = cross_entropy(model, ReasonerOutput(hidden, None, mask), learned)
    kl = (mixture_kl(model, hidden[rows, places - 1], steps.mixture) * weights).sum()
    loss = entry["ce_w"] * ce + entry["kl_w"] * kl
    own = {"loss": loss, "ce": ce, "kl": kl}
    yield Check(own, {key: entry[key] for key in own}, LOSS, "losses")
    loss.backward()
    yield Check(gradients(model), recorded_gradients(arrays, "grad/"), GRADIENT, "gradients")


def _noisy(arrays: Record, gumbel: list[float], rows: int) -> list[Tensor]:
    """The mixtures under the recorded noise."""
    scale, temperature = gumbel
    own = []
    for row in range(rows):
        clean = Mixture(arrays[f"clean_probs_{row}"], arrays[f"topk_ids_{row}"])
        gumbel = -arrays[f"exponential_{row}"].log()
        own.append(noisy(clean, gumbel, scale, temperature).probabilities)
    return own


# -------------------------------------------------------------------------------------- generation


class _Noisy(MixtureFilter):
    """The product's filter, its mixtures perturbed by recorded noise, a step after the other; it
    notes the likeliest word of each, before the noise."""

    def __init__(self, size: int, gumbel_temperature: float, excluded: tuple[int, int]) -> None:
        super().__init__(size, excluded=excluded)
        self.gumbel_temperature = gumbel_temperature
        self.begin(None)

    def begin(self, draws: Tensor | None) -> None:
        """Begin a row with its noise (n, 1, k)."""
        self.noise = None if draws is None else list(draws)
        self.words: list[int] = []

    def mixture(self, logits: Tensor) -> Mixture:
        """The mixture of the next latent step."""
        mixture = super().mixture(logits)
        self.words.append(int(mixture.ids[0, 0]))
        if self.noise is None:
            return mixture
        return mixture.perturbed(self.noise.pop(0), self.gumbel_temperature)


def _generation(vectors: Vectors, entry: Record, name: str) -> Checks:
    arrays = vectors.file(f"latent_sft/gen_{name}.npz")
    ids = vectors.file("latent_sft/expected.json")["ids"]
    base = load(vectors.folder("latent_sft/decoder_fit"), device="cpu").base
    (start,), (stop, *rest) = ids["think"], ids["end_think"]
    end, step = _add_rows(base, stop)
    settings = LatentSettings(
        *(start, end, step, stop),
        recurrent_filter="mixture",
        mixture_size=entry["topk"],
        stop_rule="marker",
        max_latent_steps=entry["max_new_tokens"],
    )
    model = LatentReasoner(base, settings).eval()
    model.recurrent_filter = _Noisy(entry["topk"], entry["gumbel_temperature"], (end, step))
    for result in entry["results"]:
        row = result["row"]
        prompt = arrays[f"prompt_{row}"].tolist()
        draws, scale = None, entry["noise_scale"]
        if entry["gumbel"]:
            draws = (-scale * arrays[f"exponential_{row}"].log()).unsqueeze(1)
        own = _generate(model, prompt, draws, ids)
        yield Check(own.latent_steps, result["latents"], part="latents")
        thought = [*prompt, *[step] * own.latent_steps, stop, *rest]
        answer = _generate(model, thought, draws, ids)
        yield Check(answer.ids, arrays[f"answer_{row}"].tolist(), part="answers")
        texts = (" ".join(map(str, part)) for part in (model.recurrent_filter.words, answer.ids))
        yield Check("".join(texts), result["text"], part="text")
        fed = _fed(model, prompt, own.latent_steps, draws, [stop, *rest])
        yield Check(fed, arrays[f"inputs_embeds_{row}"], FED, "fed")


def _add_rows(base: PreTrainedModel, stop: int) -> tuple[int, int]:
    """Ids of END, which is read in the place of `stop`, and of CONTINUE: rows that are no words."""
    count = base.get_input_embeddings().weight.shape[0]
    base.resize_token_embeddings(count + 2, mean_resizing=False)
    with torch.no_grad():
        matrix = base.get_input_embeddings().weight
        matrix[count], matrix[count + 1] = matrix[stop], 0
    return count, count + 1


def _generate(
    model: LatentReasoner, prompt: list[int], draws: Tensor | None, ids: Record
) -> Generation:
    model.recurrent_filter.begin(draws)
    (own,) = generate(model, [prompt], max_new_tokens=256, eos_id=ids["eos"], batch_size=1)
    return own


@torch.no_grad()
def _fed(
    model: LatentReasoner, prompt: list[int], steps: int, draws: Tensor | None, end: list[int]
) -> Tensor:
    """Input embeddings of the prompt, its latent steps and the end of thinking."""
    model.recurrent_filter.begin(draws)
    trajectory, latents = Trajectory.begin(model, [prompt]), []
    for _ in range(steps):
        latents.append(model.latent_input(trajectory.hidden[-1])[0])
        state = model.advance(trajectory.state, latents[-1][None, None])[:, -1]
        trajectory.hidden.append(state)
    matrix = model.base.get_input_embeddings().weight
    return torch.cat([matrix[prompt], torch.stack(latents), matrix[end]])


READERS = {
    r"latent_sft/expected\.json": {
        "stage1/(.+)": _stage1,
        "stage2/(.+)": _stage2,
        "generation/(.+)": _generation,
    },
}
