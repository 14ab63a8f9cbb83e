"""
Text, tokenizer, clock and metric of autoresearch. LOCKED: nobody edits this file during a night.

    uv run prepare.py                      # the source and the scale that suit this machine
    uv run prepare.py --source python      # needs no network
    uv run prepare.py --source my_texts/   # your own .parquet, .jsonl, .txt or .md

As a script it makes a dataset out of text: a tokenizer and two files of packed rows. Imported by
train.py it gives the tokenizer, the data loader with the clock, and evaluate_bpb, the only metric.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it; nothing is half-written

import argparse
import bisect
import faulthandler
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import requests
import torch
from filelock import FileLock, Timeout  # comes with torch
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BPE
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm


def stop(message: str) -> NoReturn:
    """End the process with one sentence on stderr and exit code 1."""
    raise SystemExit(f"error: {message}")


def reason(error: Exception) -> str:
    """The line of an error's message that says what went wrong, fit for a sentence.

    It is the first line that does not end in a colon, since such a line only announces another one.
    Where the message quotes a traceback, it is the line below the traceback's frames.
    """
    text = str(error).strip() or type(error).__name__
    quoted = re.findall(r"^Traceback .*\n(?:[ \t].*\n|\n)+(\S.*)", text, re.MULTILINE)
    lines = quoted[-1:] or [line for line in text.splitlines() if line.strip()]
    return next((line for line in lines if not line.endswith(":")), lines[0])


# ---------------------------------------------------------------------------
# Scales, device, budget, dataset


class Scale(NamedTuple):
    seq_len: int  # tokens a model sees at once
    vocab_size: int  # BOS included
    eval_rows: int  # validation rows at most, of seq_len targets each
    source: str  # where --source does not say it
    shards: int  # of climbmix: what an H100, an RTX 5090 or a large Mac reads in five minutes


# A shard of climbmix holds 61M tokens, since there are 400B in 6,543 of them.
SCALES = {
    "full": Scale(seq_len=2048, vocab_size=8192, eval_rows=10240, source="climbmix", shards=16),
    "medium": Scale(seq_len=1024, vocab_size=8192, eval_rows=2048, source="climbmix", shards=6),
    "small": Scale(seq_len=256, vocab_size=2048, eval_rows=2048, source="tinystories", shards=2),
}
FULL_SCALE_BYTES = 40e9  # of GPU memory; with less, a GPU gets the scale `medium`
CACHE = Path(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch").expanduser()
ATTENTION_KERNEL = ("kernels-community/flash-attn3", 1)  # FlashAttention-3: hub repository, version
KERNEL_PATH = CACHE / "attention_kernel"  # a file that names the folder with the kernel
CODE_HASH = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # in every key and digest


def nvidia_gpu_present() -> bool:
    """Whether the machine has an NVIDIA GPU that the user has not hidden, whatever torch sees."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return False
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    smi = shutil.which("nvidia-smi")
    return bool(smi) and "GPU" in subprocess.run([smi, "-L"], capture_output=True, text=True).stdout


def pick_device() -> str:
    """The training device: "cuda", "mps" or "cpu". Ends the process if torch cannot use the GPU."""
    if torch.cuda.is_available() or nvidia_gpu_present():
        try:
            torch.ones(1, device="cuda").add(1).item()  # fails for old drivers and old GPUs alike
        except (RuntimeError, AssertionError) as error:
            stop(
                f"torch {torch.__version__} cannot use the NVIDIA GPU here ({reason(error)}); "
                "update the NVIDIA driver, or see the README's errors if you cannot; "
                "CUDA_VISIBLE_DEVICES= (empty) trains on the CPU"
            )
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def default_scale() -> str:
    """The scale that suits the training device."""
    if DEVICE != "cuda":
        return "small"
    memory = torch.cuda.get_device_properties(0).total_memory  # bytes
    return "full" if memory >= FULL_SCALE_BYTES else "medium"


def from_environment(name: str, default: float, kind: type, low: float, high: float) -> float:
    """A number from an environment variable. Ends the process if the value is not one in bounds."""
    text = os.environ.get(name) or str(default)
    try:
        value = kind(text)
    except ValueError:
        value = math.nan  # which is out of bounds, too
    if not low <= value <= high:
        stop(f"{name}={text} is not a number from {low} to {high}; unset it for {default}")
    return value


def find_dataset() -> tuple[Path, dict] | None:
    """The folder that the file `current` names, and its meta.json; None if nothing is prepared."""
    try:
        folder = CACHE / (CACHE / "current").read_text().strip()
        meta = json.loads((folder / "meta.json").read_text())
        return (folder, meta) if meta["scale"] in SCALES else None
    except (OSError, ValueError, KeyError):
        return None


DEVICE = pick_device()
TIME_BUDGET = from_environment("AUTORESEARCH_BUDGET", 300, float, 1, 86_400)  # seconds of training
DATASET = find_dataset()
SCALE = DATASET[1]["scale"] if DATASET else default_scale()
MAX_SEQ_LEN = SCALES[SCALE].seq_len


def dataset() -> tuple[Path, dict]:
    """The folder and meta.json of the dataset to train on. Ends the process if there is none."""
    if DATASET is None:
        stop("no data is prepared; run `uv run prepare.py` (`--source python` needs no network)")
    if DATASET[1].get("code") != CODE_HASH:
        stop("another version of prepare.py prepared the data; run `uv run prepare.py` again")
    return DATASET


# ---------------------------------------------------------------------------
# Download

HUB = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
CLIMBMIX = "karpathy/climbmix-400b-shuffle"  # shards 0 to 6542; the last one is for validation
CLIMBMIX_VAL_SHARD = 6542
TINYSTORIES = "karpathy/tinystories-gpt4-clean"
DOWNLOAD_THREADS = 8
RETRY_PAUSES = (1, 2, 4, 8, 16, 32)  # seconds between tries
TIMEOUT = (10, 60)  # seconds to connect, and between two reads
BYTES = {"unit": "B", "unit_scale": True}  # for a progress bar


def hub_url(path: str = "") -> str:
    """The address of a file on the hub. Ends the process if HF_ENDPOINT is no web address."""
    if not HUB.startswith(("http://", "https://")):
        stop(f"HF_ENDPOINT={HUB} is no web address; begin it with https://")
    return f"{HUB}/{path}"


class Refused(ValueError):
    """The server says no, and would say it again."""


def downloads(repo: str) -> Path:
    """The folder that the files of a hub dataset are kept in."""
    return CACHE / "downloads" / repo.replace("/", "--")


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def download(url: str, part: Path) -> None:
    """Append to the file `part` what it lacks of `url`, check it, and delete it if it is wrong.

    Raises Refused where a retry is useless, ValueError or requests' own errors where it is not.
    """
    # Ask for the last byte again: a range that begins beyond the end would be an error.
    have = max(0, part.stat().st_size - 1) if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    if token := os.environ.get("HF_TOKEN", "").strip():
        headers["Authorization"] = f"Bearer {token}"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        status = response.status_code
        if status == 416:
            part.unlink(missing_ok=True)
            raise ValueError("the server refused to resume")
        if not response.ok:
            kind = ValueError if status == 429 or status >= 500 else Refused
            raise kind(f"HTTP {status} {response.reason}")
        if status != 206:
            have = 0  # the server ignored the range: start over
        # The hub announces size and sha256 before it redirects to its storage.
        hops = (*response.history, response)
        hub = next((hop.headers for hop in hops if "X-Linked-Etag" in hop.headers), {})
        rest = int(response.headers.get("Content-Length", 0))
        size = int(hub.get("X-Linked-Size", have + rest if rest else 0))  # 0 where nobody says it
        sha256 = hub.get("X-Linked-Etag", "").strip('W/"')
        bar = tqdm(total=size or None, initial=have, desc=part.stem, disable=None, **BYTES)
        with part.open("r+b" if have else "wb") as file, bar:
            file.truncate(have)
            file.seek(have)
            for chunk in response.iter_content(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
    got = part.stat().st_size
    if got < size:
        raise ValueError(f"{got:,} bytes arrived of {size:,}")
    try:
        if size and got > size:
            raise ValueError(f"it has {got:,} bytes, and {size:,} were announced")
        if len(sha256) == 64 and file_hash(part) != sha256:
            raise ValueError("its sha256 is not the one that the hub announced")
        pq.ParquetFile(part)
    except (pa.ArrowException, OSError, ValueError) as error:
        part.unlink()
        raise ValueError(f"what arrived is no good: {reason(error)}") from None


def fetch(repo: str, name: str) -> Path:
    """Download a file of a hub dataset unless it is here. Ends the process if it cannot be had."""
    path = downloads(repo) / name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(name + ".part")
    for pause in (0, *RETRY_PAUSES):
        time.sleep(pause)
        try:
            download(hub_url(f"datasets/{repo}/resolve/main/{name}"), part)
            os.replace(part, path)
            return path
        except requests.RequestException as error:
            why = f"no connection to {HUB}, or one that broke ({type(error).__name__})"
        except ValueError as error:
            why = str(error)
            if isinstance(error, Refused):
                break
    stop(
        f"cannot download {name} of {repo}: {why}; `uv run prepare.py` again resumes, "
        "and `uv run prepare.py --source python` needs no network"
    )


def default_source(scale: str) -> str:
    """The source for a scale; `python` if it is not downloaded and the hub cannot be reached."""
    source = SCALES[scale].source
    repo = {"climbmix": CLIMBMIX, "tinystories": TINYSTORIES}[source]
    if not any(downloads(repo).glob("*.parquet")):
        try:
            requests.head(hub_url(), timeout=10)
        except requests.RequestException:
            print(f"{HUB} cannot be reached: preparing the source `python` in place of `{source}`")
            return "python"
    return source


# ---------------------------------------------------------------------------
# Text sources: files -> documents

SUFFIXES = (".parquet", ".jsonl", ".txt", ".md")
LONG_TEXT = 10_000  # characters; a longer .txt or .md is cut at blank lines
CUT_TEXT = re.compile(r".{2000,}?(?:\n[^\S\n]*\n\s*|\Z)|.+\Z", re.DOTALL)  # 2,000 characters up
VAL_FRACTION = 0.05  # of the documents validates: those with the lowest hash of their text


class Source(NamedTuple):
    name: str
    files: list[Path]  # in reading order
    val_files: list[Path] | None  # if None, a part of `files` validates


def climbmix_shard(shard: int) -> Path:
    return fetch(CLIMBMIX, f"shard_{shard:05d}.parquet")


def python_files() -> list[Path]:
    """The .py files of the standard library and of every installed package."""
    stdlib = Path(sysconfig.get_path("stdlib")).resolve()
    packages = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    nested = {"site-packages", "dist-packages"}  # folders in the library, but not of it
    found = {path for path in stdlib.rglob("*.py") if not nested & set(path.parts)}
    for folder in packages:
        found.update(folder.rglob("*.py"))
    return sorted(path for path in found if path.is_file())


def find_source(source: str, num_shards: int) -> Source:
    """The files of a source, downloaded if need be. Ends the process if there are none."""
    if source == "climbmix":
        shards = [*range(num_shards), CLIMBMIX_VAL_SHARD]
        with ThreadPoolExecutor(DOWNLOAD_THREADS) as pool:  # if one fails, those under way complete
            *train, val = pool.map(climbmix_shard, shards)
        return Source(source, train, [val])
    if source == "tinystories":
        return Source(source, [fetch(TINYSTORIES, "tinystories_gpt4_clean.parquet")], None)
    if source == "python":
        return Source(source, python_files(), None)
    path = Path(source).expanduser()
    if not path.exists():
        stop(f"no source or path `{source}`; name climbmix, tinystories, python, or your own text")
    found = path.rglob("*") if path.is_dir() else [path]
    files = sorted(p for p in found if p.suffix in SUFFIXES and p.is_file())
    if not files:
        stop(f"{path} holds no text that can be read; give files that end in {', '.join(SUFFIXES)}")
    name = re.sub(r"[^\w.-]+", "_", path.resolve().stem)
    return Source(name or "text", files, None)


def read_parquet(path: Path) -> Iterator[str]:
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024, columns=["text"]):
            # as bytes, because a column of strings may hold invalid UTF-8
            for raw in batch.column("text").drop_null().cast(pa.large_binary()).to_pylist():
                yield raw.decode("utf-8", "replace")
    except (pa.ArrowException, KeyError, OSError) as error:
        stop(f"{path} cannot be read as parquet with text in a column `text` ({reason(error)})")


def read_jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = json.loads(line)["text"] if line.strip() else ""
                # a lone surrogate, which JSON may spell and UTF-8 may not, becomes U+FFFD
                yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            except (ValueError, KeyError, TypeError, AttributeError):
                stop(f"{path}, line {number} is not a JSON object with a string in `text`")


def read_plain(path: Path) -> Iterator[str]:
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        stop(f"{path} is not UTF-8 text; convert it or take it out")
    yield from CUT_TEXT.findall(text) if len(text) > LONG_TEXT else [text]


READERS = {".parquet": read_parquet, ".jsonl": read_jsonl, ".txt": read_plain, ".md": read_plain}
READERS[".py"] = lambda path: [path.read_text("utf-8", errors="replace")]  # source `python` only


def documents(files: Iterable[Path]) -> Iterator[str]:
    """Every document of the files that is not blank, in order. Ends the process at a bad file."""
    for path in files:
        for text in READERS[path.suffix](path):
            if text and not text.isspace():
                yield text


def split_by_hash(files: list[Path]) -> tuple[np.ndarray, list[int]]:
    """Which documents train and which validate. Only the first copy of a text does either.

    Returns a boolean mask over documents(files), and the indices of the validation documents, by
    rising hash.
    """
    hashes = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in documents(files))
    hashes = np.fromiter((int.from_bytes(h, "big") for h in hashes), np.uint64)
    _, first = np.unique(hashes, return_index=True)  # sorted by hash
    n_val = max(1, round(VAL_FRACTION * len(first)))
    train = np.zeros(len(hashes), bool)
    train[first[n_val:]] = True
    return train, first[:n_val].tolist()


# ---------------------------------------------------------------------------
# Tokenizer

BOS = "<|bos|>"
# GPT-4's pattern, but with at most two digits together: a small vocabulary has no room for more
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
TOKENIZER_BYTES = 200_000_000  # of training text
ENCODE_TEXTS = 256  # documents encoded in one call


class Tokenizer:
    """Byte-level BPE with one special token, BOS. Text that spells BOS is ordinary text."""

    def __init__(self, bpe: BPE):
        bpe.encode_special_tokens = True  # text that spells BOS is ordinary; a reload forgets it
        self.bpe = bpe
        self.bos = bpe.token_to_id(BOS)

    @classmethod
    def from_directory(cls, directory: Path | None = None) -> "Tokenizer":
        """The tokenizer of the dataset to train on, or of another folder."""
        return cls(BPE.from_file(str((directory or dataset()[0]) / "tokenizer.json")))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        bpe = BPE(models.BPE())
        split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        return cls(bpe)

    def get_vocab_size(self) -> int:
        return self.bpe.get_vocab_size()

    def get_bos_token_id(self) -> int:
        return self.bos

    def encode(self, text: str | list[str], prepend: int | str | None = None) -> list:
        """Token ids of a text, or of each text in a list, after `prepend`: a token or its id."""
        if isinstance(prepend, str):
            prepend = self.bpe.token_to_id(prepend)
        head = [] if prepend is None else [prepend]
        if isinstance(text, str):
            return head + self.bpe.encode(text, add_special_tokens=False).ids
        return [head + e.ids for e in self.bpe.encode_batch_fast(text, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.bpe.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: the bytes of text that each token stands for, none for BOS."""
        # In a byte-level vocabulary every character of a token's string is one byte.
        lengths = np.array([len(self.bpe.id_to_token(i)) for i in range(self.get_vocab_size())])
        lengths[self.bos] = 0
        return lengths


def head_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The first texts, as many as it takes to reach `limit` bytes of UTF-8."""
    for text in texts:
        yield text
        limit -= len(text.encode())
        if limit <= 0:
            return


def tokenize(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """uint16 token ids of each text, without BOS. All cores encode."""
    texts = iter(texts)
    while batch := list(itertools.islice(texts, ENCODE_TEXTS)):
        for ids in tokenizer.encode(batch):
            yield np.array(ids, np.uint16)


# ---------------------------------------------------------------------------
# Packing: token ids -> rows

WAITING = 2048  # pieces to choose from


def pack(documents: Iterable[np.ndarray], row_len: int, bos: int) -> Iterator[np.ndarray]:
    """Best-fit packing of tokenised documents into full rows (row_len,) of uint16.

    A document is cut into pieces of at most a row, with BOS before each. The longest waiting piece
    that fits goes into the row. When none fits, the longest of all is cropped to fill the row, and
    its rest goes on waiting with a BOS of its own. So only the last, unfilled row is lost.
    """
    head = np.array([bos], np.uint16)
    waiting = []  # pieces, sorted by length

    def cut() -> Iterator[np.ndarray]:
        for ids in documents:
            for i in range(0, len(ids), row_len - 1):
                yield np.concatenate([head, ids[i : i + row_len - 1]])

    pieces = cut()
    while True:
        for piece in itertools.islice(pieces, WAITING - len(waiting)):
            bisect.insort(waiting, piece, key=len)
        row, room = [], row_len
        while room:
            if not waiting:
                return
            i = bisect.bisect(waiting, room, key=len) - 1  # -1, the longest of all, if none fits
            piece = waiting.pop(i)
            if len(piece) > room:
                rest = np.concatenate([head, piece[room:]])
                bisect.insort(waiting, rest, key=len)
            row.append(piece[:room])
            room -= len(row[-1])
        yield np.concatenate(row)


def write_rows(
    path: Path, texts: Iterator[str], tokenizer: Tokenizer, seq_len: int, max_rows: int | None
) -> int:
    """Tokenise and pack texts into a file of rows. Returns how many there are."""
    rows = pack(tokenize(tokenizer, texts), seq_len + 1, tokenizer.bos)
    rows = itertools.islice(rows, max_rows)
    with path.open("wb") as file:
        for row in tqdm(rows, desc=path.stem, unit=" rows", unit_scale=True, disable=None):
            file.write(row)
    return path.stat().st_size // (2 * (seq_len + 1))  # uint16


# ---------------------------------------------------------------------------
# Datasets on disk

MIN_ROWS = {"train": 64, "val": 8}


def dataset_key(source: Source, scale_name: str) -> str:
    """Hash of all that determines a dataset: this file, the scale, and the text in its order."""
    with ThreadPoolExecutor() as pool:
        train = list(pool.map(file_hash, source.files))
        val = list(pool.map(file_hash, source.val_files or []))
    suffixes = [path.suffix for path in source.files]
    parts = json.dumps([CODE_HASH, scale_name, suffixes, [train, val]])
    return hashlib.sha256(parts.encode()).hexdigest()


def split_source(source: Source) -> tuple[Iterator[str], Iterator[str], Iterator[str]]:
    """Documents to train on, to validate on, and to train the tokenizer on."""
    if source.val_files:
        # From shard 0 on, so that --num-shards does not change the tokenizer.
        shards = (climbmix_shard(number) for number in itertools.count())
        return documents(source.files), documents(source.val_files), documents(shards)
    mask, val_index = split_by_hash(source.files)
    if not mask.any():
        stop(f"{source.name} has {len(val_index)} document(s), too few to split; add text")
    held_out = set(val_index)
    val = {i: text for i, text in enumerate(documents(source.files)) if i in held_out}
    train = itertools.compress(documents(source.files), mask)
    tokenizer_texts = itertools.compress(documents(source.files), mask)
    return train, (val[i] for i in val_index), tokenizer_texts


def build(folder: Path, source: Source, scale_name: str, key: str) -> None:
    """Write a dataset beside `folder`, then rename it into place."""
    scale = SCALES[scale_name]
    aside = folder.with_name("building")
    shutil.rmtree(aside, ignore_errors=True)  # what a killed process left
    aside.mkdir()
    train, val, tokenizer_texts = split_source(source)

    start = time.time()
    tokenizer = Tokenizer.train(head_bytes(tokenizer_texts, TOKENIZER_BYTES), scale.vocab_size)
    tokenizer.bpe.save(str(aside / "tokenizer.json"))
    seconds = time.time() - start
    print(f"tokenizer  {tokenizer.get_vocab_size():,} tokens, trained in {seconds:.1f} s")

    meta = {"source": source.name, "scale": scale_name, "key": key, "code": CODE_HASH}
    for split, texts, max_rows in (("train", train, None), ("val", val, scale.eval_rows)):
        n_rows = write_rows(aside / f"{split}.bin", texts, tokenizer, scale.seq_len, max_rows)
        if n_rows < MIN_ROWS[split]:
            shutil.rmtree(aside)
            stop(
                f"{source.name} has too little text: {n_rows} {split} rows of {scale.seq_len} "
                f"tokens, and {MIN_ROWS[split]} are needed; add text or take --scale small"
            )
        meta[f"{split}_rows"] = n_rows
    (aside / "meta.json").write_text(json.dumps(meta, indent=1))
    os.rename(aside, folder)


def make_dataset(source_name: str | None, scale_name: str, num_shards: int) -> Path:
    """Make a dataset unless it is there, and select it for training. Returns its folder.

    A second process waits for the first. The next call mends what a killed process left.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    lock = FileLock(CACHE / "lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        print("waiting for another prepare.py")
        held = lock.acquire()
    with held:
        source = find_source(source_name or default_source(scale_name), num_shards)
        key = dataset_key(source, scale_name)
        folder = CACHE / f"{source.name}-{scale_name}-{key[:12]}"
        if not folder.exists():
            build(folder, source, scale_name, key)
        pointer = CACHE / "current.part"
        pointer.write_text(folder.name + "\n")
        os.replace(pointer, CACHE / "current")
    return folder


def load_rows(split: str) -> np.memmap:
    """The rows of a split, (n, MAX_SEQ_LEN + 1) uint16, mapped from disk."""
    folder, meta = dataset()
    path = folder / f"{split}.bin"
    shape = (meta[f"{split}_rows"], MAX_SEQ_LEN + 1)
    if not path.exists() or path.stat().st_size != 2 * math.prod(shape):
        stop(f"{path} is damaged; delete its folder and run `uv run prepare.py` again")
    return np.memmap(path, np.uint16, "r", shape=shape)


@functools.cache
def read_ahead(path: Path) -> None:
    """Read a file in the background, so that its rows are in memory when the clock starts."""

    def read() -> None:
        with path.open("rb") as file:
            while file.read(1 << 22):
                pass

    threading.Thread(target=read, name="read ahead", daemon=True).start()


# ---------------------------------------------------------------------------
# Clock

STARTUP_SECONDS = 600  # for one attempt to compile and to take the first steps
HANG_SECONDS = 300  # beyond the budget, and for each batch of a check or an evaluation


def watch(seconds: float) -> None:
    """End the process in so many seconds and show where it hangs. A later call starts anew."""
    if not hasattr(sys, "ps1"):  # a person at a prompt or in a notebook may take longer
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)


@dataclass
class Run:
    """What the harness knows of the run in this process."""

    start: float | None = None  # of the clock, by monotonic()
    tokens: int = 0  # drawn from the loader
    tokens_seen: int = 0  # of these, when train.py last read the clock
    steps: int = 0  # times that train.py drew tokens and then read the clock
    untrained: tuple | None = None  # the model that was checked, until the clock starts
    evaluated: bool = False
    result: dict | None = None  # of evaluate_bpb


run = Run()


class Clock:
    """Counts from the first training batch that the process draws. It can only be read."""

    __slots__ = ()

    def elapsed(self) -> float:
        """Seconds since the first batch was drawn."""
        run.steps += run.tokens > run.tokens_seen
        run.tokens_seen = run.tokens
        return 0.0 if run.start is None else monotonic() - run.start

    def progress(self) -> float:
        """Share of the time budget that is spent, in [0, 1]."""
        return min(self.elapsed() / TIME_BUDGET, 1.0)


clock = Clock()


def training_seconds() -> float:
    """Seconds that the training took. Ends the process if these are more than the budget.

    The last step may begin in time and end late. So a run may be late by a second and four mean
    steps, but not by more than 3% of the budget or 5 s.
    """
    if DEVICE != "cpu":
        torch.accelerator.synchronize()
    seconds = clock.elapsed()
    step = seconds / max(1, run.steps)
    if seconds > TIME_BUDGET + min(1 + 4 * step, max(0.03 * TIME_BUDGET, 5)):
        took = f"the training took {seconds:.1f} s of a budget of {TIME_BUDGET:g} s"
        stop(f"{took}; read the clock before a step, evaluate at once, and lower TOTAL_BATCH_SIZE")
    return seconds


# ---------------------------------------------------------------------------
# Scoring

SLICE = 1 << 26  # logits that are handled at once in float32 (256 MB)


def own_tokenizer(theirs: Tokenizer) -> Tokenizer:
    """The tokenizer that made the rows, read anew. Ends the process if theirs is another one."""
    own = Tokenizer.from_directory()
    if theirs.bpe.to_str() != own.bpe.to_str():
        stop("this tokenizer is not the one that made the rows; use Tokenizer.from_directory()")
    return own


def val_batch(number: int, batch_size: int, bos: int, ahead: int = 0) -> torch.Tensor:
    """Inputs (batch_size, MAX_SEQ_LEN) of a validation batch, or targets, which are 1 token ahead.

    Rows of BOS fill the last batch, so that a compiled model sees one shape. BOS is no target.
    """
    rows = load_rows("val")[number * batch_size : (number + 1) * batch_size]
    tokens = rows[:, ahead : ahead + MAX_SEQ_LEN].astype(np.int64)
    filled = np.pad(tokens, ((0, batch_size - len(rows)), (0, 0)), constant_values=bos)
    return torch.from_numpy(filled).to(DEVICE)


def get_logits(model: nn.Module, inputs: torch.Tensor, tokenizer: Tokenizer) -> torch.Tensor:
    """Logits (B, T, vocab_size) of inputs (B, T). Ends the process if it gets anything else."""
    watch(HANG_SECONDS)  # anew for every batch: slow is not stuck
    expected = (*inputs.shape, tokenizer.get_vocab_size())
    logits = model(inputs.clone())  # a copy, which the model may change
    # A subclass of Tensor could compute its own cross-entropy.
    shape = tuple(logits.shape) if type(logits) is torch.Tensor else type(logits).__name__
    if shape != expected:
        stop(f"model(inputs) must give logits {expected}, but it gives {shape}")
    return logits


def in_slices(logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slices along the batch: which rows, and their logits in float32, SLICE of them at most."""
    n_rows = max(1, SLICE // logits[0].numel())
    for first in range(0, len(logits), n_rows):
        rows = slice(first, first + n_rows)
        yield rows, logits[rows].float()


def token_nats(
    logits: torch.Tensor, number: int, tokenizer: Tokenizer, names: torch.Tensor | None = None
) -> torch.Tensor:
    """The cross-entropy of each target of a validation batch in nats, (B, T). BOS has none.

    The targets are read here, when the model has run: it could find them in memory. `names` gives
    each token another name. Ends the process if a logit is not finite.
    """
    targets = val_batch(number, len(logits), tokenizer.bos, ahead=1)
    targets = targets if names is None else names[targets]
    nats = []
    for rows, z in in_slices(logits):
        low, high = z.aminmax()
        if not (low.isfinite() and high.isfinite()):
            stop("the model gives logits that are not finite")
        y = targets[rows].flatten()
        nats.append(cross_entropy(z.flatten(0, 1), y, ignore_index=tokenizer.bos, reduction="none"))
    return torch.cat(nats).view(targets.shape)


# ---------------------------------------------------------------------------
# Inspection: what a model must not do
#
# A logit may depend on the tokens up to its own position, and on nothing else. So we change what it
# must not depend on, and compare. Two calls on the same input should agree in every bit, and then
# so should the others. Where the hardware makes two calls differ, we compare the nats of the true
# targets: each may differ by four times as much, but on average the change must not matter.

NOISE = 0.02  # standard deviation of what the early check adds to all trainable parameters
WARM_UPS = 4  # calls before the comparisons, so that a memory of the last few is full
MAX_WOBBLE = 1 / 4  # nats by which a token may differ when the same input comes twice
MAX_GAIN = 0.01  # nats by which a change may matter on average, where two calls differ
HEAD_START = 0.25  # nats of a token by which an untrained model may beat a uniform guess


def replacement_tokens(inputs: torch.Tensor, tokenizer: Tokenizer) -> torch.Tensor:
    """Tokens (B, T) that differ from the inputs everywhere.

    Most are random. One in sixteen is BOS and one in sixteen repeats the input before it, to catch
    a model that looks at the next token only in those cases.
    """
    vocab_size, device = tokenizer.get_vocab_size(), inputs.device
    generator = torch.Generator(device).manual_seed(0)
    distance = torch.randint(1, vocab_size, inputs.shape, generator=generator, device=device)
    kind = torch.randint(16, inputs.shape, generator=generator, device=device)
    random = (inputs + distance) % vocab_size
    special = torch.where(kind == 0, tokenizer.bos, inputs.roll(1, 1))
    return torch.where((kind <= 1) & (special != inputs), special, random)


Masks = Iterator[tuple[torch.Tensor, torch.Tensor]]  # of the tokens kept, and of those judged


def prefixes(B: int, T: int) -> Masks:
    """Masks (B, T) that keep the beginning of each row and drop what follows.

    Rows are cut at different positions, and every position is the last one kept in some mask. The
    last token that is kept in a row is the one to judge, because the next one is new.
    """
    row, position = torch.arange(B)[:, None], torch.arange(T)
    for first in range(0, T, B):
        yield position <= first + row, position == first + row


def stripes(B: int, T: int) -> Masks:
    """Masks (B, T) that keep every other row, every other two rows, every other four, and so on.

    Each mask is followed by its opposite. So for any two rows, some mask keeps only the first.
    """
    row, width = torch.arange(B)[:, None], 1
    while width < B:
        even = ((row // width) % 2 == 0).expand(B, T)
        yield even, even
        yield ~even, ~even
        width *= 2


def checksums(logits: torch.Tensor) -> torch.Tensor:
    """For each position the sum (B, T) of its logits as integers, which tells other bits."""
    sums = [z.view(torch.int32).sum(-1, dtype=torch.int32) for _, z in in_slices(logits)]
    return torch.cat(sums)


def inspect_model(model: nn.Module, number: int, batch_size: int, tokenizer: Tokenizer) -> float:
    """End the process if a logit depends on later tokens, other rows, earlier calls, or chance.

    Looks at one validation batch. Returns by how many nats of a token, on average, the hardware
    may let another call differ.
    """
    inputs = val_batch(number, batch_size, tokenizer.bos)
    others = replacement_tokens(inputs, tokenizer)
    for _ in range(WARM_UPS):
        logits = get_logits(model, inputs, tokenizer)
    base_sums, base_nats = checksums(logits), token_nats(logits, number, tokenizer)

    # The same input twice
    logits = get_logits(model, inputs, tokenizer)
    exact = torch.equal(checksums(logits), base_sums)
    wobble = (token_nats(logits, number, tokenizer) - base_nats).abs().max().item()
    if wobble > MAX_WOBBLE:
        stop("the same input gives other logits: does it draw random numbers, or keep a memory?")
    tolerance = 4 * max(wobble, 1e-6)  # float32 has no more digits

    def gap(tokens: torch.Tensor) -> torch.Tensor:
        """By how many nats (B, T) each token differs from the base."""
        return token_nats(get_logits(model, tokens, tokenizer), number, tokenizer) - base_nats

    def changes(tokens: torch.Tensor) -> torch.Tensor:
        """How much the logits at each position (B, T) change with these tokens; 0 if not at all."""
        if exact:
            return (checksums(get_logits(model, tokens, tokenizer)) != base_sums).float()
        return gap(tokens)

    # Other tokens in other rows, then other tokens after position t
    for what, masks in (("other rows or earlier batches", stripes), ("later tokens", prefixes)):
        gains = [torch.zeros(1, device=inputs.device)]  # a batch of one row has no other rows
        for kept, judged in masks(*inputs.shape):
            kept, judged = kept.to(inputs.device), judged.to(inputs.device)
            tokens = torch.where(kept, inputs, others)
            change = changes(tokens)
            if (change * kept).abs().max() > tolerance:
                by = (gap(tokens) * kept).abs().max().item()
                stop(f"the logits depend on {what} (by up to {by:.1g} nats of a token)")
            gains.append(change[judged])
        if torch.cat(gains).mean().abs() > MAX_GAIN:
            stop(f"the logits depend on {what}")
    return min(tolerance, MAX_GAIN)


@torch.no_grad()
def check_model(model: nn.Module, tokenizer: Tokenizer, batch_size: int) -> None:
    """Inspect a model before the clock starts, so that a faulty one costs seconds and not minutes.

    This adds noise to all trainable parameters, which the caller restores: a matrix that is still
    zero would hide what lies behind it. When the clock starts, check_untrained looks at the model
    again.
    """
    tokenizer = own_tokenizer(tokenizer)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=NOISE)
    training = model.training
    model.eval()
    inspect_model(model, 0, batch_size, tokenizer)
    model.train(training)
    run.untrained = (model, batch_size, tokenizer)


@torch.no_grad()
def check_untrained(model: nn.Module, batch_size: int, tokenizer: Tokenizer) -> None:
    """End the process if a model knows the text before the clock starts.

    Then it beats a uniform guess, and does so no longer when all tokens have swapped their names. A
    model that repeats what a row has shown needs no names, and may do that from the beginning.
    """
    inputs = val_batch(0, batch_size, tokenizer.bos)
    names = torch.arange(tokenizer.get_vocab_size())
    words = names[names != tokenizer.bos]
    swapped = names.clone()
    swapped[words] = words[torch.randperm(len(words), generator=torch.Generator().manual_seed(0))]
    training = model.training
    model.eval()
    nats = {}
    for kind, new_names in (("own", names.to(DEVICE)), ("swapped", swapped.to(DEVICE))):
        logits = get_logits(model, new_names[inputs], tokenizer)
        each = token_nats(logits, 0, tokenizer, new_names)
        nats[kind] = each[each != 0].mean().item()  # without BOS
    no_better = min(nats["swapped"], math.log(len(names)))
    if nats["own"] < no_better - HEAD_START:
        found = f"{nats['own']:.2f} nats per token, where {no_better:.2f} are expected"
        stop(f"the model knows the text before the clock starts ({found}); learn from batches only")
    model.train(training)


# ---------------------------------------------------------------------------
# Loader


@functools.cache  # all loaders of a process share one order
def row_order(n_rows: int) -> Iterator[tuple[int, int]]:
    """Epoch and number of the next row, without end. Every epoch is a new permutation."""
    for epoch in itertools.count():
        generator = np.random.default_rng([torch.initial_seed(), epoch])
        for row in generator.permutation(n_rows):
            yield epoch + 1, row


def start_clock() -> None:
    """Start the clock, unless it runs."""
    if run.start is not None:
        return
    if run.untrained:
        check_untrained(*run.untrained)
        run.untrained = None  # the memory of a model that train.py no longer uses
    run.start = monotonic()
    watch(TIME_BUDGET + HANG_SECONDS)


def copy_to_device(rows: np.ndarray) -> torch.Tensor:
    """The rows as int64 on the training device. On CUDA the copy goes on in the background."""
    batch = torch.from_numpy(rows.astype(np.int64))
    if DEVICE == "cuda":  # PyTorch does not reuse pinned memory before the copy is done
        return batch.pin_memory().to(DEVICE, non_blocking=True)
    return batch.to(DEVICE)


def batches(rows: np.ndarray, B: int, T: int) -> Iterator:
    order = row_order(len(rows))
    copied = [torch.cuda.Event(), torch.cuda.Event()] if DEVICE == "cuda" else None
    for turn in itertools.count():
        if run.evaluated:
            stop("the evaluation has begun, and the loader gives no more batches")
        start_clock()
        run.tokens += B * T
        drawn = list(itertools.islice(order, B * T // MAX_SEQ_LEN))
        numbers = [number for _, number in drawn]
        epoch = drawn[-1][0]
        if copied:
            copied[turn % 2].synchronize()  # the host is at most two batches ahead of the GPU
        batch = copy_to_device(rows[numbers])  # (rows, MAX_SEQ_LEN + 1)
        if copied:
            copied[turn % 2].record()
        inputs, targets = batch[:, :-1].clone(), batch[:, 1:].clone()
        yield inputs.view(B, T), targets.view(B, T), epoch


def make_dataloader(tokenizer: Tokenizer, B: int, T: int, split: str = "train") -> Iterator:
    """Endless batches of training rows: (inputs, targets, epoch).

    Inputs and targets are int64 (B, T) on the training device, targets one token ahead. A T below
    MAX_SEQ_LEN cuts each row into pieces. The epoch is that of the last row, counted from 1. The
    first batch starts the clock. A second loader goes on where the first one is.
    """
    if split != "train":
        stop("the loader gives training rows only; evaluate_bpb reads the validation rows itself")
    if B < 1 or T < 1 or MAX_SEQ_LEN % T or B * T % MAX_SEQ_LEN:
        stop(f"{B} x {T} are no whole rows: T must divide {MAX_SEQ_LEN}, which must divide B x T")
    own_tokenizer(tokenizer)
    rows = load_rows("train")
    read_ahead(rows.filename)
    watch(STARTUP_SECONDS)
    return batches(rows, B, T)


# ---------------------------------------------------------------------------
# Metric: bits per byte

LN2 = math.log(2)  # nats in a bit


def harness_digest(tokenizer: Tokenizer) -> str:
    """12 hex digits over all that gives val_bpb its meaning. Two values compare if these agree."""
    parts = [CODE_HASH, TIME_BUDGET, tokenizer.bpe.to_str(), dataset()[1]["key"]]
    text = json.dumps(parts).encode()
    return hashlib.sha256(text + load_rows("val").tobytes()).hexdigest()[:12]


def definitions() -> dict:
    """Each name of this file with what it stands for, and with its code if it is a function."""
    found = {name: value for name, value in globals().items() if name != "AS_IMPORTED"}
    for cls in (Tokenizer, Run, Clock):
        found |= {f"{cls.__name__}.{name}": value for name, value in vars(cls).items()}
    return {name: (value, getattr(value, "__code__", None)) for name, value in found.items()}


def check_harness() -> None:
    """End the process if something in this file was replaced since the import."""
    now = definitions()
    for name, (value, code) in AS_IMPORTED.items():
        if name not in now or now[name][0] is not value or now[name][1] is not code:
            stop(f"{name} of prepare.py was replaced, so the run has no val_bpb; leave it as it is")


@torch.no_grad()
def evaluate_bpb(model: nn.Module, tokenizer: Tokenizer, batch_size: int) -> float:
    """Bits per byte of the validation rows.

    The loss of a token is a number of nats. Another tokenizer cuts a text into other tokens, but
    the bytes of the text remain the same. So we divide the nats of all target tokens by the bytes
    of text that these tokens stand for, and by ln 2 for bits. BOS counts in neither sum.

    model(inputs) must give logits (batch_size, MAX_SEQ_LEN, vocab_size). Every row counts, at any
    batch size. Ends the process if the training took too long, if it was evaluated before, if a
    logit is not finite, if inspect_model refuses the model, or if the harness was changed.
    """
    if run.start is not None and run.evaluated:
        stop("evaluate_bpb was called before; call it once, when the training is over")
    run.evaluated = True
    training = model.training
    model.eval()
    seconds = training_seconds()  # the model's own eval() counts
    tokenizer = own_tokenizer(tokenizer)
    n_batches = math.ceil(len(load_rows("val")) / batch_size)
    inspected = np.random.default_rng().integers(n_batches)  # the model cannot know which
    nats = []
    again = [0, inspected, n_batches - 1]
    for number in [*range(n_batches), *again]:
        inputs = val_batch(number, batch_size, tokenizer.bos)
        logits = get_logits(model, inputs, tokenizer)
        nats.append(token_nats(logits, number, tokenizer).sum().item())
        if len(nats) == inspected + 1:
            tolerance = inspect_model(model, number, batch_size, tokenizer)
    nats, nats_again = nats[:n_batches], nats[n_batches:]
    for number, second in zip(again, nats_again, strict=True):
        if abs(second - nats[number]) > tolerance * inputs.numel():
            stop("the model carries state from one batch to the next")
    model.train(training)
    total_bytes = int(tokenizer.token_bytes()[load_rows("val")[:, 1:]].sum())
    bpb = sum(nats) / (LN2 * total_bytes)
    check_harness()
    run.result = {
        "val_bpb": f"{bpb:.6f}",
        "training_seconds": f"{seconds:.1f}",
        "total_tokens_M": f"{run.tokens / 1e6:.1f}",
        "source": dataset()[1]["source"],
        "harness": harness_digest(tokenizer),
    }
    return bpb


def print_summary(rest: dict) -> None:
    """Print the summary of a run: what evaluate_bpb has measured, and the rest after it."""
    if run.result is None:
        stop("there is no result to print; call evaluate_bpb first")
    print("---")
    for key, value in (run.result | rest | run.result).items():  # the harness's values count
        print(f"{key + ':':<17} {value}")


# ---------------------------------------------------------------------------
# Command line


def fetch_attention_kernel() -> None:
    """Put FlashAttention-3 into the hub's cache and note where, for training without a network.

    A login node without a GPU fetches it for the machines that train.
    """
    if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] not in (8, 9):
        return  # it needs Ampere, Ada or Hopper
    from kernels import install_kernel

    repo, version = ATTENTION_KERNEL
    try:
        KERNEL_PATH.write_text(str(install_kernel(repo, version=version)))
    except Exception as error:  # the library raises many kinds; all mean the same here
        if not KERNEL_PATH.exists():
            print(f"attention  {repo} cannot be had ({reason(error)}); training does without")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the dataset to train on.")
    parser.add_argument("--source", help="climbmix, tinystories, python, or a path to your text")
    parser.add_argument("--scale", choices=SCALES, default=default_scale())
    parser.add_argument("--num-shards", type=int, help="shards of climbmix to train on")
    args = parser.parse_args()
    if args.num_shards is None:
        args.num_shards = SCALES[args.scale].shards
    if not 1 <= args.num_shards <= CLIMBMIX_VAL_SHARD:
        parser.error(f"--num-shards must be between 1 and {CLIMBMIX_VAL_SHARD}")
    try:
        folder = make_dataset(args.source, args.scale, args.num_shards)
    except OSError as error:
        stop(f"{error.filename or CACHE}: {error.strerror or error}")
    if DEVICE == "cuda" or args.scale != "small":
        fetch_attention_kernel()
    meta = json.loads((folder / "meta.json").read_text())
    for split in ("train", "val"):
        print(f"{split:<10} {meta[f'{split}_rows']:,} rows of {SCALES[args.scale].seq_len} tokens")
    print(f"ready      {folder.name}; next: uv run train.py")


AS_IMPORTED = definitions()

if __name__ == "__main__":
    main()
