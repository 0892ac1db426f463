"""Alarms: a run that goes on and is no good says so. :mod:`~skyrl.monitoring.alarms.rules` has what a rule is,
:mod:`~skyrl.monitoring.alarms.watch` who asks them."""
