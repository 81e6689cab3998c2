"""Every exception of ``hypergrad_rl``; the command line prints each as one line."""


class HypergradRLError(Exception):
    """Base of the errors a user can mend: what was got, what was expected, and what to do."""


class ConfigError(HypergradRLError, ValueError):
    """A hyper-parameter is outside its domain."""


class EnvironmentUnsupported(HypergradRLError, ValueError):
    """An environment does not exist, or its spaces are not supported."""


class EnvironmentFault(HypergradRLError, RuntimeError):
    """An environment raised, or returned a non-finite observation or reward."""


class RolloutError(HypergradRLError, ValueError):
    """A rollout is not one that an agent can learn from."""


class ObservationError(HypergradRLError, ValueError):
    """What a trained policy was called with is no observation of its environment."""


class EnvironmentNotReproducible(UserWarning):
    """An environment's episode, played again from its seed and its actions, came out otherwise."""


class RunDirectoryError(HypergradRLError, OSError):
    """A run directory is already in use, or holds no run."""


class CheckpointError(HypergradRLError, ValueError):
    """A checkpoint is missing, damaged, or of another agent."""


class TrainingDiverged(HypergradRLError, ArithmeticError):
    """An update met or made numbers that are not finite."""
