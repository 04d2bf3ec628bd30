import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pxd import wire

NAN = float("nan")


def reader(data: bytes):
    """An async read_exactly over bytes that raises EOFError where a connection would break."""
    rest = memoryview(data)

    async def read_exactly(count: int) -> bytes:
        nonlocal rest
        if count > len(rest):
            raise EOFError
        head, rest = rest[:count], rest[count:]
        return bytes(head)

    return read_exactly


def step(tokens: int = 3) -> wire.Step:
    return wire.Step(
        pipeline="p",
        session=5,
        step=1,
        rows=(wire.Row(1, 0, tokens, 1),),
        tensor=wire.Tensor("bf16", (tokens, 4)),
        openings=(wire.Opening(1, wire.Sampling(temperature=0.5, seed=(1 << 63) - 1)),),
        releases=(7,),
    )


async def test_frames_follow_each_other() -> None:
    frames = [
        (step(), bytes(24)),
        (wire.Sampled(pipeline="p", session=5, step=1, tokens=(wire.SampledToken(1, 3, 9),)), b""),
        (wire.Nack(pipeline="p", session=5, step=1, code="bad-step", reason="gap"), b""),
        (wire.Output(request="r", index=0, tokens=(1, 2), finish="stop"), b""),
        (wire.Output(request="r", index=0, tokens=(1,), logprobs=(wire.Logprobs(-1.5),)), b""),
        (wire.Cancel(request="r"), b""),
        (wire.Weights(number=1, size=3), b"abc"),
    ]
    data = b"".join(wire.encode(header, len(body)) + body for header, body in frames)
    read = reader(data)
    for header, body in frames:
        assert await wire.read_frame(read, wire.frame_decoder) == (header, body)
    with pytest.raises(EOFError):
        await wire.read_frame(read, wire.frame_decoder)


@pytest.mark.parametrize(
    ("prefix", "allowed"),
    [
        (b"\0\0\0\1\0\0\0\0", True),
        (b"\0\0\0\0\0\0\0\0", False),
        (b"\0\x10\0\1\0\0\0\0", False),
        (b"\0\0\0\1\x10\0\0\1", False),
        (b"\xff" * 8, False),
    ],
)
def test_lengths_are_bounded_before_anything_is_read(prefix: bytes, allowed: bool) -> None:
    if allowed:
        assert wire.decode_prefix(prefix, wire.Limits()) == (1, 0)
    else:
        with pytest.raises(wire.WireError, match="refusing"):
            wire.decode_prefix(prefix, wire.Limits())


def test_the_sender_learns_of_a_frame_that_is_too_large() -> None:
    with pytest.raises(wire.WireError, match="too large"):
        wire.encode(step(), 100, wire.Limits(body=99))


@pytest.mark.parametrize("size", [0, 3, 5])
def test_a_body_of_another_size_than_its_header_says_is_refused(size: int) -> None:
    header = msgspec.msgpack.encode(wire.Weights(number=1, size=4))
    with pytest.raises(wire.WireError, match="body of"):
        wire.decode_header(header, size, wire.frame_decoder)
    large = msgspec.msgpack.encode(wire.Weights(number=1, size=wire.MAX_WEIGHTS_BYTES + 1))
    with pytest.raises(wire.WireError, match="bad header"):
        wire.decode_header(large, wire.MAX_WEIGHTS_BYTES + 1, wire.frame_decoder)


@pytest.mark.parametrize("size", [0, 23, 25])
def test_a_body_that_is_not_the_tensor_is_refused(size: int) -> None:
    header = msgspec.msgpack.encode(step())
    with pytest.raises(wire.WireError, match="body of"):
        wire.decode_header(header, size, wire.frame_decoder)


@pytest.mark.parametrize(
    "header",
    [
        {"type": "step"},
        {"type": "cancel", "request": ""},
        {"type": "cancel", "request": "x" * 129},
        {"type": "nothing"},
        {"type": "output", "request": "r", "index": -1},
        {"type": "output", "request": "r", "index": 1 << 48},
        {"type": "output", "request": "r", "index": 0, "tokens": [1 << 31]},
        {"type": "output", "request": "r", "index": 0, "tokens": [1, 2], "logprobs": [[-1.0, []]]},
        {"type": "output", "request": "r", "index": 0, "tokens": [1], "logprobs": [[0.5, []]]},
        {"type": "output", "request": "r", "index": 0, "tokens": [1], "logprobs": [[NAN, []]]},
        {"type": "nack", "pipeline": "p", "session": 1, "step": 1, "code": "odd", "reason": ""},
        [],
        7,
    ],
)
def test_headers_out_of_bounds_are_refused(header: object) -> None:
    with pytest.raises(wire.WireError, match="bad header"):
        wire.decode_header(msgspec.msgpack.encode(header), 0, wire.frame_decoder)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": -1},
        {"temperature": NAN},
        {"min_p": 1.5},
        {"repetition_penalty": 0},
        {"repetition_penalty": NAN},
        {"presence_penalty": -2.5},
        {"frequency_penalty": 3},
        {"logit_bias": [[5, 101]]},
        {"logit_bias": [[-5, 1]]},
        {"logit_bias": [[5]]},
        {"logit_bias": [[5, 1]] * (wire.MAX_BIASES + 1)},
        {"barred": [1] * (wire.MAX_ENDS + 1)},
        {"min_length": -1},
        {"logprobs": wire.MAX_LOGPROBS + 1},
    ],
)
def test_sampling_out_of_bounds_is_refused(sampling: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(sampling), type=wire.Sampling)


@pytest.mark.parametrize(
    ("tensor", "size"),
    [
        ({"dtype": "bf16", "shape": [3, 5]}, 30),
        ({"dtype": "bf16", "shape": [3, 5], "coding": None}, 30),
        ({"dtype": "bf16", "shape": [3, 5], "coding": "int8"}, 27),
        ({"dtype": "f32", "shape": [3, 5], "coding": "fp8"}, 27),
        ({"dtype": "f16", "shape": [0, 5], "coding": "fp8"}, 0),
        ({"dtype": "f16", "shape": [5, 0], "coding": "fp8"}, 20),
        ({"dtype": "f16", "shape": [1 << 47, 1 << 47], "coding": "fp8"}, (1 << 94) + (1 << 49)),
    ],
)
def test_a_coded_body_is_a_scale_for_each_row_and_a_byte_for_each_number(
    tensor: dict[str, object], size: int
) -> None:
    header = msgspec.msgpack.encode({"type": "filler", "number": 1, "round": 0, "tensor": tensor})
    assert wire.decode_header(header, size, wire.frame_decoder).tensor.nbytes == size
    for wrong in (size - 1, size + 1):
        with pytest.raises(wire.WireError, match="body of"):
            wire.decode_header(header, wrong, wire.frame_decoder)


@pytest.mark.parametrize(
    "tensor",
    [
        {"dtype": "i32", "shape": [3, 5], "coding": "fp8"},
        {"dtype": "f32", "shape": [3], "coding": "fp8"},
        {"dtype": "f32", "shape": [], "coding": "int8"},
        {"dtype": "f32", "shape": [1, 3, 5], "coding": "int8"},
        {"dtype": "f32", "shape": [3, 5], "coding": "int4"},
        {"dtype": "f32", "shape": [3, 5], "coding": ""},
        {"dtype": "f32", "shape": [3, -5], "coding": "fp8"},
        {"dtype": "fp8", "shape": [3, 5]},
    ],
)
def test_what_cannot_be_coded_is_refused(tensor: dict[str, object]) -> None:
    header = msgspec.msgpack.encode({"type": "filler", "number": 1, "round": 0, "tensor": tensor})
    with pytest.raises(wire.WireError, match="bad header"):
        wire.decode_header(header, 0, wire.frame_decoder)


def test_what_nobody_asked_for_takes_no_bytes() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(wire.Tensor("f32", (1, 2)))) == {
        "dtype": "f32",
        "shape": [1, 2],
    }
    assert msgspec.msgpack.encode(wire.Sampling()) == b"\x80"
    opening = wire.Opening(1, wire.Sampling(temperature=0))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(opening)) == {
        "request": 1,
        "sampling": {"temperature": 0},
    }


@given(st.binary(max_size=200))
def test_garbage_is_a_wire_error_and_nothing_else(data: bytes) -> None:
    try:
        wire.decode_header(data, 0, wire.frame_decoder)
    except wire.WireError:
        return
    assert data, "an empty header is never valid"
