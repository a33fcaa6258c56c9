import pickle

import pytest

from model.errors import CheckpointInvalid, ConfigInvalid, ModelError

ERRORS = [
    ConfigInvalid("rope_scaling.factor", wanted="a number >= 1", given=0.5),
    CheckpointInvalid("model.norm.weight", problem="misshapen tensor", wanted=(3,), given=(4,)),
    CheckpointInvalid("model.norm.weight", problem="missing tensor"),
]


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_errors_pickle_with_every_attribute(error: ModelError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_messages_name_what_wanted_and_given() -> None:
    assert str(ERRORS[0]) == "config.json: rope_scaling.factor: wanted a number >= 1, given 0.5"
    assert str(ERRORS[1]) == "checkpoint: model.norm.weight: misshapen tensor (wanted (3,), given (4,))"
    assert str(ERRORS[2]) == "checkpoint: model.norm.weight: missing tensor"
