"""Stands in for every stage: writes the files that the stage would, with hardly any content.

What the workflow reruns depends on which files exist and on recorded params, not on what a stage
computes; with this in the stages' place a whole DAG is finished in seconds. Called as they are:
`python stand_in_stage.py -m latent_reasoning.sft --config FILE --model NAME ..`.
"""

import argparse
from pathlib import Path

from latent_reasoning.config import load
from latent_reasoning.dag.layout import EVALUATION_FILES, FIGURES, SPLITS, TABLES, Layout


def files_of(options: argparse.Namespace, layout: Layout) -> list[Path]:
    """The files that the stage in `options` writes."""
    stage = options.module.removeprefix("latent_reasoning.")
    if stage == "runtime.tracking":
        return []
    if stage == "data":
        splits = [options.dataset] if options.dataset else SPLITS
        files = [f(split) for split in splits for f in (layout.data, layout.data_digest)]
        dataset = options.dataset
        return [*files, layout.test_set_summary(dataset) if dataset else layout.data_summary]
    if stage in ("base", "sft", "rl"):
        model = options.model or "base"
        folder, digest = layout.model(model, options.seed), layout.model_digest(model, options.seed)
        return [folder / "model.safetensors", digest]
    if stage == "evaluation":
        folder = layout.evaluation(options.model, options.seed, options.dataset)
        return [folder / name for name in EVALUATION_FILES]
    if options.what == "appendix":
        return [layout.tables / f"appendix.{kind}" for kind in ("csv", "md", "tex")]
    if options.what == "ablations":
        figures = [layout.figures / f"ablations.{kind}" for kind in ("svg", "png")]
        return [layout.tables / "ablations.csv", *figures]
    if options.what == "tables":
        main = [layout.tables / f"main.{kind}" for kind in ("csv", "md", "tex")]
        return [*main, *(layout.tables / f"{name}.csv" for name in TABLES)]
    if options.what == "figures":
        return [layout.figures / f"{name}.{kind}" for name in FIGURES for kind in ("svg", "png")]
    return [layout.report]


def main() -> None:
    """Write the files of one stage; each says which digest of the configuration made it."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("-m", dest="module", required=True)
    arguments.add_argument("what", nargs="?")
    arguments.add_argument("--config", required=True)
    arguments.add_argument("--digest", default="")
    arguments.add_argument("--model")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--dataset")
    options = arguments.parse_args()
    layout = Layout.of(load(options.config))
    for file in files_of(options, layout):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{file.name} {options.digest}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
