"""Compiles the kernels of `mpcore_kernels` for four GPUs and judges their machine code.

`python -m mpcore_audit` makes the audit. It is for us alone: nothing that ships imports it.
"""
