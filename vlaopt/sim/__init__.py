"""Closed-loop simulation: Meta-World scenes, the tasks and their instructions, success rates."""

from vlaopt.sim.evaluation import EvaluationRecord, Predictor, TaskResult, evaluate, wilson_interval
from vlaopt.sim.metaworld import ACTION_SIZE, CAMERA, CONTROL_HZ, IMAGE_SIZE, STATE_SIZE, Scene, episode_seed
from vlaopt.sim.tasks import TASKS, Phrasings, Task, tasks_named

__all__ = [
    "ACTION_SIZE",
    "CAMERA",
    "CONTROL_HZ",
    "IMAGE_SIZE",
    "STATE_SIZE",
    "TASKS",
    "EvaluationRecord",
    "Phrasings",
    "Predictor",
    "Scene",
    "Task",
    "TaskResult",
    "episode_seed",
    "evaluate",
    "tasks_named",
    "wilson_interval",
]
