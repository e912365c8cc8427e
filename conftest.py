"""Loads the suite's plugins: their options have to be known before anything is collected."""

pytest_plugins = ["suite.plugin", "suite.fixtures"]
