"""Log probabilities in OpenAI's shape."""

from collections.abc import Sequence
from typing import Any

from pxd.serving.requests import ScoredPiece, TokenLogprobs


def logprobs_object(tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The `logprobs` of a choice. What a token is that is no whole character, its `bytes` say."""
    content = [
        {**_entry(token.token), "top_logprobs": [_entry(other) for other in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _entry(scored: ScoredPiece) -> dict[str, Any]:
    return {
        "token": scored.piece.decode("utf-8", "replace"),
        "logprob": scored.logprob,
        "bytes": list(scored.piece),
    }
