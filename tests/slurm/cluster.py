"""A SLURM of one node on loopback, in a folder of its own: real daemons, for tests.

munge authenticates, MariaDB and slurmdbd keep the accounts that `sacct` reads, slurmctld schedules
and slurmd runs the jobs, all as the user who starts them and without systemd. Sockets, keys, data,
logs and configuration lie in the folder, ports are free ones of 127.0.0.1, and nothing is left when
it stops. The node claims GPUs, which are empty files: who asks for one is given it, and finds
no device.

Needs Debian's munge, slurm-wlm, slurmdbd and mariadb-server (`tests/slurm/install.sh`).
"""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch")
ACCOUNT = "research"
PARTITIONS = ("short", "long")  # the first is the default
GPUS = 8
# What is asked of `sacct`, and what its lines are to be parted by: nothing that a command holds.
ACCOUNTS = ["State", "Account", "Partition", "ReqTRES", "TimelimitRaw", "Comment", "SubmitLine"]
SEPARATOR = "\x1f"
START_SECONDS = 60
STOP_SECONDS = 20
SEARCHED = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def missing_programs() -> list[str]:
    """The programs that are needed and not installed."""
    return [name for name in PROGRAMS if not shutil.which(name, path=SEARCHED)]


class Cluster:
    """The daemons; `variables` of the environment lead SLURM's commands to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configuration = folder / "slurm.conf"
        self.variables = {
            "PATH": os.pathsep.join([str(folder / "bin"), SEARCHED]),
            "SLURM_CONF": str(self.configuration),
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._ports = dict(
            zip(("mariadb", "slurmdbd", "slurmctld", "slurmd"), _free_ports(4), strict=True)
        )

    # -------------------------------------------------------------------------------- for tests

    def run(self, *command: str) -> str:
        """What a command says; raises with its messages where it fails."""
        result = subprocess.run(
            command, env=os.environ | self.variables, capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.stdout}{result.stderr}")
        return result.stdout

    def jobs(self) -> list[dict[str, str]]:
        """The accounts of all jobs so far, by submission; a job that SLURM started again twice."""
        report = self.run(
            *("sacct", "--allocations", "--allusers", "--duplicates", "--noheader", "--parsable2"),
            *("--starttime", "now-1days", f"--delimiter={SEPARATOR}"),
            *("--format", ",".join(ACCOUNTS)),
        )
        lines = [line.split(SEPARATOR) for line in report.splitlines()]
        return [dict(zip(ACCOUNTS, line, strict=True)) for line in lines]

    def processes(self) -> list[psutil.Process]:
        """Everything alive that belongs to this cluster: daemons, job steps and their children."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                mine = process.environ().get("SLURM_CONF") == str(self.configuration)
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    # ------------------------------------------------------------------------------ start, stop

    def start(self) -> None:
        """Write the configuration and start the daemons, each when the one it needs answers."""
        self._write()
        self._daemon(
            *("munged", "--foreground", "--force", "--num-threads=2"),
            *(f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "seed")),
            *(f"--log-file={self.folder}/log/munge.log", f"--socket={self._munge}"),
        )
        self._wait_for("munged", "munge", "--no-input", f"--socket={self._munge}")
        self._start_database()
        self._daemon("slurmdbd", "-D")
        self._wait_for("slurmdbd", "sacctmgr", "--immediate", "add", "cluster", "test")
        self.run("sacctmgr", "--immediate", "add", "account", ACCOUNT)
        user = ("user", getpass.getuser(), f"account={ACCOUNT}")
        self.run("sacctmgr", "--immediate", "add", *user)
        self._daemon("slurmctld", "-D", "-f", str(self.configuration))
        self._wait_for("slurmctld", "scontrol", "ping")
        self._daemon("slurmd", "-D", "-f", str(self.configuration))
        self._wait_for("slurmd", "sh", "-c", "sinfo --noheader --format=%T | grep -qx idle")

    def stop(self) -> None:
        """End all jobs and daemons, the ones that others need last."""
        with contextlib.suppress(RuntimeError, FileNotFoundError):
            self.run("scancel", f"--user={getpass.getuser()}")
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline and self._running("slurmstepd"):
            time.sleep(0.1)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self.processes():  # what a daemon that died has left behind
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _running(self, name: str) -> bool:
        return any(process.name() == name for process in self.processes())

    def _start_database(self) -> None:
        data = self.folder / "mariadb"
        self.run(
            *("mariadb-install-db", "--no-defaults", f"--datadir={data}", "--skip-test-db"),
            *(f"--user={getpass.getuser()}", "--auth-root-authentication-method=socket"),
        )
        statements = self.folder / "accounts.sql"
        statements.write_text(
            "CREATE DATABASE slurm;\n"
            "CREATE USER slurm@'127.0.0.1' IDENTIFIED BY 'slurm';\n"
            "GRANT ALL ON slurm.* TO slurm@'127.0.0.1';\n",
            encoding="utf-8",
        )
        self._daemon(
            *("mariadbd", "--no-defaults", f"--user={getpass.getuser()}", f"--datadir={data}"),
            *("--bind-address=127.0.0.1", f"--port={self._ports['mariadb']}"),
            *(f"--socket={self.folder}/mariadb.socket", f"--pid-file={self.folder}/mariadb.pid"),
            *("--skip-name-resolve", f"--init-file={statements}", "--innodb-buffer-pool-size=64M"),
            *("--innodb-flush-log-at-trx-commit=0", "--innodb-lock-wait-timeout=900"),
        )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(self._database, 1):
                return
            self._check("mariadbd")
            time.sleep(0.1)
        raise RuntimeError(f"mariadbd does not answer:\n{self._log('mariadbd')}")

    @property
    def _munge(self) -> Path:
        return self.folder / "munge.socket"

    @property
    def _database(self) -> tuple[str, int]:
        return "127.0.0.1", self._ports["mariadb"]

    def _daemon(self, *command: str) -> None:
        """Start a daemon that ends with this process, however that ends."""
        with (self.folder / "log" / f"{command[0]}.out").open("wb") as log:
            self._daemons[command[0]] = subprocess.Popen(
                command,
                env=os.environ | self.variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_end_with_parent,
            )

    def _wait_for(self, daemon: str, *question: str) -> None:
        """Wait until `daemon` answers a command."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.run(*question)
                return
            except RuntimeError as error:
                self._check(daemon)
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{error}\n{self._log(daemon)}") from None
            time.sleep(0.1)

    def _check(self, daemon: str) -> None:
        if self._daemons[daemon].poll() is not None:
            raise RuntimeError(f"{daemon} did not start:\n{self._log(daemon)}")

    def _log(self, daemon: str) -> str:
        return (self.folder / "log" / f"{daemon}.out").read_text("utf-8", "replace")[-3000:]

    def _write(self) -> None:
        for name in ("bin", "log", "spool", "state", "mariadb"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        gpus = [self.folder / f"gpu{number}" for number in range(GPUS)]
        for file in gpus:
            file.touch()
        self.configuration.write_text(self._slurm(), encoding="utf-8")
        gres = "".join(f"Name=gpu File={file}\n" for file in gpus)
        (self.folder / "gres.conf").write_text(gres, encoding="utf-8")
        database = self.folder / "slurmdbd.conf"
        database.touch(mode=0o600)
        database.write_text(self._slurmdbd(), encoding="utf-8")
        # The plugin clears SLURM_CONF, among other variables, from what it starts inside a job.
        launcher = self.folder / "bin" / "srun"
        srun = shutil.which("srun", path=SEARCHED)
        launcher.write_text(
            f'#!/bin/sh\nSLURM_CONF={self.configuration} exec {srun} "$@"\n', encoding="utf-8"
        )
        launcher.chmod(0o755)

    def _slurm(self) -> str:
        host = socket.gethostname().split(".")[0]
        partitions = "".join(
            f"PartitionName={name} Nodes={host} MaxTime=1440 Default={default}\n"
            for name, default in zip(PARTITIONS, ("YES", "NO"), strict=True)
        )
        return f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={self._ports["slurmctld"]}
SlurmdPort={self._ports["slurmd"]}
SlurmUser={getpass.getuser()}
SlurmdUser={getpass.getuser()}
AuthType=auth/munge
AuthInfo=socket={self._munge},cred_expire=5
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd.pid
SlurmctldLogFile={self.folder}/log/slurmctld.log
SlurmdLogFile={self.folder}/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
KillWait=5
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={self._ports["slurmdbd"]}
AccountingStoragePass={self._munge}
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=64000 Gres=gpu:{GPUS}
{partitions}"""

    def _slurmdbd(self) -> str:
        return f"""AuthType=auth/munge
AuthInfo=socket={self._munge}
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={self._ports["slurmdbd"]}
SlurmUser={getpass.getuser()}
LogFile={self.folder}/log/slurmdbd.log
PidFile={self.folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={self._ports["mariadb"]}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
"""


@contextlib.contextmanager
def started(cluster: Cluster) -> Iterator[Cluster]:
    """A running cluster, stopped in the end however that comes."""
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]


def _end_with_parent() -> None:
    """Ask Linux to end this process when the one that started it is gone."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
