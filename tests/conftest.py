"""How Hypothesis draws its examples, for all tests."""

from hypothesis import settings

# Machines are shared: no limit of time per example. The same examples in every run, so that a change and not
# luck turns a run red; `pytest --hypothesis-profile=search` draws new ones.
settings.register_profile("search", deadline=None)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
