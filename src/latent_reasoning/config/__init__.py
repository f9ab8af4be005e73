"""The typed configuration: one source for defaults, checks, the JSON schema and the documentation.

An experiment is one YAML file, which further files may override. `load` merges the files, fills in
every default, checks everything and returns an `Experiment`; every mistake is a `ConfigError` that
names the file, the key and what is allowed. Marks on a key say which results depend on it.

The modules, from bottom to top: `fields` (types, marks, errors, paths, digests), `data`,
`distillation`, `models`, `experiment` (the root), `load` (YAML, messages, schema).
"""

from latent_reasoning.config.data import (
    Data,
    NumberRule,
    Prompt,
)
from latent_reasoning.config.distillation import Distillation, StepDecoder
from latent_reasoning.config.experiment import (
    Claims,
    Evaluation,
    Experiment,
    Guard,
    Inside,
    Published,
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
    read,
    resolve,
    schema_of_experiment,
)
from latent_reasoning.config.models import (
    ENTRIES,
    Architecture,
    Base,
    ImportModel,
    LatentSftModel,
    LatentSteps,
    Lora,
    Model,
    ModelEntry,
    ReasoningMix,
    Reward,
    RlModel,
    SftModel,
    Training,
)
