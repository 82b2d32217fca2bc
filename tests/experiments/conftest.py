"""The toy experiment, in the place of the real ones."""

import pytest

from experiments import launch
from tests.experiments.toy import TOY


@pytest.fixture
def toy(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "load", lambda slug: TOY)
    monkeypatch.setattr(launch, "RESULTS", tmp_path / "recorded")
    monkeypatch.chdir(tmp_path)
    return tmp_path
