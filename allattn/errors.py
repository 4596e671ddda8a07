"""The exceptions that end a command with one line instead of a traceback."""


class UserError(ValueError):
    """A mistake in the input that the user can correct: exit code 2."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows instead of a traceback (IPython asks for it)."""
        return [f"UserError: {self}"]


class RunError(RuntimeError):
    """A run that failed by itself, such as a loss that is not a number: exit code 1."""


class SpikeError(RunError):
    """The loss of a training step leapt.

    Args:
      message: what was found.
      step: the step of that loss; the parameters of the step before it may have been spoiled.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class NotANumberError(SpikeError):
    """The loss, the gradient or a span of a training step is not a number."""


class PreemptedError(RunError):
    """A run that was stopped from outside and has saved its state: exit code 75.

    Launchers start the same command again on this code, and it resumes.

    Args:
      what: what was stopped and where, such as "stopped at step 7".
      advice: how to go on.
    """

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what} by SIGTERM or SIGHUP; {advice}")
        self.what = what
        self.advice = advice


class StoppedByKeyboard(KeyboardInterrupt):
    """A run that Ctrl-C stopped, and that has saved its state: exit code 130."""


def first_line(error: BaseException) -> str:
    """First line of an error's message, or the name of its type where it has none.

    Other libraries' messages run over pages; the first line says what is wrong.
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
