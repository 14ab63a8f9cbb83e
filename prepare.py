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
import ast
import bisect
import contextlib
import faulthandler
import functools
import hashlib
import heapq
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
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import requests
import torch
import torch.nn.functional as F
from filelock import FileLock  # comes with torch
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BPE
from torch import nn
from tqdm import tqdm


class Refusal(Exception):
    """One sentence that says what is wrong and what to do next. It ends the program."""


def print_error(kind: type, error: BaseException, traceback) -> None:
    if issubclass(kind, Refusal):
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = print_error  # Python then exits with 1


def reason(error: Exception) -> str:
    """The line of an error's message, or of what it quotes, that says what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = (r"(\berror: |cannot find ).*[^:]$", r"^[\w.]+Error: .*[^:]$", "[^:]$", "")
    found = (line for pattern in telling for line in lines if re.search(pattern, line))
    return next(found, type(error).__name__)


# ---------------------------------------------------------------------------
# Scales, device, budget, dataset


class Scale(NamedTuple):
    seq_len: int  # tokens a model sees at once
    vocab_size: int  # BOS included
    eval_rows: int  # validation rows at most, of seq_len targets each
    source: str  # where --source does not say it
    shards: int  # of climbmix: more than an H100, RTX 5090 or large Mac reads in five minutes


# A shard of climbmix holds 61M tokens, since there are 400B in 6,543 of them.
SCALES = {
    "full": Scale(seq_len=2048, vocab_size=8192, eval_rows=10240, source="climbmix", shards=10),
    "medium": Scale(seq_len=1024, vocab_size=8192, eval_rows=2048, source="climbmix", shards=5),
    "small": Scale(seq_len=256, vocab_size=2048, eval_rows=2048, source="tinystories", shards=2),
}
try:
    CACHE = Path(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch").expanduser()
except RuntimeError as error:
    raise Refusal(f"{error} Set AUTORESEARCH_CACHE to a folder that you may write.") from None
ATTENTION_KERNEL = ("kernels-community/flash-attn3", 1)  # FlashAttention-3: hub repository, version
KERNEL_PATH = CACHE / "attention_kernel"  # a file that names the folder with the kernel
# Every key and digest contains the hash of this file's syntax tree, which no comment changes.
CODE_HASH = hashlib.sha256(ast.dump(ast.parse(Path(__file__).read_bytes())).encode()).hexdigest()


def pick_device() -> str:
    """The training device: "cuda", "mps" or "cpu". Raises Refusal if torch cannot use the GPU."""
    present = torch.cuda.is_available()
    if not present and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        present = any(Path("/dev").glob("nvidia[0-9]*"))
        present = present or "GPU 0" in subprocess.getoutput("nvidia-smi -L")  # as in WSL
    if present:
        try:
            torch.ones(1, device="cuda").add(1).item()  # fails for old drivers and old GPUs alike
        except (RuntimeError, AssertionError) as error:
            raise Refusal(
                f"torch {torch.__version__} cannot use the NVIDIA GPU here ({reason(error)}); "
                "update its driver, or see the README's errors; CUDA_VISIBLE_DEVICES= takes the CPU"
            ) from None
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def default_scale() -> str:
    """The scale that suits the training device."""
    if DEVICE != "cuda":
        return "small"
    memory = torch.cuda.get_device_properties(0).total_memory  # bytes
    return "full" if memory >= 40e9 else "medium"


def from_environment(name: str, default: float, kind: type, low: float, high: float) -> float:
    """A number from an environment variable. Raises Refusal if it is not one in bounds."""
    text = os.environ.get(name) or str(default)
    with contextlib.suppress(ValueError):
        if low <= kind(text) <= high:
            return kind(text)
    raise Refusal(f"{name}={text} is not a number from {low} to {high}; unset it for {default}")


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
    """The folder and meta.json of the dataset to train on. Raises Refusal if it cannot be used."""
    if DATASET is None:
        raise Refusal("no data yet; run `uv run prepare.py` (`--source python` needs no network)")
    folder, meta = DATASET
    if meta.get("code") != CODE_HASH:
        raise Refusal("another prepare.py or Python prepared the data; run `uv run prepare.py`")
    for split in ("train", "val"):
        path, size = folder / f"{split}.bin", 2 * meta[f"{split}_rows"] * (MAX_SEQ_LEN + 1)
        if not path.exists() or path.stat().st_size != size:
            raise Refusal(f"{path} is damaged; delete its folder and run `uv run prepare.py`")
    return DATASET


# ---------------------------------------------------------------------------
# Download

HUB = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
HUB = HUB if "://" in HUB else f"https://{HUB}"
CLIMBMIX = "karpathy/climbmix-400b-shuffle"  # shards 0 to 6542; the last one is for validation
CLIMBMIX_VAL_SHARD = 6542
TINYSTORIES = "karpathy/tinystories-gpt4-clean"
RETRY_PAUSES = (1, 2, 4, 8, 16, 32)  # seconds between tries
# What time does not mend: a wrong proxy, a certificate that is not trusted, or a wrong address.
LASTING = (requests.exceptions.ProxyError, requests.exceptions.SSLError, ValueError)
progress_bar = functools.partial(tqdm, unit_scale=True, disable=None)  # shown in a terminal only


def downloads(repo: str) -> Path:
    """The folder that the files of a hub dataset are kept in."""
    return CACHE / "downloads" / repo.replace("/", "--")


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    return hashlib.sha256(pa.memory_map(str(path)).read_buffer()).hexdigest()


def sign(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Add the token. As `auth` it also keeps requests from taking another one out of ~/.netrc."""
    if token := os.environ.get("HF_TOKEN", "").strip():
        request.headers["Authorization"] = f"Bearer {token}"
    return request


def download(url: str, part: Path) -> None:
    """Append to the file `part` what it lacks of a parquet file, and check the whole.

    Raises one of requests' errors where another try can go on, and others where the part is wrong.
    """
    # Ask for the last byte again: a range that begins beyond the end would be an error.
    have = max(0, part.stat().st_size - 1) if part.exists() else 0
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
    timeout = (10, 60)  # seconds to connect, and between two reads
    with requests.get(url, headers=headers, auth=sign, stream=True, timeout=timeout) as response:
        if response.status_code == 416:  # the part is longer than the file
            part.unlink(missing_ok=True)
        response.raise_for_status()
        if response.status_code != 206:
            have = 0  # the server ignored the range: start over
        # The hub announces size and sha256 before it redirects to its storage.
        hops = (*response.history, response)
        hub = next((hop.headers for hop in hops if "X-Linked-Etag" in hop.headers), {})
        rest = int(response.headers.get("Content-Length", 0))
        size = int(hub.get("X-Linked-Size", have + rest if rest else 0))  # 0 where nobody says it
        sha256 = hub.get("X-Linked-Etag", "").strip('W/"')
        bar = progress_bar(desc=part.stem, initial=have, total=size, unit="B")
        with part.open("ab") as file, bar:
            file.truncate(have)
            for chunk in response.iter_content(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
    got = part.stat().st_size
    if got < size:
        raise requests.ConnectionError(f"{got:,} bytes arrived of {size:,}")
    if (size and got > size) or (len(sha256) == 64 and file_hash(part) != sha256):
        raise ValueError("its size or sha256 is not the one that was announced")
    pq.ParquetFile(part)


def fetch(repo: str, name: str) -> Path:
    """Download a file of a hub dataset unless it is here. Raises Refusal if it cannot be had."""
    path = downloads(repo) / name
    with contextlib.suppress(OSError, pa.ArrowException):  # it is not here, or it is damaged
        pq.ParquetFile(path)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(name + ".part")
    for pause in (0, *RETRY_PAUSES):
        time.sleep(pause)
        try:
            download(f"{HUB}/datasets/{repo}/resolve/main/{name}", part)
            os.replace(part, path)
            return path
        except requests.HTTPError as error:
            status = error.response.status_code
            why = f"HTTP {status} {error.response.reason}"
            if status in (401, 403) and os.environ.get("HF_TOKEN"):
                why += ", with the token in HF_TOKEN"
            if status in (401, 403, 404):  # it would say so again
                break
        except requests.RequestException as error:
            why = reason(error)
            if isinstance(error, LASTING):
                break
        except (pa.ArrowException, ValueError) as error:
            why = f"what arrived is no good: {reason(error)}"
            part.unlink(missing_ok=True)
    raise Refusal(
        f"cannot download {name} of {repo}: {why}; `uv run prepare.py` again resumes, "
        "and `uv run prepare.py --source python` needs no network"
    )


def default_source(scale: str) -> str:
    """The source for a scale; `python` if it is not downloaded and the hub cannot be reached."""
    source = SCALES[scale].source
    repo = CLIMBMIX if source == "climbmix" else TINYSTORIES
    if not any(downloads(repo).glob("*.parquet")):
        try:
            requests.head(HUB, timeout=10)
        except requests.RequestException as error:
            why = f"{HUB} cannot be reached ({reason(error)})"
            if isinstance(error, LASTING):
                raise Refusal(f"{why}; mend that, or use `--source python`") from None
            print(f"{why}: preparing `python` in place of `{source}`")
            return "python"
    return source


# ---------------------------------------------------------------------------
# Text sources: files -> documents

# A longer .txt or .md is cut into pieces of 2,000 characters or more: at a blank line, else at the
# end of a line, else at a space, else anywhere.
LONG_TEXT = 10_000
PIECE = r"(?s).{2000,10000}?(?:\n\s*\n|\Z)|.{2000,10000}?\n|.{2000,10000}?\s|.{1,10000}"
VAL_HASHES = 2**64 // 20  # a document validates if its hash is below: 5% of them do


def read_parquet(path: Path) -> Iterator[str]:
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024, columns=["text"]):
            # as bytes, because a column of strings may hold invalid UTF-8
            for raw in batch.column("text").drop_null().cast(pa.large_binary()).to_pylist():
                yield raw.decode("utf-8", "replace")
    except (pa.ArrowException, KeyError, OSError) as error:
        wrong = f"{path} is no parquet with text in a column `text` ({reason(error)})"
        if CACHE / "downloads" in path.parents:
            path.unlink()
            wrong += "; it is deleted now, and `uv run prepare.py` fetches it again"
        raise Refusal(wrong) from None


def read_jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = json.loads(line)["text"] if line.strip() else None
                # a lone surrogate, which JSON may spell and UTF-8 may not, becomes U+FFFD
                if text is not None:  # as where a parquet file has no text
                    yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                wrong = f"{path}, line {number} is no JSON object with a string in `text`"
                raise Refusal(wrong) from None


def read_plain(path: Path) -> Iterator[str]:
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise Refusal(f"{path} is not UTF-8 text; convert it or take it out")
    yield from re.findall(PIECE, text) if len(text) > LONG_TEXT else [text]


def read_code(path: Path) -> Iterator[str]:
    yield path.read_text("utf-8", errors="replace")


READERS = {".parquet": read_parquet, ".jsonl": read_jsonl, ".txt": read_plain, ".md": read_plain}


class Source(NamedTuple):
    name: str
    files: list[Path]  # in reading order
    val_files: Iterable[Path] = ()  # without any, a part of `files` validates


def walk(roots: Iterable[Path]) -> set[Path]:
    """These paths, and all files below them."""
    found = set(roots)
    for root in roots:
        for folder, _, names in os.walk(root, followlinks=True):
            found.update(Path(folder, name) for name in names)
    return found


def in_mixed_order(paths: Iterable[Path]) -> list[Path]:
    """The files by the hash of their names, so that the first ones are a fair sample of all."""
    files = (path for path in paths if path.is_file())
    return sorted(files, key=lambda path: (hashlib.sha256(os.fsencode(path.name)).digest(), path))


def find_source(source: str, num_shards: int) -> Source:
    """The files of a source, downloaded if need be. Raises Refusal if there are none."""
    if source == "climbmix":
        shards = [f"shard_{i:05d}.parquet" for i in (*range(num_shards), CLIMBMIX_VAL_SHARD)]
        with ThreadPoolExecutor(8) as pool:  # if one fails, those under way complete
            *train, val = pool.map(functools.partial(fetch, CLIMBMIX), shards)
        return Source(source, train, [val])
    if source == "tinystories":
        return Source(source, [fetch(TINYSTORIES, "tinystories_gpt4_clean.parquet")])
    if source == "python":
        names = ("stdlib", "purelib", "platlib")
        library, *packages = (Path(sysconfig.get_path(name)).resolve() for name in names)
        found = (path for path in walk({library, *packages}) if path.suffix == ".py")
        others = {library / "site-packages"} - set(packages)  # of another environment
        files = in_mixed_order(path for path in found if not others & set(path.parents))
        return Source(source, files)
    path = Path(source).expanduser()
    if not path.exists():
        raise Refusal(f"there is no `{source}`; name climbmix, tinystories, python or a path")
    found = walk({path})
    files = in_mixed_order(file for file in found if file.suffix.lower() in READERS)
    if not files:
        seen = ", ".join(sorted({file.suffix for file in found if file.suffix})) or "nothing"
        raise Refusal(f"{path} holds no text ({seen}); give files that end in {', '.join(READERS)}")
    return Source(re.sub(r"[^\w.-]+", "_", path.resolve().stem), files)


def documents(files: Iterable[Path]) -> Iterator[str]:
    """Every document of the files that is not blank, in order. Raises Refusal at a bad file."""
    for path in files:
        for text in READERS.get(path.suffix.lower(), read_code)(path):
            if text and not text.isspace():
                yield text


def hash_text(text: str) -> int:
    """64 bits of a hash of the words of a text, whatever white space is between them."""
    words = " ".join(text.split())
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big")


def split_documents(source: Source, validates: bool) -> Iterator[str]:
    """The documents that validate, or those that train. Only in climbmix are there copies."""
    if source.val_files:
        yield from documents(source.val_files if validates else source.files)
        return
    seen = set()
    for text in documents(source.files):
        key = hash_text(text)  # which alone decides, so that no file and no place matters
        if (key < VAL_HASHES) == validates and key not in seen:
            seen.add(key)
            yield text


def lowest_hashes(texts: Iterable[str], limit: int) -> list[str]:
    """The texts with the lowest hashes: as many as `limit` characters hold, or one."""
    lowest = []  # a heap with the highest hash at its top
    for text in texts:
        heapq.heappush(lowest, (-hash_text(text), text))
        limit -= len(text)
        while limit < 0 and len(lowest) > 1:
            limit += len(heapq.heappop(lowest)[1])
    return [text for _, text in sorted(lowest, reverse=True)]


# ---------------------------------------------------------------------------
# Tokenizer

BOS = "<|bos|>"
# GPT-4's pattern, but with at most two digits together, because a small vocabulary has no room for
# more, and 64 of anything else. Without a bound a genome would be one word of millions of letters,
# and the time for it grows with the square of its length.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}{1,64}|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]{1,64}[\r\n]{0,64}|\s{0,64}[\r\n]|\s{1,64}(?!\S)|\s{1,64}"
)
TOKENIZER_BYTES = 50_000_000  # of training text; four times as much saves 0.5% of the tokens


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
        if (limit := limit - len(text.encode())) <= 0:
            return


def tokenize(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """uint16 token ids of each text, without BOS. All cores encode."""
    texts = iter(texts)
    while batch := list(itertools.islice(texts, 256)):
        for ids in tokenizer.encode(batch):
            yield np.array(ids, np.uint16)


# ---------------------------------------------------------------------------
# Packing: token ids -> rows

WAITING = 2048  # pieces to choose from


def pack(documents: Iterable[np.ndarray], row_len: int, bos: int) -> Iterator[np.ndarray]:
    """Best-fit packing of tokenised documents into full rows (row_len,) of uint16.

    One long stream of text, cut into rows, would be simpler. But it tears most documents in two,
    and the second part has lost its past. Best fit keeps short documents whole.

    A document is cut into pieces of at most a row, with BOS before each. The longest waiting piece
    that fits goes into the row. When none fits, the longest of all is cropped to fill the row, and
    its rest goes on waiting with a BOS of its own. So only the last, unfilled row is lost.
    """
    head = np.array([bos], np.uint16)
    waiting = []  # pieces, sorted by length
    step = row_len - 1
    pieces = (
        np.concatenate([head, ids[i : i + step]])
        for ids in documents
        for i in range(0, len(ids), step)
    )
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


# ---------------------------------------------------------------------------
# Datasets on disk

MIN_ROWS = {"train": 64, "val": 8}
VAL_CHARACTERS = 8  # of text for each validation target; a token stands for three to five


def dataset_key(source: Source, scale_name: str) -> str:
    """Hash of all that determines a dataset: this file, the scale, and the text in its order."""
    train = [(path.suffix, file_hash(path)) for path in source.files]
    val = [file_hash(path) for path in source.val_files]
    parts = json.dumps([CODE_HASH, scale_name, train, val])
    return hashlib.sha256(parts.encode()).hexdigest()


def build(folder: Path, source: Source, scale_name: str, key: str) -> None:
    """Write a dataset beside `folder`, then rename it into place."""
    scale = SCALES[scale_name]
    aside = folder.with_name("building")
    shutil.rmtree(aside, ignore_errors=True)  # what a killed process left
    aside.mkdir()
    texts = head_bytes(split_documents(source, validates=False), TOKENIZER_BYTES)
    tokenizer = Tokenizer.train(texts, scale.vocab_size)
    tokenizer.bpe.save(str(aside / "tokenizer.json"))
    print(f"tokenizer  {tokenizer.get_vocab_size():,} tokens")

    meta = {"source": source.name, "scale": scale_name, "key": key, "code": CODE_HASH}
    train = split_documents(source, validates=False)
    limit = VAL_CHARACTERS * scale.eval_rows * scale.seq_len
    val = lowest_hashes(split_documents(source, validates=True), limit)
    for split, texts, max_rows in (("train", train, None), ("val", val, scale.eval_rows)):
        rows = pack(tokenize(tokenizer, texts), scale.seq_len + 1, tokenizer.bos)
        n_rows = 0
        with (aside / f"{split}.bin").open("wb") as file:
            rows = itertools.islice(rows, max_rows)
            for row in progress_bar(rows, desc=split, unit=" rows"):
                file.write(row)
                n_rows += 1
        if n_rows < MIN_ROWS[split]:
            shutil.rmtree(aside)
            raise Refusal(
                f"{source.name} has too little text: {n_rows} {split} rows of {scale.seq_len} "
                f"tokens, and {MIN_ROWS[split]} are needed; add documents or take a smaller --scale"
            )
        meta[f"{split}_rows"] = n_rows
        print(f"{split:<10} {n_rows:,} rows of {scale.seq_len} tokens")
    (aside / "meta.json").write_text(json.dumps(meta, indent=1))
    os.rename(aside, folder)


def make_dataset(source_name: str | None, scale_name: str) -> Path:
    """Make a dataset unless it is there, and select it for training. Returns its folder."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):
        name = source_name or default_source(scale_name)
        source = find_source(name, SCALES[scale_name].shards)
        key = dataset_key(source, scale_name)
        folder = CACHE / f"{source.name}-{scale_name}-{key[:12]}"
        if not folder.exists():
            build(folder, source, scale_name, key)
        pointer = CACHE / "current.part"
        pointer.write_text(folder.name + "\n")
        os.replace(pointer, CACHE / "current")
    return folder


# ---------------------------------------------------------------------------
# Clock

STARTUP_SECONDS = 600  # for one attempt to compile and to take the first steps
HANG_SECONDS = 300  # beyond the latest end, and for each batch of a check or an evaluation
LATEST_END = TIME_BUDGET + max(0.03 * TIME_BUDGET, 5)  # seconds; patience for a slow last step


def watch(seconds: float) -> None:
    """End the process in so many seconds and show where it hangs. A later call starts anew."""
    if not hasattr(sys, "ps1"):  # a person at a prompt or in a notebook may take longer
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)


@dataclass
class Run:
    """What the harness knows of the run in this process."""

    start: float | None = None  # when training rows were first read, by monotonic()
    tokens: int = 0  # drawn from the loader
    new_batches: int = 0  # drawn since the clock was read
    step_batches: int = 1  # the most between two readings of the clock: those of one step
    late_batches: int = 0  # drawn after the end
    evaluated: bool = False  # after training
    result: dict | None = None  # of evaluate_bpb


run = Run()


class Clock:
    """Counts from the moment at which training rows are first read, and excludes nothing."""

    def elapsed(self) -> float:
        """Seconds since then; 0 before. A loop reads this, or progress, before every step."""
        run.step_batches, run.new_batches = max(run.step_batches, run.new_batches), 0
        return 0.0 if run.start is None else monotonic() - run.start

    def progress(self) -> float:
        """Share of the time budget that is spent, in [0, 1]."""
        return min(self.elapsed() / TIME_BUDGET, 1.0)


clock = Clock()


# ---------------------------------------------------------------------------
# Loader


def load_rows(split: str) -> np.memmap:
    """The rows of a split, (n, MAX_SEQ_LEN + 1) uint16. Reading training rows starts the clock.

    It starts for any reader, because a count of tokens is learning, too.
    """
    folder, meta = dataset()
    if split == "train" and run.start is None:
        run.start = monotonic()
        watch(LATEST_END + HANG_SECONDS)
    shape = (meta[f"{split}_rows"], MAX_SEQ_LEN + 1)
    return np.memmap(folder / f"{split}.bin", np.uint16, "r", shape=shape)


@functools.cache
def read_ahead(path: Path) -> None:
    """Read a file once, in the background, so that it is in memory when the clock starts."""
    threading.Thread(target=file_hash, args=[path], daemon=True).start()


@functools.cache  # all loaders of a process share one order
def row_order(n_rows: int) -> Iterator[tuple[int, int]]:
    """Epoch and number of the next row, without end. Every epoch is a new permutation."""
    for epoch in itertools.count():
        generator = np.random.default_rng([torch.initial_seed(), epoch])
        for row in generator.permutation(n_rows):
            yield epoch + 1, row


def batches(B: int, T: int) -> Iterator:
    rows = load_rows("train")
    order = row_order(len(rows))
    copied = [torch.cuda.Event(), torch.cuda.Event()] if DEVICE == "cuda" else None
    for turn in itertools.count():
        if run.evaluated:
            raise Refusal("the loader gives no more batches, because evaluate_bpb was called")
        run.new_batches += 1
        run.late_batches += monotonic() - run.start > TIME_BUDGET
        if run.late_batches > run.step_batches:  # more than the step under way can need
            raise Refusal(
                f"the {TIME_BUDGET:g} s of training are over: end the loop when clock.progress() "
                "is 1; the first batch starts the clock, so compile before it, on random tokens"
            )
        run.tokens += B * T
        epochs, numbers = zip(*itertools.islice(order, B * T // MAX_SEQ_LEN), strict=True)
        batch = torch.from_numpy(rows[list(numbers)].astype(np.int64))  # (rows, MAX_SEQ_LEN + 1)
        if copied:
            batch = batch.pin_memory()  # PyTorch does not reuse this memory before it is copied
            copied[turn % 2].synchronize()  # the host is at most two batches ahead of the GPU
        batch = batch.to(DEVICE, non_blocking=bool(copied))
        if copied:
            copied[turn % 2].record()
        inputs, targets = batch[:, :-1].clone(), batch[:, 1:].clone()
        yield inputs.view(B, T), targets.view(B, T), epochs[-1]


def make_dataloader(tokenizer: Tokenizer, B: int, T: int, split: str = "train") -> Iterator:
    """Endless batches of training rows: (inputs, targets, epoch). The first one starts the clock.

    Inputs and targets are int64 (B, T) on the training device, targets one token ahead. A T below
    MAX_SEQ_LEN cuts each row into pieces. The epoch is that of the last row, counted from 1. A
    second loader goes on where the first one is. The tokenizer has no effect.
    """
    if split != "train":
        raise Refusal("the loader gives training rows only; evaluate_bpb reads the others itself")
    if B < 1 or T < 1 or MAX_SEQ_LEN % T or B * T % MAX_SEQ_LEN:
        raise Refusal(f"T = {T} must divide {MAX_SEQ_LEN}, which must divide B x T = {B * T}")
    refuse_new_names()
    read_ahead(dataset()[0] / "train.bin")
    watch(STARTUP_SECONDS)
    return batches(B, T)


# ---------------------------------------------------------------------------
# Metric: bits per byte

SLICE = 1 << 26  # logits that are handled at once in float32 (256 MB)
SPOTS = 1024  # rows that an evaluation scores alone, at least
# Rounding, too, changes scores when other tokens change. Root mean square in nats, before training
# and after it: activations in FP8 0.12 and 0.02; statistics of the batch, a leak, 0.2 and 0.13.
MAX_MEAN_CHANGE = 1e-4  # nats, or four standard errors if these are more: chance has no direction
EARLY_ROUNDING, MAX_ROUNDING = 0.16, 0.1  # nats, root mean square before training and after it
MAX_CHANGE = 0.25  # nats, root mean square when one batch is scored again
SUSPECTS, COPIES = 8, 16  # scores that change most, and copies of their rows for a closer look
CHECK_BATCHES = 4  # validation batches that check_model looks at
NOISE = 0.1  # standard deviation of what check_model adds; at 0.02 leaks hardly showed


@dataclass
class Judge:
    """Scores tokens by a model, and refuses a model that uses more than a token's own past.

    A wrong mask, a mean over time, a norm over the batch or a buffer may show it what comes later.
    One question finds them: does a token keep its score when all but its own past is replaced?
    """

    model: nn.Module
    B: int  # rows of a batch; a compiled model sees one shape only
    tokenizer: Tokenizer

    def score(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The cross-entropy (n, T) of targets (n, T) after inputs (n, T) in nats; 0 for BOS.

        Raises Refusal if the model gives anything but finite logits (B, T, vocab_size).
        """
        nats, bos = [], self.tokenizer.bos
        expected = (self.B, inputs.size(1), self.tokenizer.get_vocab_size())
        for x, y in zip(inputs.split(self.B), targets.split(self.B), strict=True):
            watch(HANG_SECONDS)  # anew for every batch: slow is not stuck
            logits = self.model(x.clone().to(DEVICE))  # a copy, which the model may change
            shape = tuple(logits.shape) if torch.is_tensor(logits) else type(logits).__name__
            if shape != expected:
                raise Refusal(f"model(inputs) must give logits {expected}, but it gives {shape}")
            if not torch.stack(logits.aminmax()).isfinite().all():
                raise Refusal("the model gives logits that are not finite")
            logits, y = logits.flatten(0, 1), y.flatten().to(logits.device)
            n = max(1, SLICE // logits.size(1))
            for z, target in zip(logits.split(n), y.split(n), strict=True):
                nats.append(F.cross_entropy(z.float(), target, ignore_index=bos, reduction="none"))
        return torch.cat(nats).view(targets.shape).cpu()

    def score_alone(self, rows: torch.Tensor, spots: torch.Tensor) -> torch.Tensor:
        """The nats (n, T) of rows (n, T + 1) that go on at random after their spots (n,)."""
        inputs, targets = rows[:, :-1], rows[:, 1:]
        later = torch.arange(inputs.size(1)) > spots[:, None]
        random = torch.randint_like(inputs, self.tokenizer.get_vocab_size())
        return self.score(torch.where(later, random, inputs), targets)

    def gain_from_later(self, row: torch.Tensor, spot: int) -> float:
        """The nats that the tokens after a spot of a row (T + 1,) save the token at the spot."""
        n = self.B * math.ceil(COPIES / self.B)  # whole rows and random ones, rounded alike
        is_whole = torch.arange(n) % 2 == 0
        spots = torch.where(is_whole, len(row), spot)  # nothing is replaced after the end
        nats = self.score_alone(row.expand(n, -1), spots)[:, spot]
        return (nats[~is_whole].mean() - nats[is_whole].mean()).item()

    def judge(self, rows: np.ndarray, n_spots: int, rounding: float) -> torch.Tensor:
        """The nats (n, T) of all targets of rows (n, T + 1). Raises Refusal if they are not honest.

        A spot is a random row and a position in it; together the spots cover all positions. Its row
        is scored alone: random tokens follow the spot, and other rows surround it. Every token up
        to the spot must keep the score of the pass over all rows, which gives the nats: a mean over
        the row shows a little everywhere, and a look-ahead by one token only at the spot. Half of
        the spots come before the pass and half after it: in their sum a memory that grows cancels.
        """
        training = self.model.training
        self.model.eval()
        n, T = len(rows), rows.shape[1] - 1
        rows = torch.from_numpy(rows.astype(np.int64))
        rows = F.pad(rows, (0, 0, 0, -n % self.B), value=self.tokenizer.bos)
        half = self.B * math.ceil(n_spots / (2 * self.B))
        chance = np.random.default_rng()  # seeded by the operating system
        row = torch.from_numpy(np.resize(chance.permutation(n), 2 * half))
        spot = torch.from_numpy(chance.permutation(2 * half) % T)

        before = self.score_alone(rows[row[:half]], spot[:half])
        nats = self.score(rows[:, :-1], rows[:, 1:])
        after = self.score_alone(rows[row[half:]], spot[half:])
        again = self.score(rows[: self.B, :-1], rows[: self.B, 1:])
        noise = (again - nats[: self.B]).square().mean().sqrt()
        if not noise <= MAX_CHANGE:
            by = f"scores change by {noise:.2g} nats"
            raise Refusal(f"the model draws random numbers or keeps a memory ({by}); it must not")

        keeps_past = torch.arange(T) <= spot[:, None]
        changes = (torch.cat([before, after]) - nats[row]).where(keeps_past, 0)
        at_spot = changes.gather(1, spot[:, None]).flatten()
        of_row = changes.sum(1) / keeps_past.sum(1).float().mean()  # whose mean is that of a token

        size, order = at_spot.abs().topk(SUSPECTS)
        gains = [self.gain_from_later(rows[row[i]], spot[i]) for i in order[size > MAX_ROUNDING]]
        found = [(gain, max(MAX_ROUNDING, 2 * noise)) for gain in gains]  # changes and limits
        found.append((changes[keeps_past].square().mean().sqrt(), max(rounding, 2 * noise)))
        for part in (slice(half), slice(half, None), slice(None)):
            for change in (at_spot[part], of_row[part]):
                by_row = torch.zeros(n).index_add(0, row[part], change - change.mean())
                error = by_row.norm() / len(change)  # of the mean, as one row may have many spots
                found.append((change.mean(), max(MAX_MEAN_CHANGE, 4 * error)))
        for change, limit in found:
            if not abs(change) <= limit:
                gains = [self.gain_from_later(rows[row[i]], spot[i]) for i in order]
                is_later = max(map(abs, gains)) > 0.01 * size[0]
                cause = "later tokens" if is_later else "other rows or earlier batches"
                by = f"scores change by {change:.2g} nats, and {limit:.2g} are allowed"
                raise Refusal(f"the score of a token depends on {cause} ({by}); it must not")
        self.model.train(training)
        return nats[:n]


@torch.no_grad()
def check_model(model: nn.Module, tokenizer: Tokenizer, batch_size: int) -> None:
    """Judge a model before the clock starts, so that a faulty one costs seconds and not minutes.

    This adds noise to all parameters, which the caller restores: a projection that is still zero
    would hide what lies behind it. It leads away from zero, as some stand under a logarithm.
    """
    for p in model.parameters():
        if p.requires_grad:
            noise = NOISE * torch.randn_like(p)
            p.add_(torch.where(p == 0, noise, noise.abs() * p.sgn()))
    rows = load_rows("val")[: CHECK_BATCHES * batch_size]
    Judge(model, batch_size, Tokenizer.from_directory()).judge(rows, MAX_SEQ_LEN, EARLY_ROUNDING)


def refuse_new_names() -> None:
    """Raise Refusal if a name of this file stands for something else since the import."""
    for name, value in AS_IMPORTED.items():
        if globals().get(name) is not value:  # as after prepare.TIME_BUDGET = 600
            raise Refusal(f"{name} of prepare.py was assigned anew; leave it as it was imported")


def harness_digest() -> str:
    """12 hex digits over all that gives val_bpb its meaning. Only equal ones allow a comparison."""
    folder, meta = dataset()
    parts = [CODE_HASH, TIME_BUDGET, meta["key"], (folder / "tokenizer.json").read_text()]
    text = json.dumps(parts).encode()
    return hashlib.sha256(text + load_rows("val").tobytes()).hexdigest()[:12]


@torch.no_grad()
def evaluate_bpb(model: nn.Module, tokenizer: Tokenizer, batch_size: int) -> float:
    """Bits per byte of the validation rows.

    A loss in nats for each token depends on the tokenizer: one that cuts a text into fewer tokens
    has more to predict in each. The bytes of the text stay the same. So we divide the nats of all
    target tokens by the bytes that these tokens stand for, and by ln 2 for bits. BOS, which stands
    for no text, counts in neither sum. Every row counts, at any batch size.

    model(inputs) must give logits (batch_size, MAX_SEQ_LEN, vocab_size). Raises Refusal if the
    training took too long or was evaluated before, and what Judge raises.
    """
    if run.evaluated:
        raise Refusal("evaluate_bpb was called before; call it once, when the training is over")
    run.evaluated = run.start is not None
    if DEVICE != "cpu":
        torch.accelerator.synchronize()
    seconds = clock.elapsed()
    if seconds > LATEST_END:
        over = f"the training took {seconds:.1f} s of a budget of {TIME_BUDGET:g} s"
        raise Refusal(f"{over}; a step was too long: lower TOTAL_BATCH_SIZE")
    tokenizer = Tokenizer.from_directory()  # the one that made the rows
    rows = load_rows("val")
    nats = Judge(model, batch_size, tokenizer).judge(rows, max(SPOTS, MAX_SEQ_LEN), MAX_ROUNDING)
    total_bytes = int(tokenizer.token_bytes()[rows[:, 1:]].sum())
    bpb = nats.sum(dtype=torch.float64).item() / (math.log(2) * total_bytes)
    refuse_new_names()
    run.result = {
        "val_bpb": f"{bpb:.6f}",
        "training_seconds": f"{seconds:.1f}",
        "total_tokens_M": f"{run.tokens / 1e6:.1f}",
        "source": dataset()[1]["source"],
        "harness": harness_digest(),
        "code": SCRIPT_HASH,
    }
    return bpb


def print_summary(rest: dict) -> None:
    """Print the summary of a run: what evaluate_bpb has measured, and the rest after it."""
    if run.result is None:
        raise Refusal("there is no result to print; call evaluate_bpb first")
    print("---")
    for key, value in (run.result | rest | run.result).items():  # the harness's values count
        print(f"{key + ':':<17} {value}")


# ---------------------------------------------------------------------------
# Command line


def fetch_attention_kernel() -> None:
    """Put FlashAttention-3 into the hub's cache and note where. A login node may do it, too."""
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
    sys.stdout.reconfigure(errors="replace")  # what an output cannot show ends no run
    parser = argparse.ArgumentParser(description="Make the dataset to train on.")
    parser.add_argument("--source", help="climbmix, tinystories, python, or a path to your text")
    parser.add_argument("--scale", choices=SCALES, default=default_scale())
    args = parser.parse_args()
    try:
        folder = make_dataset(args.source, args.scale)
    except OSError as error:
        why = f"{error.filename or CACHE}: {error.strerror or error}"
        raise Refusal(f"{why}; AUTORESEARCH_CACHE can name another folder to write to") from None
    if DEVICE == "cuda" or args.scale != "small":
        fetch_attention_kernel()
    print(f"ready      {folder.name}; next: uv run train.py")


# The running file, train.py, as it is now: it may be edited while it trains. The hash is git's, so
# `git rev-parse COMMIT:train.py` begins with it.
SCRIPT = Path(getattr(sys.modules["__main__"], "__file__", None) or __file__).read_bytes()
SCRIPT = SCRIPT.replace(b"\r\n", b"\n")  # as git stores what it checks out on Windows
SCRIPT_HASH = hashlib.sha1(b"blob %d\0" % len(SCRIPT) + SCRIPT).hexdigest()[:12]
AS_IMPORTED = dict(globals())

if __name__ == "__main__":
    main()
