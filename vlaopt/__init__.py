"""vlaopt: from a trained Vision-Language-Action policy to a small, fast, checked artifact.

Importing this package loads none of torch, onnx, onnxruntime or tensorrt.
"""

__version__ = "0.1.0"
