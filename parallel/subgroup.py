"""Groups within a group: some of its ranks, with peers counted among them.

A process group is split by torch, which connects the members; any other group by `SubGroup`, which
sends through its parent under the parent's rank numbers.
"""

from collections.abc import Sequence

import torch.distributed as dist

from ringctx.parallel.comm import (
    Group,
    LocalGroup,
    Pending,
    SoloGroup,
    Transfer,
    group_rank,
    group_size,
)

__all__ = ["SubGroup", "subgroup"]


class SubGroup:
    """Some ranks of `parent`, in the order of `ranks`; made on the ranks that are in it."""

    def __init__(self, parent: LocalGroup, ranks: Sequence[int]) -> None:
        assert parent.rank() in ranks, (parent.rank(), ranks)
        self._parent = parent
        self._ranks = tuple(ranks)

    def rank(self) -> int:
        """This rank among `ranks`."""
        return self._ranks.index(self._parent.rank())

    def size(self) -> int:
        """How many ranks are in it."""
        return len(self._ranks)

    def start(self, sends: Sequence[Transfer], recvs: Sequence[Transfer]) -> Sequence[Pending]:
        """Start the parent's transfers with these peers.

        Two subgroups that share a pair of ranks also share its tags: let them take turns.
        """
        return self._parent.start(self._in_parent(sends), self._in_parent(recvs))

    def _in_parent(self, transfers: Sequence[Transfer]) -> list[Transfer]:
        return [Transfer(t.tensor, self._ranks[t.peer], t.tag) for t in transfers]


def subgroup(group: Group, ranks: Sequence[int]) -> Group:
    """The group of some ranks of `group`, this one among them.

    Of a process group it makes a new one: the members call together, each of its groups in the same
    order. On gloo ranks outside take no part; NCCL with a bound device splits the world's
    communicator, so there every rank of the world must make groups of its own at the same time, as
    `mesh.Mesh` does.

    Args:
        group: the ranks to choose from.
        ranks: numbers within `group`, rising.

    Returns:
        A group in the order of `ranks`; `group` itself for all of its ranks, `SoloGroup` for one.
    """
    assert group_rank(group) in ranks and list(ranks) == sorted(ranks), (group_rank(group), ranks)
    if len(ranks) == 1:
        return SoloGroup()
    if len(ranks) == group_size(group):
        return group
    if not isinstance(group, dist.ProcessGroup):
        return SubGroup(group, ranks)
    members = [dist.get_global_rank(group, rank) for rank in ranks]
    # Only the members take part, so that a world of n ranks does not make every group n times.
    made = dist.new_group(members, use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup), made
    return made
