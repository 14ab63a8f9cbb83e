"""Claims about prepare.py: text, tokenizer, packing, downloads, loader, clock and metric."""

import contextlib
import ctypes
import functools
import json
import math
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CHEATS,
    CORPUS,
    CUDA,
    EARLIER_BATCHES,
    ENV,
    LATER_TOKENS,
    OTHER_ROWS,
    ROOT,
    TEXTS,
    VAL,
    Cheat,
    Toy,
    ahead,
    parquet,
    spoil,
)
from torch import nn
from torch._inductor.compile_worker.subproc_pool import SubprocException, SubprocPool

import prepare
from prepare import Tokenizer, check_model, evaluate_bpb, make_dataloader

ODD_TEXTS = [
    "",
    "plain",
    "naïve café, 你好，世界 — ١٢٣ 👩‍👩‍👧‍👦🏳️‍🌈",
    "".join(map(chr, range(0x250))),
    "\ufeff\u200b\u0000\x7f \t\r\n\n  tail ",
    "<|bos|> spelled <|bos|><|bos|>",
    "12345678901234567890 don't DON'T",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_directory()


def run(*args, **env):
    """Run Python with these arguments, such as prepare.py, in a process of its own."""
    command = [sys.executable, *map(str, args)]
    env = {**ENV, **env}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def start(command, env):
    """Start a process whose output, errors included, is text in one pipe."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=env, **pipes)


def run_twice_at_once(command, env):
    """Run the same command in two processes at once. Returns what each of them printed."""
    both = [start(command, env), start(command, env)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    return outputs


# ---------------------------------------------------------------------------
# Tokenizer


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_token_bytes_sum_to_the_bytes_of_any_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_token_bytes_are_exact_for_tokens_that_are_parts_of_characters():
    emoji = [chr(c) for c in range(0x1F600, 0x1F640)]
    tokenizer = Tokenizer.train(emoji * 9, 300)
    alphabet = {c for token in tokenizer.bpe.get_vocab() for c in token if token != prepare.BOS}
    assert len(alphabet) == 256
    token_bytes = tokenizer.token_bytes()
    parts = [i for i in range(300) if "\ufffd" in tokenizer.decode([i]) and token_bytes[i] > 1]
    assert parts, "no token is a part of a character, so this test would claim nothing"
    for text in [*emoji, "".join(emoji), "é😀"]:
        assert token_bytes[tokenizer.encode(text)].sum() == len(text.encode())


def test_text_that_spells_bos_is_ordinary_text_also_after_a_reload(tokenizer):
    assert tokenizer.get_bos_token_id() not in tokenizer.encode("a <|bos|> b")
    assert tokenizer.token_bytes()[tokenizer.get_bos_token_id()] == 0


def test_encode_takes_a_text_or_a_list_and_prepends(tokenizer):
    bos = tokenizer.get_bos_token_id()
    one, two = tokenizer.encode("one"), tokenizer.encode("two 2")
    assert tokenizer.encode(["one", "two 2"]) == [one, two]
    assert tokenizer.encode("one", prepend=bos) == [bos, *one]
    assert tokenizer.encode("one", prepend="<|bos|>") == [bos, *one]
    assert tokenizer.encode(["one", "two 2"], prepend=bos) == [[bos, *one], [bos, *two]]


def test_at_most_two_digits_share_a_token():
    digits = Tokenizer.train(["12345678 " * 200], 300)
    assert [digits.decode([i]) for i in digits.encode("12345678")] == ["12", "34", "56", "78"]


# ---------------------------------------------------------------------------
# Packing


def naive_pack(documents, row_len, bos, waiting_limit):
    """A reference for pack: the rule of its docstring, by a search through an unsorted list.

    Of several waiting pieces of the same length, the one that came last goes first.
    """
    pieces = []
    for document in documents:
        for i in range(0, len(document), row_len - 1):
            pieces.append([bos, *document[i : i + row_len - 1]])
    waiting, rows = [], []
    while True:
        while pieces and len(waiting) < waiting_limit:
            waiting.append(pieces.pop(0))
        row = []
        while len(row) < row_len:
            if not waiting:
                return rows
            room = row_len - len(row)
            candidates = [piece for piece in waiting if len(piece) <= room] or waiting
            longest = max(len(piece) for piece in candidates)
            last = max(i for i, piece in enumerate(waiting) if len(piece) == longest)
            piece = waiting.pop(last)
            row += piece[:room]
            if len(piece) > room:
                waiting.append([bos, *piece[room:]])
        rows.append(row)


def test_packing_of_three_documents_by_hand():
    documents = [np.array(ids, np.uint16) for ids in ([1, 2], [3, 4, 5, 6, 7, 8], [9])]
    rows = [row.tolist() for row in prepare.pack(iter(documents), 5, 0)]
    # The pieces with their BOS, which is 0: [0 1 2], [0 3 4 5 6], [0 7 8] and [0 9]. The second one
    # fills a row. [0 7 8] and [0 9] fill the next. [0 1 2] fills none, so it is lost.
    assert rows == [[0, 3, 4, 5, 6], [0, 7, 8, 0, 9]]


@pytest.mark.parametrize("row_len, waiting", [(17, 5), (33, 40), (257, 2048)])
def test_packing_is_best_fit(monkeypatch, row_len, waiting):
    monkeypatch.setattr(prepare, "WAITING", waiting)
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 500, n).astype(np.uint16) for n in rng.geometric(0.02, 600)]
    rows = [row.tolist() for row in prepare.pack(iter(documents), row_len, 0)]
    assert rows == naive_pack([ids.tolist() for ids in documents], row_len, 0, waiting)


def test_every_row_begins_with_bos_and_all_text_but_the_last_row_survives(tokenizer):
    documents = list(prepare.tokenize(tokenizer, TEXTS))
    rows = np.stack(list(prepare.pack(iter(documents), 257, tokenizer.bos)))
    assert (rows[:, 0] == tokenizer.bos).all()
    text = np.concatenate(documents)
    kept = rows[rows != tokenizer.bos]
    assert len(text) - 257 * 2 < len(kept) <= len(text)
    assert Counter(kept.tolist()) <= Counter(text.tolist())


# ---------------------------------------------------------------------------
# Sources and splits


def split(source):
    """What prepare.py does with the documents of a source: a list to train on, and one to validate.

    The second list is in the order in which its documents are packed into rows.
    """
    files = prepare.find_source(str(source), 1).files
    documents = list(prepare.documents(files))
    mask, val_index = prepare.split_by_hash(files)
    train = [text for text, trains in zip(documents, mask, strict=True) if trains]
    return train, [documents[i] for i in val_index]


def write_jsonl(path, texts):
    """Write a .jsonl file with a document in each line, and return its path."""
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def test_no_validation_document_occurs_in_training(tiny):
    train, val = split(CORPUS)
    assert set(train) | set(val) == set(TEXTS) and not set(train) & set(val)

    tokenizer = Tokenizer.from_directory()
    train_text, val_text = "\0".join(train), "\0".join(val)
    train_rows = {row.tobytes() for row in prepare.load_rows("train")}
    own = 0  # rows with a text that stands in no training document
    for row in prepare.load_rows("val"):
        if tokenizer.bos in row[1:]:
            continue  # The row holds pieces of several documents.
        text = tokenizer.decode(row[1:])
        assert text in val_text or "\ufffd" in text  # A row may end inside a character.
        if text not in train_text:  # Two documents may share some lines.
            assert row.tobytes() not in train_rows
            own += 1
    assert own > 10
    assert len(prepare.load_rows("val")) == 40


def test_the_split_depends_on_the_texts_alone(tmp_path):
    texts = [f"document {i}\n" * (5 + i % 7) for i in range(300)]
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    pq.write_table(pa.table({"text": texts}), one / "all.parquet")
    for i, text in enumerate(reversed(texts + texts[:50])):  # 50 documents occur twice
        (two / f"{i:03d}.txt").write_text(text)
    train, val = split(one)
    train_of_two, val_of_two = split(two)
    assert val == val_of_two and set(train) == set(train_of_two)
    assert len(train) == len(train_of_two) == 285 and len(val) == 15  # 5% of 300
    assert len(set(val)) == 15 and set(train) | set(val) == set(texts)


def test_a_smaller_source_validates_on_the_first_of_the_same_documents(tmp_path):
    texts = [f"document {i}" for i in range(300)]
    train, val = split(write_jsonl(tmp_path / "all.jsonl", texts))
    assert len(val) == 15
    fewer = sorted(val + train[:85])  # 100 documents, of which 5 validate
    assert split(write_jsonl(tmp_path / "fewer.jsonl", fewer))[1] == val[:5]


def test_documents_of_every_format(tmp_path):
    pq.write_table(
        pa.table({"text": ["from parquet", None, ""], "n": [1, 2, 3]}), tmp_path / "a.parquet"
    )
    (tmp_path / "b.jsonl").write_text(
        '{"text": "lone \\ud800 surrogate"}\n\n{"text": "\\ud83d\\ude00", "id": 1}\n'
    )
    (tmp_path / "c.txt").write_bytes("\ufeffwith a byte order mark".encode())
    (tmp_path / "d.md").write_text("# short\n\nstays whole\n")
    (tmp_path / "e.csv").write_text("not read")
    assert list(prepare.documents(prepare.find_source(str(tmp_path), 1)[1])) == [
        "from parquet",
        "lone \ufffd surrogate",
        "😀",
        "with a byte order mark",
        "# short\n\nstays whole\n",
    ]


def test_a_long_text_is_cut_at_blank_lines(tmp_path):
    paragraphs = [f"paragraph {i} " + "word " * (i % 90) for i in range(200)]
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs))
    documents = list(prepare.documents([path]))
    assert len(documents) > 10
    assert "".join(documents) == path.read_text()
    assert all(document.endswith("\n\n") and len(document) >= 2000 for document in documents[:-1])
    assert all(document.startswith("paragraph") for document in documents)


def test_invalid_utf8_in_parquet_is_replaced(tmp_path):
    raw = pa.array([b"ok \xff\xfe"], pa.binary())
    text = pa.StringArray.from_buffers(1, *raw.buffers()[1:])
    pq.write_table(pa.table({"text": text}), tmp_path / "x.parquet")
    assert list(prepare.documents([tmp_path / "x.parquet"])) == ["ok \ufffd\ufffd"]


BAD_SOURCES = {
    "no such path": (None, "no source or path"),
    "empty folder": ({}, "holds no text"),
    "wrong suffix": ({"a.csv": b"x"}, "holds no text"),
    "no column text": ({"a.parquet": parquet(body=["x"])}, "`text`"),
    "numbers as text": ({"a.parquet": parquet(text=[1])}, "`text`"),
    "not parquet": ({"a.parquet": b"rubbish"}, "cannot be read as parquet"),
    "half a parquet": ({"a.parquet": parquet(text=["x"])[:-9]}, "cannot be read as parquet"),
    "no key text": ({"a.jsonl": b'{"text": "x"}\n{"body": 1}\n'}, "line 2"),
    "text is a number": ({"a.jsonl": b'{"text": 5}'}, "line 1"),
    "not json": ({"a.jsonl": b"\x00\xff rubbish"}, "line 1"),
    "binary rubbish": ({"a.txt": bytes(range(256)) * 99}, "not UTF-8 text"),
    "nul bytes": ({"a.md": b"text\0text"}, "not UTF-8 text"),
    "nothing but blanks": ({"a.txt": b" \n\n "}, "too few"),
    "one document": ({"a.txt": b"word " * 1000}, "too few"),
    "too little text": ({f"{i}.txt": f"text {i}".encode() for i in range(9)}, "too little"),
}


@pytest.mark.parametrize("files, reason", BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_bad_sources_end_in_one_sentence_and_leave_nothing(tmp_path, cache, files, reason):
    folder = tmp_path / "source"
    if files is not None:
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
    with pytest.raises(SystemExit) as stopped:
        prepare.make_dataset(str(folder), "small", 1)
    message = str(stopped.value.code)
    assert message.startswith("error: ") and reason in message and "\n" not in message
    assert not (cache / "current").exists() and not list(cache.glob("source-*"))


@pytest.mark.parametrize(
    "fraction, documents, words, reason",
    [
        # Two documents of 300 words validate, and 198 train.
        (0.01, 200, 300, r"\d val rows of 256 tokens, and 8 are needed"),
        # Five documents of 1,000 words validate, and five train.
        (0.5, 10, 1000, r"\d train rows of 256 tokens, and 64 are needed"),
    ],
)
def test_too_little_text_names_the_split_that_lacks_it(
    tmp_path, cache, monkeypatch, fraction, documents, words, reason
):
    monkeypatch.setattr(prepare, "VAL_FRACTION", fraction)
    monkeypatch.setattr(prepare, "MIN_ROWS", {"train": 64, "val": 8})
    texts = [f"{i} " + "word " * words for i in range(documents)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    with pytest.raises(SystemExit, match=reason):
        prepare.make_dataset(str(source), "small", 1)


# ---------------------------------------------------------------------------
# Preparations on disk


def test_preparing_again_is_the_same_folder_and_other_inputs_are_others(tmp_path, cache):
    source = tmp_path / "mine"
    source.mkdir()
    write_jsonl(source / "a.jsonl", TEXTS[:60])
    first = prepare.make_dataset(str(source), "small", 1)
    stamp = (first / "meta.json").stat().st_mtime_ns
    moved = tmp_path / "moved" / "mine"
    moved.parent.mkdir()
    source.rename(moved)
    assert prepare.make_dataset(str(moved), "small", 1) == first
    assert (first / "meta.json").stat().st_mtime_ns == stamp
    write_jsonl(moved / "a.jsonl", TEXTS[:61])
    second = prepare.make_dataset(str(moved), "small", 1)
    assert second != first and first.exists()
    assert (cache / "current").read_text() == second.name + "\n"
    assert prepare.dataset_key(prepare.find_source(str(moved), 1), "full")[:12] not in second.name


def test_the_same_inputs_give_the_same_digest_and_rows(tiny, cache, monkeypatch):
    tokenizer = Tokenizer.from_directory()
    digest = prepare.harness_digest(tokenizer)
    train, val = (tiny / "train.bin").read_bytes(), (tiny / "val.bin").read_bytes()
    shutil.rmtree(tiny)
    assert prepare.make_dataset(str(CORPUS), "tiny", 1) == tiny
    assert (tiny / "train.bin").read_bytes() == train
    assert (tiny / "val.bin").read_bytes() == val
    assert prepare.harness_digest(Tokenizer.from_directory()) == digest
    assert re.fullmatch("[0-9a-f]{12}", digest)


def test_another_budget_code_dataset_or_tokenizer_gives_another_digest(tiny, monkeypatch):
    tokenizer = Tokenizer.from_directory()
    digest = prepare.harness_digest(tokenizer)
    folder, meta = prepare.DATASET
    others = {
        "TIME_BUDGET": 30.0,
        "CODE_HASH": "edited",
        "DATASET": (folder, meta | {"key": "other text to train on"}),
        "load_rows": lambda split: np.zeros((40, 33), np.uint16),
    }
    for name, value in others.items():
        with monkeypatch.context() as patch:
            # prepare.dataset() refuses data that another code has made.
            patch.setattr(prepare, "dataset", lambda: prepare.DATASET)
            patch.setattr(prepare, name, value)
            assert prepare.harness_digest(tokenizer) != digest, name
    assert prepare.harness_digest(Tokenizer.train(TEXTS[:9], 512)) != digest
    assert prepare.harness_digest(tokenizer) == digest


def test_a_kill_at_any_moment_leaves_nothing_that_a_rerun_does_not_mend(tmp_path):
    env = {**ENV, "AUTORESEARCH_CACHE": str(tmp_path)}
    command = [sys.executable, ROOT / "prepare.py", "--source", CORPUS, "--scale", "small"]
    for moment in ("building", "building/tokenizer.json", "building/train.bin"):
        process = start(command, env)
        while not (tmp_path / moment).exists() and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"it ended before {moment} was there"
        assert not (tmp_path / "current").exists() and not list(tmp_path.glob("corpus-*"))
    outputs = run_twice_at_once(command, env)
    current = (tmp_path / "current").read_text().strip()
    assert [path.name for path in tmp_path.glob("corpus-*")] == [current]
    assert not (tmp_path / "building").exists()
    assert sum("waiting for another" in output for output in outputs) <= 1


def test_damaged_rows_are_refused(tiny):
    (tiny / "train.bin").write_bytes((tiny / "train.bin").read_bytes()[:-2])
    with pytest.raises(SystemExit, match="damaged"):
        make_dataloader(Tokenizer.from_directory(), 2, 32, "train")


# ---------------------------------------------------------------------------
# Downloads, from the hub with faults


def fetched(cache):
    """The files that were downloaded into a cache, those that are not complete included."""
    return {path.name: path.read_bytes() for path in cache.glob("downloads/*/*")}


def test_climbmix_is_prepared_from_shards_with_the_last_one_for_validation(hub, cache):
    one = prepare.make_dataset("climbmix", "small", 1)
    assert set(fetched(cache)) == {"shard_00000.parquet", VAL}
    two = prepare.make_dataset("climbmix", "small", 2)
    assert fetched(cache) == hub.files and one != two
    assert (one / "tokenizer.json").read_bytes() == (two / "tokenizer.json").read_bytes()
    assert (one / "val.bin").read_bytes() == (two / "val.bin").read_bytes()
    served = len(hub.requests)
    assert prepare.make_dataset("climbmix", "small", 2) == two and len(hub.requests) == served


@pytest.mark.parametrize("fault", ["truncated", "sha256", "html", "drop", 429, 503])
def test_a_passing_fault_is_retried(hub, cache, fault):
    hub.faults["shard_00000.parquet"] = [fault, fault, ""]
    path = prepare.fetch(prepare.CLIMBMIX, "shard_00000.parquet")
    assert path.read_bytes() == hub.files["shard_00000.parquet"]
    assert set(fetched(cache)) == {"shard_00000.parquet"}


def test_a_dropped_connection_resumes_where_it_broke(hub, cache):
    hub.faults["shard_00000.parquet"] = ["drop", ""]
    prepare.fetch(prepare.CLIMBMIX, "shard_00000.parquet")
    broke_at = len(hub.files["shard_00000.parquet"]) // 3
    (_, first), (_, second) = hub.requests
    assert first == 0 and broke_at - 100_000 < second <= broke_at


def test_a_server_that_ignores_the_range_starts_over(hub, cache):
    hub.faults["shard_00000.parquet"] = ["drop", "no range"]
    path = prepare.fetch(prepare.CLIMBMIX, "shard_00000.parquet")
    assert path.read_bytes() == hub.files["shard_00000.parquet"] and len(hub.requests) == 2


def test_the_tokenizer_reads_from_shard_0_on_whatever_the_number_of_shards(hub, cache, monkeypatch):
    shard_0 = sum(len(text.encode()) for text in TEXTS[:60])
    monkeypatch.setattr(prepare, "TOKENIZER_BYTES", shard_0 + 1)
    prepare.make_dataset("climbmix", "small", 1)
    assert set(fetched(cache)) == {"shard_00000.parquet", "shard_00001.parquet", VAL}


def test_a_part_that_is_complete_or_rotten_is_not_trusted_but_mended(hub, cache):
    whole = hub.files["shard_00000.parquet"]
    folder = prepare.downloads(prepare.CLIMBMIX)
    folder.mkdir(parents=True)
    for left in (whole, b"rotten" * 100, whole + b"more"):
        (folder / "shard_00000.parquet.part").write_bytes(left)
        path = prepare.fetch(prepare.CLIMBMIX, "shard_00000.parquet")
        assert path.read_bytes() == whole
        path.unlink()


@pytest.mark.parametrize(
    "fault, reason",
    [
        (404, "HTTP 404"),
        (401, "HTTP 401"),
        (503, "HTTP 503"),
        ("truncated", "bytes arrived of"),
        ("sha256", "sha256"),
        ("html", "no good"),
        ("too long", "were announced"),
    ],
)
def test_a_lasting_fault_ends_in_one_sentence_and_keeps_the_rest(
    hub, cache, monkeypatch, fault, reason
):
    hub.faults["shard_00001.parquet"] = [fault]
    command = "prepare.py --source climbmix --scale small --num-shards 2"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as stopped:
        prepare.main()
    message = str(stopped.value.code)
    assert message.startswith("error: cannot download shard_00001.parquet") and "\n" not in message
    assert reason in message and "--source python" in message
    kept = fetched(cache)
    assert {name for name in kept if not name.endswith(".part")} == {"shard_00000.parquet", VAL}
    assert not (cache / "current").exists()
    tries = [start for name, start in hub.requests if name == "shard_00001.parquet"]
    assert len(tries) == (1 if fault in (401, 404) else 4)


def test_a_server_that_is_not_there_is_named(hub, cache, monkeypatch):
    monkeypatch.setattr(prepare, "HUB", "http://127.0.0.1:9")
    sentence = "cannot download x.parquet .* no connection to http://127.0.0.1:9"
    with pytest.raises(SystemExit, match=sentence):
        prepare.fetch(prepare.TINYSTORIES, "x.parquet")


def test_a_file_that_is_no_parquet_is_refused(hub, cache):
    hub.files["shard_00000.parquet"] = b"PAR1" + b"x" * 5000
    with pytest.raises(SystemExit, match="no good"):
        prepare.fetch(prepare.CLIMBMIX, "shard_00000.parquet")
    assert fetched(cache) == {}


def test_two_processes_and_a_kill_in_the_middle_of_a_download_do_no_harm(hub, tmp_path):
    name = "tinystories_gpt4_clean.parquet"
    hub.add(name, TEXTS)
    env = {**ENV, "AUTORESEARCH_CACHE": str(tmp_path / "c"), "HF_ENDPOINT": hub.url}
    command = [sys.executable, ROOT / "prepare.py", "--source", "tinystories", "--scale", "small"]
    # After these faults the process pauses for 1 s and 2 s, and in a pause it is killed.
    hub.faults[name] = ["drop", "drop", ""]
    process = start(command, env)
    while not [part for part in tmp_path.glob("c/downloads/*/*.part") if part.stat().st_size]:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    run_twice_at_once(command, env)
    assert fetched(tmp_path / "c") == {name: hub.files[name]}
    _, second_start = hub.requests[1]
    assert second_start > 0, "the second process did not resume"


def test_without_a_network_the_default_is_python_and_says_so(cache, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "HUB", "http://127.0.0.1:9")
    assert prepare.default_source("small") == "python"
    assert "cannot be reached" in capsys.readouterr().out


def test_the_default_follows_the_scale(hub):
    assert prepare.default_source("full") == "climbmix"
    assert prepare.default_source("medium") == "climbmix"
    assert prepare.default_source("small") == "tinystories"


def test_the_python_source_is_prepared_whatever_its_files_encode(cache, tmp_path, monkeypatch):
    latin = tmp_path / "latin.py"
    latin.write_bytes("# coding: latin-1\nname = 'café'\n".encode("latin-1"))
    files = [*prepare.python_files()[:80], latin]
    monkeypatch.setattr(prepare, "python_files", lambda: files)
    folder = prepare.make_dataset("python", "small", 1)
    assert folder.name.startswith("python-small-")
    assert "caf\ufffd" in "".join(prepare.documents([latin]))


def test_the_python_source_is_the_standard_library_and_the_packages():
    files = prepare.find_source("python", 1)[1]
    assert len(files) == len(set(files)) > 2000
    assert {"argparse.py", "numpy", "torch"} <= {part for path in files for part in path.parts}
    assert not [path for path in files if path.parent in (ROOT, ROOT / "tests")]


# ---------------------------------------------------------------------------
# Command line, device, budget


@pytest.mark.parametrize("value", ["abc", "-1", "0", "301", "nan", "1e9", "2.5"])
def test_a_bad_number_in_the_environment_is_one_sentence(monkeypatch, value):
    monkeypatch.setenv("SOME_NUMBER", value)
    sentence = f"error: SOME_NUMBER={value} is not a number from 1 to 300; unset it for 7$"
    with pytest.raises(SystemExit, match=sentence):
        prepare.from_environment("SOME_NUMBER", 7, int, 1, 300)


def test_a_day_is_the_longest_budget_and_shows_a_line_every_five_minutes():
    code = "import train; print(train.LOG_EVERY * train.prepare.TIME_BUDGET)"
    assert run("-c", code, AUTORESEARCH_BUDGET="86400").stdout == "300.0\n"
    result = run("-c", code, AUTORESEARCH_BUDGET="86401")
    assert result.returncode == 1 and "is not a number from 1 to 86400" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU here")
def test_an_nvidia_gpu_that_torch_cannot_use_is_an_error(tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)'\n")
    smi.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = run("prepare.py", "--source", CORPUS, PATH=path, CUDA_VISIBLE_DEVICES="0")
    assert result.returncode == 1 and "cannot use the NVIDIA GPU" in result.stderr.splitlines()[-1]
    hidden = run("prepare.py", "--source", CORPUS, "--scale", "small", PATH=path)
    assert hidden.returncode == 0, hidden.stderr


@pytest.mark.parametrize(
    "device, gigabytes, scale",
    [
        ("cuda", 85.0, "full"),  # an H100
        ("cuda", 42.3, "full"),  # the smaller A100
        ("cuda", 34.2, "medium"),  # an RTX 5090
        ("cuda", 12.5, "medium"),  # an RTX 3060
        ("cpu", None, "small"),
        ("mps", None, "small"),
    ],
)
def test_the_scale_follows_the_device_and_its_memory(monkeypatch, device, gigabytes, scale):
    def properties(index):
        return SimpleNamespace(total_memory=int(gigabytes * 1e9))

    monkeypatch.setattr(prepare, "DEVICE", device)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert prepare.default_scale() == scale


@pytest.mark.parametrize("options, shards", [([], 6), (["--num-shards", "2"], 2)])
def test_the_scale_gives_the_number_of_shards(tiny, monkeypatch, options, shards):
    calls = []

    def make_dataset(*arguments):
        calls.append(arguments)
        return tiny

    monkeypatch.setattr(prepare, "make_dataset", make_dataset)
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--scale", "medium", *options])
    prepare.main()
    assert calls == [(None, "medium", shards)]


def test_a_mirror_without_a_scheme_is_one_sentence():
    result = run("prepare.py", "--source", "tinystories", HF_ENDPOINT="hf-mirror.example")
    assert result.returncode == 1
    assert result.stderr.startswith("error: HF_ENDPOINT=hf-mirror.example")


def test_a_mirror_without_a_scheme_matters_once_something_is_to_be_downloaded(cache, monkeypatch):
    monkeypatch.setattr(prepare, "HUB", "hf-mirror.example")
    sentence = "error: HF_ENDPOINT=hf-mirror.example is no web address"
    with pytest.raises(SystemExit, match=sentence):
        prepare.find_source("tinystories", 1)
    with pytest.raises(SystemExit, match=sentence):
        prepare.default_source("small")
    assert prepare.find_source(str(CORPUS), 1)[1]


def test_the_reason_of_an_error_in_a_worker_of_the_compiler_stands_below_its_traceback():
    pool = SubprocPool(1)
    try:
        with pytest.raises(SubprocException) as caught:
            pool.submit(functools.partial(int, "x")).result()
    finally:
        pool.shutdown()
    assert str(caught.value).startswith("An exception occurred in a subprocess:\n")
    assert prepare.reason(caught.value) == "ValueError: invalid literal for int() with base 10: 'x'"


def test_the_reason_of_other_errors_is_the_first_line_that_says_something():
    assert prepare.reason(ValueError("one thing\nand another")) == "one thing"
    announced = ValueError("the backend raised:\nAttributeError: no such name")
    assert prepare.reason(announced) == "AttributeError: no such name"
    assert prepare.reason(ValueError("nothing follows:")) == "nothing follows:"
    assert prepare.reason(ValueError()) == "ValueError"


def test_bad_flags_exit_with_2():
    assert run("prepare.py", "--num-shards", "0").returncode == 2


# ---------------------------------------------------------------------------
# Loader and clock


def test_targets_are_the_inputs_one_token_on(tiny):
    loader = make_dataloader(Tokenizer.from_directory(), 6, 32, "train")
    rows = {row.tobytes() for row in prepare.load_rows("train")}
    for _ in range(5):
        inputs, targets, epoch = next(loader)
        assert inputs.shape == targets.shape == (6, 32)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.is_contiguous() and targets.is_contiguous() and epoch == 1
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        for x, y in zip(inputs, targets, strict=True):
            assert torch.cat([x, y[-1:]]).numpy().astype(np.uint16).tobytes() in rows


def start_anew():
    """Forget the clock and the rows that were drawn, as a new process does."""
    prepare.run = prepare.Run()
    prepare.row_order.cache_clear()


def drawn(loader, n_batches):
    """The inputs of the next batches: the bytes of each row."""
    rows = []
    for _ in range(n_batches):
        inputs, _, _ = next(loader)
        rows += [row.numpy().tobytes() for row in inputs]
    return rows


def test_an_epoch_shows_every_row_once_in_an_order_that_the_seed_decides(tiny):
    tokenizer = Tokenizer.from_directory()
    inputs = prepare.load_rows("train")[:, :-1].astype(np.int64)
    everything = Counter(row.tobytes() for row in inputs)
    half = len(inputs) // 2
    orders = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        start_anew()
        loader = make_dataloader(tokenizer, half, 32, "train")
        first, second = drawn(loader, 2), drawn(loader, 2)
        assert Counter(first) <= everything and len(first) == 2 * half
        assert first != second
        orders.append(first)
    assert orders[0] == orders[1] != orders[2]


def test_epochs_count_from_one_and_a_batch_may_span_two(tiny):
    n_rows = len(prepare.load_rows("train"))
    loader = make_dataloader(Tokenizer.from_directory(), n_rows - 1, 32, "train")
    assert [next(loader)[2] for _ in range(3)] == [1, 2, 3]


def test_a_shorter_T_cuts_rows_into_pieces(tiny):
    tokenizer = Tokenizer.from_directory()
    whole = drawn(make_dataloader(tokenizer, 4, 32, "train"), 1)
    start_anew()
    quarters = drawn(make_dataloader(tokenizer, 16, 8, "train"), 1)
    assert b"".join(whole) == b"".join(quarters)


def test_a_second_loader_goes_on_where_the_first_one_is(tiny):
    tokenizer = Tokenizer.from_directory()
    one = make_dataloader(tokenizer, 4, 32, "train")
    rows = drawn(one, 3)
    start_anew()
    rows_again = drawn(make_dataloader(tokenizer, 4, 32, "train"), 1)
    start = prepare.run.start
    rows_again += drawn(make_dataloader(tokenizer, 8, 32, "train"), 1)
    assert rows == rows_again and prepare.run.start == start


@pytest.mark.parametrize(
    "args", [(4, 32, "val"), (4, 31, "train"), (0, 32, "train"), (4, 64, "train")]
)
def test_the_loader_refuses_at_once(tiny, args):
    with pytest.raises(SystemExit):
        make_dataloader(Tokenizer.from_directory(), *args)


def resident_pages(path):
    """How many pages of a file lie in memory, and how many it has. Linux's mincore counts them."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as mapping:
        pages = math.ceil(len(mapping) / mmap.PAGESIZE)
        flags = (ctypes.c_ubyte * pages)()
        address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(mapping)))
        failed = ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(mapping)), flags)
        assert not failed
        return sum(flag & 1 for flag in flags), pages


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages it holds")
def test_the_rows_are_read_into_memory_before_the_first_batch(tiny):
    path = tiny / "train.bin"
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_pages(path)[0]:
        pytest.skip("this file system keeps its pages")
    make_dataloader(Tokenizer.from_directory(), 4, 32, "train")
    for thread in threading.enumerate():
        if thread.name == "read ahead":
            thread.join()
    resident, pages = resident_pages(path)
    assert resident == pages and prepare.run.start is None


@CUDA
def test_the_pinned_loader_gives_a_gpu_the_rows_that_a_cpu_gets(tiny, monkeypatch):
    def batches():
        start_anew()
        torch.manual_seed(1)
        loader = make_dataloader(Tokenizer.from_directory(), 16, 32, "train")
        for _ in range(100):
            inputs, targets, _ = next(loader)
            if inputs.is_cuda:
                torch.cuda._sleep(10**6)  # The GPU falls behind, and the CPU runs ahead of it.
            yield torch.stack([inputs, targets])

    expected = torch.stack(list(batches()))
    monkeypatch.setattr(prepare, "DEVICE", "cuda")
    assert torch.equal(torch.stack(list(batches())).cpu(), expected)


def test_the_clock_starts_with_the_first_batch(tiny):
    loader = make_dataloader(Tokenizer.from_directory(), 2, 32, "train")
    time.sleep(0.05)
    assert prepare.clock.elapsed() == prepare.clock.progress() == 0
    next(loader)
    time.sleep(0.05)
    before = prepare.clock.elapsed()
    seconds = 300 * prepare.clock.progress()
    after = prepare.clock.elapsed()
    rounding = 1 + 1e-9
    assert 0.05 <= before <= seconds * rounding and seconds <= after * rounding
    prepare.run.start -= 400
    assert prepare.clock.progress() == 1 and prepare.clock.elapsed() > 400


def test_the_clock_cannot_be_set_and_a_second_one_shows_the_same_time(tiny):
    next(make_dataloader(Tokenizer.from_directory(), 2, 32, "train"))
    prepare.run.start -= 100
    with pytest.raises(AttributeError):
        prepare.clock.start = 0
    with pytest.raises(AttributeError):
        prepare.clock.elapsed = lambda: 0
    assert prepare.Clock().elapsed() > 100


def test_the_watchdog_is_set_at_the_loader_the_first_batch_and_every_batch_of_evaluation(
    tiny, monkeypatch
):
    seconds = []
    monkeypatch.setattr(prepare, "watch", seconds.append)
    tokenizer = Tokenizer.from_directory()
    loader = make_dataloader(tokenizer, 2, 32, "train")
    assert seconds == [600]
    drawn(loader, 3)
    assert seconds == [600, 600]

    def count_calls(model, logits, x):
        model.seen.append(x)
        return logits

    model = Cheat(count_calls)
    evaluate_bpb(model, tokenizer, 8)
    assert seconds == [600, 600] + [300] * len(model.seen) and len(model.seen) > 10


def test_before_anything_is_prepared_the_first_access_says_what_to_run(tmp_path):
    code = (
        "import prepare\n"
        "print(prepare.MAX_SEQ_LEN, flush=True)\n"
        "prepare.Tokenizer.from_directory()\n"
    )
    result = run("-c", code, AUTORESEARCH_CACHE=str(tmp_path))
    assert result.returncode == 1 and result.stdout == "256\n"
    assert "uv run prepare.py" in result.stderr and result.stderr.count("\n") == 1


def test_the_watchdog_ends_a_run_that_hangs_and_shows_where():
    code = (
        "import time, prepare\n"
        "prepare.HANG_SECONDS = 0.5\n"
        "loader = prepare.make_dataloader(prepare.Tokenizer.from_directory(), 2, 256, 'train')\n"
        "def stuck(): time.sleep(60)\n"
        "next(loader)\n"
        "stuck()\n"
    )
    began = time.time()
    result = run("-c", code, AUTORESEARCH_BUDGET="1")
    assert result.returncode == 1 and "in stuck" in result.stderr and time.time() - began < 40


# ---------------------------------------------------------------------------
# Inspection: which models the harness refuses, and which it accepts


@pytest.mark.parametrize("stage", [check_model, evaluate_bpb])
@pytest.mark.parametrize("name", CHEATS)
def test_the_harness_refuses(tiny, stage, name):
    with pytest.raises(SystemExit) as stopped:
        stage(Cheat(CHEATS[name]), Tokenizer.from_directory(), 8)
    message = str(stopped.value.code)
    assert message.startswith("error: ") and "\n" not in message


@pytest.mark.parametrize("name", [*LATER_TOKENS, *OTHER_ROWS, *EARLIER_BATCHES])
def test_the_early_check_sees_through_a_projection_that_is_still_zero(tiny, name):
    with pytest.raises(SystemExit, match="depend on"):
        check_model(Cheat(CHEATS[name], hidden=True), Tokenizer.from_directory(), 8)


def choose_inspected(monkeypatch, number):
    """Let the evaluation inspect this batch, where it would choose one by chance."""
    chance = SimpleNamespace(integers=lambda n: number)
    monkeypatch.setattr(np.random, "default_rng", lambda: chance)


@pytest.mark.parametrize("inspected", [0, 2, 4])
def test_a_model_that_changes_after_any_call_is_refused(tiny, monkeypatch, inspected):
    tokenizer = Tokenizer.from_directory()
    choose_inspected(monkeypatch, inspected)

    def calls_of(stage, last_honest_call):
        def sharpen_late(model, logits, x):
            model.seen.append(x)
            return logits * 1.1 if len(model.seen) > last_honest_call else logits

        model = Cheat(sharpen_late)
        stage(model, tokenizer, 8)
        return len(model.seen)

    for stage, warm_ups in ((evaluate_bpb, 0), (check_model, prepare.WARM_UPS - 1)):
        for last_honest_call in range(warm_ups + 1, calls_of(stage, math.inf)):
            with pytest.raises(SystemExit, match="carries state|other logits|depend on"):
                calls_of(stage, last_honest_call)


def test_a_leak_into_a_logit_that_hardly_counts_is_refused(tiny):
    def leak(model, logits, x):
        logits[..., 0] = -60  # BOS, which is no target that counts
        logits[:, :-1, 0] += 0.01 * x[:, 1:]
        return logits

    with pytest.raises(SystemExit, match="depend on later tokens"):
        evaluate_bpb(Cheat(leak), Tokenizer.from_directory(), 8)


def test_a_memory_that_only_new_rows_enter_is_refused(tiny):
    def note_new_rows(model, logits, x):
        new = [row for row in x.tolist() if row not in model.seen]
        model.seen.extend(new)
        return logits if new else logits * 1.1

    with pytest.raises(SystemExit):
        evaluate_bpb(Cheat(note_new_rows), Tokenizer.from_directory(), 8)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_logit_that_is_not_finite_in_the_last_batch_is_refused(tiny, value):
    tokenizer = Tokenizer.from_directory()

    def spoil_the_padded_batch(model, logits, x):
        padded = torch.equal(x[-1], x[-2])
        return spoil(value)(model, logits, x) if padded else logits

    with pytest.raises(SystemExit, match="not finite"):
        evaluate_bpb(Cheat(spoil_the_padded_batch), tokenizer, 7)


def test_another_tokenizer_is_refused(tiny):
    other = Tokenizer.train(TEXTS[:20], 512)
    for use in (check_model, evaluate_bpb):
        with pytest.raises(SystemExit, match="not the one that made the rows"):
            use(Toy(), other, 8)
    with pytest.raises(SystemExit, match="not the one that made the rows"):
        make_dataloader(other, 8, 32, "train")


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_the_harness_accepts_an_honest_model_at_any_batch_size(tiny, batch_size):
    tokenizer = Tokenizer.from_directory()
    model = Toy()
    before = [p.clone() for p in model.parameters()]
    check_model(model, tokenizer, batch_size)
    assert model.training and not torch.equal(before[0], model.table)
    with torch.no_grad():
        model.table.copy_(before[0])
    in_fives = evaluate_bpb(model, tokenizer, 5)
    assert evaluate_bpb(model, tokenizer, batch_size) == pytest.approx(in_fives, rel=1e-6)


def test_what_a_model_does_to_its_inputs_does_not_reach_the_targets(tiny):
    def clear(model, logits, x):
        x.zero_()
        return logits

    tokenizer = Tokenizer.from_directory()
    honest = evaluate_bpb(Toy(), tokenizer, 8)
    assert evaluate_bpb(Cheat(clear), tokenizer, 1) == pytest.approx(honest, rel=1e-6)


def test_an_honest_model_may_rule_tokens_out_and_keep_constants_as_parameters(tiny):
    tokenizer = Tokenizer.from_directory()

    def rule_out_bos(model, logits, x):
        logits[..., tokenizer.bos] = torch.finfo(logits.dtype).min
        return logits

    model = Cheat(rule_out_bos)
    model.positions = nn.Parameter(torch.arange(32), requires_grad=False)
    check_model(model, tokenizer, 8)
    assert math.isfinite(evaluate_bpb(model, tokenizer, 8)) and model.positions[-1] == 31


def test_one_outlying_logit_does_not_license_randomness(tiny):
    tokenizer = Tokenizer.from_directory()

    def shaky(model, logits, x):
        logits[..., tokenizer.bos] = -1e4
        return logits + F.dropout(logits, 0.1)

    with pytest.raises(SystemExit, match="random numbers"):
        check_model(Cheat(shaky), tokenizer, 8)


def test_a_little_nondeterminism_of_the_hardware_is_allowed(tiny):
    tokenizer = Tokenizer.from_directory()
    shaky = Cheat(lambda model, logits, x: logits + 1e-5 * torch.rand_like(logits))
    steady = evaluate_bpb(Toy(), tokenizer, 8)
    assert evaluate_bpb(shaky, tokenizer, 8) == pytest.approx(steady, rel=1e-4)


@pytest.mark.parametrize(
    "step, late, refused",
    [(1, 0, False), (1, 4.9, False), (1, 5.2, True), (60, 8.9, False), (60, 9.1, True)],
)
def test_a_run_may_be_late_by_what_one_step_needs(tiny, monkeypatch, step, late, refused):
    now = 1000.0
    monkeypatch.setattr(prepare, "monotonic", lambda: now)
    tokenizer = Tokenizer.from_directory()
    loader = make_dataloader(tokenizer, 2, 32, "train")
    while prepare.clock.progress() < 1:
        next(loader)
        now += step  # 300 s are a whole number of steps.
        for _ in range(9):
            prepare.clock.elapsed()
    now += late
    if refused:
        with pytest.raises(SystemExit, match=r"took 30\d\.\d s of a budget of 300 s"):
            evaluate_bpb(Toy(), tokenizer, 8)
    else:
        assert math.isfinite(evaluate_bpb(Toy(), tokenizer, 8))


@pytest.mark.parametrize("B, T", [(1, 8), (2, 8), (5, 16), (64, 32), (128, 32)])
def test_every_position_is_the_last_one_that_some_prefix_keeps(B, T):
    lengths = set()
    for kept, judged in prepare.prefixes(B, T):
        assert kept.shape == judged.shape == (B, T)
        for row, last in zip(kept.tolist(), judged.tolist(), strict=True):
            assert row == sorted(row, reverse=True)  # All that is kept comes first.
            lengths.add(sum(row))
            assert sum(row) == T or [t for t in range(T) if last[t]] == [sum(row) - 1]
    assert lengths >= set(range(1, T + 1))


@pytest.mark.parametrize("B", [1, 2, 3, 5, 16, 64, 100])
def test_of_any_two_rows_some_stripes_keep_the_first_without_the_second(B):
    masks = [kept for kept, _ in prepare.stripes(B, 4)]
    assert all(mask.shape == (B, 4) and mask.eq(mask[:, :1]).all() for mask in masks)
    for i in range(B):
        for j in range(B):
            assert i == j or any(mask[i, 0] and not mask[j, 0] for mask in masks)


def look_ahead_under(noise):
    """A change that gives the next token away, and hides it behind random numbers."""

    def change(model, logits, x):
        logits = logits.clone()
        logits[:, :-1].scatter_add_(2, x[:, 1:, None], torch.full_like(logits[:, :-1, :1], 0.1))
        return noise(logits)

    return change


def noise_on_a_far_logit(logits):
    logits[..., 0] = -50 + torch.rand_like(logits[..., 0])  # BOS, which is no target that counts
    return logits


def noise_in_one_row(logits):
    logits[0] += 0.1 * torch.rand_like(logits[0])  # so a token has a tolerance above the gain
    return logits


@pytest.mark.parametrize("noise", [noise_on_a_far_logit, noise_in_one_row])
def test_noise_does_not_license_a_look_ahead(tiny, noise):
    tokenizer = Tokenizer.from_directory()
    assert math.isfinite(evaluate_bpb(Cheat(lambda _, z, x: noise(z)), tokenizer, 8))
    with pytest.raises(SystemExit, match="depend on later tokens"):
        evaluate_bpb(Cheat(look_ahead_under(noise)), tokenizer, 8)


def test_noise_does_not_license_a_memory(tiny):
    tokenizer = Tokenizer.from_directory()
    batch = prepare.val_batch(0, 8, tokenizer.bos)

    def know_the_first_batch_at_first(model, logits, x):
        if torch.equal(x, batch):
            model.seen.append(x)
            if len(model.seen) == 1:
                return look_ahead_under(noise_in_one_row)(model, logits, x)
        return noise_in_one_row(logits)

    with pytest.raises(SystemExit, match="carries state"):
        evaluate_bpb(Cheat(know_the_first_batch_at_first), tokenizer, 8)


@pytest.mark.parametrize("inspected", range(5))
def test_a_look_ahead_in_some_rows_is_refused_when_one_of_them_is_inspected(
    tiny, monkeypatch, inspected
):
    choose_inspected(monkeypatch, inspected)
    tokenizer = Tokenizer.from_directory()
    known = prepare.val_batch(3, 8, tokenizer.bos)[:, :8]

    def look_ahead_in_known_rows(model, logits, x):
        is_known = (x[:, None, :8] == known).all(-1).any(1)
        return torch.where(is_known[:, None, None], ahead(1)(model, logits.clone(), x), logits)

    model = Cheat(look_ahead_in_known_rows)
    if inspected == 3:
        with pytest.raises(SystemExit, match="depend on later tokens"):
            evaluate_bpb(model, tokenizer, 8)
    else:
        assert math.isfinite(evaluate_bpb(model, tokenizer, 8))


@pytest.mark.parametrize("number", [0, 2, 4])
def test_a_look_ahead_at_the_first_sight_of_a_batch_is_refused(tiny, monkeypatch, number):
    choose_inspected(monkeypatch, 2)
    tokenizer = Tokenizer.from_directory()
    batch = prepare.val_batch(number, 8, tokenizer.bos)

    def look_ahead_once(model, logits, x):
        if torch.equal(x, batch):
            model.seen.append(x)
            return ahead(1)(model, logits, x) if len(model.seen) == 1 else logits
        return logits

    with pytest.raises(SystemExit, match="carries state"):
        evaluate_bpb(Cheat(look_ahead_once), tokenizer, 8)


def test_while_a_model_runs_its_targets_are_nowhere_in_its_callers(tiny):
    tokenizer = Tokenizer.from_directory()
    targets = [prepare.val_batch(number, 8, tokenizer.bos, ahead=1) for number in range(5)]
    seen = []

    def look_around(model, logits, x):
        frame = sys._getframe()
        while frame := frame.f_back:
            if frame.f_code.co_filename == prepare.__file__:
                seen.extend(v for v in frame.f_locals.values() if isinstance(v, torch.Tensor))
        return logits

    evaluate_bpb(Cheat(look_around), tokenizer, 8)
    assert len(seen) > 100  # The inputs are there, and so are the results of earlier calls.
    assert not any(torch.equal(tensor, batch) for tensor in seen for batch in targets)


class Loss(torch.Tensor):
    """A tensor whose cross-entropy is small, whatever it holds."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return result / 100 if function is F.cross_entropy else result


def test_a_tensor_with_a_loss_of_its_own_is_refused(tiny):
    with pytest.raises(SystemExit, match="but it gives Loss"):
        evaluate_bpb(Cheat(lambda _, z, x: z.as_subclass(Loss)), Tokenizer.from_directory(), 8)


# ---------------------------------------------------------------------------
# What a model knows before the clock starts


def check_and_restore(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_model(model, Tokenizer.from_directory(), 8)
    model.load_state_dict(before)


def begin(model):
    """Check a model, and draw the first batch."""
    check_and_restore(model)
    next(make_dataloader(Tokenizer.from_directory(), 8, 32, "train"))


def log_counts(split):
    """How often each token (512) follows each other one in a split, and follows any token."""
    counts = np.ones((512, 512))
    rows = prepare.load_rows(split)
    np.add.at(counts, (rows[:, :-1].ravel(), rows[:, 1:].ravel()), 1)
    after_each = torch.from_numpy(np.log(counts)).float()
    after_any = torch.from_numpy(np.log(counts.sum(0) - 511)).float()
    return after_each, after_any.expand(512, 512)


class Table(nn.Module):
    """A model that predicts from the token alone, by a table (512, 512)."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, x):
        return self.table[x]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("share", [1, 0.3])
def test_a_model_that_knows_the_text_before_the_clock_starts_is_refused(tiny, split, share):
    for table in log_counts(split):
        with pytest.raises(SystemExit, match="knows the text before the clock starts"):
            begin(Table(share * table))
        assert prepare.run.start is None


class Cache(nn.Module):
    """A model that repeats: a tenth of its probability goes to the earlier tokens of the row."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.1))

    def forward(self, x):
        seen = F.one_hot(x, 512).float().cumsum(1)
        seen = seen / seen.sum(-1, keepdim=True)
        return ((1 - self.weight) / 512 + self.weight * seen).clamp_min(1e-9).log()


def zeros(*shape):
    return torch.zeros(*shape)


def normal(std, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: std * torch.randn(*shape, generator=generator)


@pytest.mark.parametrize(
    "model",
    [
        lambda: Cache(),
        lambda: Table(zeros(512, 512)),
        lambda: Table(normal(0.1)(512, 512)),
        lambda: Table(normal(1)(512, 512)),
        lambda: Table(normal(10)(512, 512)),
        # By chance this one is better than with other names, and yet worse than a uniform guess.
        lambda: Table(normal(3, seed=2)(1, 512).expand(512, 512).clone()),
        lambda: Table(3 * torch.eye(512)),
        lambda: Toy(),
    ],
    ids=["cache", "zeros", "small", "large", "huge", "a bias", "the same token again", "toy"],
)
def test_an_initialisation_that_is_not_of_the_text_is_accepted(tiny, monkeypatch, model):
    # Rows of 32 tokens repeat little: the cache beats a uniform guess by 0.07 nats.
    monkeypatch.setattr(prepare, "HEAD_START", 0.01)
    begin(model())
    assert prepare.run.start is not None and prepare.run.untrained is None


# ---------------------------------------------------------------------------
# A run as a whole: one evaluation, by the harness as it is


class Recurrent(nn.Module):
    """A language model of another kind: an LSTM."""

    def __init__(self):
        super().__init__()
        self.embed, self.lstm = nn.Embedding(512, 32), nn.LSTM(32, 32, batch_first=True)
        self.head = nn.Linear(32, 512)

    def forward(self, x):
        return self.head(self.lstm(self.embed(x))[0])


def test_an_honest_run_of_another_model_with_an_average_of_its_weights(tiny, capsys):
    tokenizer = Tokenizer.from_directory()
    torch.manual_seed(1)
    model = Recurrent()
    check_and_restore(model)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = make_dataloader(tokenizer, 16, 16, "train")  # shorter rows than those of the metric
    for _ in range(60):
        inputs, targets, _ = next(loader)
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    uniform = 9 * (prepare.load_rows("val")[:, 1:] != tokenizer.bos).sum()
    n_bytes = tokenizer.token_bytes()[prepare.load_rows("val")[:, 1:]].sum()
    bpb = evaluate_bpb(average, tokenizer, 8)
    assert 0.5 < bpb < 0.9 * uniform / n_bytes
    prepare.print_summary({"num_steps": 60, "val_bpb": 0.1, "harness": "0" * 12})
    lines = capsys.readouterr().out.partition("---\n")[2].splitlines()
    shown = dict(re.split(r": +", line) for line in lines)
    assert len(shown) == len(lines) and shown["val_bpb"] == f"{bpb:.6f}"
    assert shown["num_steps"] == "60" and shown["total_tokens_M"] == "0.0"
    assert prepare.run.tokens == 60 * 16 * 16
    assert shown["harness"] == prepare.harness_digest(tokenizer)


class Learner(Toy):
    """A model that goes on learning when it is told to evaluate."""

    def __init__(self, learn):
        super().__init__()
        self.learn = learn

    def train(self, mode=True):
        if not mode:
            self.learn()
        return super().train(mode)


def test_what_a_model_does_when_it_is_told_to_evaluate_counts(tiny, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(prepare, "monotonic", lambda: now)

    def learn():
        nonlocal now
        now += 300

    tokenizer = Tokenizer.from_directory()
    loader = make_dataloader(tokenizer, 8, 32, "train")
    next(loader)
    now += 30
    assert prepare.clock.elapsed() == 30
    with pytest.raises(SystemExit, match="took 330.0 s"):
        evaluate_bpb(Learner(learn), tokenizer, 8)
    prepare.run = prepare.Run()
    with pytest.raises(SystemExit, match="gives no more batches"):
        evaluate_bpb(Learner(lambda: next(loader)), tokenizer, 8)


def test_a_run_is_evaluated_once(tiny):
    tokenizer = Tokenizer.from_directory()
    with pytest.raises(SystemExit, match="call evaluate_bpb first"):
        prepare.print_summary({})
    for _ in range(2):  # Nothing was trained in this process, so these are no tries.
        evaluate_bpb(Toy(), tokenizer, 8)
    with pytest.raises(SystemExit, match="gives no more batches"):
        next(make_dataloader(tokenizer, 8, 32, "train"))
    prepare.run = prepare.Run()
    next(make_dataloader(tokenizer, 8, 32, "train"))
    evaluate_bpb(Toy(), tokenizer, 8)
    with pytest.raises(SystemExit, match="was called before"):
        evaluate_bpb(Toy(), tokenizer, 8)


def honest_code():
    return 0


# What an agent may put in the place of something in prepare.py, by the name that the harness finds.
REPLACED = {
    "TIME_BUDGET": lambda patch: patch.setattr(prepare, "TIME_BUDGET", 600),
    "clock": lambda patch: patch.setattr(prepare, "clock", prepare.Clock()),
    "run": lambda patch: patch.setattr(prepare, "run", prepare.Run()),
    "monotonic": lambda patch: patch.setattr(prepare, "monotonic", lambda: 0.0),
    "token_nats": lambda patch: patch.setattr(prepare, "token_nats", lambda *args: None),
    "cross_entropy": lambda patch: patch.setattr(prepare, "cross_entropy", F.mse_loss),
    "load_rows": lambda patch: patch.setattr(prepare, "load_rows", lambda split: None),
    "val_batch": lambda patch: patch.delattr(prepare, "val_batch"),
    "Tokenizer": lambda patch: patch.setattr(prepare, "Tokenizer", type("Tokenizer", (), {})),
    "Tokenizer.token_bytes": lambda patch: patch.setattr(Tokenizer, "token_bytes", honest_code),
    "Clock.elapsed": lambda patch: patch.setattr(prepare.Clock, "elapsed", lambda self: 0.0),
    "inspect_model": lambda patch: patch.setattr(
        prepare.inspect_model, "__code__", (lambda *args: 0.0).__code__
    ),
}


@pytest.mark.parametrize("name", REPLACED)
def test_a_harness_of_which_something_was_replaced_gives_no_number(monkeypatch, name):
    prepare.check_harness()
    with monkeypatch.context() as patch:
        REPLACED[name](patch)
        with pytest.raises(SystemExit, match=rf"^error: {name} of prepare.py was replaced"):
            prepare.check_harness()
    prepare.check_harness()


def test_the_evaluation_ends_with_a_look_at_the_harness(tiny, monkeypatch):
    monkeypatch.setattr(prepare, "check_harness", lambda: prepare.stop("replaced"))
    with pytest.raises(SystemExit, match="replaced"):
        evaluate_bpb(Toy(), Tokenizer.from_directory(), 8)
    assert prepare.run.result is None


def test_a_tokenizer_with_byte_lengths_of_its_own_changes_nothing(tiny):
    class Longer(Tokenizer):
        def token_bytes(self):
            return 2 * super().token_bytes()

    honest = evaluate_bpb(Toy(), Tokenizer.from_directory(), 8)
    assert evaluate_bpb(Toy(), Longer.from_directory(), 8) == honest


def test_a_replaced_loss_of_torch_changes_nothing(tiny, monkeypatch):
    tokenizer = Tokenizer.from_directory()
    honest = evaluate_bpb(Toy(), tokenizer, 8)
    monkeypatch.setattr(F, "cross_entropy", lambda *args, **options: torch.zeros(()))
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    assert evaluate_bpb(Toy(), tokenizer, 8) == honest


# ---------------------------------------------------------------------------
# Metric


@pytest.fixture
def texts_to_validate(tiny):
    """Texts that stand in val.bin in place of the corpus, so that their bytes can be counted.

    Each row begins with BOS and goes on with 32 tokens of the texts, which have a BOS between them.
    BOS also fills up the last row. So the targets are all tokens of all texts, and BOS.
    """
    texts = [*ODD_TEXTS, TEXTS[0][:5000]]
    tokenizer = Tokenizer.from_directory()
    stream = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.bos]]
    while len(stream) % 32:
        stream.append(tokenizer.bos)
    rows = [[tokenizer.bos, *stream[i : i + 32]] for i in range(0, len(stream), 32)]
    (tiny / "val.bin").write_bytes(np.array(rows, np.uint16).tobytes())
    _, meta = prepare.dataset()
    meta["val_rows"] = len(rows)
    return texts


def test_bpb_of_a_uniform_model_is_log2_vocab_per_token_over_bytes(texts_to_validate):
    tokenizer = Tokenizer.from_directory()
    n_tokens = sum(len(tokenizer.encode(text)) for text in texts_to_validate)
    n_bytes = sum(len(text.encode()) for text in texts_to_validate)
    uniform = Toy()
    with torch.no_grad():
        uniform.table.fill_(0.5)
    expected = 9 * n_tokens / n_bytes  # The vocabulary has 512 = 2**9 tokens.
    assert evaluate_bpb(uniform, tokenizer, 8) == pytest.approx(expected, rel=1e-6)


def test_bpb_agrees_with_a_sum_by_hand(texts_to_validate):
    tokenizer = Tokenizer.from_directory()
    model, nats = Toy().eval(), 0.0
    for row in prepare.load_rows("val").astype(np.int64):
        with torch.no_grad():
            logits = model(torch.from_numpy(row[:-1])[None])[0]
        log_probs = logits.double().log_softmax(-1)
        for position, target in enumerate(row[1:].tolist()):
            if target != tokenizer.bos:
                nats -= log_probs[position, target].item()
    n_bytes = sum(len(text.encode()) for text in texts_to_validate)
    expected = nats / math.log(2) / n_bytes
    assert evaluate_bpb(model, tokenizer, 8) == pytest.approx(expected, rel=1e-6)


def test_bpb_counts_the_bytes_of_the_corpus_too(tiny):
    tokenizer = Tokenizer.from_directory()
    uniform = Toy()
    with torch.no_grad():
        uniform.table.fill_(0.5)
    targets = prepare.load_rows("val")[:, 1:]
    targets = targets[targets != tokenizer.bos]
    text = tokenizer.decode(targets)
    if "\ufffd" in text:
        pytest.skip("a row ends inside a character, so the bytes of the text are not known")
    expected = 9 * len(targets) / len(text.encode())
    assert evaluate_bpb(uniform, tokenizer, 8) == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------------------
# Ctrl-C


def test_ctrl_c_ends_prepare_at_once_without_a_traceback(tmp_path):
    env = {**ENV, "AUTORESEARCH_CACHE": str(tmp_path)}
    command = [sys.executable, ROOT / "prepare.py", "--source", "python", "--scale", "small"]
    process = start(command, env)
    while not (tmp_path / "building").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        assert "Traceback" not in process.communicate(timeout=10)[0]
    assert process.returncode in (-signal.SIGINT, 130)
