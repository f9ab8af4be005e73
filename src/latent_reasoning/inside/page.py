"""The page of what was seen inside: numbers first, then figures, and examples to browse.

    python -m latent_reasoning.inside.page --output results/laptop/inside.html FOLDER..

It is one self-contained file, made of the folders that the stage writes: a section a model and data
set, with the numbers of every seed and the figures and examples of the first.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
from PIL import Image

from latent_reasoning.analysis.report import templates
from latent_reasoning.config import UserError
from latent_reasoning.inside.findings import in_words
from latent_reasoning.runtime.command import run_stage
from latent_reasoning.runtime.files import write_text_atomically

ANALYSES = {
    "A": (
        "Reading the latents",
        "The logit lens takes each latent for a place where the next word is chosen. Where the "
        "value v_m is its likeliest word, the latent can be read. The control looks for another "
        "row's values in the same latents. Below: the first value of a row that is read wrong, "
        "where an error can have entered.",
        ("lens", "errors"),
    ),
    "B": (
        "Interventions",
        "What a step reads is replaced, and the answer looked at. With the latent of another row, "
        "the donor, the row's own remaining operations imply a counterfactual answer: if exactly "
        "this is given, the latent carries the value. The control is what chance would give, or, "
        "for accuracies, the same rows untouched.",
        ("counterfactual", "interventions"),
    ),
    "C": (
        "Need",
        "A row needs as many steps as it takes until its answer is right and stays right up to "
        "where the model stops by itself.",
        ("need",),
    ),
    "D": (
        "Probes",
        "Linear probes, trained on other rows, read values that need not be the likeliest word. "
        "Controls: the question's last token, and shuffled labels.",
        ("probes",),
    ),
    "E": (
        "Geometry",
        "The space of the states, as in arXiv 2511.21594, and for latent models the latents in it.",
        (
            *("norms", "stream", "parts", "positions_unit", "positions_raw"),
            *("kinds", "latents", "distances"),
        ),
    ),
    "F": (
        "Use of depth",
        "What each block contributes, what skipping it changes in later blocks, and how early the "
        "output can be read.",
        ("depth", "skips", "layers"),
    ),
    "G": ("Attention", "Where latents and answer tokens look.", ("attention",)),
    "H": (
        "Signals of the trajectory",
        "Whether the way the states move tells right answers from wrong ones. Length alone "
        "predicts, so the same is shown for rows of equal K. An AUC of 0.5 is chance; with fewer "
        "than ten wrong answers it has no interval, and says little.",
        ("signals",),
    ),
}


def write_page(folders: Sequence[Path], path: Path, title: str) -> None:
    """Write the page of studies. Raises `UserError` where a folder is none."""
    studies = [_read(folder) for folder in folders]
    sections: dict[tuple[str, str], list[dict]] = {}
    for study in studies:
        summary = study["summary"]
        sections.setdefault((summary["model"], summary["dataset"]), []).append(study)
    content = {
        "title": title,
        "sections": [_section(name, group) for name, group in sections.items()],
        "comparison": _comparison(sections),
    }
    template = templates(Path(__file__).parent).get_template("page.html.jinja")
    write_text_atomically(path, template.render(**content))


def _read(folder: Path) -> dict[str, Any]:
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        examples = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
        found = pandas.read_csv(folder / "findings.csv")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: no study ({error}); make it with python -m latent_reasoning.inside"
        ) from error
    return {"folder": folder, "summary": summary, "examples": examples, "findings": found}


def _section(name: tuple[str, str], studies: list[dict]) -> dict[str, Any]:
    """What a section shows: numbers of all seeds, figures and examples of the first."""
    first, summary = studies[0], studies[0]["summary"]
    # Not closed by text in it, whatever a row says.
    examples = json.dumps(first["examples"], ensure_ascii=False).replace("<", "\\u003c")
    return {
        "id": "-".join(name),
        "model": name[0],
        "dataset": name[1],
        "seeds": [study["summary"]["seed"] for study in studies],
        "n": summary["n"],
        "latent": summary["latent"],
        "summary": summary,
        "examples": examples if first["examples"] else "",
        "analyses": [
            {
                "letter": letter,
                "title": title,
                "text": text,
                "sentences": _sentences(letter, studies),
                "figures": [
                    figure
                    for figure in (_figure(first["folder"], name) for name in figures)
                    if figure is not None
                ],
            }
            for letter, (title, text, figures) in ANALYSES.items()
            if summary["latent"] or letter in ("E", "F")
        ],
    }


def _figure(folder: Path, name: str) -> dict[str, str] | None:
    file = folder / "figures" / f"{name}.png"
    if not file.is_file():
        return None
    encoded = base64.b64encode(_of_few_colours(file)).decode("ascii")
    return {"name": name, "source": f"data:image/webp;base64,{encoded}"}


def _of_few_colours(file: Path) -> bytes:
    """A picture with a palette, as lossless WebP: half of its size, and the same to the eye."""
    stream = io.BytesIO()
    picture = Image.open(file).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    picture.convert("RGB").save(stream, "WEBP", lossless=True, quality=60)
    return stream.getvalue()


def _sentences(letter: str, studies: list[dict]) -> list[dict[str, Any]]:
    """Each finding in words, with the numbers of every seed."""
    found: dict[str, list[str]] = {}
    for study in studies:
        table = study["findings"]
        for row in table[table["analysis"] == letter].to_dict("records"):
            found.setdefault(row["finding"], []).append(_numbers(row))
    return [{"finding": finding, "numbers": numbers} for finding, numbers in found.items()]


def _numbers(row: dict[str, Any]) -> str:
    """A number with its interval, n and control."""
    value, low, high, control = (
        in_words(row[key], row["unit"]) for key in ("value", "low", "high", "control")
    )
    interval = f" ({low} to {high})" if low else ""
    against = f"; control {control}" if control else ""
    return f"{value or 'not defined'}{interval}, n = {row['n']}{against}"


def _comparison(sections: dict[tuple[str, str], list[dict]]) -> pandas.DataFrame:
    """The findings of A to D of all latent models side by side, means over seeds."""
    columns: dict[str, dict[str, str]] = {}
    for (model, dataset), studies in sections.items():
        if not studies[0]["summary"]["latent"]:
            continue
        table = pandas.concat([study["findings"] for study in studies])
        shown = table[table["analysis"].isin(["A", "B", "C", "D"])]
        summaries = pandas.DataFrame([study["summary"] for study in studies])
        column = columns[f"{model}, {dataset}"] = {
            "accuracy": in_words(summaries["accuracy"].mean(), "share"),
            "latent steps": in_words(summaries["steps_mean"].mean(), "steps"),
        }
        for finding, rows in shown.groupby("finding", sort=False):
            column[finding] = in_words(rows["value"].mean(), rows["unit"].iloc[0])
    return pandas.DataFrame(columns).fillna("").reset_index(names="mean over seeds")


def main(arguments: list[str] | None = None) -> None:
    """Write the page of some folders."""
    command = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    command.add_argument("--output", type=Path, required=True, metavar="FILE")
    command.add_argument("--title", default="Inside the chain")
    options = command.parse_args(arguments)
    write_page(options.folders, options.output, options.title)


if __name__ == "__main__":
    run_stage(main)
