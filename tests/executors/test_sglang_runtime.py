"""What SGLang is told of a pipeline, and how a checkpoint's gaps are noticed; without SGLang."""

from types import SimpleNamespace

import pytest
import torch

from pxd.executors.protocol import ExecutorError
from pxd.executors.sglang import runtime
from pxd.executors.sglang.runtime import CPU_ENGINE, PipelinePlace, choose_device, parts_of
from pxd.executors.sglang.stage import _check_weights


@pytest.mark.parametrize(
    ("start", "end", "place", "parts"),
    [(0, 6, 0, [6]), (0, 2, 0, [2, 4]), (2, 4, 1, [2, 2, 2]), (3, 6, 1, [3, 3])],
)
def test_a_stage_is_one_of_up_to_three_parts(
    start: int, end: int, place: int, parts: list[int]
) -> None:
    assert parts_of(start, end, 6) == (place, parts)


def test_who_stands_for_the_pipeline_transports_nothing() -> None:
    group = PipelinePlace(SimpleNamespace(local_rank=0, device="cpu"), 1, 3)
    assert (group.is_first_rank, group.is_last_rank, group.ranks) == (False, False, [0, 1, 2])
    assert PipelinePlace(SimpleNamespace(local_rank=0, device="cpu"), 2, 3).is_last_rank
    with pytest.raises(AttributeError, match=r"not connected by torch\.distributed: all_reduce"):
        group.all_reduce(torch.zeros(1))


def test_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv(CPU_ENGINE, raising=False)
    with pytest.raises(ExecutorError, match="needs an NVIDIA GPU"):
        choose_device()
    monkeypatch.setenv(CPU_ENGINE, "1")
    assert choose_device() == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(runtime.torch.version, "hip", None)
    assert choose_device(2) == "cuda"
    with pytest.raises(ExecutorError, match="--tp 3 needs as many GPUs, and PyTorch sees 2"):
        choose_device(3)


def model_of(**parameters: torch.Tensor) -> torch.nn.Module:
    model = torch.nn.Module()
    for name, value in parameters.items():
        model.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    return model


def gone(shape: tuple[int, ...], rows: slice) -> torch.Tensor:
    value = torch.ones(shape, dtype=torch.bfloat16)
    value[rows] = torch.nan
    return value


@pytest.mark.parametrize(
    "value",
    [
        gone((64,), slice(None)),
        gone((64, 8), slice(None)),
        # Keys of a projection that is put together from queries, keys and values.
        gone((96, 8), slice(64, 80)),
        # One of the experts.
        gone((128, 4, 8), slice(5, 6)),
    ],
)
def test_what_was_never_written_is_named(value: torch.Tensor) -> None:
    with pytest.raises(ExecutorError, match=r"lacks all or parts of bad$"):
        _check_weights(model_of(good=torch.ones(4, 4), bad=value))


def test_numbers_of_the_checkpoint_are_not_taken_for_gaps() -> None:
    poisoned = torch.ones(288, 8)
    poisoned[7] = torch.nan
    scattered = torch.full((4, 8), torch.nan)
    scattered[:, 3] = 1
    _check_weights(
        model_of(
            poisoned=poisoned,
            scattered=scattered,
            whole=torch.full((4, 4), 255, dtype=torch.uint8),
            empty=torch.zeros(0),
        )
    )
