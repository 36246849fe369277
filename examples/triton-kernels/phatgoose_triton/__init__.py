"""GPU kernels for phatgoose in Triton, under the entry point `triton` of `phatgoose.kernels`."""

from phatgoose.routing.kernels import OutsideKernel

from . import triton_gpu

KERNEL = OutsideKernel(
    triton_gpu.triton_gpu,
    takes=triton_gpu.takes,
    runs_on=triton_gpu.runs_on_triton,
    top_experts=triton_gpu.top_experts,
    add_routed=triton_gpu.add_routed,
)
