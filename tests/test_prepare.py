"""Claims about prepare.py: text, tokenizer, packing, downloads, loader, clock and metric."""

import faulthandler
import math
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from types import SimpleNamespace

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from conftest import CORPUS, CUDA, ENV, ROOT, TEXTS, TINY, VAL, git, parquet
from torch import nn

import prepare
from prepare import Refusal, Tokenizer, check_model, evaluate_bpb, make_dataloader

ODD_TEXTS = [
    "",
    "plain",
    "naïve café, 你好，世界 — ١٢٣ 👩‍👩‍👧‍👦🏳️‍🌈",
    "".join(map(chr, range(0x250))),
    "\ufeff\u200b\u0000\x7f \t\r\n\n  tail ",
    "<|bos|> spelled <|bos|><|bos|>",
    "12345678901234567890 don't DON'T",
]


# ---------------------------------------------------------------------------
# Tokenizer


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_token_bytes_sum_to_the_bytes_of_any_text(text):
    tokenizer = Tokenizer.from_directory()
    ids = tokenizer.encode(text)
    assert tokenizer.bos not in ids
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_encode_takes_a_text_or_a_list_and_prepends():
    tokenizer = Tokenizer.from_directory()
    bos = tokenizer.get_bos_token_id()
    assert tokenizer.decode([bos]) == "<|bos|>"
    one, two = tokenizer.encode("one"), tokenizer.encode("two 2")
    assert tokenizer.encode(["one", "two 2"]) == [one, two]
    assert len(tokenizer.encode("1" * 9)) >= 5  # at most two digits share a token
    assert tokenizer.encode("one", prepend=bos) == [bos, *one]
    assert tokenizer.encode("one", prepend="<|bos|>") == [bos, *one]
    assert tokenizer.encode(["one", "two 2"], prepend=bos) == [[bos, *one], [bos, *two]]


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
    waiting, rows = [], []  # the piece that came last stands first
    while True:
        while pieces and len(waiting) < waiting_limit:
            waiting.insert(0, pieces.pop(0))
        row = []
        while len(row) < row_len:
            if not waiting:
                return rows
            room = row_len - len(row)
            fitting = [piece for piece in waiting if len(piece) <= room]
            piece = max(fitting or waiting, key=len)
            waiting.remove(piece)
            row += piece[:room]
            if len(piece) > room:
                waiting.insert(0, [bos, *piece[room:]])
        rows.append(row)


@pytest.mark.parametrize("row_len, waiting", [(17, 10), (33, 40), (257, 2048)])
def test_packing_is_best_fit_and_loses_no_text_but_the_last_row(monkeypatch, row_len, waiting):
    monkeypatch.setattr(prepare, "WAITING", waiting)
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 500, n).astype(np.uint16) for n in rng.geometric(0.02, 600)]
    rows = np.stack(list(prepare.pack(iter(documents), row_len, 0)))
    expected = naive_pack([ids.tolist() for ids in documents], row_len, 0, waiting)
    assert rows.tolist() == expected and (rows[:, 0] == 0).all()
    text = Counter(np.concatenate(documents).tolist())
    kept = Counter(rows[rows > 0].tolist())
    assert kept <= text and text.total() - kept.total() < row_len


# ---------------------------------------------------------------------------
# Sources and splits


def split(source):
    """The documents of a source that train, and those that validate, in the order of packing."""
    found = prepare.find_source(str(source), 1)
    train, val = (list(prepare.split_documents(found, validates)) for validates in (False, True))
    return train, prepare.lowest_hashes(val, 10**9)


def test_no_validation_document_occurs_in_training(tiny):
    train, val = split(CORPUS)
    assert set(train) | set(val) == set(TEXTS) and not set(train) & set(val)
    text, tokenizer = "\0".join(val), Tokenizer.from_directory()
    rows = [row[1:] for row in prepare.load_rows("val") if tokenizer.bos not in row[1:]]
    decoded = [tokenizer.decode(row) for row in rows]  # rows with a piece of one document
    assert all(row in text or "\ufffd" in row for row in decoded)  # one may end inside a character
    assert len(rows) > 10 and len(prepare.load_rows("val")) == 40


def test_the_split_depends_on_the_words_alone(tmp_path):
    texts = [f"document {i}\nof {i % 7} words" for i in range(2000)]
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    for folder in (one, two, three):
        folder.mkdir()
    pq.write_table(pa.table({"text": texts}), one / "all.parquet")
    train, val = split(one)
    assert 80 < len(val) < 120 and sorted(train + val) == sorted(texts)  # 5% of 2,000

    # Copies with other white space are copies, from wherever they come.
    pq.write_table(pa.table({"text": texts[::-1]}), two / "reversed.parquet")
    copies = [text.replace("\n", "\r\n") + "\n" for text in texts]
    pq.write_table(pa.table({"text": copies}), two / "windows.parquet")
    for i, text in enumerate(texts[:50] + val[:9]):
        (two / f"{i:03d}.txt").write_text(f"\n{text}  \n\n")
    train_of_two, val_of_two = split(two)
    assert sorted(map(str.split, train_of_two)) == sorted(map(str.split, train))
    assert [*map(str.split, val_of_two)] == [*map(str.split, val)]

    # Other documents around a document do not move it to the other side.
    pq.write_table(pa.table({"text": sorted(val[5:] + train[:85])}), three / "fewer.parquet")
    assert split(three) == (sorted(train[:85]), val[5:])


def test_a_file_that_changes_while_it_is_read_moves_no_text_to_the_other_side(tmp_path):
    path = tmp_path / "stories.jsonl"
    texts = [f"story {i}" for i in range(1000)]
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    source = prepare.find_source(str(path), 1)
    val = list(prepare.split_documents(source, validates=True))
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in ["new", *texts[3:]]))
    train = list(prepare.split_documents(source, validates=False))
    assert len(val) > 20 and not set(val) & set(train)


def test_the_lowest_hashes_are_taken_as_far_as_there_is_room():
    texts = [f"text {i:04d}" for i in range(2000)]
    everything = sorted(texts, key=prepare.hash_text)
    for limit, n in ((10**9, 2000), (9 * 20, 20), (9 * 20 + 8, 20), (1, 1)):  # 9 characters each
        assert prepare.lowest_hashes(iter(texts), limit) == everything[:n]


def test_documents_of_every_format(tmp_path):
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    source.mkdir()
    elsewhere.mkdir()
    (source / "a link").symlink_to(elsewhere)
    (elsewhere / "a.md").write_text("# short\n\nstays whole\n")
    (source / "b.csv").write_text("not read")
    (source / "c.TXT").write_bytes("\ufeffwith a byte order mark".encode())
    (source / "d.jsonl").write_text(
        '{"text": "lone \\ud800 surrogate"}\n\n{"text": null}\n{"text": "\\ud83d\\ude00"}\n'
    )
    raw = pa.array([b"from parquet \xff", None, b""], pa.binary())
    invalid_utf8 = pa.StringArray.from_buffers(3, *raw.buffers()[1:], raw.buffers()[0])
    pq.write_table(pa.table({"text": invalid_utf8, "n": [1, 2, 3]}), source / "e.parquet")
    assert sorted(prepare.documents(prepare.find_source(str(source), 1).files)) == [
        "# short\n\nstays whole\n",
        "from parquet \ufffd",
        "lone \ufffd surrogate",
        "with a byte order mark",
        "😀",
    ]


@pytest.mark.parametrize(
    "unit, end",
    [("Two\nlines.\n\n", "\n\n"), ("Two words.\n", "\n"), ("word ", " "), ("letters", "")],
)
def test_a_long_text_is_cut_where_it_disturbs_least(tmp_path, unit, end):
    path = tmp_path / "book.txt"
    path.write_text("The first paragraph.\n\n" + 10_000 * unit)
    documents = list(prepare.documents([path]))
    assert "".join(documents) == path.read_text() and len(documents) > 5
    assert all(document.endswith(end) for document in documents)
    assert all(2000 <= len(document) <= 10_000 for document in documents[:-1])


def test_words_of_any_length_are_tokenised_in_linear_time():
    for sign in "A\u0301 -\n":
        text = sign * 300_000
        tokenizer = prepare.Tokenizer.train([text], 300)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert max(map(len, tokenizer.bpe.get_vocab())) <= 130  # two bytes a sign, and a space


BAD_SOURCES = {
    "no such path": (None, "there is no"),
    "empty folder": ({}, "holds no text"),
    "wrong suffix": ({"a.csv": b"x", "b": b"y"}, "holds no text (.csv)"),
    "no column text": ({"a.parquet": parquet(body=["x"])}, "`text`"),
    "numbers as text": ({"a.parquet": parquet(text=[1])}, "`text`"),
    "half a parquet": ({"a.parquet": parquet(text=["x"])[:-9]}, "is no parquet"),
    "no key text": ({"a.jsonl": b'{"text": "x"}\n{"body": 1}\n'}, "line 2"),
    "text is a number": ({"a.jsonl": b'{"text": 5}'}, "line 1"),
    "not json": ({"a.jsonl": b"\x00\xff rubbish"}, "line 1"),
    "binary rubbish": ({"a.txt": bytes(range(256)) * 99}, "not UTF-8 text"),
    "nothing but blanks": ({"a.txt": b" \n\n "}, "too little"),
    "too little text": ({f"{i}.txt": f"text {i}".encode() for i in range(9)}, "too little"),
}


@pytest.mark.parametrize("files, reason", BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_bad_sources_end_in_one_sentence_and_leave_nothing(tmp_path, cache, files, reason):
    folder = tmp_path / "source"
    if files is not None:
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
    with pytest.raises(Refusal) as stopped:
        prepare.make_dataset(str(folder), "small")
    message = str(stopped.value)
    assert reason in message and "\n" not in message
    assert not (cache / "current").exists() and not list(cache.glob("source-*"))


# ---------------------------------------------------------------------------
# Datasets on disk


def import_copy(path, source=None):
    """Import prepare.py, or another text in its place, and return its names."""
    path.write_bytes(source or (ROOT / "prepare.py").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "excepthook", sys.excepthook)  # put back what the copy replaces
        return SimpleNamespace(**runpy.run_path(str(path), run_name="copy_of_prepare"))


def test_preparing_again_is_the_same_and_another_text_another(tmp_path, cache, monkeypatch):
    monkeypatch.setitem(prepare.SCALES, "tiny", TINY)
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS[:30]))
    first = prepare.make_dataset(str(tmp_path / "a.txt"), "tiny")
    rows, stamp = (first / "train.bin").read_bytes(), (first / "meta.json").stat().st_mtime_ns
    moved = shutil.move(tmp_path / "a.txt", cache)
    assert prepare.make_dataset(moved, "tiny") == first
    assert (first / "meta.json").stat().st_mtime_ns == stamp
    shutil.rmtree(first)
    assert prepare.make_dataset(moved, "tiny") == first
    assert (first / "train.bin").read_bytes() == rows
    (cache / "a.txt").write_text("\n\n".join(TEXTS[:31]))
    second = prepare.make_dataset(moved, "tiny")
    assert second != first and first.exists()
    assert (cache / "current").read_text() == second.name + "\n"
    assert prepare.dataset_key(prepare.find_source(moved, 1), "full")[:12] not in second.name


def test_another_budget_code_text_or_tokenizer_gives_another_digest(tiny, monkeypatch):
    digest = prepare.harness_digest()
    assert re.fullmatch("[0-9a-f]{12}", digest)
    folder, meta = prepare.DATASET
    monkeypatch.setattr(prepare, "dataset", lambda: prepare.DATASET)  # of whatever code
    others = {
        "TIME_BUDGET": 30.0,
        "CODE_HASH": "edited",
        "DATASET": (folder, meta | {"key": "other text to train on"}),
        "load_rows": lambda split: np.zeros((40, 33), np.uint16),
    }
    for name, value in others.items():
        with monkeypatch.context() as patch:
            patch.setattr(prepare, name, value)
            assert prepare.harness_digest() != digest, name
    assert prepare.harness_digest() == digest
    Tokenizer.train(TEXTS[:9], 512).bpe.save(str(tiny / "tokenizer.json"))
    assert prepare.harness_digest() != digest


def test_layout_and_comments_of_prepare_py_invalidate_nothing(tmp_path):
    source = (ROOT / "prepare.py").read_bytes()
    for old, new, same in (
        (b"\n", b"\r\n", True),
        (b"\nVAL_HASHES", b"\n# a comment\n\nVAL_HASHES", True),
        (b"VAL_HASHES = 2**64 // 20", b"VAL_HASHES = 2**64 // 19", False),
    ):
        assert old in source
        copy = import_copy(tmp_path / "prepare.py", source.replace(old, new))
        assert (copy.CODE_HASH == prepare.CODE_HASH) == same


def test_the_code_of_a_run_is_the_hash_that_git_has_of_its_script(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script))
    script.write_bytes(b"import prepare\n")
    expected = git(tmp_path, "hash-object", "train.py")
    for line_end in (b"\n", b"\r\n"):  # Windows checks out the second one of the same blob.
        script.write_bytes(b"import prepare" + line_end)
        copy = import_copy(tmp_path / "prepare.py")
        script.write_text("an edit while it trains")
        assert len(copy.SCRIPT_HASH) == 12 and expected.startswith(copy.SCRIPT_HASH)


def test_a_second_prepare_waits_for_the_first(cache):
    cache.mkdir()
    with ThreadPoolExecutor() as pool:
        with filelock.FileLock(cache / "lock"):
            second = pool.submit(prepare.make_dataset, "no/such/text", "small")
            with pytest.raises(TimeoutError):
                second.result(timeout=0.2)
        with pytest.raises(Refusal, match="there is no `no/such/text`"):
            second.result(timeout=10)


def test_ctrl_c_leaves_nothing_that_a_rerun_does_not_mend(cache):
    env = {**ENV, "AUTORESEARCH_CACHE": str(cache)}
    command = [sys.executable, ROOT / "prepare.py", "--source", CORPUS, "--scale", "small"]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    while not (cache / "building" / "train.bin").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT and "Traceback" not in errors
    assert not (cache / "current").exists() and not list(cache.glob("corpus-*"))
    folder = prepare.make_dataset(str(CORPUS), "small")
    assert [path.name for path in cache.glob("corpus-*")] == [folder.name]
    assert not (cache / "building").exists()


def test_data_that_cannot_be_used_is_refused_before_the_clock_starts(tiny, cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "CODE_HASH", "edited")
        with pytest.raises(Refusal, match="another prepare.py or Python prepared the data"):
            loader_of(2)
    (tiny / "train.bin").write_bytes((tiny / "train.bin").read_bytes()[:-2])
    with pytest.raises(Refusal, match="damaged"):
        loader_of(2)
    (cache / "current").unlink()
    monkeypatch.setattr(prepare, "DATASET", prepare.find_dataset())
    with pytest.raises(Refusal, match="no data yet; run `uv run prepare.py`"):
        loader_of(2)
    assert prepare.run.start is None


# ---------------------------------------------------------------------------
# Downloads, from the hub with faults


def fetched(cache):
    """The files that were downloaded into a cache, those that are not complete included."""
    return {path.name: path.read_bytes() for path in cache.glob("downloads/*/*")}


def test_climbmix_is_prepared_from_shards_with_the_last_one_for_validation(hub, cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(prepare.SCALES, "small", prepare.SCALES["small"]._replace(shards=1))
        one = prepare.make_dataset("climbmix", "small")
    assert set(fetched(cache)) == {"shard_00000.parquet", VAL}
    two = prepare.make_dataset("climbmix", "small")
    assert fetched(cache) == hub.files and one != two
    assert (one / "tokenizer.json").read_bytes() == (two / "tokenizer.json").read_bytes()
    assert (one / "val.bin").read_bytes() == (two / "val.bin").read_bytes()
    served = len(hub.requests)
    assert prepare.make_dataset("climbmix", "small") == two and len(hub.requests) == served


def test_a_download_gets_past_all_passing_faults_and_resumes_what_is_good(hub, cache):
    name = "shard_00000.parquet"
    hub.faults[name] = [429, 503, "html", "sha256", "drop", "truncated", ""]
    path = prepare.fetch(prepare.CLIMBMIX, name)
    assert path.read_bytes() == hub.files[name] and set(fetched(cache)) == {name}
    *first_bytes, after_drop, after_truncated = [start for _, start in hub.requests]
    size = len(hub.files[name])
    assert first_bytes == [0] * 5
    assert size // 3 - 100_000 < after_drop <= size // 3
    assert after_truncated == size // 2 - 1  # the hub had ignored the range


def test_a_part_that_is_complete_or_rotten_is_not_trusted_but_mended(hub, cache):
    whole = hub.files["shard_00000.parquet"]
    folder = prepare.downloads(prepare.CLIMBMIX)
    folder.mkdir(parents=True)
    for left in (whole, b"rotten" * 100, whole + b"more"):
        (folder / "shard_00000.parquet.part").write_bytes(left)
        path = prepare.fetch(prepare.CLIMBMIX, "shard_00000.parquet")
        assert path.read_bytes() == whole
        path.unlink()


LASTING = {404: "HTTP 404", 401: "HTTP 401", 503: "HTTP 503", "truncated": "bytes arrived of"}
LASTING |= {"sha256": "sha256", "html": "no good", "too long": "was announced"}


@pytest.mark.parametrize("fault, reason", LASTING.items())
def test_a_lasting_fault_ends_in_one_sentence_and_keeps_the_rest(
    hub, cache, monkeypatch, fault, reason
):
    hub.faults["shard_00001.parquet"] = [fault]
    command = "prepare.py --source climbmix --scale small"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(Refusal) as stopped:
        prepare.main()
    message = str(stopped.value)
    assert message.startswith("cannot download shard_00001.parquet") and "\n" not in message
    assert reason in message and "--source python" in message
    kept = fetched(cache)
    assert {name for name in kept if not name.endswith(".part")} == {"shard_00000.parquet", VAL}
    assert not (cache / "current").exists()
    tries = [start for name, start in hub.requests if name == "shard_00001.parquet"]
    assert len(tries) == (1 if fault in (401, 404) else 7)


def test_the_python_source_is_the_standard_library_and_the_packages(tmp_path):
    files = prepare.find_source("python", 1).files
    assert len(files) == len(set(files)) > 2000
    assert {"argparse.py", "numpy", "torch"} <= {part for path in files for part in path.parts}
    assert not [path for path in files if path.parent in (ROOT, ROOT / "tests")]
    latin = tmp_path / "latin.py"
    latin.write_bytes("# coding: latin-1\nname = 'café'\n".encode("latin-1"))
    assert list(prepare.documents([latin])) == ["# coding: latin-1\nname = 'caf\ufffd'\n"]


# ---------------------------------------------------------------------------
# Command line, device, budget, errors


@pytest.mark.parametrize("value", ["abc", "-1", "0", "301", "nan", "1e9", "2.5"])
def test_a_bad_number_in_the_environment_is_one_sentence(monkeypatch, value):
    monkeypatch.setenv("SOME_NUMBER", value)
    sentence = f"SOME_NUMBER={value} is not a number from 1 to 300; unset it for 7$"
    with pytest.raises(Refusal, match=sentence):
        prepare.from_environment("SOME_NUMBER", 7, int, 1, 300)


def test_what_the_environment_says_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.example/")
    for budget, latest in (("20", 25), ("300", 309), ("86400", 88992)):
        monkeypatch.setenv("AUTORESEARCH_BUDGET", budget)
        copy = import_copy(tmp_path / "prepare.py")
        assert latest == copy.LATEST_END  # 3% or 5 seconds later
    assert copy.HUB == "https://hf-mirror.example"


def test_an_nvidia_gpu_that_torch_cannot_use_is_an_error(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("The NVIDIA driver on your system is too old")

    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch, "ones", broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(Refusal, match="cannot use the NVIDIA GPU here .*driver .* too old"):
        prepare.pick_device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert prepare.pick_device() in ("cpu", "mps")


def test_the_scale_follows_the_device_and_the_source_the_scale(hub, monkeypatch, capsys):
    properties = SimpleNamespace()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    for device, gigabytes, scale, source in (
        ("cuda", 42.3, "full", "climbmix"),  # an A100 of 40 GB
        ("cuda", 34.2, "medium", "climbmix"),  # an RTX 5090
        ("mps", 85, "small", "tinystories"),
    ):
        properties.total_memory = int(gigabytes * 1e9)
        monkeypatch.setattr(prepare, "DEVICE", device)
        assert (prepare.default_scale(), prepare.default_source(scale)) == (scale, source)
    monkeypatch.setattr(prepare, "HUB", "http://127.0.0.1:9")
    assert prepare.default_source("small") == "python"
    assert "http://127.0.0.1:9 cannot be reached" in capsys.readouterr().out


def test_a_refusal_is_printed_as_its_sentence_and_a_bug_with_its_traceback(capsys):
    assert issubclass(Refusal, Exception)  # so that an `except Exception` of train.py holds it
    sys.excepthook(Refusal, Refusal("do this"), None)
    assert capsys.readouterr().err == "error: do this\n"
    sys.excepthook(KeyError, KeyError("a bug"), None)
    assert capsys.readouterr().err == "KeyError: 'a bug'\n"  # as Python prints it


# ---------------------------------------------------------------------------
# Loader and clock


def start_anew():
    """Forget the clock and the rows that were drawn, as a new process does."""
    prepare.run = prepare.Run()
    prepare.row_order.cache_clear()


def loader_of(B, T=32):
    return make_dataloader(None, B, T, "train")


def drawn(loader, n_batches):
    """The inputs of the next batches: the bytes of each row."""
    rows = []
    for _ in range(n_batches):
        inputs, _, _ = next(loader)
        rows += [row.numpy().tobytes() for row in inputs]
    return rows


@pytest.fixture
def passing(monkeypatch):
    """passing(9) lets nine seconds pass on the clock, which stands still otherwise."""
    passed = []
    monkeypatch.setattr(prepare, "monotonic", lambda: 1000.0 + sum(passed))
    return passed.append


def test_batches_hold_rows_with_targets_one_token_on_and_their_epoch(tiny):
    rows = {row.tobytes() for row in prepare.load_rows("train")}
    B = len(prepare.load_rows("train")) - 1  # so that the second batch spans two epochs
    loader = loader_of(B)
    for epoch in (1, 2, 3):
        inputs, targets, epoch_of_last_row = next(loader)
        assert inputs.shape == targets.shape == (B, 32) and epoch_of_last_row == epoch
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.is_contiguous() and targets.is_contiguous()
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        whole = torch.cat([inputs, targets[:, -1:]], 1).numpy().astype(np.uint16)
        assert {row.tobytes() for row in whole} <= rows


def test_an_epoch_shows_every_row_once_in_an_order_that_the_seed_decides(tiny):
    inputs = prepare.load_rows("train")[:, :-1].astype(np.int64)
    everything = Counter(row.tobytes() for row in inputs)
    orders = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        start_anew()
        loader = loader_of(len(inputs))
        first, second = drawn(loader, 1), drawn(loader, 1)
        assert Counter(first) == everything == Counter(second)
        assert first != second
        orders.append(first)
    assert orders[0] == orders[1] != orders[2]


def test_loaders_of_any_shape_go_on_in_one_order(tiny):
    rows = drawn(loader_of(4), 4)
    start_anew()
    rows_again = drawn(loader_of(4), 1)
    start = prepare.run.start
    rows_again += drawn(loader_of(8), 1)
    rows_again += drawn(loader_of(16, T=8), 1)  # quarters of rows
    assert b"".join(rows) == b"".join(rows_again) and prepare.run.start == start


@pytest.mark.parametrize(
    "args", [(4, 32, "val"), (4, 31, "train"), (0, 32, "train"), (4, 64, "train")]
)
def test_the_loader_refuses_at_once(tiny, args):
    with pytest.raises(Refusal):
        make_dataloader(None, *args)


@CUDA
def test_the_pinned_loader_gives_a_gpu_the_rows_that_a_cpu_gets(tiny, monkeypatch):
    def batches():
        start_anew()
        torch.manual_seed(1)
        loader = loader_of(16)
        for _ in range(100):
            inputs, targets, _ = next(loader)
            if inputs.is_cuda:
                torch.cuda._sleep(10**6)  # The GPU falls behind, and the CPU runs ahead of it.
            yield torch.stack([inputs, targets])

    expected = torch.stack(list(batches()))
    monkeypatch.setattr(prepare, "DEVICE", "cuda")
    assert torch.equal(torch.stack(list(batches())).cpu(), expected)


@pytest.mark.parametrize(
    "read", [lambda: next(loader_of(2)), lambda: prepare.load_rows("train")], ids=["loader", "rows"]
)
def test_the_clock_starts_when_training_rows_are_first_read(tiny, passing, read):
    clock = prepare.clock
    check(Toy())
    evaluate(Toy())
    loader_of(2)
    passing(50)
    assert clock.elapsed() == clock.progress() == 0
    read()
    passing(75)
    read()
    assert clock.elapsed() == 75 and clock.progress() == 0.25
    passing(1000)
    assert clock.elapsed() == 1075 and clock.progress() == 1


@pytest.mark.parametrize("accum", [1, 3])
def test_the_step_under_way_gets_its_batches_and_no_other_step_does(tiny, passing, accum):
    loader, clock = loader_of(2), prepare.clock
    next(loader)
    for _ in range(2):
        assert clock.progress() < 1
        for _ in range(accum):
            next(loader)
    assert clock.progress() < 1
    passing(300.5)  # a step begins in time, and its batches come late
    for _ in range(accum):
        next(loader)
    assert clock.elapsed() > 300
    with pytest.raises(Refusal, match=r"are over: end the loop when clock\.progress\(\) is 1"):
        next(loader)


def test_a_loop_with_a_limit_of_its_own_gains_one_step(tiny, passing):
    loader, steps = loader_of(2), 0
    next(loader)
    with pytest.raises(Refusal, match="are over"):
        while prepare.clock.elapsed() < 308:
            next(loader)
            steps += 1
            passing(0.5)
    assert steps == 300 / 0.5 + 1 + 1  # one at 300.0 s, which is no more than the budget


def test_an_evaluation_has_patience_with_a_slow_last_step(tiny, passing):
    next(loader_of(2))
    passing(308.9)
    evaluate(Toy())
    assert prepare.run.result["training_seconds"] == "308.9"
    prepare.run.evaluated = False  # as if the training went on
    passing(0.2)
    with pytest.raises(Refusal, match=r"took 309\.1 s of a budget of 300 s; a step was too long"):
        evaluate(Toy())


def test_the_watchdog_is_set_anew_in_each_stage(tiny, monkeypatch):
    armed = []

    def arm(seconds, exit, file):
        armed.append(seconds)
        assert exit

    monkeypatch.setattr(faulthandler, "dump_traceback_later", arm)
    loader = loader_of(2)
    assert armed == [600]
    drawn(loader, 3)
    assert armed == [600, 309 + 300]
    evaluate(Toy())
    assert armed == [600, 609] + [300] * (1024 // 8 + 40 // 8 + 1)


# ---------------------------------------------------------------------------
# The judge: which models it refuses, and which it accepts


class Toy(nn.Module):
    """An honest causal model, small enough to be scored in a moment.

    Each token has a row in a table, which holds its logits for the next token. A fiftieth of the
    rows of this token and all before it is added, so that a logit depends on more than one token.
    A test may give a function that changes the logits: change(model, logits, x).
    """

    def __init__(self, change=lambda model, logits, x: logits):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(512, 512, generator=generator))
        self.zero = nn.Parameter(torch.zeros(()))  # for a change that hides behind it
        self.change = change
        self.seen = []  # for a change that keeps a memory

    def forward(self, x):
        rows = self.table[x]
        return self.change(self, rows + rows.cumsum(1) / 50, x)


# The harness takes the tokenizer that made the rows, whatever train.py passes.


def check(model, batch_size=8):
    check_model(model, None, batch_size)


def evaluate(model, batch_size=8):
    return evaluate_bpb(model, None, batch_size)


def ahead(steps, rows=slice(None), positions=slice(None)):
    """A change that adds the token some steps ahead, everywhere or at some rows or positions."""

    def change(model, logits, x):
        later = F.pad(model.table[x], (0, 0, 0, steps))[:, steps:]
        logits[rows, positions] += later[rows, positions]
        return logits

    return change


def others(choose):
    """A change that adds what it chooses from the table's rows of all tokens."""
    return lambda model, logits, x: logits + choose(model.table[x])


def norm_over_rows(model, logits, x):
    return F.batch_norm(logits.flatten(1), None, None, training=True).view_as(logits)


def batch_norm(model, logits, x):
    return 1.5 * F.batch_norm(logits.mT, None, None, training=True).mT


def count_the_calls(model, logits, x):
    model.seen.append(None)
    return logits * (1 + len(model.seen) / 50)


def memorise_rows(model, logits, x):
    known = [row in model.seen for row in x.tolist()]
    model.seen += x.tolist()
    return logits * (1 + torch.tensor(known)[:, None, None])


def spoil(value):
    def change(model, logits, x):
        logits[1, 7, 5] = value
        return logits

    return change


LATER, OTHER = "depends on later tokens", "depends on other rows or earlier batches"
MEMORY = "draws random numbers or keeps a memory"
REFUSED = {
    "one token ahead": (ahead(1), LATER),
    "twenty tokens ahead": (ahead(20), LATER),
    "ahead in the last quarter": (ahead(1, positions=slice(24, None)), LATER),
    "ahead in one row of a batch": (ahead(1, rows=[2]), f"{LATER}|{OTHER}"),
    "a mean over time": (others(lambda rows: 5 * rows.mean(1, keepdim=True)), LATER),
    "a mean over rows": (others(lambda rows: rows.mean(0, keepdim=True)), OTHER),
    "the next row": (others(lambda rows: rows.roll(-1, 0)), OTHER),
    "BatchNorm in training mode": (batch_norm, f"{LATER}|{OTHER}"),
    "a mean and a deviation over rows": (norm_over_rows, OTHER),
    "a memory of rows": (memorise_rows, MEMORY),
    "a count of the calls": (count_the_calls, f"{OTHER}|{MEMORY}"),
    "random numbers": (lambda model, logits, x: F.dropout(logits, 0.1), MEMORY),
    "NaN": (spoil(math.nan), "not finite"),
    "infinity": (spoil(math.inf), "not finite"),
    "minus infinity": (spoil(-math.inf), "not finite"),
    "a vocabulary too wide": (lambda model, logits, x: F.pad(logits, (0, 64)), r"must give logits"),
    "a position too few": (lambda model, logits, x: logits[:, 1:], r"gives \(8, 31, 512\)"),
    "a loss": (lambda model, logits, x: logits.mean(), r"gives \(\)"),
    "a pair": (lambda model, logits, x: (logits, None), "gives tuple"),
}


@pytest.mark.parametrize("stage", [check, evaluate])
@pytest.mark.parametrize("change, sentence", REFUSED.values(), ids=REFUSED)
def test_the_judge_refuses(tiny, stage, change, sentence):
    torch.manual_seed(0)
    with pytest.raises(Refusal, match=sentence) as stopped:
        stage(Toy(change))
    assert "\n" not in str(stopped.value)


def ahead_in_one_row_of_forty(model, logits, x):
    known = torch.from_numpy(prepare.load_rows("val")[7, :3].astype(np.int64))
    return ahead(1, rows=(x[:, :3] == known).all(1))(model, logits, x)


def a_small_gain(model, logits, x):
    """No score changes by a quarter of a nat, but all of them change to the better."""
    logits[:, :-1] += 0.02 * F.one_hot(x, 512)[:, 1:]
    return logits


def a_soft_mean(model, logits, x):
    """The tokens of the row get 3% more of the probability, the later ones too."""
    return logits + 0.03 * (F.one_hot(x, 512).sum(1, keepdim=True) > 0)


RARE = {
    "at one position": (ahead(1, positions=[13]), LATER),
    "at the last position but one": (ahead(1, positions=[30]), LATER),
    "in one row of forty, wherever it stands": (ahead_in_one_row_of_forty, LATER),
    "a little, everywhere": (a_small_gain, f"{LATER} .* by 0.0(19|2) nats"),
    "a mean over time, a little": (a_soft_mean, LATER),
}


@pytest.mark.parametrize("change, sentence", RARE.values(), ids=RARE)
def test_an_evaluation_always_finds_a_small_or_rare_look_ahead(tiny, change, sentence):
    for _ in range(5):
        with pytest.raises(Refusal, match=sentence):
            evaluate(Toy(change))


def test_the_early_check_sees_through_a_projection_that_is_still_zero(tiny):
    def hidden(model, logits, x):
        return logits + 100 * model.zero * ahead(1)(model, 0 * logits, x)

    torch.manual_seed(0)
    with pytest.raises(Refusal, match=LATER):
        check(Toy(hidden))


class Layer(nn.Module):
    """A model whose one layer is a function of embedded tokens (B, T, 64)."""

    def __init__(self, layer, dtype=torch.float32, tied=False):
        super().__init__()
        self.embed, self.head = nn.Embedding(512, 64), nn.Linear(64, 512)
        if tied:
            self.head.weight = self.embed.weight
        self.layer, self.dtype = layer, dtype

    def forward(self, x):
        h = self.embed(x).to(self.dtype)
        h = h + self.layer(h)
        return F.linear(h, 3 * self.head.weight.to(h.dtype))


class Recurrent(nn.LSTM):
    def forward(self, h):
        return super().forward(h)[0]


class Norm(nn.BatchNorm1d):
    def forward(self, h):
        return super().forward(h.mT).mT


class FP8(nn.Module):
    """An MLP whose activations are rounded to FP8 with a scale that the whole batch decides."""

    def __init__(self):
        super().__init__()
        self.fc, self.proj = nn.Linear(64, 256), nn.Linear(256, 64)

    def round(self, h):
        scale = 448 / h.abs().max().clamp_min(1e-6)  # the largest number of this format
        return (h * scale).to(torch.float8_e4m3fn).to(h.dtype) / scale

    def forward(self, h):
        return 0.1 * self.proj(self.round(F.relu(self.fc(self.round(h))).square()))


class Experts(nn.Module):
    """A mixture of experts without capacity: how many tokens an expert gets, the text decides."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(64, 4)
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, h):
        choice, y = self.router(h).argmax(-1), torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            y[choice == i] = expert(h[choice == i])
        return y


class LongConv(nn.Module):
    """A convolution over the whole past by FFT, whose rounding reaches earlier tokens."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(32, 64) / 6)

    def forward(self, h):
        spectrum = torch.fft.rfft(h.float(), 64, 1) * torch.fft.rfft(self.kernel, 64, 0)
        return torch.fft.irfft(spectrum, 64, 1)[:, :32].to(h.dtype)


class Logarithm(Toy):
    """The logits are scaled by small positive parameters, of which none may become negative."""

    def __init__(self):
        super().__init__()
        self.small = nn.Parameter(torch.full((512,), 0.05))

    def forward(self, x):
        return super().forward(x) / (2 + self.small.log().square())


def count_the_past(model, logits, x):
    """A cache: most of its probability goes to the earlier tokens of the row."""
    seen = F.one_hot(x, 512).float().cumsum(1)
    return (0.1 / 512 + 0.9 * seen / seen.sum(-1, keepdim=True)).log()


def clear_the_inputs(model, logits, x):
    x.zero_()
    return logits


def rule_out_bos(model, logits, x):
    logits[..., 0] = torch.finfo(logits.dtype).min
    return logits


ACCEPTED = {
    "a table": lambda: Toy(),
    "a uniform guess": lambda: Toy(lambda model, logits, x: 0 * logits),
    "a cache over the row": lambda: Toy(count_the_past),
    "a token ruled out": lambda: Toy(rule_out_bos),
    "inputs that are overwritten": lambda: Toy(clear_the_inputs),
    "logits in bfloat16": lambda: Toy(lambda model, logits, x: logits.bfloat16()),
    "hardware that rounds by chance": lambda: Toy(
        lambda model, logits, x: logits + 1e-3 * torch.randn_like(logits)
    ),
    "an LSTM with tied embeddings": lambda: Layer(Recurrent(64, 64, batch_first=True), tied=True),
    "an average of weights": lambda: torch.optim.swa_utils.AveragedModel(Layer(nn.Linear(64, 64))),
    "a mixture of experts": lambda: Layer(Experts()),
    "FP8 with a scale from the batch": lambda: Layer(FP8()),
    "a logarithm of a small parameter": lambda: Logarithm(),
    "BatchNorm in evaluation mode": lambda: Layer(Norm(64)),
    "an FFT convolution": lambda: Layer(LongConv()),
    "an FFT convolution in bfloat16": lambda: Layer(LongConv(), torch.bfloat16),
}


def bits_by_hand(model):
    """Bits per byte of the validation rows: one row at a time, one target at a time."""
    nats, n_bytes, tokenizer = 0.0, 0, Tokenizer.from_directory()
    token_bytes = [len(tokenizer.bpe.id_to_token(i)) for i in range(512)]
    for row in prepare.load_rows("val").astype(np.int64):
        with torch.no_grad():
            logits = model(torch.tensor(row[None, :-1]))[0]
        log_probs = logits.double().log_softmax(-1)
        for position, target in enumerate(row[1:].tolist()):
            if target != tokenizer.bos:
                nats -= log_probs[position, target].item()
                n_bytes += token_bytes[target]
    return nats / math.log(2) / n_bytes


@pytest.mark.parametrize("make", ACCEPTED.values(), ids=ACCEPTED)
def test_the_judge_accepts_and_scores_as_one_does_by_hand(tiny, make):
    torch.manual_seed(0)
    model = make()
    model.constant = nn.Parameter(torch.arange(32), requires_grad=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check(model)
    assert model.training and torch.equal(model.constant, before["constant"])
    model.load_state_dict(before)
    assert evaluate(model) == pytest.approx(bits_by_hand(model.eval()), rel=2e-4)


class Simulated(prepare.Judge):
    """A judge at the size of `small` whose model is made up, so that an evaluation takes a moment.

    All scores are zero but for these effects. A row is known by its targets.

    look_ahead   in one row of so many, each token that sees the next one gains 3 nats
    gain         nats that each token of a whole row gains
    spread       standard deviation of what chance adds to a score, anew each time
    flips        share of the scores that the rest of a batch may move by 0.5 nats
    memory       nats that each token gains in the last batch, and less in those before it
    """

    def __init__(self, look_ahead=0, gain=0.0, spread=0.0, flips=0.0, memory=0.0):
        super().__init__(nn.Identity(), 16, SimpleNamespace(bos=0, get_vocab_size=lambda: 2048))
        self.look_ahead, self.gain, self.spread = look_ahead, gain, spread
        self.flips, self.memory, self.batches = flips, memory, 0

    def score(self, inputs, targets):
        n, T = targets.shape
        sees_next = F.pad(inputs[:, 1:] == targets[:, :-1], (0, 1))
        nats = self.spread * torch.randn(n, T) - self.gain * sees_next[:, :-1].all(1, keepdim=True)
        if self.look_ahead:
            nats -= 3 * (sees_next & (targets[:, :1] % self.look_ahead == 0))
        flip = torch.rand(n // 16, 16, T) < self.flips / 2
        if (targets == targets[0]).all():
            flip[:] = flip[:, :1].clone()  # copies of a row in one batch are rounded alike
        nats += 0.5 * flip.view(n, T)
        batch = self.batches + torch.arange(n) // 16
        self.batches += n // 16
        return nats - self.memory * batch[:, None] / 193  # of 32 + 128 + 32 + 1 batches


def share_refused(runs, n_rows=2048, **fields):
    """The share of evaluations in which the judge refuses a model that is made up."""
    rows = np.random.default_rng(0).integers(1, 2048, (n_rows, 257))
    refused = 0
    for _ in range(runs):
        try:
            Simulated(**fields).judge(rows, 1024, prepare.MAX_ROUNDING)
        except Refusal:
            refused += 1
    return refused / runs


# The shares that were measured, in 300 evaluations each:
#
# look-ahead by one token in one row of 32, 100, 300, 1000       1.00  1.00  0.91  0.75
# a gain of 0.0003, 0.001, 0.003, 0.01, 0.03, spread 0.01        1.00  1.00  1.00  1.00  1.00
# the same gains, spread 0.1                                     0.00  0.06  1.00  1.00  1.00
# a memory of 0.0003, 0.001, 0.003, 0.01, 0.03, spread 0.01      0.09  1.00  1.00  1.00  1.00
# the same memories, spread 0.1                                  0.00  0.00  0.07  1.00  1.00
# honest: spread 0.01, 0.03, 0.1, 0.15                           0.003 0.00  0.00  0.00
# honest: flips 0.001, 0.01, 0.03                                0.00  0.00  0.00
#
# A spread of 0.3 is taken for random numbers, with a gain or without.
SURE = [
    ({"look_ahead": 32}, 1),
    ({"gain": 0.0005, "spread": 0.01}, 1),
    ({"gain": 0.005, "spread": 0.1}, 1),
    ({"memory": 0.002, "spread": 0.01}, 1),
    ({"memory": 0.02, "spread": 0.1}, 1),
    ({"spread": 0.1}, 0),
    ({"flips": 0.01}, 0),
    ({"spread": 0.3}, 1),
]


@pytest.mark.parametrize("effects, share", SURE)
def test_the_judge_knows_what_a_leak_gains_from_what_chance_does(effects, share):
    torch.manual_seed(0)
    assert share_refused(4, **effects) == share


def test_rows_that_are_asked_again_and_again_accuse_nobody_by_chance():
    assert share_refused(30, n_rows=8, spread=0.1) < 0.3  # 0.03 in the long run


@pytest.mark.parametrize("batch_size", [1, 3, 40, 64])
def test_every_row_counts_once_at_any_batch_size(tiny, batch_size):
    check(Toy(), batch_size)
    assert evaluate(Toy(), batch_size) == pytest.approx(evaluate(Toy(), 5), rel=1e-6)


# ---------------------------------------------------------------------------
# Metric


def test_bpb_of_a_uniform_model_is_log2_vocab_per_token_over_bytes(tiny):
    """Texts stand in val.bin in place of the corpus, so that their bytes can be counted.

    Each row begins with BOS and goes on with 32 tokens of the texts, which have a BOS between them.
    BOS also fills up the last row. So the targets are all tokens of all texts, and BOS.
    """
    texts = [*ODD_TEXTS, TEXTS[0][:5000]]
    tokenizer = Tokenizer.from_directory()
    bos, encoded = tokenizer.bos, tokenizer.encode(texts)
    stream = [token for tokens in encoded for token in [*tokens, bos]]
    stream += [bos] * (-len(stream) % 32)
    rows = [[bos, *stream[i : i + 32]] for i in range(0, len(stream), 32)]
    (tiny / "val.bin").write_bytes(np.array(rows, np.uint16).tobytes())
    prepare.DATASET[1]["val_rows"] = len(rows)
    n_tokens = sum(len(tokens) for tokens in encoded)
    n_bytes = sum(len(text.encode()) for text in texts)
    expected = 9 * n_tokens / n_bytes  # The vocabulary has 512 = 2**9 tokens.
    uniform = Toy(lambda model, logits, x: 0 * logits)
    assert evaluate(uniform) == pytest.approx(expected, rel=1e-6)


def test_a_run_is_evaluated_once_and_the_harness_writes_its_own_values(tiny, capsys):
    with pytest.raises(Refusal, match="call evaluate_bpb first"):
        prepare.print_summary({})
    evaluate(Toy())  # before training it decides nothing
    loader = loader_of(16, T=16)
    drawn(loader, 60)
    bpb = evaluate(Toy())
    prepare.print_summary({"num_steps": 60, "val_bpb": 0.1, "harness": "0" * 12})
    lines = capsys.readouterr().out.partition("---\n")[2].splitlines()
    shown = dict(re.split(r": +", line) for line in lines)
    assert len(shown) == len(lines) and shown["val_bpb"] == f"{bpb:.6f}"
    assert shown["num_steps"] == "60" and shown["total_tokens_M"] == "0.0"
    assert prepare.run.tokens == 60 * 16 * 16 and shown["source"] == "corpus"
    assert (shown["harness"], shown["code"]) == (prepare.harness_digest(), prepare.SCRIPT_HASH)
    with pytest.raises(Refusal, match="was called before"):
        evaluate(Toy())
    with pytest.raises(Refusal, match="because evaluate_bpb was called"):
        next(loader)


def test_a_name_that_was_assigned_anew_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(prepare, "AS_IMPORTED", {"TIME_BUDGET": prepare.TIME_BUDGET})
    evaluate(Toy())
    result = prepare.run.result
    monkeypatch.setattr(prepare, "TIME_BUDGET", 600.0)
    for call in (lambda: loader_of(2), lambda: evaluate(Toy())):
        with pytest.raises(Refusal, match="^TIME_BUDGET of prepare.py was assigned anew"):
            call()
    assert prepare.run.result is result


def test_every_name_of_prepare_py_is_watched():
    assert {"TIME_BUDGET", "MAX_SEQ_LEN", "clock", "run", "Judge", "np"} <= set(prepare.AS_IMPORTED)
    assert all(prepare.AS_IMPORTED[name] is getattr(prepare, name) for name in prepare.AS_IMPORTED)
