"""Kill -9 at random moments while the whole DAG is made from nothing.

Killed are jobs, Snakemake with everything it started, or Snakemake alone. The next Snakemake goes
on from there, until all results stand; whatever has its final name in between is whole and right.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

from tests.faults.cases import Case
from tests.faults.reference import Reference, leftovers
from tests.faults.workbench import TRACEBACK, Job, Started, Workbench

JOB, ALL, ALONE = "job", "Snakemake and its jobs", "Snakemake alone"
POLL_SECONDS = 0.01
SECONDS_BETWEEN_LISTS = 0.1
ROUNDS = 60
"""Starts of Snakemake after which a campaign gives up."""


@dataclass
class Kill:
    """A kill to come: in a job of `rule`, after a share of its time, or once it is `writing`."""

    rule: str
    victim: str
    share: float
    writing: bool = False

    @property
    def when(self) -> str:
        return "while writing" if self.writing else f"after {self.share:.0%} of its CPU time"


def planned_kills(rules: Sequence[str], extra: int, randomness: random.Random) -> list[Kill]:
    """One kill of a job of every rule, and `extra` more of all sorts; a function of the seed."""
    kills = [Kill(rule, JOB, randomness.random()) for rule in rules]
    trained = [rule for rule in rules if rule in ("base_model", "sft", "latent_sft", "rl")]
    for number in range(extra):
        rule = randomness.choice([*trained, *trained, *rules])
        victim = (JOB, ALL, ALONE)[number % 3]
        writing = victim == JOB and rule != "tracking_store"
        kills.append(Kill(rule, victim, randomness.random(), writing))
    randomness.shuffle(kills)
    return kills


class KillCampaign:
    """Runs the DAG of a bench, killing as planned, until it is finished."""

    def __init__(
        self, bench: Workbench, reference: Reference, seconds: Mapping[str, float], targets
    ) -> None:
        self.bench, self.reference, self.seconds = bench, reference, seconds
        self.targets = targets
        self.cases: list[Case] = []

    def run(self, kills: Sequence[Kill]) -> list[Case]:
        """One case a kill, and a last one that compares all results."""
        pending, end = list(kills), Case("kills: all results in the end", "all")
        again: list[str] = []
        for _ in range(ROUNDS):
            struck = len(self.cases)
            run_ended_well = self._round(pending, again)
            if run_ended_well and not pending:
                break
            again = []
            if run_ended_well and len(self.cases) == struck:  # a kill came too late
                again = ["--forcerun", pending[0].rule]
                shutil.rmtree(self.bench.results / "checkpoints")
        else:
            end.check(False, f"not finished after {ROUNDS} starts")
        end.check(not pending, f"{len(pending)} kills found no job")
        end.injected = f"{len(self.cases)} kills in all"
        problems = self.reference.problems(self.bench.results, complete=True)
        left = [path for path in leftovers(self.bench.results) if path.is_dir()]
        end.problems += problems + [f"{path.name}: left behind" for path in left]
        for case in self.cases if problems else []:
            case.problems.append("the results in the end differ")
        return [*self.cases, end.finish()]

    def _round(self, pending: list[Kill], options: Sequence[str]) -> bool:
        """One Snakemake, struck as pending kills say; whether it came to its end."""
        first = len(self.cases)
        workflow = self.bench.start(*options, "--", *self.targets)
        aims: dict[int, tuple[Job, Kill]] = {}
        seen: set[int] = set()
        listed = 0.0
        while workflow.runs:
            if time.monotonic() - listed > SECONDS_BETWEEN_LISTS:
                listed = time.monotonic()
                for job in self.bench.jobs(workflow):
                    kill = next((k for k in pending if k.rule == job.rule), None)
                    if job.process.pid not in seen and kill is not None:
                        aims[job.process.pid] = job, kill
                        pending.remove(kill)
                    seen.add(job.process.pid)
            for pid, (job, kill) in list(aims.items()):
                if not job.process.is_running():
                    pending.append(aims.pop(pid)[1])  # it ended before its moment came
                elif self._is_time(job, kill):
                    del aims[pid]
                    if self._strike(workflow, job, kill) and kill.victim != JOB:
                        break
            time.sleep(POLL_SECONDS)
        pending += [kill for _, kill in aims.values()]
        self._inspect(workflow, self.cases[first:])
        return workflow.process.returncode == 0

    def _is_time(self, job: Job, kill: Kill) -> bool:
        if kill.writing and job.rule not in ("tables", "figures", "report"):
            return any(time >= job.process.create_time() for time in self._writing())
        return job.cpu_seconds >= kill.share * self.seconds.get(job.rule, 1.0)

    def _writing(self) -> list[float]:
        """When each file or folder was touched that has a temporary name now."""
        times = []
        with contextlib.suppress(OSError):  # they come and go
            times += [path.stat().st_ctime for path in leftovers(self.bench.results)]
        return times

    def _strike(self, workflow: Started, job: Job, kill: Kill) -> bool:
        case = Case(f"kill -9: {kill.victim}", job.rule)
        case.injected = f"{job.name} {kill.when} ({job.cpu_seconds:.1f} s)"
        victims = [psutil.Process(workflow.process.pid)]
        if kill.victim == JOB:
            victims = [job.process]
        elif kill.victim == ALL:
            victims += victims[0].children(recursive=True)
        try:
            for process in victims:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        finally:
            self.cases.append(case)
        return True

    def _inspect(self, workflow: Started, cases: list[Case]) -> None:
        """After a Snakemake has ended: no process, nothing half written, no other failure."""
        run = self.bench.finish(workflow)
        orphans = self.bench.orphans()
        problems = [f"orphan: {name}" for name in orphans]
        problems += self.reference.problems(self.bench.results)
        if TRACEBACK in run.output:
            problems.append("a traceback in the output")
        killed = [case.rule for case in cases if case.fault.endswith(JOB)]
        for rule in run.failed_rules:
            if rule in killed:
                killed.remove(rule)
            else:
                problems.append(f"{rule} failed by itself")
        if cases and workflow.process.returncode < 0:
            self.bench.unlock()
        if problems and not cases:
            cases = [Case("kills: the next run", "all")]
            self.cases += cases
        for case in cases:
            case.problems += problems
            case.finish()
