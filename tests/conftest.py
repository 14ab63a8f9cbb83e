"""
The machinery of the tests, so that a test itself is only a short claim.

It gives the tests a small corpus with a cache of its own, a Hugging Face hub with faults, models
that cheat, a fake attention kernel, and a copy of train.py that runs as a script.
"""

import atexit
import faulthandler
import hashlib
import http.server
import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[1]

# ---------------------------------------------------------------------------
# A folder for everything that the tests write, and a corpus in it

SCRATCH = Path(tempfile.mkdtemp(prefix="autoresearch-tests-"))
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)

# Every machine has the modules of the standard library. They are the documents of a .jsonl file.
MODULES = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
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
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
for name in ("AUTORESEARCH_BUDGET", "AUTORESEARCH_SAVE", "LAUNCH", "SEED"):
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
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import prepare  # noqa: E402
import train  # noqa: E402

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


def git(folder: Path, *args: str, stdin: str | None = None) -> str:
    """Run git in a folder and return what it prints. Raises where git fails."""
    command = ["git", *args]
    out = subprocess.check_output(command, cwd=folder, env=GIT_ENV, input=stdin, text=True)
    return out.strip()


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
        prepare.make_dataset(str(CORPUS), "tiny", 1)
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
    # Three rows of logits a slice, so that a batch has several slices, as at full scale.
    monkeypatch.setattr(prepare, "SLICE", 3 * 32 * 512)
    monkeypatch.setattr(prepare, "DATASET", prepare.find_dataset())
    monkeypatch.setattr(prepare, "run", prepare.Run())
    # The harness refuses to score when something in prepare.py was replaced, as above.
    monkeypatch.setattr(prepare, "check_harness", lambda: None)
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

    It lets a test see what a download does when the network fails. A test puts the faults of the
    coming requests for a file into `faults`, under the file's name. Each request takes one of them,
    and the last one stays. `requests` then holds each request for a file: its name, and the byte
    from which on the client asked for it.

    A fault is a number or one of these words:

    a number     the hub answers with this HTTP status
    "html"       the hub sends a web page, as a hotel's network does that wants a login first
    "drop"       the connection breaks after as many bytes as a third of the file has
    "no range"   the hub sends the file from its beginning, wherever the client asked it to begin
    "truncated"  the hub announces the whole file and sends the first half, as if it were complete
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
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def add(self, name: str, texts: list[str]) -> None:
        self.files[name] = parquet(text=texts)

    def next_fault(self, name: str) -> int | str:
        """Take the next fault of a file from its list. The last one of the list stays there."""
        faults = self.faults.get(name, [""])
        if len(faults) > 1:
            return faults.pop(0)
        return faults[0]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


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
        if name in hub.files:
            self.answer(name, start, hub.next_fault(name))
        else:
            self.reply(404, b"there is no such file")

    def answer(self, name: str, start: int, fault: int | str) -> None:
        data = self.server.hub.files[name]
        sha256 = hashlib.sha256(data).hexdigest()
        if fault == "sha256":
            sha256 = "0" * 64
        announced = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{sha256}"'}
        if isinstance(fault, int):
            self.reply(fault, b"sorry")
        elif fault == "html":
            self.reply(200, b"<html>captive portal</html>", {"Content-Type": "text/html"})
        elif fault == "drop":
            self.send_file(data, start, limit=len(data) // 3)
        elif fault == "no range":
            self.send_file(data, start=0)
        elif fault == "too long":
            announced = {"X-Linked-Size": str(len(data) // 2), "X-Linked-Etag": '"first version"'}
            self.reply(200, data, announced)
        elif fault == "truncated":
            self.reply(200, data[: len(data) // 2], announced)
        else:
            self.reply(302, headers={**announced, "Location": f"/storage/{name}"})

    def send_file(self, data: bytes, start: int, limit: int | None = None) -> None:
        """Send a file from a byte on. With a limit the connection breaks after so many bytes."""
        if start >= len(data):
            self.reply(416, headers={"Content-Range": f"bytes */{len(data)}"})
            return
        rest = data[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[:limit])
        if limit is not None and limit < len(rest):
            self.close_connection = True

    def reply(self, status: int, body: bytes = b"", headers: dict | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with three shards of ClimbMix. prepare.py downloads from it, and hardly pauses."""
    hub = Hub()
    hub.add("shard_00000.parquet", TEXTS[:60])
    hub.add("shard_00001.parquet", TEXTS[60:120])
    hub.add(VAL, TEXTS[120:])
    monkeypatch.setattr(prepare, "HUB", hub.url)
    monkeypatch.setattr(prepare, "RETRY_PAUSES", (0, 0.01, 0.01))
    monkeypatch.setattr(prepare, "TOKENIZER_BYTES", 200_000)
    yield hub
    hub.close()


# ---------------------------------------------------------------------------
# Models for the harness: an honest one, and many that cheat


class Toy(nn.Module):
    """An honest causal model, small enough to be scored in a moment.

    Each token has a row in a table, which holds its logits for the next token. A fiftieth of the
    rows of this token and all before it is added, so that a logit depends on more than one token.
    A test takes it where any honest model will do. The cheating models are made of it.
    """

    def __init__(self, vocab_size: int = 512):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(vocab_size, vocab_size, generator=generator))
        self.zero = nn.Parameter(torch.zeros(()))  # for models whose cheat is hidden

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, vocab_size) of tokens x (B, T)."""
        rows = self.table[x]
        return rows + rows.cumsum(1) / 50

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits(x)


class Cheat(Toy):
    """A Toy whose logits a function changes. With most functions it is a model that cheats.

    The model calls change(model, logits, x) and gives what this returns in place of its logits.
    `seen` and `mean` are for functions that remember earlier batches. With hidden=True the change
    is multiplied by a parameter that is zero. Real models begin so: what lies behind a projection
    that is still zero does not show.
    """

    def __init__(self, change: Callable, hidden: bool = False):
        super().__init__()
        self.change = change
        self.hidden = hidden
        self.seen = []
        self.mean = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.logits(x)
        changed = self.change(self, logits.clone(), x)
        if self.hidden:
            return logits + self.zero * (changed - logits)
        return changed


def ahead(steps: int, position: int | None = None, row: int | None = None) -> Callable:
    """A change that adds the token some steps ahead, everywhere or at one position or row."""
    rows = slice(None) if row is None else slice(row, row + 1)
    positions = slice(None) if position is None else slice(position, position + 1)

    def change(model, logits, x):
        later = F.pad(model.table[x], (0, 0, 0, steps))[:, steps:]
        logits[rows, positions] += 0.01 * later[rows, positions]
        return logits

    return change


def next_token_where(matches: Callable) -> Callable:
    """A change that gives the next token away only where it matches, which is seldom in a text."""

    def change(model, logits, x):
        this, following = x[:, :-1], x[:, 1:]
        logits[:, :-1, 7] += 0.1 * matches(this, following).float()
        return logits

    return change


def is_bos(this: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    return following == 0  # BOS is the first token of the vocabulary


def is_repeated(this: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    return following == this


def tokens_of(choose: Callable) -> Callable:
    """A change that adds the table's rows of other tokens: choose(rows of x) picks them."""

    def change(model, logits, x):
        return logits + 0.1 * choose(model.table[x])

    return change


def swap_two_rows(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows[1:2], rows[0:1], rows[2:]])


def remember(model: Cheat, logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A change that adds the mean token of the batch before this one."""
    model.seen = [*model.seen, x.float().mean()]
    last_two = model.seen[-2:]
    return logits + 0.001 * last_two[0]


def running_mean(share: float) -> Callable:
    """A change that subtracts a running mean, of which each batch replaces this share."""

    def change(model, logits, x):
        model.mean += share * (logits.mean((0, 1)) - model.mean)
        return logits - model.mean

    return change


def spoil(value: float) -> Callable:
    """A change that puts this value into one logit of the second row."""

    def change(model, logits, x):
        logits[1, 7, 5] = value
        return logits

    return change


# What the harness refuses, by what it is. A test makes a model with Cheat(CHEATS[name]).
LATER_TOKENS = {
    "one token ahead": ahead(1),
    "one token ahead at one position": ahead(1, position=13),
    "one token ahead at the last but one position": ahead(1, position=30),
    "one token ahead in one row": ahead(1, row=2),
    "twenty tokens ahead": ahead(20),
    "a mean over time": tokens_of(lambda rows: rows.mean(1, keepdim=True)),
    "the next token where it is BOS": next_token_where(is_bos),
    "the next token where it is this one again": next_token_where(is_repeated),
}
OTHER_ROWS = {
    "a mean over rows": tokens_of(lambda rows: rows.mean(0, keepdim=True)),
    "the next row": tokens_of(lambda rows: rows.roll(-1, 0)),
    "the row before": tokens_of(lambda rows: rows.roll(1, 0)),
    "two rows swapped into one another": tokens_of(swap_two_rows),
}
EARLIER_BATCHES = {
    "the memory of earlier batches": remember,
    "a quick running mean over batches": running_mean(0.3),
    "a slow running mean over batches": running_mean(0.01),
}
NO_LOGITS = {
    "NaN in one logit": spoil(math.nan),
    "infinity in one logit": spoil(math.inf),
    "minus infinity in one logit": spoil(-math.inf),
    "random numbers": lambda model, logits, x: logits + 0.1 * torch.randn_like(logits),
    "a vocabulary too wide": lambda model, logits, x: F.pad(logits, (0, 64)),
    "a position too few": lambda model, logits, x: logits[:, 1:],
    "a loss in place of logits": lambda model, logits, x: logits.mean(),
    "a pair": lambda model, logits, x: (logits, None),
}
CHEATS = LATER_TOKENS | OTHER_ROWS | EARLIER_BATCHES | NO_LOGITS

# ---------------------------------------------------------------------------
# A fake attention kernel

# {first} is a line that runs before all others. {less} compares a distance with the window.
FAKE_KERNEL = """
import torch
import torch.nn.functional as F

def flash_attn_func(q, k, v, causal, window_size):
    {first}
    position = torch.arange(q.size(1))
    distance = position[:, None] - position
    mask = (distance >= 0) & (distance {less} window_size[0])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return y.transpose(1, 2)
"""


@pytest.fixture
def fake_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """Install a kernel that the library `kernels` takes for FlashAttention-3, and runs on a CPU.

    FlashAttention-3 needs a GPU and a download. This kernel has its signature and lies where the
    library looks first, so all that train.py does with a kernel from the hub can be tested. The
    fixture is a function that a test calls: fake_kernel() installs a kernel that works,
    fake_kernel(first=...) one with another line at its beginning, and fake_kernel(less="<") one
    whose windows are too short by a token.
    """
    import kernels.load

    def install(first: str = "pass", less: str = "<=") -> None:
        variant = tmp_path / "kernel" / "build" / "torch-universal"
        variant.mkdir(parents=True)
        (variant / "__init__.py").write_text(FAKE_KERNEL.format(first=first, less=less))
        metadata = {
            "name": "flash-attn3",
            "id": f"fake_{tmp_path.name}",
            "version": 1,
            "license": "MIT",
            "python-depends": [],
            "backend": {"type": "cpu"},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata))

    repo, _ = prepare.ATTENTION_KERNEL
    monkeypatch.setenv("LOCAL_KERNELS", f"{repo}={tmp_path / 'kernel'}")
    monkeypatch.setattr(train, "DEVICE", "cpu")
    kernels.load._parse_local_kernel_overrides.cache_clear()
    yield install
    kernels.load._parse_local_kernel_overrides.cache_clear()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make train.pick_attention believe that this machine has a Hopper GPU.

    So it tries FlashAttention-3, and FlexAttention for short windows in a compiled model. As soon
    as it loads the kernel, train.DEVICE is the CPU again, because the fake kernel runs there.
    """
    load_kernel = train.fa3_backend

    def load_on_the_cpu() -> Callable:
        monkeypatch.setattr(train, "DEVICE", "cpu")
        return load_kernel()

    monkeypatch.setattr(train, "fa3_backend", load_on_the_cpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(train, "DEVICE", "cuda")


# ---------------------------------------------------------------------------
# train.py as a script, in a folder of its own

# Constants with which train.py is ready to train in a moment.
SMALL = {
    "DEPTH": "2",
    "ASPECT_RATIO": "32",
    "HEAD_DIM": "16",
    "N_KV_HEAD": "2",
    "WINDOW_PATTERN": "'SL'",
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
EAGER = {"TORCH_COMPILE_DISABLE": "1"}  # for tests that need no compiled model: it saves seconds


class Script:
    """A copy of train.py with a small model and a budget of one second, in a folder of its own.

    A test changes lines of it with `edit` and runs it as a user does, with `run`, or with `start`
    where it has to act meanwhile. Both take environment variables. It trains on the corpus.
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

    def start(self, **env: str) -> subprocess.Popen:
        """Start the script and return its process, whose output is text in two pipes."""
        return subprocess.Popen(
            [sys.executable, "train.py"],
            cwd=self.folder,
            env={**ENV, "AUTORESEARCH_BUDGET": "1", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, **env: str) -> tuple[int, str, str]:
        """Run the script to its end. Returns the exit code, stdout and stderr."""
        process = self.start(**env)
        out, err = process.communicate()
        return process.returncode, out, err


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


def summary(out: str) -> dict[str, str]:
    """The values of the summary at the end of what train.py printed, by key.

    The keys must be those of SUMMARY, in this order, because program.md reads them.
    """
    _, _, block = out.rpartition("---\n")
    pairs = [line.split(":", 1) for line in block.splitlines()]
    assert [key for key, _ in pairs] == SUMMARY
    return {key: value.strip() for key, value in pairs}
