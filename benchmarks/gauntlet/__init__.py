"""Silent faults of this field, put back into a copy of the running system: which of them does it notice, at which step,
and under which name?"""
