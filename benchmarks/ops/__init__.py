"""The kernels by themselves."""
