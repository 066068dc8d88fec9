"""The zoo: small exports of many architectures in every exporter's form, with the truth about their attention.

``python -m attncompile.models.zoo --check`` exports every entry with seeded weights, counts the attention calls of the
torch model while it runs, detects in the exported file and compares. ``--check-graphs`` does the comparing with the
committed graphs and truth, without torch. Importing this package imports no torch.
"""
