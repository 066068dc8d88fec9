"""Kernels as TensorRT's quickly deployable plugins: one plugin a signature, made from the op's schema and a bundle."""
