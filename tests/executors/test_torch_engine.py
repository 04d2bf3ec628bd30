"""The torch engine against transformers' own model: the same numbers, however it is cut up."""

from pathlib import Path
from typing import Any

import pytest

from pxd.executors.protocol import ExecutorError, LoadSpec
from pxd.wire import Sampling
from tests.executors.pipeline import Pipeline

torch = pytest.importorskip("torch")

from transformers import AutoModelForCausalLM  # noqa: E402

from pxd.executors.torch import attention  # noqa: E402
from pxd.executors.torch.describe import describe  # noqa: E402
from pxd.executors.torch.engine import TorchEngine  # noqa: E402
from pxd.executors.torch.kv import KvPool  # noqa: E402
from pxd.executors.torch.split import plan_split  # noqa: E402
from tests.torch_models import make_torch_model  # noqa: E402

LAYERS = 6
PROMPT = list(range(5, 40))


def likeliest(model: Any, text: list[int]) -> dict[int, float]:
    """Log probabilities of what may follow, by transformers without a cache."""
    with torch.inference_mode():
        scores = model(torch.tensor([text])).logits[0, -1].log_softmax(-1)
    return dict(enumerate(scores.tolist()))


# Windows and two kinds of rotation; sinks; compressed keys and values; softcaps. Most with experts.
@pytest.mark.parametrize("architecture", ["gemma3_text", "gpt_oss", "deepseek_v3", "gemma2"])
def test_numbers_are_those_of_transformers(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_torch_model(architecture, tmp_path / architecture)
    assert describe(path).splits == (1, 2, 3, 4, 5)
    # Some queries at a time: no more scores than of four heads, three queries and the whole prompt.
    monkeypatch.setattr(attention, "MOST_SCORES", 4 * 3 * len(PROMPT))
    own = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    pipeline = Pipeline.load(path, LAYERS, [1, 4], kinds=["torch"])
    text = list(PROMPT)
    pipeline.prefill(1, text, chunk=20, samplings={1: Sampling(temperature=0, logprobs=5)})
    for _ in range(3):
        [drawn] = pipeline.step([(1, len(text) - 1, text[-1:], True)])
        wanted = likeliest(own, text)
        for token, score in drawn.logprobs.top:
            assert score == pytest.approx(wanted[token], abs=2e-3)
        # Not the likeliest, which a model of random weights may repeat for ever.
        text.append((drawn.token + 17) % 250)


def test_experts_are_stacked_from_the_files_of_the_own_layers(tmp_path: Path) -> None:
    path = make_torch_model("mixtral", tmp_path / "mixtral")
    description = describe(path)
    engine = TorchEngine()
    seen: list[float] = []
    info = engine.load(LoadSpec(path=str(path), start=2, end=4), seen.append)
    assert 0 <= info.weight_bytes - sum(description.layer_bytes[2:4]) < 4096
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_what_the_executor_cannot_run_is_refused_with_a_reason(tmp_path: Path) -> None:
    path = make_torch_model("qwen3_next", tmp_path / "linear")
    with pytest.raises(ExecutorError, match="layers of type linear_attention"):
        describe(path)


def load(path: Path) -> None:
    TorchEngine().load(LoadSpec(path=str(path), start=0, end=LAYERS), lambda _: None)


def test_attention_that_this_executor_does_not_know_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a model gave its attention something that ours ignores."""
    path = make_torch_model("gpt_oss", tmp_path / "gpt_oss")
    known = attention.Manner

    def ignorant(scale: Any, window: Any, softcap: Any, sinks: Any, expand: Any) -> Any:
        return known(scale, window, softcap, None, expand)

    monkeypatch.setattr(attention, "Manner", ignorant)
    with pytest.raises(ExecutorError, match="attends in a way"):
        load(path)


def test_blocks_of_keys_and_values_are_bytes_that_can_be_put_elsewhere() -> None:
    pool = KvPool({2: (2, 4, 3), 5: (1, 6, 6)}, 4, torch.bfloat16, torch.device("cpu"))
    tensors = [*pool.keys.values(), *pool.values.values()]
    for tensor in tensors:
        tensor.normal_()
    before = [tensor.clone().unflatten(0, (4, -1)) for tensor in tensors]
    found = pool.read([3, 0])
    assert [data.nbytes for data in found] == [pool.block_bytes] * 2
    pool.write([1, 3], [bytearray(data) for data in found])
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor.unflatten(0, (4, -1)), old[[0, 3, 2, 0]])


class Toy(torch.nn.Module):
    """Four layers, of which the third also gets what the first one made."""

    def __init__(self, looks_back: bool) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(32, 8)
        self.layers = torch.nn.ModuleList(ToyLayer(i) for i in range(4))
        self.norm = torch.nn.LayerNorm(8)
        self.head = torch.nn.Linear(8, 32, bias=False)
        self.spare = torch.nn.Linear(8, 8)
        self.looks_back = looks_back

    def forward(self, input_ids: Any, past_key_values: Any, **_: Any) -> Any:
        hidden = self.embed(input_ids)
        first = hidden = self.layers[0](hidden, past_key_values)
        hidden = self.layers[1](hidden, past_key_values)
        extra = first if self.looks_back else 0
        hidden = self.layers[2](hidden + extra, past_key_values)
        hidden = self.layers[3](hidden, past_key_values)

        class Output:
            logits = self.head(self.norm(hidden))

        return Output


class ToyLayer(torch.nn.Module):
    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.map = torch.nn.Linear(8, 8)

    def forward(self, hidden: Any, cache: Any) -> Any:
        made = self.map(hidden)[:, None]
        cache.update(made, made, self.layer_idx)
        return hidden + made[:, 0]


def test_what_crosses_a_cut_besides_the_hidden_state_forbids_it() -> None:
    with torch.device("meta"):
        plain, looks_back = Toy(False), Toy(True)
    plan = plan_split(plain, 4)
    assert plan.splits == (1, 2, 3)
    assert (plan.hidden_size, plan.vocabulary) == (8, 32)
    assert plan.shapes == dict.fromkeys(range(4), (1, 8, 8))
    assert (plan.front, plan.back, plan.idle) == (("embed",), ("norm", "head"), ("spare",))
    assert plan_split(looks_back, 4).splits == (1, 3)
