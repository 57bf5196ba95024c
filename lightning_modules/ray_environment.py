"""A process's place among those of a job on a Ray cluster, as Lightning asks for it."""

from __future__ import annotations

from ray.train.lightning import RayLightningEnvironment

from lightning_modules.ranks import Ranks


class PlacedEnvironment(RayLightningEnvironment):
    """Ray's own, but for the place on the node: Ray counts those of an address, which nodes may share.

    :param ranks: who this process is.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ranks = ranks

    def local_rank(self) -> int:
        """Return its number on its node, which is that of its device."""
        return self._ranks.local_rank

    def node_rank(self) -> int:
        """Return the node's number."""
        return self._ranks.rank // self._ranks.local_world
