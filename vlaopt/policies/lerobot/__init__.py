"""LeRobot's policies, one adapter for each; LeRobot is imported where a checkpoint is loaded, never before."""
