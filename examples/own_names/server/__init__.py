"""The user's own package `server`: a parameter server's state, in one process."""

NAME = "the user's server"


class Parameters:
    """A vector that workers push updates to."""

    def __init__(self, size: int) -> None:
        self.values = [0.0] * size

    def push(self, index: int, delta: float) -> float:
        self.values[index] += delta
        return self.values[index]
