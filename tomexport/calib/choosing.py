"""Which nodes of a graph choose tokens: they stay in float32 when the rest becomes int8.

A step of 1/127 would tie what is near, and a tie merges other tokens. So what an output does not
depend on but through a choice stays as it is: similarities, ranks, predictors, DTEM's embedding;
and so do the nodes that reduce, with their bodies. What a choice reads, keys for example, serves
attention as well; the product that gives it stays float where the choice removes many tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tomexport.artifact import Metadata

# Choices that remove at least so large a share of the tokens are many. On a trained ViT-Tiny,
# exp:0.25,0 in ONNX Runtime then keeps the first class of 93 % of images instead of 89 %, and the
# unmerged model of 94 %; with const:8, where all shares are less, it would gain one point, and a
# fourth of all products would stay float.
_MANY = 0.1


@dataclass(frozen=True)
class Node:
    """A node of a graph, of whatever format.

    Attributes:
        name: unlike that of any other.
        inputs: names of the nodes that it reads, in order, and whether they give it tokens with
            their channels: (B, N, C) with C above 1.
        ours: "node" for a node of our domain, "body" for one of an inlined body, "" for others.
        decides: the name of the target map that it gives, by itself or beside the tokens.
        product: whether it multiplies by weights.
        sum: whether it adds two branches of tokens.
    """

    name: str
    inputs: tuple[tuple[str, bool], ...]
    ours: str
    decides: str
    product: bool = False
    sum: bool = False


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


def asked(nodes: Sequence[Node], outputs: Iterable[str], metadata: Metadata) -> tuple[int, ...]:
    """Return which products of the network are read by choices that remove many tokens.

    Backwards from the choice, as far as the first product on each way, a sum of branches, or
    another choice.

    Args:
        nodes: the graph, without constants.
        outputs: names of the nodes that give the model's outputs.
        metadata: of the file, whose plan says what each choice removes.

    Returns: places among the products of the network, of which the file's baselines have as many.
    """
    graph = {node.name: node for node in nodes}
    steps = (step for step in metadata.plan.steps if step.removed)  # the last can be missing
    many = {
        decision
        for decision, step in zip(metadata.decisions, steps, strict=False)
        if step.removed >= _MANY * (step.tokens_in - step.n_prefix)
    }
    seen: set[str] = set()
    left = [
        source for node in nodes if node.decides in many
        for source, _ in (node.inputs[1:] if node.ours == "node" else node.inputs)
    ]  # fmt: skip
    while left:
        name = left.pop()
        if name in seen or name not in graph:
            continue
        seen.add(name)
        node = graph[name]
        if not (node.product or node.decides or node.sum):
            left += [source for source, _ in node.inputs]
    named = _products(nodes, choosing(nodes, outputs))
    return tuple(i for i, name in enumerate(named) if name in seen)


def kept(nodes: Iterable[Node], outputs: Iterable[str], asked: Iterable[int]) -> tuple[str, ...]:
    """Return the names of the nodes that stay float: what chooses, and the products asked for."""
    nodes = tuple(nodes)
    scope = choosing(nodes, outputs)
    named = _products(nodes, scope)
    return (*scope, *(named[i] for i in asked))


def _products(nodes: Iterable[Node], scope: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the products with weights that do not choose, in the order of nodes."""
    chooses = set(scope)
    return tuple(node.name for node in nodes if node.product and node.name not in chooses)


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
