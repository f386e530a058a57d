"""What the stand-ins for TensorRT, cuda-python, pycuda and trtexec have in common. Never imported by vlaopt."""
