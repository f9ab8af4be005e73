"""Pin what an experiment reads from the hub to the commits that are current there.

    python -m tools.pin_revisions config/paper.yaml [--output config/pinned.yaml]

asks the hub for the commits of `data.hub_id` and `base.hub_id`, and writes them as a small
configuration that overrides the experiment's: `--configfile config/paper.yaml config/pinned.yaml`.
A revision is science: results of another revision, or of none, are made again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from latent_reasoning.config import PROJECT_ROOT, ConfigError, Experiment, UserError, load

OUTPUT = PROJECT_ROOT / "config" / "pinned.yaml"
Ask = Callable[[str, str, str | None], str]
"""Finds the commit of a kind (`dataset`, `model`), an id and a branch, tag or commit (or None)."""


class HubError(UserError):
    """The hub did not name a commit."""


def ask_hub(kind: str, hub_id: str, revision: str | None) -> str:
    """The commit of a data set or model on the hub; raises `HubError` if it names none."""
    from huggingface_hub import HfApi

    info = {"dataset": HfApi().dataset_info, "model": HfApi().model_info}[kind]
    try:
        commit = info(hub_id, revision=revision).sha
    except Exception as error:  # the client raises errors of many kinds, by version and cause
        reason = " ".join(str(error).split()) or type(error).__name__
        folder = "datasets/" if kind == "dataset" else ""
        raise HubError(
            f"the hub could not be reached, or does not show the {kind} {hub_id!r}: {reason:.300}. "
            "Run this where it can be reached (logged in, where a licence has to be accepted), or "
            f"copy the commit from https://huggingface.co/{folder}{hub_id}/commits/main into a "
            "file of your own"
        ) from error
    if not commit:
        raise HubError(f"the hub names no commit of the {kind} {hub_id!r}")
    return commit


def pinned(experiment: Experiment, ask: Ask = ask_hub) -> dict[str, dict[str, str]]:
    """The revisions of an experiment's data and base model, as a configuration holds them.

    Raises `ConfigError` if neither comes from the hub, `HubError` if the hub does not answer.
    """
    sections = {"data": ("dataset", experiment.data), "base": ("model", experiment.base)}
    found = {
        key: {"revision": ask(kind, str(section.hub_id), section.revision)}
        for key, (kind, section) in sections.items()
        if section.source == "hub"
    }
    if not found:
        raise ConfigError("neither data.source nor base.source is hub: there is nothing to pin")
    return found


def main(arguments: list[str] | None = None, ask: Ask = ask_hub) -> int:
    """Write the overlay; exit code 1, and no file, if a revision cannot be found."""
    command = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("config", nargs="+", type=Path, help="the experiment, and files over it")
    command.add_argument("--output", type=Path, default=OUTPUT, help="default: config/pinned.yaml")
    options = command.parse_args(arguments)
    try:
        text = yaml.safe_dump(pinned(load(options.config), ask), sort_keys=False)
        names = " ".join(file.name for file in options.config)
        options.output.write_text(
            f"# Put over {names}: the commits that were current on the hub.\n{text}",
            encoding="utf-8",
        )
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{text}written to {options.output}; put it over the experiment with --configfile")
    return 0


if __name__ == "__main__":
    sys.exit(main())
