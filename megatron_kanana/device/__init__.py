"""Where we run: CUDA and NCCL, or a CPU and gloo."""

from .process import Device, destroy_process_groups, initialize_process_groups, prepare_device

__all__ = ["Device", "destroy_process_groups", "initialize_process_groups", "prepare_device"]
