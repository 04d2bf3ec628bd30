"""Makes bad messages out of good ones: blind changes of bytes, and changes of values that still
decode. Coverage-guided fuzzers see nothing here, for the decoders are compiled."""

import json
import random
import struct
from typing import Any

import msgspec

_NUMBERS = (0, 1, -1, 127, 128, 255, 65535, 2**31 - 1, 2**31, 2**32, 2**48 - 1, 2**48, 2**63 - 1,
            2**63, 2**64 - 1, -(2**63), 0.0, -0.0, 1e308, 5e-324, float("inf"), float("-inf"),
            float("nan"))  # fmt: skip
_TEXTS = ("", "a", "\0", "é" * 40, "/", "..", "%s", "-1", "\u0661", "x" * 600, "\ud7ff", "a" * 5000)
_OTHERS: tuple[Any, ...] = (None, True, False, [], {}, b"", b"\xff" * 33, [[]], {"": None}, [None])


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


class Mutator:
    """Inputs for one parser, from examples of what it accepts. The same seed, the same inputs."""

    def __init__(self, seed: int, examples: list[bytes]) -> None:
        self._random = random.Random(seed)
        self._examples = examples

    def next(self) -> bytes:
        chance = self._random
        data = chance.choice(self._examples)
        kind = chance.random()
        if kind < 0.03:
            return chance.randbytes(chance.randrange(200))
        if kind < 0.55:
            data = self._restructure(data)
        if kind >= 0.4:
            for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
                data = self._scramble(data)
        return data

    def _restructure(self, data: bytes) -> bytes:
        """Change a value within a MessagePack or JSON message."""
        failures = (ValueError, TypeError, OverflowError, RecursionError)
        try:
            return json.dumps(self._change(json.loads(data))).encode(errors="surrogatepass")
        except failures:
            pass  # MessagePack, then.
        try:
            return msgspec.msgpack.encode(self._change(msgspec.msgpack.decode(data)))
        except failures:
            return self._scramble(data)

    def _change(self, value: Any) -> Any:
        chance = self._random
        if isinstance(value, dict) and value and chance.random() < 0.9:
            key = chance.choice(list(value))
            fate = chance.random()
            if fate < 0.1:
                return {k: v for k, v in value.items() if k != key}
            if fate < 0.15:
                return {**value, "unknown": nested(chance.choice((3, 400, 3000)))}
            return {**value, key: self._change(value[key])}
        if isinstance(value, list) and value and chance.random() < 0.9:
            place = chance.randrange(len(value))
            fate = chance.random()
            if fate < 0.1:
                return value[:place] + value[place + 1 :]
            if fate < 0.2:
                return value + [value[place]] * chance.choice((1, 20, 5000))
            return [*value[:place], self._change(value[place]), *value[place + 1 :]]
        return self._value(value)

    def _value(self, value: Any) -> Any:
        chance = self._random
        if isinstance(value, str) and chance.random() < 0.5:
            return chance.choice(_TEXTS)
        if isinstance(value, (int, float)) and chance.random() < 0.5:
            return chance.choice(_NUMBERS)
        if isinstance(value, bytes) and chance.random() < 0.5:
            return self._restructure(value) if value else chance.randbytes(40)
        return chance.choice((*_NUMBERS, *_TEXTS, *_OTHERS))

    def _scramble(self, data: bytes) -> bytes:
        chance = self._random
        if not data:
            return chance.randbytes(4)
        place = chance.randrange(len(data))
        fate = chance.randrange(6)
        if fate == 0:
            return (
                data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :]
            )
        if fate == 1:
            return data[:place] + chance.randbytes(chance.choice((1, 2, 8))) + data[place:]
        if fate == 2:
            return data[:place]
        if fate == 3:
            return data[:place] + data[place + chance.randrange(1, 9) :]
        if fate == 4:
            big = struct.pack(">I", chance.choice((0, 1, 2**16, 2**31, 2**32 - 1)))
            return data[:place] + big + data[place + 4 :]
        other = chance.choice(self._examples)
        return data[:place] + other[chance.randrange(len(other) + 1) :]
