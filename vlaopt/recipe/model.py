"""What a recipe may hold: one frozen section per stage, every key described where it is declared.

Bounds of one key live here; what two keys mean together lives in `checks`. The descriptions are the documentation:
the JSON Schema and the table of keys in `recipes/README.md` are made from them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import Field

from vlaopt.recipe.fields import Count, Fraction, Many, PathText, Section, SemanticVersion, Slug, Text
from vlaopt.target import Target

SCHEMA = "vlaopt.recipe/1"

Scheme = Literal[
    "none", "int8", "int8-dynamic", "int8-weights", "int4-weights", "fp16", "bf16", "fp8", "nvfp4", "mixed"
]

Limit = Annotated[float, Field(ge=0)]
Scalar = bool | int | float | str | None
TargetT = TypeVar("TargetT")
SWEEP_MOST = 1024
Swept = Annotated[int, Field(ge=1, le=SWEEP_MOST)]


class Policy(Section):
    """Which policy, and where its checkpoint is."""

    type: Slug = Field(description="The policy's adapter, such as `edge-vla`.")
    checkpoint: PathText = Field(description="The checkpoint: a folder or file, relative to the recipe.")
    hub_overrides: dict[Text, PathText] = Field(
        default={},
        description="Local folders in place of what the policy would fetch from a hub, by its config's field.",
    )
    config_overrides: dict[Text, Scalar | Many[Scalar]] = Field(
        default={}, description="Other values for fields of the checkpoint's config, such as `num_inference_steps`."
    )


class Calibration(Section):
    """The calibration set: recorded observations used to find scales."""

    path: PathText = Field(description="Folder of the calibration set, relative to the recipe.")
    samples: Annotated[int, Field(ge=8)] = Field(
        default=256, description="How many of its samples the policy is captured on, spread evenly."
    )


class Export(Section):
    """Checkpoint to FP32 ONNX components."""

    opset: Annotated[int, Field(ge=18, le=22)] = Field(default=20, description="ONNX opset of the components.")
    golden_samples: Count = Field(
        default=32, description="Observations recorded in the artifact with the actions of the eager policy."
    )


class Recovery(Section):
    """Training after pruning, toward the unpruned policy."""

    demonstrations: PathText = Field(description="Demonstrations with actions, relative to the recipe.")
    steps: Count = Field(description="Optimiser steps.")
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = Field(description="Peak learning rate.")
    batch_size: Count = Field(default=64, description="Samples per step.")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Seed of the order of samples.")


class Prune(Section):
    """Smaller components."""

    method: Literal["none", "l1-unstructured", "channels"] = Field(
        default="none", description="What is removed: single weights (the shapes stay) or whole channels."
    )
    amount: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Fraction removed within the scopes; above 0 when there is a method."
    )
    scopes: Many[Text] = Field(default=("*",), description="Globs of what is pruned, such as `vision.*`.")
    exclude: Many[Text] = Field(default=(), description="Globs of what is left alone within the scopes.")
    round_to: Count = Field(default=8, description="`channels`: widths stay multiples of this.")
    global_: bool = Field(
        default=False,
        alias="global",
        description="`l1-unstructured`: one limit over all scopes in place of one per layer.",
    )
    recovery: Recovery | None = Field(default=None, description="Training after pruning; null trains nothing.")


class Rule(Section):
    """A scheme for what a glob matches; the last rule that matches wins."""

    scope: Text = Field(description="Glob over `component.layer` names.")
    scheme: Literal["fp32", "fp16", "bf16", "int8", "int8-dynamic", "int8-weights", "int4-weights", "fp8", "nvfp4"] = (
        Field(
            description="Scheme of what it matches. `fp32`, `fp16` and `bf16` hold for every node, the others for "
            "layers with weights, whose floats are those of their surroundings."
        )
    )


class Quantize(Section):
    """Lower precision, with scales found on the calibration set."""

    scheme: Scheme = Field(
        default="none",
        description="`none` keeps FP32; `int8`, `fp8` and `fp16` look at the calibration set, `fp16` for what would "
        "overflow; `int8-dynamic` finds ranges while running (CPU); `int8-weights`, `int4-weights` and `nvfp4` store "
        "weights and compute in floats; `bf16` has the range of FP32; `mixed` searches the "
        "fastest plan within `accept`.",
    )
    floats: Literal["fp32", "fp16", "bf16"] = Field(
        default="fp32",
        description="What a scheme of fewer bits leaves in floats computes in; norms, softmax and the like stay FP32 "
        "unless a rule names the operator.",
    )
    calibrator: Literal["minmax", "moving-average", "entropy", "percentile", "mse"] = Field(
        default="entropy", description="How a range is found from the activations."
    )
    percentile: Annotated[float, Field(gt=50, le=100)] = Field(
        default=99.99, description="`percentile`: how much of the values lies within the range, in percent."
    )
    steps: Literal["together", "union", "mean"] = Field(
        default="together",
        description="How the loop steps of a component make one range: their values calibrated `together`, or the "
        "`union` or `mean` of the ranges that the calibrator finds for each step by itself.",
    )
    weights: Literal["per-channel", "per-tensor"] = Field(default="per-channel", description="Scales of the weights.")
    bias_correction: bool = Field(
        default=True,
        description="Whether biases take back what rounding to int8 weights adds to the outputs on average.",
    )
    smooth: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="SmoothQuant's alpha: how much of loud channels goes from activations of int8 products into their "
        "weights, such as 0.5; null moves nothing.",
    )
    rules: Many[Rule] = Field(default=(), description="Exceptions by scope; the last rule that matches wins.")
    evaluations: Annotated[int, Field(ge=8, le=10_000)] = Field(
        default=48, description="`mixed`: how many plans the search may run. What a rule covers is not searched."
    )


class Onnx(Section):
    """The final portable graphs."""

    simplify: bool = Field(
        default=True, description="Simplify and fold constants; may be false only when nothing is quantized."
    )


class TensorRt(Section):
    """How TensorRT builds and runs engines, classic and for RTX."""

    optimization_level: Annotated[int, Field(ge=0, le=5)] = Field(
        default=3, description="How long the builder searches for faster kernels."
    )
    workspace_mib: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Scratch memory that a layer may take, in MiB; 0 leaves TensorRT's own limit."
    )
    cuda_graph: bool = Field(
        default=True,
        description="Whether the policy, or else each component, runs as one CUDA graph where it can be captured.",
    )
    version_compatible: bool = Field(
        default=False, description="Classic: engines that later TensorRT versions load too; they may be slower."
    )
    hardware_compatible: bool = Field(
        default=False, description="Classic, x86 only: engines for every GPU from Ampere on; they may be slower."
    )
    profiles: dict[Text, tuple[Count, Count, Count]] = Field(
        default={}, description="Least, usual and largest size of every dynamic dimension, by its name in the graphs."
    )


class Engine(Section):
    """What the target runs."""

    backend: Slug = Field(
        default="auto", description="A backend of the target; `auto` takes the fastest whose gates hold."
    )
    threads: Annotated[int, Field(ge=0, le=1024)] | Literal["auto"] = Field(
        default=0,
        description="Threads of a CPU backend. 0 leaves its own default; `auto` measures where the engine is built: it "
        "doubles them from one on, for as long as that makes the policy 1.1 times as fast.",
    )
    minimum_speedup: Annotated[float, Field(ge=0, le=100)] = Field(
        default=1.02,
        description="A quantized or pruned component ships only when this many times as fast as the plain.",
    )
    allow_shortfall: Fraction = Field(
        default=0.0, description="Fraction of the layers planned in low precision that the engine may run in another."
    )
    tensorrt: TensorRt = Field(default=TensorRt(), description="How TensorRT builds and runs engines.")


class ClosedLoop(Section):
    """Episodes in a simulator."""

    simulator: Literal["metaworld"] = Field(description="Where the policy acts.")
    episodes: Count = Field(default=25, description="Episodes per task; every policy compared sees the same ones.")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Seed of the episodes.")
    tasks: Many[Text] = Field(default=(), description="Tasks by name; an empty list runs all that the policy knows.")


class Verify(Section):
    """How the result is compared with the eager policy."""

    observations: PathText | None = Field(
        default=None, description="Held-out observations, relative to the recipe; null uses the golden ones only."
    )
    samples: Count = Field(default=128, description="How many of them to use, spread evenly.")
    closed_loop: ClosedLoop | None = Field(default=None, description="Episodes in a simulator; null runs none.")


class ActionError(Section):
    """Limits on |action - reference| / standard deviation of that degree of freedom."""

    mean: Limit = Field(default=0.05, description="Limit on the mean.")
    p95: Limit | None = Field(default=None, description="Limit on the 95th percentile; null sets none.")
    max: Limit | None = Field(default=None, description="Limit on the largest; null sets none.")


class Accept(Section):
    """The limits of the gates. A result beyond one of them fails the build."""

    parity: Annotated[float, Field(gt=0)] = Field(
        default=1e-4,
        description="Largest |FP32 ONNX - eager| of a normalised action and, relative to its largest value where that "
        "is above 1, of every tensor that a component takes or gives.",
    )
    action_error: ActionError = Field(
        default=ActionError(), description="Action error, in standard deviations of each degree of freedom."
    )
    gripper_flips: Fraction = Field(default=0.01, description="Fraction of actions whose gripper command changes sign.")
    jerk: Limit = Field(default=0.05, description="Relative increase of the mean jerk.")
    success: Fraction | None = Field(
        default=None,
        description="Lowest success rate (successes / episodes, all tasks together); needs `verify.closed_loop`.",
    )
    success_drop: Fraction | None = Field(
        default=None,
        description="Largest drop of the success rate against the eager policy on the same episodes, 0 to 1; needs "
        "`verify.closed_loop`.",
    )


class Sweep(Section):
    """Values to measure one after another; an empty list measures none."""

    steps: Many[Swept] = Field(default=(), description="Numbers of loop steps to measure latency and action error at.")
    batch: Many[Swept] = Field(default=(), description="Numbers of observations at once to measure latency at.")


class Bench(Section):
    """How the artifact is measured."""

    hz: Annotated[float, Field(gt=0, le=10_000)] = Field(default=20.0, description="Control rate of the paced run.")
    duration_s: Annotated[float, Field(gt=0)] = Field(default=10.0, description="Length of the paced run, seconds.")
    back_to_back_s: Annotated[float, Field(gt=0)] = Field(
        default=3.0, description="Length of the back-to-back run, seconds."
    )
    load: Annotated[int, Field(ge=0, le=1024)] = Field(
        default=0, description="Processes that keep the machine busy meanwhile, as a robot's planners and cameras do."
    )
    sweep: Sweep = Field(default=Sweep(), description="What latency is measured over besides.")


class Sections(Section, Generic[TargetT]):
    """Everything in a recipe, with the target as a name (`RecipeFile`) or resolved (`Recipe`)."""

    schema_: Literal["vlaopt.recipe/1"] = Field(alias="schema", description="Always `vlaopt.recipe/1`.")
    name: Slug = Field(description="The artifact's name.")
    version: SemanticVersion = Field(description="Semantic version; the artifact's is `<version>+<digest>`.")
    description: Text = Field(default="", description="One line for people.")
    target: TargetT = Field(description="A name from `vlaopt target ls`, or the path of a target file.")
    policy: Policy = Field(description="The policy to optimise.")
    calibration: Calibration | None = Field(default=None, description="Calibration set; null when none is needed.")
    export: Export = Field(default=Export(), description="Stage `export`.")
    prune: Prune = Field(default=Prune(), description="Stage `prune`.")
    quantize: Quantize = Field(default=Quantize(), description="Stage `quantize`.")
    onnx: Onnx = Field(default=Onnx(), description="Stage `onnx`.")
    engine: Engine = Field(default=Engine(), description="Stage `engine`.")
    verify: Verify = Field(default=Verify(), description="Stage `verify`.")
    accept: Accept = Field(default=Accept(), description="Limits that stage `verify` holds the result to.")
    bench: Bench = Field(default=Bench(), description="Stage `bench`.")


class RecipeFile(Sections[PathText]):
    """A recipe as its file says it, defaults filled in."""


class Recipe(Sections[Target]):
    """A recipe that passed every check, its target resolved. Made by `vlaopt.recipe.load.load_recipe`."""

    path: Path = Field(exclude=True, description="The recipe's file, absolute.")

    @property
    def folder(self) -> Path:
        """The folder that the recipe's paths are relative to."""
        return self.path.parent

    def locate(self, path: str) -> Path:
        """The absolute place of a path that the recipe names, such as `recipe.policy.checkpoint`."""
        return self.folder / path

    def backends(self) -> tuple[str, ...]:
        """The backends that its engine may be built by, the preferred one first."""
        return tuple(self.target.backends) if self.engine.backend == "auto" else (self.engine.backend,)

    def resolved(self) -> dict[str, Any]:
        """The whole recipe as plain JSON values: every default and the target written out, its path left out."""
        return self.as_json()
