"""The page of what was seen inside: numbers first, then figures, and examples to browse.

    python -m latent_reasoning.inside.page --output results/laptop/inside.html FOLDER..

It is one self-contained file, made of the folders that the stage writes: a section a model and data
set, with the numbers of every seed and the figures and examples of the first.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
from PIL import Image, ImageChops, ImageStat

from latent_reasoning.analysis.report import templates
from latent_reasoning.config import UserError
from latent_reasoning.inside.findings import in_words
from latent_reasoning.runtime.command import described, run_stage
from latent_reasoning.runtime.files import write_text_atomically

COLOURS = (32, 48, 64)
"""Of a picture on the page: the fewest with which it differs by `UNSEEN` at most."""
UNSEEN = 2.0
"""Root mean square of a channel's change, of 255."""
FIGURES = {
    "A": ("lens", "errors"),
    "B": ("counterfactual", "interventions"),
    "C": ("need",),
    "D": ("probes",),
    "E": (
        *("norms", "stream", "parts", "positions_unit", "positions_raw"),
        *("kinds", "latents", "distances"),
    ),
    "F": ("depth", "skips", "layers"),
    "G": ("attention",),
    "H": ("signals",),
}
"""The figures of each analysis; the page's template has its words."""


def write_page(folders: Sequence[Path], path: Path, title: str) -> None:
    """Write the page of studies. Raises `UserError` where a folder is none."""
    sections: dict[tuple[str, str], list[dict]] = {}
    for study in map(_read, folders):
        summary = study["summary"]
        sections.setdefault((summary["model"], summary["dataset"]), []).append(study)
    content = {
        "title": title,
        "sections": [_section(group) for group in sections.values()],
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


def _section(studies: list[dict]) -> dict[str, Any]:
    """What a section shows: numbers of all seeds, figures and examples of the first."""
    first, summary = studies[0], studies[0]["summary"]
    examples = json.dumps(first["examples"], ensure_ascii=False, separators=(",", ":"))
    return {
        "summary": summary,
        "seeds": [study["summary"]["seed"] for study in studies],
        # Not closed by text in it, whatever a row says.
        "examples": examples.replace("<", "\\u003c") if first["examples"] else "",
        "analyses": [
            {
                "letter": letter,
                "sentences": _sentences(letter, studies),
                "figures": {
                    name: base64.b64encode(_of_few_colours(file)).decode("ascii")
                    for name in figures
                    if (file := first["folder"] / "figures" / f"{name}.png").is_file()
                },
            }
            for letter, figures in FIGURES.items()
            if summary["latent"] or letter in ("E", "F")
        ],
    }


def _of_few_colours(file: Path) -> bytes:
    """A picture with a palette, as lossless WebP: half of its size, and the same to the eye."""
    picture, stream = Image.open(file).convert("RGB"), io.BytesIO()
    for colours in COLOURS:
        few = picture.quantize(colours, dither=Image.Dither.NONE).convert("RGB")
        if max(ImageStat.Stat(ImageChops.difference(picture, few)).rms) <= UNSEEN:
            break
    few.save(stream, "WEBP", lossless=True, quality=100)
    return stream.getvalue()


def _sentences(letter: str, studies: list[dict]) -> dict[str, list[tuple[int, str]]]:
    """Each finding in words, with the seeds that have it and their numbers: some findings name a
    block or a count, which differs between seeds."""
    found: dict[str, list[tuple[int, str]]] = {}
    for study in studies:
        table, seed = study["findings"], study["summary"]["seed"]
        for row in table[table["analysis"] == letter].to_dict("records"):
            found.setdefault(row["finding"], []).append((seed, _numbers(row)))
    return found


def _numbers(row: dict[str, Any]) -> str:
    """A number with its interval, n and control."""
    value, low, high, control = (
        in_words(row[key], row["unit"]) for key in ("value", "low", "high", "control")
    )
    interval = f" ({low} to {high})" if low else ""
    against = f"; control {control}" if control else ""
    return f"{value or 'not defined'}{interval}, n = {row['n']}{against}"


def _comparison(sections: dict[tuple[str, str], list[dict]]) -> pandas.DataFrame:
    """The findings of A to D of all latent models side by side: means over the seeds that have a
    number, with n and, where some have none, how many have."""
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
            column[finding] = _mean_of_seeds(rows.dropna(subset="value"), len(studies))
    return pandas.DataFrame(columns).fillna("").reset_index(names="mean over seeds")


def _mean_of_seeds(rows: pandas.DataFrame, seeds: int) -> str:
    """The mean of a finding's values, which several seeds may have from few rows or not at all."""
    if rows.empty:
        return ""
    least, most = rows["n"].min(), rows["n"].max()
    counts = f"n = {least}" if least == most else f"n = {least} to {most}"
    missing = "" if len(rows) == seeds else f", {len(rows)} of {seeds} seeds"
    return f"{in_words(rows['value'].mean(), rows['unit'].iloc[0])} ({counts}{missing})"


def main(arguments: list[str] | None = None) -> None:
    """Write the page of some folders."""
    command = described(__doc__)
    command.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    command.add_argument("--output", type=Path, required=True, metavar="FILE")
    command.add_argument("--title", default="Inside the chain")
    options = command.parse_args(arguments)
    write_page(options.folders, options.output, options.title)


if __name__ == "__main__":
    run_stage(main)
