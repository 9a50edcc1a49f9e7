"""Ranks of a stage share a node where they can, rank 0 sits with the engine's owner."""

import random

import pytest

from engine.rank_places import order_slots


@pytest.mark.parametrize(
    ("nodes", "tp", "expected"),
    [
        ("a", 1, "a"),
        ("aa", 2, "aa"),
        ("bab", 1, "abb"),
        ("ba", 2, "ab"),
        ("bbaa", 2, "aabb"),
        ("baba", 2, "aabb"),  # a node's slots need not be neighbours
        ("bbac", 2, "acbb"),  # not a+b and b+c
        ("baaa", 2, "aaab"),
        ("bbcc", 2, "bbcc"),  # nothing at home
        ("bcbcbb", 3, "bbbbcc"),
    ],
)
def test_nodes_of_the_ranks(nodes: str, tp: int, expected: str) -> None:
    assert "".join(nodes[slot] for slot in order_slots(nodes, "a", tp)) == expected


def test_any_placement_is_used_whole_and_with_few_split_stages() -> None:
    rng = random.Random(3)
    for _ in range(500):
        tp, pp = rng.choice([1, 2, 3, 4]), rng.choice([1, 2, 3])
        nodes = [rng.choice("abcd") for _ in range(tp * pp)]
        order = order_slots(nodes, "a", tp)
        assert sorted(order) == list(range(tp * pp))
        assert order == order_slots(nodes, "a", tp)
        placed = [nodes[slot] for slot in order]
        assert placed[0] == "a" or "a" not in nodes
        stages = [set(placed[start : start + tp]) for start in range(0, tp * pp, tp)]
        num_whole = sum(nodes.count(node) // tp for node in "abcd")
        assert sum(len(stage) == 1 for stage in stages) >= num_whole
