"""TensorRT: `rtx` builds for RTX-class GPUs, on any machine; `session` and `cuda` run an engine where a driver is."""
