"""Tensors in, tensors out: masked statistics, log-probs, KL, rewards, advantages and losses; intervals of means.

Imports: none.
Packages: torch.
Packages of intervals.py: numpy.

It has no modules, devices, config objects, files or process groups. A caller with several processes passes `reduce`,
a function that sums a tensor over all of them.
"""
