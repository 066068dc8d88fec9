"""Kernels made ready for a machine: compiled ahead of time, kept in a bundle, launched through the CUDA driver.

Nothing here knows a mechanism: their kernels come in as values (``core.kernel``). Triton is imported when something is
compiled and not before; bundles are read and launched without it. ``docs/kernels.md`` says what a bundle holds.
"""
