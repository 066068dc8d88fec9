"""Attention whose keys were gathered into windows first: unfold, Pad and Gather, slices and rolls.

``origins`` says where each element of a moved tensor comes from; ``lift`` makes one site of such a core.
"""
