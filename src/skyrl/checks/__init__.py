"""Checks of a run before it is one; ``skyrl.checks.all`` lists them."""
