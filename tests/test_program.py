"""
A night in small: the shell lines of program.md, taken out of it, each run in a shell of its own as agents do.

train.py is a stub that ends in a moment with the numbers it is told, uv runs Python at once, sleep is short.
The rest is real: git, the shell, awk, and the prepare.py that the setup asks for text.
"""

import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import GIT_ENV, HEADER, ROOT, git

PROGRAM = (ROOT / "program.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PROGRAM, re.DOTALL | re.MULTILINE)
SETUP, LOAD, EXPERIMENT, RESUME, WORKTREE, COMMANDS = BLOCKS
COMMIT, RUN, POLL, FINISH = (line.split("  ")[0] for line in EXPERIMENT.strip().splitlines())
INLINE = [
    " ".join(code.split()) for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", PROGRAM, flags=re.S))
]
SHELLS = [name for name in ("sh", "zsh") if shutil.which(name)]  # Debian's sh is dash, macOS's is bash

STUB = """
import faulthandler, os, sys, time
seed, nan = int(os.environ["SEED"]), float("nan")
if {kind!r} == "slow":
    time.sleep(60)
if {kind!r} == "hang":
    faulthandler.dump_traceback_later(0.2, exit=True, file=sys.__stderr__)
    time.sleep(60)
if {kind!r} == "refused":
    sys.exit("error: the model looks ahead: a later token changes its logits; mask the attention")
if {kind!r} == "nan":
    print("FAIL: the loss is nan at step 120")
    sys.exit(1)
if {kind!r} == "bug":
    raise ValueError("val_bpb: 0.1")
for step in range(1, 31):
    print(f"step {{step:05d}} | loss {{5 - step / 10:.4f}}")
print("sample: 'exit: 3, val_bpb: 0.1'")
print("---")
print("val_bpb:          %.6f" % {values}[seed - 1])
print("peak_vram_mb:     45060.2")
print("seed:            ", {seeds}[seed - 1])
print("device:           Stub GPU, 80 GB")
print("attention:        sdpa")
print("harness:          {harness}")
sys.exit({kind!r} == "late")
"""


def stub(*values: float, kind: str = "train", seeds=(1, 2), harness: str = "0123456789ab") -> str:
    """A train.py that ends with these val_bpb, one for each seed, or in another way."""
    return STUB.format(values=values, kind=kind, seeds=seeds, harness=harness)


def inline(start: str) -> str:
    """The one command in the prose of program.md that begins so."""
    (command,) = {code for code in INLINE if code.startswith(start)}
    return command


class Night:
    """A scratch clone, and an agent's shell in it."""

    def __init__(self, folder: Path, shell: str = "sh"):
        self.folder, self.shell = folder / "clone", shell
        tools = folder / "bin"
        tools.mkdir(parents=True)
        python = shlex.quote(sys.executable)
        uv = f'shift; [ "$1" != -q ] || shift; [ "$1" != python ] || shift; exec {python} "$@"'
        for name, line in {"uv": uv, "sleep": f"exec {shutil.which('sleep')} 0.02"}.items():
            (tools / name).write_text(f"#!/bin/sh\n{line}\n")
            (tools / name).chmod(0o755)
        self.env = {**GIT_ENV, "PATH": f"{tools}:{os.environ['PATH']}"}
        self.folder.mkdir()
        for name in ("prepare.py", "program.md", "analysis.ipynb", ".gitignore"):
            shutil.copy(ROOT / name, self.folder)
        (self.folder / "train.py").write_text(stub(1.70, 1.72))
        self.git("init", "-q", "-b", "main")
        self.git("add", ".")
        self.git("commit", "-qm", "the state that the night begins with")

    def sh(self, command: str) -> subprocess.CompletedProcess:
        """Run in a new shell, as tools do; all that it prints is in stdout."""
        with subprocess.Popen(
            [self.shell, "-c", command],
            cwd=self.folder,
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process:
            self.group = process.pid
            output, _ = process.communicate(timeout=30)
        return subprocess.CompletedProcess(command, process.returncode, output)

    def do(self, command: str) -> subprocess.CompletedProcess:
        return self.sh(LOAD + command)

    def git(self, *args: str) -> str:
        return git(self.folder, *args)

    def setup(self) -> "Night":
        done = self.sh(SETUP)
        assert (done.returncode, done.stdout) == (0, ""), done.stdout
        return self

    def begin(self, rows: str = "") -> None:
        """What the setup leaves, without its look at the prepared text, and some rows."""
        self.git("switch", "-qc", "autoresearch/mar5")
        self.git("update-ref", "refs/autoresearch/mar5/start", "HEAD")
        (self.folder / "results.tsv").write_text(HEADER + rows)

    def commit(self, train: str, message: str = "an idea") -> str:
        (self.folder / "train.py").write_text(train)
        done = self.do(re.sub(r"'.*'", shlex.quote(message), COMMIT))
        assert done.returncode == 0, done.stdout
        return self.head()

    def train(self) -> str:
        done = self.do(RUN)
        assert (done.returncode, done.stdout) == (0, ""), done.stdout
        shown = self.do(POLL).stdout
        assert re.fullmatch(r"exit: \d+", shown.splitlines()[-1]), shown
        assert "exit: 0" not in shown or "\nval_bpb: " in shown
        return shown

    def finish(self, description: str, judgement: str = "better") -> subprocess.CompletedProcess:
        words = FINISH.replace("better", judgement)
        return self.do(re.sub(r"'.*'", lambda _: shlex.quote(description), words))

    def experiment(
        self, train: str | None, description: str, judgement: str = "better", runs: int = 1
    ) -> str:
        """Commit, run and write the row, `runs` times; gives the commit."""
        commit = self.commit(train, description) if train else self.head()
        for _ in range(runs):
            self.train()
            done = self.finish(description, judgement)
            assert done.returncode == 0, done.stdout
        return commit

    def rows(self) -> list[list[str]]:
        header, *rows = (self.folder / "results.tsv").read_text().splitlines()
        assert header + "\n" == HEADER
        return [row.split("\t") for row in rows]

    def head(self) -> str:
        return self.git("rev-parse", "--short=7", "HEAD")


@pytest.fixture(scope="module", params=SHELLS)
def night(request, tmp_path_factory) -> Night:
    """A whole night; what came of it is in `commits`, by name."""
    night = Night(tmp_path_factory.mktemp("night"), request.param).setup()
    commits = night.commits = {}
    commits["baseline"] = night.experiment(None, "baseline", runs=2)
    commits["win"] = night.experiment(stub(1.705, 1.685), "raise MATRIX_LR to 0.05", runs=2)
    commits["refuted"] = night.experiment(stub(1.69, 1.705), "a lucky first seed", runs=2)
    commits["loss"] = night.experiment(
        stub(1.80), 'a "quoted"\ttab, C:\\temp\\new, %s 100%, $HOME\nand a line: größer'
    )
    commits["simpler"] = night.experiment(stub(1.70, 1.705), "delete the value gates", "simpler", runs=2)
    commits["too simple"] = night.experiment(stub(1.73), "delete the MLP", "simpler")
    commits["bug"] = night.experiment(stub(kind="bug"), "a slip")
    bring_back = inline("git cherry-pick -n").replace("1a2b3c4", commits["bug"])
    assert night.do(bring_back).returncode == 0
    assert (night.folder / "train.py").read_text() == stub(kind="bug")
    commits["mended"] = night.experiment(stub(1.9), "the slip mended")
    commits["hang"] = night.experiment(stub(kind="hang"), "an endless loop")
    commits["nan"] = night.experiment(stub(kind="nan"), "a rate of 10")
    commits["refused"] = night.experiment(stub(kind="refused"), "no mask")
    commits["ugly"] = night.experiment(stub(1.5), "forty lines for a gain", "drop")

    commits["death"] = night.experiment(stub(1.695, 1.705), "the machine dies between two seeds")
    night.git("switch", "-q", "main")
    assert "seed 1 of 2: the machine dies" in night.sh(RESUME).stdout
    night.train()
    assert night.finish("the machine dies between two seeds").returncode == 0
    return night


def test_rows_of_the_night(night):
    expected = [  # worked out by hand: bar 1.71, after the win 1.695, after the simplification 1.7025
        ("baseline", "1.700000", "discard", "seed 1 of 2: baseline [0123456789ab, sdpa, Stub GPU, 80 GB]"),
        ("baseline", "1.720000", "keep", "baseline"),
        ("win", "1.705000", "discard", "seed 1 of 2: raise MATRIX_LR to 0.05"),
        ("win", "1.685000", "keep", "raise MATRIX_LR to 0.05"),
        ("refuted", "1.690000", "discard", "seed 1 of 2: a lucky first seed"),
        ("refuted", "1.705000", "discard", "a lucky first seed"),
        ("loss", "1.800000", "discard", "a 'quoted' tab, C:\\temp\\new, %s 100%, $HOME and a line: größer"),
        ("simpler", "1.700000", "discard", "seed 1 of 2: delete the value gates"),
        ("simpler", "1.705000", "keep", "delete the value gates"),
        ("too simple", "1.730000", "discard", "delete the MLP"),
        ("bug", "0.000000", "crash", "a slip"),
        ("mended", "1.900000", "discard", "the slip mended"),
        ("hang", "0.000000", "crash", "an endless loop"),
        ("nan", "0.000000", "crash", "a rate of 10"),
        ("refused", "0.000000", "crash", "no mask"),
        ("ugly", "1.500000", "discard", "forty lines for a gain"),
        ("death", "1.695000", "discard", "seed 1 of 2: the machine dies between two seeds"),
        ("death", "1.705000", "keep", "the machine dies between two seeds"),
    ]
    memory = {"crash": "0.0"}
    assert night.rows() == [
        [night.commits[name], value, memory.get(status, "44.0"), status, text]
        for name, value, status, text in expected
    ]


def test_pandas_reads_the_table_as_it_is(night):
    table = pd.read_csv(night.folder / "results.tsv", sep="\t", dtype={"commit": str})
    assert list(table.columns) == ["commit", "val_bpb", "memory_gb", "status", "description"]
    assert table.notna().all().all() and len(table) == len(night.rows()) == 18


def test_branch_holds_exactly_the_kept_commits(night):
    branch = night.git("log", "--format=%h", "--abbrev=7", "autoresearch/mar5").split()
    assert branch == [night.commits[name] for name in ("death", "simpler", "win", "baseline")]


def test_every_discarded_commit_stays_reachable_with_its_code(night):
    night.git("gc", "-q", "--prune=now")
    discarded = {row[0] for row in night.rows()} - set(night.git("log", "--format=%h", "--abbrev=7").split())
    refs = night.do(inline("git for-each-ref")).stdout.split()[2::3]
    assert set(refs) == {f"refs/autoresearch/mar5/{name}" for name in ("start", *discarded)}
    assert "(1.69, 1.705)" in night.git("show", f"refs/autoresearch/mar5/{night.commits['refuted']}:train.py")


def test_nothing_but_train_py_has_changed_and_the_tree_is_clean(night):
    assert night.git("diff", "--name-only", "refs/autoresearch/mar5/start") == "train.py"
    assert (night.folder / "prepare.py").read_bytes() == (ROOT / "prepare.py").read_bytes()
    assert night.git("status", "--porcelain") == ""


def test_bar_is_the_mean_of_the_kept_commit_and_gap_the_median_over_all_pairs(night):
    kept, bar, gap = night.do("bar").stdout.split()[1::2]
    assert kept == night.commits["death"]
    assert float(bar) == pytest.approx((1.695 + 1.705) / 2, abs=1e-7)
    assert float(gap) == pytest.approx(0.015, abs=1e-7)  # of 0.02, -0.02, 0.015, 0.005, 0.01


def test_lines_for_direction_show_the_curve_and_what_was_tried(night):
    (night.folder / "notes.md").write_text("")
    assert len(night.sh(inline("awk '/^step/")).stdout.splitlines()) == 6
    assert "raise MATRIX_LR" in night.sh(inline("grep -i rope").replace("rope", "matrix_lr")).stdout


# ---------------------------------------------------------------------------
# What the commands refuse, and what a death leaves behind


@pytest.fixture
def started(tmp_path) -> Night:
    """A night with its baseline done: bar 1.71, gap 0.02."""
    night = Night(tmp_path)
    commit = night.head()
    night.begin(
        f"{commit}\t1.700000\t44.0\tdiscard\tseed 1 of 2: baseline [0123456789ab, sdpa, Stub GPU, 80 GB]\n"
        f"{commit}\t1.720000\t44.0\tkeep\tbaseline\n"
    )
    return night


def refuses(done: subprocess.CompletedProcess, reason: str) -> None:
    assert done.returncode != 0 and done.stdout.startswith("refused: ") and reason in done.stdout, done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_setup_says_all_that_is_in_the_way_and_changes_nothing(tmp_path):
    night = Night(tmp_path)
    night.env["AUTORESEARCH_CACHE"] = str(tmp_path / "empty")
    obstacles = ("train.py", "new.txt", "results.tsv")
    for name in obstacles:
        (night.folder / name).write_text("precious")
    shown = night.sh(SETUP).stdout
    assert "uv run prepare.py" in shown and all(name in shown for name in obstacles)
    assert night.git("branch", "--format=%(refname:short)") == "main"
    assert {(night.folder / name).read_text() for name in obstacles} == {"precious"}


@pytest.mark.parametrize("name", ["prepare.py", "program.md", "helper.py"])
def test_run_refuses_when_another_file_differs_from_the_start(started, name):
    with (started.folder / name).open("a") as file:
        file.write("\n# mine\n")
    if name != "helper.py":  # committed or not
        started.git("commit", "-qam", "a change to what is locked")
    refuses(started.do(RUN), name)
    assert not (started.folder / "run.log").exists()


def test_a_notebook_with_the_outputs_of_a_human_who_looked_is_not_in_the_way(started):
    with (started.folder / "analysis.ipynb").open("a") as file:
        file.write("\n")
    commit = started.experiment(stub(1.80), "a loss")
    assert started.rows()[-1][0] == commit
    assert started.git("status", "--short") == "M analysis.ipynb"


def test_run_refuses_an_edit_that_is_not_committed(started):
    (started.folder / "train.py").write_text(stub(1.6))
    refuses(started.do(RUN), "not committed")
    assert (started.folder / "train.py").read_text() == stub(1.6)


def test_run_refuses_a_third_run_and_a_second_try_of_what_was_discarded(started):
    refuses(started.do(RUN), "has had its runs")
    started.experiment(stub(1.8), "a loss")
    refuses(started.do(RUN), "has had its runs")


def test_run_refuses_two_commits_on_top_of_the_kept_one(started):
    started.commit(stub(1.6))
    started.commit(stub(1.5))
    refuses(started.do(RUN), f"git reset --soft {started.rows()[0][0]}")


def test_run_refuses_outside_the_branch_of_a_night(started):
    started.git("switch", "-q", "main")
    refuses(started.do(RUN), "see Setup")


def test_run_refuses_while_another_is_under_way_and_poll_comes_back(started):
    started.commit(stub(kind="slow"))
    assert started.do(RUN).returncode == 0
    group = started.group
    try:
        refuses(started.do(RUN), "under way")
        began = time.monotonic()
        assert "exit:" not in started.do(POLL).stdout
        assert time.monotonic() - began > 2  # it did wait
        assert started.finish("too early").returncode != 0
    finally:
        os.killpg(group, signal.SIGKILL)


def test_row_that_was_forgotten_comes_before_the_next_run(started):
    started.commit(stub(1.8))
    started.train()
    refuses(started.do(RUN), "finish")
    assert started.finish("a loss").returncode == 0
    refuses(started.finish("a loss"), "no run that waits")
    assert len(started.rows()) == 3


def test_row_names_the_commit_that_ran_even_after_a_reset(started):
    commit = started.commit(stub(1.8))
    started.train()
    started.git("reset", "-q", "--hard", "HEAD^")
    assert started.finish("a loss").returncode == 0
    assert started.rows()[-1][:2] == [commit, "1.800000"]
    assert started.git("rev-parse", f"refs/autoresearch/mar5/{commit}")


@pytest.mark.parametrize(
    "train, reason", [(stub(1.5, harness="f" * 12), "f" * 12), (stub(1.5, seeds=(7, 7)), "seed 7")]
)
def test_a_run_that_does_not_compare_gets_no_number(started, train, reason):
    started.commit(train)
    started.train()
    refuses(started.finish("a wonder"), reason)
    assert len(started.rows()) == 2
    assert started.finish("a wonder", "drop").returncode == 0
    assert started.rows()[-1][1:4] == ["0.000000", "0.0", "crash"]


def test_an_unknown_judgement_and_a_missing_description_are_refused(started):
    started.commit(stub(1.8))
    started.train()
    refuses(started.finish("a loss", "great"), "finish better|simpler|drop DESCRIPTION")
    refuses(started.finish(""), "finish better|simpler|drop DESCRIPTION")
    assert len(started.rows()) == 2


def test_equal_to_the_bar_is_no_win_unless_simpler(started):
    started.experiment(stub(1.71), "no gain")
    assert started.rows()[-1][3:] == ["discard", "no gain"]
    started.experiment(
        stub(1.73, 1.73), "no gain, less code", "simpler", runs=2
    )  # a gap above the bar, no more
    assert started.rows()[-1][3:] == ["keep", "no gain, less code"]


def test_gap_of_an_even_number_of_pairs_lies_between_the_middle_two(started):
    started.experiment(stub(1.7, 1.7), "one more pair, without a gap", runs=2)
    assert float(started.do("bar").stdout.split()[-1]) == pytest.approx(0.01, abs=1e-7)


def test_finish_says_what_comes_next(started):
    started.commit(stub(1.7, 1.8))
    for following in ("next: run, for the second seed", "next: another idea"):
        started.train()
        assert started.finish("a lucky seed").stdout.splitlines()[-1] == following


def test_a_disturbed_baseline_is_dropped_and_measured_again(tmp_path):
    night = Night(tmp_path)
    night.begin()
    night.experiment(None, "disturbed: another process", "drop")
    refuses(night.do(RUN), "has had its runs")
    assert night.sh(inline("git commit -q --allow-empty")).returncode == 0
    commit = night.experiment(None, "baseline", runs=2)
    assert [row[3] for row in night.rows()] == ["discard", "discard", "keep"]
    assert night.do("bar").stdout.split()[:4] == ["kept", commit, "bar", "1.7100000"]


def test_a_forged_mark_does_not_buy_a_second_run(started):
    started.experiment(stub(1.8), "seed 1 of 2: a loss")
    assert started.rows()[-1][4] == "a loss"


def test_a_crash_under_the_second_seed_decides(started):
    commit = started.experiment(stub(1.6), "fragile", runs=2)  # no number for the second seed: a traceback
    assert [row[3] for row in started.rows()[-2:]] == ["discard", "crash"]
    assert started.head() != commit
    kept, _, gap = started.do("bar").stdout.split()[1::2]
    assert kept == started.head() and gap == "0.0200000"  # a crash has no value to be a gap away from


@pytest.mark.parametrize("train", [stub(math.nan), stub(1.5, kind="late")], ids=["nan", "after the summary"])
def test_a_run_without_a_number_or_with_an_error_is_a_crash(started, train):
    started.experiment(train, "broken")
    assert started.rows()[-1][1:] == ["0.000000", "0.0", "crash", "broken"]


def test_a_run_that_died_with_the_machine_starts_again_under_its_seed(started):
    commit = started.commit(stub(kind="slow"))
    started.do(RUN)
    os.killpg(started.group, signal.SIGKILL)
    for _ in range(2):  # and once more: the log of the dead run is no obstacle
        assert "exit:" not in started.do(POLL).stdout
        assert started.do(RUN).returncode == 0
        os.killpg(started.group, signal.SIGKILL)
    log = (started.folder / "run.log").read_text()
    assert log.startswith(f"commit: {commit}\nrun: 1 of 2\n") and len(started.rows()) == 2


def test_a_death_between_row_and_reset_is_settled(started):
    kept = started.head()
    commit = started.experiment(stub(1.8), "a loss")
    started.git("reset", "-q", "--hard", commit)  # as if finish had died after its row
    started.git("update-ref", "-d", f"refs/autoresearch/mar5/{commit}")
    refuses(started.do(RUN), "edit train.py")
    assert started.head() == kept
    assert started.git("rev-parse", "--short=7", f"refs/autoresearch/mar5/{commit}") == commit


def test_a_line_cut_in_half_does_not_spoil_the_next_row(started):
    with (started.folder / "results.tsv").open("a") as table:
        table.write("abc")
    commit = started.experiment(stub(1.8), "a loss")
    assert (
        started.rows()[-1] == [commit, "1.800000", "44.0", "discard", "a loss"] and len(started.rows()) == 4
    )


def test_several_gpus_have_worktrees_and_tags_of_their_own(started):
    started.git("switch", "-q", "main")
    assert started.sh(WORKTREE).returncode == 0
    second = started.folder.parent / "gpu1"
    shown = started.sh(f"cd {second} && {SETUP.replace('mar5', 'mar5-gpu1')}").stdout
    assert shown == "" and (second / "results.tsv").exists()
    started.git("switch", "-q", "autoresearch/mar5")
    assert started.git("branch", "--format=%(refname:short)").split() == [
        "autoresearch/mar5",
        "autoresearch/mar5-gpu1",
        "main",
    ]
