"""Triton kernels, one file per op family; `launch` decides how each is launched and can be read without a GPU.

Nothing here is imported until an op runs on a GPU, but for `launch`, which needs no Triton.

Kernels run on the current stream of their tensors' device, allocate results and partial sums alone and never wait for
the device, so they can be captured in a CUDA graph, once a first call has compiled them. To `torch.compile` and
`torch.export` each op is one node of the graph, whichever backend runs it. Triton compiles a kernel anew for another
dtype, layout, tile or alignment, not for another shape.
"""
