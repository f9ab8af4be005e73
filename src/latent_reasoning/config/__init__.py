"""The typed configuration: one source for defaults, checks, the JSON schema and the documentation.

An experiment is one YAML file, which further files may override. `load` merges the files, fills in
every default, checks everything and returns an `Experiment`; every mistake is a `ConfigError` that
names the file, the key and what is allowed. Marks on a key say which results depend on it.

The modules, from bottom to top: `fields` (types, marks, errors, paths, digests), `data`,
`distillation`, `models`, `policies`, `rivals`, `entries` (all that `models` may hold), `report`,
`experiment` (the root), `load` (YAML, messages, schema).
"""

from latent_reasoning.config.data import (
    Data,
    NumberRule,
    Prompt,
)
from latent_reasoning.config.distillation import Distillation, StepDecoder
from latent_reasoning.config.entries import ENTRIES, RIVAL_STAGES, ImportModel, ModelEntry
from latent_reasoning.config.experiment import (
    Evaluation,
    Experiment,
    Guard,
    Inside,
    Runtime,
    Tracking,
)
from latent_reasoning.config.fields import (
    PROJECT_ROOT,
    ConfigError,
    Section,
    UserError,
    digest,
    expand_path,
    is_local,
)
from latent_reasoning.config.load import (
    dump,
    dump_yaml,
    load,
    merge,
    plain_value,
    read,
    resolve,
    schema_of_experiment,
)
from latent_reasoning.config.mixtures import Csft, MixtureTargets, Mts, SoftThinking
from latent_reasoning.config.models import (
    Architecture,
    Base,
    LatentSftModel,
    LatentSteps,
    Lora,
    Model,
    ReasoningMix,
    SftModel,
    SupervisedModel,
    Training,
)
from latent_reasoning.config.policies import PolicyModel, Reward, RlModel
from latent_reasoning.config.report import Claims, Published, Rivals
from latent_reasoning.config.rivals import (
    Colar,
    CurriculumModel,
    DecodeModel,
    RivalPolicyModel,
    TeacherForcedModel,
)
