"""Loads the suite's plugin: its options have to be known before anything is collected."""

pytest_plugins = ["suite.plugin"]
