"""Merge: two-set matching and the size-weighted mean of what was matched, as one node.

    (x (B,N,C), size (B,N,1), signal (B,G,N,D)) → (x (B,M,C), size (B,M,1), target (B,N))

with M = N − r. The tokens after the protected prefix are split by the parity of their position into
A (even) and B (odd). The r tokens of A that are most similar to their best partner in B merge into
it. The order out is: prefix, what is left of A, B. What is left of A keeps its order where there is
a prefix; without one it comes by descending score, as in the original.

With `raster` it is none of these: each slot stands where the first of its tokens stood, so that
tokens keep the order of their places in the image. Nodes can leave the attribute out.

`target[b, n]` is the slot that token n goes to.

Similarity is the cosine between tokens' signals, averaged over the G groups (the heads, where they
are keys). With r = 0 everything stays as and where it is.

Ties: the lower index wins, in every form. Similarity, ranking and sizes are float32. A signal that
is not finite, or of length zero, has no direction: its scores are NaN. `reference.py` and
`kernel.h` count NaN as lower than every number, so such tokens merge last; in `function.py` what
then merges is not defined, and no other image of the batch is touched.

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023
(github.com/facebookresearch/ToMe); written from the paper.
"""
