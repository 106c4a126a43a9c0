"""Triton kernels, one file per op family; `launch` decides how each is launched and can be read without a GPU.

Nothing here is imported until an op runs on a GPU, but for `launch`, which needs no Triton.
"""
