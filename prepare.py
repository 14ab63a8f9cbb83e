"""
Data, tokenizer, clock and metric of autoresearch. LOCKED: nobody edits this file once a run has begun.

    uv run prepare.py                      # the source and the scale that suit this machine
    uv run prepare.py --source python      # needs no network
    uv run prepare.py --source my_texts/   # your own .parquet, .jsonl, .txt or .md

Run as a script it prepares text for training, once. Imported by train.py it gives the tokenizer, the data
loader with the clock, and evaluate_bpb, the only metric that counts.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is ever half-written, so Ctrl-C ends it at once

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
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import requests
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout  # comes with torch
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BPE
from torch import nn
from tqdm import tqdm


def stop(message: str) -> NoReturn:
    """End the process with one sentence on stderr and exit code 1."""
    raise SystemExit(f"error: {message}")


def reason(error: Exception) -> str:
    """The line of an error's message that says what went wrong, fit for a sentence.

    That is the first line that does not merely announce another one by a colon at its end. Where the message
    quotes a traceback, as that of a worker of the compiler does, it is the line below the traceback's frames.
    """
    text = str(error).strip() or type(error).__name__
    quoted = re.findall(r"^Traceback .*\n(?:[ \t].*\n|\n)+(\S.*)", text, re.MULTILINE)
    lines = quoted[-1:] or text.splitlines()
    return next((line for line in lines if not line.endswith(":")), lines[0])


# ---------------------------------------------------------------------------
# Scales, device, budget


@dataclass(frozen=True)
class Scale:
    seq_len: int  # tokens a model sees at once
    vocab_size: int  # BOS included
    eval_rows: int  # validation rows at most, of seq_len targets each


SCALES = {
    "full": Scale(seq_len=2048, vocab_size=8192, eval_rows=10240),  # a CUDA GPU; 21M validation tokens
    "small": Scale(seq_len=256, vocab_size=2048, eval_rows=2048),  # CPU, Apple silicon; 0.5M of them
}
CACHE = Path(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch").expanduser()
ATTENTION_KERNEL = ("kernels-community/flash-attn3", 1)  # FlashAttention-3 on the hub: repository, version
KERNEL_PATH = CACHE / "attention_kernel"  # a file that names the folder it was put in
CODE_HASH = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # in every key and every digest


def nvidia_gpu_present() -> bool:
    """Whether the machine has an NVIDIA GPU that the user has not hidden, whatever torch thinks of it."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return False
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    smi = shutil.which("nvidia-smi")
    return bool(smi) and "GPU" in subprocess.run([smi, "-L"], capture_output=True, text=True).stdout


def pick_device() -> str:
    """The training device: "cuda", "mps" or "cpu". An NVIDIA GPU that torch cannot use ends the process."""
    if torch.cuda.is_available() or nvidia_gpu_present():
        try:
            torch.ones(1, device="cuda").add(1).item()  # one launch: catches old drivers and old GPUs alike
        except (RuntimeError, AssertionError) as error:
            stop(
                f"torch {torch.__version__} cannot use the NVIDIA GPU here ({reason(error)}); "
                "update the NVIDIA driver, or see the README's errors if you cannot; "
                "CUDA_VISIBLE_DEVICES= (empty) trains on the CPU"
            )
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def from_environment(name: str, default: float, kind: type, low: float, high: float) -> float:
    """A number from an environment variable; ends the process where it is none or out of bounds."""
    text = os.environ.get(name) or str(default)
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        stop(f"{name}={text} is not a number from {low} to {high}; unset it for the default, {default}")
    return value


def current_preparation() -> tuple[Path, dict] | None:
    """The folder that `current` names, and its meta.json; None before anything is prepared."""
    try:
        folder = CACHE / (CACHE / "current").read_text().strip()
        meta = json.loads((folder / "meta.json").read_text())
        return (folder, meta) if meta["scale"] in SCALES else None
    except (OSError, ValueError, KeyError):
        return None


DEVICE = pick_device()
TIME_BUDGET = from_environment("AUTORESEARCH_BUDGET", 300, float, 1, 300)  # seconds; less for a smoke test
PREPARATION = current_preparation()
SCALE = PREPARATION[1]["scale"] if PREPARATION else "full" if DEVICE == "cuda" else "small"
MAX_SEQ_LEN = SCALES[SCALE].seq_len


def prepared() -> tuple[Path, dict]:
    """The preparation to train on; ends the process where there is none, or one of another prepare.py."""
    if PREPARATION is None:
        stop("no data is prepared yet; run `uv run prepare.py` first (`--source python` needs no network)")
    if PREPARATION[1]["prepare"] != CODE_HASH:
        stop("the data was prepared by another version of prepare.py; run `uv run prepare.py` again")
    return PREPARATION


# ---------------------------------------------------------------------------
# Download

HUB = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
CLIMBMIX = "karpathy/climbmix-400b-shuffle"  # shards 0 to 6542; the last one is for validation
CLIMBMIX_VAL_SHARD = 6542
TINYSTORIES = "karpathy/tinystories-gpt4-clean"
NUM_SHARDS = 16  # 400B tokens in 6,543 shards are 61M each: enough for the 900M of a fast H100 run
DOWNLOAD_THREADS = 8
RETRY_PAUSES = (1, 2, 4, 8, 16, 32)  # seconds between tries
TIMEOUT = (10, 60)  # seconds to connect, and between two reads


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


def fetch(repo: str, name: str) -> Path:
    """One file of a hub dataset, downloaded unless it is here. Ends the process if it cannot be had."""
    path = downloads(repo) / name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(name + ".part")
    for pause in (*RETRY_PAUSES, None):
        try:
            download(hub_url(f"datasets/{repo}/resolve/main/{name}"), part)
            os.replace(part, path)
            return path
        except (requests.RequestException, ValueError) as error:
            broken = f"no connection to {HUB}, or one that broke ({type(error).__name__})"
            reason = broken if isinstance(error, requests.RequestException) else str(error)
            if pause is None or isinstance(error, Refused):
                stop(
                    f"cannot download {name} of {repo}: {reason}; `uv run prepare.py` again resumes, "
                    "and `uv run prepare.py --source python` needs no network"
                )
            time.sleep(pause)


def download(url: str, part: Path) -> None:
    """Append to `part` what it lacks of `url`, and check the whole; what cannot be trusted is deleted.

    Raises Refused where a retry is useless, ValueError or requests' own errors where it is not.
    """
    have = max(0, part.stat().st_size - 1) if part.exists() else 0  # a last byte to ask for, if all is here
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
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
            have = 0  # the server ignored the Range: start over
        hops = [hop.headers for hop in (*response.history, response)]
        hub = next((headers for headers in hops if "X-Linked-Etag" in headers), {})  # not the storage's
        rest = response.headers.get("Content-Length")
        size = int(hub.get("X-Linked-Size") or (have + int(rest) if rest else 0))
        bar = tqdm(total=size or None, initial=have, desc=part.stem, unit="B", unit_scale=True, disable=None)
        with part.open("r+b" if have else "wb") as file, bar:
            file.truncate(have)
            file.seek(have)
            for chunk in response.iter_content(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
    got, sha256 = part.stat().st_size, hub.get("X-Linked-Etag", "").strip('W/"')
    if got < size:
        raise ValueError(f"{got:,} bytes arrived of {size:,}")
    try:
        if size and got > size or len(sha256) == 64 and file_hash(part) != sha256:
            raise ValueError("the file differs from the one that the hub announced (size or sha256)")
        pq.ParquetFile(part)
    except (pa.ArrowException, OSError, ValueError) as error:
        part.unlink()
        raise ValueError(f"what arrived is no good: {reason(error)}") from None


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def default_source(scale: str) -> str:
    """The hub's source for a scale; `python`, with a printed line, where neither cache nor hub has it."""
    source, repo = {"full": ("climbmix", CLIMBMIX), "small": ("tinystories", TINYSTORIES)}[scale]
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
LONG_TEXT = 10_000  # characters; a longer .txt or .md is cut at blank lines into documents of 2,000 or more
CUT_TEXT = re.compile(r".{2000,}?(?:\n[^\S\n]*\n\s*|\Z)|.+\Z", re.DOTALL)
VAL_FRACTION = 0.05  # of the documents, by lowest hash of their text

# name, files in reading order, and files to validate on; None takes the validation split out of the former
Source = tuple[str, list[Path], list[Path] | None]


def find_source(source: str, num_shards: int) -> Source:
    """The files of a source, downloaded where need be. Ends the process where there are none."""
    if source == "climbmix":
        with ThreadPoolExecutor(DOWNLOAD_THREADS) as pool:  # when one fails, those under way are completed
            *train, val = pool.map(climbmix_shard, [*range(num_shards), CLIMBMIX_VAL_SHARD])
        return source, train, [val]
    if source == "tinystories":
        return source, [fetch(TINYSTORIES, "tinystories_gpt4_clean.parquet")], None
    if source == "python":
        return source, python_files(), None
    path = Path(source).expanduser()
    if not path.exists():
        stop(f"there is no source or path `{source}`; take climbmix, tinystories, python, or a path to text")
    found = path.rglob("*") if path.is_dir() else [path]
    files = sorted(p for p in found if p.suffix in SUFFIXES and p.is_file())
    if not files:
        stop(f"{path} holds no text that can be read; give files that end in {', '.join(SUFFIXES)}")
    return re.sub(r"[^\w.-]+", "_", path.resolve().stem) or "text", files, None


def climbmix_shard(shard: int) -> Path:
    return fetch(CLIMBMIX, f"shard_{shard:05d}.parquet")


def python_files() -> list[Path]:
    """The .py files of the standard library and of every installed package."""
    stdlib = Path(sysconfig.get_path("stdlib")).resolve()
    packages = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    found = {p for p in stdlib.rglob("*.py") if not {"site-packages", "dist-packages"} & set(p.parts)}
    found |= {p for folder in packages for p in folder.rglob("*.py")}
    return sorted(p for p in found if p.is_file())


def documents(files: Iterable[Path]) -> Iterator[str]:
    """Every non-blank document of the files, in order. Ends the process at a file that is not text."""
    for path in files:
        for text in READERS[path.suffix](path):
            if text and not text.isspace():
                yield text


def read_parquet(path: Path) -> Iterator[str]:
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024, columns=["text"]):
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
                stop(f"{path}, line {number} is not a JSON object with a string under the key `text`")


def read_plain(path: Path) -> Iterator[str]:
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        stop(f"{path} is not UTF-8 text; convert it or take it out")
    yield from CUT_TEXT.findall(text) if len(text) > LONG_TEXT else [text]


READERS = {".parquet": read_parquet, ".jsonl": read_jsonl, ".txt": read_plain, ".md": read_plain}
READERS[".py"] = lambda path: [path.read_text("utf-8", errors="replace")]  # for the source `python` only


def split_by_hash(files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Which documents train and which validate, with all but the first copy of a text left out.

    Returns a boolean mask over documents(files), and the indices of the validation documents by rising hash.
    """
    hashes = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in documents(files))
    hashes = np.fromiter((int.from_bytes(h, "big") for h in hashes), np.uint64)
    _, first = np.unique(hashes, return_index=True)  # sorted by hash
    n_val = max(1, round(VAL_FRACTION * len(first)))
    train = np.zeros(len(hashes), bool)
    train[first[n_val:]] = True
    return train, first[:n_val]


# ---------------------------------------------------------------------------
# Tokenizer

BOS = "<|bos|>"
# GPT-4's split pattern, but with at most two digits together: a small vocabulary has no room for more.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
TOKENIZER_BYTES = 200_000_000  # of training text
ENCODE_CHARS = 4_000_000  # characters encoded in one call


class Tokenizer:
    """Byte-level BPE with one special token, BOS. Any text encodes, and what it spells is never special."""

    def __init__(self, bpe: BPE):
        bpe.encode_special_tokens = True  # a reload forgets it
        self.bpe = bpe
        self.bos = bpe.token_to_id(BOS)

    @classmethod
    def from_directory(cls, directory: Path | None = None) -> "Tokenizer":
        """The tokenizer of the current preparation, or of another folder."""
        return cls(BPE.from_file(str((directory or prepared()[0]) / "tokenizer.json")))

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

    def encode(self, text: str | list[str], prepend: int | str | None = None) -> list[int] | list[list[int]]:
        """Token ids of a text, or of each text of a list; `prepend`, a token or its id, goes before them."""
        if isinstance(prepend, str):
            prepend = self.bpe.token_to_id(prepend)
        head = [] if prepend is None else [prepend]
        if isinstance(text, str):
            return head + self.bpe.encode(text, add_special_tokens=False).ids
        return [head + e.ids for e in self.bpe.encode_batch_fast(text, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.bpe.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: the bytes of text that each token stands for; BOS stands for none.

        In a byte-level vocabulary every character of a token's string is one byte.
        """
        lengths = np.array([len(self.bpe.id_to_token(i)) for i in range(self.get_vocab_size())])
        lengths[self.bos] = 0
        return lengths


def head_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The texts up to the one with which their UTF-8 bytes reach the limit."""
    for text in texts:
        yield text
        limit -= len(text.encode())
        if limit <= 0:
            return


def tokenize(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """uint16 token ids of each text, without BOS; encoded on all cores."""
    batch, chars = [], 0
    for text in itertools.chain(texts, [None]):
        if text is not None:
            batch.append(text)
            chars += len(text)
        if batch and (text is None or chars >= ENCODE_CHARS):
            for ids in tokenizer.encode(batch):
                yield np.array(ids, np.uint16)
            batch, chars = [], 0


# ---------------------------------------------------------------------------
# Packing: token ids -> rows

WAITING = 2048  # pieces to choose from


def pack(texts: Iterable[np.ndarray], row_len: int, bos: int) -> Iterator[np.ndarray]:
    """Best-fit packing of tokenised documents into full rows (row_len,) of uint16.

    A document is cut into pieces of at most a row, each begun by BOS. The longest waiting piece that fits
    goes in; when none fits, the longest of all is cropped to fill the row, and its rest waits on behind a BOS
    of its own. So all text ends up in a row, but for what is left when the last row cannot be filled.
    """
    head = np.array([bos], np.uint16)
    body = row_len - 1
    cut = (np.concatenate([head, ids[i : i + body]]) for ids in texts for i in range(0, len(ids), body))
    lengths, pieces = [], []  # waiting, sorted by length

    def wait(piece: np.ndarray) -> None:
        i = bisect.bisect(lengths, len(piece))
        lengths.insert(i, len(piece))
        pieces.insert(i, piece)

    while True:
        for piece in itertools.islice(cut, WAITING - len(pieces)):
            wait(piece)
        row, room = [], row_len
        while room:
            if not pieces:
                return
            i = bisect.bisect(lengths, room) - 1
            del lengths[i]
            piece = pieces.pop(i)  # i = -1: none fits, and the last is the longest
            if len(piece) > room:
                wait(np.concatenate([head, piece[room:]]))
            row.append(piece[:room])
            room -= len(row[-1])
        yield np.concatenate(row)


def write_rows(
    path: Path, texts: Iterable[str], tokenizer: Tokenizer, seq_len: int, max_rows: int | None
) -> dict[str, float]:
    """Tokenise and pack texts into a file of rows. Returns its number of rows, bytes of text, and seconds."""
    start, count = time.time(), {"rows": 0, "bytes": 0}
    token_bytes = tokenizer.token_bytes()
    rows = itertools.islice(pack(tokenize(tokenizer, texts), seq_len + 1, tokenizer.bos), max_rows)
    with path.open("wb") as file:
        for row in tqdm(rows, desc=path.stem, unit=" rows", unit_scale=True, disable=None):
            row.tofile(file)
            count["rows"] += 1
            count["bytes"] += int(token_bytes[row].sum())
    return count | {"seconds": round(time.time() - start, 1)}


# ---------------------------------------------------------------------------
# Preparations on disk

MIN_ROWS = {"train": 64, "val": 8}


def prepare(source_name: str | None, scale_name: str, num_shards: int) -> Path:
    """Prepare a source at a scale unless that was done before, and make it the one that trains.

    A second process waits for the first. A kill at any moment leaves nothing that the next call cannot mend.
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
        key = preparation_key(source, scale_name)
        folder = CACHE / f"{source[0]}-{scale_name}-{key[:12]}"
        if not folder.exists():
            build(folder, source, scale_name, key)
        pointer = CACHE / "current.part"
        pointer.write_text(folder.name + "\n")
        os.replace(pointer, CACHE / "current")
    return folder


def preparation_key(source: Source, scale_name: str) -> str:
    """Hash of all that determines a preparation: this file, the scale, and every byte of text in order."""
    _, files, val_files = source
    with ThreadPoolExecutor() as pool:
        hashes = [list(pool.map(file_hash, group)) for group in (files, val_files or [])]
    suffixes = [path.suffix for path in files]
    return hashlib.sha256(json.dumps([CODE_HASH, scale_name, suffixes, hashes]).encode()).hexdigest()


def build(folder: Path, source: Source, scale_name: str, key: str) -> None:
    """Train the tokenizer, tokenise and pack both splits, beside `folder`; then rename into place."""
    scale = SCALES[scale_name]
    name, files, val_files = source
    aside = folder.with_name("building")
    shutil.rmtree(aside, ignore_errors=True)  # what a killed process left
    aside.mkdir()
    if val_files:
        train, val = documents(files), documents(val_files)
        tokenizer_texts = documents(climbmix_shard(shard) for shard in itertools.count())
    else:
        mask, val_index = split_by_hash(files)
        if mask.sum() == 0:
            stop(f"{name} has {len(val_index)} document(s), too few to split; add text")
        wanted = set(val_index.tolist())
        picked = {i: text for i, text in enumerate(documents(files)) if i in wanted}
        val = (picked[i] for i in val_index.tolist())
        train, tokenizer_texts = (itertools.compress(documents(files), mask) for _ in range(2))

    start = time.time()
    tokenizer = Tokenizer.train(head_bytes(tokenizer_texts, TOKENIZER_BYTES), scale.vocab_size)
    tokenizer.bpe.save(str(aside / "tokenizer.json"))
    print(f"tokenizer  {tokenizer.get_vocab_size():,} tokens, trained in {time.time() - start:.1f} s")

    splits = {}
    for split, texts, max_rows in (("train", train, None), ("val", val, scale.eval_rows)):
        splits[split] = write_rows(aside / f"{split}.bin", texts, tokenizer, scale.seq_len, max_rows)
        if splits[split]["rows"] < MIN_ROWS[split]:
            shutil.rmtree(aside)
            stop(
                f"{name} has too little text: {splits[split]['rows']} {split} rows of {scale.seq_len} "
                f"tokens, and {MIN_ROWS[split]} are needed; add text or take --scale small"
            )
    meta = {
        "source": name,
        "scale": scale_name,
        "key": key,
        "prepare": CODE_HASH,
        "splits": splits,
    }
    (aside / "meta.json").write_text(json.dumps(meta, indent=1))
    os.rename(aside, folder)


def load_rows(split: str) -> np.memmap:
    """(rows, MAX_SEQ_LEN + 1) uint16 of the current preparation, mapped from disk, read-only."""
    folder, meta = prepared()
    path, shape = folder / f"{split}.bin", (meta["splits"][split]["rows"], MAX_SEQ_LEN + 1)
    if not path.exists() or path.stat().st_size != 2 * math.prod(shape):
        stop(f"{path} is damaged; delete its folder and run `uv run prepare.py` again")
    return np.memmap(path, np.uint16, "r", shape=shape)


@functools.cache
def read_ahead(path: Path) -> None:
    """Read a file once in the background, so that its rows lie in memory when the clock starts.

    One madvise over the whole mapping does not do: Linux reads no more of it than a device's window.
    """

    def read() -> None:
        with path.open("rb") as file:
            while file.read(1 << 22):
                pass

    threading.Thread(target=read, name="read ahead", daemon=True).start()


# ---------------------------------------------------------------------------
# Clock and loader

STARTUP_SECONDS = 600  # that one attempt to compile and to check the model may take
HANG_SECONDS = 300  # beyond the budget, after which a run is taken to hang


class Clock:
    """Counts from the first training batch that the process draws; nothing stops it or sets it back."""

    def __init__(self):
        self.start: float | None = None
        self.last_draw = 0.0  # seconds on this clock
        self.cursor = 0  # tokens drawn

    def elapsed(self) -> float:
        """Seconds since the first batch was drawn."""
        return 0.0 if self.start is None else time.monotonic() - self.start

    def progress(self) -> float:
        """Share of the time budget that is spent, in [0, 1]."""
        return min(self.elapsed() / TIME_BUDGET, 1.0)

    def draw(self) -> None:
        if self.start is None:
            self.start = time.monotonic()
            watch(TIME_BUDGET + HANG_SECONDS)
        self.last_draw = self.elapsed()


clock = Clock()


def watch(seconds: float) -> None:
    """Unless called again by then, the process shows in so many seconds where it hangs, and exits with 1."""
    if not hasattr(sys, "ps1"):  # a person at a prompt or in a notebook may take longer
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """End the process if this is not the tokenizer that made the rows."""
    if tokenizer.bpe.to_str() != Tokenizer.from_directory().bpe.to_str():
        stop("this tokenizer is not the one that made the rows; use Tokenizer.from_directory()")


def make_dataloader(tokenizer: Tokenizer, B: int, T: int, split: str = "train") -> Iterator:
    """Endless batches of the training rows: (inputs, targets, epoch).

    inputs and targets are int64 (B, T) on the training device, targets one token ahead; the epoch counts from
    1. T divides MAX_SEQ_LEN: a row gives MAX_SEQ_LEN / T pieces. Rows come in a new order every epoch, drawn
    from torch.initial_seed(). The first batch starts the clock; a second loader goes on where the first is.
    """
    if split != "train":
        stop("the loader gives training rows only; evaluate_bpb reads the validation rows by itself")
    if B < 1 or T < 1 or MAX_SEQ_LEN % T:
        stop(f"a batch of {B} x {T} cannot be had; T must divide {MAX_SEQ_LEN}")
    check_tokenizer(tokenizer)
    rows = load_rows("train")
    read_ahead(rows.filename)
    watch(STARTUP_SECONDS)
    return batches(np.lib.stride_tricks.sliding_window_view(rows, T + 1, axis=1)[:, ::T], B)


def batches(pieces: np.ndarray, B: int) -> Iterator:
    """Batches of B out of `pieces`, a view (rows, pieces per row, T + 1) of the rows."""
    n_rows, per_row, T = pieces.shape[0], pieces.shape[1], pieces.shape[2] - 1
    cuda = DEVICE == "cuda"
    buffers = [torch.empty(2, B, T, dtype=torch.int64, device="cpu", pin_memory=cuda) for _ in range(2)]
    copied = [torch.cuda.Event() for _ in buffers] if cuda else None

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([torch.initial_seed(), epoch]).permutation(n_rows)

    for turn in itertools.count():
        clock.draw()
        first = -(-clock.cursor // T)
        clock.cursor = (first + B) * T
        epoch, piece = np.divmod(np.arange(first, first + B), n_rows * per_row)
        row = np.concatenate([order(e)[piece[epoch == e] // per_row] for e in np.unique(epoch).tolist()])
        batch = pieces[row, piece % per_row]  # (B, T + 1) uint16
        buffer = buffers[turn % 2]
        if cuda:
            copied[turn % 2].synchronize()  # its last copy is out: at most two batches are under way
        buffer.numpy()[0] = batch[:, :-1]
        buffer.numpy()[1] = batch[:, 1:]
        inputs, targets = buffer.to(DEVICE, non_blocking=cuda, copy=True)
        if cuda:
            copied[turn % 2].record()
        yield inputs, targets, int(epoch[-1]) + 1


# ---------------------------------------------------------------------------
# Metric: bits per byte, measured by a harness that takes nothing on trust

LATEST_DRAW = TIME_BUDGET + max(0.03 * TIME_BUDGET, 5)  # seconds on the clock; a later batch voids the run
SLICE = 1 << 26  # logits handled at once in float32 (256 MB)
NOISE = 0.02  # standard deviation added to every parameter before the early check
WARM_UPS = 4  # calls on the same input before two are compared: a memory of the last few shows only then
MAX_WOBBLE = 1 / 64  # how far the same input twice may differ, as a share of the largest logit, or of 64


def harness_digest(tokenizer: Tokenizer) -> str:
    """12 hex digits over all that gives val_bpb its meaning: values compare only under the same digest."""
    parts = [CODE_HASH.encode(), str(TIME_BUDGET).encode(), tokenizer.bpe.to_str().encode()]
    parts += [load_rows("val").tobytes(), prepared()[1]["key"].encode()]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:12]


def get_logits(model: nn.Module, inputs: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """(B, T, vocab_size) logits of (B, T) inputs; ends the process if they are anything else."""
    watch(HANG_SECONDS)  # anew for every batch: slow is not stuck
    logits = model(inputs.clone())  # what the model does to its inputs is its own affair
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (*inputs.shape, vocab_size):
        stop(f"model(inputs) must give logits of shape {(*inputs.shape, vocab_size)}, not {shape}")
    return logits


def slices(logits: torch.Tensor) -> Iterator[slice]:
    """Slices of rows with at most SLICE logits each."""
    step = max(1, SLICE // logits[0].numel())
    return (slice(i, i + step) for i in range(0, len(logits), step))


def score(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], tokenizer: Tokenizer) -> torch.Tensor:
    """Nats of one batch, summed over all targets but BOS: a float32 scalar, NaN if a logit is not finite."""
    inputs, targets = batch
    logits = get_logits(model, inputs, tokenizer.get_vocab_size())
    nats = torch.zeros((), dtype=torch.float32, device=logits.device)
    for part in slices(logits):
        z, y = logits[part].float(), targets[part]
        loss = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none")
        nats += (loss * (y != tokenizer.bos).flatten()).sum() + 0 * z.amin()  # NaN for -inf; inf spoils loss
    return nats


def keep_masks(B: int, T: int) -> Iterator[torch.Tensor]:
    """Masks (B, T) of the inputs that each probe keeps.

    First every position is the last one kept, once, a different one in each row. Then whole rows are kept, by
    the bits of their numbers, so that of any two rows each is kept in some probe while the other changes.
    """
    row, position = torch.arange(B)[:, None], torch.arange(T)
    for cut in range(0, T, B):
        yield position <= cut + row
    for bit in range((B - 1).bit_length()):
        for kept in (0, 1):
            yield (row >> bit & 1 == kept).expand(B, T)


def probe(model: nn.Module, inputs: torch.Tensor, tokenizer: Tokenizer) -> float:
    """End the process if logits are not finite, or depend on later tokens, other rows or earlier batches.

    Two calls are compared bitwise. Where the same input twice differs by itself, four times that is allowed;
    the largest such difference of a logit is returned.
    """
    vocab_size, device = tokenizer.get_vocab_size(), inputs.device
    generator = torch.Generator(device).manual_seed(0)
    shift = torch.randint(1, vocab_size, inputs.shape, generator=generator, device=device)
    kind = torch.randint(16, inputs.shape, generator=generator, device=device)
    # what replaces the tokens of a probe: mostly any other one, at times BOS or the token before, repeated
    other = torch.where(kind == 0, tokenizer.bos, torch.where(kind == 1, inputs.roll(1, 1), inputs))
    other = torch.where(other == inputs, (inputs + shift) % vocab_size, other)
    everything = torch.ones_like(inputs, dtype=torch.bool)

    def gap(changed: torch.Tensor, mask: torch.Tensor) -> float:
        """Largest difference from the base logits where the mask is set."""
        logits = get_logits(model, changed, vocab_size)
        gaps = [((logits[s].float() - base[s]).norm(math.inf, -1) * mask[s]).amax() for s in slices(base)]
        largest = torch.stack(gaps).max().item()
        if not math.isfinite(largest):
            stop("the model gives logits that are not finite")
        return largest

    for _ in range(WARM_UPS):
        base = get_logits(model, inputs, vocab_size)
    base = base.clone()
    wobble = gap(inputs, everything)
    if wobble > MAX_WOBBLE * min(64, max(base.amax().item(), -base.amin().item())):
        stop("the model gives other logits for the same input: does it draw random numbers or keep a memory?")
    for mask in keep_masks(*inputs.shape):
        mask = mask.to(device)
        difference = gap(torch.where(mask, inputs, other), mask)
        if difference > 4 * wobble:
            stop(f"the logits depend on later tokens, other rows or earlier batches (by {difference:.2g})")
    if gap(inputs, everything) > 4 * wobble:
        stop("the model carries state from one batch to the next")
    return wobble


def val_batches(batch_size: int, bos: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """All validation rows as (inputs, targets). Copies of a row, with BOS targets, fill the last batch."""
    rows = load_rows("val")
    for i in range(0, len(rows), batch_size):
        part = rows[i : i + batch_size].astype(np.int64)
        part = np.pad(part, ((0, batch_size - len(part)), (0, 0)), mode="edge")
        batch = torch.from_numpy(part).to(DEVICE)
        inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].clone()
        targets[len(rows) - i :] = bos
        yield inputs, targets


@torch.no_grad()
def check_model(model: nn.Module, tokenizer: Tokenizer, batch_size: int) -> None:
    """Before the clock starts: refuse a model that evaluate_bpb would refuse after five minutes.

    Adds a little noise to all parameters, since a projection that is still zero hides what lies behind it;
    the caller restores them.
    """
    check_tokenizer(tokenizer)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=NOISE)
    training = model.training
    model.eval()
    inputs, _ = next(val_batches(batch_size, tokenizer.bos))
    probe(model, inputs, tokenizer)
    model.train(training)


@torch.no_grad()
def evaluate_bpb(model: nn.Module, tokenizer: Tokenizer, batch_size: int) -> float:
    """Bits per byte of the validation rows: total nats / (ln 2 * total bytes of the target tokens).

    model(inputs) gives logits (batch_size, MAX_SEQ_LEN, vocab_size); the cross-entropy is computed here, in
    float32. BOS targets count in neither sum, and every row counts at any batch size. Ends the process for a
    run that drew batches too long after its budget, and for a model that probe() refuses.
    """
    if clock.last_draw > LATEST_DRAW:
        stop(f"a batch was drawn {clock.last_draw:.1f} s into a budget of {TIME_BUDGET:g} s; stop in time")
    check_tokenizer(tokenizer)
    training = model.training
    model.eval()
    inputs, _ = first = next(val_batches(batch_size, tokenizer.bos))
    wobble = probe(model, inputs, tokenizer)
    nats = []
    for last in val_batches(batch_size, tokenizer.bos):
        nats.append(score(model, last, tokenizer))
    total_nats = torch.stack(nats).cpu().double().sum().item()
    if not math.isfinite(total_nats):
        stop("the model gives logits that are not finite")
    for batch, before in ((first, nats[0]), (last, nats[-1])):
        # a logit that moves by no more than four wobbles moves the loss of its target by no more than eight
        if not (score(model, batch, tokenizer) - before).abs() <= 8 * wobble * inputs.numel():
            stop("a batch scores differently the second time: the model carries state between batches")
    model.train(training)
    total_bytes = int(tokenizer.token_bytes()[load_rows("val")[:, 1:]].sum())
    return total_nats / (math.log(2) * total_bytes)


# ---------------------------------------------------------------------------
# Command line


def fetch_attention_kernel() -> None:
    """Put FlashAttention-3 into the hub's cache and note where, so that training needs no network."""
    if torch.cuda.get_device_capability()[0] not in (8, 9):
        return
    from kernels import install_kernel

    repo, version = ATTENTION_KERNEL
    try:
        KERNEL_PATH.write_text(str(install_kernel(repo, version=version)))
    except Exception as error:  # the library raises many kinds; all mean the same here
        if not KERNEL_PATH.exists():
            print(f"attention  {repo} cannot be had ({reason(error)}); training does without")


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare text for training: once per source and scale.")
    parser.add_argument("--source", help="climbmix, tinystories, python, or a path to text of your own")
    parser.add_argument("--scale", choices=SCALES, default="full" if DEVICE == "cuda" else "small")
    parser.add_argument("--num-shards", type=int, default=NUM_SHARDS, help="training shards of climbmix")
    args = parser.parse_args()
    if not 1 <= args.num_shards <= CLIMBMIX_VAL_SHARD:
        parser.error(f"--num-shards must be between 1 and {CLIMBMIX_VAL_SHARD}")
    try:
        folder = prepare(args.source, args.scale, args.num_shards)
    except OSError as error:
        stop(f"{error.filename or CACHE}: {error.strerror or error}")
    if DEVICE == "cuda":
        fetch_attention_kernel()
    meta = json.loads((folder / "meta.json").read_text())
    for split, count in meta["splits"].items():
        print(
            f"{split:<10} {count['rows']:,} rows of {SCALES[args.scale].seq_len} tokens, "
            f"{count['bytes'] / 1e6:.1f} MB of text, in {count['seconds']} s"
        )
    print(f"ready      {folder.name}; next: uv run train.py")


if __name__ == "__main__":
    main()
