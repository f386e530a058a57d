"""TensorRT, classic and for RTX: engines are built, inspected, opened and run; `cuda` reaches the GPU."""
