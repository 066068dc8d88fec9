"""Attention in pieces (Longformer's chunks, BigBird's blocks), found by running it.

Between queries, keys, values and the output stand only analytic operators: products, sums, softmaxes, and moves and
selections that do not look at the data. Such a region is one real-analytic function of Q, K and V, and so is masked
attention: if both agree at a point drawn at random, they agree everywhere (two different analytic functions agree on a
set of measure zero). ``region`` finds the piece of graph, ``reading`` runs it to learn which keys each query sees and
the scale, and compares it with attention on random inputs.

Linear attention in chunks is a polynomial, or a quotient of two: ``linear_region`` and ``linear_reading`` do the same
for it. ``mask_paths`` and ``padding`` are about an
input that hides tokens.
"""
