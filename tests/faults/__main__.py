"""The fault campaign: what long training meets, done to the real workflow on purpose.

    python -m tests.faults [--quick] [--seed N] [--output DIR] [--only WORD ..]     (make faults)

An undisturbed run of the test experiment is the reference. Then the DAG is made from nothing under
kill -9 at random moments, and every other fault is done to a copy of the reference: damaged
results, checkpoints and inputs, a full and a read-only disk, a second Snakemake, a tracking store
that is away, a clock that is off. After each, the next run ends with the same results, to the bit;
no process is left, nothing half written has its final name, and a refusal is a readable one. A fuzz
of configurations and rows follows. Everything random comes from `--seed`.

Written to DIR as it goes: `faults.csv` (a line a fault), `fuzz.csv`, `summary.json` (counts,
seconds, versions, and whether the campaign finished). Exit code 1 where anything was not survived.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock

import yaml

from latent_reasoning.analysis.environment import environment
from latent_reasoning.config import PROJECT_ROOT, load
from tests.faults import damage, surroundings
from tests.faults.cases import Case
from tests.faults.fuzz import Tally, fuzz_configurations, fuzz_rows
from tests.faults.kills import ALL, ALONE, JOB, Kill, KillCampaign, planned_kills
from tests.faults.reference import Reference
from tests.faults.workbench import Workbench, seconds_by_rule, write_experiment

IN_NAMESPACE = "FAULTS_IN_MOUNT_NAMESPACE"
AT_ONCE = 2
QUICK_KILLS = [
    Kill("base_model", JOB, 0.5),
    Kill("latent_sft", JOB, 0.0, writing=True),
    Kill("evaluate", ALONE, 0.3),
    Kill("base_model", ALL, 0.8),
    Kill("tables", JOB, 0.5),
]
EXTRA_KILLS = 15
FUZZ = {"quick": (130, 66), "full": (700, 400)}
"""Cases of configurations and rows."""

Fault = Callable[[Workbench, Reference, random.Random], Case]


@dataclass
class Campaign:
    """The experiment of a campaign, its reference, and what came of each fault."""

    folder: Path
    quick: bool
    seed: int
    output: Path
    only: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    cases: list[Case] = field(default_factory=list)
    tallies: list[Tally] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    def run(self) -> None:
        """The reference, then everything else, `AT_ONCE` at a time."""
        self.say(f"seed {self.seed}; an undisturbed run is the reference")
        self.bench = Workbench(self.folder / "reference", cores=AT_ONCE)
        write_experiment(self.bench.folder, self.experiment())
        more = [] if self.quick else ["appendix", "results/test/data/extra.jsonl"]
        self.targets = ["all", *more]
        run = self.bench.run(*self.targets)
        if run.returncode:
            sys.exit(f"error: the undisturbed run failed:\n{run.output[-3000:]}")
        self.reference = Reference.of(self.bench.results)
        self.seconds = seconds_by_rule(self.bench.results)
        self.say(f"{len(self.reference.files)} results of {len(self.seconds)} rules to compare")
        with ThreadPoolExecutor(AT_ONCE) as pool:
            tasks = [pool.submit(task) for name, task in self.tasks() if self.wanted(name)]
            for task in tasks:
                task.result()
        self.write(finished=True)

    def experiment(self) -> dict:
        """The test experiment, shortened to one model or with every rule in it."""
        test = yaml.safe_load((PROJECT_ROOT / "config" / "test.yaml").read_text("utf-8"))
        if self.quick:
            test["models"] = {"latent-6": test["models"]["latent-6"]}
            test["report"] = {"title": "The fault campaign"}
        else:
            extra = self.folder / "extra.jsonl"
            extra.write_text('{"question": "1 + 1?", "answer": "2"}\n', encoding="utf-8")
            test["data"]["extra_tests"] = {"extra": str(extra)}
            test["models"]["untrained"] = {"stage": "import", "from": "base"}
        return test

    def tasks(self) -> list[tuple[str, Callable[[], None]]]:
        """Everything to do after the reference, by name."""
        named = faults(self.quick, random.Random(f"{self.seed} faults"))
        tasks = [(name, partial(self.do, n, name, f)) for n, (name, f) in enumerate(named)]
        return [("kills", self.kill), *tasks, ("fuzz", self.fuzz)]

    def wanted(self, name: str) -> bool:
        return not self.only or any(word in name for word in self.only)

    def kill(self) -> None:
        """The DAG from nothing, under kills."""
        rules = sorted(set(self.seconds) - {"benchmark"})
        chance = random.Random(f"{self.seed} kills")
        kills = QUICK_KILLS if self.quick else planned_kills(rules, EXTRA_KILLS, chance)
        bench = Workbench(self.folder / "kills", cores=1 if self.quick else AT_ONCE)
        write_experiment(bench.folder, self.experiment())
        self.note(KillCampaign(bench, self.reference, self.seconds, self.targets).run(kills))

    def do(self, number: int, name: str, fault: Fault) -> None:
        """One fault, on a copy of the reference of its own."""
        bench = self.bench.copy(self.folder / f"fault-{number}", cores=1)
        randomness = random.Random(f"{self.seed} {number} {name}")
        try:
            case = fault(bench, self.reference, randomness)
        except Exception as error:  # the campaign continues, and counts it
            case = Case(name, "", problems=[f"the campaign's own {type(error).__name__}: {error}"])
        bench.orphans()
        self.note([case])
        if case.survived or case.skipped:
            shutil.rmtree(bench.folder, ignore_errors=True)

    def fuzz(self) -> None:
        """Random configurations and rows."""
        folder = self.folder / "fuzz"
        folder.mkdir()
        cases = FUZZ["quick" if self.quick else "full"]
        for kind, number in zip((fuzz_configurations, fuzz_rows), cases, strict=True):
            with contextlib.redirect_stdout(io.StringIO()):
                tally = kind(folder, number, self.seed)
            self.tallies.append(tally)
            self.say(
                f"fuzz: {tally.cases} {tally.kind}, {tally.accepted} accepted, "
                f"{tally.refused} refused in words, {len(tally.findings)} findings"
            )

    def note(self, cases: list[Case]) -> None:
        for case in cases:
            self.cases.append(case)
            state = "skipped" if case.skipped else "survived" if case.survived else "NOT SURVIVED"
            what = f"{case.fault}, {case.rule}: {case.injected} ({case.seconds:.0f} s)"
            self.say(f"{state}: {what}" + (f": {case.row['note']}" if case.row["note"] else ""))
        self.write()

    def say(self, line: str) -> None:
        print(line, file=sys.__stdout__, flush=True)

    @property
    def survived(self) -> bool:
        faults = all(case.survived or case.skipped for case in self.cases)
        return faults and not any(tally.findings for tally in self.tallies)

    def summary(self, finished: bool) -> dict:
        """What was counted so far."""
        kills = [case for case in self.cases if case.fault.startswith("kill -9")]
        others = [case for case in self.cases if not case.fault.startswith("kill")]
        return {
            "campaign": "quick" if self.quick else "full",
            "seed": self.seed,
            "finished": finished,
            "seconds": round(time.monotonic() - self.started),
            "results_compared": len(self.reference.files),
            "kills": len(kills),
            "kills_survived": sum(case.survived for case in kills),
            "rules_killed": sorted({case.rule for case in kills}),
            "faults_injected": sum(not case.skipped for case in others),
            "faults_survived": sum(case.survived for case in others),
            "faults_skipped": sum(bool(case.skipped) for case in others),
            "faults": dict(Counter(case.fault for case in others)),
            "cases_fuzzed": sum(tally.cases for tally in self.tallies),
            "fuzz_findings": sum(len(tally.findings) for tally in self.tallies),
            "environment": environment(load(self.bench.config)),
        }

    def write(self, finished: bool = False) -> None:
        """The files of the module's docstring, after each fault: a campaign may be stopped."""
        with self.lock:
            self.output.mkdir(parents=True, exist_ok=True)
            write_csv(self.output / "faults.csv", [case.row for case in self.cases])
            write_csv(self.output / "fuzz.csv", [tally.row for tally in self.tallies])
            text = json.dumps(self.summary(finished), indent=2, ensure_ascii=False)
            (self.output / "summary.json").write_text(text + "\n", encoding="utf-8")


def faults(quick: bool, choice: random.Random) -> list[tuple[str, Fault]]:
    """Each kind of fault by name; the full campaign does most of them in several ways."""
    latent, kinds = "latent-6", list(damage.DAMAGES)
    outputs = list(damage.every_damage(choice))
    checkpoints = [(latent, kind) for kind in kinds]
    checkpoints += [("base", "truncated"), ("latent-6-rl", "overwritten")]
    inputs = [("rows", "truncated"), ("weights", "one bit flipped")]
    inputs += [("rows", "overwritten"), ("weights", "truncated")]
    disks = [(16, surroundings.DURING), (0, surroundings.BEFORE)]
    disks += [(60, surroundings.DURING), (120, surroundings.DURING)]
    stores = list(surroundings.STORES)
    if quick:
        outputs = [(damage.OUTPUTS[0], "one bit flipped")]
        checkpoints = [(latent, choice.choice(kinds))]
        inputs, disks, stores = inputs[:1], disks[:1], stores[:2]
    made: list[tuple[str, Fault]] = [
        ("read-only results", surroundings.read_only),
        ("two Snakemakes", surroundings.two_at_once),
        ("clock", surroundings.clock_was_ahead),
    ]
    for output, kind in outputs:
        fault = partial(damage.damaged_output, output=output, damage=kind, model=latent)
        made.append(("damaged output", fault))
    for model, kind in checkpoints:
        fault = partial(damage.damaged_checkpoint, model=model, damage=kind)
        made.append(("damaged checkpoint", fault))
    for what, kind in inputs:
        made.append(("damaged input", partial(damage.damaged_input, what=what, damage=kind)))
    for kilobytes, when in disks:
        fault = partial(surroundings.full_disk, kilobytes=kilobytes, when=when)
        made.append(("full disk", fault))
    for store in stores:
        made.append(("tracking", partial(surroundings.tracking, trouble=store)))
    return made


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def enter_mount_namespace() -> None:
    """Start again where mounts are this process's own and end with it, if that is allowed."""
    if IN_NAMESPACE in os.environ or surroundings.why_no_mounts():
        return
    os.environ[IN_NAMESPACE] = "1"
    command = ["unshare", "--mount", "--propagation", "private", sys.executable]
    os.execvp(command[0], [*command, "-m", "tests.faults", *sys.argv[1:]])


def main() -> None:
    """Run the campaign, print what it counted, and say whether all was survived."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = arguments.add_argument
    add("--quick", action="store_true", help="5 kills, each fault once on a short DAG, 200 cases")
    add("--seed", type=int, default=0, help="of everything random")
    add("--output", type=Path, default=PROJECT_ROOT / "results" / "faults", help="folder to write")
    add("--only", nargs="+", default=[], metavar="WORD", help="faults whose name holds a word")
    options = arguments.parse_args()
    enter_mount_namespace()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ["LATENT_REASONING_RESULTS"] = str(folder / "fuzz" / "results")
    campaign = Campaign(folder, options.quick, options.seed, options.output, options.only)
    campaign.run()
    count = campaign.summary(finished=True)
    print(
        f"{count['kills_survived']} of {count['kills']} kills survived, "
        f"{count['faults_survived']} of {count['faults_injected']} other faults "
        f"({count['faults_skipped']} skipped), {count['cases_fuzzed']} cases fuzzed with "
        f"{count['fuzz_findings']} findings, {count['results_compared']} results compared, "
        f"{count['seconds']} s: {options.output}"
    )
    for tally in campaign.tallies:
        for finding in tally.findings:
            print(f"finding, {tally.kind}: {finding}")
    if not campaign.survived:
        print(f"left for a look: {folder}")
        sys.exit(1)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
