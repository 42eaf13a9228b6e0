"""A real Slurm of a few nodes on this machine, for as long as a test needs it.

Every node has a network, a hostname, a /dev/shm and a process tree of its own (Linux namespaces), its slurmd as the
only way in, and a cable to a bridge that the controller sits on. Killing a node's first process is a power loss. Needs
root, namespaces, and the packages that run.sh installs.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "unshare", "nsenter")
_NETWORK = "192.0.2"  # reserved for documentation: no machine has it
_UP_S = 45

_CONF = """\
ClusterName=eaft
SlurmctldHost=ctl({network}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits for its credential to expire: 120 s unless told otherwise.
AuthInfo=socket={root}/munge.sock,cred_expire=5
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/%n.log
SlurmdSpoolDir={root}/spool/%n
StateSaveLocation={root}/state
# Neither cgroups nor systemd.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# The nodes have the cores written below, whatever the machine has.
SlurmdParameters=config_overrides
ReturnToService=2
# A test sees in seconds what a site sees in minutes.
SlurmdTimeout=10
MessageTimeout=5
KillWait=10
BatchStartTimeout=15
SchedulerParameters=bf_interval=2,sched_interval=2
NodeName=DEFAULT RealMemory=100000 State=UNKNOWN
{addresses}
# A job of "urgent" preempts those of "main", which have half a minute to save; then they are requeued.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def unavailable() -> str | None:
    """Why no cluster can be had here, or None."""
    if os.geteuid() != 0:
        return "it takes root"
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"not installed: {', '.join(missing)} (tests/slurm/run.sh installs them)"
    namespaces = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"]
    if subprocess.run(namespaces, capture_output=True).returncode != 0:
        return "this machine allows no namespaces"
    return None


class Cluster:
    """Up on entering, gone on leaving, with every process and file of it.

    Args:
        nodes: how many; they are named node1, node2, ...
        cpus: what each of them claims to have.
        last_cpus: what the last one claims, where that is another number.
    """

    def __init__(self, nodes: int = 2, cpus: int = 8, last_cpus: int | None = None) -> None:
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.cpus = dict.fromkeys(self.nodes, cpus) | {self.nodes[-1]: last_cpus or cpus}
        self._space = f"eaft{os.getpid()}"  # what the network namespaces are called
        self._alive: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Cluster:
        self.root = Path(tempfile.mkdtemp(prefix="eaft-slurm-"))
        self.root.chmod(0o755)  # munge wants its socket to be within reach of all
        try:
            self._configure()
            self._wire()
            munge = ["munged", "--foreground", f"--key-file={self.root}/munge.key", f"--socket={self.root}/munge.sock"]
            munge += [f"--{what}-file={self.root}/munged.{what}" for what in ("pid", "log", "seed")]
            self._start("munged", munge)
            _wait(lambda: (self.root / "munge.sock").exists(), 10, "munged opens no socket")
            self._start("ctl", ["slurmctld", "-D", "-f", str(self.root / "slurm.conf")])
            for node in self.nodes:
                self.power_on(node)
            self.wait_for_idle(_UP_S)
        except BaseException:
            for log in sorted((self.root / "log").glob("*.out")):
                print(f"{log.name}: {log.read_text()[-800:]}")
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for name in [*self.nodes, "ctl", "munged"]:
            self.power_off(name)
        for name in [*self.nodes, "ctl"]:
            subprocess.run(["ip", "netns", "del", f"{self._space}-{name}"], capture_output=True)
        shutil.rmtree(self.root, ignore_errors=True)

    def run(self, *argv: str, **kwargs) -> str:
        """What a command prints on the controller, the login node of this cluster."""
        inside = [
            "nsenter",
            "--target",
            str(self._first_process("ctl")),
            "--net",
            "--uts",
            "--mount",
            f"--wd={os.getcwd()}",
            "--",
        ]
        environment = {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf"), **kwargs.pop("env", {})}
        done = subprocess.run([*inside, *argv], env=environment, capture_output=True, text=True, timeout=90, **kwargs)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(argv)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def idle(self) -> bool:
        """Whether every node is up and has nothing to do."""
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            return self.run("sinfo", "--noheader", "--format=%D %t").split() == [str(len(self.nodes)), "idle"]
        return False

    def wait_for_idle(self, seconds: float) -> None:
        """Return when nothing runs any more."""
        _wait(self.idle, seconds, "the nodes are not idle", lambda: self.run("squeue") + self.run("sinfo", "-N"))

    def power_on(self, node: str) -> None:
        """Start a node, if it is off."""
        if node in self._alive:
            return
        (self.root / "spool" / node).mkdir(parents=True, exist_ok=True)
        boot = f"mount -t tmpfs -o mode=1777 tmpfs /dev/shm; slurmd -D -N {node} -f {self.root}/slurm.conf & wait"
        self._start(node, ["bash", "-c", boot], "--pid", "--fork", "--kill-child", "--mount-proc")

    def power_off(self, node: str) -> None:
        """Power loss: all processes of the node are gone at once."""
        if process := self._alive.pop(node, None):
            process.kill()
            process.wait()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows about a job: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", number)))

    def wait_for(self, number: str, states: set[str], seconds: float) -> dict[str, str]:
        """The job when it has come to one of the states."""
        return _wait(
            lambda: job if (job := self.job(number))["JobState"] in states else None,
            seconds,
            f"job {number} is not {' or '.join(sorted(states))}",
            lambda: self.run("squeue") + self.run("sinfo", "-N"),
        )

    def _configure(self) -> None:
        for name in ("log", "spool", "state"):
            (self.root / name).mkdir()
        key = self.root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        addresses = {"ctl": f"{_NETWORK}.1"}
        addresses |= {node: f"{_NETWORK}.{10 + number}" for number, node in enumerate(self.nodes, start=1)}
        # The mapped form spares torch a failing reverse look-up of its dual-stack sockets.
        lines = [f"{address} {name}\n::ffff:{address} {name}" for name, address in addresses.items()]
        (self.root / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n" + "\n".join(lines) + "\n")
        self.addresses = addresses
        conf = _CONF.format(
            root=self.root,
            network=_NETWORK,
            addresses="\n".join(
                f"NodeName={node} NodeAddr={addresses[node]} CPUs={self.cpus[node]}" for node in self.nodes
            ),
        )
        (self.root / "slurm.conf").write_text(conf)
        version = re.search(r"(\d+)\.(\d+)", subprocess.run(["slurmctld", "-V"], capture_output=True, text=True).stdout)
        new = (int(version[1]), int(version[2])) >= (23, 11)
        (self.root / "cgroup.conf").write_text(f"CgroupPlugin={'disabled' if new else 'cgroup/v1'}\n")

    def _wire(self) -> None:
        def ip(*words: str) -> None:
            subprocess.run(["ip", *words], check=True, capture_output=True)

        for name in self.addresses:
            space = f"{self._space}-{name}"
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
        hub = f"{self._space}-ctl"
        ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        ip("-n", hub, "addr", "add", f"{self.addresses['ctl']}/24", "dev", "bridge")
        ip("-n", hub, "link", "set", "bridge", "up")
        for node in self.nodes:
            space = f"{self._space}-{node}"
            ip("-n", hub, "link", "add", f"to-{node}", "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("-n", hub, "link", "set", f"to-{node}", "master", "bridge", "up")
            ip("-n", space, "addr", "add", f"{self.addresses[node]}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")

    def _start(self, name: str, argv: list[str], *namespaces: str) -> None:
        command = argv
        if name != "munged":
            boot = f'hostname {name}; mount --bind {self.root}/hosts /etc/hosts; exec "$@"'
            apart = ["unshare", "--uts", "--mount", *namespaces, "bash", "-c", boot, "boot"]
            command = ["ip", "netns", "exec", f"{self._space}-{name}", *apart, *argv]
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            self._alive[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _first_process(self, name: str) -> int:
        process = self._alive[name]
        if process.poll() is not None:
            raise RuntimeError(f"{name} ended with {process.returncode}: {self.root}/log/{name}.out")
        return process.pid


def _wait(found, seconds: float, message: str, more=lambda: ""):
    """What found() returns as soon as it is true; TimeoutError with the message and what more() says."""
    deadline = time.monotonic() + seconds
    while True:
        if result := found():
            return result
        if time.monotonic() > deadline:
            raise TimeoutError(f"{message} after {seconds} s\n{more()}")
        time.sleep(0.3)
