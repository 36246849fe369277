"""Kernels: the routed product, sum over z of w_z B_z A_z u, one signature and several bodies.

bottlenecks.py      The routed bottleneck: sum over z of w_z (U_z f_z(D_z y + b_z) + c_z) for output
building.py         A library of C++, compiled on this machine and kept where nobody else can write
choice.py           The routed LoRA product, sum over z of w_z B_z A_z u: one signature, several bod
concat.py           All experts' factors side by side: two large products, whatever was chosen
gather.py           Only the chosen experts' factors, fetched per token: for decoding and other shor
grouped.py          Tokens sorted by expert, then one product per expert: for many tokens and many e
mixed.py            Factors mixed before their product: mttl's form of a routed LoRA, another functi
native.cpp
native.py           The routed product and the top-k of scored routers in C++, for CPUs: `native.cpp
reference.py        The routed product as a loop that reads like the paper: the oracle of all other
sizes.py            Whether tensors belong together: asked where a kernel hands their addresses on
triton_gpu.py       The routed product and the top-k of scored routers in Triton, for GPUs without g
triton_programs.py  What runs on the GPU, written in Triton; `triton_gpu` beside this calls it
weighted_rows.py    Weighted sums of one vector per expert: (IA)³ scalings and biases
"""
