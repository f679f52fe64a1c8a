"""Reduce: what was chosen is carried out, as one node.

    (x (B,N,C), mass (B,N,1), target (B,N), weight (B,N,1)) → (x (B,M,C), size (B,M,1))

with M = N − r. `target[b, n]` is the slot that token n goes to, or −1 for none; every slot has a
token. A slot's x is the sum of weight · x over its tokens, divided by the sum of their weights if
`mean` is 1; its size is the sum of their masses.

`fixed` is 1 where the target is the same whatever the image, so that there is no decision in it to
be compared; nothing else follows from it. Nodes can leave it out.
"""
