"""Imitation of a scripted expert: recording it, training on it, recovering a pruned network."""
