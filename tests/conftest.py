"""
The machinery of the tests, so that a test itself is only a short claim.

It gives the tests a small corpus with a cache of its own, a Hugging Face hub with faults, and a
copy of train.py that runs as a script.
"""

import atexit
import faulthandler
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[1]

# ---------------------------------------------------------------------------
# A folder for everything that the tests write, and a corpus in it

SCRATCH = Path(tempfile.mkdtemp(prefix="autoresearch-tests-"))
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)

# Every machine has the modules of the standard library. Half of them are the documents of a .jsonl
# file, which is enough and saves seconds.
MODULES = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[::2]
TEXTS = [path.read_text("utf-8", errors="replace") for path in MODULES]
TEXTS = [text for text in TEXTS if text.strip()]
CORPUS = SCRATCH / "corpus"
CORPUS.mkdir()
with (CORPUS / "stdlib.jsonl").open("w") as lines:
    for text in TEXTS:
        lines.write(json.dumps({"text": text}) + "\n")

# ---------------------------------------------------------------------------
# The environment of this process and of those that it starts

# The user's own cache, which may hold FlashAttention-3. No test writes into it.
USERS_CACHE = Path(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch").expanduser()

os.environ["AUTORESEARCH_CACHE"] = str(SCRATCH / "cache")
# Compiled code outlives the tests, so that they compile nothing twice.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/autoresearch-compiled")
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
for name in ("AUTORESEARCH_BUDGET", "AUTORESEARCH_SAVE", "SEED"):
    os.environ.pop(name, None)
# With its bytecode on disk torch is imported in half the time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# The processes that tests start never look for a GPU, unless a test lays GPU over ENV.
ENV = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
GPU = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}

# prepare.py reads the cache's path when it is imported, so the environment is complete by now.
command = [sys.executable, ROOT / "prepare.py", "--source", CORPUS, "--scale", "small"]
subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=ENV)

import torch  # noqa: E402

import prepare  # noqa: E402

torch.set_num_threads(1)  # on busy cores the threads of a tiny model wait for each other

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def no_watchdog():
    """Disarm after each test what the loader and the harness arm in this process.

    Their watchdog ends a process that hangs, and here that process is pytest.
    """
    yield
    faulthandler.cancel_dump_traceback_later()


# ---------------------------------------------------------------------------
# Git, and the table of a night

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"  # the first line of results.tsv

# Git behaves the same on any machine: it has a name to commit under, and no configuration.
GIT_ENV = {
    **ENV,
    "GIT_AUTHOR_NAME": "agent",
    "GIT_AUTHOR_EMAIL": "agent",
    "GIT_COMMITTER_NAME": "agent",
    "GIT_COMMITTER_EMAIL": "agent",
    "GIT_CONFIG_GLOBAL": os.devnull,
}


def git(folder: Path, *args: str) -> str:
    """Run git in a folder and return what it prints. Raises where git fails."""
    return subprocess.check_output(["git", *args], cwd=folder, env=GIT_ENV, text=True).strip()


# ---------------------------------------------------------------------------
# Datasets

TINY = prepare.Scale(seq_len=32, vocab_size=512, eval_rows=40, source="python", shards=1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a cache that does not exist yet. prepare.py uses it in this process."""
    monkeypatch.setattr(prepare, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tiny_cache() -> Path:
    """A cache with the corpus, prepared once at a scale of 32 tokens a row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "CACHE", SCRATCH / "tiny")
        patch.setitem(prepare.SCALES, "tiny", TINY)
        prepare.make_dataset(str(CORPUS), "tiny")
    return SCRATCH / "tiny"


@pytest.fixture
def tiny(tiny_cache: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a dataset of 32 tokens a row and 40 validation rows, for this test alone.

    It is the dataset to train on, on the CPU, with a clock that has not started. A test may damage
    it, because it is a copy.
    """
    shutil.copytree(tiny_cache, cache)
    monkeypatch.setitem(prepare.SCALES, "tiny", TINY)
    monkeypatch.setattr(prepare, "DEVICE", "cpu")
    monkeypatch.setattr(prepare, "MAX_SEQ_LEN", 32)
    monkeypatch.setattr(prepare, "SLICE", 3 * 32 * 512)  # a batch has several slices
    monkeypatch.setattr(prepare, "DATASET", prepare.find_dataset())
    monkeypatch.setattr(prepare, "run", prepare.Run())
    monkeypatch.setattr(prepare, "AS_IMPORTED", {})  # names were assigned anew, as above
    prepare.row_order.cache_clear()
    return prepare.DATASET[0]


# ---------------------------------------------------------------------------
# A Hugging Face hub with faults

VAL = "shard_06542.parquet"  # the shard of ClimbMix that validates


def parquet(**columns: list) -> bytes:
    """The bytes of a parquet file with these columns."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="none")
    return sink.getvalue().to_pybytes()


class Hub:
    """A real HTTP server on this machine that serves parquet files as the hub does.

    Each request for a file takes one of the faults that a test has put into `faults` under the
    file's name, and the last one stays. `requests` holds each request: the name of the file, and
    the byte from which on the client asked for it. A fault is a number or one of these words:

    a number     the hub answers with this HTTP status
    "html"       the hub sends a web page, as a hotel's network does that wants a login first
    "drop"       the connection breaks after as many bytes as a third of the file has
    "truncated"  the hub announces the whole file and sends the first half, wherever the client
                 asked it to begin, as if it were complete
    "sha256"     the hub announces the sha256 of another file
    "too long"   the hub announces half of the bytes that it sends, and no sha256
    ""           there is no fault
    """

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[int | str]] = {}
        self.requests: list[tuple[str, int]] = []
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        serve = self.server.serve_forever
        threading.Thread(target=serve, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def next_fault(self, name: str) -> int | str:
        faults = self.faults.get(name, [""])
        return faults.pop(0) if len(faults) > 1 else faults[0]


class HubHandler(http.server.BaseHTTPRequestHandler):
    """Answers one request to the Hub.

    Like the real hub, it announces the size and the sha256 of a file and redirects the client to a
    storage, which sends the file and can begin in its middle.
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        """Keep the requests out of the output of the tests."""

    def do_HEAD(self) -> None:
        self.reply(200)

    def do_GET(self) -> None:
        hub = self.server.hub
        name = self.path.rsplit("/", 1)[-1]
        first_byte = self.headers.get("Range", "bytes=0-")
        start = int(first_byte.removeprefix("bytes=").removesuffix("-"))
        if self.path.startswith("/storage/"):
            self.send_file(hub.files[name], start)
            return
        hub.requests.append((name, start))
        if name not in hub.files:
            self.reply(404)
            return
        data, fault = hub.files[name], hub.next_fault(name)
        sha256 = "0" * 64 if fault == "sha256" else hashlib.sha256(data).hexdigest()
        announced = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{sha256}"'}
        if isinstance(fault, int):
            self.reply(fault)
        elif fault == "html":
            self.reply(200, b"<html>captive portal</html>")
        elif fault == "drop":
            self.send_file(data, start, limit=len(data) // 3)
        elif fault == "too long":
            half = {"X-Linked-Size": str(len(data) // 2), "X-Linked-Etag": '"first version"'}
            self.reply(200, data, half)
        elif fault == "truncated":
            self.reply(200, data[: len(data) // 2], announced)
        else:
            self.reply(302, headers={**announced, "Location": f"/storage/{name}"})

    def send_file(self, data: bytes, start: int, limit: int | None = None) -> None:
        """Send a file from a byte on. With a limit the connection breaks after so many bytes."""
        if start >= len(data):
            self.reply(416)
            return
        rest = data[start:]
        headers = {"Content-Length": str(len(rest))}
        self.reply(206 if start else 200, rest[:limit], headers)
        self.close_connection = limit is not None

    def reply(self, status: int, body: bytes = b"", headers: dict | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with three shards of ClimbMix. prepare.py downloads from it, and hardly pauses."""
    hub = Hub()
    hub.files["shard_00000.parquet"] = parquet(text=TEXTS[:30])
    hub.files["shard_00001.parquet"] = parquet(text=TEXTS[30:60])
    hub.files[VAL] = parquet(text=TEXTS[60:])
    monkeypatch.setattr(prepare, "HUB", hub.url)
    monkeypatch.setattr(prepare, "RETRY_PAUSES", [0.01] * 6)
    monkeypatch.setattr(prepare, "TOKENIZER_BYTES", 200_000)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


# ---------------------------------------------------------------------------
# train.py as a script, in a folder of its own

# Constants with which train.py is ready to train in a moment.
SMALL = {
    "DEPTH": "1",
    "ASPECT_RATIO": "64",
    "HEAD_DIM": "16",
    "N_KV_HEAD": "2",
    "TOTAL_BATCH_SIZE": "2**12",
    "DEVICE_BATCH_SIZE": "16",
}
# The keys of the summary, in order.
SUMMARY = [
    "val_bpb",
    "training_seconds",
    "total_tokens_M",
    "source",
    "harness",
    "code",
    "total_seconds",
    "peak_vram_mb",
    "mfu_percent",
    "num_steps",
    "num_params_M",
    "depth",
    "startup_seconds",
    "eval_seconds",
    "seed",
    "device",
    "attention",
    "epochs",
]


class Script:
    """A copy of train.py with a small model and a budget of one second, in a folder of its own.

    A test changes lines of it with `edit` and runs it as a user does, with `run`, which takes
    environment variables. It trains on the corpus.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("prepare.py", "train.py"):
            shutil.copy(ROOT / name, folder)
        for name, value in SMALL.items():
            self.set_constant(name, value)

    def set_constant(self, name: str, value: str) -> None:
        """Give a constant of train.py another value, and keep the comment on its line."""
        self.edit(rf"^{name} = [^#\n]*", f"{name} = {value}  ")

    def edit(self, pattern: str, replacement: str) -> None:
        """Replace what the pattern matches in train.py. It must match exactly once."""
        path = self.folder / "train.py"
        text = path.read_text()
        text, count = re.subn(pattern, lambda _: replacement, text, flags=re.MULTILINE)
        assert count == 1, f"{pattern} matches {count} times"
        path.write_text(text)

    def run(self, **env: str) -> tuple[int, str, str]:
        """Run the script to its end. Returns the exit code, stdout and stderr."""
        env = {**ENV, "AUTORESEARCH_BUDGET": "1", **env}
        command = [sys.executable, "train.py"]
        ended = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True)
        return ended.returncode, ended.stdout, ended.stderr


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


def summary(out: str) -> dict[str, str]:
    """The values of the summary at the end of what train.py printed, by key.

    The keys must be those of SUMMARY, in this order, because people and the notebook read them.
    """
    _, _, block = out.rpartition("---\n")
    pairs = [line.split(":", 1) for line in block.splitlines()]
    assert [key for key, _ in pairs] == SUMMARY
    return {key: value.strip() for key, value in pairs}
