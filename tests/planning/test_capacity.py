"""What other models take of a node, and what is left over of it."""

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from pxd.planning.capacity import budget, left_over, most_copies
from pxd.planning.model import NodeOffer

from .clusters import GIB, SETTINGS, model_of

MODEL = model_of(4)
SHARE = SETTINGS.weight_share + SETTINGS.kv_share


@given(st.integers(0, 512 * GIB), st.floats(0, 1))
def test_what_is_taken_and_what_is_left_fit_together(memory: int, share: float) -> None:
    taken = int(memory * SHARE * share)
    room = budget(NodeOffer("n", memory, taken=taken), MODEL, SETTINGS)
    assert taken + room.weights + room.kv <= memory * SHARE + 1
    # What was taken was a stage's within its shares, so it fits beside what is left, too.
    other = NodeOffer("n", memory, taken=room.weights + room.kv)
    assert taken <= left_over(other, SETTINGS) * SHARE + 3


def test_without_others_all_is_left() -> None:
    offer = NodeOffer("n", 24 * GIB + 7)
    assert left_over(offer, SETTINGS) == offer.memory
    assert left_over(replace(offer, taken=1 << 50), SETTINGS) == 0


def test_how_often_the_layers_have_room_at_most() -> None:
    whole = NodeOffer("n", 19 * GIB)
    assert budget(whole, MODEL, SETTINGS).weights > 4 * 2.99 * GIB + 2 * GIB
    assert most_copies((), MODEL, SETTINGS) == 0
    assert most_copies((whole,), MODEL, SETTINGS) == 1
    assert most_copies((whole, replace(whole, max_layers=3)), MODEL, SETTINGS) == 1
    assert most_copies((replace(whole, memory=18 * GIB),), MODEL, SETTINGS) == 0
    assert most_copies((whole,) * 3, MODEL, SETTINGS) == 3
