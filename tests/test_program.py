"""
Claims about program.md: its commands, pasted one after the other, leave records that agree.

The tests find the commands by their headings, so the prose around them may be edited. Each block
runs in a new shell. train.py is a stub that prints the numbers which a test wants, and `uv` runs
Python and nothing else. Git and the shells are real.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import GIT_ENV, HEADER, ROOT, git

PROGRAM = (ROOT / "program.md").read_text()


def commands(heading: str) -> list[str]:
    """The indented blocks of program.md under a heading, in order."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PROGRAM, re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"(?:^(?: {4}| {7})\S.*\n)+", section, re.MULTILINE)
    return ["".join(line.strip() + "\n" for line in block.splitlines()) for block in blocks]


CHECK, BEGIN = commands("Setup")
LOOK, COMMIT, TRAIN, ROW, BACK = commands("One experiment")
RENAME, COMPARE = commands("When the machine is busy")
(RESUME,) = commands("Resume")
(OTHERS,) = commands("Other agents")
(AMEND,) = re.findall(r"`(git commit -q --amend .*?)`", PROGRAM)

SHELLS = [name for name in ("sh", "bash", "zsh") if shutil.which(name)]

# ---------------------------------------------------------------------------
# A clone with stubs, and an agent that follows the text to the letter

STUB = """
import os, sys, time
value = VALUES[int(os.environ["SEED"]) - 1]
print("compiling", flush=True)
if value == "hang":
    time.sleep(60)
if value is None:
    raise ValueError("a slip")
print("---")
print(f"val_bpb:          {value:.6f}")
print("harness:          0123456789ab")
print("peak_vram_mb:     1536.0")
print("device:          ", os.environ.get("STUB_DEVICE", "Stub GPU, 80 GB"))
print("attention:        sdpa")
"""


def experiment_code(*values: float | str | None) -> str:
    """A train.py that prints the first value with seed 1, and the second with seed 2."""
    return f"VALUES = {list(values)}\n" + STUB


class Night:
    """A clone in which a shell runs the commands of program.md."""

    def __init__(self, folder: Path, shell: str = "sh", tag: str = "mar5"):
        self.folder, self.shell, self.tag = folder, shell, tag
        self.bar = self.first_of_kept = float("inf")
        bin = folder.parent / "bin"
        bin.mkdir(exist_ok=True)
        uv = bin / "uv"  # `uv run [-q] ...`, with or without the word python
        uv.write_text(
            '#!/bin/sh\nshift; [ "$1" = -q ] && shift; [ "$1" = python ] && shift\n'
            f'exec {sys.executable} "$@"\n'
        )
        uv.chmod(0o755)
        self.env = {**GIT_ENV, "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}"}

    def paste(self, command: str, code: int = 0, **env: str) -> str:
        """What a command of program.md prints, in a new shell and with this night's tag."""
        command = command.replace("mar5", self.tag)
        run = subprocess.run(
            [self.shell, "-c", command],
            cwd=self.folder,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert run.returncode == code, run.stdout
        return run.stdout

    def git(self, *args: str) -> str:
        return git(self.folder, *args)

    def rows(self, status: str = "") -> list[list[str]]:
        text = (self.folder / "results.tsv").read_text()
        assert text.startswith(HEADER)
        rows = [line.split("\t") for line in text.removeprefix(HEADER).splitlines()]
        return [row for row in rows if status in ("", row[3])]

    def train(self, seed: int) -> float | None:
        """Paste the line that trains. Returns val_bpb, or None after a crash."""
        out = self.paste(TRAIN.replace("seed=1", f"seed={seed}"))
        found = re.search(r"^val_bpb: +([0-9.]+)$", out, re.MULTILINE)
        return float(found[1]) if found else None

    def end(self, status: str, value: float = 0, memory: str = "1.5") -> None:
        """Paste the row with these words in place of the sample's, and what follows a discard."""
        sample = re.compile(r"[0-9.]{8} [0-9.]{3} \w+ '.*?'")
        assert len(sample.findall(ROW)) == 1
        self.paste(sample.sub(f"{value:.6f} {memory} {status} 'an idea'", ROW))
        if status != "keep":
            self.paste(BACK)

    def decide(self) -> str:
        """Train the commit at HEAD as step 4 says, and end the experiment. Returns its status."""
        first = self.train(1)
        if first is None:
            self.end("crash", memory="0.0")
            return "crash"
        value = first
        if first < max(self.bar, self.first_of_kept):
            value = (first + self.train(2)) / 2
        status = "keep" if value < self.bar else "discard"
        self.end(status, value)
        if status == "keep":
            self.bar, self.first_of_kept = value, first
        return status

    def commit(self, *values: float | str | None, command: str = COMMIT) -> None:
        """Write a train.py that gives these values, and commit it."""
        (self.folder / "train.py").write_text(experiment_code(*values))
        self.paste(command)

    def experiment(self, *values: float | None) -> str:
        self.commit(*values)
        return self.decide()

    def check_records(self) -> None:
        """Assert that branch, table, logs and refs tell the same story."""
        kept = [row[0] for row in self.rows("keep")]
        lost = [row[0] for row in self.rows() if row[3] != "keep"]
        assert self.git("branch", "--show-current") == f"autoresearch/{self.tag}"
        assert self.git("log", "--format=%h", "--reverse", f"{kept[0]}^..").split() == kept
        named = self.git("for-each-ref", f"refs/autoresearch/{self.tag}", "--format=%(refname)")
        assert sorted(ref.rpartition("/")[2] for ref in named.split()) == sorted(lost)
        bar = None
        for commit, value, memory, status, _ in self.rows():
            assert status == "keep" or self.git("rev-parse", "--short", f"{commit}^") == bar
            bar = commit if status == "keep" else bar
            logs = (self.folder / "logs").glob(f"{commit}-*.log")
            values = re.findall(r"^val_bpb: *(.*)$", "".join(log.read_text() for log in logs), re.M)
            mean = sum(map(float, values)) / max(1, len(values))
            assert (f"{mean:.6f}", "1.5" if mean else "0.0") == (value, memory)
            assert len(values) == {"keep": 2, "crash": 0}.get(status, len(values))
        assert self.git("status", "--porcelain", ".") == ""


def clone(folder: Path, kind: str = "plain") -> Path:
    """A clone of a repository with our program.md and .gitignore, and stubs for the rest."""
    origin = folder / "origin"
    project = origin / "lm" if kind == "subfolder" else origin
    project.mkdir(parents=True)
    for name in ("program.md", ".gitignore"):
        shutil.copy(ROOT / name, project)
    (project / "prepare.py").write_text("def dataset(): pass\n")
    (project / "train.py").write_text(experiment_code(1.61, 1.62))
    if kind == "subfolder":
        (origin / "other.txt").write_text("of another project\n")
    git(origin, "init", "-q", "-b", "main")
    git(origin, "add", "-A")
    git(origin, "commit", "-qm", "the project")
    autocrlf = "true" if kind == "crlf" else "false"
    git(folder, "clone", "-q", "-c", f"core.autocrlf={autocrlf}", "origin", "clone")
    if kind == "subfolder":
        (folder / "clone" / "other.txt").write_text("an edit of another project\n")
        return folder / "clone" / "lm"
    return folder / "clone"


@pytest.fixture
def night(tmp_path: Path) -> Night:
    """A night whose Setup is done."""
    night = Night(clone(tmp_path))
    night.paste(BEGIN)
    return night


# ---------------------------------------------------------------------------
# Setup


def test_setup_shows_what_is_in_the_way_and_nothing_else(tmp_path):
    night = Night(clone(tmp_path))
    night.git("config", "status.branch", "true")
    (night.folder / "prepare.py").write_text("def dataset(): print('no data yet')\n")
    night.paste("mkdir logs; touch results.tsv new.py .DS_Store notes.md model.pt")
    shown = night.paste(CHECK).splitlines()
    assert shown == ["no data yet", "logs", "results.tsv", " M prepare.py", "?? new.py"]


def test_prepare_says_nothing_where_text_is_prepared(capsys):
    exec(re.search("python -c '(.*?)'", CHECK)[1], {})  # here it asks the real prepare.py
    assert capsys.readouterr() == ("", "")


def test_setup_makes_no_branch_where_git_cannot_commit(tmp_path):
    night = Night(clone(tmp_path))
    nobody = {name: "" for name in GIT_ENV if name.startswith("GIT_COMMITTER_")}
    assert "empty ident name" in night.paste(BEGIN.splitlines()[0], 128, **nobody)
    assert night.git("branch", "--list", "autoresearch/*") == ""
    night.paste(BEGIN)  # the same block again, when git knows a name
    assert night.decide() == "keep"
    night.check_records()


# ---------------------------------------------------------------------------
# Experiments


@pytest.mark.parametrize(
    ("kind", "shell"),
    [("plain", shell) for shell in SHELLS] + [("crlf", "sh"), ("subfolder", "sh")],
)
def test_a_night_leaves_records_that_agree(tmp_path, kind, shell):
    night = Night(clone(tmp_path, kind), shell)
    assert night.paste(CHECK + ":") == ""
    night.paste(BEGIN)
    assert night.decide() == "keep"  # the baseline
    assert night.experiment(1.60, 1.61) == "keep"
    assert night.experiment(1.58, 1.64) == "discard"  # its first seed was luck
    assert night.experiment(1.605, 1.0) == "discard"  # not below the bar, so that seed 2 never ran
    assert night.experiment(None) == "crash"
    assert night.experiment(1.59, 1.60) == "keep"
    night.check_records()
    runs = len(list((night.folder / "logs").iterdir()))
    assert runs == 2 + 2 + 2 + 1 + 1 + 2
    assert len(night.paste(COMPARE).splitlines()) == 3
    night.paste(TRAIN, STUB_DEVICE="Stub GPU, 40 GB")  # a log of another machine
    assert len(night.paste(COMPARE).splitlines()) == 4


def test_a_mended_crash_and_a_disturbed_run_are_one_experiment(night):
    night.decide()
    night.commit(None)
    assert night.train(1) is None
    night.commit(1.9, command=AMEND)
    night.train(1)
    night.paste(RENAME)
    head = night.git("rev-parse", "--short", "HEAD")
    logs = (night.folder / "logs").glob(f"{head}*")
    assert [log.name for log in logs] == [f"{head}-1.disturbed"]
    night.commit(1.60, 1.62, command=AMEND)  # as on a quiet machine
    assert night.decide() == "keep"
    night.check_records()


def test_what_the_human_writes_in_the_night_survives_a_discard(night):
    night.decide()
    for name in ("program.md", "analysis.ipynb", "notes.md"):
        with (night.folder / name).open("a") as file:
            file.write("three seeds, please\n")
    assert night.experiment(1.7) == "discard"
    assert night.git("show", "--name-only", "--format=", night.rows()[-1][0]) == "train.py"
    assert "three seeds, please" in (night.folder / "program.md").read_text()
    shown = night.paste(LOOK)
    assert "three seeds, please\n" in shown and shown.endswith(" M program.md\n?? analysis.ipynb\n")


# ---------------------------------------------------------------------------
# Interruptions, and other agents


def test_resume_after_the_client_was_killed_in_a_run(night):
    night.decide()
    night.commit("hang")
    command = [night.shell, "-c", TRAIN]
    run = subprocess.Popen(command, cwd=night.folder, env=night.env, start_new_session=True)
    head = night.git("rev-parse", "--short", "HEAD")
    log = night.folder / "logs" / f"{head}-1.log"
    while not log.exists() or log.read_text() != "compiling\n":
        assert run.poll() is None
        time.sleep(0.01)
    at_work = rf"\b{run.pid}\b.*train\.py"
    assert re.search(at_work, night.paste(RESUME))
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    shown = night.paste(RESUME + ":")
    assert not re.search(at_work, shown)
    assert shown.startswith(head)
    assert f"\n{head}\t" not in shown  # it has no row
    night.commit(1.60, 1.61, command=AMEND)  # it hangs no more
    assert night.decide() == "keep"
    night.check_records()


def test_resume_between_the_row_and_the_reset(night):
    night.decide()
    night.commit(1.7)
    row = ROW.replace("1.602184", f"{night.train(1):.6f}").replace(" keep ", " discard ")
    night.paste(row)
    head = night.git("rev-parse", "--short", "HEAD")
    shown = night.paste(RESUME + ":")
    assert shown.startswith(head) and f"\n{head}\t1.700000\t1.5\tdiscard\t" in shown
    night.paste(BACK)
    night.check_records()


def test_agents_in_worktrees_see_each_other_and_take_over(night):
    folder = night.folder.parent / "gpu1"
    night.git("worktree", "add", "-q", "--detach", str(folder), "main")
    other = Night(folder, tag="mar5-gpu1")
    other.paste(BEGIN)
    for agent in (night, other):
        assert agent.decide() == "keep"
    assert night.experiment(1.60, 1.61) == "keep"
    won = night.rows("keep")[-1][0]
    shown = other.paste(OTHERS)
    assert f"{won} raise MATRIX_LR" in shown and f"\n{won}\t1.605000" in shown
    other.paste(f"git cherry-pick {won}")
    assert other.decide() == "keep"
    assert night.experiment(1.7) == other.experiment(1.7) == "discard"
    night.check_records()
    other.check_records()
