"""State, optimizer, the jitted steps, checkpoints and the stage loop."""
