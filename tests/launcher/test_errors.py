"""Mistakes travel between ranks whole."""

import pickle

from colonnade.launcher.errors import Fault, RecipeError, UserError


def test_errors_survive_pickling() -> None:
    faults = [Fault("model.heads", 3, "set it to 2"), Fault("train.steps", 0, "set it to 1")]
    for error in (UserError("a file is missing"), RecipeError(faults)):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
    assert pickle.loads(pickle.dumps(RecipeError(faults))).faults == faults
