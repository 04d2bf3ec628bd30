"""Talks HTTP to a daemon: a small client, so that commands start at once."""

import contextlib
import http.client
import json
from collections.abc import Generator, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from pxd.doctor.findings import Report
from pxd.serving.status import ClusterStatus, Leaving
from pxd.wire import DECODE_ERRORS

TIMEOUT_S = 10.0
# The daemon promises an answer in 10 s; two may ask at once.
DOCTOR_TIMEOUT_S = 25.0
# A daemon that is busy with an answer sends something every ten seconds.
STREAM_TIMEOUT_S = 60.0
# Telling every member takes up to five seconds, three times over where a key is replaced at once.
CONTROL_TIMEOUT_S = 30.0
MAX_RESPONSE = 64 << 20

AnswerT = TypeVar("AnswerT")


class Unreachable(Exception):
    """No pxd daemon answers at the URL."""


class Refused(Exception):
    """The daemon answered with an error. `retry_after` in seconds, where it names a time."""

    def __init__(self, message: str, code: str | None, retry_after: float | None) -> None:
        super().__init__(message)
        self.code, self.retry_after = code, retry_after


class StreamFailed(Exception):
    """The answer broke off; the message says why."""


def _refusal(response: http.client.HTTPResponse, url: str) -> Refused:
    body = response.read(MAX_RESPONSE)
    header = response.headers.get("Retry-After", "")
    retry_after = float(header) if header.isdecimal() else None
    try:
        error = json.loads(body)["error"]
        return Refused(str(error["message"]), error["code"], retry_after)
    except (ValueError, TypeError, KeyError):
        return Refused(
            f"{url} answered with HTTP status {response.status}; is it a pxd daemon?",
            None,
            retry_after,
        )


class Client:
    """`token` is needed for what controls the daemon; see `find_controlled`."""

    def __init__(self, url: str, token: str = "") -> None:
        self.url = url
        self._control = {"X-Pxd-Control": token}

    @contextlib.contextmanager
    def _response(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        timeout: float | None = TIMEOUT_S,
    ) -> Iterator[http.client.HTTPResponse]:
        parts = urlsplit(self.url)
        kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        connection = kind(parts.hostname or "", parts.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            if response.status >= 400:
                raise _refusal(response, self.url)
            yield response
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise Unreachable(f"no pxd daemon answers at {self.url} ({reason})") from error
        finally:
            connection.close()

    def _read(
        self,
        method: str,
        path: str,
        headers: dict[str, str] | None = None,
        timeout: float = TIMEOUT_S,
    ) -> bytes:
        with self._response(method, path, headers=headers, timeout=timeout) as response:
            return response.read(MAX_RESPONSE)

    def raw_status(self) -> bytes:
        """The JSON of `/cluster/status`, as the daemon sent it."""
        return self._read("GET", "/cluster/status")

    def parse_status(self, raw: bytes) -> ClusterStatus:
        return self._parse(raw, ClusterStatus)

    def get(self, path: str, kind: type[AnswerT]) -> AnswerT:
        """What a cluster route answers, as `kind`."""
        return self._parse(self._read("GET", path), kind)

    def _parse(self, raw: bytes, kind: type[AnswerT]) -> AnswerT:
        try:
            return msgspec.json.decode(raw, type=kind)
        except DECODE_ERRORS as error:
            raise Unreachable(
                f"what answers at {self.url} is not a pxd daemon of this version ({error})"
            ) from error

    def status(self) -> ClusterStatus:
        return self.parse_status(self.raw_status())

    def ticket(self) -> str:
        raw = self._read("GET", "/cluster/ticket", self._control)
        try:
            return str(json.loads(raw)["ticket"])
        except (ValueError, TypeError, KeyError) as error:
            raise Unreachable(f"what answers at {self.url} is not a pxd daemon") from error

    def doctor(self) -> Report:
        """Takes as long as the examination does."""
        return self._parse(
            self._read("GET", "/cluster/doctor", self._control, DOCTOR_TIMEOUT_S), Report
        )

    def stop(self, *, now: bool = False) -> Leaving:
        return self.control("POST", "/cluster/stop", Leaving, {"now": now})

    def control(
        self,
        method: str,
        path: str,
        kind: type[AnswerT],
        body: object = None,
        timeout: float | None = CONTROL_TIMEOUT_S,
    ) -> AnswerT:
        """What a control route answers, as `kind`. Waits while members are told."""
        data = None if body is None else msgspec.json.encode(body)
        headers = self._control | {"Content-Type": "application/json"}
        with self._response(method, path, data, headers, timeout) as response:
            return self._parse(response.read(MAX_RESPONSE), kind)

    def chat(self, request: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The chunks of a streamed chat completion. Closing the iterator cancels the answer.

        Raises `Unreachable` and `Refused` before the first chunk, `StreamFailed` after it.
        """
        body = json.dumps({**request, "stream": True}).encode()
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        began = False
        try:
            with self._response(
                "POST", "/v1/chat/completions", body, headers, STREAM_TIMEOUT_S
            ) as response:
                while (line := response.readline(MAX_RESPONSE)) != b"data: [DONE]\n":
                    if not line:
                        raise StreamFailed("the daemon ended the connection amid the answer")
                    if line.startswith(b"data: "):
                        chunk = json.loads(line.removeprefix(b"data: "))
                        if "error" in chunk:
                            raise StreamFailed(str(chunk["error"].get("message")))
                        began = True
                        yield chunk
        except Unreachable as error:
            if began:
                raise StreamFailed(f"the daemon went away amid the answer: {error}") from error
            raise
        except ValueError as error:
            raise StreamFailed(f"the daemon sent something that is no answer: {error}") from error
