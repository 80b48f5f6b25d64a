"""The errors a user of the package can meet.

Every message finishes the sentence: what was expected, what came, why it matters, what to do. A caller's mistake is a
`HybridError`; our own mistakes stay plain `AssertionError`s.
"""

import pickle


class HybridError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(HybridError, ValueError):
    """A setting is unknown, out of range, or contradicts another one."""


class DataError(HybridError, ValueError):
    """A prompt file, a checkpoint or a tokenizer does not hold what the run needs."""


class RewardError(HybridError, ValueError):
    """A reward has no finite number for a response."""


class ServerError(HybridError, RuntimeError):
    """A server that the run depends on is down, refuses, or answers something else than it should."""


class ServerDown(ServerError):
    """It answers nothing that is meant for us, at any attempt: others need not ask it now."""


class PeerError(HybridError, RuntimeError):
    """Another rank of the job died or hangs; says which, and in what."""


class DivergedError(HybridError, ArithmeticError):
    """The gradient was not finite in so many steps in a row that the run was stopped."""


class ShapeError(HybridError, ValueError):
    """A tensor has the wrong shape, type or device."""


class MegatronMismatch(HybridError, ImportError):
    """The installed megatron-core lacks a symbol that the package borrows, or has it in another form."""


def sendable(error: BaseException, note: str) -> BaseException:
    """`error` with the note, for other processes to raise; RuntimeError(note) where pickle cannot make it again."""
    try:
        error.add_note(note)
        pickle.loads(pickle.dumps(error))  # some errors can be sent but not made again
    except Exception:
        return RuntimeError(note)
    return error
