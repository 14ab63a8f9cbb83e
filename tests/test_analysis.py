"""analysis.ipynb, run headless in one kernel: every state of results.tsv, and a long night."""

import itertools
import json
import math
import re
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
    kernel = KernelManager(kernel_name="python3")
    kernel.start_kernel()
    yield kernel
    kernel.shutdown_kernel(now=True)


def execute(kernel: KernelManager, folder: Path, ask: str = "") -> dict[str, str]:
    """Run the notebook in a folder; gives what it printed and showed as text, by heading.

    What the code `ask` prints after the last cell has the heading "asked".
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
            assert output.get("name") != "stderr", output.text  # no warning either
            data = output.get("data", {})
            text = output.get("text") or data.get("text/markdown") or data["text/plain"]
            shown[heading] = shown.get(heading, "") + text
    return shown


@pytest.fixture
def morning(kernel, tmp_path):
    """What the notebook shows of this text in results.tsv."""

    def show(results: str | None, ask: str = "") -> dict[str, str]:
        if results is not None:
            (tmp_path / "results.tsv").write_text(results)
        return execute(kernel, tmp_path, ask)

    return show


def table(*rows: tuple) -> str:
    """A table with one value in each row, as the original system wrote it, or a human by hand."""
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


def sigma_and_noise(*experiments: tuple) -> tuple[float, str]:
    """One run's sigma, from the values of the experiments, and the sentence on it."""
    pairs = [pair for values in experiments for pair in itertools.combinations(values, 2)]
    gap = statistics.mean(abs(a - b) for a, b in pairs)
    sigma = gap / (2 / math.sqrt(math.pi))  # the mean distance between two standard normal draws
    rough = ", so rough" if len(pairs) < 5 else ""
    return sigma, (
        f"The gap between two runs of one commit is {gap:.6f} on average "
        f"(pairs: {len(pairs)}{rough}), so one run's sigma is {sigma:.6f}."
    )


# ---------------------------------------------------------------------------
# Every state of the table


@pytest.mark.parametrize("results", [None, "", HEADER, "no table at all"])
def test_without_a_run_every_heading_has_its_sentence(morning, results):
    shown = morning(results)
    assert len(shown) == 9 + (results == "no table at all")
    assert sum(NOTHING in text for text in shown.values()) == 8
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
    rows = [("aaaaaaa", "keep"), ("aaaaaaa", "discard"), ("bbbbbbb", "keep")]
    shown = morning(HEADER + "".join(f"{c}\t1.{5 - (c > 'b')}\t44 GB\t{s}\tx\n" for c, s in rows))
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
        + row("ddddddd", "keep", "raise MATRIX_LR to 0.05", 1.601214, 1.603155)
    )
    done = "beside the baseline: 3; 1 kept, 1 discarded, 1 crashed. Runs in all: 6."
    assert done in shown["How much was done?"]
    won = shown["What was won?"]
    gain = statistics.mean([1.7, 1.72]) - statistics.mean([1.601214, 1.603155])
    sigma, noise = sigma_and_noise((1.7, 1.72), (1.601214, 1.603155))
    assert f"That is {gain / sigma:.1f} standard errors. {noise}" in won
    assert re.search(r"^aaaaaaa +baseline +1\.71\d* +2 +2\.5 +baseline *$", won, re.MULTILINE)
    assert re.search(r"^ddddddd .* 2 +2\.5 +raise MATRIX_LR to 0\.05 *$", won, re.MULTILINE)


def test_three_seeds_are_three_runs_and_three_pairs(morning):
    first, second = (1.5, 1.53, 1.56), (1.4, 1.41, 1.42)
    rows = row("aaaaaaa", "keep", "a", *first) + row("bbbbbbb", "keep", "b", *second)
    shown = morning(HEADER + rows)
    assert "Runs in all: 6." in shown["How much was done?"]
    sigma, noise = sigma_and_noise(first, second)
    assert "pairs: 6)" in noise
    errors = (1.53 - 1.41) / (sigma * math.sqrt(1 / 3 + 1 / 3))
    assert f"That is {errors:.1f} standard errors. {noise}" in shown["What was won?"]
    assert re.search(r"^bbbbbbb +best +1\.41\d* +3 ", shown["What was won?"], re.MULTILINE)


@pytest.mark.parametrize(
    "text",
    [
        "adam betas (0.9, 0.95)",
        "adam betas (1.3, 1.5)",  # their mean is val_bpb, but they lack the decimals
        "scales (1.300000, 1.500003)",  # the mean is not val_bpb
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
    pairs = {
        "aaaaaaa": ("keep", (1.50, 1.52)),  # 1.51
        "bbbbbbb": ("discard", (1.48, 1.56)),  # 1.52: refuted
        "ccccccc": ("keep", (1.40, 1.42)),  # 1.41
        "ddddddd": ("keep", (1.42, 1.44)),  # 1.43: simpler
    }
    rows = []
    for commit, (status, (first, second)) in pairs.items():
        rows.append((commit, first, "discard", f"seed 1 of 2: idea {commit}"))
        rows.append((commit, second, status, f"idea {commit}"))
    shown = morning(table(*rows, ("eeeeeee", 1.42, "discard", "seed 1 of 2: idea")), PICTURE)
    done = "beside the baseline: 4; 2 kept, 2 discarded, 0 crashed. Runs in all: 9."
    assert done in shown["How much was done?"]
    assert "waits for its second seed" in shown["How much was done?"]
    sigma, noise = sigma_and_noise(*(values for _, values in pairs.values()))
    won = shown["What was won?"]
    assert f"That is {0.1 / sigma:.1f} standard errors. {noise}" in won
    assert re.search(r"^ddddddd +kept last +1\.43", won, re.MULTILINE) and "seed 1 of 2" not in won
    assert re.search(rf"ccccccc +0\.10* +{0.1 / sigma:.4f}", shown["The ten largest gains"])
    alone = "The 1 largest of 1 gains are 100%"  # ddddddd lost 0.02
    assert alone in shown["The ten largest gains"]
    assert "1 of 2 kept changes stand out" in shown["What stands out of the noise?"]
    drawn = json.loads(shown["asked"])
    circles = [[n, value] for n, (_, values) in enumerate(pairs.values(), 1) for value in values]
    assert drawn["run"] == [*circles, [5, 1.42]]
    bar = [1, 1.51, 3, 1.41, 4, 1.43, 6, 1.43]  # it rises for what is simpler
    assert sum(drawn["bar"], []) == pytest.approx(bar)


def test_a_repeat_by_hand_counts_for_the_mean_and_not_for_the_decision(morning):
    rows = row("aaaaaaa", "keep", "baseline", 1.5)
    rows += row("bbbbbbb", "keep", "betas to [0.9, 0.95]", 1.4)
    by_hand = "bbbbbbb\t1.42\t1.0\tdiscard\tthird look\naaaaaaa\t1.52\t1.0\tkeep\tonce more\n"
    shown = morning(HEADER + rows + by_hand)
    assert "fell from 1.510000 to 1.410000" in shown["What was won?"]
    assert sigma_and_noise((1.5, 1.52), (1.4, 1.42))[1] in shown["What was won?"]
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
# A machine that changes its speed


def test_a_commit_that_is_measured_again_is_the_bar_and_neither_an_experiment_nor_a_gain(morning):
    shown = morning(
        HEADER
        + row("aaaaaaa", "keep", "baseline", 1.7, 1.72, machine=MACHINE)  # 1.71
        + row("bbbbbbb", "keep", "remove a gate", 1.6, 1.62)  # 1.61: it gains 0.1
        + row("bbbbbbb", "keep", "measured again", 1.65, 1.66)  # 1.655: a slower machine
        + row("ccccccc", "discard", "add a layer", 1.656)
        + row("bbbbbbb", "discard", "disturbed: measured again", 1.75, 1.9)  # dropped
        + row("ddddddd", "keep", "warmup", 1.63, 1.64),  # 1.635: it gains 0.02
        PICTURE,
    )
    done = shown["How much was done?"]
    assert "beside the baseline: 3; 2 kept, 1 discarded, 0 crashed. Runs in all: 11." in done
    assert "measured again 1 time(s)" in done
    values = [(1.7, 1.72), (1.6, 1.62), (1.65, 1.66), (1.75, 1.9), (1.63, 1.64)]
    sigma, noise = sigma_and_noise(*values)
    won = shown["What was won?"]
    assert f"The kept changes won 0.120000 bpb, {0.12 / 1.71:.2%} of the baseline." in won
    error = sigma * math.sqrt(4 * 1 / 2)  # of (1.71 - 1.61) + (1.655 - 1.635), each a mean of two
    assert f"That is {0.12 / error:.1f} standard errors. {noise}" in won
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
    assert sum(drawn["kept (mean)"], []) == pytest.approx([1, 1.71, 2, 1.61, 6, 1.635])
    assert sum(drawn["measured again"], []) == pytest.approx([3, 1.655])
    bar = [1, 1.71, 2, 1.61, 3, 1.655, 6, 1.635, 7, 1.635]
    assert sum(drawn["bar"], []) == pytest.approx(bar)


def test_a_faster_machine_wins_nothing(morning):
    rows = row("aaaaaaa", "keep", "baseline", 1.7, 1.72)
    rows += row("aaaaaaa", "keep", "measured again", 1.6, 1.62)
    shown = morning(HEADER + rows)
    assert "Nothing kept is lower than the baseline yet" in shown["What was won?"]
    assert "measured again 1 time(s)" in shown["How much was done?"]
    shown = morning(HEADER + rows + row("bbbbbbb", "keep", "an idea", 1.59, 1.61))
    sigma, _ = sigma_and_noise((1.7, 1.72), (1.6, 1.62), (1.59, 1.61))
    assert "The kept changes won 0.010000 bpb" in shown["What was won?"]
    assert f"That is {0.01 / sigma:.1f} standard errors" in shown["What was won?"]


# ---------------------------------------------------------------------------
# A long night


@pytest.fixture(scope="module")
def night(kernel, tmp_path_factory) -> SimpleNamespace:
    """80 experiments, six minutes a run, in a repository: wins, refuted wins, losses and crashes.

    In the middle the machine becomes slower, and the kept commit is measured again.
    """
    folder = tmp_path_factory.mktemp("clone")
    git(folder, "init", "-q", "-b", "autoresearch/mar5")
    plan, bar, gains = [("keep", "baseline", (1.0, 1.002))], 1.001, []
    for i in range(80):
        if i == 40:
            plan.append(("again", "measured again", (round(bar + 0.019, 6), round(bar + 0.021, 6))))
            bar = statistics.mean(plan[-1][2])
        second = bar - 0.006 + (80 - i) / 20000  # two seeds come closer as the night goes on
        long = f"raise MATRIX_LR, step {i}, which has a rather long description"
        status, text, values = [
            ("keep", long, (bar - 0.006, second)),
            ("discard", f"add layer {i}", (bar + (0.5 if i == 51 else 0.01),)),
            ("keep", f"remove gate {i}", (bar - 0.004, bar - 0.002)),
            ("discard", f"warmup {i}", (bar - 0.001, bar + 0.002)),
            ("crash", f"batch {i} (OOM)", ()),
        ][i % 5]
        values = tuple(round(value, 6) for value in values)
        plan.append((status, text, values))
        if status == "keep":
            gains.append(bar - statistics.mean(values))
            bar = statistics.mean(values)

    stream, clock = ["feature done"], 1_750_000_000
    mark, kept = 0, None
    for status, text, values in plan:
        if status != "again":
            mark += 1
            time = clock if kept else clock - 7 * 24 * 3600  # the baseline is a week old
            code = f"# {text}\n" * (100 + mark)
            stream += ["commit refs/autoresearch/all", f"mark :{mark}"]
            stream += [f"committer night <night> {time} +0000", "data 1", "x"]
            stream += [f"from :{kept}"] if kept else []
            stream += ["M 100644 inline train.py", f"data {len(code)}", code]
        clock += 360 * max(len(values), 1)
        kept = mark if status == "keep" else kept
    stream = "\n".join([*stream, "done", ""])
    git(folder, "fast-import", "--quiet", "--force", "--export-marks=marks", stdin=stream)
    marks = dict(line.split() for line in (folder / "marks").read_text().splitlines())
    names = iter(marks[f":{number}"][:7] for number in range(1, mark + 1))

    rows, commits, kept = [], [], None
    for status, text, values in plan:
        commits.append(kept if status == "again" else next(names))
        kept = commits[-1] if status == "keep" else kept
        machine = "" if len(commits) > 1 else MACHINE
        verdict = "keep" if status == "again" else status
        rows.append(row(commits[-1], verdict, text, *values, machine=machine))
    (folder / "results.tsv").write_text(HEADER + "".join(rows))
    shown = execute(kernel, folder, PICTURE)
    return SimpleNamespace(folder=folder, plan=plan, commits=commits, gains=gains, shown=shown)


def test_long_night_in_numbers(night):
    shown, gains = night.shown, night.gains
    statuses = [status for status, *_ in night.plan]
    kept, discarded, crashed = (statuses.count(name) for name in ("keep", "discard", "crash"))
    runs = [max(len(values), 1) for *_, values in night.plan]
    assert sum(runs) > 100 and kept > 30
    done = f"{kept - 1} kept, {discarded} discarded, {crashed} crashed. Runs in all: {sum(runs)}."
    assert f"Experiments beside the baseline: 80; {done}" in shown["How much was done?"]
    hours = sum(runs[1:-1]) / 10  # the last one's runs follow the time of its commit
    pace = f"79 experiments took {hours:.1f} hours, {79 / hours:.1f} an hour."
    assert pace in shown["How much was done?"]

    sigma, noise = sigma_and_noise(*(values for *_, values in night.plan))
    won = f"The kept changes won {sum(gains):.6f} bpb, {sum(gains) / 1.001:.2%} of the baseline."
    assert won in shown["What was won?"]
    error = sigma * math.sqrt(2)  # four means of two: before and after it was measured again
    assert f"That is {sum(gains) / error:.1f} standard errors. {noise}" in shown["What was won?"]
    clear = sum(gain > 2 * sigma for gain in gains)  # sigma: between two means of two
    assert 0 < clear < len(gains)
    stands_out = f"{clear} of {len(gains)} kept changes stand out"
    assert stands_out in shown["What stands out of the noise?"] and noise in shown["What was won?"]
    share = sum(sorted(gains)[-10:]) / sum(gains)
    largest = f"The 10 largest of {len(gains)} gains are {share:.0%} of their sum."
    assert largest in shown["The ten largest gains"]

    tried = shown["What was tried, and with what success?"]
    kinds = {"optimizer": 16, "deletion": 16, "schedule": 0, "batch and data": 0}
    for kind, successes in kinds.items():
        assert re.search(rf"^{kind} +16 +{successes} ", tried, re.MULTILINE)
    assert not re.search("^other", tried, re.MULTILINE)
    last_kept = max(number for number, status in enumerate(statuses) if status == "keep")
    lines = 101 + last_kept - 1  # one more with each commit, and `again` has none
    assert "from 2.5 to 2.5 GB" in shown["Memory and simplicity"]
    assert f"from 101 to {lines} lines" in shown["Memory and simplicity"]
    assert f"{crashed} of 81 experiments crashed" in shown["What crashed?"]
    text = night.plan[last_kept][1]
    assert f"\n+# {text}\n" in shown["The night's train.py against the start"]


def test_the_picture_has_every_run_at_its_experiment_and_the_bar(night):
    drawn = json.loads(night.shown["asked"])
    numbered = list(enumerate(night.plan, 1))
    circles = [[n, value] for n, (*_, values) in numbered for value in values]
    assert drawn["run"] == circles
    assert [n for n, _ in drawn["run above"]] == [n for n, value in circles if value > 1.4]
    means = {"keep": [], "again": []}
    for n, (status, _, values) in numbered:
        if status in means:
            means[status].append([n, pytest.approx(statistics.mean(values))])
    assert drawn["kept (mean)"] == means["keep"] and drawn["measured again"] == means["again"]
    bar = sorted(means["keep"] + means["again"], key=lambda point: point[0])
    assert drawn["bar"] == [*bar, [len(night.plan) + 1, bar[-1][1]]]
    crashes = [n for n, (status, *_) in numbered if status == "crash"]
    assert [n for n, _ in drawn["crash"]] == crashes
    numbers = [str(number) for number in range(1, len(means["keep"]) + 1)]
    *below_the_points, names = drawn["texts"]
    assert below_the_points == numbers
    assert [line.split()[0] for line in names.splitlines()] == numbers
    runs = len(circles) + len(crashes)
    title = f"mar5: 81 experiments in {runs} runs, {len(numbers)} kept with the baseline"
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
    git(night.folder, "worktree", "add", "-q", "-b", branch, second, night.commits[0])
    rows = table(("aaaaaaa", 1.5, "keep", "baseline"), ("bbbbbbb", 1.4, "keep", "idea"))
    Path(second, "results.tsv").write_text(rows)
    won = execute(kernel, night.folder)["What was won?"]
    git(night.folder, "worktree", "remove", "--force", second)
    assert f"mar5: The kept changes won {sum(night.gains):.6f} bpb" in won
    assert "mar5-gpu1: val_bpb fell from 1.500000 to 1.400000" in won
