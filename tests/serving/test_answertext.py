"""An answer in pieces against the whole of it."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pxd.models.chat import ChatTokenizer
from pxd.serving.answertext import AnswerText
from pxd.wire import Logprobs
from tests.models.test_detokenizer import BYTE_LEVEL
from tests.models.test_stops import naive

TOKENIZER = ChatTokenizer(PreTrainedTokenizerFast(tokenizer_object=BYTE_LEVEL), ())
NAMES = {TOKENIZER.piece(token): token for token in reversed(range(256))}
letters = st.text("ab🙂🙃é", max_size=12)


@given(
    letters,
    st.lists(st.text("ab🙂🙃é", min_size=1, max_size=3), max_size=2),
    st.lists(st.integers(0, 40), max_size=8),
)
def test_pieces_and_log_probabilities_are_those_of_the_text_that_counts(
    text: str, stops: list[str], places: list[int]
) -> None:
    tokens = [NAMES[bytes([byte])] for byte in text.encode()]
    answer = AnswerText(TOKENIZER, stops, ())
    cuts = sorted({0, len(tokens), *(place % (len(tokens) + 1) for place in places)})
    deltas = []
    for begin, end in pairwise([0, *cuts] if len(cuts) == 1 else cuts):
        scores = [Logprobs(-float(place)) for place in range(begin, end)]
        finish = "length" if end == len(tokens) else None
        deltas.append(answer.add(tokens[begin:end], scores, finish))
        if deltas[-1].finish is not None:
            break
    expected, stopped = naive(text, stops)
    assert "".join(delta.text for delta in deltas) == expected
    assert not stopped or deltas[-1].finish in ("stop", "length")
    assert stopped or deltas[-1].finish == "length"
    given = [entry.token for delta in deltas for entry in delta.logprobs]
    assert b"".join(scored.piece for scored in given).decode() == expected
    assert [-scored.logprob for scored in given] == list(range(len(given)))
    sent = 0
    for delta in deltas:
        sent += len(delta.text.encode())
        assert sum(len(entry.token.piece) for entry in delta.logprobs) <= sent
