"""What can be wrong with a model on disk, as one tree.

    ModelError (ValueError)
    ├── ConfigInvalid        a field of config.json is missing or means nothing to this code
    └── CheckpointInvalid    a file or tensor is missing, misshapen or of a type that cannot be read

All are the fault of the files, not of a caller's request; none is worth a retry. They pickle, with every
attribute, because workers send them to the process that started them.
"""


class ModelError(ValueError):
    """Any fault of a checkpoint directory."""


class ConfigInvalid(ModelError):
    """A field of config.json cannot be used."""

    def __init__(self, field: str, *, wanted: str, given: object) -> None:
        super().__init__(f"config.json: {field}: wanted {wanted}, given {given!r}")
        self.field = field
        """Key in config.json, dotted when nested."""
        self.wanted = wanted
        """What would have been accepted."""
        self.given = given
        """What stands there; None when the key is missing."""

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_config_invalid, (self.field, self.wanted, self.given))


class CheckpointInvalid(ModelError):
    """A file or tensor of the checkpoint cannot be used."""

    def __init__(self, subject: str, *, problem: str, wanted: object = None, given: object = None) -> None:
        detail = "" if wanted is None else f" (wanted {wanted}, given {given})"
        super().__init__(f"checkpoint: {subject}: {problem}{detail}")
        self.subject = subject
        """Name of the tensor, or path of the file."""
        self.problem = problem
        """What is wrong, in words."""
        self.wanted = wanted
        """Shape or type that the config asks for; None when that says nothing."""
        self.given = given
        """Shape or type that the file has."""

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_checkpoint_invalid, (self.subject, self.problem, self.wanted, self.given))


def _rebuild_config_invalid(field: str, wanted: str, given: object) -> ConfigInvalid:
    return ConfigInvalid(field, wanted=wanted, given=given)


def _rebuild_checkpoint_invalid(
    subject: str, problem: str, wanted: object, given: object
) -> CheckpointInvalid:
    return CheckpointInvalid(subject, problem=problem, wanted=wanted, given=given)
