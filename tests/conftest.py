"""Property tests give the same examples on every machine, so that a red run can be repeated."""

from hypothesis import settings

settings.register_profile("ddptrain", deadline=None, derandomize=True, database=None)
settings.load_profile("ddptrain")
