"""Makes trained networks smaller: single weights to zero, or whole channels out. Knows modules, not policies.

| file | holds |
|---|---|
| `scopes.py` | which layers, and by how much |
| `unstructured.py` | L1 pruning of single weights |
| `channels.py` | L1 pruning of hidden channels |
| `widths.py` | which channels hang together, and which of them are hidden |
| `network.py`, `cost.py` | the working copy and its components; parameters and MACs |
| `report.py` | what was removed |
"""

from vlaopt.pruning.channels import prune_channels
from vlaopt.pruning.report import KeptWidth, LayerReport, PruneReport
from vlaopt.pruning.scopes import ScopeAmount
from vlaopt.pruning.unstructured import prune_weights

__all__ = ["KeptWidth", "LayerReport", "PruneReport", "ScopeAmount", "prune_channels", "prune_weights"]
