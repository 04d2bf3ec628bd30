"""From an answer's tokens to what its client sees of them."""

from collections import deque
from collections.abc import Sequence

from pxd.models.chat import ChatTokenizer
from pxd.models.stops import StopMatcher
from pxd.serving.requests import Delta, ScoredPiece, TokenLogprobs
from pxd.wire import Finish, Logprobs


class AnswerText:
    """Makes deltas of tokens: never half a character, never anything of a stop string.

    Stop strings also end thoughts.

    A token's log probabilities come with the text in which it begins. Those of tokens that begin in
    a stop string never do.
    """

    def __init__(
        self, tokenizer: ChatTokenizer, stops: Sequence[str], prompt: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer()
        self._stops = StopMatcher(stops)
        self._thoughts = tokenizer.thoughts(prompt)
        self._decoded = self._given = 0
        self._waiting: deque[tuple[int, TokenLogprobs]] = deque()

    def add(
        self, tokens: Sequence[int], logprobs: Sequence[Logprobs], finish: Finish | None
    ) -> Delta:
        """`logprobs` are one for each of `tokens`, or none. With a finish nothing comes after.

        The delta finishes with "stop", whatever `finish` is, when a stop string was met.
        """
        text, stopped = "", False
        for place, token in enumerate(tokens):
            if logprobs:
                self._waiting.append((self._decoded, self._named(token, logprobs[place])))
            certain, stopped = self._pass_on(self._detokenizer.add([token]))
            text += certain
            if stopped:
                break
        if finish is not None and not stopped:
            certain, stopped = self._pass_on(self._detokenizer.finish())
            text += certain + self._stops.finish()
        self._given += len(text)
        complete = finish is not None and self._given == self._decoded
        ended: Finish | None = "stop" if stopped else finish
        thought, said = self._thoughts.add(text)
        if ended is not None:
            thought_rest, said_rest = self._thoughts.finish()
            thought, said = thought + thought_rest, said + said_rest
        return Delta(said, len(tokens), ended, self._ready(complete), thought)

    def _pass_on(self, piece: str) -> tuple[str, bool]:
        self._decoded += len(piece)
        return self._stops.add(piece)

    def _ready(self, everything: bool) -> tuple[TokenLogprobs, ...]:
        ready = []
        while self._waiting and (everything or self._waiting[0][0] < self._given):
            ready.append(self._waiting.popleft()[1])
        return tuple(ready)

    def _named(self, token: int, logprobs: Logprobs) -> TokenLogprobs:
        piece = self._tokenizer.piece
        return TokenLogprobs(
            ScoredPiece(piece(token), logprobs.token),
            tuple(ScoredPiece(piece(other), value) for other, value in logprobs.top),
        )
