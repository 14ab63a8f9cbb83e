"""analysis.ipynb, run headless in one kernel: on every state of results.tsv, and on a long night in git."""

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


@pytest.fixture(scope="module")
def kernel():
    kernel = KernelManager(kernel_name="python3")
    kernel.start_kernel()
    yield kernel
    kernel.shutdown_kernel(now=True)


def execute(kernel: KernelManager, folder: Path) -> dict[str, str]:
    """Run the notebook in a folder; gives what it printed and showed as text, by heading."""
    notebook = nbformat.read(ROOT / "analysis.ipynb", 4)
    fresh = f"%reset -f\nimport os; os.chdir({str(folder)!r})"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(fresh))
    NotebookClient(notebook, km=kernel, timeout=60).execute()  # raises where a cell does
    shown, heading = {}, ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = cell.source.splitlines()[0].lstrip("# ")
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", output.text  # no warning either
            text = output.get("text") or output.data.get("text/markdown") or output.data["text/plain"]
            shown[heading] = shown.get(heading, "") + text
    return shown


@pytest.fixture
def morning(kernel, tmp_path):
    """What the notebook shows of this text in results.tsv."""

    def show(results: str | None) -> dict[str, str]:
        if results is not None:
            (tmp_path / "results.tsv").write_text(results)
        return execute(kernel, tmp_path)

    return show


def table(*rows: tuple) -> str:
    return HEADER + "".join(
        f"{commit}\t{value}\t1.0\t{status}\t{text}\n" for commit, value, status, text in rows
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
    shown = morning(HEADER + "abc1234\t1.234567\t1.6\tdiscard\tseed 1 of 2: baseline [0123, sdpa, cpu]\n")
    assert "Runs: 1. Experiments beside the baseline: 0; 0 kept" in shown["How much was done?"]
    assert "waits for its second seed" in shown["How much was done?"]
    assert "baseline yet: 1.234567" in shown["What was won?"]


def test_crashes_only_and_crashes_first(morning):
    crash = "abc1234\t0.000000\t0.0\tcrash\tdepth 40 (OOM)\n"
    shown = morning(HEADER + crash)
    assert "no baseline" in shown["What was won?"] and "depth 40 (OOM)" in shown["What crashed?"]
    shown = morning(HEADER + crash + "bbbbbbb\t1.5\t1.0\tkeep\tbaseline\nccccccc\t1.4\t1.0\tkeep\tbetter\n")
    assert "fell from 1.500000 to 1.400000: 0.100000 bpb, 6.67%" in shown["What was won?"]
    assert "1 of 3 experiments crashed" in shown["What crashed?"]


def test_nothing_kept(morning):
    shown = morning(table(("aaaaaaa", 1.5, "discard", "baseline"), ("bbbbbbb", 1.6, "discard", "worse")))
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
    shown = morning(HEADER + rows)
    assert "4 line(s) could not be read" in shown["The morning"]
    assert "fell from 1.500000 to 1.400000" in shown["What was won?"]
    assert 'größer, "quoted" \\frac 100% 学习率' in shown["What was won?"]


def test_gains_count_from_the_state_before_and_repeats_by_their_mean(morning):
    rows = [
        ("aaaaaaa", 1.50, "discard"), ("aaaaaaa", 1.52, "keep"),  # 1.51
        ("bbbbbbb", 1.48, "discard"), ("bbbbbbb", 1.56, "discard"),  # 1.52: refuted
        ("ccccccc", 1.40, "discard"), ("ccccccc", 1.42, "keep"),  # 1.41
        ("ddddddd", 1.42, "discard"), ("ddddddd", 1.44, "keep"),  # 1.43: simpler
    ]  # fmt: skip
    shown = morning(table(*((*row, f"idea {row[0]}") for row in rows)))
    sigma = math.sqrt((3 * 0.02**2 / 2 + 0.08**2 / 2) / 4)  # half of each squared gap, over four pairs
    noise = f"one run's sigma is {sigma:.6f}, pooled over 4 repeats, so rough"
    assert f"{0.1 / sigma:.1f} sigmas of that difference ({noise})" in shown["What was won?"]
    assert re.search(r"ddddddd +kept last +1\.43", shown["What was won?"])
    assert re.search(rf"ccccccc +0\.10* +{0.1 / sigma:.6f}", shown["The ten largest gains"])
    assert "The 1 largest of 1 gains are 100%" in shown["The ten largest gains"]  # ddddddd lost 0.02
    assert "1 of 2 kept changes stand out" in shown["What stands out of the noise?"]


def test_a_baseline_that_was_disturbed_and_dropped_is_not_what_the_night_is_measured_from(morning):
    shown = morning(
        table(
            ("aaaaaaa", 1.8, "discard", "disturbed: baseline [0123, sdpa, cpu]"),
            ("bbbbbbb", 1.5, "keep", "baseline, undisturbed"),
            ("ccccccc", 1.4, "keep", "raise MATRIX_LR"),
        )
    )
    assert "fell from 1.500000 to 1.400000" in shown["What was won?"]
    assert "The 1 largest of 1 gains" in shown["The ten largest gains"]


def test_a_repeat_by_hand_counts_for_the_mean_and_not_for_the_decision(morning):
    rows = [("aaaaaaa", 1.5, "keep", "baseline"), ("bbbbbbb", 1.4, "keep", "raise adam betas to [0.9, 0.95]")]
    shown = morning(
        table(*rows, ("bbbbbbb", 1.42, "discard", "third look"), ("aaaaaaa", 1.52, "keep", "again"))
    )
    assert "fell from 1.510000 to 1.410000" in shown["What was won?"]
    assert re.search(
        r"bbbbbbb +best +1\.41 +2 +1\.0 +raise adam betas to \[0\.9, 0\.95\]", shown["What was won?"]
    )


def test_unreadable_memory_and_equal_repeats_have_their_sentences(morning):
    rows = [("aaaaaaa", "keep"), ("aaaaaaa", "discard"), ("bbbbbbb", "keep")]
    shown = morning(HEADER + "".join(f"{c}\t1.{5 - (c > 'b')}\t44 GB\t{s}\tx\n" for c, s in rows))
    assert "Peak memory is unknown" in shown["Memory and simplicity"]
    assert "unknown: the repeats are equal" in shown["What was won?"]


# ---------------------------------------------------------------------------
# A long night


@pytest.fixture(scope="module")
def night(kernel, tmp_path_factory) -> SimpleNamespace:
    """80 experiments, six minutes a run, in a repository: wins, refuted wins, losses and crashes."""
    folder = tmp_path_factory.mktemp("clone")
    git(folder, "init", "-q", "-b", "autoresearch/mar5")
    plan, bar = [("keep", "baseline", (1.0, 1.002))], 1.001
    for i in range(80):
        second = bar - 0.006 + (80 - i) / 20000  # the gap between two seeds shrinks as the night goes on
        long = f"raise MATRIX_LR, step {i}, which has a rather long description"
        experiment = [
            ("keep", long, (bar - 0.006, second)),
            ("discard", f"add layer {i}", (bar + 0.01 + i / 1000,)),
            ("keep", f"remove gate {i}", (bar - 0.004, bar - 0.002)),
            ("discard", f"warmup {i}", (bar - 0.001, bar + 0.002)),
            ("crash", f"batch {i} (OOM)", ()),
        ][i % 5]
        plan.append(experiment)
        bar = statistics.mean(experiment[2]) if experiment[0] == "keep" else bar

    stream, clock, kept = ["feature done"], 1_750_000_000, None
    for mark, (status, text, values) in enumerate(plan, 1):
        code = f"# {text}\n" * (100 + mark)
        stream += ["commit refs/autoresearch/all", f"mark :{mark}", f"committer night <night> {clock} +0000"]
        stream += ["data 1", "x", *([f"from :{kept}"] if kept else [])]
        stream += ["M 100644 inline train.py", f"data {len(code)}", code]
        clock += 360 * max(len(values), 1)
        kept = mark if status == "keep" else kept
    stream += ["done", ""]
    git(folder, "fast-import", "--quiet", "--force", "--export-marks=marks", stdin="\n".join(stream))
    marks = dict(line.split() for line in (folder / "marks").read_text().splitlines())
    names = [marks[f":{mark}"][:7] for mark in range(1, len(plan) + 1)]

    rows = []
    for name, (status, text, values) in zip(names, plan, strict=True):
        rows += [f"{name}\t{value:.6f}\t2.5\tdiscard\tseed 1 of 2: {text}\n" for value in values[:-1]]
        last = f"{values[-1]:.6f}\t2.5" if values else "0.000000\t0.0"
        rows.append(f"{name}\t{last}\t{status}\t{text}\n")
    (folder / "results.tsv").write_text(HEADER + "".join(rows))
    return SimpleNamespace(
        folder=folder, plan=plan, names=names, runs=len(rows), shown=execute(kernel, folder)
    )


def test_long_night_in_numbers(night):
    shown = night.shown
    counts = {status: sum(s == status for s, *_ in night.plan[1:]) for status in ("keep", "discard", "crash")}
    assert night.runs > 100 and counts["keep"] > 30
    done = f"{counts['keep']} kept, {counts['discard']} discarded, {counts['crash']} crashed."
    assert f"Runs: {night.runs}. Experiments beside the baseline: 80; {done}" in shown["How much was done?"]
    runs = sum(max(len(values), 1) for *_, values in night.plan[:-1])  # the last commit's follow its date
    assert f"{runs} runs in {runs / 10:.1f} hours, 10.0 an hour." in shown["How much was done?"]

    experiments = list(zip(night.names, night.plan, strict=True))
    means = {name: statistics.mean(values) for name, (_, _, values) in experiments if values}
    kept = [name for name, (status, *_) in experiments if status == "keep"]
    pairs = [values for *_, values in night.plan if len(values) == 2]
    sigma = math.sqrt(sum((a - b) ** 2 / 2 for a, b in pairs) / len(pairs))
    gain = means[kept[0]] - means[kept[-1]]
    assert f"from {means[kept[0]]:.6f} to {means[kept[-1]]:.6f}" in shown["What was won?"]
    noise = f"one run's sigma is {sigma:.6f}, pooled over {len(pairs)} repeats"
    sigmas = f"{gain / sigma:.1f} sigmas of that difference ({noise})"
    assert sigmas in shown["What was won?"]

    gains = [means[a] - means[b] for a, b in zip(kept, kept[1:], strict=False)]
    clear = sum(g > 2 * sigma for g in gains)  # sigma is the standard error between two means of two
    assert f"{clear} of {len(gains)} kept changes stand out" in shown["What stands out of the noise?"]
    largest = (
        f"The 10 largest of {len(gains)} gains are {sum(sorted(gains)[-10:]) / sum(gains):.0%} of their sum."
    )
    assert largest in shown["The ten largest gains"]
    tried = shown["What was tried, and with what success?"]
    for kind, won in (("optimizer", 16), ("deletion", 16), ("schedule", 0), ("batch and data", 0)):
        assert re.search(rf"^{kind} +16 +{won} ", tried, re.MULTILINE)
    lines = f"from 101 to {101 + night.names.index(kept[-1])} lines"
    assert "from 2.5 to 2.5 GB" in shown["Memory and simplicity"] and lines in shown["Memory and simplicity"]
    assert f"{counts['crash']} of 81 experiments crashed" in shown["What crashed?"]
    assert f"\n+# {night.plan[-3][1]}\n" in shown["The night's train.py against the start"]


def test_a_clone_without_the_discarded_commits_shows_the_same_pace_and_lines(night, morning, tmp_path):
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
    second = tmp_path / "gpu1"
    git(night.folder, "worktree", "add", "-q", "-b", "autoresearch/mar5-gpu1", str(second), night.names[0])
    rows = table(("aaaaaaa", 1.5, "keep", "baseline"), ("bbbbbbb", 1.4, "keep", "idea"))
    (second / "results.tsv").write_text(rows)
    won = execute(kernel, night.folder)["What was won?"]
    git(night.folder, "worktree", "remove", "--force", str(second))
    assert "mar5: val_bpb fell from 1.001000" in won
    assert "mar5-gpu1: val_bpb fell from 1.500000 to 1.400000" in won
