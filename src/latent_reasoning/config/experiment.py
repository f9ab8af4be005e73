"""The root of the configuration: how it is run and reported, and checks across its sections."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from latent_reasoning.config.data import Data
from latent_reasoning.config.entries import ENTRIES, ModelEntry
from latent_reasoning.config.fields import (
    DISTINCT,
    IMPORTANT,
    NOT_SCIENCE,
    Count,
    DatasetName,
    Name,
    Positive,
    PositiveInt,
    Section,
    fields_of,
)
from latent_reasoning.config.models import Base, LatentSftModel, Model
from latent_reasoning.config.policies import PolicyModel, RlModel
from latent_reasoning.config.report import Report


class Evaluation(Section):
    """Greedy evaluation of whole splits."""

    datasets: Annotated[list[DatasetName], DISTINCT, NOT_SCIENCE, IMPORTANT] = Field(
        ["test"], min_length=1
    )
    """`test`, `validation` and names of `data.extra_tests`."""
    max_new_tokens: PositiveInt = 512
    """Longest completion."""
    max_forced_steps: Count = 8
    """Accuracy is measured at every forced n from 0 to this."""
    forced_rows: PositiveInt | None = None
    """Number of rows used for forced n, the first of the split; null: all."""


class Inside(Section):
    """Seeing inside the chain: the target `inside`, not part of `all`."""

    models: Annotated[
        Annotated[list[Name], Field(min_length=1), DISTINCT] | None, NOT_SCIENCE, IMPORTANT
    ] = None
    """Latent models that are studied; null: those of the main tables."""
    datasets: Annotated[list[DatasetName], DISTINCT, NOT_SCIENCE] = Field(["test"], min_length=1)
    """As in `evaluation`. Probes are trained on validation rows (those of `sft` to look into
    `validation`)."""
    rows: PositiveInt = 500
    """Rows of a data set, the first ones."""
    sample: PositiveInt = 100
    """The first of these rows, for what is costly: skipped blocks, attention, lens by layer."""


class Guard(Section):
    """A training that diverges resumes from its last good checkpoint, with another data order.

    What counts as divergence: `training/divergence.py`.
    """

    REMOVED: ClassVar = dict.fromkeys(
        ("window", "factor", "patience", "collapse", "slower_rollbacks"),
        "no longer a setting: take the line out (its default holds, as a constant of "
        "src/latent_reasoning/training/divergence.py)",
    )

    enabled: bool = True
    """false: a loss or gradient that is not finite ends the training; nothing else is checked."""
    rollbacks: Count = 2
    """Rollbacks that change nothing but the data order. Two more follow, each of which halves the
    learning rate; then the training fails."""


def _word(value: Any) -> Any:
    """YAML reads the word `off` as false."""
    return "off" if value is False else value


class Runtime(Section):
    """How the experiment runs; none of these keys retrains anything."""

    device: Annotated[Literal["auto", "cpu", "cuda"], IMPORTANT] = "auto"
    """Where tensors live."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast; auto: bfloat16 on a GPU that has it, else none."""
    cuda_graphs: Annotated[Literal["auto", "off"], BeforeValidator(_word)] = "auto"
    """auto: on a GPU, steps of training and decoding are captured as CUDA graphs, with padded
    shapes, where the base is a Llama."""
    compile: bool = False
    """on: `torch.compile` fuses the operations of a block on a GPU; worth its minutes of compiling
    in trainings of hours."""
    threads: Annotated[PositiveInt, IMPORTANT] = 1
    """Torch threads of one process."""
    processes: PositiveInt = 1
    """Processes of one training, each with its own GPU, which share every step's batch."""
    micro_batch_size: Annotated[PositiveInt | None, IMPORTANT] = None
    """Examples (RL: prompts) per forward; null: a process's share of the batch."""
    evaluation_batch_size: Annotated[PositiveInt, IMPORTANT] = 64
    """Prompts per generation batch."""
    checkpoint_every: PositiveInt = 200
    """Steps between resumable checkpoints."""
    gpu_model: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$")] | None = None
    """Type of GPU to ask a cluster for, in the cluster's own words; null: any. A name with `h100`
    in it is planned for as an H100, anything else as an A100."""
    memory_mb: PositiveInt | None = 4000
    """Memory asked of the scheduler per process; null: the plan of `latent_reasoning.dag.cost`."""
    runtime_minutes: PositiveInt | None = 60
    """Time asked of the scheduler per job; null: twice the estimate of `latent_reasoning.dag.cost`,
    in whole hours."""
    time_budget_minutes: Positive | None = None
    """After this time a training ends with a checkpoint and exit code 75, and the workflow starts
    it again to resume. Choose it well below `runtime_minutes`."""
    guard: Guard = Field(default_factory=Guard)
    """What to do about divergence."""


class Tracking(Section):
    """MLflow."""

    enabled: bool = True
    """Log runs to MLflow."""
    uri: str = "sqlite:///results/mlflow.db"
    """Store; the environment's MLFLOW_TRACKING_URI takes precedence."""
    log_every: PositiveInt = 10
    """Steps between logged metrics."""


class Stages(Section):
    """Defaults of the entries of `models`, by stage; an entry's own keys take precedence."""

    sft: dict[str, Any] = Field(default_factory=dict)
    """Defaults of `sft` models."""
    latent_sft: dict[str, Any] = Field(default_factory=dict)
    """Defaults of `latent_sft` models."""
    rl: dict[str, Any] = Field(default_factory=dict)
    """Defaults of `rl` models."""
    curriculum: dict[str, Any] = Field(default_factory=dict)
    """Defaults of `curriculum` models."""
    teacher_forced: dict[str, Any] = Field(default_factory=dict)
    """Defaults of `teacher_forced` models."""
    policy: dict[str, Any] = Field(default_factory=dict)
    """Defaults of `policy` models."""

    @model_validator(mode="after")
    def _known_keys(self) -> Stages:
        for stage in type(self).model_fields:
            allowed = {key for key, _, _ in fields_of(ENTRIES[stage])}
            unknown = sorted(set(getattr(self, stage)) - allowed)
            if unknown:
                raise ValueError(
                    f"{stage}.{unknown[0]}: unknown key; allowed here: {', '.join(sorted(allowed))}"
                )
        return self


class Experiment(Section):
    """One experiment: a YAML file of `config/`, with every default filled in."""

    experiment: Name
    """The experiment's name and its folder under results/."""
    seeds: Annotated[list[Count], DISTINCT, IMPORTANT] = Field([0], min_length=1)
    """Every training runs once for each seed."""
    data: Data = Field(default_factory=Data)
    """Rows."""
    base: Base = Field(default_factory=Base)
    """The model everything starts from."""
    model: Model = Field(default_factory=Model)
    """The latent reasoner."""
    stages: Stages = Field(default_factory=Stages)
    """Defaults of `models` by stage."""
    models: dict[Name, ModelEntry] = Field(..., min_length=1)
    """All models that are trained or imported, by name."""
    evaluation: Evaluation = Field(default_factory=Evaluation)
    """Evaluation."""
    inside: Inside = Field(default_factory=Inside)
    """Seeing inside the chain."""
    runtime: Runtime = Field(default_factory=Runtime)
    """How it runs."""
    tracking: Tracking = Field(default_factory=Tracking)
    """MLflow."""
    report: Report = Field(default_factory=Report)
    """Tables, figures and page."""

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        for name, entry in self.models.items():
            self._check_entry(name, entry)
        known = ["test", "validation", *self.data.extra_tests]
        for section in ("evaluation", "inside"):
            for dataset in getattr(self, section).datasets:
                if dataset not in known:
                    raise ValueError(
                        f"{section}.datasets: {dataset!r} is not among {', '.join(known)}"
                    )
        for name in self.inside.models or []:
            if name not in self.models or self.models[name].stage == "sft":
                raise ValueError(f"inside.models: {name!r} is not a latent model of models")
        for key in ("main", "appendix"):
            for name in getattr(self.report, key) or []:
                if name not in self.models:
                    raise ValueError(f"report.{key}: {name!r} is not in models")
        for name in self.report.rivals.named():
            if name not in self.models:
                raise ValueError(f"report.rivals: {name!r} is not in models")
        for label, name in self.report.ablations.items():
            if getattr(self.models.get(name), "stage", None) != "latent_sft":
                raise ValueError(f"report.ablations.{label}: {name!r} is no latent_sft model")
        for name, start in self.report.rl_from.items():
            self._check_comparison(name, start)
        if self.base.source == "scratch" and self.data.source != "generated":
            raise ValueError(
                "base.source: scratch trains on generated text and needs data.source: generated"
            )
        return self

    def _check_comparison(self, name: str, start: str) -> None:
        for model in (name, start):
            if model not in self.models:
                raise ValueError(f"report.rl_from: {model!r} is not in models")
        if self.models[name].stage != "import":
            raise ValueError(
                f"report.rl_from: {name!r} is of stage {self.models[name].stage}, and says itself "
                "what it starts from; only imported models stand here"
            )

    def _check_entry(self, name: str, entry: Any) -> None:
        if name == "base":
            raise ValueError("models.base: the name is taken by the base model; choose another")
        self._check_ancestors(name, entry)
        parent = None if entry.start in (None, "base") else self.models[entry.start]
        parent_stage = None if parent is None else parent.stage
        if entry.stage == "sft" and parent_stage not in (None, "sft", "import"):
            raise ValueError(
                f"models.{name}.from: token SFT starts from a plain language model, not from "
                f"{entry.start!r}, which reasons in latent steps"
            )
        if entry.stage == "latent_sft":
            self._check_latent_sft(name, entry)
        if entry.stage == "teacher_forced" and entry.method == "csft" and entry.csft.teacher:
            self._check_teacher(f"models.{name}.csft.teacher", entry.csft.teacher, "null")
        if isinstance(entry, PolicyModel):
            self._check_policy(name, entry)
        if entry.stage == "rl":
            self._check_rl(name, entry, parent_stage)

    def _check_ancestors(self, name: str, entry: Any) -> None:
        """Check that all ancestors of a model exist, up to the base."""
        seen = [name]
        start = entry.start
        while start not in (None, "base"):
            if start not in self.models:
                raise ValueError(
                    f"models.{seen[-1]}.from: {start!r} is neither base nor one of "
                    f"{', '.join(sorted(self.models))}"
                )
            if start in seen:
                raise ValueError(f"models.{name}.from: goes in a circle: {' -> '.join(seen)}")
            seen.append(start)
            start = self.models[start].start

    def _check_latent_sft(self, name: str, entry: LatentSftModel) -> None:
        key, distillation = f"models.{name}.distillation", entry.distillation
        compared, blocks = distillation.block_range, self.base.architecture.num_hidden_layers
        if self.base.source == "scratch" and compared is not None and compared[1] >= blocks:
            raise ValueError(
                f"{key}.block_range: block {compared[1]} does not exist; the base has {blocks}, "
                "counted from 0"
            )
        if distillation.teacher != "self":
            self._check_teacher(f"{key}.teacher", distillation.teacher, "self")
        elif distillation.traces == "teacher":
            raise ValueError(
                f"{key}.traces: teacher needs distillation.teacher to name an sft model"
            )

    def _check_teacher(self, key: str, teacher: str, none: str) -> None:
        if getattr(self.models.get(teacher), "form", None) != "cot":
            raise ValueError(f"{key}: {teacher!r} is neither {none} nor an sft model of form cot")

    def _check_policy(self, name: str, entry: PolicyModel) -> None:
        if (entry.max_latent_steps or 0) + 2 > entry.max_new_tokens:
            raise ValueError(
                f"models.{name}.max_latent_steps: {entry.max_latent_steps} steps and STOP leave no "
                f"token of max_new_tokens: {entry.max_new_tokens} for the answer"
            )
        if self.data.sft_share == 1.0:
            raise ValueError(
                f"data.sft_share: 1.0 leaves no rows for the RL model {name!r}; take less"
            )

    def _check_rl(self, name: str, entry: RlModel, parent_stage: str | None) -> None:
        if parent_stage in (None, "sft"):
            raise ValueError(
                f"models.{name}.from: RL starts from a latent_sft, rl or import model, not from "
                f"{entry.start!r}"
            )
