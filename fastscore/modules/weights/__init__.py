"""Weights that no layer of PyTorch holds, as layers: parameters, experts, recurrent and computed weights; layers that
code runs without a call."""
