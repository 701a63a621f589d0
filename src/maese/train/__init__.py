"""LEARNING: the one loop, and what keeps its work safe."""
