"""The store of teacher vectors: what is read is what was computed, whatever happened meanwhile.

Run as a script, this file is the other process of the tests below (see `main`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from armada_lib import features, rowfile
from armada_lib.features import MissingVectors, Store, moments

WIDTH = 64
TEXTS = [f"text number {i}" for i in range(300)]
MANY = [f"text number {i}" for i in range(1200)]


def encode(texts, width=WIDTH):
    """A teacher whose vector depends on the text only."""
    seeds = [int.from_bytes(hashlib.md5(t.encode()).digest()[:8]) for t in texts]
    draw = [np.random.default_rng(s).standard_normal(min(width, 64), np.float32) for s in seeds]
    return (
        np.resize(draw[0], width)[None]
        if len(draw) == 1
        else np.stack([np.resize(d, width) for d in draw])
    )


def same(store, texts=TEXTS):
    return np.array_equal(store.gather(texts), encode(texts, store.width).astype(np.float16))


def shards(store, pattern="*.rows"):
    return sorted((store.folder / "shards").glob(pattern))


def leftovers(root):
    return [p for p in Path(root).rglob("*") if p.suffix == ".tmp"]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path, "teacher", WIDTH, meta={"teacher": "sd14"})


# -- the other process -------------------------------------------------------------------------


def spawn(*arguments):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *map(str, arguments)]
    p = subprocess.PIPE
    return subprocess.Popen(command, env=env, text=True, stdin=p, stdout=p, stderr=p)


def begin(*children):
    """Let `fill` children start, when all of them are ready."""
    for c in children:
        assert c.stdout.readline() == "ready\n"
    for c in children:
        c.stdin.write("go\n")
        c.stdin.flush()


def main(what, root, *arguments):
    numbers = [int(a) for a in arguments]
    if what == "fill":  # shard rows, from, to, ms a call: says which texts it computed
        rows, first, last, pause = numbers
        texts = [f"text number {i}" for i in range(first, last)]

        def slow(batch):
            print("\n".join(batch), flush=True)
            time.sleep(pause / 1000)
            return encode(batch)

        print("ready", flush=True)
        sys.stdin.readline()
        Store(root, "teacher", WIDTH).fill(texts, slow, rows, progress=False)
    elif what == "die":  # at the k-th sync, before or after it, or in the middle of the k-th file
        when, k = numbers
        sync, calls = os.fsync, iter(range(1, 1000))

        def fsync(fd):
            if next(calls) == k:
                if when == 0:
                    os.ftruncate(fd, os.fstat(fd).st_size // 2)
                if when == 2:
                    sync(fd)
                os.kill(os.getpid(), signal.SIGKILL)
            sync(fd)

        os.fsync = fsync
        Store(root, "teacher", WIDTH).fill(TEXTS, encode, 20, progress=False)
    elif what == "wide":  # prints how much the peak memory of the process grew, MiB
        rows, width = numbers
        texts = [f"wide {i}" for i in range(rows)]
        store = Store(root, "teacher", width)
        import torch  # noqa: F401  (its own memory is not what is measured)

        encode(["warm"], width)
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        before = peak()
        store.fill(texts, lambda b: encode(b, width).astype(np.float16), progress=False)
        filled = peak()
        m = store.matrix(texts)
        print(filled - before, peak() - before, len(shards(store)), *m.shape)
        assert np.array_equal(m[-1:].numpy(), encode(texts[-1:], width).astype(np.float16))
    elif what == "quota":  # no file may exceed so many bytes: a real failing write
        resource.setrlimit(resource.RLIMIT_FSIZE, (numbers[0], numbers[0]))
        try:
            Store(root, "teacher", WIDTH).fill(TEXTS, encode, 100, progress=False)
        except OSError as e:
            print(e)
    elif what == "stranger":  # someone who may read and not write
        import mmap  # noqa: F401  (the stranger may not read Python's own folder)

        if os.getuid() == 0:
            os.setuid(65534)
        store = Store(root, "teacher", WIDTH)
        assert same(store, TEXTS[10:])
        print(len(store.missing(TEXTS)))
        for s in (store, Store(root, "other", WIDTH)):
            with contextlib.suppress(PermissionError):
                s.fill(TEXTS, print, progress=False)
                print("no error")


# -- round trip --------------------------------------------------------------------------------


def test_round_trip_dedup_and_meta(store, tmp_path):
    calls = []
    teacher = lambda b: calls.append(b) or encode(b)
    assert store.missing(TEXTS * 2) == TEXTS
    assert store.fill(TEXTS * 2, teacher, progress=False) == len(TEXTS)
    assert store.fill(TEXTS[::-1], teacher, progress=False) == 0
    assert sorted(t for b in calls for t in b) == sorted(TEXTS)
    mixed = [*TEXTS[::-1], TEXTS[5], TEXTS[5]]
    for s in (store, Store(tmp_path, "teacher", WIDTH)):
        assert s.missing(mixed) == []
        assert s.gather(mixed).dtype == np.float16
        assert same(s, mixed)
    meta = json.loads((store.folder / "meta.json").read_text())
    assert meta == {"teacher": "sd14", "fingerprint": "teacher", "width": WIDTH, "dtype": "float16"}
    assert not leftovers(tmp_path)


def test_a_second_fill_adds_only_what_is_new(store):
    store.fill(TEXTS[:50], encode, progress=False)
    seen = []
    assert store.fill(TEXTS, lambda b: seen.extend(b) or encode(b), progress=False) == 250
    assert sorted(seen) == sorted(TEXTS[50:])
    assert same(store)


def test_matrix_is_one_mapped_file_that_stays_as_it_is(store, tmp_path):
    import torch

    mixed = [*TEXTS[::-1], TEXTS[3]]
    store.fill(TEXTS, encode, 7, progress=False)
    m = store.matrix(mixed)
    expected = torch.from_numpy(encode(mixed)).half()
    assert m.dtype == torch.float16 and torch.equal(m, expected)
    rows = torch.randperm(len(mixed))[:32]
    assert torch.equal(m.index_select(0, rows), expected[rows])
    m.zero_()  # a private mapping
    for s in shards(store):
        s.unlink()
    again = Store(tmp_path, "teacher", WIDTH).matrix(mixed)
    assert torch.equal(again, expected)
    assert len(list((store.folder / "views").iterdir())) == 1


def test_float32_and_a_store_of_another_kind(tmp_path):
    s = Store(tmp_path, "a", 8, "float32")
    s.fill(TEXTS[:9], lambda b: encode(b, 8), progress=False)
    assert np.array_equal(s.matrix(TEXTS[:9]).numpy(), encode(TEXTS[:9], 8))
    with pytest.raises(ValueError, match=r"holds float32 vectors, 8 wide; asked for float16, 8"):
        Store(tmp_path, "a", 8)
    with pytest.raises(ValueError, match=r"8 wide; asked for float32, 9 wide"):
        Store(tmp_path, "a", 9, "float32")
    assert len(shards(s)) > 0 and not shards(s, "*.damaged")


def test_calls_grow_to_the_limit_and_shrink_for_a_slow_teacher(store, tmp_path, monkeypatch):
    sizes = []
    store.fill(TEXTS, lambda b: sizes.append(len(b)) or encode(b), 50, progress=False)
    assert sizes == [4, 8, 16, 32, 50, 50, 50, 50, 40]
    wide, sizes = Store(tmp_path, "wide", 262_144), []
    wide.fill(TEXTS[:18], lambda b: sizes.append(len(b)) or encode(b, 262_144), progress=False)
    assert max(sizes) == 8  # 4 MiB
    monkeypatch.setattr(features, "SHARD_SECONDS", 0.05)
    slow, sizes = Store(tmp_path, "slow", WIDTH), []
    teacher = lambda b: sizes.append(len(b)) or time.sleep(0.02 * len(b)) or encode(b)
    slow.fill(TEXTS[:12], teacher, progress=False)
    assert max(sizes[1:]) <= 2


def test_the_older_shard_wins_whatever_is_read_first(store, tmp_path):
    store.fill(TEXTS[:2], encode, progress=False)
    key = features._keys(["twice"])
    for name, value in (("2", 2.0), ("1", 1.0)):
        vectors = np.full((1, WIDTH), value, np.float16)
        path = store.folder / "shards" / f"{name}.rows"
        store.files.write(path, path.with_suffix(".tmp"), key, [vectors])
        assert store.gather(["twice"])[0, 0] == value
    assert Store(tmp_path, "teacher", WIDTH).gather(["twice"])[0, 0] == 1


# -- interruptions and damage ------------------------------------------------------------------


def test_killed_at_random_then_completed(tmp_path, store):
    chance, stored = random.Random(0), 0
    for _ in range(6):
        child = spawn("fill", tmp_path, 4, 0, len(MANY), 4)
        begin(child)
        first = child.stdout.readline()
        time.sleep(chance.uniform(0, 0.1))
        child.kill()
        computed = [first, *child.communicate()[0].splitlines()]
        assert child.returncode == -signal.SIGKILL and first
        missing, before = set(store.missing(MANY)), stored
        there = [t for t in MANY if t not in missing]
        stored = len(there)
        assert stored - before >= len(computed) - 4  # at most the shard in work was lost
        assert not there or same(store, there)
    assert 0 < stored < len(MANY)
    assert store.fill(MANY, encode, progress=False) == len(MANY) - stored
    whole = Store(tmp_path, "uninterrupted", WIDTH)
    whole.fill(MANY, encode, progress=False)
    assert np.array_equal(store.gather(MANY), whole.gather(MANY))
    assert store.verify() == [] and not shards(store, "*.damaged")


@pytest.mark.parametrize(
    ("when", "call"),
    [(0, 7), (1, 7), (2, 7), (1, 8)],
    ids=["half a file", "before its sync", "before its renaming", "before the folder's sync"],
)
def test_killed_at_a_sync(tmp_path, when, call):
    child = spawn("die", tmp_path, when, call)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    store = Store(tmp_path, "teacher", WIDTH)
    stored = len(TEXTS) - len(store.missing(TEXTS))
    # syncs 1, 2: meta.json; then two a shard, of 4, 8, 16 ... texts. 7 and 8 are the third's.
    assert stored == (12 if call == 7 else 12 + 16)
    assert not shards(store, "*.damaged")
    for left in leftovers(tmp_path):  # as old as if the store was left alone for a day
        os.utime(left, (0, 0))
    assert store.fill(TEXTS, encode, progress=False) == len(TEXTS) - stored
    assert same(store) and not leftovers(tmp_path)


def damage(path, how):
    raw = bytearray(path.read_bytes())
    size = len(raw)
    if how == "truncated data":
        raw = raw[: size // 2]
    elif how == "truncated header":
        raw = raw[:-40]
    elif how == "empty":
        raw = raw[:0]
    elif how == "hole":  # sizes in the header no longer fit the file
        raw = raw[:100] + raw[200:]
    else:
        data = size - rowfile.TAIL - 20 * rowfile.KEY
        at = {"data": 11, "last byte of data": data - 1, "keys": data + 5}
        at |= {"magic": size - rowfile.TAIL, "rows": size - rowfile.TAIL + 16, "digest": size - 1}
        raw[at[how]] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize("how", [
    "truncated data", "truncated header", "empty", "hole", "data", "last byte of data", "keys",
    "magic", "rows", "digest",
])  # fmt: skip
@pytest.mark.parametrize("reopened", [True, False])
def test_a_damaged_shard_is_detected_and_computed_again(store, tmp_path, caplog, how, reopened):
    store.fill(TEXTS, encode, 20, progress=False)
    assert same(store)
    victim = shards(store)[5]
    assert len(store._keys[victim.name]) == 20
    damage(victim, how)
    if reopened:
        store = Store(tmp_path, "teacher", WIDTH)
        assert victim.exists() == ("data" in how and "truncated" not in how)  # seen on opening
    missing = store.missing(TEXTS)
    assert len(missing) == 20
    assert caplog.text.count("is damaged") == 1 and victim.name in caplog.text
    assert [p.stem for p in shards(store, "*.damaged")] == [victim.stem]
    with pytest.raises(MissingVectors, match="20 of 300 texts"):
        store.gather(TEXTS)
    seen = []
    store.fill(TEXTS, lambda b: seen.extend(b) or encode(b), progress=False)
    assert sorted(seen) == sorted(missing) and same(store)


def test_a_damaged_view_is_written_again_from_the_shards(store, caplog):
    store.fill(TEXTS, encode, progress=False)
    first = store.matrix(TEXTS).clone()
    (view,) = (store.folder / "views").glob("*.rows")
    damage(view, "data")
    assert store.matrix(TEXTS).equal(first) and "is damaged" in caplog.text
    assert store.missing(TEXTS) == []


def test_verify_reads_everything_again(store, tmp_path):
    store.fill(TEXTS, encode, 20, progress=False)
    store.matrix(TEXTS)
    assert store.missing(TEXTS) == [] and store.verify() == []
    victim = shards(store)[5]
    s = victim.stat()
    damage(victim, "data")
    os.utime(victim, ns=(s.st_atime_ns, s.st_mtime_ns))
    assert store.missing(TEXTS) == []  # a rotten disk changes no times: trusted after one reading
    assert store.verify() == [str(victim)]
    assert len(store.missing(TEXTS)) == 20


# -- several processes -------------------------------------------------------------------------


def test_processes_that_fill_the_same_texts_share_the_work(tmp_path, store):
    children = [spawn("fill", tmp_path, 8, a, b, 10) for a, b in ((0, 200), (50, 300), (0, 300))]
    begin(*children)
    said = [c.communicate()[0].splitlines() for c in children]
    assert [c.returncode for c in children] == [0, 0, 0]
    computed = [t for s in said for t in s]
    assert sorted(computed) == sorted(TEXTS)  # every text once, by whomever
    assert sum(bool(s) for s in said) >= 2
    assert same(store) and not leftovers(tmp_path)


def test_who_waits_for_a_dead_process_takes_over(tmp_path, store):
    child = spawn("fill", tmp_path, 10, 0, 10, 60_000)
    begin(child)
    held = [child.stdout.readline().strip() for _ in range(4)]
    killer = threading.Timer(0.4, child.kill)
    killer.start()
    began, calls = time.monotonic(), []
    store.fill(TEXTS[:10], lambda b: calls.append(b) or encode(b), progress=False)
    child.communicate()
    assert time.monotonic() - began > 0.35
    assert sorted(calls[-1]) == sorted(held)
    assert sorted(t for b in calls for t in b) == sorted(TEXTS[:10])
    assert same(store, TEXTS[:10])


def test_what_was_stored_just_before_a_claim_is_not_computed_again(store, tmp_path):
    store.fill(TEXTS[:20], encode, progress=False)
    Store(tmp_path, "teacher", WIDTH).fill(TEXTS[:50], encode, progress=False)
    with store._claim(features._keys(TEXTS[10:60]), 45) as mine:
        assert mine == features._keys(TEXTS[50:55])


def test_a_file_system_without_locks(store, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(features.fcntl, "lockf", lockf)
    assert store.fill(TEXTS, encode, progress=False) == 300 and same(store)


# -- size --------------------------------------------------------------------------------------


def test_wide_vectors_do_not_go_through_memory_at_once(tmp_path):
    rows, width = 224, 262_144  # 112 MiB
    child = spawn("wide", tmp_path, rows, width)
    filled, viewed, files, *shape = map(float, child.communicate()[0].split())
    assert child.returncode == 0 and shape == [rows, width] and files >= 28
    assert filled < 48 and viewed < 48, (filled, viewed)  # a shard is 4 MiB, 8 in float32


def test_moments_of_a_mapped_matrix(store):
    store.fill(TEXTS, encode, progress=False)
    m = store.matrix(TEXTS)
    exact = m.numpy().astype(np.float64)
    for chunk in (8 * WIDTH, 7 * 8 * WIDTH, 1 << 20):
        mean, sd = moments(m, chunk)
        assert mean.dtype == sd.dtype == np.float64 and mean.shape == sd.shape == (WIDTH,)
        np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(sd, exact.std(0), rtol=1e-12)


def test_moments_are_exact_far_from_zero_and_bounded_in_memory():
    far = 1e9 + encode(TEXTS).astype(np.float64)
    np.testing.assert_allclose(moments(far, 4096)[1], far.std(0), rtol=1e-7)
    mean, sd = moments(np.full((5, 3), 2, np.float16))
    assert mean.tolist() == [2, 2, 2] and sd.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="no rows"):
        moments(np.empty((0, 3)))
    big = np.ones((4000, 4096), np.float16)  # 31 MiB, 125 as float64
    tracemalloc.start()
    moments(big)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 << 20


# -- errors ------------------------------------------------------------------------------------


def spoiled(value, row=2):
    def teacher(texts):
        x = encode(texts)
        if TEXTS[100] in texts:
            x[texts.index(TEXTS[100]), row] = value
        return x

    return teacher


@pytest.mark.parametrize(
    ("value", "why"),
    [(np.nan, "is not finite"), (-np.inf, "is not finite"), (7e4, "is beyond float16")],
)
def test_bad_vectors_are_named_and_their_shard_is_not_stored(store, tmp_path, value, why):
    with pytest.raises(ValueError, match=f"{why} for 1 of .* the first: 'text number 100'"):
        store.fill(TEXTS, spoiled(value), 16, progress=False)
    assert TEXTS[100] in store.missing(TEXTS)
    there = sorted(set(TEXTS) - set(store.missing(TEXTS)))
    assert len(there) > 16 and same(store, there) and not leftovers(tmp_path)
    store.fill(TEXTS, encode, progress=False)  # its claim is free again
    assert same(store)


@pytest.mark.parametrize(
    ("teacher", "why"),
    [
        (lambda b: encode(b)[:-1], r"returned shape \(3, 64\); expected \(4, 64\)"),
        (lambda b: encode(b, WIDTH + 1), r"returned shape \(4, 65\); expected \(4, 64\)"),
        (lambda b: encode(b)[0], r"returned shape \(64,\)"),
        (lambda b: encode(b).astype(complex), "returned complex128; expected float16"),
        (lambda b: encode(b).astype(str), "returned <U32; expected float16"),
        (lambda b: np.ones((len(b), WIDTH)), "same vector for all of 4 texts"),
    ],
)
def test_a_broken_teacher_stores_nothing(store, teacher, why):
    with pytest.raises(ValueError, match=why):
        store.fill(TEXTS, teacher, progress=False)
    assert shards(store) == [] and len(store.missing(TEXTS)) == len(TEXTS)


def test_neighbours_may_share_a_vector(store):
    teacher = lambda b: encode([TEXTS[0] if t in TEXTS[:50] else t for t in b])
    assert store.fill(TEXTS, teacher, progress=False) == 300
    one = Store(store.folder.parent, "one", WIDTH)
    with pytest.raises(ValueError, match="same vector for all of 2 texts"):
        one.fill(TEXTS, lambda b: np.ones((len(b), WIDTH)), 1, progress=False)


def test_a_failing_teacher_keeps_what_was_stored(store):
    def teacher(texts):
        if len(texts) > 8:
            raise RuntimeError("out of memory")
        return encode(texts)

    with pytest.raises(RuntimeError, match="out of memory"):
        store.fill(TEXTS, teacher, progress=False)
    assert len(store.missing(TEXTS)) == 300 - 12
    store.fill(TEXTS, encode, progress=False)
    assert same(store)


def test_missing_vectors_are_counted_and_named(store):
    store.fill(TEXTS[:5], encode, progress=False)
    for read in (store.gather, store.matrix):
        with pytest.raises(MissingVectors, match=r"2 of 7 texts .*'text number 7'.*`fill`"):
            read([*TEXTS[:5], TEXTS[7], TEXTS[6], TEXTS[7]])
    assert not list((store.folder / "views").iterdir())


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        ([], "at least one text"),
        ("a bare string", "a list"),
        (["a", " "], "text 1 of 2 is ' '"),
        (["a", None], "text 1 of 2 is None"),
    ],
)
def test_texts_are_checked_before_any_work(store, texts, why):
    for call in (store.missing, store.gather, store.matrix, lambda t: store.fill(t, pytest.fail)):
        with pytest.raises(ValueError, match=why):
            call(texts)
    assert not store.folder.exists()


def test_settings_are_checked(store, tmp_path):
    for fingerprint in ("", "../up", "a/b", ".hidden", "a" * 300):
        with pytest.raises(ValueError, match="cannot name a folder"):
            Store(tmp_path, fingerprint, 4)
    with pytest.raises(ValueError, match="choose from float16, float32"):
        Store(tmp_path, "a", 4, "bfloat16")
    with pytest.raises(ValueError, match="width must be at least 1"):
        Store(tmp_path, "a", 0)
    with pytest.raises(ValueError, match="shard_rows must be at least 1"):
        store.fill(TEXTS, encode, 0)


def test_a_full_disk_says_what_is_needed_and_leaves_nothing_wrong(store, tmp_path, monkeypatch):
    store.fill(TEXTS[:50], encode, progress=False)
    before = {p: p.read_bytes() for p in shards(store)}
    sync = os.fsync

    def full(fd):
        s = os.fstat(fd)
        if stat.S_ISREG(s.st_mode) and s.st_size > 3 * WIDTH * 2:  # meta.json still fits
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(fd)

    need = 4 * (WIDTH * 2 + rowfile.KEY) + rowfile.TAIL
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=rf"shards .*No space left.*\({need} bytes") as e:
            store.fill(TEXTS, encode, progress=False)
        assert e.value.errno == errno.ENOSPC
        with pytest.raises(OSError, match=r"views .*No space left"):
            store.matrix(TEXTS[:50])
    assert {p: p.read_bytes() for p in shards(store)} == before and not leftovers(tmp_path)
    store.fill(TEXTS, encode, progress=False)
    assert same(store) and store.matrix(TEXTS).shape == (300, WIDTH)


def test_a_write_that_stops_half_way(store, tmp_path):
    child = spawn("quota", tmp_path, 3000)
    said = child.communicate()[0]
    assert "cannot be written to" in said and str(store.folder) in said and "bytes needed" in said
    assert 0 < len(store.missing(TEXTS)) < 300 and not leftovers(tmp_path)
    store.fill(TEXTS, encode, progress=False)
    assert same(store)


def test_a_reader_without_the_right_to_write():
    root = Path(tempfile.mkdtemp())  # tmp_path would be closed to the stranger altogether
    store = Store(root, "teacher", WIDTH)
    try:
        store.fill(TEXTS[:10], encode, 10, progress=False)
        first = shards(store)
        store.fill(TEXTS, encode, progress=False)
        assert len(first) == 2
        damage(first[0], "truncated data")
        damage(first[1], "data")
        folders = (root, store.folder, store.shards, store.views)
        for d in folders:
            d.chmod(0o555)
        said, warned = spawn("stranger", root).communicate()
        assert said == "10\n" and warned.count("is damaged") == len(first), warned
        assert [s for s in first if not s.exists()] == []  # could not be set aside
    finally:
        for d in folders:
            d.chmod(0o755)
        shutil.rmtree(root)


def test_a_root_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Store(tmp_path / "file", "teacher", WIDTH).fill(TEXTS, pytest.fail, progress=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
