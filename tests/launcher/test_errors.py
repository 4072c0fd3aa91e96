"""Errors that ranks send to each other keep their type, message and faults."""

import pickle

from colonnade.launcher.errors import Fault, RecipeError, UserError


def test_errors_survive_pickling() -> None:
    faults = [Fault("model.heads", 3, "set it to 2"), Fault("train.steps", 0, "set it to 1")]
    for error in (UserError("a file is missing"), RecipeError(faults)):
        unpickled = pickle.loads(pickle.dumps(error))
        assert type(unpickled) is type(error)
        assert str(unpickled) == str(error)
    assert pickle.loads(pickle.dumps(RecipeError(faults))).faults == faults
