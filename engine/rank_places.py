"""Which rank computes in which slot of a placement group. Pure: knows no Ray and no tensors.

A slot is room for one rank on some node. Slots are alike but for their node, so any order of them
is allowed; this one keeps the ranks of a stage, which talk the most, on one node wherever that is
possible, and depends on nothing but where the slots are.
"""

from collections.abc import Hashable, Sequence


def order_slots(nodes: Sequence[Hashable], home: Hashable, tp: int) -> list[int]:
    """The slot of each rank, from the node of each slot; `home` is the node of the engine's owner.

    Rank 0 sits at home if there is a slot. Stages that fit one node are cut there; what is left
    of the nodes makes up the others.
    """
    assert len(nodes) % tp == 0
    by_node: dict[Hashable, list[int]] = {home: []}
    for slot, node in enumerate(nodes):
        by_node.setdefault(node, []).append(slot)
    whole: list[int] = []
    rest: list[int] = []
    for slots in by_node.values():
        end = len(slots) // tp * tp
        whole += slots[:end]
        rest += slots[end:]
    is_split_at_home = 0 < len(by_node[home]) < tp
    return rest + whole if is_split_at_home else whole + rest
