"""What a change of the cluster's door has come to, as the API and the commands show it."""

import msgspec


class NodeRef(msgspec.Struct, frozen=True, kw_only=True):
    """A node by peer id and, if that is known, by name."""

    id: str
    name: str

    @property
    def both(self) -> tuple[str, str]:
        return self.name or "a node", self.id

    def by_name(self) -> tuple[str, str]:
        """For sorting."""
        return self.name, self.id


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """Which members have confirmed a change, and which could not be told yet."""

    confirmed: list[NodeRef]
    unconfirmed: list[NodeRef]


class Rotation(msgspec.Struct, frozen=True, kw_only=True):
    """`grace` in seconds: for how long the key before still counts. `superseded` if the one before
    that, of a rotation whose grace period had not ended, counted until now."""

    generation: int
    grace: float
    told: Told
    superseded: bool = False


class Kick(msgspec.Struct, frozen=True, kw_only=True):
    """`rotation` if the key was replaced as well. `stored` unless this node would forget of it
    with a restart."""

    node: NodeRef
    banned: bool
    told: Told
    stored: bool = True
    rotation: Rotation | None = None
