"""
Claims about analysis.ipynb: what it shows for every state of results.tsv, and for a long night.

The notebook runs as it is, in one kernel for all tests. Standard errors and sigmas are worked out
by hand. Two draws of a normal distribution lie 2 sigma / sqrt(pi) apart on average, so sigma is the
mean gap times 0.886227. A gain between two means of two runs has a standard error of sigma.
"""

import json
import re
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from conftest import HEADER, ROOT, git
from jupyter_client import KernelManager
from nbclient import NotebookClient

NOTHING = "No run is in any results.tsv here yet"
HARNESS = "ca1b35d089ee"
MACHINE = f" [{HARNESS}, sdpa, Stub GPU, 80 GB]"

# Code for `ask` below, which prints what is in the picture: points, line and texts.
PICTURE = """
import json
axes = panels[0, 0]
drawn = {points.get_label(): points.get_offsets().tolist() for points in axes.collections}
drawn["bar"] = axes.lines[0].get_xydata().tolist()
drawn["texts"] = [text.get_text() for text in axes.texts]
drawn["words"] = [axes.get_title("left"), axes.get_xlabel()]
print(json.dumps(drawn))
"""


@pytest.fixture(scope="module")
def kernel():
    """A Jupyter kernel. Starting one takes seconds, so all tests of this file share it."""
    kernel = KernelManager(kernel_name="python3")
    kernel.start_kernel()
    yield kernel
    kernel.shutdown_kernel(now=True)


def execute(kernel: KernelManager, folder: Path, ask: str = "") -> dict[str, str]:
    """Run the notebook in a folder. Returns what it printed and showed as text, by heading.

    The code `ask` runs after the last cell, and what it prints has the heading "asked".
    """
    notebook = nbformat.read(ROOT / "analysis.ipynb", 4)
    fresh = f"%reset -f\nimport os; os.chdir({str(folder)!r})"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(fresh))
    notebook.cells += [nbformat.v4.new_markdown_cell("asked"), nbformat.v4.new_code_cell(ask)]
    NotebookClient(notebook, km=kernel, timeout=60).execute()  # raises where a cell does
    shown, heading = {}, ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = cell.source.splitlines()[0].lstrip("# ")
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", output.text  # Warnings go there too.
            data = output.get("data", {})
            text = output.get("text") or data.get("text/markdown") or data["text/plain"]
            shown[heading] = shown.get(heading, "") + text
    return shown


@pytest.fixture
def morning(kernel, tmp_path):
    """A function that puts a text into results.tsv and returns what the notebook shows of it."""

    def show(results: str | None, ask: str = "") -> dict[str, str]:
        if results is not None:
            (tmp_path / "results.tsv").write_text(results)
        return execute(kernel, tmp_path, ask)

    return show


def table(*rows: tuple) -> str:
    """A table with one value in each row. The original system wrote it so, or a human does."""
    lines = [f"{commit}\t{value}\t1.0\t{status}\t{text}\n" for commit, value, status, text in rows]
    return HEADER + "".join(lines)


def row(commit: str, status: str, text: str, *values: float, machine: str = "") -> str:
    """The row of one experiment, as the commands of program.md write it."""
    if not values:
        return f"{commit}\t0.000000\t0.0\t{status}\t{text}\n"
    steps = ", ".join(["900", "896", "899"][: len(values)])
    text += f" [{HARNESS}: {steps} steps in 300 s]"
    if len(values) > 1:
        text += f" ({', '.join(f'{value:.6f}' for value in values)})"
    return f"{commit}\t{statistics.mean(values):.6f}\t2.5\t{status}\t{text}{machine}\n"


def flat(points: list[list[float]]) -> list[float]:
    """x and y of all points, one after the other. pytest.approx compares only flat lists."""
    return [number for point in points for number in point]


def noise(pairs: str, gap: str, sigma: str) -> str:
    """The sentence on the noise, with these numbers."""
    return (
        f"The gap between two runs of one commit is {gap} on average "
        f"(pairs: {pairs}), so one run's sigma is {sigma}."
    )


# ---------------------------------------------------------------------------
# Every state of the table


@pytest.mark.parametrize("results", [None, "", HEADER, "no table at all"])
def test_without_a_run_every_heading_has_its_sentence(morning, results):
    shown = morning(results)
    assert len(shown) == 10 + (results == "no table at all")
    assert sum(NOTHING in text for text in shown.values()) == 9
    assert "nothing to draw" in shown["How did it go?"]


def test_one_row(morning):
    baseline = row("abc1234", "keep", "baseline", 1.234567, 1.234569, machine=MACHINE)
    shown = morning(HEADER + baseline)
    done = shown["How much was done?"]
    assert "Experiments beside the baseline: 0; 0 kept" in done and "Runs in all: 2." in done
    assert "waits for" not in done and "measured again" not in done
    assert "baseline yet: 1.234568" in shown["What was won?"]


def test_crashes_only_and_crashes_first(morning):
    crash = row("abc1234", "crash", "depth 40 (OOM)")
    shown = morning(HEADER + crash)
    assert "no baseline" in shown["What was won?"] and "depth 40 (OOM)" in shown["What crashed?"]
    kept = row("bbbbbbb", "keep", "baseline", 1.5) + row("ccccccc", "keep", "better", 1.4)
    shown = morning(HEADER + crash + kept)
    assert "fell from 1.500000 to 1.400000: 0.100000 bpb, 6.67%" in shown["What was won?"]
    assert "1 of 3 experiments crashed" in shown["What crashed?"]
    assert "Runs in all: 3." in shown["How much was done?"]


def test_nothing_kept(morning):
    rows = [("aaaaaaa", 1.5, "discard", "baseline"), ("bbbbbbb", 1.6, "discard", "worse")]
    shown = morning(table(*rows))
    assert "No change was kept" in shown["What stands out of the noise?"]
    assert "no other train.py" in shown["The night's train.py against the start"]


def test_half_a_line_strange_characters_and_upper_case(morning):
    rows = (
        'aaaaaaa\t1.50\t1.0\tKEEP\t"baseline\n'
        'bbbbbbb\t1.40\t1.0\tKeep\t$x_1$ größer, "quoted" \\frac 100% 学习率 \t and a tab\r\n'
        "ccccccc\tnan\t1.0\tkeep\tno number\n"
        "ccccccc\tinf\t1.0\tkeep\tnone either\n"
        "ddddddd\t1.30\t1.0\tmaybe\tno status\n"
        "eeeeeee\t1.3"
    )
    shown = morning("\N{ZERO WIDTH NO-BREAK SPACE}" + HEADER + rows)  # a byte order mark
    assert "4 line(s) could not be read" in shown["The morning"]
    assert "fell from 1.500000 to 1.400000" in shown["What was won?"]
    assert 'größer, "quoted" \\frac 100% 学习率 and a tab' in shown["What was won?"]


def test_unreadable_memory_and_equal_repeats_have_their_sentences(morning):
    rows = "aaaaaaa\t1.5\t44 GB\tkeep\tx\naaaaaaa\t1.5\t44 GB\tdiscard\tx\n"
    rows += "bbbbbbb\t1.4\t44 GB\tkeep\tx\n"
    shown = morning(HEADER + rows)
    assert "Peak memory is unknown" in shown["Memory and simplicity"]
    assert "unknown: the repeats are equal" in shown["What was won?"]


# ---------------------------------------------------------------------------
# Where the values of an experiment come from


def test_an_experiment_is_one_row_that_names_the_values_of_its_runs(morning):
    shown = morning(
        HEADER
        + row("aaaaaaa", "keep", "baseline", 1.7, 1.72, machine=MACHINE)
        + row("bbbbbbb", "discard", "a loss with one run", 1.8)
        + row("ccccccc", "crash", "a crash")
        + row("ddddddd", "keep", "raise MATRIX_LR to 0.05", 1.601214, 1.603154)
    )
    done = "beside the baseline: 3; 1 kept, 1 discarded, 1 crashed. Runs in all: 6."
    assert done in shown["How much was done?"]
    won = shown["What was won?"]
    # The gaps are 0.02 and 0.00194. The gain is 1.71 - 1.602184 = 0.107816.
    sentence = noise("2, so rough", "0.010970", "0.009722")
    assert f"That is 11.1 standard errors. {sentence}" in won
    assert re.search(r"^aaaaaaa +baseline +1\.71\d* +2 +2\.5 +baseline *$", won, re.MULTILINE)
    assert re.search(r"^ddddddd .* 2 +2\.5 +raise MATRIX_LR to 0\.05 *$", won, re.MULTILINE)


def test_three_seeds_are_three_runs_and_three_pairs(morning):
    rows = row("aaaaaaa", "keep", "a", 1.5, 1.53, 1.56)
    rows += row("bbbbbbb", "keep", "b", 1.4, 1.41, 1.42)
    shown = morning(HEADER + rows)
    assert "Runs in all: 6." in shown["How much was done?"]
    # The gaps are 0.03, 0.06, 0.03, 0.01, 0.02 and 0.01. The gain is 0.12, between two means of
    # three, so its standard error is sigma * sqrt(1/3 + 1/3) = 0.019296.
    sentence = noise("6", "0.026667", "0.023633")
    assert f"That is 6.2 standard errors. {sentence}" in shown["What was won?"]
    assert re.search(r"^bbbbbbb +best +1\.41\d* +3 ", shown["What was won?"], re.MULTILINE)


@pytest.mark.parametrize(
    "text",
    [
        "adam betas (0.9, 0.95)",
        "adam betas (1.3, 1.5)",  # Their mean is val_bpb, but they lack the decimals.
        "scales (1.300000, 1.500003)",  # Their mean is not val_bpb.
        "layers [0, 2, 4]",
    ],
)
def test_numbers_in_a_description_of_the_original_system_are_no_values(morning, text):
    shown = morning(table(("aaaaaaa", 1.5, "keep", "baseline"), ("bbbbbbb", 1.4, "keep", text)))
    assert "Runs in all: 2." in shown["How much was done?"]
    assert "unknown: no commit was run under two seeds" in shown["What was won?"]
    line = rf"^bbbbbbb .* 1 +1\.0 +{re.escape(text)} *$"
    assert re.search(line, shown["What was won?"], re.MULTILINE)


def test_two_rows_a_commit_are_one_experiment_and_gains_count_from_the_state_before(morning):
    rows = [
        ("aaaaaaa", 1.50, "discard", "seed 1 of 2: baseline"),
        ("aaaaaaa", 1.52, "keep", "baseline"),  # The mean is 1.51.
        ("bbbbbbb", 1.48, "discard", "seed 1 of 2: refuted"),
        ("bbbbbbb", 1.56, "discard", "refuted"),  # The mean is 1.52.
        ("ccccccc", 1.40, "discard", "seed 1 of 2: a win"),
        ("ccccccc", 1.42, "keep", "a win"),  # The mean is 1.41, so it gains 0.1.
        ("ddddddd", 1.42, "discard", "seed 1 of 2: simpler"),
        ("ddddddd", 1.44, "keep", "simpler"),  # The mean is 1.43, so it loses 0.02.
        ("eeeeeee", 1.42, "discard", "seed 1 of 2: under way"),
    ]
    shown = morning(table(*rows), PICTURE)
    done = "beside the baseline: 4; 2 kept, 2 discarded, 0 crashed. Runs in all: 9."
    assert done in shown["How much was done?"]
    assert "waits for its second seed" in shown["How much was done?"]
    won = shown["What was won?"]
    # The gaps are 0.02, 0.08, 0.02 and 0.02. The gain of 0.1 has 0.1 / 0.0310179 standard errors.
    sentence = noise("4, so rough", "0.035000", "0.031018")
    assert f"That is 3.2 standard errors. {sentence}" in won
    assert re.search(r"^ddddddd +kept last +1\.43", won, re.MULTILINE) and "seed 1 of 2" not in won
    assert re.search(r"ccccccc +0\.10* +3\.2239", shown["The ten largest gains"])
    alone = "The 1 largest of 1 gains are 100%"
    assert alone in shown["The ten largest gains"]
    assert "1 of 2 kept changes stand out" in shown["What stands out of the noise?"]
    drawn = json.loads(shown["asked"])
    circles = [1, 1.5, 1, 1.52, 2, 1.48, 2, 1.56, 3, 1.4, 3, 1.42, 4, 1.42, 4, 1.44, 5, 1.42]
    assert flat(drawn["run"]) == circles
    bar = [1, 1.51, 3, 1.41, 4, 1.43, 6, 1.43]  # It rises where the code became simpler.
    assert flat(drawn["bar"]) == pytest.approx(bar)


def test_a_repeat_by_hand_counts_for_the_mean_and_not_for_the_decision(morning):
    rows = row("aaaaaaa", "keep", "baseline", 1.5)
    rows += row("bbbbbbb", "keep", "betas to [0.9, 0.95]", 1.4)
    by_hand = "bbbbbbb\t1.42\t1.0\tdiscard\tthird look\naaaaaaa\t1.52\t1.0\tkeep\tonce more\n"
    shown = morning(HEADER + rows + by_hand)
    assert "fell from 1.510000 to 1.410000" in shown["What was won?"]
    assert noise("2, so rough", "0.020000", "0.017725") in shown["What was won?"]
    best = r"^bbbbbbb +best +1\.41 +2 +2\.5 +betas to \[0\.9, 0\.95\] *$"
    assert re.search(best, shown["What was won?"], re.MULTILINE)
    done = "beside the baseline: 1; 1 kept, 0 discarded, 0 crashed. Runs in all: 4."
    assert done in shown["How much was done?"]


@pytest.mark.parametrize("commit", ["aaaaaaa", "bbbbbbb"])
def test_the_night_is_not_measured_from_a_baseline_that_was_disturbed_and_dropped(morning, commit):
    shown = morning(
        HEADER
        + row("aaaaaaa", "discard", "disturbed: baseline", 1.8, 1.9, machine=MACHINE)
        + row(commit, "keep", "baseline, undisturbed", 1.5, 1.51, machine=MACHINE)
        + row("ccccccc", "keep", "raise MATRIX_LR", 1.4, 1.41)
    )
    assert "fell from 1.505000 to 1.405000" in shown["What was won?"]
    assert "The 1 largest of 1 gains" in shown["The ten largest gains"]
    assert "measured again" not in shown["How much was done?"]


# ---------------------------------------------------------------------------
# Fresh seeds


ROWS = row("aaaaaaa", "keep", "baseline", 1.7, 1.72, machine=MACHINE)
ROWS += row("bbbbbbb", "keep", "raise MATRIX_LR", 1.6, 1.62)


def test_without_fresh_seeds_the_gain_comes_with_what_luck_alone_wins(morning):
    won = morning(HEADER + ROWS)["What was won?"]
    assert won.startswith("Part of the gain below is luck")
    # Both gaps are 0.02, so sigma is 0.0177245, and 1.6 of it is 0.028359.
    assert "won 1.6 sigma, here 0.028359." in won
    assert "train aaaaaaa and bbbbbbb with the seeds 3, 4, 5." in won
    assert "fell from 1.710000 to 1.610000" in won


def test_the_number_of_fresh_seeds_comes_first_and_changes_nothing_else(morning):
    fresh = [
        f"{commit}\t{value}\t0.0\tdiscard\tfresh seed {seed}\n"
        for commit, *values in [("aaaaaaa", 1.70, 1.72, 1.74), ("bbbbbbb", 1.66, 1.67, 1.68)]
        for seed, value in enumerate(values, 3)
    ]
    before, after = morning(HEADER + ROWS), morning(HEADER + ROWS + "".join(fresh))
    won = after["What was won?"]
    assert won.startswith("With fresh seeds val_bpb went from 1.720000 to 1.670000: a gain of 0.05")
    # The standard error of two means of three runs is 0.0177245 * sqrt(2 / 3) = 0.014472.
    assert "(runs: 3 and 3).\nThat is 3.5 standard errors." in won
    rest = won.partition("\n\n")[2]
    assert rest and rest == before["What was won?"].partition("\n\n")[2]
    del before["What was won?"], after["What was won?"]
    assert before == after


# ---------------------------------------------------------------------------
# A machine that changes its speed


def test_a_commit_that_is_measured_again_is_the_bar_and_neither_an_experiment_nor_a_gain(morning):
    shown = morning(
        HEADER
        + row("aaaaaaa", "keep", "baseline", 1.7, 1.72, machine=MACHINE)  # mean 1.71
        + row("bbbbbbb", "keep", "remove a gate", 1.6, 1.62)  # mean 1.61, so it gains 0.1
        + row("bbbbbbb", "keep", "measured again", 1.65, 1.66)  # mean 1.655, on a slower machine
        + row("ccccccc", "discard", "add a layer", 1.656)
        + row("bbbbbbb", "discard", "disturbed: measured again", 1.75, 1.9)
        + row("ddddddd", "keep", "warmup", 1.63, 1.64),  # mean 1.635, so it gains 0.02
        PICTURE,
    )
    done = shown["How much was done?"]
    assert "beside the baseline: 3; 2 kept, 1 discarded, 0 crashed. Runs in all: 11." in done
    assert "measured again 1 time(s)" in done
    won = shown["What was won?"]
    assert "The kept changes won 0.120000 bpb, 7.02% of the baseline." in won
    # The gaps are 0.02, 0.02, 0.01, 0.15 and 0.01. What was won is (1.71 - 1.61) + (1.655 - 1.635).
    # These are four means of two runs, so the standard error is sigma * sqrt(4 / 2) = 0.052639.
    sentence = noise("5", "0.042000", "0.037222")
    assert f"That is 2.3 standard errors. {sentence}" in won
    which = re.findall(r"^\w{7} +(\D+?) +1\.\d+ ", won, re.MULTILINE)
    assert which == ["baseline", "measured again", "best"]
    assert "of 2 kept changes stand out" in shown["What stands out of the noise?"]
    gains = shown["The ten largest gains"]
    assert "The 2 largest of 2 gains are 100%" in gains
    assert re.search(r"^bbbbbbb +0\.10* ", gains, re.MULTILINE)
    assert re.search(r"^ddddddd +0\.020* ", gains, re.MULTILINE)
    tried = shown["What was tried, and with what success?"]
    assert len(re.findall(r"^\w+ +1 +[01] +0 ", tried, re.MULTILINE)) == 3 and "other" not in tried
    assert "0 of 4 experiments crashed" in shown["What crashed?"]
    drawn = json.loads(shown["asked"])
    assert drawn["words"] == [drawn["words"][0], "experiment"]
    assert drawn["words"][0].endswith(": 4 experiments in 11 runs, 3 kept with the baseline")
    assert flat(drawn["kept (mean)"]) == pytest.approx([1, 1.71, 2, 1.61, 6, 1.635])
    assert flat(drawn["measured again"]) == pytest.approx([3, 1.655])
    bar = [1, 1.71, 2, 1.61, 3, 1.655, 6, 1.635, 7, 1.635]
    assert flat(drawn["bar"]) == pytest.approx(bar)


def test_a_faster_machine_wins_nothing(morning):
    rows = row("aaaaaaa", "keep", "baseline", 1.7, 1.72)
    rows += row("aaaaaaa", "keep", "measured again", 1.6, 1.62)
    shown = morning(HEADER + rows)
    assert "Nothing kept is lower than the baseline yet" in shown["What was won?"]
    assert "measured again 1 time(s)" in shown["How much was done?"]
    shown = morning(HEADER + rows + row("bbbbbbb", "keep", "an idea", 1.59, 1.61))
    # Each of the three gaps is 0.02, so sigma is 0.017725.
    assert "The kept changes won 0.010000 bpb" in shown["What was won?"]
    assert "That is 0.6 standard errors" in shown["What was won?"]


# ---------------------------------------------------------------------------
# A long night


def plan_of_the_night() -> list[tuple]:
    """Status, description and the val_bpb of each run: a baseline and 80 experiments.

    Before the 41st of them the machine becomes slower. The kept commit is measured again, with the
    status "again", and its new mean is the bar from then on.
    """
    plan = [("keep", "baseline", (1.0, 1.002))]
    bar = 1.001
    for i in range(80):
        if i == 40:
            values = (round(bar + 0.019, 6), round(bar + 0.021, 6))
            plan.append(("again", "measured again", values))
            bar = statistics.mean(values)
        if i % 5 == 0:  # a win that becomes larger, because its two runs come closer
            text = f"raise MATRIX_LR, step {i}, which has a rather long description"
            status, values = "keep", (bar - 0.006, bar - 0.006 + (80 - i) / 20000)
        elif i % 5 == 1:  # a loss, and once one that is far above the picture
            text = f"add layer {i}"
            status, values = "discard", (bar + (0.5 if i == 51 else 0.01),)
        elif i % 5 == 2:  # a win by 0.003
            text = f"remove gate {i}"
            status, values = "keep", (bar - 0.004, bar - 0.002)
        elif i % 5 == 3:  # refuted by the second run
            text = f"warmup {i}"
            status, values = "discard", (bar - 0.001, bar + 0.002)
        else:
            text = f"batch {i} (OOM)"
            status, values = "crash", ()
        values = tuple(round(value, 6) for value in values)
        plan.append((status, text, values))
        if status == "keep":
            bar = statistics.mean(values)
    return plan


def commit_plan(folder: Path, plan: list[tuple]) -> list[str]:
    """Make a repository with a commit for each experiment of the plan. Returns their names.

    Each commit comes upon the last one that was kept, and its train.py is a line longer than that
    of the experiment before. A run takes six minutes.
    """
    stream, mark, kept = ["feature done"], 0, None
    clock = 1_750_000_000
    for status, text, values in plan:
        if status != "again":
            mark += 1
            time = clock if kept else clock - 7 * 24 * 3600  # The baseline is a week old.
            code = f"# {text}\n" * (100 + mark)
            stream += ["commit refs/autoresearch/all", f"mark :{mark}"]
            stream += [f"committer night <night> {time} +0000", "data 1", "x"]
            stream += [f"from :{kept}"] if kept else []
            stream += ["M 100644 inline train.py", f"data {len(code)}", code]
        if status == "keep":
            kept = mark
        n_runs = max(len(values), 1)  # A crash is a run too.
        clock += 360 * n_runs
    stream = "\n".join([*stream, "done", ""])
    git(folder, "init", "-q", "-b", "autoresearch/mar5")
    git(folder, "fast-import", "--quiet", "--force", "--export-marks=marks", stdin=stream)
    marks = dict(line.split() for line in (folder / "marks").read_text().splitlines())
    return [marks[f":{number}"][:7] for number in range(1, mark + 1)]


@pytest.fixture(scope="module")
def night(kernel, tmp_path_factory) -> SimpleNamespace:
    """A long night in a repository: its folder, its plan, its first commit, and what is shown."""
    folder = tmp_path_factory.mktemp("clone")
    plan = plan_of_the_night()
    commits = commit_plan(folder, plan)
    names = iter(commits)
    rows, kept = [], None
    for status, text, values in plan:
        if status == "again":
            rows.append(row(kept, "keep", text, *values))
            continue
        commit = next(names)
        rows.append(row(commit, status, text, *values, machine="" if rows else MACHINE))
        if status == "keep":
            kept = commit
    (folder / "results.tsv").write_text(HEADER + "".join(rows))
    shown = execute(kernel, folder, PICTURE)
    return SimpleNamespace(folder=folder, plan=plan, baseline=commits[0], shown=shown)


def test_long_night_in_numbers(night):
    # Of each kind there are 16 experiments. The plan has 2 + 16 * (2 + 1 + 2 + 2 + 1) + 2 runs.
    shown = night.shown
    done = "80; 32 kept, 32 discarded, 16 crashed. Runs in all: 132."
    assert f"Experiments beside the baseline: {done}" in shown["How much was done?"]
    # The runs between the first of the 80 commits and the last one are 132 - 2 - 1.
    pace = "79 experiments took 12.9 hours, 6.1 an hour."
    assert pace in shown["How much was done?"]

    # With MATRIX_LR each win is 0.006 less half of the gap between its two runs. These gaps are
    # (80 + 75 + ... + 5) / 20000 = 0.034 in all. Each other win is 0.003. So the whole gain is
    # 16 * 0.006 - 0.034 / 2 + 16 * 0.003 = 0.127. The baseline is 1.001.
    won = "The kept changes won 0.127000 bpb, 12.69% of the baseline."
    assert won in shown["What was won?"]
    # All gaps together are 0.034 + 16 * 0.002 + 16 * 0.003 + 2 * 0.002 = 0.118.
    sentence = noise("50", "0.002360", "0.002091")
    # The standard error is sigma * sqrt(2) = 0.002958, because the kept commit was measured again:
    # the sum of the gains has four means of two runs.
    assert f"That is 42.9 standard errors. {sentence}" in shown["What was won?"]
    # Clear is what gains more than 2 * 0.002091. The first two wins with MATRIX_LR do not:
    # 0.006 - 80 / 40000 = 0.004 and 0.006 - 75 / 40000 = 0.004125. The next one gains 0.00425.
    stands_out = "14 of 32 kept changes stand out"
    assert stands_out in shown["What stands out of the noise?"]
    assert sentence in shown["What stands out of the noise?"]
    # The ten largest are 10 * 0.006 - (5 + 10 + ... + 50) / 40000 = 0.053125 of 0.127.
    largest = "The 10 largest of 32 gains are 42% of their sum."
    assert largest in shown["The ten largest gains"]

    tried = shown["What was tried, and with what success?"]
    kinds = {"optimizer": 16, "deletion": 16, "schedule": 0, "batch and data": 0}
    for kind, successes in kinds.items():
        assert re.search(rf"^{kind} +16 +{successes} ", tried, re.MULTILINE)
    assert not re.search("^other", tried, re.MULTILINE)
    assert "from 2.5 to 2.5 GB" in shown["Memory and simplicity"]
    # The last kept experiment is the 78th beside the baseline.
    assert "from 101 to 179 lines" in shown["Memory and simplicity"]
    assert "16 of 81 experiments crashed" in shown["What crashed?"]
    assert "\n+# remove gate 77\n" in shown["The night's train.py against the start"]


def test_the_picture_has_every_run_at_its_experiment_and_the_bar(night):
    drawn = json.loads(night.shown["asked"])
    circles, kept, again, bar, crashes = [], [], [], [], []
    for n, (status, _, values) in enumerate(night.plan, 1):
        circles += [[n, value] for value in values]
        if status == "keep":
            kept += [n, statistics.mean(values)]
        if status == "again":
            again += [n, statistics.mean(values)]
        if status in ("keep", "again"):
            bar += [n, statistics.mean(values)]
        if status == "crash":
            crashes.append(n)
    assert drawn["run"] == circles
    assert [n for n, _ in drawn["run above"]] == [n for n, value in circles if value > 1.4]
    assert flat(drawn["kept (mean)"]) == pytest.approx(kept)
    assert flat(drawn["measured again"]) == pytest.approx(again)
    assert flat(drawn["bar"]) == pytest.approx([*bar, 83, bar[-1]])  # to the end, after 82 rows
    assert [n for n, _ in drawn["crash"]] == crashes
    numbers = [str(number) for number in range(1, 34)]  # 32 kept changes, and the baseline
    *below_the_points, names = drawn["texts"]
    assert below_the_points == numbers
    assert [line.split()[0] for line in names.splitlines()] == numbers
    title = "mar5: 81 experiments in 132 runs, 33 kept with the baseline"
    assert drawn["words"] == [title, "experiment"]


def test_a_clone_without_the_discarded_commits_shows_the_same_pace(night, morning, tmp_path):
    git(tmp_path, "init", "-q")
    git(tmp_path, "fetch", "-q", str(night.folder), "refs/autoresearch/all:refs/autoresearch/all")
    shown = morning((night.folder / "results.tsv").read_text())
    for heading in ("How much was done?", "Memory and simplicity"):
        assert shown[heading] == night.shown[heading]


def test_picture_is_saved_and_large_enough_to_read(night):
    picture = (night.folder / "progress.png").read_bytes()
    width, height = (int.from_bytes(picture[at : at + 4], "big") for at in (16, 20))
    assert picture[:4] == b"\x89PNG" and width >= 1500 and height >= 600


def test_other_worktrees_of_the_repository_have_their_part(kernel, night, tmp_path):
    second, branch = str(tmp_path / "gpu1"), "autoresearch/mar5-gpu1"
    git(night.folder, "worktree", "add", "-q", "-b", branch, second, night.baseline)
    rows = table(("aaaaaaa", 1.5, "keep", "baseline"), ("bbbbbbb", 1.4, "keep", "idea"))
    Path(second, "results.tsv").write_text(rows)
    won = execute(kernel, night.folder)["What was won?"]
    git(night.folder, "worktree", "remove", "--force", second)
    assert "mar5: Part of the gain below is luck" in won
    assert "The kept changes won 0.127000 bpb" in won
    assert "mar5-gpu1: Part of the gain below is luck" in won
    assert "val_bpb fell from 1.500000 to 1.400000" in won


# ---------------------------------------------------------------------------
# Several agents


def test_several_agents_stand_side_by_side(kernel, tmp_path):
    """Three agents begin with the same commit. Two work in other clones, and one has a bad GPU."""
    baseline = ("keep", "baseline", (1.0, 1.002))
    first_plan = [baseline, ("keep", "rope base", (0.98, 0.982)), ("discard", "wide", (1.0,))]
    first = tmp_path / "first"
    first.mkdir()
    base, rope, wide = commit_plan(first, first_plan)
    second_plan = [
        baseline,
        ("keep", f"from mar5 {rope}: rope base (started 3 times)", (0.99, 0.992)),
        ("discard", f"from mar5 {wide}: wide", (1.1,)),
        ("crash", "from mar9 1234567: unheard of", ()),
    ]
    third_plan = [("keep", "baseline", (1.2, 1.202))]

    for number, plan in enumerate([first_plan, second_plan, third_plan]):
        folder = tmp_path / f"clone{number}"
        folder.mkdir()
        commits = commit_plan(folder, plan)
        machines = [MACHINE, "", "", ""]
        rows = [
            row(commit, status, text, *values, machine=machine)
            for commit, (status, text, values), machine in zip(
                commits, plan, machines[: len(plan)], strict=True
            )
        ]
        results = HEADER + "".join(rows)
        if number == 2:
            results = results.replace("900, 896", "700, 690")
        (folder / "results.tsv").write_text(results)
        tag = f"mar5-gpu{number}" if number else "mar5"
        for commit in commits:
            git(folder, "update-ref", f"refs/autoresearch/{commit}", commit)
        git(first, "fetch", "-q", str(folder), f"refs/autoresearch/*:refs/night/{tag}/*")
        blob = git(first, "hash-object", "-w", str(folder / "results.tsv"))
        git(first, "update-ref", f"refs/night/{tag}/table", blob)
    # The night of this clone stands in refs/night as well.
    shutil.copy(tmp_path / "clone0" / "results.tsv", first)
    git(first, "update-ref", "refs/autoresearch/mar5/table", "refs/night/mar5/table")

    ask = """
print(pd.DataFrame(map(overview, nights)).round(6).to_csv(index=False))
print(taken.to_csv(index=False, na_rep="?", float_format="%.3f"))
for numbers in best_so_far(nights[:2]):
    print(*numbers.round(3))
"""
    shown = execute(kernel, first, ask)
    side = shown["The agents side by side"]
    odd = "Look at the machine of mar5-gpu2: its baseline lies +0.200000 from"
    assert odd in side and side.count("Look at the machine") == 1
    assert "1 of 3 changes that one agent took over from another held there too." in side

    agents, takeovers, curves = shown["asked"].strip().split("\n\n")
    # After the device: runs, pace, lost runs, the baseline and its steps, the bar, the gap, and
    # the gain in gaps. The last experiment does not count for the pace.
    assert agents.splitlines()[1:] == [
        'mar5,"Stub GPU, 80 GB",5,5.0,0,1.001,"900, 896",0.981,0.002,10.0',
        'mar5-gpu1,"Stub GPU, 80 GB",6,6.7,2,1.001,"900, 896",0.991,0.002,5.0',
        'mar5-gpu2,"Stub GPU, 80 GB",2,,0,1.201,"700, 690",1.201,0.002,0.0',
    ]
    assert [line.rsplit(",", 1)[0] for line in takeovers.splitlines()[1:]] == [
        f"mar5,{rope},mar5-gpu1,0.020,0.010,yes",
        f"mar5,{wide},mar5-gpu1,-0.019,-0.109,no",
        "mar9,1234567,mar5-gpu1,?,?,no",
    ]
    # The commits of an agent come 12 minutes after that of its baseline, and 12 minutes apart. A
    # run trains for 300 s, and the crash has none: two baselines, two wins, two losses.
    hours, training, best = ([float(x) for x in line.split()] for line in curves.splitlines())
    assert hours == pytest.approx([0, 0, 0, 0, 0.2, 0.2, 0.3], abs=1e-3)
    assert training == pytest.approx([1 / 6, 1 / 3, 0.5, 2 / 3, 0.75, 5 / 6, 5 / 6], abs=1e-3)
    assert best == [1.001, *[0.981] * 6]


def test_a_baseline_that_is_measured_again_does_not_begin_the_night_a_week_earlier(
    kernel, tmp_path
):
    again, loss = ("again", "measured again", (1.1, 1.1)), ("discard", "wide", (1.2,))
    plan = [("keep", "baseline", (1.0, 1.0)), again, loss, loss]
    base, first, second = commit_plan(tmp_path, plan)
    rows = [
        row(base, "keep", "baseline", 1.0, 1.0, machine=MACHINE),
        row(base, "keep", "measured again", 1.1, 1.1),
        row(first, "discard", "wide", 1.2),
        row(second, "discard", "wide", 1.2),
    ]
    (tmp_path / "results.tsv").write_text(HEADER + "".join(rows))
    ask = "print(*best_so_far(nights)[0].round(3))"
    assert execute(kernel, tmp_path, ask)["asked"] == "0.0 0.0 0.0 0.1\n"  # a run takes 0.1 hours


@pytest.mark.parametrize("text", ["[0123456789ab: none]", "[0123456789ab: ]"])
def test_a_description_that_looks_like_steps_without_a_number_is_shown(morning, text):
    shown = morning(table(("aaaaaaa", 1.5, "keep", f"baseline {text}")))
    assert "1.500000" in shown["What was won?"]
