"""Kernels: the routed product, sum over z of w_z B_z A_z u, as one signature with several bodies.

choice.py           the signature, and which kernel serves
plain.py            plain torch: a loop like the paper, concatenated, gathered, grouped
native.py           the product and top-k in C++
native.cpp          their source
shipped.py          compiled into wheels: which library runs here
triton_gpu.py       the same for GPUs
triton_programs.py  their programs
"""
