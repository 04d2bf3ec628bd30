"""Makes tiny models with random weights as transformers lays them out; mlx-lm reads them, too.

python -m tests.torch_models ARCHITECTURE DIRECTORY [--dtype float32]
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny_models import CONFIGS, save_tokenizer


def make_torch_model(
    architecture: str, directory: Path, *, dtype: str = "float32", seed: int = 0
) -> Path:
    """Make a model in this process and return `directory`."""
    config = dict(CONFIGS[architecture])
    made = AutoConfig.for_model(**config)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # Larger than the usual start values: answers must depend on every layer.
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    path = directory / "config.json"
    saved = json.loads(path.read_text())
    # mlx-lm knows some settings by the names that they have in older files only.
    path.write_text(json.dumps({**saved, **config}))
    save_tokenizer(directory)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("architecture", choices=sorted(CONFIGS))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    make_torch_model(arguments.architecture, arguments.directory, dtype=arguments.dtype)


if __name__ == "__main__":
    main()
