"""A pipeline of stages of different kinds, each in its own process, says what either kind says."""

from pathlib import Path

import numpy as np
import pytest
import trio

from pxd.executors import open_executor
from pxd.executors.choice import installed_kinds
from pxd.executors.protocol import LoadSpec
from pxd.wire import Grant, Opening, Row, Sampled, Sampling, Step, Tensor
from tests.executors.pipeline import Pipeline
from tests.executors.steps import run_step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("torch" not in installed_kinds(), reason="PyTorch is not installed"),
]
DEADLINE_S = 240
LAYERS, CUT = 6, 3
PROMPT = list(range(5, 25))
COUNT = 12


async def answer_mixed(path: Path) -> list[int]:
    """The prompt through an MLX process for the first layers and a PyTorch one for the others."""
    tokens, answer = PROMPT, []
    async with open_executor("mlx") as first, open_executor("torch") as last:
        for executor, start, end in ((first, 0, CUT), (last, CUT, LAYERS)):
            spec = LoadSpec(path=str(path), start=start, end=end, kv_bytes=1 << 22)
            await executor.load(spec, lambda _: None)
        for number in range(COUNT):
            step = Step(
                pipeline="mixed",
                session=1,
                step=number,
                rows=(Row(1, len(PROMPT) + len(answer) - len(tokens), len(tokens), 1),),
                tensor=Tensor("i32", (len(tokens),)),
                openings=(Opening(1, Sampling(temperature=0)),) if not number else (),
                grants=(Grant(1, (0,)),) if not number else (),
            )
            made = await run_step(first, step, np.array(tokens, "<i4").tobytes())
            assert isinstance(made, tuple), made
            drawn = await run_step(last, *made)
            assert isinstance(drawn, Sampled), drawn
            tokens = [drawn.tokens[0].token]
            answer += tokens
    return answer


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
async def test_mixed_stages_give_the_tokens_of_either_kind(
    tmp_path: Path, architecture: str
) -> None:
    from tests.torch_models import make_torch_model

    path = make_torch_model(architecture, tmp_path / architecture)
    alone = {
        kind: Pipeline.load(path, LAYERS, kinds=[kind]).generate(PROMPT, COUNT)
        for kind in ("mlx", "torch")
    }
    with trio.fail_after(DEADLINE_S):
        mixed = await answer_mixed(path)
    assert alone["mlx"] == alone["torch"] == mixed
    assert len(set(mixed)) > 4
