"""The whole workflow in one file: build an artifact from a recipe, open it as a robot would, predict, see the numbers.

python scripts/whole_chain.py                                               the shipped policy for this CPU
python scripts/whole_chain.py recipes/edge-vla/cpu.yaml prune.amount=0.5    another recipe or other values
"""

from __future__ import annotations

import sys

import numpy as np

import vlaopt
from vlaopt.runtime.golden import Golden

recipe, overrides = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("recipes/edge-vla/cpu.yaml", [])

# export → prune → quantize → onnx → engine → verify → bench; what has not changed comes from the store.
artifact = vlaopt.build(recipe, overrides=overrides)
print(f"built {artifact.manifest.name} {artifact.version} in {artifact.path}")
for stage, metrics in artifact.manifest.metrics.items():
    error = metrics.get("action_error")
    if error:
        print(f"  after {stage}: mean action error {error['executed']['mean']:.4f} standard deviations")

# From here on neither torch nor onnx is needed: this is what runs on the robot.
policy = vlaopt.open(artifact.path)
golden = Golden.of(artifact)
policy.reset()
for step in range(3):
    print(f"  action {step}: {np.round(policy.predict(golden.observations[0]), 3)}")

chunks = golden.run(policy.predict_chunk)
print(f"largest difference to the reference on golden observations: {np.abs(chunks - golden.actions).max():.3f}")
bench = artifact.manifest.metrics["bench"]
print(f"paced at {bench['hz']:g} Hz: p50 {bench['paced_p50_ms']:.2f} ms, {bench['miss_rate']:.1%} missed")
