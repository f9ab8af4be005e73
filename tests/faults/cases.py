"""What is noted of each fault."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Case:
    """One injected fault: what happened, and everything that was not as it is to be.

    `skipped` gives the reason where this machine does not allow the fault.
    """

    fault: str
    rule: str
    injected: str = ""
    problems: list[str] = field(default_factory=list)
    skipped: str = ""
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def check(self, holds: object, problem: str) -> None:
        """Note `problem` unless something holds."""
        if not holds:
            self.problems.append(problem)

    def finish(self) -> Case:
        self.seconds = time.monotonic() - self.started
        return self

    @property
    def survived(self) -> bool:
        return not self.problems and not self.skipped

    @property
    def row(self) -> dict[str, object]:
        """The row of `faults.csv`."""
        return {
            "fault": self.fault,
            "rule": self.rule,
            "injected": self.injected,
            "survived": "skipped" if self.skipped else str(self.survived).lower(),
            "seconds": f"{self.seconds:.1f}",
            "note": self.skipped or "; ".join(self.problems),
        }
