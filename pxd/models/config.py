"""Reads what matters from config.json and generation_config.json, whatever a model calls it."""

import json
from pathlib import Path
from typing import Any

from pxd.models.errors import ModelError

MAX_CONFIG_BYTES = 16 << 20
MAX_LAYERS = 2000

Config = dict[str, Any]

_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "language_model")
_LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_transformer_layers")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "model_dim", "dim")
CONTEXT_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
    "max_context_length",
    "model_max_length",
    "n_ctx",
)


def read_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> Config:
    """Read a JSON object of at most `limit` bytes. Raises `ModelError`."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent} has no {path.name}") from error
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > limit:
        raise ModelError(f"{path} is larger than {limit} bytes; that cannot be right")
    try:
        # Not msgspec: real configurations contain NaN and Infinity.
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is damaged: it holds no object")
    return value


class ModelConfig:
    """A model's configuration. Raises `ModelError` where it is absurd.

    Numbers may be absent: some files leave out what equals a default of the model's code.
    """

    def __init__(self, config: Config, generation: Config | None = None) -> None:
        self.raw = config
        self._generation = generation or {}
        self._text: Config = next(
            (config[key] for key in _TEXT_CONFIGS if isinstance(config.get(key), dict)), {}
        )

    @classmethod
    def read(cls, directory: Path) -> "ModelConfig":
        config = read_json(directory / "config.json")
        try:
            generation = read_json(directory / "generation_config.json")
        except ModelError:
            generation = {}  # optional, and mlx-lm ignores a damaged one too
        return cls(config, generation)

    def _get(self, key: str) -> Any:
        value = self._text.get(key)
        return self.raw.get(key) if value is None else value

    def _count(self, keys: tuple[str, ...], limit: int) -> int | None:
        for key in keys:
            value = self._get(key)
            if isinstance(value, int) and not isinstance(value, bool):
                if not 0 < value <= limit:
                    raise ModelError(f"config.json says {key} = {value}; that cannot be right")
                return value
        return None

    @property
    def architecture(self) -> str:
        name = self.raw.get("model_type")
        if not isinstance(name, str) or not name.replace("-", "_").replace(".", "_").isidentifier():
            raise ModelError("config.json has no usable model_type; is this a language model?")
        return name

    @property
    def layers(self) -> int | None:
        return self._count(_LAYERS, MAX_LAYERS)

    @property
    def hidden_size(self) -> int | None:
        return self._count(_HIDDEN, 1 << 20)

    @property
    def vocabulary(self) -> int | None:
        return self._count(("vocab_size", "padded_vocab_size"), 1 << 26)

    @property
    def context(self) -> int | None:
        """The most positions that a sequence may have."""
        return self._count(CONTEXT_NAMES, 1 << 40)

    @property
    def may_tie(self) -> bool:
        """Whether the output projection may be the embedding: many a model's code takes that for
        granted where the configuration says nothing."""
        return self._get("tie_word_embeddings") is not False

    @property
    def quantization(self) -> Config | None:
        """How the weights are quantised; None if they are not."""
        found = self._get("quantization") or self._get("quantization_config")
        return found if isinstance(found, dict) else None

    @property
    def element_bytes(self) -> float:
        """Bytes of one weight, on average, as far as the configuration tells."""
        quantization = self.quantization
        if quantization is not None and isinstance(quantization.get("bits"), int):
            group = quantization.get("group_size")
            # Each group of weights also has a 16-bit scale and a 16-bit bias.
            overhead = 4 / group if isinstance(group, int) and group > 0 else 0.0
            return float(quantization["bits"] / 8 + overhead)
        return 4.0 if self.dtype == "float32" else 2.0

    @property
    def dtype(self) -> str:
        """The floating-point type of activations: bfloat16, float16 or float32."""
        name = str(self._get("dtype") or self._get("torch_dtype") or "").removeprefix("torch.")
        return name if name in ("float16", "float32") else "bfloat16"

    @property
    def sampling(self) -> tuple[float, float, int, float]:
        """(temperature, top-p, top-k, min-p) for requests that name none.

        (1, 1, 0, 0) where the model has no wish.
        """
        if self._generation.get("do_sample") is False:
            return 0.0, 1.0, 0, 0.0
        return (
            self._wish("temperature", 100.0, 1.0),
            self._wish("top_p", 1.0, 1.0),
            int(self._wish("top_k", 1 << 31, 0.0)),
            self._wish("min_p", 1.0, 0.0),
        )

    def _wish(self, key: str, limit: float, default: float) -> float:
        value = self._generation.get(key)
        if isinstance(value, int | float) and 0 <= value <= limit:
            return float(value)
        return default

    @property
    def eos(self) -> tuple[int, ...]:
        for source in (self._generation, self._text, self.raw):
            value = source.get("eos_token_id")
            values = value if isinstance(value, list) else [value]
            found = tuple(token for token in values if isinstance(token, int) and token >= 0)
            if found:
                return found
        return ()
