"""
Claims about program.md: a night in small, made of its shell blocks.

The tests find the blocks by their headings, so the text of program.md may be edited. Each command
runs in a new shell. train.py is a stub that ends at once with the numbers that a test wants, `uv`
runs Python and nothing else, and `sleep` is short. All other things are real: git, the shell, awk,
and prepare.py, which the setup asks whether text is prepared.
"""

import argparse
import bz2
import copy
import getpass
import hashlib
import inspect
import lzma
import math
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
from conftest import GIT_ENV, HEADER, ROOT, git

# ---------------------------------------------------------------------------
# The commands of program.md

PROGRAM = (ROOT / "program.md").read_text()


def blocks(heading: str) -> list[str]:
    """The shell blocks of program.md under a heading, in order."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PROGRAM, re.DOTALL | re.MULTILINE)
    return re.findall(r"^```sh\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)


def inline(start: str) -> str:
    """The command in the prose of program.md that begins with this. There must be just one."""
    prose = re.sub(r"```.*?```", "", PROGRAM, flags=re.DOTALL)
    found = {" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)}
    (command,) = {code for code in found if code.startswith(start)}
    return command


SETUP = blocks("Setup")[0]
RESUME = blocks("Resume")[0]
LOAD, EXPERIMENT = blocks("One experiment")[:2]
COMMIT, RUN_AND_POLL, FINISH = (line.split("  ")[0] for line in EXPERIMENT.splitlines())
(RULE,) = (block for block in blocks("The keep rule") if block.startswith("#:"))

# The lines of README.md for many GPUs.
README = (ROOT / "README.md").read_text()
WORKTREE, REMOTE = re.findall(r"^(git (?:worktree|init) .*?)  +#", README, re.MULTILINE)
SLURM, SSH, POD = re.findall(r"^export LAUNCH='(.*)'", README, re.MULTILINE)

# A human may write another keep rule into program.md. These tests put this one in its place.
TWO_SEEDS = r"""#: the keep rule
seeds='1 2'
spread=1.1
better() { holds "$1 < $(bar)"; }
simpler() { holds "$1 <= $(bar) + $(gap)"; }
again() { true; }
#:
"""

SHELLS = [name for name in ("sh", "zsh") if shutil.which(name)]  # sh: dash on Debian, bash on macOS

# What `finish` adds to a description. The runs of the stub make 900, 896 and 890 steps.
ONE_RUN = " [0123456789ab: 900 steps in 300 s]"
TWO_RUNS = " [0123456789ab: 900, 896 steps in 300 s]"
THREE_RUNS = " [0123456789ab: 900, 896, 890 steps in 300 s]"
SHARED = " [0123456789ab, sdpa, Stub GPU, 80 GB]"  # for the baseline only

# ---------------------------------------------------------------------------
# A stub in place of train.py

# Three variables of the environment change what it does. STUB_LOAD raises every val_bpb by a number
# and takes that share of the steps. STUB_HANGS_AT names a seed with which it hangs. STUB_SLEEP is
# how long it sleeps where it is slow, in seconds.
STUB = """
import faulthandler, os, sys, time
from pathlib import Path
check_model = print
check_model("checked")
seed, kind, nan, inf = int(os.environ["SEED"]), {kind!r}, float("nan"), float("inf")
load = float(os.environ.get("STUB_LOAD", 0))
if kind == "slow" or os.environ.get("STUB_HANGS_AT") == str(seed):
    print("compiling", flush=True)
    time.sleep(float(os.environ.get("STUB_SLEEP", {sleeps})))
if kind == "hang":
    faulthandler.dump_traceback_later(0.2, exit=True, file=sys.__stderr__)
    time.sleep(60)
if kind == "refused":
    sys.exit("error: the model looks ahead: a later token changes its logits; mask the attention")
if kind == "nan":
    print("FAIL: the loss is nan at step 120")
    sys.exit(1)
if kind == "bug":
    raise ValueError("val_bpb is 0.1")
if kind == "killed":
    os.kill(os.getpid(), 9)
if kind == "memory":
    print("compiling", flush=True)
    memory = b"1" * 2**29
    time.sleep(60)
if kind in ("edit", "edit and undo"):
    code = Path("train.py").read_text()
    Path("train.py").write_text("# the next idea")
    if kind == "edit and undo":
        Path("train.py").write_text(code)
for step in range(1, 31):
    print(f"step {{step:05d}} | loss {{5 - step / 10:.4f}}")
print("evaluating")
if kind == "two numbers":
    print("val_" + "bpb: 0.1")
summary = dict(
    val_bpb="%.6f" % ({values}[seed - 1] + load),
    training_seconds=300.4,
    harness="{harness}",
    peak_vram_mb="%.1f" % (45060.2 + 1024 * (seed - 1)),
    num_steps=round({steps}[seed - 1] * (1 - load)),
    seed={seeds}[seed - 1],
    device="Stub GPU, 80 GB",
    attention="{attention}",
)
print("---")
for key, value in summary.items():
    print(f"{{key}}:", value)
sys.exit(kind == "late")
"""


def stub(
    *values: float,
    kind: str = "train",
    sleeps: float = 60,
    seeds: tuple = (1, 2, 3),
    steps: tuple = (900, 896, 890),
    attention: str = "sdpa",
    harness: str = "0123456789ab",
) -> str:
    """A train.py whose runs end with these val_bpb, one for each seed.

    The steps are those of each run. Another kind ends in another way:

    "slow"     says that it compiles, and sleeps for so many seconds
    "hang"     hangs, and the watchdog ends it
    "refused"  is a model that the harness refuses
    "nan"      ends because its loss is no number
    "bug"      raises an error
    "killed"   is killed, as when memory runs out
    "memory"   takes half a GB and sleeps for a minute
    "edit"     changes train.py, as an agent would who does not wait
    "edit and undo"  changes train.py and changes it back
    "late"     fails after its summary
    "two numbers"  prints a val_bpb of its own before its summary
    """
    facts = {"values": values, "seeds": seeds, "steps": steps, "sleeps": sleeps}
    return STUB.format(kind=kind, attention=attention, harness=harness, **facts)


# ---------------------------------------------------------------------------
# An agent at work in a clone

# It takes `uv run train.py` and `uv run -q python -c CODE`.
UV = """#!/bin/sh
shift
[ "$1" != -q ] || shift
[ "$1" != python ] || shift
exec {python} "$@"
"""


class Night:
    """A clone of the project with the stub as its train.py, and an agent who works in it.

    A test says what the agent does: `sh` and `do` run shell commands, `setup` or `begin` starts the
    night, `experiment` makes a whole experiment, and `commit`, `run` and `finish` are its parts.
    Then the test looks at the repository: at its `rows`, its `log` and its `head`, or with `git`.
    """

    def __init__(self, folder: Path, shell: str = "sh", rule: str = TWO_SEEDS):
        self.folder, self.shell, self.tag = folder / "clone", shell, "mar5"
        tools = folder / "bin"
        tools.mkdir(parents=True)
        scripts = {
            "uv": UV.format(python=shlex.quote(sys.executable)),
            "sleep": f"#!/bin/sh\nexec {shutil.which('sleep')} 0.02\n",
        }
        for name, text in scripts.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.env = {**GIT_ENV, "PATH": f"{tools}:{os.environ['PATH']}"}
        self.folder.mkdir()
        for name in ("prepare.py", "analysis.ipynb", ".gitignore"):
            shutil.copy(ROOT / name, self.folder)
        (self.folder / "program.md").write_text(PROGRAM.replace(RULE, rule))
        (self.folder / "train.py").write_text(stub(1.70, 1.72))
        self.git("init", "-q", "-b", "main")
        self.git("add", ".")
        self.git("commit", "-qm", "the state that the night begins with")

    def sh(self, command: str, **env: str) -> subprocess.CompletedProcess:
        """Run a command in a new shell, and kill the shell's process group in the end.

        Some coding agents, such as Codex, do the same. The result has all that was printed.
        """
        with subprocess.Popen(
            [self.shell, "-c", command],
            cwd=self.folder,
            env=self.env | env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process:
            output, _ = process.communicate(timeout=30)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(command, process.returncode, output)

    def do(self, command: str, **env: str) -> subprocess.CompletedProcess:
        """Run a command in a new shell that has loaded the commands of program.md."""
        return self.sh(LOAD + command, **env)

    def git(self, *args: str) -> str:
        return git(self.folder, *args)

    def setup(self) -> "Night":
        """Begin the night with the block of program.md."""
        done = self.sh(SETUP)
        assert (done.returncode, done.stdout) == (0, ""), done.stdout
        return self

    def begin(self, rows: str = "") -> None:
        """Begin the night without asking prepare.py, which takes seconds, and with some rows."""
        self.git("switch", "-qc", f"autoresearch/{self.tag}")
        self.git("update-ref", f"refs/autoresearch/{self.tag}/start", "HEAD")
        (self.folder / "results.tsv").write_text(HEADER + rows)
        table = self.git("hash-object", "-w", "results.tsv")
        self.git("update-ref", f"refs/autoresearch/{self.tag}/table", table)

    def worktree(self, name: str) -> "Night":
        """Another agent, in a worktree of this clone, who has begun with the same baseline."""
        other = copy.copy(self)
        other.folder, other.tag = self.folder.parent / name, f"mar5-{name}"
        other.env = {**self.env}
        done = self.sh(WORKTREE.replace("gpu1", name))
        assert done.returncode == 0, done.stdout
        other.git("switch", "-q", "--detach", "main")
        other.begin(f"{other.head()}\t{BASELINE}")
        return other

    def commit(self, train: str, message: str = "an idea") -> str:
        """Write this train.py and commit it. Returns the commit."""
        (self.folder / "train.py").write_text(train)
        done = self.do(re.sub(r"'.*'", lambda _: shlex.quote(message), COMMIT))
        assert done.returncode == 0, done.stdout
        return self.head()

    def run(self, word: str = "", **env: str) -> str:
        """Start the job and poll until it has ended. Returns what `poll` showed."""
        shown = self.do(RUN_AND_POLL.replace("run", f"run {word}", 1), **env)
        assert shown.returncode == 0, shown.stdout
        assert re.search(r"^exit: \d+$", shown.stdout, re.MULTILINE), shown.stdout
        return shown.stdout

    def finish(self, description: str, word: str = "keep") -> subprocess.CompletedProcess:
        """Write the row. The word is `keep` or `drop`."""
        command = FINISH.replace("keep", word, 1)
        return self.do(re.sub(r"'.*'", lambda _: shlex.quote(description), command))

    def experiment(
        self, train: str | None, description: str, word: str = "keep", run: str = ""
    ) -> str:
        """Commit, run and write the row. Returns the commit. Without a train.py it is the head."""
        commit = self.commit(train, description) if train else self.head()
        self.run(run)
        done = self.finish(description, word)
        assert done.returncode == 0, done.stdout
        return commit

    def rows(self) -> list[list[str]]:
        """The cells of each row of results.tsv, without the header."""
        header, *rows = (self.folder / "results.tsv").read_text().splitlines()
        assert header + "\n" == HEADER
        return [row.split("\t") for row in rows]

    def head(self) -> str:
        return self.git("rev-parse", "--short=7", "HEAD")

    def log(self) -> str:
        return (self.folder / "run.log").read_text()

    def group(self) -> int:
        """The process group of the job."""
        return int(re.search(r"^run group: (\d+)$", self.log(), re.MULTILINE)[1])

    def wait_for(self, text: str) -> None:
        """Wait until run.log shows this text."""
        deadline = time.monotonic() + 20
        while text not in self.log():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.01)

    def kill_job(self, at: str) -> None:
        """Kill the job with all that it has started, once run.log shows this text."""
        self.wait_for(at)
        deadline = time.monotonic() + 20
        group = self.group()
        with suppress(ProcessLookupError):
            while time.monotonic() < deadline:  # until the system no longer knows the group
                os.killpg(group, signal.SIGKILL)


# ---------------------------------------------------------------------------
# A whole night


@pytest.fixture(scope="module", params=SHELLS)
def night(request, tmp_path_factory) -> Night:
    """A whole night, in each shell. Its commits are in `commits`, by a name for each experiment."""
    night = Night(tmp_path_factory.mktemp("night"), request.param).setup()
    commits = night.commits = {}
    commits["baseline"] = night.experiment(None, "baseline")
    commits["win"] = night.experiment(stub(1.705, 1.685), "raise MATRIX_LR to 0.05")
    commits["refuted"] = night.experiment(stub(1.69, 1.705), "a lucky first seed")
    commits["loss"] = night.experiment(
        stub(1.80), 'a "quoted"\ttab, C:\\temp\\new, %s 100%, $HOME\nand a line: größer (0.9, 0.95)'
    )
    commits["simpler"] = night.experiment(
        stub(1.70, 1.705), "delete the value gates", run="simpler"
    )
    commits["too simple"] = night.experiment(stub(1.73), "delete the MLP", run="simpler")
    commits["bug"] = night.experiment(stub(kind="bug"), "a slip")
    bring_back = inline('git cherry-pick -n "$night').replace("1a2b3c4", commits["bug"])
    assert night.do(bring_back).returncode == 0
    assert (night.folder / "train.py").read_text() == stub(kind="bug")
    commits["mended"] = night.experiment(stub(1.9), "the slip mended")
    commits["hang"] = night.experiment(stub(kind="hang"), "an endless loop")
    commits["nan"] = night.experiment(stub(kind="nan"), "a rate of 10")
    commits["refused"] = night.experiment(stub(kind="refused"), "no mask", "drop")
    commits["ugly"] = night.experiment(stub(1.5, 1.5), "forty lines for a gain", "drop")

    commits["deaths"] = night.commit(stub(1.695, 1.705), "the machine dies twice")
    for seed in ("1", "2"):
        assert night.do("run", STUB_HANGS_AT=seed).returncode == 0
        night.kill_job(f"run seed: {seed}\n")
        last_line = night.do("poll").stdout.splitlines()[-1]
        assert last_line.startswith("the run has died and was not finished")
    night.git("switch", "-q", "main")
    assert "forty lines for a gain" in night.sh(RESUME).stdout
    night.run()
    assert night.finish("the machine dies twice").returncode == 0
    night.run("again", STUB_LOAD="0.2")
    assert night.finish("measured again").returncode == 0
    return night


def test_rows_of_the_night(night):
    # The bar is 1.71, then 1.695, 1.7025, 1.7 and, under load, 1.9. A row's memory is that of the
    # run that took the most: 44.0 GB with the first seed, and 45.0 GB with the second.
    strange = "a 'quoted' tab, C:\\temp\\new, %s 100%, $HOME and a line: größer (0.9, 0.95)"
    slower = " [0123456789ab: 720, 717 steps in 300 s]"  # four fifths of 900 and 896
    expected = f"""
baseline|1.710000|45.0|keep|baseline{TWO_RUNS} (1.700000, 1.720000){SHARED}
win|1.695000|45.0|keep|raise MATRIX_LR to 0.05{TWO_RUNS} (1.705000, 1.685000)
refuted|1.697500|45.0|discard|a lucky first seed{TWO_RUNS} (1.690000, 1.705000)
loss|1.800000|44.0|discard|{strange}{ONE_RUN}
simpler|1.702500|45.0|keep|delete the value gates{TWO_RUNS} (1.700000, 1.705000)
too simple|1.730000|44.0|discard|delete the MLP{ONE_RUN}
bug|0.000000|0.0|crash|a slip
mended|1.900000|44.0|discard|the slip mended{ONE_RUN}
hang|0.000000|0.0|crash|an endless loop
nan|0.000000|0.0|crash|a rate of 10
refused|0.000000|0.0|crash|no mask
ugly|1.500000|45.0|discard|forty lines for a gain{TWO_RUNS} (1.500000, 1.500000)
deaths|1.700000|45.0|keep|the machine dies twice (started 3 times){TWO_RUNS} (1.695000, 1.705000)
deaths|1.900000|45.0|keep|measured again{slower} (1.895000, 1.905000)
"""
    rows = [line.split("|") for line in expected.strip().splitlines()]
    assert night.rows() == [[night.commits[name], *cells] for name, *cells in rows]


def test_pandas_reads_the_table_as_it_is(night):
    table = pd.read_csv(night.folder / "results.tsv", sep="\t", dtype={"commit": str})
    assert list(table.columns) == ["commit", "val_bpb", "memory_gb", "status", "description"]
    assert table.notna().all().all() and len(table) == len(night.rows()) == 14


def test_branch_holds_exactly_the_kept_commits(night):
    branch = night.git("log", "--format=%h", "--abbrev=7", "autoresearch/mar5").split()
    assert branch == [night.commits[name] for name in ("deaths", "simpler", "win", "baseline")]


def test_every_discarded_commit_stays_reachable_with_its_code_and_so_does_the_table(night):
    night.git("gc", "-q", "--prune=now")
    kept = night.git("log", "--format=%h", "--abbrev=7").split()
    discarded = {row[0] for row in night.rows()} - set(kept)
    refs = night.do(inline("git for-each-ref")).stdout.split()[2::3]
    names = ["start", "table", *discarded]
    assert set(refs) == {f"refs/autoresearch/mar5/{name}" for name in names}
    refuted = f"refs/autoresearch/mar5/{night.commits['refuted']}"
    assert "(1.69, 1.705)" in night.git("show", f"{refuted}:train.py")
    table = (night.folder / "results.tsv").read_text()
    (night.folder / "results.tsv").unlink()
    refuses(night.do("run"), "see Resume")
    assert night.do(inline("git cat-file")).returncode == 0
    assert (night.folder / "results.tsv").read_text() == table


def test_nothing_but_train_py_has_changed_and_the_tree_is_clean(night):
    assert night.git("diff", "--name-only", "refs/autoresearch/mar5/start") == "train.py"
    assert (night.folder / "prepare.py").read_bytes() == (ROOT / "prepare.py").read_bytes()
    assert night.git("status", "--porcelain") == ""


def test_bar_is_the_kept_mean_and_gap_the_mean_distance_of_all_pairs(night):
    assert float(night.do("bar").stdout) == 1.9
    # Seven rows have two runs.
    gap = (0.02 + 0.02 + 0.015 + 0.005 + 0 + 0.01 + 0.01) / 7
    assert float(night.do("gap").stdout) == pytest.approx(gap, abs=1e-6)


def test_lines_for_direction_show_the_curve_and_what_was_tried(night):
    (night.folder / "notes.md").write_text("")
    curve = night.sh(inline("awk ")).stdout.splitlines()
    assert len(curve) == 14  # the number of the seed and six of its steps, twice
    tried = night.sh(inline("grep -i rope").replace("rope", "matrix_lr")).stdout
    assert "raise MATRIX_LR" in tried


# ---------------------------------------------------------------------------
# What the commands refuse, and what a death leaves behind


# The baseline of a night that has begun, without its commit: the bar is 1.71, and the gap 0.02.
BASELINE = f"1.710000\t44.0\tkeep\tbaseline{TWO_RUNS} (1.700000, 1.720000){SHARED}\n"


@pytest.fixture
def started(tmp_path) -> Night:
    """A night with its baseline done."""
    night = Night(tmp_path)
    night.begin(f"{night.head()}\t{BASELINE}")
    return night


def refuses(done: subprocess.CompletedProcess, reason: str) -> None:
    """Assert that a command failed, with one sentence that names the reason."""
    assert done.returncode != 0, done.stdout
    assert done.stdout.startswith("refused: ") and reason in done.stdout, done.stdout
    assert len(done.stdout.splitlines()) == 1, done.stdout


def test_the_readmes_runs_with_fresh_seeds_are_rows_that_decide_nothing(tmp_path):
    night = Night(tmp_path)
    five = {"seeds": (1, 2, 3, 4, 5), "steps": (900,) * 5}
    (night.folder / "train.py").write_text(stub(1.7, 1.72, 1.71, 1.73, 1.75, **five))
    night.git("commit", "-qam", "values for five seeds")
    baseline = night.head()
    night.begin(f"{baseline}\t{BASELINE}")
    kept = night.experiment(stub(1.6, 1.61, 1.62, 1.63, 1.64, **five), "a win")
    night.experiment(stub(1.8), "a loss")
    (block,) = (b for b in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "fresh" in b)
    done = night.sh(block)
    assert done.returncode == 0, done.stdout
    assert night.rows()[3:] == [
        [commit, f"{value:.6f}", "0.0", "discard", f"fresh seed {seed}"]
        for seed, before, after in [(3, 1.71, 1.62), (4, 1.73, 1.63), (5, 1.75, 1.64)]
        for commit, value in [(baseline, before), (kept, after)]
    ]
    assert night.do("bar").stdout == "1.605000\n"


def test_the_readmes_gain_is_that_of_the_night_at_another_budget_and_depth(tmp_path):
    train = """
import os, sys
DEPTH = 9  # layers
budget, seed = float(os.environ["AUTORESEARCH_BUDGET"]), int(os.environ["SEED"])
if DEPTH == 13: sys.exit(print("compiling\\nno memory") or 1)
print(f"---\\nval_bpb: {{{gain} / budget + 1 / DEPTH + seed:.6f}}\\nharness: 0123456789ab")
print(f"num_steps: 900\\ndepth: {{DEPTH}}\\nepochs: 1")
"""
    night = Night(tmp_path)
    baseline = night.commit(train.format(gain=60), "the start")
    kept = night.commit(train.format(gain=30), "a win")
    tip = night.commit(train.format(gain=90), "what was under way")
    (block,) = re.findall(r"^gain\(\) \{.*?^\}$", README, re.DOTALL | re.MULTILINE)

    def gain(arguments: str) -> list[str]:
        done = night.sh(f"baseline={baseline} kept={kept}\n{block}\ngain {arguments}")
        return done.stdout.splitlines()

    facts = "harness: 0123456789ab depth: {} epochs: 1"
    assert gain("300") == [
        f"val_bpb: {0.2 + 1 / 9 + 3:.6f} {facts.format(9)}",
        f"val_bpb: {0.1 + 1 / 9 + 3:.6f} {facts.format(9)}",
        "gain: 0.1",
    ]
    assert gain("600 10") == [
        f"val_bpb: 3.200000 {facts.format(10)}",
        f"val_bpb: 3.150000 {facts.format(10)}",
        "gain: 0.05",
    ]
    assert gain("300 13") == ["no memory"]  # The second run does not begin.
    (night.folder / "train.py").write_text("an edit")
    assert gain("300")[-1] == "gain: 0.1"
    assert (night.folder / "train.py").read_text() == "an edit" and night.head() == tip
    kept = ""  # as in a new terminal
    assert "kept" in gain("300")[-1]


def test_setup_says_all_that_is_in_the_way_and_changes_nothing(tmp_path):
    night = Night(tmp_path)
    night.env["AUTORESEARCH_CACHE"] = str(tmp_path / "empty")
    obstacles = ("train.py", "new.txt", "results.tsv", "model.pt")
    for name in obstacles:
        (night.folder / name).write_text("precious")
    shown = night.sh(SETUP).stdout
    assert "uv run prepare.py" in shown and all(name in shown for name in obstacles)
    assert night.git("branch", "--format=%(refname:short)") == "main"
    assert {(night.folder / name).read_text() for name in obstacles} == {"precious"}


@pytest.mark.parametrize(
    "name",
    [
        "prepare.py",
        "program.md",
        "helper.py",
        "weights.pt",  # .gitignore has it
        "torch.py",  # .git/info/exclude has it
        ".venv/lib/python3/site-packages/sitecustomize.py",
    ],
)
def test_run_refuses_when_another_file_differs_from_the_start(started, name):
    (started.folder / ".git" / "info" / "exclude").write_text("torch.py\n")
    path = started.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("\n# mine\n")
    if name in ("prepare.py", "program.md"):
        started.git("commit", "-qam", "a change to what is locked")
    refuses(started.do("run"), name)
    assert not (started.folder / "run.log").exists()


def test_what_a_night_and_its_tools_leave_is_not_in_the_way(started):
    folders = ("__pycache__", ".venv", ".claude")
    for name in [*(f"{folder}/file" for folder in folders), "notes.md", "progress.png"]:
        (started.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (started.folder / name).write_text("")
    started.experiment(stub(1.80), "a loss")


def test_a_notebook_with_the_outputs_of_a_human_who_looked_is_not_in_the_way(started):
    with (started.folder / "analysis.ipynb").open("a") as file:
        file.write("\n")
    commit = started.experiment(stub(1.80), "a loss")
    assert started.rows()[-1][0] == commit
    assert started.git("status", "--short") == "M analysis.ipynb"


def test_run_refuses_an_edit_that_is_not_committed(started):
    (started.folder / "train.py").write_text(stub(1.6))
    refuses(started.do("run"), "not committed")
    assert (started.folder / "train.py").read_text() == stub(1.6)


def test_run_refuses_the_kept_commit_and_what_was_discarded(started):
    refuses(started.do("run"), "edit train.py, commit, run")
    commit = started.experiment(stub(1.8), "a loss")
    refuses(started.do("run"), "edit train.py, commit, run")
    started.git("reset", "-q", "--hard", f"refs/autoresearch/mar5/{commit}")
    refuses(started.do("run"), f"{commit} has its row")


def test_run_refuses_two_commits_on_top_of_the_kept_one(started):
    started.commit(stub(1.6))
    started.commit(stub(1.5))
    refuses(started.do("run"), f"git reset --soft {started.rows()[0][0]}")


def test_run_refuses_a_commit_that_leaves_a_kept_change_out(started):
    start = started.head()
    started.experiment(stub(1.6, 1.6), "a win")
    started.git("reset", "-q", "--hard", start)
    started.commit(stub(1.5, 1.5))
    refuses(started.do("run"), "one commit upon")


def test_run_refuses_outside_the_branch_of_a_night(started):
    started.git("switch", "-q", "main")
    refuses(started.do("run"), "see Setup")


def test_an_idea_that_was_committed_before_the_baseline_waits(tmp_path):
    night = Night(tmp_path)
    start = night.head()
    night.begin()
    idea = night.commit(stub(1.6, 1.6))
    refuses(night.do("run"), f"git reset --keep {start}, run, and later git cherry-pick {idea}")


def test_run_refuses_while_another_is_under_way_and_poll_shows_where_it_is(started):
    commit = started.commit(stub(kind="slow"))
    assert started.do("run").returncode == 0
    try:
        refuses(started.do("run"), "under way")
        began = time.monotonic()
        shown = started.do("poll 3").stdout
        assert time.monotonic() - began > 2  # `poll 3` did wait.
        kept = started.rows()[0][0]
        standing = rf"kept {kept}, bar 1\.710000, gap 0\.020000"
        head = rf"seed 1 of {commit}, \d+ s\nso far: val_bpb , steps ; {standing}\ncompiling\n"
        assert re.fullmatch(head, shown), shown
        refuses(started.finish("too early"), "no experiment waits")
    finally:
        started.kill_job("compiling")


def test_the_row_comes_before_the_next_run_and_only_once(started):
    started.commit(stub(1.8))
    started.run()
    refuses(started.do("run"), "finish")
    assert started.finish("a loss").returncode == 0
    refuses(started.finish("a loss"), "no experiment waits")
    assert len(started.rows()) == 2


def test_a_run_outlives_the_process_group_of_its_command_and_a_hangup(started):
    started.commit(stub(1.8, kind="slow", sleeps=1))
    assert started.do("run").returncode == 0  # The process group of this command is dead by now.
    started.wait_for("compiling")
    os.killpg(started.group(), signal.SIGHUP)
    assert "exit: 0" in started.do("poll").stdout


def test_finish_names_what_was_committed_while_the_experiment_ran(started):
    commit = started.commit(stub(1.8))
    started.run()
    idea = started.commit(stub(1.6, 1.6), "the next idea")
    what_to_do = f"git reset --keep {commit}, finish, and later git cherry-pick {idea}"
    refuses(started.finish("a loss"), what_to_do)
    started.git("reset", "-q", "--keep", commit)
    assert started.finish("a loss").returncode == 0
    assert started.rows()[-1][:2] == [commit, "1.800000"]


def test_finish_begins_no_second_table_where_the_first_is_gone(started):
    started.commit(stub(1.8))
    started.run()
    (started.folder / "results.tsv").unlink()
    refuses(started.finish("a loss"), "see Resume")
    assert not (started.folder / "results.tsv").exists()


def test_finish_waits_for_an_edit_that_is_not_committed(started):
    started.commit(stub(1.8))
    started.run()
    (started.folder / "train.py").write_text(stub(1.6))
    refuses(started.finish("a loss"), "has an edit")
    assert (started.folder / "train.py").read_text() == stub(1.6) and len(started.rows()) == 1
    started.git("restore", "train.py")
    assert started.finish("a loss").returncode == 0


@pytest.mark.parametrize("kind", ["edit", "edit and undo"])
def test_a_run_whose_file_was_edited_meanwhile_does_not_count(started, kind):
    commit = started.commit(stub(1.6, 1.6, kind=kind))
    assert started.do("run").returncode == 0
    shown = started.do("poll").stdout
    assert "train.py was changed" in shown and shown.splitlines()[-1].startswith("the run has died")
    assert started.log().count("run seed: ") == 1
    started.git("restore", "train.py")
    assert started.head() == commit and started.do("run").returncode == 0


@pytest.mark.parametrize(
    "train, reason",
    [(stub(1.5, 1.5, harness="f" * 12), "f" * 12), (stub(1.5, 1.5, attention="fa3"), "fa3")],
)
def test_a_run_that_does_not_compare_gets_no_number(started, train, reason):
    started.commit(train)
    started.run()
    refuses(started.finish("a wonder"), reason)
    started.run()  # A human may have mended the machine.
    refuses(started.finish("a wonder"), reason)
    assert started.finish("a wonder", "drop").returncode == 0
    assert started.rows()[-1][1:] == ["0.000000", "0.0", "crash", "a wonder (started 2 times)"]


def test_a_train_py_with_a_seed_of_its_own_is_a_crash(started):
    started.experiment(stub(1.5, 1.5, seeds=(7, 7)), "the best seed")
    assert started.rows()[-1][1:] == ["0.000000", "0.0", "crash", "the best seed"]


def test_an_unknown_word_and_a_missing_description_are_refused(started):
    started.commit(stub(1.8))
    started.run()
    refuses(started.finish("a loss", "better"), "finish keep|drop DESCRIPTION")
    refuses(started.finish(""), "finish keep|drop DESCRIPTION")
    assert len(started.rows()) == 1


def test_equal_to_the_bar_is_no_win_unless_simpler(started):
    started.experiment(stub(1.71), "no gain")
    assert started.rows()[-1][3] == "discard" and started.log().count("run seed: ") == 1
    # This is a gap above the bar.
    started.experiment(stub(1.73, 1.73), "no gain, less code", run="simpler")
    assert started.rows()[-1][3] == "keep"


def test_runs_that_met_different_loads_are_not_decided_but_repeated(started):
    commit = started.commit(stub(1.6, 1.6, steps=(900, 800)))
    assert "so far: val_bpb 1.600000, 1.600000, steps 900, 800;" in started.run()
    refuses(started.finish("a wonder"), "900, 800 steps")
    assert len(started.rows()) == 1 and started.head() == commit
    started.run()  # the same commit once more
    assert started.finish("a wonder", "drop").returncode == 0
    assert started.rows()[-1][3] == "discard"


def test_a_machine_that_never_holds_still_gets_a_wider_spread(started):
    started.commit(stub(1.6, 1.6, steps=(900, 800)))
    started.run()
    widened = inline("spread=1.3 finish keep").replace("...", "'a win'")
    assert started.do(widened).returncode == 0
    assert started.rows()[-1][3] == "keep"


def test_a_tenth_more_steps_is_still_the_same_machine(started):
    started.experiment(stub(1.6, 1.6, steps=(990, 900)), "a win")
    text = "a win [0123456789ab: 990, 900 steps in 300 s] (1.600000, 1.600000)"
    assert started.rows()[-1][3:] == ["keep", text]


def test_finish_of_a_disturbed_run_says_how_to_try_again(started):
    commit = started.commit(stub(1.8))
    started.run()
    shown = started.finish("disturbed: a backup", "drop").stdout.splitlines()[-1]
    retry = shown.removeprefix("next, when nothing else is at work: ")
    assert started.do(retry, GIT_COMMITTER_DATE="2030-01-01T00:00:00").returncode == 0
    assert started.do("poll").returncode == 0 and started.finish("a loss").returncode == 0
    assert started.head() == started.rows()[0][0]
    assert [row[0] == commit for row in started.rows()[1:]] == [True, False]


def test_a_disturbed_baseline_is_dropped_and_measured_again(tmp_path):
    night = Night(tmp_path)
    night.begin()
    commit = night.head()
    night.run()
    shown = night.finish("disturbed: a backup", "drop").stdout
    assert shown.splitlines()[-1] == "next, when nothing else is at work: run again"
    refuses(night.do("run"), "has its row")
    assert night.experiment(None, "baseline", run="again") == commit
    assert [row[3] for row in night.rows()] == ["discard", "keep"]
    assert night.do("bar").stdout == "1.710000\n"


def test_a_start_that_crashes_may_be_mended_into_a_baseline(tmp_path):
    night = Night(tmp_path)
    (night.folder / "train.py").write_text(stub(kind="bug"))
    night.git("commit", "-qam", "a start that does not run here")
    night.begin()
    night.experiment(None, "baseline")
    commit = night.experiment(stub(1.7, 1.72), "baseline, mended")
    assert [row[3] for row in night.rows()] == ["crash", "keep"] and night.rows()[1][0] == commit
    assert night.rows()[1][4].endswith(f"(1.700000, 1.720000){SHARED}")


def test_run_again_measures_the_kept_commit_only(started):
    kept, commit = started.head(), started.commit(stub(1.6))
    refuses(started.do("run again"), f"git reset --keep {kept}")
    assert started.head() == commit
    refuses(started.do("run otherwise"), "run [simpler|again]")


def test_a_crash_under_the_second_seed_decides(started):
    # The stub has no number for the second seed, so it ends with a traceback.
    commit = started.experiment(stub(1.6), "fragile")
    assert started.rows()[-1] == [commit, "0.000000", "0.0", "crash", "fragile"]
    assert started.do("gap").stdout == "0.020000\n"


@pytest.mark.parametrize(
    "train",
    [stub(math.nan), stub(1.5, math.nan), stub(-math.inf), stub(1.5, 1.5, kind="late")],
    ids=["nan", "nan under the second seed", "infinity", "an error after the summary"],
)
def test_a_run_without_a_number_or_with_an_error_is_a_crash(started, train):
    started.experiment(train, "broken")
    assert started.rows()[-1][1:] == ["0.000000", "0.0", "crash", "broken"]


def test_a_run_that_died_again_and_again_starts_from_its_first_seed(started):
    commit = started.commit(stub(kind="slow"))
    for _ in range(3):
        assert started.do("run").returncode == 0
        started.kill_job("compiling")
    assert started.log().startswith(f"run commit: {commit}\n") and "run seed: 1\n" in started.log()
    assert len(started.rows()) == 1


def test_a_log_that_does_not_grow_for_a_quarter_of_an_hour_is_that_of_a_dead_run(started):
    started.commit(stub(kind="slow"))
    started.do("run")
    started.wait_for("compiling")
    try:
        ago = time.time() - 16 * 60
        os.utime(started.folder / "run.log", (ago, ago))
        assert "the run has died" in started.do("poll").stdout
    finally:
        started.kill_job("compiling")


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_death_while_the_row_is_written_costs_nothing(started, moment):
    started.commit(stub(1.8))
    started.run()
    before, after = {"before": ("kill -9 $$; exit", ""), "after": ("", "kill -9 $$")}[moment]
    dies = f"""git() {{
      [ "$*" != 'update-ref --stdin' ] || {{ {before or ":"}; }}
      command git "$@" || return
      [ "$*" != 'update-ref --stdin' ] || {{ {after or ":"}; }}
    }}\n"""
    started.do(dies + re.sub(r"'.*'", "'a loss'", FINISH))
    assert len(started.rows()) == 1
    refused = started.finish("a loss")
    if moment == "before":
        assert started.do(re.search(r"git reset --keep \w+", refused.stdout)[0]).returncode == 0
        assert started.finish("a loss").returncode == 0
    else:
        refuses(refused, "see Resume")
        assert started.do(inline("git cat-file")).returncode == 0
    started.experiment(stub(1.9), "the next idea")
    assert [row[1] for row in started.rows()] == ["1.710000", "1.800000", "1.900000"]


def test_several_gpus_have_worktrees_tags_and_bars_of_their_own(started):
    started.git("switch", "-q", "main")
    assert started.sh(WORKTREE).returncode == 0
    first, started.folder = started.folder, started.folder.parent / "gpu1"
    done = started.sh(SETUP.replace("mar5", "mar5-gpu1"))
    assert (done.returncode, done.stdout) == (0, ""), done.stdout
    started.experiment(None, "baseline")
    commit = started.experiment(stub(1.6, 1.6), "a win")
    assert [row[3] for row in started.rows()] == ["keep", "keep"]
    assert started.git("rev-parse", "--short=7", "autoresearch/mar5-gpu1") == commit
    assert len((first / "results.tsv").read_text().splitlines()) == 2


# ---------------------------------------------------------------------------
# No second roll, and no other number


def test_an_experiment_that_has_ended_is_not_rolled_again(started):
    commit = started.commit(stub(1.8))
    started.run()
    (started.folder / "run.log").unlink()
    (started.folder / "train.py").write_text(stub(1.8))
    refuses(started.do("run"), "finish")
    assert started.finish("a loss").returncode == 0
    assert started.rows()[-1][:2] == [commit, "1.800000"]
    started.git("reset", "-q", "--hard", f"refs/autoresearch/mar5/{commit}")
    started.git("commit", "-q", "--amend", "-m", "the same in another commit")
    refuses(started.do("run"), "has a row already")
    (started.folder / "train.py").write_text("# another number, please\n" + stub(1.8))
    started.git("commit", "-qa", "--amend", "-m", "the same with another comment")
    refuses(started.do("run"), "has a row already")
    (started.folder / "train.py").write_text(stub(1.8) + "idea = 1\n")
    started.git("commit", "-qa", "--amend", "-m", "other code")
    started.run()


def test_a_disturbed_experiment_is_tried_again_once(started):
    commit = started.commit(stub(1.8))
    for again in (1, 2):
        started.run()
        assert started.finish("disturbed: a backup", "drop").returncode == 0
        started.do(
            f"git cherry-pick $night/{commit}", GIT_COMMITTER_DATE=f"203{again}-01-01T00:00:00"
        )
    refuses(started.do("run"), "has a row already")


def test_what_was_measured_again_counts_unless_it_was_disturbed(started):
    kept = started.experiment(stub(1.6, 1.62), "a win")
    started.run("again")
    refuses(started.finish("the old number was better", "drop"), "what was measured again counts")
    assert started.finish("disturbed: a backup", "drop").returncode == 0
    started.experiment(None, "measured again", run="again")
    assert [row[3] for row in started.rows()[1:]] == ["keep", "discard", "keep"]
    assert {row[0] for row in started.rows()[1:]} == {kept}


def test_every_start_is_noted_and_the_row_says_how_many_there_were(started):
    started.commit(stub(1.8, kind="slow", sleeps=2))
    for _ in range(2):
        assert started.do("run").returncode == 0
        started.kill_job("compiling")
        (started.folder / "run.log").unlink()
    started.git("commit", "-q", "--amend", "-m", "the same in another commit")
    commit = started.head()
    started.run()
    assert started.finish("a loss").returncode == 0
    row = started.rows()[-1]
    assert row[4] == f"a loss (started 3 times){ONE_RUN}"
    note = started.git("notes", "--ref=autoresearch/mar5", "show", f"{commit}:train.py")
    starts = r"(run better, \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n+){3}"
    assert re.fullmatch(starts + re.escape("row " + "\t".join(row)), note), note


def test_what_is_added_to_run_log_does_not_count(started):
    started.commit(stub(1.8))
    started.run()
    with (started.folder / "run.log").open("a") as log:
        log.write("---\nval_bpb: 1.1\nexit: 0\n")
    assert started.finish("a loss").returncode == 0
    assert started.rows()[-1][1] == "1.800000" and "1.1\n" not in started.log()


def test_a_table_that_was_changed_is_refused_until_it_is_brought_back(started):
    path = started.folder / "results.tsv"
    table = path.read_text()
    started.commit(stub(1.8))
    path.write_text(table.replace("1.710000\t44", "1.900000\t44"))
    refuses(started.do("run"), "results.tsv is gone or was changed")
    assert started.do(inline("git cat-file")).returncode == 0 and path.read_text() == table
    started.run()
    path.write_text(table.replace("1.710000\t44", "1.900000\t44"))
    refuses(started.finish("a loss"), "results.tsv is gone or was changed")


def test_a_run_with_two_numbers_has_none(started):
    started.experiment(stub(1.5, 1.5, kind="two numbers"), "a number of its own")
    assert started.rows()[-1][3] == "crash"


def test_a_model_that_nobody_checks_is_refused(started):
    started.commit(stub(1.5).replace("check_model(", "pass  # check_model("))
    refuses(started.do("run"), "check_model")


# Lines that have no business in train.py, each with what it is for.
TABOO = [
    'counts = np.bincount(prepare.load_rows("train").ravel())  # learning before the time',
    'text = np.fromfile(folder + "/train.bin", np.uint16)',
    'model.load_state_dict(torch.load("/tmp/best.pt"))',
    'table = np.load("/tmp/counts.npy")',
    'x = open(os.path.expanduser("~/counts.json")).read()',
    "while clock.elapsed() < prepare.LATEST_DRAW:  # the clock",
    "clock.start = None",
    "clock.start += 20",
    "prepare.clock = MyClock()",
    "prepare.TIME_BUDGET = 600",
    "from prepare import *",
    'setattr(prepare, "TIME_BUDGET", 600)',
    "own_clock = prepare.Clock()",
    "prepare.run.start += 20",
    'os.environ["AUTORESEARCH_BUDGET"] = "600"',
    'print(f"val_bpb:          {best:.6f}")  # the report',
    'open("run.log", "a").write(line)',
    'Path("results.tsv").write_text(table)',
    "prepare.score = my_score  # the harness",
    "prepare.evaluate_bpb = fast_evaluation",
    "Tokenizer.token_bytes = lambda self: 2 * lengths(self)",
    "targets = sys._getframe(1).f_locals['targets']",
    "rows = [x for x in gc.get_objects() if isinstance(x, np.memmap)]",
    "def __torch_function__(cls, func, types, args=(), kwargs=None):",
    "prepare.score.__code__ = score.__code__",
    "for inputs, targets in [prepare.val_batch(0, 16, 0)]:  # choosing by the metric",
    "if os.fork() == 0:  # help from another process",
    'helper = subprocess.Popen(["python", "-c", code])',
    "os.execv(sys.executable, sys.argv)",
    "from prepare import run as s",
    "from prepare import clock, run",
    "import prepare as p",
    "prepare.start_clock()",
    "SEED = 41",
    "torch.manual_seed(SEED + 40)",
]


def test_run_names_a_line_that_has_no_business_in_train_py(started):
    text = (ROOT / "train.py").read_text()
    started.commit(f"{text}\n{TABOO[0]}\n")
    number = text.count("\n") + 2
    refuses(started.do("run"), f"line {number}:load_rows")


def test_each_line_that_has_no_business_in_train_py_is_taboo(started):
    (started.folder / "lines.py").write_text("\n".join(TABOO))
    found = started.do('grep -E "$taboo" lines.py').stdout.splitlines()
    assert found == TABOO


def test_honest_lines_are_no_taboo(started):
    honest = [
        "model.eval()",
        "ema.load_state_dict(model.state_dict())",
        "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)",
        "if clock.progress() == 1.0 or clock.elapsed() >= TIME_BUDGET:",
        "compiled = torch.compile(model)",
        "from prepare import TIME_BUDGET, Tokenizer, clock, evaluate_bpb, make_dataloader",
        "TIME_BUDGET = prepare.TIME_BUDGET",
        "eval_batches = [next(batches) for _ in range(4)]",
        "self.clock.start = time.perf_counter()",
        "timer = StepClock()",
        'found = importlib.util.find_spec("triton")',
        "gc.collect()",
        "started = time.time()",
        "def score_mod(score, b, h, q, k):",
        "counts = torch.bincount(tokens)",
        "loss = F.binary_cross_entropy_with_logits(x, y)",
        "# the loss falls monotonically",
        "def eval(self):",
        "torch.manual_seed(SEED)",
    ]
    (started.folder / "lines.py").write_text("\n".join(honest) + (ROOT / "train.py").read_text())
    found = started.do('grep -nE "$taboo" lines.py')
    assert found.returncode == 1 and not found.stdout, found.stdout


# ---------------------------------------------------------------------------
# The rule is the human's


def test_the_rule_that_ships_tells_a_clear_win_from_a_clear_loss(tmp_path):
    night = Night(tmp_path, rule=RULE)
    night.begin(f"{night.head()}\t{BASELINE}")
    for name, value, passes in [
        ("better", 1.5, 0),
        ("better", 1.9, 1),
        ("simpler", 1.9, 1),
        ("again", 1.9, 0),
    ]:
        assert night.do(f"{name} {value}").returncode == passes, (name, value)


def test_three_seeds_and_a_margin_are_a_line_each(tmp_path):
    seeds, margin = re.findall(r"`(seeds='1 2 3'|holds \"[^`]+\")`", " ".join(PROGRAM.split()))
    rule = TWO_SEEDS.replace("seeds='1 2'", seeds).replace('holds "$1 < $(bar)"', margin)
    night = Night(tmp_path, rule=rule)
    night.begin()
    (night.folder / "train.py").write_text(stub(1.70, 1.72, 1.71))
    night.git("commit", "-qam", "three values")
    night.git("update-ref", "refs/autoresearch/mar5/start", "HEAD")
    night.experiment(None, "baseline")
    night.experiment(stub(1.7095), "too small a gain")
    night.experiment(stub(1.70, 1.7, 1.72), "a gain until the third seed")
    night.experiment(stub(1.70, 1.7, 1.701), "a gain")
    assert [row[1] for row in night.rows()] == ["1.710000", "1.709500", "1.706667", "1.700333"]
    assert [row[3] for row in night.rows()] == ["keep", "discard", "keep", "keep"]
    assert night.rows()[3][4] == f"a gain{THREE_RUNS} (1.700000, 1.700000, 1.701000)"
    # Three experiments have three runs, and so three pairs each.
    gap = (0.02 + 0.01 + 0.01 + 0 + 0.02 + 0.02 + 0 + 0.001 + 0.001) / 9
    assert float(night.do("gap").stdout) == pytest.approx(gap, abs=1e-6)


# ---------------------------------------------------------------------------
# Another problem: to pack a text into few bytes

# It measures what train.py makes of the text, and prints what README.md asks for.
PACKING_PREPARE = """
import argparse, hashlib, inspect, os, platform, resource, subprocess, sys, time
from pathlib import Path

TEXT = inspect.getsource(argparse).encode()
UNPACK = "import sys, train; sys.stdout.buffer.write(train.unpack(sys.stdin.buffer.read()))"

def dataset():
    return TEXT

def measure(pack):
    start = time.time()
    packed = pack(TEXT)
    seconds = time.time() - start
    unpacked = subprocess.run([sys.executable, "-c", UNPACK], input=packed, capture_output=True)
    if unpacked.stdout != TEXT:
        sys.exit("error: unpack does not give back the text that pack was given")
    print("---")
    print(f"val_bpb: {len(packed):.6f}")
    print(f"training_seconds: {seconds:.1f}")
    print("harness:", hashlib.sha256(Path(__file__).read_bytes() + TEXT).hexdigest()[:12])
    print("num_steps: 1")
    print("seed:", os.environ.get("SEED", 1))
    print("peak_vram_mb:", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print("device:", platform.machine())
    print("attention: Python", platform.python_version())
"""

PACKING_TRAIN = """
import bz2, lzma, zlib

import prepare

def pack(text):
    return {pack}

def unpack(packed):
    return {unpack}

if __name__ == "__main__":
    prepare.measure(pack)
"""


def test_a_night_on_another_problem(tmp_path):
    def train(pack: str, unpack: str) -> str:
        return PACKING_TRAIN.format(pack=pack, unpack=unpack)

    night = Night(tmp_path)
    (night.folder / "prepare.py").write_text(PACKING_PREPARE)
    (night.folder / "train.py").write_text(train("zlib.compress(text)", "zlib.decompress(packed)"))
    night.git("commit", "-qam", "another problem")
    night.setup()
    night.experiment(None, "baseline")
    night.experiment(train("lzma.compress(text)", "lzma.decompress(packed)"), "LZMA")
    night.experiment(train("text[::2]", "packed"), "leave half of it out")
    night.experiment(train("brotli.compress(text)", "packed"), "a module that is not there")
    night.experiment(train("zlib.compress(text, 1)", "zlib.decompress(packed)"), "level 1")
    night.experiment(train("bz2.compress(text)", "bz2.decompress(packed)"), "bzip2", run="simpler")

    text = inspect.getsource(argparse).encode()
    deflated, least = len(zlib.compress(text)), len(zlib.compress(text, 1))
    lzma_size, bzip2 = len(lzma.compress(text)), len(bz2.compress(text))
    assert least > deflated > lzma_size > bzip2
    harness = hashlib.sha256(PACKING_PREPARE.encode() + text).hexdigest()[:12]
    machine = f" [{harness}, Python {platform.python_version()}, {platform.machine()}]"

    def facts(size: int, runs: int) -> str:
        steps = ", ".join(["1"] * runs)
        values = f" ({size:.6f}, {size:.6f})" if runs == 2 else ""
        return f" [{harness}: {steps} steps in 0 s]{values}"

    assert [(row[3], row[1], row[4]) for row in night.rows()] == [
        ("keep", f"{deflated:.6f}", f"baseline{facts(deflated, 2)}{machine}"),
        ("keep", f"{lzma_size:.6f}", f"LZMA{facts(lzma_size, 2)}"),
        ("crash", "0.000000", "leave half of it out"),
        ("crash", "0.000000", "a module that is not there"),
        ("discard", f"{least:.6f}", f"level 1{facts(least, 1)}"),
        ("keep", f"{bzip2:.6f}", f"bzip2{facts(bzip2, 2)}"),
    ]
    (night.folder / "prepare.py").write_text(PACKING_PREPARE.replace("len(packed)", "1"))
    refuses(night.do("run"), "only train.py may change, not prepare.py")


# ---------------------------------------------------------------------------
# Runs that LAUNCH starts elsewhere


def tool(night: Night, name: str, text: str) -> None:
    """Put a script in the place of a program, for the commands of this agent."""
    path = night.folder.parent / "bin" / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_launch_starts_every_seed(started):
    tool(started, "srun", 'echo "on node $* with seed $SEED"; shift; exec "$@"')
    started.env["LAUNCH"] = "srun --gpus=h100:1"
    started.experiment(stub(1.6, 1.6), "a win")
    shown = [line for line in started.log().splitlines() if line.startswith("on node")]
    assert shown == [f"on node --gpus=h100:1 uv run train.py with seed {seed}" for seed in (1, 2)]
    assert started.rows()[-1][3] == "keep" and not started.git("status", "--short")


def test_launch_counts_even_if_it_is_not_exported(started):
    tool(started, "srun", 'echo "on a node"; exec "$@"')
    started.commit(stub(1.8))
    assert started.do("LAUNCH=srun; run && poll").returncode == 0
    assert "on a node" in started.log()


# What Slurm 22.05 and ssh printed here, and with which codes they ended. The words of kubectl, of
# newer versions of Slurm, and of its memory limit by accounting are those that others report.
TASK = "srun: error: n1: task 0:"
ABORTED = "srun: Job step aborted: Waiting up to 32 seconds for job step to finish."
CANCELLED = "slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-11-22T04:58:06"
CRASHES = {
    "an error": (1, f"{TASK} Exited with exit code 1"),
    "a kill": (137, f"{TASK} Killed\nsrun: Force Terminated StepId=3.0"),
    "memory": (
        1,
        "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=4.0. Some of your processes may "
        f"have been killed by the cgroup out-of-memory handler.\n{TASK} Out Of Memory",
    ),
    "memory, as newer versions say it": (
        137,
        f"slurmstepd: error: Detected 1 oom_kill event in StepId=4.0.\n{TASK} Out Of Memory",
    ),
    "memory, by accounting": (
        137,
        "slurmstepd: error: StepId=4.0 exceeded memory limit (9 > 8), being killed\n"
        f"{CANCELLED} ***\n{TASK} Killed",
    ),
    "a time limit": (143, f"{ABORTED}\n{CANCELLED} DUE TO TIME LIMIT ***\n{TASK} Terminated"),
    "an error in a pod": (1, "command terminated with exit code 1"),
}
LOSSES = {
    "preempted": (143, f"{ABORTED}\n{CANCELLED} DUE TO PREEMPTION ***\n{TASK} Terminated"),
    "cancelled": (143, f"{ABORTED}\n{CANCELLED} ***\n{TASK} Terminated"),
    "the step cancelled": (137, f"{CANCELLED} ***\n{ABORTED}\n{TASK} Killed"),
    "a node that died": (0, "srun: error: Node failure on n1\nsrun: error: Node failure on n1"),
    "cancelled in the queue": (
        1,
        "srun: job 12 queued and waiting for resources\nsrun: Job has been cancelled\n"
        "srun: error: Unable to allocate resources: Job/step already completing or completed",
    ),
    "revoked": (
        1,
        "srun: job 1 queued and waiting for resources\nsrun: Job allocation 1 has been revoked\n"
        "srun: Force Terminated JobId=1",
    ),
    "no controller": (
        1,
        "srun: error: Unable to allocate resources: Unable to contact slurm controller "
        "(connect failure)",
    ),
    "no program": (2, f"{TASK} Exited with exit code 2"),
    "a node without its GPU": (
        1,
        "error: torch 2.11.0+cu130 cannot use the NVIDIA GPU here: no driver\n"
        f"{TASK} Exited with exit code 1",
    ),
    "ssh": (255, "client_loop: send disconnect: Broken pipe"),
    "kubectl, a broken stream": (0, ""),
    "kubectl, no pod": (1, 'Error from server (NotFound): pods "gpu1" not found'),
}


def lose(night: Night, code: int, says: str) -> None:
    """Run the commit at HEAD elsewhere, where it ends with this code after these words."""
    words = shlex.quote(says)
    program = "srun" if "srun" in says else "ssh" if code == 255 else "kubectl"
    tool(night, program, f"echo compiling\nprintf '%s\\n' {words} >&2\nexit {code}")
    night.run(LAUNCH=program)


@pytest.mark.parametrize("code, says", CRASHES.values(), ids=CRASHES)
def test_a_crash_on_a_node_is_a_crash(started, code, says):
    commit = started.commit(stub(1.6, 1.6))
    lose(started, code, says)
    assert started.finish("a large model").returncode == 0
    assert started.rows()[-1] == [commit, "0.000000", "0.0", "crash", "a large model"]


@pytest.mark.parametrize("code, says", LOSSES.values(), ids=LOSSES)
def test_what_the_engine_loses_gets_no_row_and_is_repeated(started, code, says):
    commit = started.commit(stub(1.6, 1.6))
    lose(started, code, says)
    refuses(started.finish("a win"), "run repeats it")
    refuses(started.finish("a win", "drop"), "run repeats it")
    assert len(started.rows()) == 1 and started.head() == commit
    started.run()
    assert started.finish("a win").returncode == 0
    assert started.rows()[-1][3:] == [
        "keep",
        f"a win (started 2 times){TWO_RUNS} (1.600000, 1.600000)",
    ]


def test_what_is_lost_three_times_may_be_dropped(started):
    started.commit(stub(1.6, 1.6))
    for _ in range(3):
        refuses(started.finish("an idea", "drop"), "")
        lose(started, *LOSSES["ssh"])
    refuses(started.finish("an idea"), "run repeats it")
    assert started.finish("an idea", "drop").returncode == 0
    assert started.rows()[-1][3:] == ["crash", "an idea (started 3 times)"]


def test_without_launch_a_run_without_a_summary_is_a_crash(started):
    started.experiment("check_model = print\ncheck_model(1)\n", "it prints nothing")
    assert started.rows()[-1][3] == "crash"


def test_a_commit_that_is_shipped_is_what_trains_whatever_train_py_becomes(started):
    pod = started.folder.parent / "pod" / "mar5"
    pod.mkdir(parents=True)
    wait_and_do = f'while ! [ -e {pod}/go ]; do sleep 1; done; cd {pod}/..; shift 4; exec "$@"'
    tool(started, "kubectl", wait_and_do)  # in place of `kubectl exec -i gpu1 --`
    started.env["LAUNCH"] = POD
    commit = started.commit(stub(1.6, 1.62))
    assert started.do("run").returncode == 0
    started.wait_for("began")
    started.commit(stub(1.9), "the next idea")
    (started.folder / "train.py").write_text("# and another one")
    (pod / "go").touch()
    assert "exit: 0" in started.do("poll").stdout
    started.git("reset", "-q", "--hard", commit)
    assert started.finish("a win").returncode == 0
    assert started.rows()[-1][:2] == [commit, "1.610000"]
    assert (pod / "prepare.py").read_bytes() == (ROOT / "prepare.py").read_bytes()


NEEDS_SSHD = pytest.mark.skipif(
    not all(map(shutil.which, ("sshd", "flock"))), reason="needs an ssh server, and flock"
)


@NEEDS_SSHD
def test_runs_over_ssh_have_their_seed_their_log_and_their_exit_code(started, ssh):
    started.env["LAUNCH"] = SSH
    started.experiment(stub(1.6, 1.62), "a win")
    started.experiment(stub(kind="bug"), "a slip")
    assert "ValueError: val_bpb is 0.1" in started.log() and "exit: 1\n" in started.log()
    assert [row[1] for row in started.rows()[1:]] == ["1.610000", "0.000000"]


@NEEDS_SSHD
def test_two_agents_in_one_folder_of_a_machine_wait_for_each_other(started, ssh):
    agents = {1.5: started, 1.4: started.worktree("gpu1")}
    for value, agent in agents.items():
        agent.env["LAUNCH"] = SSH
        agent.commit(stub(value, value, kind="slow", sleeps=1))
        assert agent.do("run").returncode == 0
    for value, agent in agents.items():
        agent.do("poll")
        assert agent.finish("a win").returncode == 0
        assert float(agent.rows()[-1][1]) == value


@NEEDS_SSHD
def test_a_machine_without_the_folder_says_nothing_of_the_idea(started, ssh):
    started.env["LAUNCH"] = SSH.replace("cd mar5", "cd mar6")
    started.commit(stub(1.6, 1.6))
    started.run()
    refuses(started.finish("a win"), "run repeats it")


@NEEDS_SSHD
def test_a_run_whose_connection_broke_is_repeated_when_the_first_has_ended(started, ssh):
    started.env["LAUNCH"] = SSH
    started.commit(stub(1.8, kind="slow", sleeps=3))
    assert started.do("run").returncode == 0
    started.wait_for("compiling")
    subprocess.run(["pkill", "-9", "-P", str(ssh.pid)], check=True)
    assert "exit: 255" in started.do("poll").stdout
    refuses(started.finish("a loss"), "run repeats it")
    began = time.monotonic()
    started.run()
    assert time.monotonic() - began > 4  # It waited for the end of the first and slept itself.
    assert started.finish("a loss").returncode == 0
    ssh.kill()
    ssh.wait()
    started.commit(stub(1.7))
    assert "exit: 255" in started.run()


@pytest.fixture
def ssh(started, tmp_path) -> Iterator[subprocess.Popen]:
    """A real ssh server. `ssh gpu1` reaches it, in a home that has the folder `mar5` and uv."""
    home = tmp_path / "home"
    (home / "mar5").mkdir(parents=True)
    shutil.copytree(tmp_path / "bin", home / ".local" / "bin")
    for key in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / key]
        subprocess.run(command, check=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    options = {
        "ListenAddress": f"127.0.0.1:{port}",
        "HostKey": tmp_path / "host",
        "AuthorizedKeysFile": tmp_path / "user.pub",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "ForceCommand": f'export HOME={home}; cd; sh -c "$SSH_ORIGINAL_COMMAND"',
    }
    (tmp_path / "sshd_config").write_text("".join(f"{k} {v}\n" for k, v in options.items()))
    client = (
        f"-p {port} -i {tmp_path}/user -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
    )
    tool(started, "ssh", f'exec {shutil.which("ssh")} {client} -o HostName=127.0.0.1 "$@"')
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants this folder
    with subprocess.Popen(
        [shutil.which("sshd"), "-D", "-e", "-f", tmp_path / "sshd_config"]
    ) as server:
        yield server
        server.kill()


def test_a_run_that_another_login_node_started_is_under_way_while_its_log_grows(started):
    started.commit(stub(1.8, kind="slow"))
    assert started.do("run").returncode == 0
    started.kill_job("compiling")
    log = started.folder / "run.log"
    log.write_text(re.sub("run host: .*", "run host: login2", log.read_text()))
    refuses(started.do("run"), "under way")
    ago = time.time() - 16 * 60
    os.utime(log, (ago, ago))
    assert "the run has died" in started.do("poll").stdout
    # In a queue a log does not grow. Slurm knows whether the job is still there.
    with log.open("a") as file:
        file.write("srun: job 12 queued and waiting for resources\n")
    for says, there in [
        ("12 gpu train.py", True),
        ("", False),
        ("slurm_load_jobs error: Invalid job id specified", False),
        ("slurm_load_jobs error: Unable to contact slurm controller", True),
    ]:
        tool(started, "squeue", f'[ "$*" = "-h -j 12" ] && echo "{says}" | grep . >&2')
        os.utime(log, (ago, ago))
        shown = started.do("poll 1").stdout
        assert ("queued and waiting" in shown.splitlines()[-1]) == there
        assert ("the run has died" in shown) != there


def test_a_job_that_was_given_up_and_lives_on_has_no_part_in_the_next_result(started):
    commit = started.commit(stub(1.8, kind="slow"))
    assert started.do("run", STUB_SLEEP="2").returncode == 0
    started.wait_for("compiling")
    first = started.group()
    ago = time.time() - 16 * 60
    os.utime(started.folder / "run.log", (ago, ago))
    assert started.do("run", STUB_SLEEP="5").returncode == 0
    with suppress(ProcessLookupError):
        while True:  # until the first job has ended
            os.killpg(first, 0)
            time.sleep(0.05)
    assert "exit:" not in started.log()
    refuses(started.finish("a loss"), "no experiment waits")
    assert "exit: 0" in started.do("poll").stdout
    assert started.finish("a loss").returncode == 0
    assert [row[:2] for row in started.rows()[1:]] == [[commit, "1.800000"]]
    refuses(started.finish("a loss"), "no experiment waits")


# ---------------------------------------------------------------------------
# Agents who see each other


@pytest.mark.parametrize("shell", SHELLS)
def test_others_shows_bars_and_what_is_tried_now_and_the_rows_that_match(started, shell):
    started.shell = shell
    gpu1, gpu2 = started.worktree("gpu1"), started.worktree("gpu2")
    win = gpu1.experiment(stub(1.6, 1.6), "rope base 200k")
    gpu1.experiment(stub(1.9), "RoPE base 1k")
    idea = gpu2.commit(stub(1.7), r"no \cos in the last layer")
    base = started.rows()[0][0]
    first, *rows, second, own = started.do("others rope").stdout.splitlines()
    assert first == f"mar5-gpu1, bar 1.600000 at {win}{SHARED}"
    assert rows == ["mar5-gpu1: " + "\t".join(row) for row in gpu1.rows()[1:]]
    tries = rf", tries {idea} no \\cos in the last layer, \d+ seconds? ago"
    bar = f"bar 1.710000 at {base}{SHARED}"
    assert re.fullmatch(re.escape(f"mar5-gpu2, {bar}") + tries, second), second
    assert own == f"mar5, {bar}"
    assert len(started.do("others").stdout.splitlines()) == 3


def test_what_is_taken_over_is_an_experiment_like_any_other(started):
    gpu1 = started.worktree("gpu1")
    win = gpu1.experiment(stub(1.6, 1.6), "a win")
    assert started.do(inline("git checkout").replace("1a2b3c4", win)).returncode == 0
    started.git("commit", "-qm", "from mar5-gpu1")
    started.run()
    assert started.finish(f"from mar5-gpu1 {win}: a win").returncode == 0
    assert started.rows()[-1][3] == "keep" and started.head() != win
    change = gpu1.experiment(stub(1.5, 1.5), "another win")
    assert (
        started.do(inline("git cherry-pick -n 1a2b3c4").replace("1a2b3c4", change)).returncode == 0
    )
    assert (started.folder / "train.py").read_text() == stub(1.5, 1.5)


def test_eight_agents_at_once_lose_no_row(started):
    agents = [started.worktree(f"gpu{number}") for number in range(1, 9)]

    def work(agent: Night) -> None:
        for value in (1.6, 1.8):
            agent.experiment(stub(value, value), f"idea of {agent.tag}")

    # Git packs its refs by itself now and then, which takes locks.
    packing = subprocess.Popen(
        ["sh", "-c", "while git pack-refs --all; do sleep 0.1; done"],
        cwd=started.folder,
        env=GIT_ENV,
    )
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, agents))
    assert packing.poll() is None  # It went on to the end.
    packing.kill()
    packing.wait()
    for agent in agents:
        values = [(row[1], row[3]) for row in agent.rows()[1:]]
        assert values == [("1.600000", "keep"), ("1.800000", "discard")]
        table = agent.git("cat-file", "-p", f"refs/autoresearch/{agent.tag}/table")
        assert table == (agent.folder / "results.tsv").read_text().strip()


def test_clones_meet_in_a_remote_that_may_go_away_and_come_back(tmp_path):
    first = Night(tmp_path / "first")
    first.begin(f"{first.head()}\t{BASELINE}")
    shared = tmp_path / "night.git"
    assert first.sh(REMOTE.replace("/shared/night.git", str(shared))).returncode == 0
    second = Night(tmp_path / "second")
    second.tag = "mar5-gpu2"
    second.begin(f"{second.head()}\t{BASELINE}")
    second.git("remote", "add", "night", str(shared))

    win = first.experiment(stub(1.6, 1.6), "a win")
    assert f"mar5, bar 1.600000 at {win}" in second.do("others").stdout
    assert second.do(inline("git checkout").replace("1a2b3c4", win)).returncode == 0
    second.git("reset", "-q", "--hard")
    claim = second.commit(stub(1.9), "an idea")
    second.run()
    assert f"tries {claim} an idea" in first.do("others").stdout

    shared.rename(tmp_path / "away")
    refused = second.finish("an idea")
    assert refused.returncode == 0 and "cannot be reached" in refused.stdout
    lost = first.experiment(stub(1.65), "tried while it was away")
    assert "cannot be reached" in first.do("others").stdout
    (tmp_path / "away").rename(shared)
    assert "tried while" not in second.do("others tried").stdout
    again = first.experiment(stub(1.66), "tried when it was back")
    shown = second.do("others tried").stdout
    assert lost in shown and again in shown and f"bar 1.600000 at {win}" in shown
    assert second.rows()[-1][0] == claim and len(first.rows()) == 4
    # A third clone with the tag of the first one is told so.
    third = Night(tmp_path / "third")
    third.git("remote", "add", "night", str(shared))
    assert "refs/autoresearch/mar5/table" in third.sh(SETUP).stdout
    assert third.git("branch", "--format=%(refname:short)") == "main"


# ---------------------------------------------------------------------------
# A real Slurm, where it is installed


class Slurm:
    """A Slurm cluster on this machine: a controller, and four nodes with a GPU each, all in name.

    `processes` has its daemons by name, and `says` asks them something through a command.
    """

    PROGRAMS = ("munged", "slurmctld", "slurmd", "srun")
    CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdParameters=config_overrides
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=5
KillWait=2
ReturnToService=2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
GresTypes=gpu
MpiDefault=none
NodeName=n[1-4] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=16 \
RealMemory=128000 Gres=gpu:h100:1
PartitionName=gpu Nodes=n[1-4] Default=YES PriorityTier=1
PartitionName=urgent Nodes=n[1-4] PriorityTier=2 PreemptMode=OFF
"""

    def __init__(self, folder: Path):
        self.folder = folder
        self.processes: dict[str, subprocess.Popen] = {}
        port = 20000 + os.getpid() % 10000
        facts = {"host": socket.gethostname(), "user": getpass.getuser(), "folder": folder}
        facts |= {"port": port, "first": port + 1, "last": port + 4}
        (folder / "slurm.conf").write_text(self.CONF.format(**facts))
        gpus = "NodeName=n[1-4] Name=gpu Type=h100 File=/dev/null\n"
        (folder / "gres.conf").write_text(gpus)
        (folder / "key").write_bytes(os.urandom(64))
        (folder / "key").chmod(0o400)
        for name in ("state", "n1", "n2", "n3", "n4"):
            (folder / name).mkdir()
        self.env = {**GIT_ENV, "SLURM_CONF": str(folder / "slurm.conf")}
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("log", "pid", "seed")]
        socket_and_key = f"--socket={folder}/munge", f"--key-file={folder}/key"
        self.start("munged", "munged", "-F", "--force", *socket_and_key, *files)
        self.start_controller()
        for node in ("n1", "n2", "n3", "n4"):
            self.start_node(node)

    def start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("a") as log:
            self.processes[name] = subprocess.Popen(command, env=self.env, stdout=log, stderr=log)

    def start_controller(self) -> None:
        self.start("slurmctld", "slurmctld", "-D", "-f", f"{self.folder}/slurm.conf")

    def start_node(self, name: str) -> None:
        self.start(name, "slurmd", "-D", "-N", name)

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait()

    def says(self, command: str) -> str:
        """What a command of Slurm prints, whether it fails or not."""
        done = subprocess.run(command.split(), env=self.env, capture_output=True, text=True)
        return done.stdout.strip()

    def stop(self) -> None:
        self.says("scancel --user " + getpass.getuser())
        for process in reversed(self.processes.values()):
            process.terminate()
            process.wait()

    def wait_until_idle(self) -> None:
        """Wait until all four nodes have no job. Raises TimeoutError after a minute."""
        deadline = time.monotonic() + 60
        while self.says("sinfo -h -p gpu -o %t%D") != "idle4":
            if time.monotonic() > deadline:
                raise TimeoutError(self.says("sinfo"))
            time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    if not all(map(shutil.which, Slurm.PROGRAMS)):
        pytest.skip("needs Slurm: " + ", ".join(Slurm.PROGRAMS))
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # munge wants a short path
        slurm = Slurm(Path(folder))
        try:
            slurm.wait_until_idle()
            yield slurm
        except TimeoutError:
            pytest.skip("Slurm is installed, but does not start here")
        finally:
            slurm.stop()


@pytest.fixture
def on_slurm(cluster, started) -> Night:
    """A night with its baseline done, whose runs go to the cluster."""
    cluster.wait_until_idle()
    started.env |= {"LAUNCH": SLURM, "SLURM_CONF": cluster.env["SLURM_CONF"]}
    return started


def test_five_agents_have_four_gpus_of_slurm_and_one_waits(on_slurm):
    agents = [on_slurm.worktree(f"gpu{number}") for number in range(1, 6)]
    for agent in agents:
        agent.commit(stub(1.6, 1.6, kind="slow", sleeps=4))
        assert agent.do("run").returncode == 0
    for agent in agents[:4]:
        agent.wait_for("compiling")
    last_line = agents[4].do("poll 1").stdout.splitlines()[-1]
    assert re.fullmatch(r"srun: job \d+ queued and waiting for resources", last_line), last_line
    for agent in agents:
        assert "exit: 0" in agent.do("poll").stdout
        assert agent.finish("a win").returncode == 0
        assert agent.rows()[-1][1:4:2] == ["1.600000", "keep"]


@pytest.mark.parametrize(
    "train, code",
    [
        (stub(1.9), 0),
        (stub(kind="bug"), 1),
        (stub(kind="killed"), 137),
        (stub(kind="memory"), None),
    ],
    ids=["no fault", "an error", "a kill", "memory"],
)
def test_slurm_gives_the_rows_that_there_are_without_it(on_slurm, train, code):
    on_slurm.env["LAUNCH"] = SLURM.replace("--mem=64G", "--mem=200M")
    on_slurm.experiment(train, "an idea")
    if code is not None:
        assert on_slurm.log().endswith(f"exit: {code}\n")
    assert on_slurm.rows()[-1][3] == ("crash" if code != 0 else "discard")


def start_slowly(night: Night, says: str = "compiling") -> str:
    """Start an experiment that takes a minute. Returns the number of its job in Slurm."""
    night.commit(stub(1.8, kind="slow").replace('"compiling"', '"compiling", os.getpid()'))
    assert night.do("run").returncode == 0
    night.wait_for(says)
    return subprocess.check_output(["squeue", "-h", "-o", "%i"], env=night.env, text=True).strip()


def repeats(night: Night) -> None:
    """Assert that what was lost gets no row, and that `run` begins again."""
    shown = night.do("poll").stdout
    assert re.search(r"^exit: \d+$", shown, re.MULTILINE), shown
    refuses(night.finish("an idea"), "run repeats it")
    assert len(night.rows()) == 1
    night.commit(stub(1.8), "the same, but quick")
    night.git("reset", "-q", "--soft", "HEAD~2")
    night.git("commit", "-qm", "one commit")
    night.run()
    assert night.finish("an idea").returncode == 0 and night.rows()[-1][1] == "1.800000"


def test_a_preempted_job_is_lost(on_slurm, cluster):
    start_slowly(on_slurm)
    cluster.says("srun -p urgent -N4 --gpus-per-node=h100:1 --mem=1G true")
    repeats(on_slurm)


def test_a_cancelled_job_is_lost(on_slurm, cluster):
    cluster.says("scancel " + start_slowly(on_slurm))
    repeats(on_slurm)


def test_a_job_that_is_cancelled_in_the_queue_is_lost(on_slurm, cluster):
    on_slurm.env["LAUNCH"] = SLURM + " --hold"
    cluster.says("scancel " + start_slowly(on_slurm, "queued and waiting"))
    on_slurm.env["LAUNCH"] = SLURM
    repeats(on_slurm)


def test_a_job_whose_node_dies_is_lost(on_slurm, cluster):
    job = start_slowly(on_slurm)
    node = cluster.says(f"squeue -h -j {job} -o %N")
    task = int(re.search(r"compiling (\d+)", on_slurm.log())[1])
    step = int(re.search(r"PPid:\s+(\d+)", Path(f"/proc/{task}/status").read_text())[1])
    cluster.kill(node)
    os.kill(step, signal.SIGKILL)
    os.kill(task, signal.SIGKILL)
    assert "Node failure" in on_slurm.do("poll").stdout
    cluster.start_node(node)
    cluster.wait_until_idle()
    repeats(on_slurm)


def test_a_time_limit_is_a_crash(on_slurm, cluster):
    cluster.says(f"scontrol update JobId={start_slowly(on_slurm)} EndTime=now")
    assert "DUE TO TIME LIMIT" in on_slurm.do("poll").stdout
    assert on_slurm.finish("an endless loop").returncode == 0
    assert on_slurm.rows()[-1][3] == "crash"


def test_a_controller_that_is_down_loses_what_it_should_start_and_not_what_runs(on_slurm, cluster):
    on_slurm.commit(stub(1.8, kind="slow", sleeps=5))
    cluster.kill("slurmctld")
    assert "Unable to contact slurm controller" in on_slurm.run()
    refuses(on_slurm.finish("an idea"), "run repeats it")
    cluster.start_controller()
    cluster.wait_until_idle()
    assert on_slurm.do("run").returncode == 0
    on_slurm.wait_for("compiling")
    cluster.kill("slurmctld")
    time.sleep(2)
    cluster.start_controller()
    assert "exit: 0" in on_slurm.do("poll").stdout
    assert on_slurm.finish("an idea").returncode == 0 and on_slurm.rows()[-1][1] == "1.800000"


@pytest.mark.parametrize("launch, survives", [(SLURM, True), (SLURM.split(" ", 1)[1], False)])
def test_a_terminal_that_hangs_up_takes_srun_with_it_unless_setsid_stands_before(
    on_slurm, launch, survives
):
    on_slurm.env["LAUNCH"] = launch
    on_slurm.commit(stub(1.8, kind="slow", sleeps=3))
    assert on_slurm.do("run").returncode == 0
    on_slurm.wait_for("compiling")
    os.killpg(on_slurm.group(), signal.SIGHUP)  # as at the end of a login session
    shown = on_slurm.do("poll").stdout
    if survives:
        assert "exit: 0" in shown
    else:
        assert "forcing job termination" in shown
        refuses(on_slurm.finish("an idea"), "run repeats it")


def edit_while_it_waits(night: Night, cluster: Slurm) -> str:
    """Start a job that Slurm holds, edit train.py, and release the job. Returns what poll shows."""
    night.commit(stub(1.8))
    assert night.do("run").returncode == 0
    night.wait_for("queued and waiting")
    (night.folder / "train.py").write_text(stub(1.1, 1.1))
    cluster.says("scontrol release " + cluster.says("squeue -h -o %i"))
    return night.do("poll").stdout


def test_an_edit_while_a_job_waits_in_a_shared_folder_is_found(on_slurm, cluster):
    on_slurm.env["LAUNCH"] = SLURM + " --hold"
    shown = edit_while_it_waits(on_slurm, cluster)
    assert "train.py was changed while it waited or ran" in shown
    refuses(on_slurm.finish("a wonder"), "no experiment waits")


def test_a_commit_that_is_shipped_to_slurm_is_what_trains(on_slurm, cluster):
    ship = 'mkdir -p ../$SLURM_JOB_ID && cd ../$SLURM_JOB_ID && tar x && exec "$@"'
    on_slurm.env["LAUNCH"] = f"git archive \"$commit\" | {SLURM} --hold sh -c '{ship}' sh"
    assert "exit: 0" in edit_while_it_waits(on_slurm, cluster)
    on_slurm.git("restore", "train.py")
    assert on_slurm.finish("an idea").returncode == 0 and on_slurm.rows()[-1][1] == "1.800000"
