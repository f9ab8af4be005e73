"""Every figure is drawn from the files, shows their numbers, and is the same each time."""

import matplotlib
import pytest
from matplotlib.image import imread

from latent_reasoning.analysis import figures, style
from latent_reasoning.analysis.results import Results
from tests.analysis.conftest import TRAINING, experiment


def labels(axes):
    return axes.get_legend_handles_labels()[1]


def test_every_figure_is_written_wide_enough_to_read(drawn):
    assert {path.stem for path in drawn.iterdir()} == set(figures.FIGURES)
    for name in figures.FIGURES:
        height, width, _ = imread(drawn / f"{name}.png").shape
        assert width == 1280
        assert height >= 400


def test_equal_input_gives_equal_files(three_seeds, drawn, tmp_path):
    style.save(figures.draw("length_by_steps", three_seeds), tmp_path, "length_by_steps")
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (drawn / path.name).read_bytes()


def test_rl_models_share_the_colour_of_their_start_and_differ_in_line_and_marker(three_seeds):
    look = style.looks(three_seeds)
    assert look["latent-6"].colour == look["latent-6-rl"].colour
    assert look["latent-6"].line["linestyle"] != look["latent-6-rl"].line["linestyle"]
    assert look["latent-6"].point["markerfacecolor"] == "white"
    assert len({entry.colour for entry in look.values()}) == 4


def test_no_two_of_nine_models_look_alike():
    models = {f"sft-{i}": {"stage": "sft", "training": TRAINING} for i in range(9)}
    looks = style.looks(Results.of(experiment(models=models))).values()
    assert len({(look.colour, look.marker) for look in looks}) == 9


def test_accuracy_vs_tokens_puts_each_model_at_its_means(three_seeds):
    everything, latent = figures.draw("accuracy_vs_tokens", three_seeds).axes
    assert labels(everything) == three_seeds.models
    assert labels(latent) == ["latent-6", "latent-6-by-1", "latent-6-rl", "latent-6-by-1-rl"]
    handle = latent.get_legend_handles_labels()[0][0]
    (x,), (y,) = handle.lines[0].get_data()
    assert x == 8.0
    assert y == pytest.approx(
        sum(three_seeds.summary("latent-6", s, "test")["accuracy"] for s in range(3)) / 3
    )


def test_length_distribution_shows_right_and_wrong_answers_apart(three_seeds):
    right, _, wrong, _ = figures.draw("length_distribution", three_seeds).axes
    before = three_seeds.pooled_predictions("latent-6", "test")["correct"]
    after = three_seeds.pooled_predictions("latent-6-rl", "test")["correct"]
    title = right.get_title("left")
    assert title == f"latent-6-rl: {before.sum():,} right before, {after.sum():,} after"
    assert wrong.get_title("left").startswith(f"latent-6-rl: {(~before).sum():,} wrong before")
    for axes in (right, wrong):
        for bars in axes.containers:
            assert sum(bar.get_height() for bar in bars) == pytest.approx(1.0)


def test_length_by_steps_draws_the_mean_and_a_line_a_seed(three_seeds, written):
    axes = figures.draw("length_by_steps", three_seeds).axes[0]
    assert labels(axes) == ["before RL", "after RL"]
    assert len(axes.lines) == 2 * (1 + 3)
    before = axes.get_legend_handles_labels()[0][0]
    assert list(before.get_xdata()) == [1, 2, 3, 4, 5]
    assert list(before.get_ydata()) == [8.0] * 5
    assert len(figures.draw("length_by_steps", written(0)).axes[0].lines) == 2


def test_accuracy_forced_draws_latent_models_from_0_and_no_cot_as_a_level(three_seeds):
    axes = figures.draw("accuracy_forced", three_seeds).axes[0]
    assert labels(axes)[:-1] == ["latent-6", "latent-6-by-1", "latent-6-rl", "latent-6-by-1-rl"]
    assert labels(axes)[-1] == "no-cot-sft (no steps)"
    line = axes.get_legend_handles_labels()[0][0]
    assert list(line.get_xdata()) == list(range(9))
    assert line.get_ydata()[0] == pytest.approx(0.33)


def test_training_curves_fill_every_panel(three_seeds):
    axes = figures.draw("training_curves", three_seeds).axes
    assert [ax.get_title("left") for ax in axes] == [panel.title for panel in figures.PANELS]
    drawn = [len(ax.lines) for ax in axes]
    assert drawn == [12, 18, 18, 6, 6, 6]


def test_figures_of_rl_say_so_where_there_is_none(written):
    results = written(0, report={"main": ["cot-sft", "no-cot-sft"]})
    for name in ("length_distribution", "length_by_steps"):
        assert "RL" in figures.draw(name, results).texts[0].get_text()
    assert "latent" in figures.draw("accuracy_forced", results).texts[0].get_text()
    assert len(figures.draw("accuracy_vs_tokens", results).axes) == 1


def test_length_by_steps_says_so_where_no_row_has_steps(without_steps):
    text = figures.draw("length_by_steps", without_steps).texts[0].get_text()
    assert "no reasoning steps" in text


def test_drawing_leaves_matplotlib_as_it_was(three_seeds):
    before = dict(matplotlib.rcParams)
    figures.draw("accuracy_forced", three_seeds)
    assert dict(matplotlib.rcParams) == before
