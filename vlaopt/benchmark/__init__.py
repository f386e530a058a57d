"""Measuring a policy as a robot sees it: paced at its control rate, from host memory to host memory.

Knows nothing of backends, sessions or artifacts: it is given a callable.
"""
