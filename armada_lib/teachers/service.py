"""A client of the OpenAI images API that pays for no text twice and never tells the key.

One text is one call: POST {base_url}/images/generations; the answer holds the picture itself
(`b64_json`) or where it is (`url`). A picture is in the collection before anything else happens.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

import requests
from urllib3.exceptions import HTTPError

from armada_lib.teacher_settings import BlackboxSpec
from armada_lib.teachers.encoders import NotReadable, picture

if TYPE_CHECKING:
    from armada_lib.teachers.collection import Collection

log = logging.getLogger(__name__)

MAX_BYTES = 32 << 20  # of one picture
LONGEST = 60.0  # seconds between two attempts, whatever the service asks for
CONNECT = 10.0  # seconds until a connection stands
REDIRECTS = 3  # on the way to a picture
BUSY = {408, 429, 500, 502, 503, 504, 520, 522, 524, 529}
REFUSAL = {"content_policy_violation", "moderation_blocked", "content_filter", "contentfilter"}
QUOTA = {"insufficient_quota", "billing_hard_limit_reached"}


class ServiceError(RuntimeError):
    """The service cannot be used as things are; what it returned before is kept."""


class BudgetExhausted(ServiceError):
    """`max_calls` calls were made for this collection."""


class _Trouble(Exception):
    """The connection failed: worth another attempt."""


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: Any
    body: bytes

    def error(self) -> tuple[str, str]:
        """(code, message) of an error in JSON, or empty ones."""
        try:
            found = json.loads(self.body)["error"]
            return str(found.get("code") or "").lower(), str(found.get("message") or "")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return "", ""

    def retry_after(self) -> float:
        """Seconds the service asks to wait, 0 if it does not say."""
        said = self.headers.get("Retry-After") or ""
        try:
            return max(0.0, float(said))
        except ValueError:
            pass
        try:
            return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
        except (ValueError, TypeError, OverflowError):
            return 0.0


def endpoint(base_url: str) -> tuple[str, str]:
    """(URL to post to, host and path that identify it) of `base_url`, or ValueError."""
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("base_url must be http(s)://host/path, such as https://api.openai.com/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        # It is stored and printed: nothing secret may be in it.
        raise ValueError("base_url must hold no user, password, query or fragment")
    path = parts.path.rstrip("/") + "/images/generations"
    return f"{parts.scheme}://{parts.netloc}{path}", f"{parts.netloc.lower()}{path}"


class Service:
    """The endpoint of `spec`. Raises ValueError if its URL or the key is missing or unusable."""

    def __init__(self, spec: BlackboxSpec, max_bytes: int = MAX_BYTES) -> None:
        self.spec, self.max_bytes = spec, max_bytes
        self.url, self.identity = endpoint(spec.base_url or "")
        self._key = _key(spec.key_variable)
        if self._key and self.url.startswith("http:") and not _loopback(self.url):
            raise ValueError(
                f"base_url {spec.base_url!r} would send the key unencrypted: use https"
            )
        self._stop, self._plain = threading.Event(), False

    def ask(self, texts: Sequence[str], collection: Collection) -> None:
        """Ask for every text, `concurrency` at a time; each answer is kept as it comes.

        A killed process loses at most the calls in flight. On an error no new call starts, those
        in flight are awaited and kept, and the first error is raised: ServiceError (the service
        refuses, answers nonsense or stays out of reach) or BudgetExhausted.
        """
        self._stop.clear()

        def one(text: str) -> None:
            try:
                self._one(text, collection)
            except BaseException:
                self._stop.set()  # at once: what waits must not start another call
                raise

        pool = ThreadPoolExecutor(self.spec.concurrency, thread_name_prefix="armada-api")
        try:
            for done in as_completed([pool.submit(one, t) for t in texts]):
                done.result()
        finally:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _one(self, text: str, collection: Collection) -> None:
        """Ask for one text and keep the answer."""
        asked = {"model": self.spec.model, "prompt": text, "n": 1, "size": self.spec.size}
        plain = self._plain
        if not plain:
            asked["response_format"] = "b64_json"
        answer = self._patiently(lambda: self._paid(asked, collection), self._stop)
        if answer is None:
            return
        if answer.status == 200:
            data = self._data(answer, text)
            try:
                suffix = picture(data)[1]
            except NotReadable as e:
                raise ServiceError(f"{self._on(text)}: its picture {e}") from None
            collection.add(text, data, suffix)
            return
        code, message = answer.error()
        if answer.status in (400, 422) and code in REFUSAL:
            collection.refuse(text, self._hide(f"{code}: {message}"))
        elif answer.status == 400 and not plain and "response_format" in message:
            self._plain = True  # newer models know b64_json only and reject the parameter
            self._one(text, collection)
        else:
            raise ServiceError(self._final(answer.status, code, message))

    def _paid(self, asked: dict[str, Any], collection: Collection) -> _Answer:
        """One call, counted before it is made; given back where the service surely did nothing."""
        if not collection.spend(self.spec.max_calls):
            raise BudgetExhausted(
                f"{self.spec.max_calls} calls were made, which is max_calls; what came back is "
                "kept: raise max_calls to go on"
            )
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        limit = self.max_bytes * 4 // 3 + (64 << 10)  # base64 and the JSON around it
        answer = self._open(self.url, headers, limit, json.dumps(asked).encode())
        refused = answer.status in (400, 422) and answer.error()[0] in REFUSAL
        if 400 <= answer.status < 500 and answer.status != 408 and not refused:
            collection.refund()
        return answer

    def _patiently(self, send: Callable[[], _Answer], stop: threading.Event) -> _Answer | None:
        """The first final answer, after up to `retries` further attempts; None after `stop`."""
        problem, wait, tries = "", 0.0, self.spec.retries + 1
        for attempt in range(tries):
            if attempt:
                # Doubled every time, and never all threads at once.
                pause = self.spec.backoff * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
                pause = min(LONGEST, max(pause, wait))
                log.warning("%s; attempt %d of %d in %.1f s", problem, attempt + 1, tries, pause)
                stop.wait(pause)
            if stop.is_set():
                return None
            try:
                answer = send()
            except _Trouble as e:
                problem, wait = f"{self.identity}: {e}", 0.0
                continue
            code, message = answer.error() if answer.status in BUSY else ("", "")
            if answer.status not in BUSY or code in QUOTA:
                return answer
            problem = self._hide(f"{self.identity}: HTTP {answer.status} {message}")
            wait = answer.retry_after()
        raise ServiceError(f"given up after {tries} attempts; the last: {problem}")

    def _open(
        self, url: str, headers: dict[str, str], limit: int, body: bytes | None = None
    ) -> _Answer:
        """One exchange, read in full within `timeout` seconds and `limit` bytes; no redirect is followed."""
        end = time.monotonic() + self.spec.timeout
        headers = headers | {"User-Agent": "armada-lib", "Accept-Encoding": "identity"}
        problem = ""
        try:
            with (
                _session(url) as session,
                session.request(
                    "GET" if body is None else "POST", url, data=body, headers=headers, stream=True,
                    timeout=(min(CONNECT, self.spec.timeout), self.spec.timeout), allow_redirects=False,
                ) as response,
            ):  # fmt: skip
                parts, size = [], 0
                while size <= limit and (part := response.raw.read1(1 << 16, decode_content=True)):
                    parts.append(part)
                    size += len(part)
                    if time.monotonic() > end:
                        raise TimeoutError(f"not complete after {self.spec.timeout:g} s")
                answer = _Answer(response.status_code, response.headers, b"".join(parts))
        except (OSError, HTTPError, ValueError) as e:
            problem = f"{type(e).__name__}: {e}"
        if problem:  # raised here, so that no exception refers to one that knows the request
            raise _Trouble(self._hide(problem))
        if size > limit:
            raise ServiceError(f"{self.identity}: an answer has more than {limit:,} bytes")
        return answer

    def _data(self, answer: _Answer, text: str) -> bytes:
        """The bytes of the picture in (or named by) an answer."""
        kind = answer.headers.get("Content-Type") or "nothing"
        if "json" not in kind.lower():
            raise ServiceError(f"{self._on(text)}: answered {kind[:60]!r}, expected JSON")
        first: Any = None
        with contextlib.suppress(ValueError, KeyError, IndexError, TypeError, RecursionError):
            first = json.loads(answer.body)["data"][0]
        data, url = (first.get("b64_json"), first.get("url")) if isinstance(first, dict) else (0, 0)
        if isinstance(data, str) and data:
            try:
                return base64.b64decode(data, validate=True)
            except ValueError:
                raise ServiceError(f"{self._on(text)}: b64_json is not base64") from None
        if not isinstance(url, str) or not url:
            raise ServiceError(f"{self._on(text)}: neither b64_json nor url in the answer")
        # Never stopped by another text's error: this picture is paid for.
        found = self._patiently(lambda: self._download(url), threading.Event())
        assert found is not None
        if found.status != 200:
            raise ServiceError(f"{self._on(text)}: its url answered HTTP {found.status}")
        return found.body

    def _download(self, url: str) -> _Answer:
        """What is at `url`; the key is not sent, and only http(s) is followed."""
        for _ in range(REDIRECTS + 1):
            if not url.startswith(("http://", "https://")):
                raise ServiceError(
                    f"{self.identity}: sent us to {url[:20]!r}, which is not http(s)"
                )
            answer = self._open(url, {"Accept": "image/*"}, self.max_bytes)
            if answer.status not in (301, 302, 303, 307, 308):
                kind = (answer.headers.get("Content-Type") or "nothing").lower()
                if answer.status == 200 and not kind.startswith(("image/", "application/octet")):
                    raise ServiceError(f"{self.identity}: its url is {kind[:60]!r}, no picture")
                return answer
            url = urljoin(url, answer.headers.get("Location") or "")
        raise ServiceError(f"{self.identity}: more than {REDIRECTS} redirects to the picture")

    def _final(self, status: int, code: str, message: str) -> str:
        variable = f"${self.spec.key_variable}" if self._key else "(none is set: key_variable)"
        said = {
            401: f"the key {variable} is not accepted",
            403: f"the key {variable} may not use model {self.spec.model!r}",
            404: f"the address or model {self.spec.model!r} does not exist",
        }.get(status, self._hide(f"{code} {message}".strip()))
        if 300 <= status < 400:
            said = "redirected; set base_url to the final address"
        return f"{self.identity}: HTTP {status}: {said}; what came back before is kept"

    def _on(self, text: str) -> str:
        return f"{self.identity}, text {text[:60]!r}"

    def _hide(self, said: str) -> str:
        """`said`, short, on one line and without the key."""
        if self._key:
            said = said.replace(self._key, "***")
        return "".join(c if c.isprintable() else " " for c in said)[:300]


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"set the environment variable {variable} to the key of the service")
    if not all("!" <= c <= "~" for c in key):
        raise ValueError(f"the key in {variable} holds a space or a sign that no header may hold")
    return key


def _loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _session(url: str) -> requests.Session:
    """One that adds nothing to a request: no key from a .netrc in the place of ours."""
    session = requests.Session()
    session.auth = lambda request: request
    session.trust_env = not _loopback(url)  # what is meant for this machine must not pass a proxy
    return session
