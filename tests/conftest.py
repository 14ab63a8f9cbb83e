"""A cache of its own and a small real corpus for all tests, made before prepare.py is imported."""

import atexit
import faulthandler
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRATCH = Path(tempfile.mkdtemp(prefix="autoresearch-tests-"))
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)

# Real text on any machine: modules of the standard library, as documents of a .jsonl file.
CORPUS = SCRATCH / "corpus"
CORPUS.mkdir()
modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
TEXTS = [text for path in modules if (text := path.read_text("utf-8", errors="replace")).strip()]
with (CORPUS / "stdlib.jsonl").open("w") as lines:
    lines.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)

# where the user's prepare.py has put FlashAttention-3, if it has
USERS_CACHE = Path(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch").expanduser()
os.environ["AUTORESEARCH_CACHE"] = str(SCRATCH / "cache")
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
for name in ("AUTORESEARCH_BUDGET", "AUTORESEARCH_SAVE", "SEED", "PYTHONDONTWRITEBYTECODE"):
    os.environ.pop(name, None)  # with bytecode torch is imported in half the time
GPU = {
    "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")
}  # over ENV: they may use one
ENV = {
    **os.environ,
    "CUDA_VISIBLE_DEVICES": "",
}  # of processes that tests start: they never look for a GPU
PEOPLE = {
    f"GIT_{who}_{what}": "agent" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
}
GIT_ENV = {**ENV, **PEOPLE, "GIT_CONFIG_GLOBAL": os.devnull}  # of git: the same on any machine
command = [sys.executable, ROOT / "prepare.py", "--source", CORPUS, "--scale", "small"]
subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=ENV)

import torch  # noqa: E402

import prepare  # noqa: E402

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
TINY = prepare.Scale(seq_len=32, vocab_size=512, eval_rows=40)
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"  # of results.tsv


def git(folder: Path, *args: str, stdin: str | None = None) -> str:
    """What git prints there; raises where it fails."""
    return subprocess.check_output(
        ["git", *args], cwd=folder, env=GIT_ENV, input=stdin, text=True
    ).strip()


@pytest.fixture(autouse=True)
def no_watchdog():
    """What the loader and the harness arm in this process must not end the tests."""
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache for this process."""
    monkeypatch.setattr(prepare, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tiny_cache():
    """The corpus prepared at a scale of 32 tokens a row and 40 validation rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "CACHE", SCRATCH / "tiny")
        patch.setitem(prepare.SCALES, "tiny", TINY)
        prepare.make_dataset(str(CORPUS), "tiny", 1)
    return SCRATCH / "tiny"


@pytest.fixture
def tiny(tiny_cache, cache, monkeypatch):
    """A copy of it as the current preparation, with a clock that has not started; on the CPU."""
    shutil.copytree(tiny_cache, cache)
    monkeypatch.setitem(prepare.SCALES, "tiny", TINY)
    monkeypatch.setattr(prepare, "DEVICE", "cpu")
    monkeypatch.setattr(prepare, "MAX_SEQ_LEN", 32)
    monkeypatch.setattr(prepare, "SLICE", 3 * 32 * 512)  # several slices a batch, as at full scale
    monkeypatch.setattr(prepare, "DATASET", prepare.find_dataset())
    monkeypatch.setattr(prepare, "clock", prepare.Clock())
    prepare.row_order.cache_clear()
    return prepare.DATASET[0]
