"""The fused Triton kernels: forward, backward and decode, their tile sizes, and the backend `triton`."""
