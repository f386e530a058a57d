"""ONNX graphs: writing them from PyTorch, checking them, and passes over them.

A pass is one file with one pure function from a model to a new model; it never changes the model it is given.
Passes never import each other; what they share about reading a graph is in `topology`.
"""
