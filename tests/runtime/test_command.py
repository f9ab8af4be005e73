"""What every command line has in common: its numbers, its arguments' bytes, its console."""

import argparse
import io
import subprocess
import sys

import pytest

from latent_reasoning.runtime.command import count, positive, run_stage


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        (positive, "0", "0 is below 1"),
        (positive, "9" * 25, "9 is above 1000000000"),
        (count, "-3", "-3 is below 0"),
        (count, "x", "whole number"),
        (count, "9" * 25, "9 is above 9223372036854775807"),
        (count, "9" * 5000, "9 is not a whole number"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(kind, text, reason):
    assert (kind("7"), count("0")) == (7, 0)
    with pytest.raises(argparse.ArgumentTypeError, match=reason):
        kind(text)


def test_an_argument_that_is_no_text_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ask", "folder", "caf\udce9: how many?"])
    with pytest.raises(SystemExit, match="2"):
        run_stage(lambda arguments: pytest.fail("it ran"))
    assert capsys.readouterr().err.startswith(r"error: the argument 'caf\udce9: how many?' is not")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_what_the_console_cannot_write_is_escaped(monkeypatch, stream):
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "argv", ["evaluation"])
    monkeypatch.setattr(sys, stream, console)
    run_stage(lambda arguments: print("数字/café: 50 %", file=getattr(sys, stream)))
    console.flush()
    assert console.buffer.getvalue().decode("cp1252").strip() == r"\u6570\u5b57/café: 50 %"


@pytest.mark.parametrize(("argument", "importing"), [("-m", False), ("ask", True)])
def test_a_stage_looks_for_garbage_after_its_imports_and_a_library_always(argument, importing):
    script = (
        f"import gc, sys; sys.argv = [{argument!r}]; import latent_reasoning.runtime.command as c;"
        "print(gc.isenabled()); c.run_stage(lambda arguments: print(gc.isenabled()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(importing), "True"]
