"""
Claims about analysis.ipynb: what it counts in a table, and where it sees that records do not agree.

The cells run in this process, without a kernel. Gains, sigmas and standard errors are worked out by
hand. Sigma is pooled over all commits that were run more than once.
"""

import json
import os
import shutil
from pathlib import Path

import matplotlib
import nbformat
import pytest
from conftest import HEADER, ROOT, git
from nbclient import NotebookClient

NOTEBOOK = nbformat.read(ROOT / "analysis.ipynb", 4)
CELLS = [(cell.cell_type, cell.source) for cell in NOTEBOOK.cells]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    """The notebook reads the folder that it runs in. Git finds no repository above it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)


def morning(table: str | None, capsys) -> dict:
    """Run all cells on a table. Returns what they show, by heading, and their names at the end."""
    matplotlib.use("Agg", force=True)
    if table is not None:
        Path("results.tsv").write_text(table)
    capsys.readouterr()
    shown, heading = {}, ""
    names = {
        "display": lambda what, raw=False: print(what["text/plain"] if raw else what.to_string())
    }
    for kind, source in CELLS:
        if kind == "markdown":
            heading = source.splitlines()[0].lstrip("# ")
        else:
            exec(source, names)
            out, err = capsys.readouterr()
            assert err == ""
            shown[heading] = shown.get(heading, "") + out
    return shown | {"names": names}


@pytest.fixture
def show(capsys):
    yield lambda table=None: morning(table, capsys)
    matplotlib.pyplot.close("all")


def rows(*rows: tuple) -> str:
    """A table with these values in place of the columns commit, val_bpb, status, description."""
    return HEADER + "".join(
        f"{commit}\t{value}\t1.0\t{status}\t{text}\n" for commit, value, status, text in rows
    )


THREE = rows(
    ("aaaaaaa", "1.600000", "keep", "baseline"),
    ("bbbbbbb", "1.500000", "keep", "warmup 0.1"),
    ("ccccccc", "1.550000", "discard", "warmup 0.2"),
)

# ---------------------------------------------------------------------------
# Reading tables


@pytest.mark.parametrize("table", [None, "", HEADER, "no table at all"])
def test_without_an_experiment_every_heading_has_its_sentence(show, table):
    shown = show(table)
    nothing = "No experiment is in any results.tsv"
    assert sum(nothing in str(text) for text in shown.values()) == 8
    assert "nothing to draw" in shown["How did it go?"]


def test_gain_and_counts_of_a_plain_table(show):
    shown = show(THREE)
    done = shown["How much was done?"]
    assert "2 experiments beside the baseline: 1 kept, 1 discarded, 0 crashed. 3 runs." in done
    assert "fell from 1.600000 to 1.500000: 0.100000, 6.25%" in shown["What was won?"]
    assert "The noise is unknown" in shown["What was won?"]


@pytest.mark.parametrize(
    "table",
    [
        THREE.removeprefix(HEADER),
        "\N{ZERO WIDTH NO-BREAK SPACE}" + THREE.replace("\n", "\r\n"),
        THREE.replace("keep", "KEEP ").replace("\twarmup", "\t warmup\t$x_1$"),
        THREE + "bbbbbbb\t1.500000\t1.0\tkeep\twarmup 0.1\n",
        "\n".join(
            "\t".join([extra, *reversed(line.split("\t"))])
            for extra, line in zip(["steps", "9", "", "9"], THREE.splitlines(), strict=True)
        ),
    ],
    ids=["no header", "CRLF and BOM", "case and tabs", "a line twice", "other columns"],
)
def test_tables_of_other_shapes_have_the_same_counts(show, table):
    shown = show(table)
    assert ": 1 kept, 1 discarded, 0 crashed" in shown["How much was done?"]
    assert "fell from 1.600000 to 1.500000" in shown["What was won?"]


def test_another_metric_and_no_memory(show):
    table = THREE.replace("val_bpb\tmemory_gb", "val_rmse\tcv").replace("1.600000", "16000")
    shown = show(table)
    assert "val_rmse fell from 16000.000000 to 1.500000" in shown["What was won?"]
    axes = shown["names"]["panels"][0, 0]
    assert axes.get_ylabel() == "val_rmse (lower is better)" and axes.get_yscale() == "log"
    assert "memory is unknown" in shown["Memory and simplicity"]
    assert "memory is unknown" in show(THREE.replace("\t1.0\t", "\t0.0\t"))["Memory and simplicity"]


def test_values_that_are_none_and_words_for_the_status_that_are_unknown(show):
    more = rows(("d", "FAIL", "discard", ""), ("e", "-", "crash", ""), ("f", "0", "maybe", ""))
    done = show(THREE + more.removeprefix(HEADER))["How much was done?"]
    assert "5 experiments beside the baseline: 1 kept, 2 discarded, 1 crashed, 1 maybe." in done


@pytest.mark.parametrize(
    ("line", "why"), [(r"d\t1.4\t1.0\tkeep\tx", "place of tabs"), ("d\t1.4\tkeep", "few fields")]
)
def test_what_could_not_be_read_is_shown(show, line, why):
    said = show(f"{THREE}{line}\n")["What to believe"] + show()["The morning"]
    assert "1 line of results.tsv could not be read" in said and why in said and line in said


def test_a_column_that_rises_is_noticed(show):
    values = [("a", "0.5", "keep", ""), ("b", "0.6", "keep", ""), ("c", "0.7", "keep", "")]
    assert "the kept values of val_bpb rise" in show(rows(*values))["What to believe"]
    assert "rise" not in show(THREE)["What to believe"]


def test_rows_with_a_label_that_means_nothing_stay_apart(show):
    labels = [("n/a", f"1.{n}", "discard", f"idea, seed {n}") for n in range(1, 6)]
    shown = show(THREE + rows(*labels).removeprefix(HEADER))
    assert "7 experiments beside the baseline: 1 kept, 6 discarded" in shown["How much was done?"]
    assert "The noise is unknown" in shown["What was won?"]


# ---------------------------------------------------------------------------
# Nights with commits and logs


class Night:
    """A clone, a branch, a table and logs, as program.md makes them."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        (folder / ".gitignore").write_text("logs/\nresults.tsv\nprogress.png\n")
        (folder / "train.py").write_text("LR = 0.0\n")
        self.git("init", "-q", "-b", "main")
        self.git("add", "-A")
        self.git("commit", "-qm", "the project")
        self.git("switch", "-qc", "autoresearch/mar5")
        (folder / "logs").mkdir()
        (folder / "results.tsv").write_text(HEADER)

    def git(self, *args: str) -> str:
        return git(self.folder, *args)

    def log(self, commit: str, seed: int, value: float, **other: str) -> None:
        said = {
            "val_bpb": f"{value:.6f}",
            "training_seconds": "300.1",
            "harness": "0123456789ab",
            "code": self.git("rev-parse", f"{commit}:train.py")[:12],
            "num_steps": "900",
            "device": "Stub GPU, 80 GB",
            "attention": "sdpa",
        } | other
        steps = "".join(f"step {n:05} | {n}.0% | loss {9 / n:.4f} | x\n" for n in range(1, 100, 9))
        summary = "".join(f"{key + ':':18}{text}\n" for key, text in said.items())
        (self.folder / "logs" / f"{commit}-{seed}.log").write_text(f"{steps}---\n{summary}")

    def experiment(self, code: str | None, *values: float, status: str = "keep") -> str:
        """Commit this train.py, write its logs and its row, and return the commit."""
        if code is not None:
            (self.folder / "train.py").write_text(code)
        self.git("commit", "-qam", "an idea", "--allow-empty")
        commit = self.git("rev-parse", "--short", "HEAD")
        for seed, value in enumerate(values, 1):
            self.log(commit, seed, value)
        mean = sum(values) / len(values)
        self.row(commit, f"{mean:.6f}", status)
        if status != "keep":
            self.git("update-ref", f"refs/autoresearch/mar5/{commit}", "HEAD")
            self.git("reset", "-q", "--keep", "HEAD~1")
        return commit

    def row(self, commit: str, value: str, status: str = "keep", text: str = "an idea") -> None:
        with (self.folder / "results.tsv").open("a") as table:
            table.write(f"{commit}\t{value}\t1.5\t{status}\t{text}\n")


@pytest.fixture
def night(tmp_path):
    """A night of four experiments, whose records agree."""
    night = Night(tmp_path)
    night.baseline = night.experiment(None, 1.60, 1.62)
    night.won = night.experiment("LR = 0.1\n", 1.50, 1.51)
    night.lost = night.experiment("LR = 0.2\n", 1.49, 1.56, status="discard")
    night.experiment("LR = 0.3\n", 1.70, status="discard")
    return night


def test_a_night_whose_records_agree_has_no_finding(show, night):
    shown = show()
    assert "\n- " not in shown["What to believe"]
    assert "3 experiments beside the baseline: 1 kept, 2 discarded" in shown["How much was done?"]
    assert "7 runs" in shown["How much was done?"]
    assert "LR = 0.1" in shown["The night's train.py against the start"]
    axes = matplotlib.pyplot.gcf().axes[0]
    assert [line.get_label() for line in axes.lines] == [
        f"baseline, {night.baseline}",
        f"best, {night.won}",
        f"last discarded, {shown['names']['nights'][0].table.commit.iloc[-1]}",
    ]


def test_noise_and_standard_errors_by_hand(show, night):
    shown = show()
    # The squares are 0.0002, 0.00005 and 0.00245, with one degree of freedom each.
    assert "sigma is 0.030000, by 3 commits with several runs, so roughly" in shown["What was won?"]
    table = shown["names"]["nights"][0].table
    # A gain between two means of two runs has a standard error of sigma.
    assert table["standard errors"].iloc[1] == pytest.approx(0.105 / 0.03)
    assert table["standard errors"].iloc[3] == pytest.approx(-0.195 / (0.03 * 1.5**0.5))
    assert "Clear: 1 of 1 kept change." in shown["What stands out of the noise?"]


def spoil_row(night):
    text = (night.folder / "results.tsv").read_text()
    (night.folder / "results.tsv").write_text(text.replace("1.505000", "1.500000"))


def forget_row(night):
    text = (night.folder / "results.tsv").read_text()
    lines = [line for line in text.splitlines(True) if not line.startswith(night.lost)]
    (night.folder / "results.tsv").write_text("".join(lines))


def lose_logs(night):
    for path in (night.folder / "logs").glob(f"{night.won}-*"):
        path.unlink()


def change_readme(night):
    (night.folder / "README.md").write_text("a file of the night\n")
    night.git("add", "README.md")
    night.experiment("LR = 0.4\n", 1.40, 1.41)


FAULTS = {
    "has 1.500000, its logs have 1.500000, 1.510000": spoil_row,
    "has a log and no row": forget_row,
    "was kept, and has no log": lose_logs,
    "README.md was changed in the night": change_readme,
    "the train.py that ran is not the commit's": lambda night: night.log(
        night.won, 2, 1.51, code="abcdef012345"
    ),
    "its harness is 111111111111, and not 0123456789ab": lambda night: night.log(
        night.won, 2, 1.51, harness="111111111111"
    ),
    "its device is Stub GPU, 40 GB": lambda night: night.log(
        night.lost, 1, 1.49, device="Stub GPU, 40 GB"
    ),
    "its attention is fa3": lambda night: night.log(night.lost, 1, 1.49, attention="fa3"),
    "its runs made 700 to 900 steps": lambda night: night.log(night.won, 2, 1.51, num_steps="700"),
    "it trained 7.9 s longer than the baseline": lambda night: night.log(
        night.won, 2, 1.51, training_seconds="308.0"
    ),
    "ran the same code as": lambda night: night.experiment("LR = 0.1  # again\n", 1.4, 1.4),
    "deserves a look: import subprocess": lambda night: night.experiment(
        "import subprocess\n", 1.4, 1.4
    ),
}


@pytest.mark.parametrize("sentence", FAULTS)
def test_records_that_do_not_agree(show, night, sentence):
    FAULTS[sentence](night)
    findings = [line for line in show()["What to believe"].splitlines() if line.startswith("- ")]
    (finding,) = findings
    assert sentence in finding


def test_the_commands_for_fresh_seeds_lead_to_the_honest_gain(show, night, monkeypatch):
    said = show()["What to believe"]
    assert "The night saw a gain of 0.105000" in said
    assert "1.6 sigma, which is 0.048000 here" in said
    uv = night.folder.parent / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(
        "#!/bin/sh\n"
        'case "$(cat train.py)" in *0.0*) value=1.61 ;; *) value=1.59 ;; esac\n'
        "printf 'val_bpb:          %s\\nseed:             %s\\n' $value $SEED\n"
    )
    uv.chmod(0o755)
    commands = said[said.index("for seed in") :]
    script = night.folder.parent / "fresh.sh"
    script.write_text(commands.split("\n- ")[0])
    monkeypatch.setenv("PATH", f"{uv.parent}{os.pathsep}{os.environ['PATH']}")
    assert os.system(f"sh {script}") == 0
    said = show()["What to believe"]
    assert "went from 1.610000 to 1.590000: the gain is 0.020000, or 1.24%" in said
    assert "The night saw 0.105000" in said


def test_a_fresh_seed_is_one_that_no_row_was_decided_by(show, night):
    for commit, seed, value in ((night.baseline, 3, 1.61), (night.baseline, 7, 1.63)):
        night.log(commit, seed, value)
    for seed, value in ((3, 1.52), (8, 1.53)):
        night.log(night.won, seed, value)
    night.row(night.won, "1.510000", text="a third seed")
    said = show()["What to believe"]
    assert "(Before: 1.630000; after: 1.530000.)" in said


def test_the_kept_code_measured_again_is_no_gain(show, night):
    night.experiment(None, 1.40, 1.41)
    shown = show()
    assert "measured again 1 time" in shown["How much was done?"]
    assert "fell from 1.610000 to 1.505000: 0.105000" in shown["What was won?"]


def test_two_rows_of_a_real_commit_that_differ_in_the_seed_are_one_experiment(show, night):
    lose_logs(night)
    head = git(night.folder, "rev-parse", "--short", "main")
    with (night.folder / "results.tsv").open("a") as table:
        table.write(f"{head}\t1.58\t1.0\tdiscard\tlr 0.5, seed 1\n")
        table.write(f"{head}\t1.60\t1.0\tdiscard\tlr 0.5, seed 2\n")
        table.write(f"{head}\t1.90\t1.0\tdiscard\tanother idea\n")
    table = show()["names"]["nights"][0].table
    assert [*table.runs[-2:]] == [2, 1] and [*table.value[-2:]] == pytest.approx([1.59, 1.9])


def test_a_word_in_place_of_the_first_commit(show, night):
    text = (night.folder / "results.tsv").read_text().replace(night.baseline, "baseline")
    assert "LR = 0.1" in show(text)["The night's train.py against the start"]


def test_agents_in_worktrees_have_one_table_and_a_picture_each(show, night):
    other = night.folder.parent / "gpu1"
    night.git("worktree", "add", "-q", "-b", "autoresearch/mar5-gpu1", str(other), "main")
    shutil.copy(night.folder / "results.tsv", other)
    shown = show()
    agents = shown["The agents side by side"]
    assert "mar5-gpu1" in agents and agents.count("1.505") == 2
    assert len(shown["names"]["panels"]) == 2


def test_a_real_night_without_its_commits(show, tmp_path):
    shutil.copytree(ROOT / "tests" / "night", tmp_path, dirs_exist_ok=True)
    shown = show()
    # Counted by hand
    done = shown["How much was done?"]
    assert "11 experiments beside the baseline: 6 kept, 5 discarded, 0 crashed. 24 runs of" in done
    said = shown["What to believe"]
    assert "went from 1.677748 to 1.615399: the gain is 0.062349, or 3.72%" in said
    assert "\n- " not in said


# ---------------------------------------------------------------------------
# Pictures


def test_a_long_name_is_cut_between_words_and_one_row_has_a_readable_axis(show):
    name = "a name that goes on and on and on until it is much longer than the picture has room"
    axes = show(rows(("aaaaaaa", "1.451763", "keep", name)))["names"]["panels"][0, 0]
    assert axes.texts[-1].get_text().strip() in (
        "1  a name that goes on and on and on until it is much...",
    )
    axes.figure.canvas.draw()
    assert axes.yaxis.get_offset_text().get_text() == ""


def test_jupyter_runs_the_notebook_and_saves_the_picture(tmp_path):
    (tmp_path / "results.tsv").write_text(THREE)
    notebook = nbformat.from_dict(json.loads(json.dumps(NOTEBOOK)))
    NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert (tmp_path / "progress.png").stat().st_size > 10_000
