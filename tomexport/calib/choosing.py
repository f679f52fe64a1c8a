"""Which nodes of a graph only choose tokens: they stay in float32 when the rest becomes int8.

A step of 1/127 would tie what is near, and a tie merges other tokens. So what an output does not
depend on but through a choice stays as it is: similarities, ranks, predictors, DTEM's embedding;
and so do the nodes that reduce, with their bodies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """A node of a graph, of whatever format.

    Attributes:
        name: unlike that of any other.
        inputs: names of the nodes that it reads, in order, and whether they give it tokens with
            their channels: (B, N, C) with C above 1.
        ours: "node" for a node of our domain, "body" for one of an inlined body, "" for others.
        decides: whether it gives a target map, by itself or beside the tokens.
    """

    name: str
    inputs: tuple[tuple[str, bool], ...]
    ours: str
    decides: bool


def choosing(nodes: Iterable[Node], outputs: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the nodes that are ours, or that only choose.

    The network is what outputs depend on: backwards from them, through the tokens alone where a
    reduction is met, and never through a target map. All else chooses.

    Args:
        nodes: the graph, without constants.
        outputs: names of the nodes that give the model's outputs.
    """
    graph = {node.name: node for node in nodes}
    seen: set[str] = set()
    left = [name for name in outputs if name in graph]
    while left:
        name = left.pop()
        node = graph[name]
        if name in seen or (node.decides and node.ours != "node"):
            continue
        seen.add(name)
        left += [source for source in _carried(node, graph) if source in graph]
    network = {name for name in seen if not graph[name].ours}
    return tuple(name for name in graph if name not in network)


def _carried(node: Node, graph: Mapping[str, Node]) -> Iterable[str]:
    """Return what the output of a node is made of: of one that reduces, the tokens."""
    if node.ours == "node":
        return [node.inputs[0][0]]
    if node.ours == "body":
        return [
            source
            for source, is_tokens in node.inputs
            if is_tokens or (source in graph and graph[source].ours)
        ]
    return [source for source, _ in node.inputs]
