"""What quantised copies of models are called, and which models there can be one of."""

from pathlib import Path
from typing import Literal, get_args

from pxd.models.config import ModelConfig
from pxd.models.errors import ModelError

Bits = Literal[2, 3, 4, 5, 6, 8]
BITS: tuple[int, ...] = get_args(Bits)
"""What MLX can quantise to."""

_ELSEWHERE = "hf_quant_config.json"
"""Where some tools say it instead of in config.json."""


def quantized_name(source: str, bits: int) -> str:
    """A hub id stays one, of the same owner; of a directory, only the last part remains."""
    name = Path(source).name if Path(source).is_absolute() else source
    return f"{name or 'model'}-{bits}bit"


def check_unquantized(name: str, directory: Path) -> None:
    """Raises `ModelError` where the weights of the model in `directory` are quantised already."""
    quantization = ModelConfig.read(directory).quantization
    if quantization is not None or (directory / _ELSEWHERE).is_file():
        bits = (quantization or {}).get("bits")
        how = f" to {bits} bits" if isinstance(bits, int) else ""
        raise ModelError(
            f"{name} is quantised already{how}: serve it as it is, "
            "or quantise the model that it was made of"
        )
