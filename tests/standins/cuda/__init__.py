"""Stand-in for NVIDIA's cuda-python; it hides the real one from whoever has this folder first on the path."""
