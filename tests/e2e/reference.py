"""What `mlx_lm.generate` answers: python -m tests.e2e.reference MODEL_DIR MAX_TOKENS QUESTION...

One JSON list with an object per question: its tokens, and the text that they decode to. (Its own
streaming text shows ids beyond the tokenizer's vocabulary as exclamation marks.)
"""

import json
import sys

from pxd.lean import without_torch

without_torch()

import mlx_lm  # noqa: E402


def main(model_dir: str, max_tokens: str, *questions: str) -> None:
    model, tokenizer = mlx_lm.load(model_dir)
    answers = []
    for question in questions:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True
        )
        tokens = [
            response.token
            for response in mlx_lm.stream_generate(model, tokenizer, prompt, int(max_tokens))
            if response.finish_reason != "stop"
        ]
        answers.append({"text": tokenizer.decode(tokens), "tokens": tokens})
    print(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
