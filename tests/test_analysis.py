"""
Claims about analysis.ipynb: what it counts in a table, and where it sees that records do not agree.

The cells run in this process, without a kernel. Gains, sigmas and standard errors are worked out by
hand. Sigma is pooled over all commits that were run more than once.
"""

import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from conftest import HEADER, ROOT, git
from matplotlib import pyplot as plt
from nbclient import NotebookClient

NOTEBOOK = nbformat.read(ROOT / "analysis.ipynb", 4)
NIGHT = ROOT / "tests" / "night"


@pytest.fixture
def show(tmp_path, monkeypatch, capsys):
    """A function that runs all cells in a folder of its own, on a table if it is given one.

    It returns what they show, by heading, and under `names` all names that they have defined.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))  # no repository above it
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    plt.switch_backend("Agg")

    def run_cells(table: str | None = None) -> dict:
        if table is not None:
            Path("results.tsv").write_text(table)
        names = {"display": lambda what, raw=False: print(what if raw else what.to_string())}
        shown = {"names": names}
        for cell in NOTEBOOK.cells:
            if cell.cell_type == "markdown":
                heading = cell.source.splitlines()[0].lstrip("# ")
                shown[heading] = ""
            else:
                exec(cell.source, names)
                out, err = capsys.readouterr()
                assert err == ""
                shown[heading] += out
        return shown

    yield run_cells
    plt.close("all")


def row(commit: str, value: float | str, status: str, text: str = "an idea") -> str:
    """A line of results.tsv."""
    return f"{commit}\t{value}\t1.5\t{status}\t{text}\n"


THREE = (
    HEADER
    + row("aaaaaaa", "1.600000", "keep", "baseline")
    + row("bbbbbbb", "1.500000", "keep", "warmup 0.1")
    + row("ccccccc", "1.550000", "discard", "warmup 0.2")
)

# ---------------------------------------------------------------------------
# Reading tables


@pytest.mark.parametrize("table", [None, "", HEADER, "no table at all"])
def test_without_an_experiment_every_heading_has_its_sentence(show, table):
    shown = show(table)
    nothing = "No experiment is in any results.tsv"
    assert sum(nothing in str(text) for text in shown.values()) == 8
    assert "nothing to draw" in shown["How did it go?"]


@pytest.mark.parametrize(
    "table",
    [
        THREE,
        THREE.removeprefix(HEADER),
        "\N{ZERO WIDTH NO-BREAK SPACE}" + THREE.replace("\n", "\r\n"),
        THREE.replace("keep", "KEEP ").replace("\twarmup", "\t warmup\t$x_1$"),
        THREE + row("bbbbbbb", "1.500000", "keep", "warmup 0.1"),
        "\n".join("\t".join(["x", *reversed(line.split("\t"))]) for line in THREE.splitlines()),
    ],
    ids=["plain", "no header", "CRLF and BOM", "case and tabs", "a line twice", "other columns"],
)
def test_tables_of_all_shapes_have_the_same_counts_and_the_same_gain(show, table):
    shown = show(table)
    done = "2 experiments beside the baseline: 1 kept, 1 discarded, 0 crashed. 3 runs."
    assert done in shown["How much was done?"]
    assert "fell from 1.600000 to 1.500000: 0.100000, 6.25%" in shown["What was won?"]
    assert "The noise is unknown" in shown["What was won?"]
    assert "bbbbbbb      best" in shown["What was won?"]


def test_another_metric_and_no_memory(show):
    table = THREE.replace("val_bpb\tmemory_gb", "val_rmse\tcv").replace("1.600000", "16000")
    shown = show(table)
    assert "val_rmse fell from 16000.000000 to 1.500000" in shown["What was won?"]
    axes = shown["names"]["panels"][0, 0]
    assert axes.get_ylabel() == "val_rmse (lower is better)" and axes.get_yscale() == "log"
    assert "memory is unknown" in shown["Memory and simplicity"]
    assert "memory is unknown" in show(THREE.replace("\t1.5\t", "\t0.0\t"))["Memory and simplicity"]


def test_odd_values_words_and_labels_are_counted_row_by_row(show):
    shown = show(
        THREE
        + row("d", "FAIL", "discard")
        + row("e", "-", "crash")
        + row("f", "0", "maybe")
        + row("n/a", "1.7", "discard", "idea, seed 1")
        + row("n/a", "1.8", "discard", "idea, seed 2")
    )
    done = "7 experiments beside the baseline: 1 kept, 4 discarded, 1 crashed, 1 maybe."
    assert done in shown["How much was done?"]
    assert "The noise is unknown" in shown["What was won?"]
    assert shown["names"]["nights"][0].table.value.isna().sum() == 3


@pytest.mark.parametrize(
    ("line", "why"), [(r"d\t1.4\t1.0\tkeep\tx", "place of tabs"), ("d\t1.4\tkeep", "few fields")]
)
def test_what_could_not_be_read_is_shown(show, line, why):
    said = show(f"{THREE}{line}\n")["The morning"]
    assert "1 line of results.tsv could not be read" in said and why in said and line in said


def test_a_column_that_rises_is_noticed(show):
    table = HEADER + row("a", "0.5", "keep") + row("b", "0.6", "keep") + row("c", "0.7", "keep")
    assert "the kept values of val_bpb rise" in show(table)["What to believe"]
    assert "rise" not in show(THREE)["What to believe"]


def test_jupyter_shows_a_real_night_without_its_commits(tmp_path):
    shutil.copytree(NIGHT, tmp_path, dirs_exist_ok=True)
    (tmp_path / "progress.png").unlink()
    notebook = nbformat.read(ROOT / "analysis.ipynb", 4)
    NotebookClient(notebook, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    said = "".join(output.get("text", "") for output in outputs)
    # Counted by hand
    assert "11 experiments beside the baseline: 6 kept, 5 discarded, 0 crashed. 24 runs of" in said
    assert "went from 1.677748 to 1.615399: the gain is 0.062349, or 3.72%" in said
    assert "\n- " not in said
    assert (tmp_path / "progress.png").stat().st_size > 10_000


# ---------------------------------------------------------------------------
# Nights with commits and logs


class Night:
    """A clone, a branch, a table and logs. The kept and the discarded commits are in one line."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.table = folder / "results.tsv"
        self.table.write_text(HEADER)
        (folder / "logs").mkdir()
        (folder / ".gitignore").write_text("logs/\nresults.tsv\nprogress.png\n")
        self.git("init", "-q", "-b", "autoresearch/mar5")

    def git(self, *args: str) -> str:
        return git(self.folder, *args)

    def commit(self, code: str) -> str:
        (self.folder / "train.py").write_text(code)
        self.git("add", "-A")
        self.git("commit", "-qm", "an idea", "--allow-empty")
        return self.git("rev-parse", "--short", "HEAD")

    def log(self, commit: str, seed: int, value: float, **other: str) -> None:
        """A log of the real night, with these values in its summary."""
        log = (NIGHT / "logs" / "a05a16c-1.log").read_text()
        code = self.git("rev-parse", f"{commit}:train.py")[:12]
        for key, text in ({"val_bpb": value, "code": code} | other).items():
            log = re.sub(f"^{key}: .*", f"{key}: {text}", log, flags=re.MULTILINE)
        (self.folder / "logs" / f"{commit}-{seed}.log").write_text(log)

    def row(self, commit: str, value: float, status: str, text: str = "an idea") -> None:
        with self.table.open("a") as table:
            table.write(row(commit, f"{value:.6f}", status, text))

    def experiment(self, code: str, status: str, *values: float) -> str:
        """Commit this train.py, write its logs and its row, and return the commit."""
        commit = self.commit(code)
        for seed, value in enumerate(values, 1):
            self.log(commit, seed, value)
        self.row(commit, sum(values) / len(values), status)
        return commit


@pytest.fixture
def night(tmp_path):
    """A night of four experiments, whose records agree."""
    night = Night(tmp_path)
    night.baseline = night.experiment("LR = 0.0\n", "keep", 1.60, 1.62)
    night.won = night.experiment("LR = 0.1\n", "keep", 1.50, 1.51)
    night.lost = night.experiment("LR = 0.2\n", "discard", 1.49, 1.56)
    night.last = night.experiment("LR = 0.3\n", "discard", 1.70)
    return night


def test_a_night_whose_records_agree_has_no_finding(show, night):
    shown = show()
    assert "\n- " not in shown["What to believe"]
    done = shown["How much was done?"]
    assert "3 experiments beside the baseline: 1 kept, 2 discarded, 0 crashed. 7 runs of" in done
    assert "LR = 0.1" in shown["The night's train.py against the start"]
    labels = [line.get_label() for line in plt.gcf().axes[0].lines]
    ends = [f"baseline, {night.baseline}", f"best, {night.won}"]
    assert labels == [*ends, f"last discarded, {night.last}"]


def test_noise_and_standard_errors_by_hand(show, night):
    shown = show()
    # The squares are 0.0002, 0.00005 and 0.00245, with one degree of freedom each.
    assert "sigma is 0.030000, by 3 commits with several runs, so roughly" in shown["What was won?"]
    # A gain between two means of two runs has a standard error of sigma.
    errors = shown["names"]["nights"][0].table["standard errors"]
    assert errors[2] == pytest.approx(0.105 / 0.03)
    assert errors[4] == pytest.approx(-0.195 / (0.03 * 1.5**0.5))
    assert "Clear: 1 of 1 kept change." in shown["What stands out of the noise?"]


def test_each_fault_of_a_night_is_found_once(show, night):
    table = night.table.read_text().replace("1.505000", "1.500000")
    night.table.write_text(table.replace(night.lost, "another"))
    machine = {"device": "H100", "attention": "fa3", "training_seconds": 308.0, "num_steps": 400}
    night.log(night.won, 2, 1.51, code="abcdef012345", harness="0123456789ab", **machine)
    (night.folder / "README.md").write_text("a file of the night\n")
    again = night.experiment("LR = 0.3  # again\n", "keep", 1.4, 1.4)
    unlogged = night.commit("import subprocess\n")
    night.row(unlogged, 1.3, "keep")
    findings = show()["What to believe"].split("\n- ")[1:]
    assert [finding.strip() for finding in findings] == [
        f"The row of {night.won} has 1.500000, its logs have 1.500000, 1.510000.",
        f"{unlogged} was kept, and has no log.",
        f"{night.lost} has a log and no row.",
        f"{night.won}-2.log: the train.py that ran is not the commit's.",
        f"{night.won}-2.log: its harness is 0123456789ab, and not d186002caced.",
        f"{night.won}-2.log: its device is H100, and not AMD EPYC cpu, 2 threads.",
        f"{night.won}-2.log: its attention is fa3, and not blocked.",
        f"{night.won}-2.log: it trained 7.9 s longer than the baseline.",
        f"{night.won}: its runs made 400 to 526 steps, so something disturbed one of them.",
        f"{again} ran the same code as {night.last}, comments aside.",
        "README.md was changed in the night.",
        "This line of the diff deserves a look: import subprocess",
    ]


def test_a_long_name_is_cut_between_words_and_one_row_has_a_readable_axis(show, tmp_path):
    name = "a name that goes on and on and on until it is much longer than the picture has room"
    night = Night(tmp_path)
    commit = night.commit("LR = 0.0\n")
    night.log(commit, 1, 1.451762)
    night.log(commit, 2, 1.451764)
    night.row(commit, 1.451763, "keep", name)
    axes = show()["names"]["panels"][0, 0]
    cut = "1  a name that goes on and on and on until it is much..."
    assert axes.texts[-1].get_text().strip() == cut
    axes.figure.canvas.draw()
    assert axes.yaxis.get_offset_text().get_text() == ""


def test_the_commands_for_fresh_seeds_lead_to_the_honest_gain(show, night):
    said = show()["What to believe"]
    assert "The night saw a gain of 0.105000" in said
    assert "1.6 sigma, which is 0.048000 here" in said
    values = "s/LR = 0.0/val_bpb: 1.61/; s/LR = 0.1/val_bpb: 1.59/"
    uv = f"uv() {{ [ $SEED -gt 2 ] && sed '{values}' train.py; }}\n"  # in place of the real one
    assert os.system(uv + said[said.index("for seed in") :]) == 0
    said = show()["What to believe"]
    assert "went from 1.610000 to 1.590000: the gain is 0.020000, or 1.24%" in said
    assert "The night saw 0.105000" in said


def test_a_fresh_seed_is_one_that_no_row_was_decided_by(show, night):
    night.log(night.baseline, 3, 1.61)
    night.log(night.baseline, 7, 1.63)
    night.log(night.won, 3, 1.52)
    night.log(night.won, 8, 1.53)
    night.row(night.won, 1.51, "keep", "a third seed")
    assert "(Before: 1.630000; after: 1.530000.)" in show()["What to believe"]


def test_the_kept_code_measured_again_is_no_gain(show, night):
    night.experiment("LR = 0.1\n", "keep", 1.40, 1.41)
    shown = show()
    assert "measured again 1 time" in shown["How much was done?"]
    assert "fell from 1.610000 to 1.505000: 0.105000" in shown["What was won?"]


def test_commits_without_a_train_py_are_not_the_same_code(show, night):
    night.git("rm", "-q", "--cached", "train.py")
    (night.folder / ".gitignore").write_text("*\n")
    for value in (1.4, 1.3):
        night.row(night.commit("not in git"), value, "keep")
    shown = show()
    assert "fell from 1.610000 to 1.300000: 0.310000" in shown["What was won?"]
    assert "ran the same code" not in shown["What to believe"]


def test_two_rows_of_a_real_commit_that_differ_in_the_seed_are_one_experiment(show, night):
    commit = night.commit("LR = 0.5\n")
    night.row(commit, 1.58, "discard", "lr 0.5, seed 1")
    night.row(commit, 1.60, "discard", "lr 0.5, seed 2")
    night.row(commit, 1.90, "discard", "another idea")
    table = show()["names"]["nights"][0].table
    assert [*table.runs[-2:]] == [2, 1] and [*table.value[-2:]] == pytest.approx([1.59, 1.9])


def test_a_word_in_place_of_the_first_commit(show, night):
    table = night.table.read_text().replace(night.baseline, "baseline")
    assert "LR = 0.1" in show(table)["The night's train.py against the start"]


def test_agents_in_worktrees_have_one_table_and_a_picture_each(show, night):
    other = night.folder.parent / "gpu1"
    night.git("worktree", "add", "-q", "-b", "autoresearch/mar5-gpu1", str(other))
    shutil.copy(night.table, other)
    shown = show()
    agents = shown["The agents side by side"]
    assert "mar5-gpu1" in agents and agents.count("1.505") == 2
    assert len(shown["names"]["panels"]) == 2
