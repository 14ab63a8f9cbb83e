"""Claims about prepare.py: text, tokenizer, packing, downloads, loader, clock and metric."""

import contextlib
import ctypes
import functools
import hashlib
import http.server
import json
import math
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from conftest import CORPUS, CUDA, ENV, ROOT, TEXTS
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
    """prepare.py or another script in a process of its own."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**ENV, **env},
    )


def run_twice_at_once(command, env):
    both = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in "12"
    ]
    outputs = [process.communicate()[0].decode() for process in both]
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
    broken = Tokenizer.train((e for e in emoji for _ in range(9)), 300)
    alphabet = {c for token in broken.bpe.get_vocab() for c in token if token != prepare.BOS}
    assert len(alphabet) == 256
    parts = [
        i for i in range(300) if "\ufffd" in broken.decode([i]) and broken.token_bytes()[i] > 1
    ]
    assert parts, "no merge inside a character: the test tests nothing"
    for text in [*emoji, "".join(emoji), "é😀"]:
        assert broken.token_bytes()[broken.encode(text)].sum() == len(text.encode())


def test_text_that_spells_bos_is_ordinary_text_also_after_a_reload(tokenizer):
    assert tokenizer.get_bos_token_id() not in tokenizer.encode("a <|bos|> b")
    assert tokenizer.token_bytes()[tokenizer.get_bos_token_id()] == 0


def test_encode_takes_a_text_or_a_list_and_prepends(tokenizer):
    bos = tokenizer.get_bos_token_id()
    one, two = tokenizer.encode("one"), tokenizer.encode("two 2")
    assert tokenizer.encode(["one", "two 2"]) == [one, two]
    assert (
        tokenizer.encode("one", prepend=bos)
        == tokenizer.encode("one", prepend="<|bos|>")
        == [bos, *one]
    )
    assert tokenizer.encode(["one", "two 2"], prepend=bos) == [[bos, *one], [bos, *two]]


def test_at_most_two_digits_share_a_token():
    digits = Tokenizer.train(["12345678 " * 200], 300)
    assert [digits.decode([i]) for i in digits.encode("12345678")] == ["12", "34", "56", "78"]


# ---------------------------------------------------------------------------
# Packing


def naive_pack(documents, row_len, bos, waiting_limit):
    """The same rule by linear scan over a plain list."""
    cut = [
        [bos, *doc[i : i + row_len - 1]]
        for doc in documents
        for i in range(0, len(doc), row_len - 1)
    ]
    waiting, rows = [], []
    while True:
        while cut and len(waiting) < waiting_limit:
            waiting.append(cut.pop(0))
        row = []
        while len(row) < row_len:
            if not waiting:
                return rows
            fits = [piece for piece in waiting if len(piece) <= row_len - len(row)]
            longest = max(map(len, fits or waiting))
            index = max(i for i, piece in enumerate(waiting) if len(piece) == longest)
            piece = waiting.pop(index)
            room = row_len - len(row)
            row += piece[:room]
            if len(piece) > room:
                waiting.append([bos, *piece[room:]])
        rows.append(row)


@pytest.mark.parametrize("row_len, waiting", [(17, 5), (33, 40), (257, 2048)])
def test_packing_is_best_fit(monkeypatch, row_len, waiting):
    monkeypatch.setattr(prepare, "WAITING", waiting)
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 500, n).astype(np.uint16) for n in rng.geometric(0.02, 600)]
    rows = list(prepare.pack(iter(documents), row_len, 0))
    assert [row.tolist() for row in rows] == naive_pack(
        [d.tolist() for d in documents], row_len, 0, waiting
    )


def test_every_row_begins_with_bos_and_all_text_but_the_last_row_survives(tokenizer):
    documents = list(prepare.tokenize(tokenizer, TEXTS))
    rows = np.stack(list(prepare.pack(iter(documents), 257, tokenizer.bos)))
    assert (rows[:, 0] == tokenizer.bos).all()
    total = sum(map(len, documents))
    kept = (rows != tokenizer.bos).sum()
    assert total - 257 * 2 < kept <= total
    assert not Counter(rows[rows != tokenizer.bos].tolist()) - Counter(
        np.concatenate(documents).tolist()
    )


# ---------------------------------------------------------------------------
# Sources and splits


def lowest_hashes(texts):
    """The validation documents, by the contract's words: the 5% of documents with the lowest hash."""
    ranked = sorted(set(texts), key=lambda t: hashlib.blake2b(t.encode(), digest_size=8).digest())
    return ranked[: round(0.05 * len(ranked))]


def test_no_validation_document_occurs_in_training(tiny):
    tokenizer = Tokenizer.from_directory()
    held_out = lowest_hashes(TEXTS)
    held_out_text, trained_text = "\0".join(held_out), "\0".join(set(TEXTS) - set(held_out))
    trained = {row.tobytes() for row in prepare.load_rows("train")}
    rows = [row for row in prepare.load_rows("val") if tokenizer.bos not in row[1:]]
    texts = [tokenizer.decode(row[1:]) for row in rows]
    assert all(text in held_out_text for text in texts if "\ufffd" not in text)
    own = [row for row, text in zip(rows, texts, strict=True) if text not in trained_text]
    assert len(own) > 10 and not trained & {row.tobytes() for row in own}
    assert len(prepare.load_rows("val")) == 40


def test_the_split_depends_on_the_texts_alone(tmp_path, cache):
    texts = [f"document {i}\n" * (5 + i % 7) for i in range(300)]
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    pq.write_table(pa.table({"text": texts}), one / "all.parquet")
    for i, text in enumerate(reversed(texts + texts[:50])):
        (two / f"{i:03d}.txt").write_text(text)
    found = []
    for folder in (one, two):
        _, files, _ = prepare.find_source(str(folder), 1)
        train, val = prepare.split_by_hash(files)
        documents = list(prepare.documents(files))
        found.append(
            ([documents[i] for i in val], {d for d, t in zip(documents, train, strict=True) if t})
        )
        assert train.sum() + len(val) == 300
    assert found[0] == found[1]
    assert found[0][0] == lowest_hashes(texts)
    assert not set(found[0][0]) & found[0][1]


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


def parquet(**columns):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="none")
    return sink.getvalue().to_pybytes()


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


@pytest.mark.parametrize("split, words", [("val", [300] * 2000), ("train", [30000, 30])])
def test_too_little_text_names_the_split_that_lacks_it(tmp_path, cache, monkeypatch, split, words):
    texts = [f"{i} " + "word " * n for i, n in enumerate(words)]
    texts.sort(key=lambda t: hashlib.blake2b(t.encode(), digest_size=8).digest())
    monkeypatch.setattr(prepare, "VAL_FRACTION", 0.001)
    monkeypatch.setattr(prepare, "MIN_ROWS", {"train": 64, "val": 8})
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    with pytest.raises(SystemExit, match=rf"\d {split} rows of 256 tokens, and \d+ are needed"):
        prepare.make_dataset(str(tmp_path / "a.jsonl"), "small", 1)


# ---------------------------------------------------------------------------
# Preparations on disk


def test_preparing_again_is_the_same_folder_and_other_inputs_are_others(tmp_path, cache):
    source = tmp_path / "mine"
    source.mkdir()
    (source / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS[:60]))
    first = prepare.make_dataset(str(source), "small", 1)
    stamp = (first / "meta.json").stat().st_mtime_ns
    moved = tmp_path / "moved" / "mine"
    moved.parent.mkdir()
    source.rename(moved)
    assert prepare.make_dataset(str(moved), "small", 1) == first
    assert (first / "meta.json").stat().st_mtime_ns == stamp
    with (moved / "a.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"text": TEXTS[60]}))
    second = prepare.make_dataset(str(moved), "small", 1)
    assert second != first and first.exists()
    assert (cache / "current").read_text() == second.name + "\n"
    assert prepare.dataset_key(prepare.find_source(str(moved), 1), "full")[:12] not in second.name


def test_the_same_inputs_give_the_same_digest_and_rows(tiny, cache, monkeypatch):
    tokenizer = Tokenizer.from_directory()
    digest = prepare.harness_digest(tokenizer)
    rows = [(tiny / f"{split}.bin").read_bytes() for split in ("train", "val")]
    for file in tiny.iterdir():
        file.unlink()
    tiny.rmdir()
    assert prepare.make_dataset(str(CORPUS), "tiny", 1) == tiny
    assert rows == [(tiny / f"{split}.bin").read_bytes() for split in ("train", "val")]
    assert prepare.harness_digest(Tokenizer.from_directory()) == digest
    assert len(digest) == 12 and int(digest, 16) >= 0
    for name, value in (("TIME_BUDGET", 30.0), ("CODE_HASH", "edited")):
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "dataset", lambda: prepare.DATASET)
            patch.setattr(prepare, name, value)
            assert prepare.harness_digest(tokenizer) != digest
    folder, meta = prepare.DATASET
    for name, value in (
        ("DATASET", (folder, meta | {"key": "other text to train on"})),
        ("load_rows", lambda split: np.zeros((40, 33), np.uint16)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(prepare, name, value)
            assert prepare.harness_digest(tokenizer) != digest
    assert prepare.harness_digest(Tokenizer.train(TEXTS[:9], 512)) != digest
    assert prepare.harness_digest(tokenizer) == digest


def test_a_kill_at_any_moment_leaves_nothing_that_a_rerun_does_not_mend(tmp_path):
    env = {**ENV, "AUTORESEARCH_CACHE": str(tmp_path)}
    command = [sys.executable, ROOT / "prepare.py", "--source", CORPUS, "--scale", "small"]
    for moment in ("building", "building/tokenizer.json", "building/train.bin"):
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not (tmp_path / moment).exists() and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL, f"it ended before {moment} was there"
        assert not (tmp_path / "current").exists() and not list(tmp_path.glob("corpus-*"))
    outputs = run_twice_at_once(command, env)
    assert [path.name for path in tmp_path.glob("corpus-*")] == [
        (tmp_path / "current").read_text().strip()
    ]
    assert not (tmp_path / "building").exists()
    assert sum("waiting for another" in output for output in outputs) <= 1


def test_damaged_rows_are_refused(tiny):
    (tiny / "train.bin").write_bytes((tiny / "train.bin").read_bytes()[:-2])
    with pytest.raises(SystemExit, match="damaged"):
        make_dataloader(Tokenizer.from_directory(), 2, 32, "train")


# ---------------------------------------------------------------------------
# Downloads, against a real HTTP server with faults


class Hub:
    """Serves parquet shards as the hub does; `faults` holds what the next requests of a file suffer."""

    def __init__(self):
        self.files, self.faults, self.requests = {}, {}, []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_HEAD(self):
                self.reply(200, b"")

            def do_GET(self):
                name = self.path.rsplit("/", 1)[-1]
                start = int(self.headers.get("Range", "bytes=0-")[6:-1])
                if self.path.startswith("/datasets/"):
                    hub.requests.append((name, start))
                    fault = hub.faults.get(name, [])
                    self.serve(
                        name, start, fault.pop(0) if len(fault) > 1 else fault[0] if fault else ""
                    )
                else:
                    self.serve_file(hub.files[name], start)

            def serve(self, name, start, fault):
                data = hub.files.get(name)
                if isinstance(fault, int) or data is None:
                    self.reply(fault or 404, b"sorry")
                elif fault == "html":
                    self.reply(200, b"<html>captive portal</html>", {"Content-Type": "text/html"})
                elif fault == "drop":
                    self.serve_file(data, start, send=len(data) // 3)
                elif fault == "no range":
                    self.serve_file(data, 0)
                else:
                    sha256 = hashlib.sha256(data).hexdigest() if fault != "sha256" else "0" * 64
                    headers = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data))}
                    if fault == "truncated":
                        self.reply(200, data[: len(data) // 2], headers)
                    else:
                        self.reply(302, b"", headers | {"Location": f"/storage/{name}"})

            def serve_file(self, data, start, send=None):
                if start >= len(data):
                    return self.reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                part = data[start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(part)))
                self.end_headers()
                self.wfile.write(part[:send])
                if send is not None and send < len(part):
                    self.close_connection = True

            def reply(self, status, body, headers=None):
                self.send_response(status)
                for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def add(self, name, texts):
        self.files[name] = parquet(text=texts)


VAL = "shard_06542.parquet"


@pytest.fixture
def hub(cache, monkeypatch):
    hub = Hub()
    hub.add("shard_00000.parquet", TEXTS[:60])
    hub.add("shard_00001.parquet", TEXTS[60:120])
    hub.add(VAL, TEXTS[120:])
    monkeypatch.setattr(prepare, "HUB", hub.url)
    monkeypatch.setattr(prepare, "RETRY_PAUSES", (0, 0.01, 0.01))
    monkeypatch.setattr(prepare, "TOKENIZER_BYTES", 200_000)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def fetched(cache):
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
    monkeypatch.setattr(
        prepare, "TOKENIZER_BYTES", sum(len(text.encode()) for text in TEXTS[:60]) + 1
    )
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
    ],
)
def test_a_lasting_fault_ends_in_one_sentence_and_keeps_the_rest(
    hub, cache, monkeypatch, fault, reason
):
    hub.faults["shard_00001.parquet"] = [fault]
    monkeypatch.setattr(
        sys, "argv", ["prepare.py", "--source", "climbmix", "--scale", "small", "--num-shards", "2"]
    )
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
    with pytest.raises(
        SystemExit, match="cannot download x.parquet .* no connection to http://127.0.0.1:9"
    ):
        prepare.fetch(prepare.TINYSTORIES, "x.parquet")


def test_a_file_that_is_no_parquet_is_refused(hub, cache):
    hub.files["shard_00000.parquet"] = b"PAR1" + b"x" * 5000
    with pytest.raises(SystemExit, match="no good"):
        prepare.fetch(prepare.CLIMBMIX, "shard_00000.parquet")
    assert fetched(cache) == {}


def test_two_processes_and_a_kill_in_the_middle_of_a_download_do_no_harm(hub, tmp_path):
    hub.add("tinystories_gpt4_clean.parquet", TEXTS)
    env = {**ENV, "AUTORESEARCH_CACHE": str(tmp_path / "c"), "HF_ENDPOINT": hub.url}
    command = [sys.executable, ROOT / "prepare.py", "--source", "tinystories", "--scale", "small"]
    hub.faults["tinystories_gpt4_clean.parquet"] = [
        "drop",
        "drop",
        "",
    ]  # pauses of 1 s and 2 s: time to be killed
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not [part for part in tmp_path.glob("c/downloads/*/*.part") if part.stat().st_size]:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    run_twice_at_once(command, env)
    assert fetched(tmp_path / "c") == {
        "tinystories_gpt4_clean.parquet": hub.files["tinystories_gpt4_clean.parquet"]
    }
    assert hub.requests[1][1] > 0, "the second process did not resume"


def test_without_a_network_the_default_is_python_and_says_so(cache, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "HUB", "http://127.0.0.1:9")
    assert prepare.default_source("small") == "python"
    assert "cannot be reached" in capsys.readouterr().out


def test_the_default_follows_the_scale(hub):
    assert prepare.default_source("full") == "climbmix"
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
    with pytest.raises(
        SystemExit,
        match=f"error: SOME_NUMBER={value} is not a number from 1 to 300; unset it for 7$",
    ):
        prepare.from_environment("SOME_NUMBER", 7, int, 1, 300)


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


def test_a_mirror_without_a_scheme_is_one_sentence():
    result = run("prepare.py", "--source", "tinystories", HF_ENDPOINT="hf-mirror.example")
    assert result.returncode == 1 and result.stderr.startswith(
        "error: HF_ENDPOINT=hf-mirror.example"
    )


def test_a_mirror_without_a_scheme_matters_once_something_is_to_be_downloaded(cache, monkeypatch):
    monkeypatch.setattr(prepare, "HUB", "hf-mirror.example")
    for download in (
        lambda: prepare.find_source("tinystories", 1),
        lambda: prepare.default_source("small"),
    ):
        with pytest.raises(
            SystemExit, match="error: HF_ENDPOINT=hf-mirror.example is no web address"
        ):
            download()
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
    assert (
        prepare.reason(ValueError("the backend raised:\nAttributeError: no such name"))
        == "AttributeError: no such name"
    )
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
        assert (
            inputs.shape == targets.shape == (6, 32)
            and inputs.dtype == targets.dtype == torch.int64
        )
        assert inputs.is_contiguous() and targets.is_contiguous() and epoch == 1
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        for x, y in zip(inputs, targets, strict=True):
            assert torch.cat([x, y[-1:]]).numpy().astype(np.uint16).tobytes() in rows


def start_anew():
    """Forget the clock and the rows that were drawn, as a new process does."""
    prepare.clock = prepare.Clock()
    prepare.row_order.cache_clear()


def drawn(loader, batches):
    """Rows of the next batches, as bytes."""
    return [x.numpy().tobytes() for _ in range(batches) for x in next(loader)[0]]


def test_an_epoch_shows_every_row_once_in_an_order_that_the_seed_decides(tiny):
    tokenizer = Tokenizer.from_directory()
    n_rows = len(prepare.load_rows("train"))
    orders = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        start_anew()
        loader = make_dataloader(tokenizer, n_rows // 2, 32, "train")
        first, second = drawn(loader, 2), drawn(loader, 2)
        everything = Counter(
            row[:-1].astype(np.int64).tobytes() for row in prepare.load_rows("train")
        )
        assert not Counter(first) - everything and len(first) == n_rows // 2 * 2
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
    start = prepare.clock.start
    rows_again += drawn(make_dataloader(tokenizer, 8, 32, "train"), 1)
    assert rows == rows_again and prepare.clock.start == start


@pytest.mark.parametrize(
    "args", [(4, 32, "val"), (4, 31, "train"), (0, 32, "train"), (4, 64, "train")]
)
def test_the_loader_refuses_at_once(tiny, args):
    with pytest.raises(SystemExit):
        make_dataloader(Tokenizer.from_directory(), *args)


def resident_pages(path):
    """How many pages of a file lie in memory, and how many it has: Linux's mincore."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as mapping:
        pages = -(-len(mapping) // mmap.PAGESIZE)
        flags = (ctypes.c_ubyte * pages)()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        assert (
            ctypes.CDLL(None).mincore(
                ctypes.c_void_p(address), ctypes.c_size_t(len(mapping)), flags
            )
            == 0
        )
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
    assert resident == pages and prepare.clock.start is None


@CUDA
def test_the_pinned_loader_gives_a_gpu_the_rows_that_a_cpu_gets(tiny, monkeypatch):
    def batches():
        start_anew()
        torch.manual_seed(1)
        loader = make_dataloader(Tokenizer.from_directory(), 16, 32, "train")
        for _ in range(100):
            inputs, targets, _ = next(loader)
            if inputs.is_cuda:
                torch.cuda._sleep(10**6)  # so that the host runs ahead
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
    before, progress, after = (
        prepare.clock.elapsed(),
        prepare.clock.progress(),
        prepare.clock.elapsed(),
    )
    assert 0.05 <= before <= 300 * progress * (1 + 1e-9) and 300 * progress <= after * (1 + 1e-9)
    prepare.clock.start -= 400
    assert prepare.clock.progress() == 1 and prepare.clock.elapsed() > 400


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
    model = Cheat(lambda m, z, x: m.seen.append(x) or z)
    evaluate_bpb(model, tokenizer, 8)
    assert seconds == [600, 600] + [300] * len(model.seen) and len(model.seen) > 10


def test_before_anything_is_prepared_the_first_access_says_what_to_run(tmp_path):
    code = (
        "import prepare; print(prepare.MAX_SEQ_LEN, flush=True); prepare.Tokenizer.from_directory()"
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
        "next(loader); stuck()\n"
    )
    start = time.time()
    result = run("-c", code, AUTORESEARCH_BUDGET="1")
    assert result.returncode == 1 and "in stuck" in result.stderr and time.time() - start < 40


# ---------------------------------------------------------------------------
# Metric


class Toy(nn.Module):
    """A causal model of the kind the harness accepts: a table of logits by token, and a running sum."""

    def __init__(self, vocab_size=512):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(vocab_size, vocab_size, generator=generator))
        self.zero = nn.Parameter(torch.zeros(()))

    def logits(self, x):
        h = self.table[x]
        return h + h.cumsum(1) / 50

    def forward(self, x):
        return self.logits(x)


class Cheat(Toy):
    def __init__(self, change, hidden=False):
        super().__init__()
        self.change, self.hidden, self.seen, self.mean = change, hidden, [], 0.0

    def forward(self, x):
        z = self.logits(x)
        changed = self.change(self, z.clone(), x)
        if self.hidden:  # behind a projection that is still zero
            return z + self.zero * (changed - z)
        return changed


def ahead(n, position=None, row=None):
    def change(model, z, x):
        leak = F.pad(model.table[x], (0, 0, 0, n))[:, n:] * 0.01
        rows = slice(None) if row is None else slice(row, row + 1)
        places = slice(None) if position is None else slice(position, position + 1)
        z[rows, places] += leak[rows, places]
        return z

    return change


def spoil(value):
    def change(model, z, x):
        z[1, 7, 5] = value
        return z

    return change


def remember(model, z, x):
    model.seen = [*model.seen, x.float().mean()]
    return z + 0.001 * torch.stack(model.seen[-2:])[0]


def running_mean(share):
    def change(model, z, x):
        model.mean += share * (z.mean((0, 1)) - model.mean)
        return z - model.mean

    return change


def next_token_where(matches):
    """One where the next token stands out in a way that most texts seldom show."""

    def change(model, z, x):
        z[:, :-1, 7] += 0.1 * matches(x[:, :-1], x[:, 1:]).float()
        return z

    return change


CHEATS = {
    "the next token where it is BOS": next_token_where(lambda this, following: following == 0),
    "the next token where it is this one again": next_token_where(
        lambda this, following: following == this
    ),
    "a quick running mean over batches": running_mean(0.3),
    "a slow running mean over batches": running_mean(0.01),
    "one token ahead": ahead(1),
    "one token ahead at one position": ahead(1, position=13),
    "one token ahead at the last but one position": ahead(1, position=30),
    "one token ahead in one row": ahead(1, row=2),
    "twenty tokens ahead": ahead(20),
    "a mean over time": lambda m, z, x: z + 0.1 * m.table[x].mean(1, keepdim=True),
    "a mean over rows": lambda m, z, x: z + 0.1 * m.table[x].mean(0, keepdim=True),
    "the next row": lambda m, z, x: z + 0.1 * m.table[x].roll(1, 0),
    "the row before": lambda m, z, x: z + 0.1 * m.table[x].roll(-1, 0),
    "two rows swapped into one another": lambda m, z, x: (
        z + 0.1 * m.table[x][[1, 0, *range(2, len(x))]]
    ),
    "the memory of earlier batches": remember,
    "NaN in one logit": spoil(math.nan),
    "infinity in one logit": spoil(math.inf),
    "minus infinity in one logit": spoil(-math.inf),
    "random numbers": lambda m, z, x: z + 0.1 * torch.randn_like(z),
    "a vocabulary too wide": lambda m, z, x: F.pad(z, (0, 64)),
    "a position too few": lambda m, z, x: z[:, 1:],
    "a loss in place of logits": lambda m, z, x: z.mean(),
    "a pair": lambda m, z, x: (z, None),
}


@pytest.mark.parametrize("stage", [check_model, evaluate_bpb])
@pytest.mark.parametrize("name", CHEATS)
def test_the_harness_refuses(tiny, stage, name):
    with pytest.raises(SystemExit) as stopped:
        stage(Cheat(CHEATS[name]), Tokenizer.from_directory(), 8)
    message = str(stopped.value.code)
    assert message.startswith("error: ") and "\n" not in message


@pytest.mark.parametrize(
    "name", [name for name in CHEATS if "ahead" in name or "mean" in name or "row" in name]
)
def test_the_early_check_sees_through_a_projection_that_is_still_zero(tiny, name):
    with pytest.raises(SystemExit, match="depend on"):
        check_model(Cheat(CHEATS[name], hidden=True), Tokenizer.from_directory(), 8)


def test_a_memory_that_wakes_up_after_the_probes_is_refused(tiny):
    def sharpen_late(model, z, x):
        model.seen.append(x)
        return z * (1.1 if len(model.seen) > probes else 1)

    probes = (
        5 + prepare.WARM_UPS + 1 + 4 + 6 + 1
    )  # calls before the second scoring: 5 score 40 rows
    with pytest.raises(SystemExit, match="carries state"):
        evaluate_bpb(Cheat(sharpen_late), Tokenizer.from_directory(), 8)


def test_a_memory_that_only_new_rows_enter_is_refused(tiny):
    def note_new_rows(model, z, x):
        new = [row for row in x.tolist() if row not in model.seen]
        model.seen.extend(new)
        return z if new else z * 1.1

    with pytest.raises(SystemExit):
        evaluate_bpb(Cheat(note_new_rows), Tokenizer.from_directory(), 8)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_logit_that_is_not_finite_in_the_last_batch_is_refused(tiny, value):
    tokenizer = Tokenizer.from_directory()

    def spoil_the_padded_batch(model, z, x):
        return spoil(value)(model, z, x) if torch.equal(x[-1], x[-2]) else z

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
    assert evaluate_bpb(model, tokenizer, batch_size) == pytest.approx(
        evaluate_bpb(model, tokenizer, 5), rel=1e-6
    )


def test_what_a_model_does_to_its_inputs_does_not_reach_the_targets(tiny):
    def clear(model, z, x):
        x.zero_()
        return z

    tokenizer = Tokenizer.from_directory()
    assert evaluate_bpb(Cheat(clear), tokenizer, 1) == pytest.approx(
        evaluate_bpb(Toy(), tokenizer, 8), rel=1e-6
    )


def test_an_honest_model_may_rule_tokens_out_and_keep_constants_as_parameters(tiny):
    tokenizer = Tokenizer.from_directory()

    def rule_out_bos(model, z, x):
        z[..., tokenizer.bos] = torch.finfo(z.dtype).min
        return z

    model = Cheat(rule_out_bos)
    model.positions = nn.Parameter(torch.arange(32), requires_grad=False)
    check_model(model, tokenizer, 8)
    assert math.isfinite(evaluate_bpb(model, tokenizer, 8)) and model.positions[-1] == 31


def test_one_outlying_logit_does_not_license_randomness(tiny):
    tokenizer = Tokenizer.from_directory()

    def shaky(model, z, x):
        z[..., tokenizer.bos] = -1e4
        return z + F.dropout(z, 0.1)

    with pytest.raises(SystemExit, match="random numbers"):
        check_model(Cheat(shaky), tokenizer, 8)


def test_a_little_nondeterminism_of_the_hardware_is_allowed(tiny):
    tokenizer = Tokenizer.from_directory()
    shaky = Cheat(lambda m, z, x: z + 1e-5 * torch.rand_like(z))
    assert evaluate_bpb(shaky, tokenizer, 8) == pytest.approx(
        evaluate_bpb(Toy(), tokenizer, 8), rel=1e-4
    )


def test_bpb_of_a_uniform_model_is_log2_vocab_per_token_over_bytes(tiny):
    tokenizer = Tokenizer.from_directory()
    targets = prepare.load_rows("val")[:, 1:].reshape(-1)
    counted = [t for t in targets.tolist() if t != tokenizer.get_bos_token_id()]
    # every byte of text is one character of the byte-level vocabulary's strings
    n_bytes = sum(len(tokenizer.bpe.id_to_token(t)) for t in counted)
    uniform = Toy()
    with torch.no_grad():
        uniform.table.fill_(0.5)
    expected = math.log2(512) * len(counted) / n_bytes
    assert evaluate_bpb(uniform, tokenizer, 8) == pytest.approx(expected, rel=1e-6)


def test_bpb_agrees_with_a_sum_by_hand(tiny):
    tokenizer = Tokenizer.from_directory()
    model, nats, n_bytes = Toy().eval(), 0.0, 0
    for row in prepare.load_rows("val").astype(np.int64):
        with torch.no_grad():
            log_probs = model(torch.from_numpy(row[:-1])[None])[0].double().log_softmax(-1)
        for position, target in enumerate(row[1:].tolist()):
            if target != tokenizer.bos:
                nats -= log_probs[position, target].item()
                n_bytes += len(tokenizer.bpe.id_to_token(target))
    assert evaluate_bpb(model, tokenizer, 8) == pytest.approx(
        nats / math.log(2) / n_bytes, rel=1e-6
    )


def test_a_run_that_draws_batches_long_after_its_budget_is_refused(tiny, monkeypatch):
    tokenizer = Tokenizer.from_directory()
    loader = make_dataloader(tokenizer, 2, 32, "train")
    next(loader)
    prepare.clock.start -= 305
    next(loader)
    assert math.isfinite(evaluate_bpb(Toy(), tokenizer, 8))
    prepare.clock.start -= 8
    next(loader)
    with pytest.raises(SystemExit, match=r"31\d\.\d s into a budget of 300 s"):
        evaluate_bpb(Toy(), tokenizer, 8)


@pytest.mark.parametrize("B, T", [(1, 8), (2, 8), (5, 16), (64, 32), (128, 32)])
def test_every_position_is_the_last_one_that_some_prefix_keeps(B, T):
    lengths = set()
    for mask in prepare.prefixes(B, T):
        assert mask.shape == (B, T)
        for row in mask.tolist():
            assert row == sorted(row, reverse=True)  # what is kept comes first
            lengths.add(sum(row))
    assert lengths >= set(range(1, T + 1))


@pytest.mark.parametrize("B", [1, 2, 3, 5, 16, 64, 100])
def test_of_any_two_rows_some_stripes_keep_the_first_without_the_second(B):
    masks = list(prepare.stripes(B, 4))
    assert all(mask.shape == (B, 4) and mask.eq(mask[:, :1]).all() for mask in masks)
    for i in range(B):
        for j in range(B):
            assert i == j or any(mask[i, 0] and not mask[j, 0] for mask in masks)


# ---------------------------------------------------------------------------
# Ctrl-C


def test_ctrl_c_ends_prepare_at_once_without_a_traceback(tmp_path):
    env = {**ENV, "AUTORESEARCH_CACHE": str(tmp_path)}
    command = [sys.executable, ROOT / "prepare.py", "--source", "python", "--scale", "small"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (tmp_path / "building").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        assert b"Traceback" not in process.communicate(timeout=10)[0]
    assert process.returncode in (-signal.SIGINT, 130)
