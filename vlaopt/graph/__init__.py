"""ONNX graphs: writing them from PyTorch, checking them, and passes over them.

`torch_export` and each pass (`simplify`) are one file with one function to a new model; they never change the model
they are given. What they share is in `topology`, `scopes`, `naming`, `external` and `check`.
"""
