"""What comes from outside - models, checkpoints, names, paths - never runs as a program."""

from __future__ import annotations

import ast
import contextlib
import json
import pickle
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from latent_reasoning.base.sources import HUB_FILES
from latent_reasoning.config import PROJECT_ROOT, ConfigError, merge, read, resolve
from latent_reasoning.model import load
from latent_reasoning.model.folder import load_tokenizer, save
from latent_reasoning.model.tensors import CheckpointError
from latent_reasoning.runtime.files import SUMS
from latent_reasoning.training.checkpoints import CheckpointStore, Progress
from tests.model.models import build_reasoner, build_tokenizer
from tests.workflow.workflow_tools import PROFILE, environment, run, with_stand_ins

PROGRAMS = [
    *sorted(PROJECT_ROOT.glob("src/**/*.py")),
    *sorted(PROJECT_ROOT.glob("benchmarks/*.py")),
]
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    *("torch.load", "os.system", "os.popen", "eval", "exec", "compile", "__import__"),
    *("pandas.read_pickle", "pd.read_pickle", "yaml.unsafe_load", "yaml.full_load"),
}
SWITCHES = {"trust_remote_code": False, "allow_pickle": False, "shell": False, "weights_only": True}
"""Arguments that may only have this value, wherever they stand."""


class Touch:
    """Unpickled, it makes a file: the proof that somebody unpickled it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture
def mark(tmp_path) -> Path:
    """A file that is there once anything hostile ran."""
    return tmp_path / "executed"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny model folder without digests: not ours, as far as loading can tell."""
    save(build_reasoner().float(), build_tokenizer(), tmp_path / "m", {"model": "tiny"})
    (tmp_path / "m" / SUMS).unlink()
    return tmp_path / "m"


# ------------------------------------------------------------------------------------ no pickle


@pytest.mark.parametrize(
    ("name", "index", "words"),
    [
        *[(name, None, "pickled weights|missing") for name in ("pytorch_model.bin", "model.pt")],
        *[(name, None, f"{name}.*damaged") for name in ("model.safetensors", "latent.safetensors")],
        ("part.bin", {"weight_map": {"model.norm.weight": "part.bin"}}, r"part\.bin"),
    ],
)
def test_pickles_in_the_place_of_weights_are_refused(folder, mark, name, index, words):
    if name != "latent.safetensors":
        (folder / "model.safetensors").unlink()
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / name).write_bytes(pickle.dumps(Touch(mark)))
    with pytest.raises(CheckpointError, match=words):
        load(folder, device="cpu")
    assert not mark.exists()


def test_pickles_beside_safetensors_are_not_read(folder, mark):
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Touch(mark)))
    load(folder, device="cpu")
    load_tokenizer(folder)
    assert not mark.exists()


def test_pickles_in_a_training_checkpoint_are_set_aside_unread(tmp_path, mark):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    store = CheckpointStore(tmp_path / "checkpoints", "digest", print)
    store.save(model, optimizer, Progress(step=1))
    newest = next(path for path in store.folder.iterdir() if path.is_dir())
    for file in [*newest.iterdir(), newest / "optimizer.pt", newest / "rng_state.pth"]:
        file.write_bytes(pickle.dumps(Touch(mark)))
    said: list[str] = []
    again = CheckpointStore(tmp_path / "checkpoints", "digest", said.append)
    assert again.resume(model, optimizer) is None
    assert "set aside" in said[0]
    assert not mark.exists()


def test_nothing_is_downloaded_but_weights_settings_and_tokenizers():
    assert not [pattern for pattern in HUB_FILES if pattern.endswith((".bin", ".pt", ".py", "*"))]


# --------------------------------------------------------------------------------- no other code


@pytest.mark.parametrize("model_type", ["llama", "theirs"])
def test_code_in_a_model_folder_does_not_run(folder, mark, model_type):
    (folder / "theirs.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = model_type
    config["auto_map"] = {
        "AutoConfig": "theirs.Config",
        "AutoModelForCausalLM": "theirs.Model",
        "AutoTokenizer": ["theirs.Tokenizer", None],
    }
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["theirs.Tokenizer", "theirs.Tokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for reader in (lambda: load(folder, device="cpu"), lambda: load_tokenizer(folder)):
        with contextlib.suppress(CheckpointError):
            reader()
    if model_type == "theirs":
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load(folder, device="cpu")
    assert not mark.exists()


@pytest.mark.parametrize("file", PROGRAMS, ids=lambda file: str(file.relative_to(PROJECT_ROOT)))
def test_no_program_text_unpickles_evaluates_or_trusts(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported = {(node.module or "").split(".")[0]}
        else:
            imported = set()
        assert not imported & FORBIDDEN_MODULES
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS
        if isinstance(node, ast.keyword) and node.arg in SWITCHES:
            assert ast.literal_eval(node.value) == SWITCHES[node.arg]


# ------------------------------------------------------------------------------- names and shells

HOSTILE = ["$(touch x)", "`touch x`", "a; touch x", "a b", "a'b", 'a"b', "a\nb", "a\n", "../a"]


@pytest.mark.parametrize("name", [*HOSTILE, "-a", "a{b}", "ä", ""])
@pytest.mark.parametrize("place", ["experiment", "model", "test set", "main", "from"])
def test_names_are_letters_digits_and_dashes(name, place):
    raw = read([PROJECT_ROOT / "config" / "test.yaml"])
    model = raw["models"]["latent-6"]
    changes = {
        "experiment": {"experiment": name},
        "model": {"models": {name: model}},
        "test set": {"data": {"extra_tests": {name: "rows.jsonl"}}},
        "main": {"report": {"main": [name]}},
        "from": {"models": {"latent-6": {"from": name}}},
    }
    with pytest.raises(ConfigError, match=r"test\.yaml"):
        resolve(merge(raw, changes[place]), "test.yaml")


def test_paths_never_reach_a_shell_unquoted(tmp_path):
    work, results = tmp_path / "work", tmp_path / "re sults $(touch x) `touch y`; touch z & 'q\" #"
    raw = tmp_path / "raw $(touch v)"
    for path in (work, raw):
        path.mkdir()
    for split in ("train", "validation", "test"):
        (raw / f"{split}.jsonl").write_text("{}\n", encoding="utf-8")
    config = read([PROJECT_ROOT / "config" / "test.yaml"])
    config["models"] = {"latent-6": config["models"]["latent-6"]}
    config["report"] = {"title": "$(touch u)"}
    config["data"] |= {"source": "local", "path": str(raw)}
    config["base"] |= {"source": "local", "path": str(raw), "licence": "`touch t`"}
    (work / "experiment.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = ["-m", "snakemake", "--cores", "2", "--snakefile", with_stand_ins(work)]
    command += ["--workflow-profile", PROFILE, "--configfile", "experiment.yaml", "--quiet", "--"]
    hostile = environment(work) | {"LATENT_REASONING_RESULTS": str(results)}
    result = run([*command, "all"], work, hostile)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (results / "test" / "report.html").is_file()
    assert (results / "test" / "logs" / "latent_sft" / "latent-6" / "seed-0.log").is_file()
    assert not [path for path in tmp_path.rglob("?") if path.is_file()]


# --------------------------------------------------------------------------------------- servers


def test_mlflows_page_listens_on_this_machine_alone():
    command = ["make", "--no-print-directory", "-n", "-o", ".venv/installed", "ui"]
    made = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PROJECT_ROOT)
    words = shlex.split(made.stdout.replace("\\\n", " ").splitlines()[-1])
    assert words[1:4] == ["ui", "--host", "127.0.0.1"]
