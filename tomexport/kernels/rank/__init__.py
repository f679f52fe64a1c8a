"""Rank: which token comes how far in the order of scores, and which comes next, as one node.

    score (B,N) → (rank (B,N), order (B,N))

`rank[b, n]` is how many tokens are ahead of token n: those of a higher score, and those of the same
score and a lower index. `order[b, k]` is the token of rank k. Both are permutations of 0 … N − 1,
whatever the scores are: NaN counts as −∞, and −0 is 0, in every form.
"""
